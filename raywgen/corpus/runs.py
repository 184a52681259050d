"""Recognises the checkpoints that are steps of one run, by the file names that trainers use.

A number in a name counts as a step only if a word says so (`step`, `epoch`, `iter`, `checkpoint`, ...), or if it begins
a name that also identifies the run (`0003_acc0.94_seed0001`). Names that differ in any other number (`net0` and `net1`,
`seed0` and `seed1`) are separate networks, and so are names of one step.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import PurePosixPath

from raywgen.corpus.sources import SourceCheckpoint
from raywgen.locations import location_parts

UNKNOWN_STEP = -1
# If a name holds several numbers, such as `epoch=3-step=900`, the earlier word here is the step.
_WORDS = ("step", "iter", "itr", "update", "epoch", "ep", "checkpoint", "ckpt", "chkpt", "snapshot")
_WORD = r"(?:global[_-]?)?steps?|iterations?|iters?|itr|updates?|epochs?|ep|checkpoint|ckpt|chkpt|snapshot"
_STEP = re.compile(
    rf"(?<![a-z])(?:checkpoint_\d+_(?P<update>\d+)|(?P<word>{_WORD})[=_-]?(?P<number>\d+)(?P<unit>k)?"
    r"|(?P<first>\d+)[_-]?(?P<after>steps?|iterations?|iters?|epochs?|ep))(?![a-z0-9]|\.\d)"
    # A bare fraction behind the step is a metric.
    r"(?:[_-]\d*\.\d+(?![a-z0-9]))?",
    re.IGNORECASE,
)
# `max_steps=1000` is a setting of a run.
_SETTING = re.compile(r"(?:^|[^a-z])(?:max|num|n|total|warmup|every)[_-]?$", re.IGNORECASE)
_METRIC = re.compile(
    r"(?<![a-z])(?:(?:val|valid|test|train|eval|best)[_-]?)?(?:acc|accuracy|loss|ppl|perplexity|f1|auc|miou|map|psnr|fid|"
    r"score|err|error|top1|top5|bleu|reward)[=_:-]?\d+(?:\.\d+)?(?![a-z0-9])",
    re.IGNORECASE,
)
_VERSION = re.compile(r"(?:^|-)v\d+$")
_RUN = re.compile(r"(?<![a-z])(?:seed|run|trial|trajectory|traj)[=_-]?\d+", re.IGNORECASE)
_LEADING = re.compile(r"^(\d{1,7})(?=$|[_-])")
_END = re.compile(r"(?<![a-z])(?:best|last|latest|final)(?![a-z])", re.IGNORECASE)
_SAYS_NOTHING = re.compile(r"(?:pytorch_)?model|network|net|checkpoints?|ckpts?|weights|state_dict", re.IGNORECASE)
_SIGNS = re.compile(r"([-_=.,+ ])[-_=.,+ ]+")
_HUB = "hub:"
_KEPT_FOLDERS = 4096
_RUN_FACT = "trajectory_id"


@dataclass(frozen=True, slots=True)
class _ParsedName:
    """A name without the parts that vary within a run.

    Attributes:
        folder: Absolute path, so that folders of one name in two sources differ.
        name: The remaining file name; empty if the name was nothing but a step.
        shown: Folder below the source, and name.
        step: The step; None if the name has none.
        ends: Whether the name contains `best`, `last` or `final`.
    """

    folder: str
    name: str
    shown: str
    step: int | None
    ends: bool


def join_runs(checkpoints: Sequence[SourceCheckpoint]) -> list[SourceCheckpoint]:
    """Gives the steps of a run one `trajectory_id`, and each its `step`.

    `best`, `last` and `final` beside steps belong to their run, with an unknown step (-1). Checkpoints whose facts
    name a trajectory or a step keep it, and the rest of their run joins their trajectory.

    Args:
        checkpoints: Checkpoints with all other facts.
    """
    places = {index: _parse(one) for index, one in enumerate(checkpoints) if one.stored_id is None}
    runs: dict[tuple[str, str], list[int]] = {}
    for index, place in places.items():
        if place.step is not None:
            runs.setdefault((place.folder, place.name), []).append(index)
    single = {key: list(found) for key, found in runs.items() if len(found) == 1}
    runs = {key: found for key, found in runs.items() if len({places[index].step for index in found}) > 1}
    _add_ends(runs, places)
    runs |= _single_with_ends(single, runs, places)
    joined = list(checkpoints)
    trajectory_of = {
        index: str(one.facts[_RUN_FACT]) for index, one in enumerate(checkpoints) if _RUN_FACT in one.facts
    }
    taken = {checkpoint.name for checkpoint in checkpoints} | set(trajectory_of.values())
    for (folder, _), found in sorted(runs.items()):
        names = {trajectory_of[index] for index in found if index in trajectory_of}
        if len(names) == 1:
            name = names.pop()
        else:
            wanted = places[found[0]].shown or PurePosixPath(folder).name
            name = _unused(wanted, taken - {checkpoints[index].name for index in found})
        taken.add(name)
        for index in found:
            step = places[index].step
            facts = {_RUN_FACT: name, "step": UNKNOWN_STEP if step is None else step}
            joined[index] = replace(joined[index], facts=facts | joined[index].facts)
    return joined


def without_progress(name: str) -> str:
    """Removes steps, metrics, seeds and the like from the name of a file or folder: runs share the rest."""
    rest, steps = _without_steps(name)
    leading = _LEADING.match(rest)
    if leading and (steps or _RUN.search(rest)):
        rest = rest[leading.end() :]
    return _tidy(_END.sub("", _RUN.sub("", _VERSION.sub("", _METRIC.sub("", rest)))))


def _add_ends(runs: dict[tuple[str, str], list[int]], places: dict[int, _ParsedName]) -> None:
    """Adds checkpoints beside the steps of a run: best, last or final, or one with the name of the run."""
    in_folder: dict[str, list[tuple[str, str]]] = {}
    for key in runs:
        in_folder.setdefault(key[0], []).append(key)
    for index, place in places.items():
        if place.step is not None:
            continue
        beside = in_folder.get(place.folder, [])
        if (place.folder, place.name) in runs:
            runs[place.folder, place.name].append(index)
        elif place.ends and len(beside) == 1:
            runs[beside[0]].append(index)


def _single_with_ends(
    single: Mapping[tuple[str, str], list[int]],
    runs: Mapping[tuple[str, str], list[int]],
    places: dict[int, _ParsedName],
) -> dict[tuple[str, str], list[int]]:
    """Finds runs of one step beside a best, last or final checkpoint, as trainers that keep only the best write."""
    known = {folder for folder, _ in runs}
    remaining = {key: list(found) for key, found in single.items() if key[0] not in known}
    names = {key[0]: key[1] for key in remaining}
    near = {index: place for index, place in places.items() if place.name in ("", names.get(place.folder, ""))}
    _add_ends(remaining, near)
    return {key: found for key, found in remaining.items() if len(found) > 1}


def _unused(wanted: str, taken: Collection[str]) -> str:
    name, number = wanted, 2
    while name in taken:
        name, number = f"{wanted}-{number}", number + 1
    return name


@dataclass(frozen=True, slots=True)
class _Folders:
    """The folders in a checkpoint's name: the remaining ones, their steps, and whether they name a run or its end."""

    root: str
    kept: tuple[str, ...]
    steps: tuple[tuple[int, int], ...]
    has_run: bool
    ends: bool


