"""The index of a checkpoint: its position in the run, its tensors, and which part holds which of their values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from raywgen.sealed import SealError, sealed_json, unseal
from raywgen.training.checkpoints.errors import CheckpointError

INDEX = "index.json"
_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """The position of a run.

    Attributes:
        stage: Index of the stage; one past the last when the run is done.
        step: Steps taken in that stage.
        corpus: Digest of the checkpoints that the run is trained on; see `RunRows.digest`.
        metrics: Metrics of the last validation before, if there was one in the stage.
    """

    stage: int = 0
    step: int = 0
    corpus: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Name of the checkpoint's folder; names sort as checkpoints follow one another."""
        return f"{self.stage:02d}-{self.step:09d}"


class Span(NamedTuple):
    """The values `[start, stop)` of a flat tensor, which lie in one part."""

    part: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint.

    Attributes:
        dtype: Its dtype by its name in torch.
        shape: Its shape.
        spans: Where its values lie, in order.
    """

    dtype: str
    shape: tuple[int, ...]
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class PartEntry:
    """One file of a checkpoint.

    Attributes:
        file: Its name.
        num_bytes: Its size.
        digest: Digest of its bytes.
    """

    file: str
    num_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class WrittenPart:
    """Describes the part that a worker has written.

    Attributes:
        entry: The file.
        tensors: Dtype, shape, and the first value and the end of the slice of each tensor in it.
    """

    entry: PartEntry
    tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]]

    def to_json(self, launch: str) -> str:
        """Returns its text; `launch` tells it from what an earlier launch left in the folder."""
        content = {"launch": launch, "file": self.entry.file, "bytes": self.entry.num_bytes}
        return sealed_json(content | {"digest": self.entry.digest, "tensors": self.tensors})

    @classmethod
    def from_json(cls, text: bytes, launch: str) -> WrittenPart | None:
        """Reads what `to_json` wrote; None where another launch wrote it."""
        content = unseal(text)
        if content["launch"] != launch:
            return None
        entry = PartEntry(content["file"], content["bytes"], content["digest"])
        return cls(entry, {name: (row[0], tuple(row[1]), row[2], row[3]) for name, row in content["tensors"].items()})


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """All that is known of a checkpoint without its values.

    Attributes:
        state: The position of the run.
        tensors: The tensors by name: the generator's under `model.`, the optimiser's state under `optimizer.`, averages
            of parameters under `ema.`, the stage's own state under `stage.`.
        parts: The files.
    """

    state: TrainState
    tensors: Mapping[str, TensorEntry]
    parts: tuple[PartEntry, ...]

    @classmethod
    def of(cls, state: TrainState, parts: Iterable[WrittenPart]) -> CheckpointIndex:
        """Puts together what the workers have written."""
        parts = list(parts)
        kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
        spans: dict[str, list[Span]] = {}
        for number, part in enumerate(parts):
            for name, (dtype, shape, start, stop) in part.tensors.items():
                assert kinds.setdefault(name, (dtype, shape)) == (dtype, shape), f"workers disagree about '{name}'"
                spans.setdefault(name, []).append(Span(number, start, stop))
        tensors = {
            name: TensorEntry(*kind, tuple(sorted(spans[name], key=lambda span: span.start)))
            for name, kind in kinds.items()
        }
        index = cls(state, tensors, tuple(part.entry for part in parts))
        index.check_spans()
        return index

    def to_json(self) -> str:
        """Returns the text of the index with its checksum."""
        state = {"stage": self.state.stage, "step": self.state.step, "corpus": self.state.corpus}
        return sealed_json(
            {
                "version": _VERSION,
                **state,
                "metrics": dict(self.state.metrics),
                "parts": [[part.file, part.num_bytes, part.digest] for part in self.parts],
                "tensors": {name: [entry.dtype, entry.shape, entry.spans] for name, entry in self.tensors.items()},
            }
        )

    @classmethod
    def from_json(cls, text: bytes) -> CheckpointIndex:
        """Reads what `to_json` wrote.

        Raises:
            CheckpointError: The text is damaged, or of another version of raywgen; the message has no subject.
        """
        try:
            content = unseal(text)
            if (version := content["version"]) != _VERSION:
                raise CheckpointError(
                    f"of version {version}, and this raywgen reads version {_VERSION}; go on with the raywgen that "
                    "wrote it"
                )
            state = TrainState(**{key: content[key] for key in ("stage", "step", "corpus", "metrics")})
            if (type(state.stage), type(state.step), type(state.corpus)) != (int, int, str):
                raise TypeError("a value of another type")
            parts = tuple(PartEntry(str(file), int(size), str(digest)) for file, size, digest in content["parts"])
            tensors = {
                name: TensorEntry(str(dtype), tuple(map(int, shape)), tuple(Span(*map(int, span)) for span in spans))
                for name, (dtype, shape, spans) in content["tensors"].items()
            }
        except (SealError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"damaged ({error})") from error
        index = cls(state, tensors, parts)
        index.check_spans()
        return index

    def check_spans(self) -> None:
        """Refuses an index that does not say of every value where it lies.

        Raises:
            CheckpointError: A slice is missing, or there twice.
        """
        for name, entry in self.tensors.items():
            place, num = 0, math.prod(entry.shape)
            for span in entry.spans:
                if span.start != place or span.stop < place or not 0 <= span.part < len(self.parts):
                    break
                place = span.stop
            if place != num or not entry.spans:
                raise CheckpointError(f"without the values of '{name}' from {place} on")

    def shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the tensors under a prefix, by their names without it."""
        return {
            name.removeprefix(prefix): entry.shape for name, entry in self.tensors.items() if name.startswith(prefix)
        }
