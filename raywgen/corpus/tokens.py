"""Tokens at rest: what a tokeniser made of the checkpoints of a corpus, in shards that are read like weights.

A corpus of tokens is a corpus whose checkpoints are tables of codes: a shard for each shard of weights, with the same
checkpoints in the same order and the same facts about them. Each checkpoint is one integer tensor `(M, L)`, paged like
weights, so windows of it are read from the mapped file. Its manifest names the tokeniser and the weights by digests.

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from torch import Tensor

from raywgen.corpus.corpus import Corpus
from raywgen.corpus.derive import new_facts
from raywgen.corpus.errors import RESTORE, CorpusError, DamagedFileError
from raywgen.corpus.shards import Shard, write_shard
from raywgen.weights import Layout, TensorSpec

# Arrow creates these functions at import, so no type checker sees them.
pc: Any = pyarrow.compute
TOKENS = "tokens"
"""Key of a manifest's recipe that only a corpus of tokens has."""
_MOST_CODES = 1 << 16


class TokensError(CorpusError):
    """Tokens that cannot be used: of another tokeniser, or of a corpus that has changed; the message says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecipe:
    """The tokeniser and the weights that tokens were made of, as the manifest holds them.

    Attributes:
        tokenizer: Digest of all that decides tokens.
        weights: `weights_digest` of the corpus.
        source: Location of the corpus.
        chunk_length: K.
        num_levels: L.
        num_codes: V.
        layouts: Id of the layout of a network's tokens by the id of the network's own.
    """

    tokenizer: str
    weights: str
    source: str
    chunk_length: int
    num_levels: int
    num_codes: int
    layouts: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON object of the manifest."""
        return asdict(self)


def weights_digest(corpus: Corpus) -> str:
    """Returns a digest that changes with the weights of a corpus and with the ids of its checkpoints; reads none."""
    columns = [corpus.facts.column(name).to_pylist() for name in ("shard", "row", "checkpoint_id")]
    rows = sorted(zip(*columns, strict=True))
    content = [[[shard.path, shard.sha256] for shard in corpus.shards], rows]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def token_layout(layout_id: str, num_chunks: int, num_levels: int, num_codes: int) -> Layout:
    """Returns the layout of the tokens of a network: one table of bytes, or of two-byte integers for many codes.

    Raises:
        TokensError: There are too many codes.
    """
    if num_codes > _MOST_CODES:
        raise TokensError(f"num_codes={num_codes}: tokens are stored of at most {_MOST_CODES:,} codes")
    dtype = "uint8" if num_codes <= 1 << 8 else "uint16"
    spec = TensorSpec(name=f"codes-{layout_id}", shape=(num_chunks, num_levels), dtype=dtype, kind="counter")
    return Layout((spec,))


def pack_codes(packed_NP: Tensor, layout: Layout, row_B: Tensor, first: int, codes_BWL: Tensor) -> None:
    """Writes the codes of consecutive chunks of some networks into their packed form, uint8 `(N, P)`.

    Args:
        packed_NP: The packed form, which is changed.
        layout: Layout of the tokens.
        row_B: The networks.
        first: The first of the chunks.
        codes_BWL: Codes, int64.
    """
    (spec,) = layout.tensors
    raw_BX = codes_BWL.cpu().flatten(1).to(spec.torch_dtype).view(torch.uint8)
    start = first * codes_BWL.shape[2] * spec.torch_dtype.itemsize
    packed_NP[row_B, start : start + raw_BX.shape[1]] = raw_BX


def write_token_shard(root: str, source: Shard, facts: pa.Table, layout: Layout, packed_NP: Tensor) -> Shard:
    """Writes the tokens of a shard of weights under its name.

    Args:
        root: Path or URI of the corpus of tokens.
        source: The shard of weights.
        facts: Facts of its checkpoints, by row.
        layout: Layout of the tokens.
        packed_NP: Packed tokens.

    Raises:
        CorpusError: The file cannot be written.
    """
    rows = [replace(row, layout_id=layout.id) for row in new_facts(facts)]
    return write_shard(root, Path(source.path).stem, layout, rows, packed_NP, is_finite=True)


def is_tokens(corpus: Corpus) -> bool:
    """Whether an opened corpus holds tokens in place of weights."""
    return TOKENS in corpus.manifest["recipe"]


