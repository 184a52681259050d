"""Units: a generator of networks of any width, written unit by unit and trained by the task's loss."""

from raywgen.generators.units.config import UnitsConfig, UnitsSampling
from raywgen.generators.units.generator import Units

__all__ = ["Units", "UnitsConfig", "UnitsSampling"]
