"""Putting a trained generator to use: fill modules, keep the best of n, write files."""

from raywgen.generation.best import Best, generate_best
from raywgen.generation.fill import ConditionError, TrainedGenerator, UnknownLayoutWarning, load
from raywgen.generation.write import GenerateConfig, generate

__all__ = [
    "Best",
    "ConditionError",
    "GenerateConfig",
    "TrainedGenerator",
    "UnknownLayoutWarning",
    "generate",
    "generate_best",
    "load",
]
