"""The manifest of a corpus lists its files, their content, and the networks.

It is written last and in one step: a folder without a manifest is no corpus, and a reader never sees half of one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import pyarrow as pa

from raywgen.corpus.errors import RESTORE, ChangedCorpusError, CorpusError, DamagedFileError, MissingFileError
from raywgen.corpus.facts import NetworkFacts, TaskFacts
from raywgen.corpus.shards import WEIGHTS, Shard
from raywgen.corpus.storage import MANIFEST, CorpusStorage
from raywgen.inputs import UnusableFileError, check_stays, inside, parse_json
from raywgen.parquet import bounded_table
from raywgen.sealed import SealError, unseal
from raywgen.trust import StoredRecipe
from raywgen.weights import Layout

SCHEMA_VERSION = 2
# In this version every form of an architecture was a layout of its own, with the present form id as its id.
_LAYOUTS_BY_FORM = 1
CHECKPOINTS = "checkpoints.parquet"
TASKS = "tasks.parquet"
QUARANTINE = "quarantine.parquet"
PAGES = "pages.parquet"


@dataclass(frozen=True, slots=True)
class Contents:
    """The checked content of a manifest.

    Attributes:
        shards: Every shard.
        networks: Layout id -> network.
        forms: Form id -> the layout in which checkpoints are stored, arranged like their network's.
        layout_of: In a corpus of the oldest schema, the present id of each layout, by the id that its files use.
        statistics: Layout id -> sums over its checkpoints.
    """

    shards: list[Shard]
    networks: dict[str, NetworkFacts]
    forms: dict[str, Layout]
    layout_of: dict[str, str]
    statistics: dict[str, Any]

    @classmethod
    def read(cls, manifest: dict[str, Any], storage: CorpusStorage) -> Self:
        """Parses a manifest from `read_manifest`.

        Raises:
            DamagedFileError: The manifest names files outside of the corpus, or its parts do not fit each other.
        """
        try:
            return cls._read(manifest, storage)
        except (KeyError, TypeError, AttributeError, UnusableFileError) as error:
            raise DamagedFileError(f"{storage.name}/{MANIFEST} is damaged ({error}); {RESTORE}") from error

    @classmethod
    def _read(cls, manifest: dict[str, Any], storage: CorpusStorage) -> Self:
        shards = [Shard(**row) for row in manifest["shards"]]
        _check_names(storage, [shard.path for shard in shards], [shard.sha256 for shard in shards])
        _check_names(storage, list(manifest["files"].values()))
        networks_read = [with_source(NetworkFacts.from_json(row), storage.name) for row in manifest["networks"]]
        # Of several networks of one layout the first one counts, at the position of the last one.
        first = {network.layout.id: network for network in reversed(networks_read)}
        networks = {network.layout.id: first[network.layout.id] for network in networks_read}
        forms = {network.layout.form_id: network.layout for network in networks_read}
        forms |= {key: Layout.from_json(rows) for key, rows in manifest.get("forms", {}).items()}
        if changed := [key for key, form in forms.items() if form.form_id != key or form.id not in networks]:
            raise KeyError(f"the form {changed[0]}")
        statistics, layout_of = manifest.get("statistics", {}), {}
        if manifest["schema_version"] == _LAYOUTS_BY_FORM:
            layout_of = {form_id: layout.id for form_id, layout in forms.items()}
            shards = [replace(each, layout_id=layout_of[each.layout_id], form_id=each.layout_id) for each in shards]
            statistics = {layout_of[form_id]: sums for form_id, sums in reversed(statistics.items())}
        unknown = [shard.path for shard in shards if shard.layout_id not in networks]
        if unknown or not {CHECKPOINTS, TASKS} <= set(manifest["files"]):
            raise KeyError(f"no network of {unknown[0]}" if unknown else "checksums of the facts")
        for shard in shards:
            form = forms[shard.form_id] if shard.form_id else networks[shard.layout_id].layout
            if shard.num_rows and shard.num_bytes < form.num_bytes:
                raise KeyError(f"{shard.path} is shorter than one of its checkpoints")
        arranged = {key: form.arranged_like(networks[form.id].layout) for key, form in forms.items()}
        return cls(shards, networks, arranged, layout_of, statistics)


def _check_names(storage: CorpusStorage, names: Sequence[object], checksums: Sequence[object] = ()) -> None:
    """Refuses files outside of the corpus, and checksums that could be the name of any file."""
    for name in names:
        plain = inside(name)
        if storage.is_local:
            check_stays(storage.root, plain)
    if wrong := [each for each in checksums if not isinstance(each, str) or not re.fullmatch("[0-9a-f]{64}", each)]:
        raise UnusableFileError(f"{wrong[0]!r} is no checksum")


FactsT = TypeVar("FactsT", NetworkFacts, TaskFacts)


def with_source(facts: FactsT, location: str) -> FactsT:
    """Returns facts whose recipe records the corpus that it came from."""
    if not isinstance(facts.recipe, dict):
        raise DamagedFileError(f"{location}: a recipe is {facts.recipe!r} and no JSON object; {RESTORE}")
    num_stored = sum(spec.num_values for spec in facts.layout.tensors) if isinstance(facts, NetworkFacts) else 0
    return replace(facts, recipe=StoredRecipe.of(facts.recipe, location, num_stored))


def read_manifest(storage: CorpusStorage) -> dict[str, Any]:
    """Reads `manifest.json`; raises as `Corpus.open` does."""
    storage.check_manifest()
    try:
        text = storage.read(MANIFEST)
        manifest = parse_json(text)
        version = manifest["schema_version"]
        missing = {"recipe", "networks", "shards", "files", "sha256", "checksum"} - set(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{storage.name}/{MANIFEST} is damaged ({error}); {RESTORE}") from error
    if version not in (_LAYOUTS_BY_FORM, SCHEMA_VERSION):
        raise CorpusError(
            f"{storage.name} has corpus schema {version}, this version reads {SCHEMA_VERSION}; "
            "use the version of raywgen that wrote it"
        )
    if missing:
        raise DamagedFileError(f"{storage.name}/{MANIFEST} lacks {sorted(missing)}; {RESTORE}")
    try:
        return unseal(text)
    except SealError as error:
        raise DamagedFileError(f"{storage.name}/{MANIFEST} is damaged: {error}; {RESTORE}") from error


def check_shards(storage: CorpusStorage, shards: Sequence[Shard]) -> None:
    """Checks that every shard is there in full length.

    Raises:
        MissingFileError, DamagedFileError: One is not.
    """
    # An object store takes as long for one file as for a page of its listing.
    listed: dict[str, int] = {}
    if not storage.is_local:
        with suppress(OSError):  # Who may read a file need not have the right to list its folder.
            listed = storage.sizes(WEIGHTS)
    for shard in shards:
        size = listed.get(shard.path.removeprefix(f"{WEIGHTS}/")) or storage.size(shard.path)
        if size is None:
            raise MissingFileError(f"{storage.name}/{shard.path} is missing; {RESTORE}")
        if size != shard.num_bytes:
            raise DamagedFileError(
                f"{storage.name}/{shard.path} has {size} bytes, the manifest says {shard.num_bytes}; {RESTORE}"
            )


def read_facts(storage: CorpusStorage, manifest: dict[str, Any], kind: str) -> pa.Table:
    """Reads one of the files of facts.

    Raises:
        MissingFileError, DamagedFileError: It cannot be read, or is not the one that was written.
    """
    name = manifest["files"][kind]
    content = storage.read(name)
    if hashlib.sha256(content).hexdigest() != manifest["sha256"][name]:
        raise DamagedFileError(f"{storage.name}/{name} has another checksum than the manifest says; {RESTORE}")
    # Without threads: a short process that ends while Arrow's threads start is sometimes aborted.
    try:
        return bounded_table(pa.BufferReader(content), name)
    except (UnusableFileError, pa.ArrowException, OSError) as error:
        raise DamagedFileError(f"{storage.name}/{name} cannot be read ({error}); {RESTORE}") from error


def cause(error: CorpusError, storage: CorpusStorage, manifest: dict[str, Any]) -> CorpusError:
    """Returns the error itself, or one that says that the corpus was replaced since its manifest was read."""
    try:
        is_same = read_manifest(storage) == manifest
    except MissingFileError:
        return ChangedCorpusError(
            f"{storage.name} was deleted, or is being rebuilt, while it was read; "
            "run the same command again when it is there"
        )
    except CorpusError as other:
        return other
    return error if is_same else rebuilt(storage)


def rebuilt(storage: CorpusStorage) -> ChangedCorpusError:
    """Returns the error for a corpus that was replaced."""
    return ChangedCorpusError(f"{storage.name} was rebuilt while it was read; run the same command again")
