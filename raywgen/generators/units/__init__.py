"""Units: a generator of networks of any width, written unit by unit and trained by the task's loss."""

from raywgen.generators.units.config import UnitsConfig
from raywgen.generators.units.generator import Units

__all__ = ["Units", "UnitsConfig"]
