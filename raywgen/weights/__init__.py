"""Weights as data: layouts, flat vectors, chunks, keyed noise, files.

Shape letters, for the whole project. The suffix of a tensor's name spells its dimensions (`values_BD`); a module names
only the letters that it adds to these:

    B  networks, or windows of networks, in a batch       T  positions of a sequence, or time steps
    N  networks, checkpoints or rows in all               A  states of a trajectory
    D  values of a network (its flat vector)              S  labelled samples
    P  bytes of a network's packed form                   F  features of a sample
    W  chunks of a window; a small network is one window  C  classes
    K  values of a chunk                                  H  width of a hidden layer
    L  code levels                                        E  width of a head (its input features)
    V  codes of a level                                   X  any length: the values of a tensor, for instance
"""

from raywgen.weights.batch import Condition, HeaderIndex, WeightBatch, Windows
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
)
from raywgen.weights.tensors import StateDict, TensorSpec

__all__ = [
    "Condition",
    "HeaderIndex",
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
    "Windows",
    "layout_normalizer",
    "load_state_dict",
    "normalizer_of_similar",
    "save_state_dict",
]
