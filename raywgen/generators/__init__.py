"""Generators behind one small interface, and the registry that names the methods."""

from typing import TYPE_CHECKING

from raywgen.lazy import lazy_names

if TYPE_CHECKING:
    from raywgen.generators.interface import DataSpec as DataSpec
    from raywgen.generators.interface import Generated as Generated
    from raywgen.generators.interface import GenerationRequest as GenerationRequest
    from raywgen.generators.interface import Generator as Generator
    from raywgen.generators.method_names import is_import_path as is_import_path
    from raywgen.generators.registry import METHODS as METHODS
    from raywgen.generators.registry import MethodImportError as MethodImportError
    from raywgen.generators.registry import UnknownMethodError as UnknownMethodError
    from raywgen.generators.registry import method as method
    from raywgen.generators.settings import GeneratorConfig as GeneratorConfig
    from raywgen.generators.settings import OptimizerConfig as OptimizerConfig
    from raywgen.generators.settings import Sampling as Sampling
    from raywgen.generators.settings import SamplingError as SamplingError
    from raywgen.generators.settings import StageConfig as StageConfig
    from raywgen.generators.stage import ParameterUse as ParameterUse
    from raywgen.generators.stage import Stage as Stage
    from raywgen.generators.stage import StageLoss as StageLoss
    from raywgen.generators.stage import StageNeeds as StageNeeds

if not TYPE_CHECKING:  # Type checkers would take any name for one that is there.
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "raywgen.generators.interface": ["DataSpec", "Generated", "GenerationRequest", "Generator"],
            "raywgen.generators.method_names": ["is_import_path"],
            "raywgen.generators.registry": ["METHODS", "MethodImportError", "UnknownMethodError", "method"],
            "raywgen.generators.settings": [
                "GeneratorConfig",
                "OptimizerConfig",
                "Sampling",
                "SamplingError",
                "StageConfig",
            ],
            "raywgen.generators.stage": ["ParameterUse", "Stage", "StageLoss", "StageNeeds"],
        },
    )
