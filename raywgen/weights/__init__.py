"""Weights as data: layouts, flat vectors, chunks, keyed noise, files."""

from raywgen.weights.batch import Condition, WeightBatch
from raywgen.weights.errors import (
    LayoutMismatchError,
    NonFiniteWeightsError,
    UnsafeFileError,
    WeightsError,
)
from raywgen.weights.files import load_state_dict, save_state_dict
from raywgen.weights.layout import Layout
from raywgen.weights.noise import KeyedNoise
from raywgen.weights.normalizer import (
    Normalizer,
    NormalizerTable,
    layout_normalizer,
    normalizer_of_similar,
    shares_start,
    variances,
)
from raywgen.weights.tensors import StateDict, TensorSpec

__all__ = [
    "Condition",
    "KeyedNoise",
    "Layout",
    "LayoutMismatchError",
    "NonFiniteWeightsError",
    "Normalizer",
    "NormalizerTable",
    "StateDict",
    "TensorSpec",
    "UnsafeFileError",
    "WeightBatch",
    "WeightsError",
    "layout_normalizer",
    "load_state_dict",
    "normalizer_of_similar",
    "save_state_dict",
    "shares_start",
    "variances",
]
