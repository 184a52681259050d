"""The code of a network as bytes: threshold, scales, small tensors, then the vectors of each number of bits.

How long each part is follows from the layout, the codec's settings and the parts before it. A part is padded to whole
bytes.

Shape letters beyond the legend in `raywgen.weights`: X tokens, N vectors, L tokens of a vector.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from raywgen.corpus.compression.codec import THRESHOLD_BITS, CodedNetwork, NetworkCodec
from raywgen.corpus.compression.scalars import COLUMN_BITS, SCALE_BITS
from raywgen.weights import Layout

_END_TYPE = np.dtype("<i2")


class BitstreamError(ValueError):
    """Bytes that are not the code of a network of this layout."""


def to_bytes(coded: CodedNetwork, codec: NetworkCodec) -> bytes:
    """Writes the code of a network."""
    ends = coded.ends_T2.view(torch.int16).numpy().astype(_END_TYPE).tobytes()
    parts = [
        _pack(torch.tensor([coded.threshold & ((1 << THRESHOLD_BITS) - 1)]), THRESHOLD_BITS),
        _pack(coded.rows_G, SCALE_BITS),
        _pack(coded.columns_I, COLUMN_BITS),
        ends,
        _pack(coded.small_Y, codec.config.small_bits),
    ]
    start = 0
    for bits, num in codec.vectors_of_widths(coded).items():
        parts.append(_pack(coded.codes_NL[start : start + num].flatten(), codec.trellises[bits].bits_per_token))
        start += num
    return b"".join(parts)


def from_bytes(content: bytes, layout: Layout, codec: NetworkCodec) -> CodedNetwork:
    """Reads what `to_bytes` wrote.

    Raises:
        BitstreamError: The bytes are too few or too many for this layout.
    """
    reader = _BitReader(content)
    large, small = codec.large_tensors(layout), codec.small_tensors(layout)
    threshold = int(reader.take(1, THRESHOLD_BITS)[0])
    rows_G = reader.take(sum(spec.shape[0] for spec in large), SCALE_BITS)
    columns_I = reader.take(sum(spec.shape[1] for spec in large), COLUMN_BITS)
    ends = np.frombuffer(reader.take_bytes(len(small) * 2 * _END_TYPE.itemsize), _END_TYPE).astype(np.int16)
    coded = CodedNetwork(
        layout=layout,
        codes_NL=torch.zeros(0, codec.num_tokens, dtype=torch.int64),
        rows_G=rows_G,
        columns_I=columns_I,
        small_Y=reader.take(sum(spec.num_values for spec in small), codec.config.small_bits),
        ends_T2=torch.from_numpy(ends).view(torch.bfloat16).view(-1, 2),
        threshold=threshold - (threshold >> (THRESHOLD_BITS - 1) << THRESHOLD_BITS),
    )
    codes = [
        reader.take(num * codec.num_tokens, codec.trellises[bits].bits_per_token).view(num, codec.num_tokens)
        for bits, num in codec.vectors_of_widths(coded).items()
    ]
    reader.close()
    return CodedNetwork(
        layout=layout,
        codes_NL=torch.cat(codes),
        rows_G=rows_G,
        columns_I=columns_I,
        small_Y=coded.small_Y,
        ends_T2=coded.ends_T2,
        threshold=coded.threshold,
    )


class _BitReader:
    """Reads the parts of a stream, one after another."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def take(self, num: int, bits: int) -> Tensor:
        """Returns tokens int64 `(num,)`."""
        raw = np.frombuffer(self.take_bytes(-(-num * bits // 8)), np.uint8)
        is_set = np.unpackbits(raw, count=num * bits).reshape(num, bits).astype(np.int64)
        return torch.from_numpy(is_set @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64)))

    def take_bytes(self, num: int) -> bytes:
        """Returns the next bytes."""
        if self._at + num > len(self._content):
            raise BitstreamError(f"it ends after {len(self._content)} bytes, within a part")
        self._at += num
        return self._content[self._at - num : self._at]

    def close(self) -> None:
        """Checks that nothing is left."""
        if self._at != len(self._content):
            raise BitstreamError(f"{len(self._content) - self._at} bytes are left after its last part")


def _pack(tokens_X: Tensor, bits: int) -> bytes:
    shifts = np.arange(bits - 1, -1, -1)
    return np.packbits(((tokens_X.numpy()[:, None] >> shifts) & 1).astype(np.uint8)).tobytes()
