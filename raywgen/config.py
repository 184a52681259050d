"""Dataclass configs: YAML plus `key=value` overrides in, one complete typed config out."""

from __future__ import annotations

import dataclasses
import io
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from raywgen.files import write_text
from raywgen.inputs import MAX_YAML_BYTES, UnusableFileError, read_yaml_text, yaml_text
from raywgen.names import nearest, one_of
from raywgen.renamed_keys import new_name
from raywgen.trust import named_in, trusting

ConfigT = TypeVar("ConfigT")
SHIPPED = Path(__file__).parent / "configs"
"""The configs that come with the package, one folder for each method or command."""


class ConfigError(ValueError):
    """A config file or override that cannot be used; the message names the key and the remedy."""


def load_config(schema: type[ConfigT], path: str | Path | None = None, overrides: Sequence[str] = ()) -> ConfigT:
    """Merges defaults, a YAML file and `key=value` overrides, in this order.

    Args:
        schema: A dataclass type; its nested dataclasses are the allowed keys, its defaults the default values.
        path: A YAML file, or None for the defaults alone.
        overrides: Dotted assignments, for instance `["training.num_workers=4", "seed=7"]`.

    Raises:
        ConfigError: The file is missing or no YAML mapping, an override is no `key=value`, a key is unknown
            (the nearest right one is named), or a value has the wrong type or is refused by the schema.
    """
    given = [(str(path), _read_yaml(path))] if path is not None else []
    return merge_config(schema, [*given, ("the command line", parse_overrides(overrides))])


def merge_config(
    schema: type[ConfigT], given: Sequence[tuple[str, Mapping[str, object]]], base: ConfigT | None = None
) -> ConfigT:
    """Merges nested mappings, later ones over earlier ones; each comes with a name for messages.

    Args:
        schema: A dataclass type, as for `load_config`. A field whose `metadata` has a function `"group"` is a group of
            keys whose dataclass that function returns, given the values of all other fields; it may import what the
            values name, because a person wrote them.
        given: Names and mappings.
        base: The config they are merged over; the defaults if None.

    Raises:
        ConfigError: A key is unknown, or a value has the wrong type or is refused by the schema.
    """
    node = OmegaConf.structured(schema if base is None else base)
    groups = open_groups(schema)
    for source, content in given:
        check_keys(schema, content, source)
        node = _merge(node, {key: value for key, value in content.items() if key not in groups}, source)
    name = next((source for source, content in given if content), "config")
    outs = [content["out"] for _, content in given if "out" in content]
    if outs and not str(outs[-1] or "").strip():
        _check_out(schema)
    try:
        for key, choose in groups.items():
            with trusting(*named_in(OmegaConf.to_container(node, resolve=True))):
                group = choose(node)
            if OmegaConf.get_type(node, key) is not group:
                node[key] = group
            for source, content in given:
                if content.get(key) is not None:
                    _check_group(group, content[key], source, key)
                    node = _merge(node, {key: content[key]}, source)
        config = OmegaConf.to_object(node)
    except ConfigError:
        raise
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, name, "a value")) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from error
    assert isinstance(config, schema)
    return config


def _merge(node: DictConfig, content: Mapping[str, object], source: str) -> DictConfig:
    for key, value in content.items():
        try:
            merged = OmegaConf.merge(node, {key: value})
        except OmegaConfBaseException as error:
            raise ConfigError(_explain(error, source, key)) from error
        assert isinstance(merged, DictConfig), "a mapping merged into a config is a config"
        node = merged
    return node


def open_groups(schema: type) -> dict[str, Callable[[Mapping[str, object]], type]]:
    """Returns the fields whose dataclass depends on the values of other fields, each with its function for it."""
    fields = dataclasses.fields(schema)
    return {field.name: field.metadata["group"] for field in fields if "group" in field.metadata}


def _check_out(schema: type) -> None:
    """Refuses an empty `out` if it names a folder: everything would be written to the current folder."""
    default = next((field.default for field in dataclasses.fields(schema) if field.name == "out"), "")
    if default:
        raise ConfigError(f"out is empty; name a folder, such as out={default}")


