"""A corpus as a data set of torch: one flat vector of weights an item, for a `DataLoader` of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from torch.utils.data import Dataset

from raywgen.corpus.corpus import Corpus
from raywgen.corpus.errors import CorpusError
from raywgen.corpus.query import check_fact


class WeightsDataset(Dataset[dict[str, Any]]):
    """Checkpoints of one architecture; an item holds `values`, float32 `(D,)`, and the facts that were asked for.

    Rows of a batch are read together, and worker processes open the files themselves.

    Args:
        corpus: The corpus.
        terms: The checkpoints: terms as `Corpus.query` takes them, such as `architecture=resnet20`.
        facts: Names of facts that each item holds beside its values.

    Raises:
        CorpusError: Checkpoints of several architectures, or none, satisfy the terms.
        UnknownFactError: There is no such fact.

    Examples:
        >>> corpus = raywgen.Corpus.open("runs/zoo/corpus")
        >>> dataset = raywgen.WeightsDataset(corpus, ["architecture=mlp-64-6-2"], facts=["test_accuracy"])
        >>> batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True)))
        >>> batch["values"].shape
        torch.Size([16, 404])
    """

    def __init__(self, corpus: Corpus, terms: Sequence[str] = (), facts: Sequence[str] = ()) -> None:
        self._corpus, self.facts = corpus, corpus.query(terms)
        ids = set(self.facts.column("layout_id").to_pylist())
        if len(ids) != 1:
            known = ", ".join(network.name for network in corpus.networks.values())
            raise CorpusError(
                f"{corpus.location}: checkpoints of {len(ids)} architectures satisfy {list(terms)}; name one, as in "
                f"architecture=NAME (there are {known})"
            )
        (layout_id,) = ids
        self.layout = corpus.layout(layout_id)
        for name in facts:
            check_fact(self.facts, name)
        self._names = list(facts)

    def __repr__(self) -> str:
        return (
            f"WeightsDataset({self._corpus.location!r}, {len(self):,} checkpoints of {self.layout.num_values:,} values)"
        )

    def __len__(self) -> int:
        return self.facts.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Reads the items of a batch; a `DataLoader` asks for them so."""
        rows = self.facts.take(pa.array(indices, pa.int64()))
        values_ND = self._corpus.values(rows)
        known = rows.select(self._names).to_pylist() if self._names else [{} for _ in indices]
        return [{"values": values_D, **row} for values_D, row in zip(values_ND.unbind(), known, strict=True)]
