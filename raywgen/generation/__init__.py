"""Putting a trained generator to use: fill modules, keep the best of n, write files."""

from raywgen.actor_pool import ActorsLostError, NoResourcesError
from raywgen.generation.adapt import adapt
from raywgen.generation.adapt_config import AdaptConfig, Adapted
from raywgen.generation.best import Best, generate_best
from raywgen.generation.classifier import Classifier
from raywgen.generation.config import GenerateConfig
from raywgen.generation.file_statistics import Reestimated, StatisticsConfig, estimate_file_statistics
from raywgen.generation.fill import TrainedGenerator
from raywgen.generation.filled import Filled
from raywgen.generation.generate import generate
from raywgen.generation.judge import ChanceWarning
from raywgen.generation.loading import load
from raywgen.generation.modules import UnknownLayoutError, UnknownLayoutWarning
from raywgen.generation.plan import NetworkRow
from raywgen.generation.sink import UnfinishedError
from raywgen.generation.statistics import StatisticsWarning, with_new_statistics
from raywgen.generators import SamplingError
from raywgen.tasks.user_data import ConditionError

__all__ = [
    "ActorsLostError",
    "AdaptConfig",
    "Adapted",
    "Best",
    "ChanceWarning",
    "Classifier",
    "ConditionError",
    "Filled",
    "GenerateConfig",
    "NetworkRow",
    "NoResourcesError",
    "Reestimated",
    "SamplingError",
    "StatisticsConfig",
    "StatisticsWarning",
    "TrainedGenerator",
    "UnfinishedError",
    "UnknownLayoutError",
    "UnknownLayoutWarning",
    "adapt",
    "estimate_file_statistics",
    "generate",
    "generate_best",
    "load",
    "with_new_statistics",
]
