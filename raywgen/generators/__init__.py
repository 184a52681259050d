"""Generators behind one small interface, and the registry that names the methods."""

from raywgen.generators.interface import (
    DataSpec,
    Generated,
    GenerationRequest,
    Generator,
    ParameterUse,
    Stage,
    StageLoss,
    StageNeeds,
)
from raywgen.generators.registry import METHODS, MethodImportError, UnknownMethodError, is_import_path, method
from raywgen.generators.settings import GeneratorConfig, OptimizerConfig, Sampling, SamplingError, StageConfig

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