def read_yaml(path: str | Path) -> dict[str, object]:
    """Reads the mapping in a YAML file; `${...}` stays text.

    Raises:
        ConfigError: The file is missing, or holds no mapping.
    """
    return _read_yaml(path)


def shipped_configs(folder: str) -> list[Path]:
    """Returns the YAML files of a folder of the shipped configs."""
    return sorted((SHIPPED / folder).glob("*.yaml"))


def shipped_config(folder: str, name: str | None) -> str | None:
    """Returns the file of a shipped config's bare name; a path stays as it is.

    Raises:
        ConfigError: It is neither; the message says the nearest shipped name.
    """
    if name is None:
        return None
    found = config_file(name, folder)
    if found is None:
        check_file_or_name(name, [path.stem for path in shipped_configs(folder)])
    return str(found or name)


def config_file(name: str, folder: str = "", working_dir: str | Path = "") -> Path | None:
    """Returns the YAML file that a user's name stands for: a file of that name, else the shipped config.

    Args:
        name: A path, or the name of a shipped config without `.yaml`.
        folder: The folder of shipped configs that the name is one of; without one, names are such as `igpg/digits`.
        working_dir: The folder that relative paths begin at; the current one by default.

    Returns:
        The file; None where there is none here.
    """
    places = (Path(working_dir) / name, SHIPPED / folder / f"{name}.yaml")
    return next((place for place in places if place.is_file()), None)


def check_file_or_name(name: str, known: Collection[str]) -> None:
    """Refuses a text that is neither a file name nor one of the known names.

    Raises:
        ConfigError: It is neither; the message says the nearest name.
    """
    if known and not Path(name).exists() and "/" not in name and Path(name).suffix not in (".yaml", ".yml"):
        raise ConfigError(f"'{name}' is no file and none of {', '.join(known)}; did you mean '{nearest(name, known)}'?")


def to_yaml(config: object) -> str:
    """Writes the complete config, with all defaults, as YAML that `load_config` reads back unchanged.

    Texts with `${...}` or `???` keep their meaning in OmegaConf: a reference, and a value that must be given.
    """
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def one_line(error: Exception) -> str:
    """Returns an error's text on one line; YAML spreads its positions over several."""
    return " ".join(str(error).split())


def save_config(config: object, path: str | Path) -> None:
    """Writes the complete config beside a run's results."""
    write_text(path, to_yaml(config))


def _explain(error: OmegaConfBaseException, source: str, key: str) -> str:
    name = getattr(error, "full_key", None) or key
    known = choices(_hint_of(error))
    if known and error.value is not None:
        return f"{source}: {one_of(name, error.value, known)}"
    # For an element of a list OmegaConf knows neither the key nor the value, and leaves its placeholders.
    reason = str(error).splitlines()[0].replace(" '$VALUE' of type '$VALUE_TYPE'", "")
    return f"{source}: {name}: {reason}"


def _hint_of(error: OmegaConfBaseException) -> Any:
    """Returns the type of the field or list element that OmegaConf refuses a value for; None where there is no type."""
    group = getattr(error, "object_type", None)
    if dataclasses.is_dataclass(group):
        return typing.get_type_hints(group).get(str(error.key))
    return getattr(error, "ref_type", None)


