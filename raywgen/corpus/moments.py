"""Mean and spread of every tensor over the networks of a split, as normalisers need them.

They come from the sums that the manifest keeps since ingest, and from one pass over the shards where these do
not suffice. Neither holds more than a few networks, or parts of one, in memory.

Shape letters beyond the legend in `raywgen.weights`: N generated tensors of a layout, P bytes of a checkpoint, M
selected checkpoints. Here B is the number of checkpoints that are read at once, and X that of the values of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raywgen.corpus.errors import CorpusError
from raywgen.corpus.query import filter_facts
from raywgen.corpus.statistics import LayoutStatistics, Sums, mean_and_spread, statistics_from_json
from raywgen.weights import Layout
from raywgen.weights.normalizer import Normalizer
from raywgen.weights.tensors import TensorSpec, real_values

if TYPE_CHECKING:
    from raywgen.corpus.corpus import Corpus

_BASE = "base"
_BYTES_AT_ONCE = 1 << 24
_COLUMNS_AT_ONCE = 1 << 18
_ReadTensor = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMoments:
    """Mean and spread of each tensor of a layout; running variances count by their logarithms.

    Attributes:
        num_checkpoints: Number of networks.
        mean_N: Mean of the values of each tensor, float64.
        spread_N: Standard deviation of their difference to the start that the networks share, or of the values where
            they share none, float64.
        shares_start: Whether the networks share a start.
    """

    num_checkpoints: int
    mean_N: Tensor
    spread_N: Tensor
    shares_start: bool


def tensor_moments(corpus: Corpus, split: str = "train", terms: Sequence[str] = ()) -> dict[str, TensorMoments]:
    """Returns the moments of every layout with networks in a split, by layout id.

    The shards are read where networks share a start, where `terms` select some of them, and where the corpus was made
    by a version that kept no sums of its splits.

    Args:
        corpus: The corpus.
        split: The split whose networks count.
        terms: Query that selects some of them, as `Corpus.query` takes it.

    Raises:
        CorpusError: No network is selected.
        DamagedFileError: A checkpoint has changed since it was written.
    """
    facts = filter_facts(corpus.select(split=split), terms)
    if not facts.num_rows:
        raise CorpusError(
            f"{corpus.location} has no network of split {' '.join([split, *terms])}; see `raywgen corpus info`"
        )
    known = statistics_from_json(corpus.manifest.get("statistics", {}))
    found = {}
    for layout_id in dict.fromkeys(facts.column("layout_id").to_pylist()):
        chosen = filter_facts(facts, [f"layout_id={layout_id}"])
        layout, start = corpus.layout(layout_id), _start(corpus, layout_id)
        # Sums of a split are of all its networks: their number tells whether these are the chosen ones.
        stored = known.get((layout_id, split))
        if start is None and stored and stored.num_checkpoints == chosen.num_rows and _is_complete(stored, layout):
            found[layout_id] = _of_sums(chosen.num_rows, _seen_sums(stored, layout), None)
        else:
            found[layout_id] = _measured(corpus, layout, chosen, start)
    return found


def _start(corpus: Corpus, layout_id: str) -> _ReadTensor | None:
    """Returns what reads a tensor of the start that a layout's networks share, by its name in the layout."""
    rows = corpus.select(layout_id=layout_id, split=_BASE).to_pylist()
    if len(rows) != 1:
        return None
    form = corpus.form(rows[0]["shard"])
    names, read = corpus.layout(layout_id).names_in(form), _reader(corpus, rows[0]["shard"], rows[0]["row"])
    return lambda name: read(names[name])


def _reader(corpus: Corpus, path: str, row: int) -> _ReadTensor:
    """Returns what reads a tensor of a checkpoint by its name in the shard: of a mapped shard, as a view."""
    form = corpus.form(path)
    return partial(form.tensor, partial(corpus.view(path, form).ranges, row))


def _is_complete(stored: LayoutStatistics, layout: Layout) -> bool:
    """Whether there are sums of every tensor as a generator sees it; earlier versions kept none of logarithms."""
    return all(spec.name in (stored.logs if _is_variance(spec) else stored.sums) for spec in layout.generated)


def _seen_sums(stored: LayoutStatistics, layout: Layout) -> list[Sums]:
    return [(stored.logs if _is_variance(spec) else stored.sums)[spec.name] for spec in layout.generated]


def _of_sums(num_checkpoints: int, value_sums: list[Sums], offset_sums: list[Sums] | None) -> TensorMoments:
    means = [mean_and_spread(sums)[0] for sums in value_sums]
    spreads = [mean_and_spread(sums)[1] for sums in offset_sums or value_sums]
    return TensorMoments(
        num_checkpoints=num_checkpoints,
        mean_N=torch.tensor(means, dtype=torch.float64),
        spread_N=torch.tensor(spreads, dtype=torch.float64),
        shares_start=offset_sums is not None,
    )


def _measured(corpus: Corpus, layout: Layout, facts: pa.Table, start: _ReadTensor | None) -> TensorMoments:
    """Measures the moments in one pass over the shards."""
    value_sums, offset_sums = np.zeros((2, len(layout.generated), 3))
    for form, num, read in _parts(corpus, facts):
        names = layout.names_in(form)
        for index, spec in enumerate(layout.generated):
            values_BX = real_values(read(names[spec.name])).reshape(num, spec.num_values)
            start_X = None if start is None else real_values(start(spec.name)).reshape(spec.num_values)
            for values, offsets in _seen(spec, values_BX, start_X):
                value_sums[index] += (values.numel(), float(values.sum()), float(values.square().sum()))
                if offsets is not None:
                    offset_sums[index] += (offsets.numel(), float(offsets.sum()), float(offsets.square().sum()))
    sums = [[(int(row[0]), float(row[1]), float(row[2])) for row in table] for table in (value_sums, offset_sums)]
    return _of_sums(facts.num_rows, sums[0], None if start is None else sums[1])


def _parts(corpus: Corpus, facts: pa.Table) -> Iterator[tuple[Layout, int, _ReadTensor]]:
    """Yields checkpoints of one form at a time, many small ones together: the form, their number, what reads tensors.

    A large one is read tensor by tensor, so that no more of it is held where its shard is not mapped.
    """
    facts = facts.sort_by([("shard", "ascending"), ("row", "ascending")])
    paths, row_M = np.array(facts.column("shard").to_pylist()), facts.column("row").to_numpy()
    for path in dict.fromkeys(paths.tolist()):
        form, of_shard = corpus.form(path), row_M[paths == path]
        at_once = max(1, _BYTES_AT_ONCE // max(1, form.num_bytes))
        for first in range(0, len(of_shard), at_once):
            row_B = of_shard[first : first + at_once]
            if len(row_B) == 1:
                yield form, 1, _reader(corpus, path, int(row_B[0]))
            else:
                yield form, len(row_B), form.unpack(corpus.view(path, form).rows(row_B)).__getitem__


def _seen(spec: TensorSpec, values_BX: Tensor, start_X: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yields values as a generator sees them, a part of a tensor at a time, and their difference to the start."""
    columns = max(1, _COLUMNS_AT_ONCE // len(values_BX))
    for first in range(0, values_BX.shape[1], columns):
        part = slice(first, first + columns)
        values_BY = Normalizer.in_units(spec, values_BX[:, part].double())
        yield values_BY, None if start_X is None else values_BY - Normalizer.in_units(spec, start_X[part].double())


def _is_variance(spec: TensorSpec) -> bool:
    return spec.kind == "running_var"
