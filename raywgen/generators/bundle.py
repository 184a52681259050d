"""Saves and loads bundles: trained generators as safetensors, a JSON config and a README.

A bundle is all that `raywgen.load` needs; it holds no pickles and no paths of the machine that trained it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from raywgen.config_places import without_places
from raywgen.files import write_text
from raywgen.generators.bundle_copies import CONFIG, BundleError, local_bundle, opened_bundle
from raywgen.generators.interface import DataSpec, Generator
from raywgen.generators.registry import MethodImportError, build, method
from raywgen.generators.settings import GeneratorConfig
from raywgen.inputs import MAX_JSON_BYTES, open_regular, read_regular
from raywgen.nn.bounds import Bounded
from raywgen.sealed import SealError, file_checksum, sealed_json, unseal
from raywgen.storage import Storage
from raywgen.stored_config import stored_config
from raywgen.tasks.encoders import CARD, WEIGHTS, EncoderError, copy_encoder, encoder_kind
from raywgen.trust import UntrustedError, reading
from raywgen.weights import (
    Layout,
    Normalizer,
    NormalizerTable,
    StateDict,
    load_state_dict,
)
from raywgen.weights.safetensors_stream import StreamedTensor, save_streamed
from raywgen.weights.tensors import find_ties
from raywgen.weights.vector_file import write_vector

_WEIGHTS = "generator.safetensors"
_CARD = "README.md"
_PART = 1 << 22
SCHEMA_VERSION = 3
ENCODER = "encoder"
"""The folder of a bundle that holds the generator's frozen encoder."""
_REMEDY = "restore it from a copy, or delete the folder and train it again by the same command"


class BundleFormatError(BundleError):
    """Another version of raywgen wrote the bundle, which is intact; the message names that version."""


