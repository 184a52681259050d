"""Encodes a corpus by a trained tokeniser into a corpus of tokens, over many Ray actors or the workers of a run.

A work item is a shard of weights. Its tokens are written first, then in one step its journal; items with a journal are
never repeated, so an encoding may be killed at any point and run again. Networks are read and encoded in blocks of
chunks, so nothing holds a large one in float32; what grows with a shard are its tokens. Where scales are tokens, a
network is read once for their moments before it is encoded.

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from raywgen.actor_pool import OnShare
from raywgen.corpus import Corpus, CorpusError, NetworkFacts, Shard, commit_corpus
from raywgen.corpus.ingest import journal
from raywgen.corpus.manifest import MANIFEST, read_manifest
from raywgen.corpus.storage import CorpusStorage
from raywgen.corpus.tokens import (
    TOKENS,
    TokenCorpus,
    TokenRecipe,
    TokensError,
    is_tokens,
    pack_codes,
    shard_rows,
    token_layout,
    weights_digest,
    write_token_shard,
)
from raywgen.corpus.writing import JOURNALS, remove_unused_shards
from raywgen.generators.token_encoder import TokenEncoder
from raywgen.sealed import SealError, sealed_json, unseal
from raywgen.training.stored_weights import StoredWeights, part_reader
from raywgen.weights import Layout

# Values that are encoded at once; an encoder needs some hundred bytes for each.
_VALUES_AT_ONCE = 1 << 18
_LEARNED = ("train", "validation")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeItem:
    """A shard of weights to encode.

    Attributes:
        name: Digest of the shard and of the tokeniser.
        shard: The shard.
        num_values: Values of all its networks, for progress.
        num_bytes: Bytes of their tokens.
    """

    name: str
    shard: Shard
    num_values: int
    num_bytes: int


class EncodePlan:
    """The work items that make the tokens of a corpus, and what becomes of them.

    Args:
        corpus: A corpus of weights.
        encoder: The tokeniser.
        root: Path or URI of the corpus of tokens.

    Attributes:
        items: All work items, the largest first.

    Raises:
        TokensError: The corpus holds tokens already, or networks that the tokeniser was not trained on, or the
            tokeniser has more codes than tokens can be stored of.
    """

    def __init__(self, corpus: Corpus, encoder: TokenEncoder, root: str) -> None:
        if is_tokens(corpus):
            raise TokensError(f"{corpus.location} holds tokens already; give the corpus of weights")
        self.corpus, self.encoder, self.storage = corpus, encoder, CorpusStorage.at(root)
        self.tokenizer, self.weights = encoder.digest(), weights_digest(corpus)
        self.items = self._plan()

    def existing(self) -> TokenCorpus | None:
        """Returns the tokens if they are there already.

        Raises:
            TokensError: The folder holds another corpus.
            CorpusError: They are damaged.
        """
        if self.storage.size(MANIFEST) is None:
            return None
        recipe = read_manifest(self.storage)["recipe"].get(TOKENS, {})
        if (recipe.get("tokenizer"), recipe.get("weights")) != (self.tokenizer, self.weights):
            what = "tokens of another tokeniser or other checkpoints" if recipe else "a corpus of weights"
            raise TokensError(f"{self.storage.name} already holds {what}; give another folder, or delete this one")
        return TokenCorpus.open(self.storage.name)

    def remaining(self) -> list[EncodeItem]:
        """Returns the items without a journal."""
        kept = set(self.storage.list(JOURNALS))
        return [item for item in self.items if f"{item.name}.json" not in kept]

    def commit(self) -> TokenCorpus:
        """Makes the shards of all items a corpus of tokens.

        Raises:
            CorpusError: A journal is damaged, or a file cannot be written.
        """
        written = {item.shard.path: self._read_journal(item) for item in self.items}
        shards = [written[shard.path] for shard in self.corpus.shards if shard.path in written]
        layouts = {item.shard.layout_id: self._layout(item.shard.layout_id) for item in self.items}
        tables = {key: self._token_layout(layout) for key, layout in layouts.items()}
        recipe = TokenRecipe(
            tokenizer=self.tokenizer,
            weights=self.weights,
            source=self.corpus.location,
            chunk_length=self.encoder.chunk_length,
            num_levels=self.encoder.num_levels,
            num_codes=self.encoder.num_codes,
            layouts={key: table.id for key, table in tables.items()},
        )
        committed = commit_corpus(
            self.storage.name,
            shards=shards,
            tasks=[],
            networks=[
                NetworkFacts(name=self.corpus.networks[key].name, recipe={}, layout=table)
                for key, table in tables.items()
            ],
            recipe={TOKENS: recipe.to_json()},
        )
        self.storage.delete(JOURNALS)
        remove_unused_shards(committed)
        return TokenCorpus.open(self.storage.name)

    def encode(self, item: EncodeItem, on_share: OnShare | None = None) -> None:
        """Encodes a shard, writes its tokens, then its journal.

        Args:
            item: The item.
            on_share: Called with the share of the shard that is encoded.

        Raises:
            CorpusError: The shard is damaged, or tokens cannot be written.
        """
        layout = self._layout(item.shard.layout_id)
        facts, table = shard_rows(self.corpus.facts, item.shard), self._token_layout(layout)
        packed_NP = torch.zeros(facts.num_rows, table.num_bytes, dtype=torch.uint8)
        done, weights = 0, StoredWeights(self.corpus, layout, facts)
        for row_B, first, codes_BWL in encoded_blocks(weights, layout, self.encoder):
            pack_codes(packed_NP, table, row_B, first, codes_BWL)
            done += codes_BWL.shape[0] * codes_BWL.shape[1]
            if on_share is not None:
                on_share(done / (facts.num_rows * self.encoder.num_chunks(layout)))
        shard = write_token_shard(self.storage.name, item.shard, facts, table, packed_NP)
        content = shard.to_json() | {"facts": shard.facts}
        self.storage.write(journal(item.name), sealed_json(content).encode())

    def _plan(self) -> list[EncodeItem]:
        columns = [self.corpus.facts.column(name).to_pylist() for name in ("shard", "split")]
        splits = dict(zip(*columns, strict=True))
        counts = Counter(columns[0])
        items = []
        for shard in self.corpus.shards:
            layout = self.encoder.layout(shard.layout_id)
            if layout is None and splits[shard.path] in _LEARNED:
                raise TokensError(
                    f"{self.corpus.location}: the tokeniser was not trained on networks like those of "
                    f"'{self.corpus.networks[shard.layout_id].name}'; leave them out by `raywgen corpus filter "
                    f"{self.corpus.location} OUT layout_id!={shard.layout_id}`, or train on this corpus"
                )
            if layout is None:
                continue
            content = json.dumps([self.tokenizer, shard.path, shard.sha256])
            name = hashlib.sha256(content.encode()).hexdigest()[:16]
            num, tokens = counts[shard.path], self._token_layout(layout).num_bytes
            item = EncodeItem(name=name, shard=shard, num_values=num * layout.num_values, num_bytes=num * tokens)
            items.append(item)
        # The largest first, so that none of them runs alone at the end.
        return sorted(items, key=lambda item: -item.num_values)

    def _layout(self, layout_id: str) -> Layout:
        layout = self.encoder.layout(layout_id)
        assert layout is not None
        return layout

    def _token_layout(self, layout: Layout) -> Layout:
        encoder = self.encoder
        return token_layout(layout.id, encoder.num_chunks(layout), encoder.num_levels, encoder.num_codes)

    def _read_journal(self, item: EncodeItem) -> Shard:
        try:
            content: dict[str, Any] = unseal(self.storage.read(journal(item.name)))
            return Shard(**content)
        except (SealError, TypeError) as error:
            raise CorpusError(
                f"{self.storage.name}/{journal(item.name)} is damaged ({error}); delete it and run the same command"
            ) from error


def encoded_blocks(
    weights: StoredWeights, layout: Layout, encoder: TokenEncoder
) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Encodes networks block by block.

    Yields:
        Which networks `(B,)`, the first chunk of the block, and its tokens `(B, W, L)`.
    """
    count, device = encoder.num_chunks(layout), encoder.device
    is_whole = encoder.windows(layout, 0, 1, 1) is None
    per_block = count if is_whole else max(1, _VALUES_AT_ONCE // encoder.chunk_length)
    rows_at_once = max(1, _VALUES_AT_ONCE // max(1, layout.num_values))
    for start in range(0, len(weights), rows_at_once):
        row_B = torch.arange(start, min(start + rows_at_once, len(weights)))
        moments_BN = encoder.moments(layout, part_reader(weights, row_B))
        for first in range(0, count, per_block):
            windows = encoder.windows(layout, first, min(first + per_block, count), len(row_B))
            if windows is None or (per_block >= count and windows.header is None):
                values = weights.values(row_B)  # Faster than one network after another.
            else:
                values = weights.windows(row_B, windows.start_B, windows.num_values)
            if windows is not None:
                values = pad(values, (0, windows.num_values - values.shape[1]))
                windows = windows.to(device)
            yield row_B, first, encoder.encode(values.to(device), layout, windows, moments_BN)
