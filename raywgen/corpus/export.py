"""Checkpoints back into files, bit for bit, in their own dtypes and under their own names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from raywgen.corpus.corpus import Corpus
from raywgen.corpus.errors import CorpusError
from raywgen.corpus.writing import remove_leftovers, writing
from raywgen.weights import save_state_dict


def export(
    corpus: Corpus, out: str | Path, terms: Sequence[str] = (), on_progress: Callable[[int, int], None] | None = None
) -> list[Path]:
    """Writes every checkpoint that satisfies all terms to `OUT/CHECKPOINT_ID.safetensors`.

    Raises:
        CorpusError: Nothing is selected, or an id leads out of the folder.
        WeightsError: A file cannot be written.
        InUseError: Another process writes to the folder.
    """
    total = corpus.query(terms).num_rows
    if not total:
        raise CorpusError(f"{corpus.location} holds no checkpoint with {' '.join(terms)}; see `raywgen corpus info`")
    with writing(out):
        return _export(corpus, Path(out), terms, total, on_progress)


def _export(
    corpus: Corpus, out: Path, terms: Sequence[str], total: int, on_progress: Callable[[int, int], None] | None
) -> list[Path]:
    written: list[Path] = []
    for facts, state in corpus.checkpoints(terms):
        path = out / f"{facts['checkpoint_id']}.safetensors"
        if "\0" in facts["checkpoint_id"] or not path.resolve().is_relative_to(out.resolve()):
            raise CorpusError(f"checkpoint '{facts['checkpoint_id']}' would be written outside of {out}; rename it")
        if path.parent != out and path.parent not in {other.parent for other in written[-1:]}:
            remove_leftovers(path.parent)
        told = {name: str(value) for name, value in facts.items() if value is not None}
        save_state_dict({facts["key_prefix"] + name: tensor for name, tensor in state.items()}, path, told)
        written.append(path)
        if on_progress is not None:
            on_progress(len(written), total)
    return written
