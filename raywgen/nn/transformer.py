"""A transformer with rotary positions: causal, with an optional static key-value cache, or not causal.

Here B counts sequences, A heads, and E is the width of a head of attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raywgen.nn.blocks import Blocks


class KeyValueCache:
    """Keys and values of all positions written so far, in buffers that are allocated once.

    Args:
        batch: Number of sequences.
        num_layers: Blocks.
        num_kv_heads: Heads of keys and values.
        length: Most positions of a sequence.
        head_width: E.
        device: Device of the buffers.
        dtype: Type of the buffers, and so of the attention over them; bfloat16 halves memory and traffic.
    """

    def __init__(
        self,
        batch: int,
        num_layers: int,
        num_kv_heads: int,
        length: int,
        head_width: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (num_layers, batch, num_kv_heads, length, head_width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, keys_BATE: Tensor, values_BATE: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new positions of one layer and returns all positions up to the last new one."""
        end = self.length + keys_BATE.shape[2]
        self.keys[layer, :, :, self.length : end] = keys_BATE
        self.values[layer, :, :, self.length : end] = values_BATE
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def repeat(self, num: int, length: int) -> KeyValueCache:
        """Returns a cache for `length` positions with a copy of every sequence `num` times in a row."""
        layers, batch, heads, _, width = self.keys.shape
        copy = KeyValueCache(batch * num, layers, heads, length, width, self.keys.device, self.keys.dtype)
        for mine, other in ((self.keys, copy.keys), (self.values, copy.values)):
            other[:, :, :, : self.length] = mine[:, :, :, : self.length].repeat_interleave(num, dim=1)
        copy.length = self.length
        return copy


class Transformer(nn.Module):
    """Pre-norm decoder blocks (RMS norm, rotary attention, GELU) without embedding or head.

    Args:
        width: H, a multiple of `num_heads`.
        num_layers: Blocks.
        num_heads: A.
        dropout: Applied to the residual branches in training.
        is_causal: Whether a position attends to itself and earlier ones only; a cache needs this.
        num_kv_heads: Heads of keys and values, each shared by a group of query heads (Ainslie et al. 2023, "GQA");
            a divisor of `num_heads`, which is the default.
    """

    def __init__(
        self,
        width: int,
        num_layers: int,
        num_heads: int,
        dropout: float = 0.0,
        *,
        is_causal: bool = True,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        assert num_heads % self.num_kv_heads == 0, f"{num_heads} heads in groups of {self.num_kv_heads}"
        self.blocks = Blocks(
            TransformerBlock(width, num_heads, self.num_kv_heads, dropout, is_causal) for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(width)
        self.head_width = width // num_heads

    def forward(
        self,
        x_BTH: Tensor,
        cache: KeyValueCache | None = None,
        is_seen_BT: Tensor | None = None,
        num_common: int | None = None,
    ) -> Tensor:
        """Returns hidden states `(B, T, H)`; with a cache, `x_BTH` continues the cached sequences.

        Args:
            x_BTH: Inputs.
            cache: Keys and values of earlier positions; only for a causal transformer.
            is_seen_BT: Which positions may be attended to, bool, at least one of each sequence; only for a transformer
                that is not causal.
            num_common: Length of a shared prefix; only for a causal transformer without a cache. Each later position
                attends to the prefix and itself alone, at the same rotary position: many one-token continuations in
                one pass.
        """
        # The residual stream keeps the parameters' precision, even if matrix products use a lower one.
        x_BTH = x_BTH.to(self.norm.weight.dtype)
        start, length, mask_TT = 0 if cache is None else cache.length, x_BTH.shape[1], None
        rotation = rotation_of(start, length, self.head_width, x_BTH.device)
        if num_common is not None:
            assert cache is None, "a cache holds one sequence a row"
            position_T = torch.arange(length, device=x_BTH.device)
            mask_TT = (position_T < num_common).expand(length, -1).tril() | (position_T == position_T.unsqueeze(1))
            rotation = tuple(part[position_T.clamp(max=num_common)] for part in rotation)
        for layer, block in enumerate(self.blocks):
            if cache is None:
                x_BTH = self.blocks.run(layer, x_BTH, rotation, None, layer, is_seen_BT, mask_TT)
            else:
                x_BTH = block(x_BTH, rotation, cache, layer, is_seen_BT, mask_TT)
        if cache is not None:
            cache.length += x_BTH.shape[1]
        return self.norm(x_BTH)

    def new_cache(self, batch: int, length: int, dtype: torch.dtype | None = None) -> KeyValueCache:
        """Returns an empty cache for `length` positions, on this module's device and by default in its dtype."""
        weight = self.norm.weight
        return KeyValueCache(
            batch, len(self.blocks), self.num_kv_heads, length, self.head_width, weight.device, dtype or weight.dtype
        )


class TransformerBlock(nn.Module):
    """A block: attention and a perceptron, each behind a norm and added to the stream."""

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, dropout: float, is_causal: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.is_causal = is_causal
        self.attention_norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, (num_heads + 2 * num_kv_heads) * (width // num_heads), bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BTH: Tensor,
        rotation: tuple[Tensor, Tensor],
        cache: KeyValueCache | None,
        layer: int,
        is_seen_BT: Tensor | None = None,
        mask_TT: Tensor | None = None,
    ) -> Tensor:
        """Returns the stream `(B, T, H)` after this block; see `Transformer`."""
        heads_BATE = self.qkv(self.attention_norm(x_BTH)).unflatten(-1, (-1, x_BTH.shape[-1] // self.num_heads))
        heads_BATE = heads_BATE.transpose(1, 2)
        query, key, value = heads_BATE.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        query, key = rotated(query, rotation), rotated(key, rotation)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        mixed = self._attend(query, key, value, is_seen_BT, mask_TT)
        x_BTH = x_BTH + self.dropout(self.out(mixed.transpose(1, 2).flatten(-2)))
        return x_BTH + self.dropout(self.mlp(self.mlp_norm(x_BTH)))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, is_seen_BT: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Returns the attention of the last positions to all, in the keys' dtype."""
        num_new, num_all = query.shape[2], key.shape[2]
        is_causal = self.is_causal and num_new > 1 and mask is None
        if is_causal and num_new < num_all:
            # Torch aligns the mask of `is_causal` with the first key; a continuation must be aligned with the last.
            mask = torch.ones(num_new, num_all, dtype=torch.bool, device=query.device).tril(num_all - num_new)
            is_causal = False
        if is_seen_BT is not None:
            assert not self.is_causal, "a causal transformer takes no mask of positions"
            mask = is_seen_BT[:, None, None, :]
        mixed = F.scaled_dot_product_attention(
            query.to(key.dtype),
            key,
            value,
            attn_mask=mask,
            is_causal=is_causal,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return mixed.to(query.dtype)


def rotation_of(start: int, length: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the cosines and sines `(T, E/2)` of RoPE (Su et al. 2021, eq. 34)."""
    frequency = 10_000.0 ** (-torch.arange(0, head_width, 2, device=device) / head_width)
    angle = torch.arange(start, start + length, device=device).unsqueeze(1) * frequency
    return angle.cos(), angle.sin()


def rotated(x_BATE: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns queries or keys by the angles of their positions, in their own dtype."""
    cos, sin = (part.to(x_BATE.dtype) for part in rotation)
    left, right = x_BATE.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