class TokenCorpus:
    """An opened corpus of tokens; `TokenCorpus.open` returns one."""

    def __init__(self, corpus: Corpus, recipe: TokenRecipe) -> None:
        self.corpus, self.recipe = corpus, recipe

    @classmethod
    def open(cls, location: str | Path, snapshot: str = "", *, copies: bool = True) -> Self:
        """Reads the manifest and checks that every file is there in full length.

        Args:
            location: Path or URI.
            snapshot: As `Corpus.open` takes it.
            copies: As `Corpus.open` takes it.

        Raises:
            TokensError: The corpus holds weights.
            CorpusError: There is no corpus, or it is damaged.
        """
        corpus = Corpus.open(location, snapshot, copies=copies)
        if not is_tokens(corpus):
            raise TokensError(
                f"{corpus.location} holds weights and no tokens; `raywgen corpus encode {corpus.location} "
                "tokenizer=RUN out=TOKENS` makes tokens of it"
            )
        try:
            recipe = TokenRecipe(**corpus.manifest["recipe"][TOKENS])
            lacking = set(recipe.layouts.values()) - set(corpus.networks)
        except (TypeError, AttributeError) as error:
            raise DamagedFileError(
                f"{corpus.location}: its recipe of tokens is damaged ({error}); {RESTORE}"
            ) from error
        if lacking:
            raise DamagedFileError(f"{corpus.location}: it lacks the layout {lacking.pop()}; {RESTORE}")
        return cls(corpus, recipe)

    @property
    def location(self) -> str:
        """Path or URI, as it was opened."""
        return self.corpus.location

    def check_weights(self, corpus: Corpus, digest: str) -> None:
        """Checks that the tokens are those of a corpus, given its `weights_digest`.

        Raises:
            TokensError: They are of another corpus, or of an earlier state of it.
        """
        if self.recipe.weights != digest:
            raise TokensError(
                f"{self.location} holds tokens of other checkpoints than {corpus.location} does now (they were made of "
                f"{self.recipe.source}); make them again by `raywgen corpus encode`, or read weights by "
                "generator.prior.tokens=none"
            )

    def check_tokenizer(self, digest: str) -> None:
        """Checks that the tokens were made by a tokeniser, given its digest.

        Raises:
            TokensError: Another tokeniser made them.
        """
        if self.recipe.tokenizer != digest:
            raise TokensError(
                f"{self.location} holds tokens of another tokeniser than the one that was trained here; make them by "
                "`raywgen corpus encode` with tokenizer=RUN of this run, or leave that to the run by "
                "generator.prior.tokens=auto"
            )

    def of(self, layout_id: str, ids: Sequence[str]) -> StoredTokens:
        """Returns the tokens of some checkpoints of a network's layout, in this order.

        Raises:
            TokensError: A checkpoint is not there.
        """
        facts = self.corpus.facts
        place_N = pc.index_in(pa.array(ids, pa.string()), value_set=facts.column("checkpoint_id").combine_chunks())
        if place_N.null_count:
            missing = next(name for name, place in zip(ids, place_N.to_pylist(), strict=True) if place is None)
            raise TokensError(f"{self.location} lacks the tokens of checkpoint '{missing}'; make them again")
        found = facts.take(place_N)
        wanted = self.recipe.layouts.get(layout_id)
        if wanted is None or pc.any(pc.not_equal(found.column("layout_id"), wanted)).as_py():
            raise TokensError(f"{self.location} holds tokens of other networks than asked for; make them again")
        return StoredTokens(self.corpus, self.corpus.layout(wanted), found)


class StoredTokens:
    """The tokens of N checkpoints of one layout, read from the shards.

    Args:
        corpus: The corpus of tokens.
        layout: Layout of the tokens.
        facts: Facts of the checkpoints, in the order in which they are counted.
    """

    def __init__(self, corpus: Corpus, layout: Layout, facts: pa.Table) -> None:
        self.corpus, self._layout = corpus, layout
        (spec,) = layout.tensors
        self._dtype, self._shape = spec.torch_dtype, (spec.shape[0], spec.shape[1])
        shards = facts.column("shard").combine_chunks().dictionary_encode()
        self._paths: list[str] = shards.dictionary.to_pylist()
        self._shard_N = shards.indices.to_numpy(zero_copy_only=False)
        self._row_N = facts.column("row").to_numpy()

    @property
    def num_chunks(self) -> int:
        """Returns M, the chunks of a network."""
        return self._shape[0]

    def codes(self, index_B: Tensor, chunk_BX: Tensor | None = None) -> Tensor:
        """Returns the tokens `(B, X, L)`, int64, of whole networks or of some chunks of each.

        Args:
            index_B: Checkpoints, int64.
            chunk_BX: Chunks of each, int64, as many of each; consecutive ones are read together. None for all chunks.

        Raises:
            MissingFileError, DamagedFileError: A shard cannot be read, or tokens have changed.
            ChangedCorpusError: The tokens were deleted or made anew in the meantime.
        """
        M, L = self._shape
        if chunk_BX is None:
            chunk_BX = torch.arange(M).expand(len(index_B), -1)
        out_BXL = torch.empty(*chunk_BX.shape, L, dtype=torch.int64)
        width = L * self._dtype.itemsize
        for codes_XL, index, chunks in zip(out_BXL, index_B.tolist(), chunk_BX.numpy(), strict=True):
            assert chunks.min() >= 0, "a chunk before the beginning"
            assert chunks.max() < M, "a chunk beyond the end"
            view = self.corpus.view(self._paths[int(self._shard_N[index])], self._layout)
            runs = np.split(chunks, np.flatnonzero(np.diff(chunks) != 1) + 1)
            wanted = [(int(run[0]) * width, (int(run[-1]) + 1) * width) for run in runs]
            parts = view.ranges(int(self._row_N[index]), wanted)
            torch.cat([_view(raw, self._dtype).view(-1, L).long() for raw in parts], out=codes_XL)
        return out_BXL


def _view(raw: Tensor, dtype: torch.dtype) -> Tensor:
    is_aligned = raw.storage_offset() % dtype.itemsize == 0 and raw.data_ptr() % dtype.itemsize == 0
    return (raw if is_aligned else raw.clone()).view(dtype)


def shard_rows(facts: pa.Table, shard: Shard) -> pa.Table:
    """Returns the facts of the checkpoints of a shard, by row."""
    found = facts.filter(pc.equal(facts.column("shard"), shard.path)).sort_by("row")
    assert np.array_equal(found.column("row").to_numpy(), np.arange(found.num_rows))
    return found