def build_generator(
    name: str, config: GeneratorConfig, normalizers: NormalizerTable, data: DataSpec, seed: int
) -> Generator:
    """Builds an untrained generator; equal arguments give equal weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(name, config, normalizers, data)


def save_bundle(
    generator: Generator,
    folder: str | Path,
    facts: Mapping[str, Any],
    tensors: Mapping[str, StreamedTensor] | None = None,
) -> None:
    """Writes a bundle.

    A frozen encoder that lies in a folder is copied into the bundle.

    Args:
        generator: The generator; its values do not matter where `tensors` are given.
        folder: A local path or a URI.
        facts: Corpus, recipe, seed and the like, for its config and README.
        tensors: The generator's parameters and buffers, which are written block by block.

    Raises:
        WeightsError, EncoderError, StorageError: The disk is full or the folder cannot be written.
    """
    storage = Storage.at(folder)
    if storage.is_local:
        _save(generator, Path(storage.root), facts, tensors)
        return
    with TemporaryDirectory(prefix="raywgen-") as temporary:
        if storage.exists(ENCODER):  # Whoever launched the run has put it there.
            storage.download(ENCODER, Path(temporary) / ENCODER)
        _save(generator, Path(temporary), facts, tensors)
        storage.upload(temporary, "", last=CONFIG)


def _save(
    generator: Generator, folder: Path, facts: Mapping[str, Any], tensors: Mapping[str, StreamedTensor] | None
) -> None:
    copied = [key for key, encoder in generator.encoders().items() if encoder_kind(encoder) == "folder"]
    for key in copied:
        copy_encoder(generator.encoders()[key], str(folder / _copy_of(key)))
    if tensors is None:
        tensors = {name: StreamedTensor.of(tensor.cpu()) for name, tensor in generator.state_dict().items()}
    written = {f"model.{name}": tensor for name, tensor in tensors.items()}
    for layout_id, (_, normalizer) in generator.normalizers.items():
        written[f"normalizer.{layout_id}.base"] = StreamedTensor.of(normalizer.base_N.cpu())
        written[f"normalizer.{layout_id}.scale"] = StreamedTensor.of(normalizer.scale_N.cpu())
    ties = find_ties({f"model.{name}": tensor for name, tensor in generator.state_dict().items()})
    save_streamed(written, folder / _WEIGHTS, {"method": generator.method, **ties})
    starts = {
        key: normalizer for key, (_, normalizer) in generator.normalizers.items() if normalizer.start_D is not None
    }
    for layout_id, normalizer in starts.items():
        _save_start(normalizer, folder / _start_of(layout_id))
    content = {
        "schema_version": SCHEMA_VERSION,
        "method": generator.method,
        "config": dataclasses.asdict(without_places(generator.config)),
        "data": dataclasses.asdict(generator.data),
        "layouts": {
            layout_id: Layout(layout.tensors).to_json() for layout_id, (layout, _) in generator.normalizers.items()
        },
        "facts": dict(facts),
        "encoders": copied,
        "starts": sorted(starts),
        "files": _checksums(folder, {ENCODER, *map(_copy_of, copied)}, starts),
    }
    for key in copied:
        _put(content["config"], key, _copy_of(key))
    write_text(folder / _CARD, _card(generator, facts))
    # Written last, because this file marks a run as finished.
    write_text(folder / CONFIG, sealed_json(content, indent=1))


def load_bundle(folder: str | Path) -> Generator:
    """Reads a bundle, ready to generate.

    Args:
        folder: A local path, or a URI as `local_bundle` takes it.

    Raises:
        BundleError: The folder holds none, one of its files is damaged, or its method is not there.
        EncoderError: It works with an encoder that is not there, or is another one.
        UntrustedError: It names a package to import or an address to contact, and the user did not.

    Warns:
        UserWarning: The bundle has no checksums, because an older version wrote it.
    """
    with opened_bundle(folder) as local:
        return _load(local)


def _load(folder: Path) -> Generator:
    content = _read_config(folder)
    if "files" not in content:
        warnings.warn(
            f"{folder} has no checksums, because an older raywgen wrote it: damage to this generator would not be "
            "noticed; train it again to have them",
            stacklevel=2,
        )
    _check_files(folder, content)
    try:
        tensors = load_state_dict(folder / _WEIGHTS)
        for key in content.get("encoders", []):
            _put(content["config"], key, str(folder.absolute() / _copy_of(key)))
        with reading(str(folder / CONFIG), str(folder)):
            config = stored_config(method(content["method"]).Config, content["config"], str(folder / CONFIG))
            with Bounded((folder / _WEIGHTS).stat().st_size):
                normalizers = _pop_normalizers(content["layouts"], tensors, folder, content)
                generator = build(content["method"], config, normalizers, DataSpec(**content["data"]))
        generator.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    except UntrustedError:
        raise
    except MethodImportError as error:
        raise BundleError(f"{folder} is not loaded: {error}") from error
    except EncoderError as error:
        raise EncoderError(f"{folder} needs the encoder that it was trained with: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise BundleError(f"{folder} is damaged ({error}); {_REMEDY}") from error
    return generator.eval()


def _pop_normalizers(
    layouts: Mapping[str, Any], tensors: StateDict, folder: Path, content: Mapping[str, Any]
) -> NormalizerTable:
    starts = content.get("starts", [])
    found = {}
    for layout_id, rows in layouts.items():
        layout = Layout.from_json(rows)
        base_N, scale_N = (tensors.pop(f"normalizer.{layout_id}.{name}") for name in ("base", "scale"))
        normalizer = Normalizer(layout, base_N, scale_N)
        if layout_id in starts:
            if not layout_id.isalnum():  # It names a file.
                raise ValueError(f"'{layout_id}' is no id of a layout")
            normalizer = normalizer.with_start_file(folder / _start_of(layout_id))
        # Older versions named layouts otherwise.
        found[layout.id] = layout, normalizer
    return found


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise BundleError(f"{folder} holds no {CONFIG}: it is no generator; train one by `raywgen train`")
    try:
        content = unseal(read_regular(path, MAX_JSON_BYTES), is_required=False)
    except (SealError, OSError) as error:
        raise BundleError(f"{path} is damaged ({error}); {_REMEDY}") from error
    if (version := content.get("schema_version")) != SCHEMA_VERSION:
        raise BundleFormatError(
            f"{path} has format {version}, this raywgen reads format {SCHEMA_VERSION}; raywgen 0.1 reads format 1, "
            "early versions of 0.2 format 2, and later versions read later formats; use that version, or train the "
            "generator again"
        )
    return content


def _start_of(layout_id: str) -> str:
    """The file in a bundle of the start that a layout's networks share."""
    return f"starts/{layout_id}.safetensors"


