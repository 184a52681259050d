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

from typing import TYPE_CHECKING

from raywgen.lazy import lazy_names

if TYPE_CHECKING:
    from raywgen.weights.batch import Condition as Condition
    from raywgen.weights.batch import HeaderIndex as HeaderIndex
    from raywgen.weights.batch import WeightBatch as WeightBatch
    from raywgen.weights.batch import Windows as Windows
    from raywgen.weights.errors import LayoutMismatchError as LayoutMismatchError
    from raywgen.weights.errors import NonFiniteWeightsError as NonFiniteWeightsError
    from raywgen.weights.errors import UnsafeFileError as UnsafeFileError
    from raywgen.weights.errors import WeightsError as WeightsError
    from raywgen.weights.files import load_state_dict as load_state_dict
    from raywgen.weights.files import save_state_dict as save_state_dict
    from raywgen.weights.layout import Layout as Layout
    from raywgen.weights.noise import KeyedNoise as KeyedNoise
    from raywgen.weights.normalizer import Normalizer as Normalizer
    from raywgen.weights.normalizer import NormalizerTable as NormalizerTable
    from raywgen.weights.normalizer import layout_normalizer as layout_normalizer
    from raywgen.weights.normalizer import normalizer_of_similar as normalizer_of_similar
    from raywgen.weights.tensors import StateDict as StateDict
    from raywgen.weights.tensors import TensorSpec as TensorSpec

if not TYPE_CHECKING:  # Type checkers would take any name for one that is there.
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "raywgen.weights.batch": ["Condition", "HeaderIndex", "WeightBatch", "Windows"],
            "raywgen.weights.errors": [
                "LayoutMismatchError",
                "NonFiniteWeightsError",
                "UnsafeFileError",
                "WeightsError",
            ],
            "raywgen.weights.files": ["load_state_dict", "save_state_dict"],
            "raywgen.weights.layout": ["Layout"],
            "raywgen.weights.noise": ["KeyedNoise"],
            "raywgen.weights.normalizer": [
                "Normalizer",
                "NormalizerTable",
                "layout_normalizer",
                "normalizer_of_similar",
            ],
            "raywgen.weights.tensors": ["StateDict", "TensorSpec"],
        },
    )
