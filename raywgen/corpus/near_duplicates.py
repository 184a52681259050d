"""Finds networks that lie near an earlier one, with two blocks of networks in memory at a time.

Shape letter beyond the legend in `raywgen.weights`: M networks that were kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pyarrow as pa
import torch
from torch import Tensor

from raywgen.corpus.at_once import networks_at_once
from raywgen.corpus.corpus import Corpus
from raywgen.corpus.packed_weights import may_be_packed
from raywgen.weights import Layout

# More than the rounding of two norms in float32, relative to their sum.
_SLACK = 1e-3


def networks_apart(corpus: Corpus, layout_id: str, rows: Sequence[int], near: float) -> list[int]:
    """Returns the networks of one layout that are not near an earlier one that was kept.

    The networks that were kept are read again for each block of others. Norms tell which of them may be near: two
    networks lie at least as far apart as their norms.

    Args:
        corpus: The corpus.
        layout_id: Their layout.
        rows: Rows of the corpus' facts, of any layout.
        near: Largest distance of two networks that are near, divided by the norm of the earlier one.
    """
    layout, layout_ids = corpus.layout(layout_id), corpus.facts.column("layout_id").to_pylist()
    rows = [row for row in rows if layout_ids[row] == layout_id]
    if not layout.num_values:
        return rows  # Without weights there is no distance, and equal bytes are removed already.
    kept = _Kept(corpus, near, networks_at_once(layout.num_values))
    for start in range(0, len(rows), kept.at_once):
        kept.add(rows[start : start + kept.at_once], layout)
    return kept.rows


class _Kept:
    """The networks that were kept so far: what is known of each, without its weights."""

    def __init__(self, corpus: Corpus, near: float, at_once: int) -> None:
        self._corpus, self._near, self.at_once = corpus, near, at_once
        self.rows: list[int] = []
        self._norm_M = torch.zeros(0, dtype=torch.float64)
        # Packed integers have no distance: networks can be near only if these are equal, as equal numbers say.
        self._packed_M = torch.zeros(0, dtype=torch.int64)
        self._numbers: dict[bytes, int] = {}

    def add(self, rows: Sequence[int], layout: Layout) -> None:
        """Keeps those of some networks that are not near one that was kept."""
        facts = self._corpus.facts.take(rows)
        values_BD, digests = self._corpus.values(facts), _packed_values(self._corpus, layout, facts)
        packed_B = torch.tensor([self._numbers.setdefault(digest, len(self._numbers)) for digest in digests])
        norm_B = values_BD.norm(dim=1).double()
        is_double_B = self._are_doubles(values_BD, norm_B, packed_B)
        chosen: list[int] = []
        for index in (~is_double_B).nonzero().flatten().tolist():
            earlier = [other for other in chosen if packed_B[other] == packed_B[index]]
            if not self._is_near(values_BD[index], values_BD[earlier]):
                chosen.append(index)
        self.rows += [rows[index] for index in chosen]
        self._norm_M = torch.cat([self._norm_M, norm_B[chosen]])
        self._packed_M = torch.cat([self._packed_M, packed_B[chosen]])

    def _are_doubles(self, values_BD: Tensor, norm_B: Tensor, packed_B: Tensor) -> Tensor:
        """Marks the networks that are near one that was kept, bool `(B,)`."""
        is_double_B = torch.zeros(len(values_BD), dtype=torch.bool)
        norm_B1, packed_B1 = norm_B.unsqueeze(1), packed_B.unsqueeze(1)
        for start in range(0, len(self.rows), self.at_once):
            part = slice(start, start + self.at_once)
            norm_M = self._norm_M[part]
            may_be_BM = (norm_B1 - norm_M).abs() <= self._near * norm_M + _SLACK * (norm_B1 + norm_M)
            may_be_BM &= (packed_B1 == self._packed_M[part]) & ~is_double_B.unsqueeze(1)
            wanted = may_be_BM.any(dim=0).nonzero().flatten()
            if not len(wanted):
                continue
            rows = [self.rows[start + place] for place in wanted.tolist()]
            kept_MD = self._corpus.values(self._corpus.facts.take(rows))
            for index, may_be_M in enumerate(may_be_BM[:, wanted]):
                is_double_B[index] |= self._is_near(values_BD[index], kept_MD[may_be_M])
        return is_double_B

    def _is_near(self, value_D: Tensor, kept_MD: Tensor) -> bool:
        return bool(((kept_MD - value_D).norm(dim=1) <= self._near * kept_MD.norm(dim=1)).any())


def _packed_values(corpus: Corpus, layout: Layout, facts: pa.Table) -> list[bytes]:
    """Returns a digest of all tensors of a checkpoint that may be packed weights, for each checkpoint."""
    names = [spec.name for spec in layout.tensors if may_be_packed(spec)]
    digests = [b""] * facts.num_rows
    for form, part, place_N in corpus.by_form(facts) if names else ():
        state, own = form.unpack(corpus.packed(part)), layout.names_in(form)
        for index, place in enumerate(place_N.tolist()):
            rows = (state[own[name]][index].contiguous().reshape(-1).view(torch.uint8) for name in names)
            digests[place] = hashlib.sha256(b"".join(row.numpy().tobytes() for row in rows)).digest()
    return digests