def _save_start(normalizer: Normalizer, path: Path) -> None:
    """Writes a start, or gives the file that holds it a further name, so that a run's bundles share it."""
    assert normalizer.start_D is not None
    if normalizer.start_file and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # The file may lie on another disk, or have been deleted.
            os.link(normalizer.start_file, path)
            return
    write_vector(path, len(normalizer.start_D), normalizer.start_D.cpu().split(_PART))


def _checksums(folder: Path, encoders: Collection[str], starts: Collection[str]) -> dict[str, str]:
    """Returns the checksums of the files that decide what a bundle generates, except the config."""
    names = [_WEIGHTS, *(f"{encoder}/{name}" for encoder in sorted(encoders) for name in (CARD, WEIGHTS))]
    names += [_start_of(layout_id) for layout_id in sorted(starts)]
    return {name: file_checksum(folder / name) for name in names if (folder / name).is_file()}


def check_bundle(folder: str | Path) -> None:
    """Compares every file of a bundle with its checksum.

    Raises:
        BundleError: There is no bundle, or a file of it is damaged or missing.
    """
    with opened_bundle(folder) as local:
        _check_files(local, _read_config(local))


def _check_files(folder: Path, content: Mapping[str, Any]) -> None:
    for name, expected in content.get("files", {}).items():
        _check_file(folder, name, expected)


def _check_file(folder: Path, name: str, expected: str) -> None:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise BundleError(f"{folder / CONFIG} names '{name}', which lies outside of the folder; {_REMEDY}")
    try:
        found = file_checksum(path)
    except FileNotFoundError as error:
        raise BundleError(f"{path} does not exist; {_REMEDY}") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error}); check the file and its permissions") from error
    if found != expected:
        raise BundleError(
            f"{path} is damaged, or belongs to another generator: it is not what {CONFIG} names; {_REMEDY}"
        )


def _copy_of(key: str) -> str:
    """Returns the folder, within a bundle, of the encoder that a key of the config names."""
    return key.rpartition(".")[2]


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    first, _, rest = key.partition(".")
    if rest:
        _put(tree[first], rest, value)
    else:
        tree[first] = value


def bundle_facts(folder: str | Path) -> dict[str, Any]:
    """Returns the facts that were written down about a bundle when it was trained.

    Raises:
        BundleError: The folder holds no bundle, or its config is damaged.
    """
    return _read_config(local_bundle(folder)).get("facts", {})


def bundle_digest(folder: str | Path) -> str:
    """Returns 32 hex digits that identify a bundle's config and values."""
    folder, digest = local_bundle(folder), hashlib.sha256()
    for name in (CONFIG, _WEIGHTS):  # The config holds the checksums of starts.
        with open_regular(folder / name) as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _card(generator: Generator, facts: Mapping[str, Any]) -> str:
    num_parameters = sum(parameter.numel() for parameter in generator.parameters())
    layouts = "\n".join(
        f"- `{layout_id}`: {layout.num_values:,} values in {len(layout.tensors)} tensors"
        for layout_id, (layout, _) in generator.normalizers.items()
    )
    arguments = "instruction=..., data=..." if generator.data.has_tasks else "instruction=NAME"
    rows = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    return (
        f"# A {generator.method} generator of neural-network weights\n\n"
        f"{num_parameters:,} parameters. Use it by `raywgen.load(FOLDER).fill(module, {arguments})`.\n\n"
        f"## Layouts it was trained on\n\n{layouts}\n\n## Facts\n\n{rows}\n"
    )
