"""Looks for the corpus and the generator that a command names before anything is imported that takes seconds.

Only what the user named is looked at, or the default where nothing at all was given: of two mistakes the one that was
typed is said. What lies elsewhere than on this machine is looked for later, too.
"""

from __future__ import annotations

from collections.abc import Sequence

from raywgen.cli.known_settings import settings_of_command
from raywgen.config import config_file, parse_overrides, read_yaml
from raywgen.config_help import Setting
from raywgen.generators.method_names import METHOD_NAMES


def check_named(command: str, config: str | None, overrides: Sequence[str], keys: Sequence[str] = ("corpus",)) -> None:
    """Refuses a corpus or generator that is not there.

    Args:
        command: The command, such as `zoo train`.
        config: Its first argument: a YAML file, a method, a shipped config, or None.
        overrides: Settings as `key=value`.
        keys: The settings that are looked at: `corpus`, `generator`.

    Raises:
        OutError: Nothing can or should be written to `out`.
        MissingFileError: There is no corpus.
        BundleError: There is no generator.
        ConfigError: The YAML file or a setting cannot be read.
    """
    settings, typed = settings_of_command(command), parse_overrides(overrides)
    is_plain = not overrides and (config is None or config in METHOD_NAMES)
    defaults = {setting.key: setting.default for setting in settings} if is_plain else {}
    given = {**defaults, **_from_file(config), **typed}
    # The settings of a generator are those of its method.
    known = {"generator", *(setting.key.partition(".")[0] for setting in settings)}
    if not known.issuperset(typed):
        return  # Only the command itself can say what was meant by such a key.
    if "out" in given and not _is_checked(command, str(given["out"] or ""), settings):
        return
    for key in keys:
        location = given.get(key)
        if isinstance(location, str) and location.strip() and _REFERENCE not in location:
            _CHECKS[key](location)


def check_corpus(location: str) -> str:
    """Returns the place of a corpus, and refuses a local folder that holds none.

    Raises:
        MissingFileError: There is no corpus.
    """
    # Imported late: Arrow takes its time, too, and commands without a corpus do not need it.
    from raywgen.corpus.storage import CorpusStorage

    if "://" not in location:
        CorpusStorage.at(location).check_manifest()
    return location


def check_generator(location: str) -> str:
    """Returns the place of a generator, and refuses a local folder that holds none.

    Raises:
        BundleError: There is no generator.
    """
    from raywgen.generators.bundle_copies import bundle_folder, is_elsewhere

    if not is_elsewhere(location):
        bundle_folder(location)
    return location


_WRITE_FOLDERS = ("train", "generate", "evaluate", "finetune", "tune", "corpus encode")
_REFERENCE = "${"
"""What begins a reference to another setting or a variable, which only the command itself puts a value for."""
_CHECKS = {"corpus": check_corpus, "generator": check_generator}


def _is_checked(command: str, out: str, settings: Sequence[Setting]) -> bool:
    """Checks the folder of results, which comes before what is read; False where only the command itself can do so."""
    if "://" in out or _REFERENCE in out or command not in _WRITE_FOLDERS:
        return False
    from raywgen.out_folder import checked_out

    checked_out(out, next(setting.default for setting in settings if setting.key == "out"))
    return True


def _from_file(config: str | None) -> dict[str, object]:
    path = None if config is None else config_file(config)
    return {} if path is None else read_yaml(path)