def choices(hint: Any) -> tuple[Any, ...]:
    """Returns the values that a `Literal` names, also one within a list or beside None; empty for other types."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    return next((found for part in typing.get_args(hint) if (found := choices(part))), ())


def load_yaml(path: str | Path) -> object:
    """Reads a YAML file at a path or URI; `${...}` stays text.

    OmegaConf reads 1e-3 as a number, plain YAML 1.1 reads it as text.

    Raises:
        OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException: The file cannot be read, or is not YAML.
    """
    try:
        text = _fetched(str(path)) if "://" in str(path) else read_yaml_text(path)
        return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except RecursionError as error:
        raise UnusableFileError(f"{path} is nested too deeply") from error


def _fetched(uri: str) -> str:
    # Imported late: pyarrow takes long, and only URIs need it.
    from raywgen.storage import read_file

    return yaml_text(read_file(uri, MAX_YAML_BYTES), uri)


def _read_yaml(path: str | Path) -> dict[str, object]:
    if "://" not in str(path):
        _check_file(Path(path))
    try:
        content = load_yaml(path)
    except FileNotFoundError as error:
        raise ConfigError(f"config file {path} does not exist; give the path or URI of a YAML file") from error
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read ({error}); it must hold `key: value` lines") from error
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"config file {path} is not valid YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config file {path} must hold `key: value` lines, not a {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def _check_file(path: Path) -> None:
    """Refuses a folder, and a file that is not there, and names what may have been meant."""
    if path.is_dir():
        inside = next((f", such as {each}" for each in sorted(path.glob("*.yaml"))), "")
        raise ConfigError(f"config file {path} is a folder; give a YAML file{inside}")
    if not path.exists():
        beside = [str(each) for each in sorted(path.parent.glob("*.y*ml"))]
        near = nearest(path, [*beside, *map(_shown, SHIPPED.rglob("*.yaml")), "config.yaml"])
        raise ConfigError(f"config file {path} does not exist; did you mean {near}? Shipped ones are in configs/")


def _shown(path: Path) -> str:
    """Returns a path relative to the working folder where it lies below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def given_once(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides that a person typed, and refuses two different values for one key.

    Raises:
        ConfigError: A key has two values.
    """
    given: dict[str, str] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        if given.setdefault(key, value) != value:
            raise ConfigError(f"{key} is given twice, as {given[key]!r} and as {value!r}; give it once")
    return list(overrides)


def parse_overrides(overrides: Sequence[str]) -> dict[str, object]:
    """Returns the nested mapping that dotted assignments such as `training.seed=7` make.

    Raises:
        ConfigError: One is no `key=value`.
    """
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise ConfigError(f"'{override}' is not an override; write it as key=value, for instance seed=7")
    # YAML reads an empty value as null, but `group=` means the empty text.
    quoted = [f"{override}''" if override.index("=") == len(override) - 1 else override for override in overrides]
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist(quoted))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the overrides {list(overrides)}: {one_line(error)}") from error
    assert isinstance(parsed, dict)
    return {str(key): value for key, value in parsed.items()}


def check_keys(
    schema: Any, content: Mapping[str, object], source: str, prefix: str = "", root: _Root | None = None
) -> None:
    """Refuses keys that a config class does not have.

    Raises:
        ConfigError: A key is unknown; the message gives its new name, or the nearest known key.
    """
    root = root or _Root(schema, prefix)
    fields = {field.name: field for field in dataclasses.fields(schema)}
    hints = typing.get_type_hints(schema)
    for key, value in content.items():
        if key not in fields:
            renamed = new_name([*_leaves(f"{prefix}{key}", value), f"{prefix}{key}"], root.has)
            if renamed:
                raise ConfigError(f"unknown key '{renamed[0]}' in {source}; it is called '{renamed[1]}' now")
            near = nearest(key, fields)
            raise ConfigError(
                f"unknown key '{prefix}{key}' in {source}; did you mean '{prefix}{near}'? "
                f"(known here: {', '.join(sorted(fields))})"
            )
        if dataclasses.is_dataclass(hints[key]) and "group" not in fields[key].metadata:
            _check_group(hints[key], value, source, f"{prefix}{key}", root)


def _leaves(key: str, value: object) -> list[str]:
    if not isinstance(value, dict):
        return [key]
    return [leaf for name, entry in value.items() for leaf in _leaves(f"{key}.{name}", entry)]


@dataclasses.dataclass(frozen=True, slots=True)
class _Root:
    """A config class, and the prefix of its keys in messages."""

    schema: type
    prefix: str

    def has(self, key: str) -> bool:
        hint: Any = self.schema
        for name in key.removeprefix(self.prefix).split("."):
            hint = typing.get_type_hints(hint).get(name) if dataclasses.is_dataclass(hint) else None
        return hint is not None


def _check_group(schema: Any, value: object, source: str, key: str, root: _Root | None = None) -> None:
    if not isinstance(value, dict):
        renamed = new_name([key], root.has) if root else None
        if renamed:
            raise ConfigError(f"unknown key '{renamed[0]}' in {source}; it is called '{renamed[1]}' now")
        raise ConfigError(f"'{key}' in {source} holds a group of keys, not {value!r}")
    check_keys(schema, value, source, f"{key}.", root)
