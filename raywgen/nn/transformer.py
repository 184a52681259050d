"""A transformer with rotary positions, causal with a static key-value cache or not.

Shape legend: B sequences, T positions, A heads, E width of a head, H width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class KeyValueCache:
    """Keys and values of all positions written so far, in buffers that are allocated once."""

    def __init__(self, batch: int, num_layers: int, num_heads: int, length: int, head_width: int) -> None:
        shape = (num_layers, batch, num_heads, length, head_width)
        self.keys = torch.zeros(shape)
        self.values = torch.zeros(shape)
        self.length = 0

    def to(self, device: torch.device, dtype: torch.dtype) -> KeyValueCache:
        """Moves the buffers; call before the first step."""
        self.keys = self.keys.to(device, dtype)
        self.values = self.values.to(device, dtype)
        return self

    def append(self, layer: int, keys_BATE: Tensor, values_BATE: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new positions of one layer and returns all positions up to the last new one."""
        end = self.length + keys_BATE.shape[2]
        self.keys[layer, :, :, self.length : end] = keys_BATE
        self.values[layer, :, :, self.length : end] = values_BATE
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Transformer(nn.Module):
    """Pre-norm decoder blocks (RMS norm, rotary attention, GELU) without embedding or head.

    Args:
        width: H, a multiple of `num_heads`.
        num_layers: Blocks.
        num_heads: A.
        dropout: Applied to the residual branches in training.
        is_causal: Whether a position sees only those before it; only then can there be a cache.
    """

    def __init__(
        self, width: int, num_layers: int, num_heads: int, dropout: float = 0.0, *, is_causal: bool = True
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(width, num_heads, dropout, is_causal) for _ in range(num_layers))
        self.norm = nn.RMSNorm(width)
        self.num_heads = num_heads
        self.head_width = width // num_heads

    def forward(self, x_BTH: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Hidden states `(B, T, H)`; with a cache, `x_BTH` continues what the cache holds."""
        start = 0 if cache is None else cache.length
        rotation = _rotation(start, x_BTH.shape[1], self.head_width, x_BTH.device)
        for layer, block in enumerate(self.blocks):
            x_BTH = block(x_BTH, rotation, cache, layer)
        if cache is not None:
            cache.length += x_BTH.shape[1]
        return self.norm(x_BTH)

    def new_cache(self, batch: int, length: int) -> KeyValueCache:
        """An empty cache for `length` positions, on this module's device."""
        cache = KeyValueCache(batch, len(self.blocks), self.num_heads, length, self.head_width)
        return cache.to(self.norm.weight.device, self.norm.weight.dtype)


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int, dropout: float, is_causal: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.attention_norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_BTH: Tensor, rotation: tuple[Tensor, Tensor], cache: KeyValueCache | None, layer: int
    ) -> Tensor:
        qkv = self.qkv(self.attention_norm(x_BTH)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query, key = _rotate(query, rotation), _rotate(key, rotation)
        is_causal = self.is_causal and query.shape[2] > 1
        if cache is not None:
            assert cache.length == 0 or query.shape[2] == 1, "continue a cache one position at a time"
            key, value = cache.append(layer, key, value)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
        x_BTH = x_BTH + self.dropout(self.out(mixed.transpose(1, 2).flatten(-2)))
        return x_BTH + self.dropout(self.mlp(self.mlp_norm(x_BTH)))


def _rotation(start: int, length: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(T, E/2)` of RoPE (Su et al. 2021, eq. 34)."""
    frequency = 10_000.0 ** (-torch.arange(0, head_width, 2, device=device) / head_width)
    angle = torch.arange(start, start + length, device=device).unsqueeze(1) * frequency
    return angle.cos(), angle.sin()


def _rotate(x_BATE: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (part.to(x_BATE.dtype) for part in rotation)
    left, right = x_BATE.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
