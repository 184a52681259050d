"""Networks in several files: reads their index, and recognises parts without one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from urllib.parse import unquote

from raywgen.corpus.errors import CorpusError
from raywgen.corpus.source_tree import SourceTree
from raywgen.corpus.storage import CorpusStorage

# A variant stands before the format (`model.fp16.safetensors.index.json`) or behind the word index.
_INDEX = re.compile(r"(.+)\.(?:safetensors|bin)\.index(?:\.([\w-]+))?\.json", re.IGNORECASE)
_NUMBERED = re.compile(r".+-0*(\d+)-of-0*(\d+)\.\w+")
_PIPELINE = re.compile(r"layer_\d+-(?:model_\d+-)?model_states\.pt")
_RANKS = (re.compile(r"mp_rank_\d+_model_states\.pt"), re.compile(r"consolidated\.\d+\.(?:pth|pt|safetensors)"))
_PART = re.compile("|".join(f"(?:{pattern.pattern})" for pattern in (_NUMBERED, _PIPELINE, *_RANKS)))
_RANK_FOLDER = re.compile(r"mp_rank_\d+(?:_\d+)?")


def is_index(name: str) -> bool:
    """Whether a file is the index of a sharded network."""
    return _INDEX.fullmatch(name) is not None


def name_of_index(index: PurePosixPath) -> PurePosixPath:
    """Returns the name of the whole network."""
    found = _INDEX.fullmatch(index.name)
    assert found is not None, "the caller checks is_index"
    return index.with_name(".".join(part for part in found.groups() if part))


def parts_of_index(tree: SourceTree, index: PurePosixPath) -> list[PurePosixPath]:
    """Returns the files that an index names.

    Raises:
        CorpusError: The file is no index, or a part is missing.
    """
    names = weight_map(tree.read_text(index), tree.full(index)).values()
    parts = [index.parent / name for name in dict.fromkeys(names)]
    if missing := [part for part in parts if part not in tree.sizes]:
        raise CorpusError(f"{tree.full(missing[0])} is missing, {tree.full(index)} names it; fetch it again")
    return parts


def read_weight_map(file: str) -> dict[str, str]:
    """Reads the file name of each tensor from an index at a path or URI.

    Raises:
        CorpusError: The index cannot be read, or is no index.
    """
    location, mark, query = file.partition("?") if "://" in file else (file, "", "")
    folder, _, name = location.rpartition("/")
    content = CorpusStorage.at(f"{folder}{mark}{query}").read(unquote(name) if "://" in file else name)
    return weight_map(content.decode(errors="replace"), file)


def weight_map(text: str, source: str) -> dict[str, str]:
    """Parses the file name of each tensor from the text of an index.

    Raises:
        CorpusError: The text is no index, or names a file in another folder.
    """
    try:
        content: object = json.loads(text)
    except ValueError:
        content = None
    names = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(names, dict) or not names or not all(map(_lies_beside, names.values())):
        raise CorpusError(f"{source} is no index of a sharded checkpoint; fetch it again")
    return names


def _lies_beside(name: object) -> bool:
    """Whether a name is a plain file name, which cannot lead out of the folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)


def may_be_part(file: PurePosixPath) -> bool:
    """Whether the name of a file or of its folder is typical of a part of a network."""
    folder, _, name = str(file).rpartition("/")
    return _PART.fullmatch(name) is not None or _RANK_FOLDER.fullmatch(folder.rpartition("/")[2]) is not None


def stray_part(tree: SourceTree, file: PurePosixPath) -> str | None:
    """Explains why a file without an index is a part of a network; returns None if it is not."""
    if not may_be_part(file):
        return None
    numbered = _NUMBERED.fullmatch(file.name)
    if numbered is not None and int(numbered[2]) > 1:
        return f"is part {numbered[1]} of {numbered[2]} of a network, and no index beside it names it; fetch the index"
    if _PIPELINE.fullmatch(file.name):
        return "is one layer of a network split by pipeline parallelism; join the parts by DeepSpeed's ds_to_universal"
    of_ranks = next((pattern for pattern in _RANKS if pattern.fullmatch(file.name)), None)
    if of_ranks is not None:
        count = sum(of_ranks.fullmatch(other.name) is not None for other in tree.files(file.parent))
    elif _RANK_FOLDER.fullmatch(file.parent.name):
        count = sum(_RANK_FOLDER.fullmatch(other.name) is not None for other in tree.folders(file.parent.parent))
    else:
        count = 1
    return (
        f"is one of {count} parts of a network split by tensor parallelism; join the parts first" if count > 1 else None
    )
