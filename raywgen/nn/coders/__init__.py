"""Encoders and decoders of chunks behind one call signature: what to add to each chunk; one file each."""

from raywgen.nn.coders.base import Coder
from raywgen.nn.coders.build import CODERS, CoderKind, build_coder, check_coder
from raywgen.nn.coders.convolution import ConvolutionCoder
from raywgen.nn.coders.perceptron import PerceptronCoder
from raywgen.nn.coders.transformer import TransformerCoder

__all__ = [
    "CODERS",
    "Coder",
    "CoderKind",
    "ConvolutionCoder",
    "PerceptronCoder",
    "TransformerCoder",
    "build_coder",
    "check_coder",
]