def _parse(checkpoint: SourceCheckpoint) -> _ParsedName:
    above, _, last = checkpoint.name.rpartition("/")
    is_of_hub = str(checkpoint.facts.get("source", "")).startswith(_HUB)
    file = location_parts(checkpoint.files[0])[0]
    folders = _folders(above, _HUB if is_of_hub else file.rpartition("/")[0])
    rest, steps = _without_steps(last)
    found = [*folders.steps, *steps]
    leading = _LEADING.match(rest)
    if leading and not found and (folders.has_run or _RUN.search(last)):
        found.append((0, int(leading[1])))
        rest = _tidy(rest[leading.end() :])
    if found:
        rest = _tidy(_VERSION.sub("", _METRIC.sub("", rest)))
    stripped = _tidy(_END.sub("", rest))
    name = "" if _SAYS_NOTHING.fullmatch(stripped) else stripped
    kept = folders.kept
    return _ParsedName(
        folder="/".join([folders.root, *kept]),
        name=name,
        shown="/".join([*kept, name] if name else kept),
        step=min(found)[1] if found else None,
        ends=folders.ends or stripped != rest,
    )


@lru_cache(_KEPT_FOLDERS)
def _folders(above: str, place: str) -> _Folders:
    """Parses the folders in a name.

    Args:
        above: The folders, as the name has them.
        place: The folder of the file, or a placeholder for the folder where names begin.
    """
    parts = above.split("/") if above else []
    ends = False
    kept: list[str] = []
    found: list[tuple[int, int]] = []
    for part in parts:
        rest, steps = _without_steps(part)
        stripped = _tidy(_END.sub("", rest))
        if (steps or rest != part or stripped != part) and (not stripped or _SAYS_NOTHING.fullmatch(stripped)):
            ends |= stripped != rest
            rest = ""
        found += steps
        kept += [rest] if rest else []
    places = place.split("/")
    is_below = bool(parts) and places[-len(parts) :] == parts
    root = "/".join(places[: len(places) - len(parts)] if is_below else places)
    return _Folders(
        root=root,
        kept=tuple(kept),
        steps=tuple(found),
        has_run=any(_RUN.search(part) for part in parts),
        ends=ends,
    )


def _without_steps(part: str) -> tuple[str, list[tuple[int, int]]]:
    """Removes the steps of a part of a path, and returns them with the rank of their word."""
    steps: list[tuple[int, int]] = []
    rest = ""
    end = 0
    for match in _STEP.finditer(part):
        if _SETTING.search(part[: match.start()]):
            continue
        number = match["update"] or match["number"] or match["first"]
        word = (match["word"] or match["after"] or "update").lower()
        rank = next(index for index, known in enumerate(_WORDS) if known in word)
        steps.append((rank, int(number) * (1000 if match["unit"] else 1)))
        rest += part[end : match.start()]
        end = match.end()
    return (_tidy(rest + part[end:]) if steps else part), steps


def _tidy(text: str) -> str:
    """Removes the separators of the parts that were taken out."""
    return _SIGNS.sub(r"\1", text).strip("-_=.,+ ")
