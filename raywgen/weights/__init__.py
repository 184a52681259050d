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
from raywgen.weights.reference import (
    ReferenceTable,
    WeightReference,
    alike_reference,
    layout_reference,
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
    "ReferenceTable",
    "StateDict",
    "TensorSpec",
    "UnsafeFileError",
    "WeightBatch",
    "WeightReference",
    "WeightsError",
    "alike_reference",
    "layout_reference",
    "load_state_dict",
    "save_state_dict",
    "shares_start",
    "variances",
]
