"""Generators behind one small interface, and the registry that names the methods."""

from raywgen.generators.interface import DataSpec, Generated, GenerationRequest, Generator
from raywgen.generators.registry import METHODS, MethodImportError, UnknownMethodError, is_import_path, method
from raywgen.generators.settings import GeneratorConfig, OptimizerConfig, Sampling, SamplingError, StageConfig
from raywgen.generators.stage import ParameterUse, Stage, StageLoss, StageNeeds

__all__ = [
    "METHODS",
    "DataSpec",
    "Generated",
    "GenerationRequest",
    "Generator",
    "GeneratorConfig",
    "MethodImportError",
    "OptimizerConfig",
    "ParameterUse",
    "Sampling",
    "SamplingError",
    "Stage",
    "StageConfig",
    "StageLoss",
    "StageNeeds",
    "UnknownMethodError",
    "is_import_path",
    "method",
]
