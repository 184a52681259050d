"""Lo-Hp: local optimisation policies, learned by hybrid-policy sub-trajectory balance."""

from raywgen.generators.lohp.config import LoHpConfig, LoHpSampling, PathConfig, PolicyConfig
from raywgen.generators.lohp.generator import LoHp

__all__ = ["LoHp", "LoHpConfig", "LoHpSampling", "PathConfig", "PolicyConfig"]
