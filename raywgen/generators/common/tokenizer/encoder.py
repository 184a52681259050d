"""Encodes the weights of whole corpora by a trained tokeniser, part by part.

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from raywgen.generators.common.tokenizer.tokenizer import Tokenizer
from raywgen.generators.token_encoder import TokenEncoder
from raywgen.weights import Layout, NormalizerTable, Windows
from raywgen.weights.groups import ReadValues

# The settings that decide tokens, beside the tensors of tokeniser and normalisers.
_SETTINGS = ("chunk_length", "quantiser", "coder", "coder_layers", "context", "scales")


class TokenizerEncoder(TokenEncoder):
    """Encodes by a tokeniser and the normalisers of its layouts."""

    def __init__(self, tokenizer: Tokenizer, normalizers: NormalizerTable) -> None:
        self._tokenizer, self._normalizers = tokenizer, normalizers
        self.chunk_length = tokenizer.config.chunk_length
        self.num_levels, self.num_codes = tokenizer.quantiser.num_tokens, tokenizer.quantiser.num_codes

    @property
    def device(self) -> torch.device:
        """Returns where the tokeniser is now."""
        return next(self._tokenizer.parameters()).device

    def digest(self) -> str:
        """Returns 32 hex digits that identify settings and values of the tokeniser, layouts and normalisers."""
        settings = asdict(self._tokenizer.config)
        digest = hashlib.sha256(json.dumps({name: settings.get(name) for name in _SETTINGS}).encode())
        _add(digest, self._tokenizer.state_dict())
        for _, (layout, normalizer) in sorted(self._normalizers.items()):
            # The order of the flat vector, in which a bundle keeps layouts.
            digest.update(json.dumps([spec.to_json() for spec in layout.generated], sort_keys=True).encode())
            _add(digest, dict(normalizer.named_buffers()))
        return digest.hexdigest()[:32]

    def layout(self, layout_id: str) -> Layout | None:
        """Returns a layout of the training corpus."""
        known = self._normalizers.get(layout_id)
        return None if known is None else known[0]

    def num_chunks(self, layout: Layout) -> int:
        """Returns M; header chunks count where scales are tokens."""
        return self._tokenizer.num_chunks(layout)

    def windows(self, layout: Layout, first: int, stop: int, num: int) -> Windows | None:
        """Returns whole blocks of the encoder around the chunks."""
        return self._tokenizer.windows_with(layout, torch.arange(first, stop).expand(num, -1))

    @torch.no_grad()
    def moments(self, layout: Layout, read: ReadValues) -> Tensor | None:
        """Returns the moments of groups that share a scale; None where scales are no tokens."""
        if self._tokenizer.scaled(layout) is None:
            return None

        def read_there(start: int, stop: int) -> Tensor:
            return read(start, stop).to(self.device)

        return self._tokenizer.read_moments(layout, self._normalizers[layout.id][1], read_there)

    @torch.no_grad()
    def encode(
        self, values_BX: Tensor, layout: Layout, windows: Windows | None, moments_BN: Tensor | None = None
    ) -> Tensor:
        """Normalises the values by their layout's normaliser, and encodes them."""
        tokenizer, normalizer = self._tokenizer, self._normalizers[layout.id][1]
        if windows is not None:
            header = None if moments_BN is None else tokenizer.header_of_moments(moments_BN, layout, windows)
            chunks_BXK = tokenizer.window_chunks(values_BX, windows, layout, normalizer, header)
            return tokenizer.encode_windows(chunks_BXK, layout, windows)
        chunks_BMK = tokenizer.chunks(values_BX, layout, normalizer)
        device = chunks_BMK.device
        return tokenizer.encode(chunks_BMK, tokenizer.positions(layout).to(device), tokenizer.mask(layout).to(device))


def _add(digest: hashlib._Hash, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        raw = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {raw.dtype} {tuple(raw.shape)}".encode())
        digest.update(raw.reshape(-1).view(torch.uint8).numpy().data)
