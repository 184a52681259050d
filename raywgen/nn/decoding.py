"""Continues cached sequences through a causal transformer by one position at a time.

Weights are prepared once, in the precision of matrix products, and blocks may be compiled. A compiled block has static
shapes: the position is a tensor, and the block reads the cache up to a power of two and leaves out what is not written
yet, so that sequences of all lengths share a few compiled blocks. Torch keeps them on disk for later processes.

Here B counts sequences, A heads, J heads of keys and values, and E is the width of a head of attention.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raywgen.nn.blocks import compile_error
from raywgen.nn.cached_attention import can_attend, write_and_attend
from raywgen.nn.transformer import KeyValueCache, Transformer, TransformerBlock, rotated, rotation_of

SMALLEST_BUCKET = 64
"""Fewest positions of the cache that a compiled block reads."""
_MOST_SHAPES = 256
"""Most shapes for which a block is compiled in one process."""
# Otherwise the GELU of all inputs is computed anew for every output of the product that reads them.
_OPTIONS: dict[str, str | int | bool | Callable[..., object]] = {"realize_opcount_threshold": 8}
_WORTH_STEPS = 4096

Compile = Literal["auto", "always", "never"]
_How = Literal["products", "sums", "kernel"]
"""How a position attends to the cache: by products of matrices, compiled sums over products, or `cached_attention`."""


class _Weights(NamedTuple):
    """The parameters of a block; matrices are as they are multiplied."""

    attention_norm: Tensor
    qkv: Tensor
    out: Tensor
    mlp_norm: Tensor
    expand: Tensor
    expand_bias: Tensor
    contract: Tensor
    contract_bias: Tensor


class PreparedTransformer:
    """A causal transformer as it takes single steps; valid until its parameters are trained.

    Args:
        transformer: The transformer.
        length: Most positions of a sequence.
        dtype: Type in which matrices are multiplied. Norms, attention and the residual stream stay float32.
        compiled: Whether blocks are compiled.
    """

    def __init__(
        self, transformer: Transformer, length: int, dtype: torch.dtype = torch.float32, *, compiled: bool = False
    ) -> None:
        blocks = [cast(TransformerBlock, block) for block in transformer.blocks]
        self._weights = [_weights(block, dtype) for block in blocks]
        self._norm_H = transformer.norm.weight.detach()
        self._num_heads = blocks[0].num_heads
        self._rotation = rotation_of(0, length, transformer.head_width, self._norm_H.device)
        self._compiled = compiled

    def step(self, x_BH: Tensor, cache: KeyValueCache) -> Tensor:
        """Returns hidden states `(B, H)` of the next position of every sequence, and adds it to the cache."""
        position, stop = cache.length, cache.length + 1
        block, how = _block, "products"
        if self._compiled:
            stop = min(cache.keys.shape[3], max(SMALLEST_BUCKET, 1 << position.bit_length()))
            block, how = _compiled_block(), _how_compiled(cache.keys)
        rotation = (self._rotation[0][position], self._rotation[1][position])
        here = torch.tensor([position], device=x_BH.device)
        x_BH = x_BH.to(self._norm_H.dtype)
        # Batches and lengths of many shapes may come one after another; beyond the limit they would not be compiled.
        with torch._dynamo.config.patch(recompile_limit=_MOST_SHAPES) if self._compiled else nullcontext():
            for weights, keys, values in zip(self._weights, cache.keys, cache.values, strict=True):
                written = (keys[:, :, :stop], values[:, :, :stop])
                x_BH = block(x_BH, *written, here, *rotation, self._num_heads, weights, how)
        cache.length += 1
        return F.rms_norm(x_BH, self._norm_H.shape, self._norm_H)


def compiles(setting: Compile, num_steps: int, device: torch.device) -> bool:
    """Returns whether blocks shall be compiled; where they cannot be, says so if they were to be in any case.

    Args:
        setting: `auto` compiles where so many steps are taken that they save more than compiling takes.
        num_steps: Steps that will be taken.
        device: Device of the transformer.
    """
    if setting == "never" or (setting == "auto" and num_steps < _WORTH_STEPS):
        return False
    reason = _compile_error(device)
    if reason and setting == "always":
        warnings.warn(f"compile=always has no effect: nothing compiles for {device.type} here ({reason})", stacklevel=2)
    return not reason


@cache
def _compile_error(device: torch.device) -> str:
    return compile_error(device)


def _weights(block: TransformerBlock, dtype: torch.dtype) -> _Weights:
    expand, contract = cast(nn.Linear, block.mlp[0]), cast(nn.Linear, block.mlp[2])
    matrices = (block.qkv.weight, block.out.weight, expand.weight, expand.bias, contract.weight, contract.bias)
    qkv, out, *mlp = (matrix.detach().to(dtype) for matrix in matrices)
    return _Weights(block.attention_norm.weight.detach(), qkv, out, block.mlp_norm.weight.detach(), *mlp)


def _how_compiled(keys: Tensor) -> _How:
    """Returns how a compiled block attends; for a single sequence sums are as fast, and part of what is compiled."""
    return "kernel" if keys.shape[1] > 1 and can_attend(keys.shape[4], keys.dtype, keys.device) else "sums"


@cache
def _compiled_block() -> Callable[..., Tensor]:
    return torch.compile(_block, dynamic=False, options=_OPTIONS)


def _block(
    x_BH: Tensor,
    keys_BJTE: Tensor,
    values_BJTE: Tensor,
    position_1: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    weights: _Weights,
    how: _How,
) -> Tensor:
    """Takes a block's step, and writes its key and value; compiled, the cache may go on after the position."""
    is_fused = how != "products"
    num_kv_heads = keys_BJTE.shape[1]
    heads = _times(F.rms_norm(x_BH, x_BH.shape[-1:], weights.attention_norm), weights.qkv, None, is_fused)
    turned, value_BJE = heads.unflatten(-1, (-1, keys_BJTE.shape[3])).split([num_heads + num_kv_heads, num_kv_heads], 1)
    query_BAE, key_BJE = rotated(turned, (cos, sin)).split([num_heads, num_kv_heads], dim=1)
    query = query_BAE.unflatten(1, (num_kv_heads, -1)) * keys_BJTE.shape[3] ** -0.5
    if how == "kernel":
        mixed = write_and_attend(query, key_BJE, value_BJE, keys_BJTE, values_BJTE, position_1)
    else:
        keys_BJTE.index_copy_(2, position_1, key_BJE.unsqueeze(2).to(keys_BJTE.dtype))
        values_BJTE.index_copy_(2, position_1, value_BJE.unsqueeze(2).to(values_BJTE.dtype))
        mixed = _mixed(query, keys_BJTE, values_BJTE, position_1, how)
    mixed_BH = mixed.flatten(1)
    x_BH = x_BH + _times(mixed_BH, weights.out, None, is_fused)
    inner = F.rms_norm(x_BH, x_BH.shape[-1:], weights.mlp_norm)
    inner = F.gelu(_times(inner, weights.expand, weights.expand_bias, is_fused))
    return x_BH + _times(inner, weights.contract, weights.contract_bias, is_fused)


