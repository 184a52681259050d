"""Names networks after their folders and files, if these are more telling than a hash."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from raywgen.corpus.runs import without_progress

_NUMBERED = re.compile(r"[-_ ]*\d+$")
_LETTERS = re.compile(r"[^\W\d_].*[^\W\d_]")
# Generic names of folders and files of weights.
_SAYS_NOTHING = {
    *("model", "models", "net", "nets", "network", "networks", "checkpoint", "checkpoints", "ckpt", "ckpts", "weight"),
    *("weights", "run", "runs", "in", "out", "output", "outputs", "data", "tmp", "temp", "file", "files", "corpus"),
    *("export", "exported", "download", "downloads", "main", "test", "train", "state_dict", "pytorch_model", "adapter"),
    *("adapter_model", "diffusion_pytorch_model", "snapshot", "snapshots", "result", "results", "experiment"),
    *("experiments", "exp", "exps", "log", "logs", "lightning_logs", "version", "trial", "trials", "seed", "seeds"),
    *("best", "last", "latest", "final", "checkpoint_best", "checkpoint_last", "root", "home", "work", "step", "epoch"),
}


def network_names(checkpoints: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, str]:
    """Finds a name for each layout whose checkpoints share one in their folders or files.

    Args:
        checkpoints: Id and source of every checkpoint, by layout id.

    Returns:
        Layout id -> name, without layouts that have no telling name. Names of two layouts may be equal.
    """
    candidates = {layout_id: _candidates(rows) for layout_id, rows in checkpoints.items()}
    counts = Counter((rank, name) for names in candidates.values() for rank, name in enumerate(names))
    chosen = {}
    for layout_id, names in candidates.items():
        ranked = [(rank, name) for rank, name in enumerate(names) if name]
        if ranked:
            chosen[layout_id] = next((name for rank, name in ranked if counts[rank, name] == 1), ranked[0][1])
    return chosen


def _candidates(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Returns candidates, best first: the folder, the file, both, and the folder of the source."""
    ids = [checkpoint_id.rpartition("/") for checkpoint_id, _ in rows]
    folder = _of_folder([PurePosixPath(above).parts for above in dict.fromkeys(above for above, _, _ in ids)])
    stem = _of_files([name for _, _, name in ids])
    sources = dict.fromkeys(source.partition("?")[0].rpartition("/")[0] for _, source in rows)
    return [
        folder,
        stem,
        f"{folder}-{stem}" if folder and stem else "",
        _of_folder([PurePosixPath(source).parts[-1:] for source in sources]),
    ]


def _of_folder(folders: Sequence[tuple[str, ...]]) -> str:
    shared = []
    for parts in zip(*folders, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return next((part for part in reversed(shared) if without_progress(part) == part and _says_something(part)), "")


def _of_files(names: Sequence[str]) -> str:
    stem = without_progress(names[0])
    bare = _NUMBERED.sub("", stem)
    is_same = True
    for name in names[1:]:
        other = without_progress(name)
        is_same = is_same and other == stem
        if not is_same and (_NUMBERED.sub("", other) != bare or not _says_something(bare)):
            return ""
    found = stem if is_same else bare
    return found if _says_something(found) else ""


def _says_something(name: str) -> bool:
    word = _NUMBERED.sub("", name).lower()
    return word not in _SAYS_NOTHING and bool(_LETTERS.search(word))
