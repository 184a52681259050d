"""The one place where coders have names."""

from __future__ import annotations

from typing import Literal, get_args

from raywgen.nn.coders.base import Coder
from raywgen.nn.coders.convolution import CHANNEL_SHARE, ConvolutionCoder
from raywgen.nn.coders.perceptron import PerceptronCoder
from raywgen.nn.coders.transformer import NUM_HEADS, TransformerCoder

CoderKind = Literal["mlp", "conv", "transformer"]
CODERS: tuple[CoderKind, ...] = get_args(CoderKind)


def build_coder(
    kind: CoderKind,
    chunk_length: int,
    num_position_features: int,
    width: int,
    *,
    num_layers: int = 1,
    context: int = 32,
) -> Coder:
    """Builds the coder of that name.

    Args:
        kind: One of `CODERS`.
        chunk_length: K.
        num_position_features: G.
        width: H.
        num_layers: Residual blocks of `conv`, layers of `transformer`.
        context: Chunks that attend to each other in `transformer`.
    """
    match kind:
        case "conv":
            return ConvolutionCoder(chunk_length, num_position_features, width, num_layers)
        case "transformer":
            return TransformerCoder(chunk_length, num_position_features, width, num_layers, context)
        case _:
            assert kind == "mlp", f"coder {kind}"
            return PerceptronCoder(chunk_length, num_position_features, width)


def check_coder(kind: CoderKind, width: int, num_layers: int, context: int) -> None:
    """Refuses settings that no coder can be built with.

    Raises:
        ValueError: The message names the setting.
    """
    if min(num_layers, context) < 1:
        raise ValueError(f"coder_layers={num_layers}, context={context}: give at least 1")
    divisor = {"conv": CHANNEL_SHARE, "transformer": 2 * NUM_HEADS}.get(kind, 1)
    if width < 1 or width % divisor:
        raise ValueError(f"width={width}: coder={kind} takes a multiple of {divisor}")