def _mixed(query: Tensor, keys: Tensor, values: Tensor, position_1: Tensor, how: _How) -> Tensor:
    """Attends to the cache: queries `(B, J, A/J, E)` that are scaled already; returns float32 of that shape."""
    if how == "products":
        scores = (query.to(keys.dtype) @ keys.transpose(2, 3)).float()
        return (scores.softmax(dim=-1).to(values.dtype) @ values).float()
    # As sums over products these are compiled to one pass over a cache of any dtype, with sums in float32.
    scores = (query.unsqueeze(3) * keys.unsqueeze(2).float()).sum(dim=-1)
    is_written = torch.arange(keys.shape[2], device=keys.device) <= position_1
    shares = scores.masked_fill(~is_written, -torch.inf).softmax(dim=-1)
    return (shares.unsqueeze(-1) * values.unsqueeze(2).float()).sum(dim=3)


def _times(x_BH: Tensor, weight: Tensor, bias: Tensor | None, is_fused: bool) -> Tensor:
    """Multiplies in the weight's dtype and returns float32."""
    if is_fused and len(x_BH) == 1:
        # A single row is bound by reading the weights, which one pass over them does best.
        product = (weight.float() * x_BH).sum(dim=-1).unsqueeze(0)
        return product if bias is None else product + bias.float()
    return F.linear(x_BH.to(weight.dtype), weight, bias).float()
