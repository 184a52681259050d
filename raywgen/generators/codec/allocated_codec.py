"""Whole networks to tokens within a budget of bits, more of them where weights are large.

A kernel (all values between one input and one output channel) is divided by `row scale * column scale`, two tokens that
are stored. Independent Gaussians of variances v_i cost the least squared error where value i gets
`R + log2(v_i / geometric mean) / 2` bits (reverse water-filling; Cover and Thomas 2006, theorem 10.3.3). Here

    bits = round(log2(row * column / rms of the tensor) + log2(weight of the tensor) / 2 - threshold), at least 0

which a decoder knows from the stored scales, the layout and one threshold. Kernels of equal bits are joined, rotated
and written by a trellis of that many bits. The threshold is the lowest that keeps the budget, everything counted.

Where all values count alike the weight is 1. But what a layer adds to a network's output depends on its own noise to
signal, not on its size: where all tensors count alike it is one over the number of values.

Shape legend: N vectors, K values of a vector, L tokens of a vector, G row scales, I column scales, P kernels of all
large tensors, X values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raywgen.generators.codec.network_codec import CodecConfig, CodedNetwork, NetworkCodec
from raywgen.generators.codec.scalars import decode_scales, encode_scales
from raywgen.names import one_of
from raywgen.nn.quantisers import TrellisQuantiser
from raywgen.weights import Layout, TensorSpec
from raywgen.weights.chunks import from_chunks, to_chunks
from raywgen.weights.rotation import rotate, rotate_back

COLUMN_BITS = 4
THRESHOLD_BITS = 16
_STEPS_OF_AN_OCTAVE = 4
_SMALLEST_OCTAVE = -3
_THRESHOLD_STEPS = 256
_MOST_BITS = 8
_FIT_ROUNDS = 3
ALIKE = ("values", "tensors")


class BudgetError(ValueError):
    """Scales and small tensors alone cost more bits than there are."""


@dataclass(kw_only=True)
class AllocatedConfig(CodecConfig):
    """How a network is written within a budget; rotation, scales and kind of quantiser are given.

    Attributes:
        bits_per_value: Most bits per value of the layout, everything counted.
        alike: Whose noise to signal counts alike: that of all `values`, for the best signal to noise over all, or that
            of all `tensors`, for what the network does.
    """

    bits_per_value: float = 4.25
    alike: str = "tensors"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alike not in ALIKE:
            raise ValueError(one_of("alike", self.alike, ALIKE))
        if (self.quantiser.kind, self.scale_per, self.rotate, self.outliers) != ("trellis", "filter", True, 0):
            raise ValueError("a budget of bits takes kind=trellis, scale_per=filter, rotate=true and outliers=0")


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatedNetwork(CodedNetwork):
    """As its base, with the vectors of all bit widths one after another in `codes_NL`.

    Attributes:
        columns_I: Column scale tokens of the large tensors, in order, int64.
        threshold: In 1/256 octaves.
    """

    columns_I: Tensor
    threshold: int


class AllocatedCodec(NetworkCodec):
    """Writes `state_dict`s within a budget of bits, and reads them back."""

    config: AllocatedConfig

    def __init__(self, config: AllocatedConfig) -> None:
        trellis = config.quantiser.trellis
        self._trellises = {
            bits: TrellisQuantiser(
                # Below twice the bits the states of a choice cannot be spread.
                replace(trellis, bits=bits, state_bits=max(trellis.state_bits, 2 * bits)),
                config.vector_length,
            )
            for bits in range(1, _MOST_BITS + 1)
        }
        super().__init__(config, self._trellises[_MOST_BITS])

    @torch.no_grad()
    def encode(self, state_dict: Mapping[str, Tensor]) -> AllocatedNetwork:
        """The tokens of a network.

        Raises:
            BudgetError: The budget does not hold even the scales and small tensors.
            WeightsError: It holds NaN or infinity, or is no `state_dict`.
        """
        layout = Layout.from_state_dict(state_dict)
        layout.check(state_dict)
        large = self.large_tensors(layout)
        fitted = [_fit_scales(_powers(spec, state_dict[spec.name])) for spec in large]
        empty = torch.zeros(0, dtype=torch.int64)
        coded = AllocatedNetwork(
            layout=layout,
            codes_NL=torch.zeros(0, _num_tokens(self.config), dtype=torch.int64),
            scales_G=torch.cat([rows_G for rows_G, _ in fitted]) if fitted else empty,
            outliers_O=empty,
            outlier_values_O=torch.zeros(0, dtype=torch.float16),
            columns_I=torch.cat([columns_I for _, columns_I in fitted]) if fitted else empty,
            threshold=0,
            **self._small(layout, state_dict),
        )
        coded = replace(coded, threshold=self._threshold(coded))
        bits_X, scale_X = self._of_values(coded)
        values = [state_dict[spec.name].float().flatten() for spec in large]
        stream_X = (torch.cat(values) if values else torch.zeros(0)) / scale_X
        codes = [self._encode_part(stream_X[bits_X == bits], bits, layout) for bits in self._trellises]
        return replace(coded, codes_NL=torch.cat(codes))

    def bits(self, coded: CodedNetwork) -> dict[str, float]:
        """Bits of every part of the code."""
        assert isinstance(coded, AllocatedNetwork)
        widths = self._bits_of_kernels(coded)[0]
        return super().bits(replace(coded, codes_NL=coded.codes_NL[:0])) | {
            "codes": float(self._padded_bits(widths, self._kernel_sizes(coded.layout))),
            "columns": float(COLUMN_BITS * len(coded.columns_I)),
            "threshold": float(THRESHOLD_BITS),
        }

    @property
    def num_codebook_values(self) -> int:
        """Entries of all trellis tables; they are Gaussian quantiles that follow from their size."""
        return sum(trellis.num_codebook_values for trellis in self._trellises.values())

    def _large_values(self, coded: CodedNetwork) -> list[Tensor]:
        assert isinstance(coded, AllocatedNetwork)
        bits_X, scale_X = self._of_values(coded)
        stream_X = torch.zeros(len(bits_X))
        start = 0
        for bits, trellis in self._trellises.items():
            is_here_X = bits_X == bits
            num_values = int(is_here_X.sum())
            stop = start + -(-num_values // self.config.vector_length)
            vectors_NK = rotate_back(trellis.decode(coded.codes_NL[start:stop]), _key(coded.layout, bits))
            stream_X[is_here_X] = from_chunks(vectors_NK, num_values)
            start = stop
        sizes = [spec.num_values for spec in self.large_tensors(coded.layout)]
        return list((stream_X * scale_X).split(sizes))

    def _encode_part(self, values_X: Tensor, bits: int, layout: Layout) -> Tensor:
        vectors_NK = to_chunks(values_X.unsqueeze(0), self.config.vector_length)[0]
        if not len(vectors_NK):
            return torch.zeros(0, _num_tokens(self.config), dtype=torch.int64)
        return self._trellises[bits].encode(rotate(vectors_NK, _key(layout, bits)))

    def _threshold(self, coded: AllocatedNetwork) -> int:
        """The lowest threshold within the budget."""
        fixed = sum(bits for part, bits in self.bits(coded).items() if part != "codes")
        left = self.config.bits_per_value * coded.layout.num_values - fixed
        sizes_P = self._kernel_sizes(coded.layout)
        low, high = -(_MOST_BITS + 16) * _THRESHOLD_STEPS, 16 * _THRESHOLD_STEPS

        def fits(threshold: int) -> bool:
            widths_P = self._bits_of_kernels(replace(coded, threshold=threshold))[0]
            return self._padded_bits(widths_P, sizes_P) <= left

        if not fits(high):
            raise BudgetError(
                f"bits_per_value={self.config.bits_per_value}: scales and small tensors alone take "
                f"{fixed / coded.layout.num_values:.2f}; give more, or a lower small_bits"
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high

    def _padded_bits(self, widths_P: Tensor, sizes_P: Tensor) -> int:
        """Bits of all vectors, the last of each width padded."""
        counts = torch.bincount(widths_P, weights=sizes_P.double(), minlength=_MOST_BITS + 1).long()
        length = self.config.vector_length
        return sum(bits * length * -(-int(counts[bits]) // length) for bits in self._trellises)

    def _bits_of_kernels(self, coded: AllocatedNetwork) -> tuple[Tensor, Tensor]:
        """Bits of a value int64 `(P,)` and its scale float32 `(P,)`, by kernel: all that follows from the scales."""
        large = self.large_tensors(coded.layout)
        rows = coded.scales_G.split([spec.shape[0] for spec in large])
        columns = coded.columns_I.split([spec.shape[1] for spec in large])
        widths, scales = [], []
        for spec, rows_G, columns_I in zip(large, rows, columns, strict=True):
            weight = 1 / spec.num_values if self.config.alike == "tensors" else 1.0
            scale_GI = decode_scales(rows_G).double().unsqueeze(1) * _decode_columns(columns_I).double()
            octave_GI = scale_GI.log2() - scale_GI.square().mean().sqrt().log2() + math.log2(weight) / 2
            bits_GI = torch.round(octave_GI - coded.threshold / _THRESHOLD_STEPS)
            widths.append(bits_GI.clamp(0, _MOST_BITS).long().flatten())
            scales.append(scale_GI.float().flatten())
        if not large:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        return torch.cat(widths), torch.cat(scales)

    def _of_values(self, coded: AllocatedNetwork) -> tuple[Tensor, Tensor]:
        sizes_P = self._kernel_sizes(coded.layout)
        bits_X, scale_X = (of_P.repeat_interleave(sizes_P) for of_P in self._bits_of_kernels(coded))
        return bits_X, scale_X

    def _kernel_sizes(self, layout: Layout) -> Tensor:
        """Values of each kernel, int64 `(P,)`."""
        sizes = [
            torch.full((spec.shape[0] * spec.shape[1],), spec.num_values // (spec.shape[0] * spec.shape[1]))
            for spec in self.large_tensors(layout)
        ]
        return torch.cat(sizes) if sizes else torch.zeros(0, dtype=torch.int64)


def _num_tokens(config: CodecConfig) -> int:
    """L."""
    return config.vector_length // config.quantiser.trellis.values_per_token


def _powers(spec: TensorSpec, tensor: Tensor) -> Tensor:
    """Mean square of every kernel, float64 `(G, I)`."""
    return tensor.double().reshape(spec.shape[0], spec.shape[1], -1).square().mean(dim=2)


def _fit_scales(power_GI: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column tokens whose product comes near the root of `power_GI`, by alternating means."""
    columns_I = torch.zeros(power_GI.shape[1], dtype=torch.int64)
    rows_G = torch.zeros(power_GI.shape[0], dtype=torch.int64)
    column_power_I = torch.ones(power_GI.shape[1], dtype=torch.float64)
    for _ in range(_FIT_ROUNDS):
        rows_G = encode_scales((power_GI / column_power_I).mean(dim=1).sqrt())
        row_power_G1 = decode_scales(rows_G).double().square().unsqueeze(1)
        columns_I = _encode_columns((power_GI / row_power_G1).mean(dim=0).sqrt())
        column_power_I = _decode_columns(columns_I).double().square()
    return encode_scales((power_GI / column_power_I).mean(dim=1).sqrt()), columns_I


def _encode_columns(scales_I: Tensor) -> Tensor:
    """Tokens in `[0, 16)`: quarters of an octave from 1/8 on."""
    octave_I = scales_I.clamp(min=2.0**-60).log2() - _SMALLEST_OCTAVE
    return torch.round(octave_I * _STEPS_OF_AN_OCTAVE).long().clamp(0, (1 << COLUMN_BITS) - 1)


def _decode_columns(tokens_I: Tensor) -> Tensor:
    return torch.exp2(tokens_I.double() / _STEPS_OF_AN_OCTAVE + _SMALLEST_OCTAVE).float()


def _key(layout: Layout, bits: int) -> int:
    return int(layout.form_id[:8], 16) + bits
