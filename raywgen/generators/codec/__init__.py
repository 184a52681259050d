"""Whole networks to tokens and back without a learned decoder, and what that costs and keeps."""

from raywgen.generators.codec.allocated_codec import AllocatedCodec, AllocatedConfig, AllocatedNetwork, BudgetError
from raywgen.generators.codec.network_codec import CodecConfig, CodedNetwork, NetworkCodec
from raywgen.generators.codec.report import RateReport, rate_report

__all__ = [
    "AllocatedCodec",
    "AllocatedConfig",
    "AllocatedNetwork",
    "BudgetError",
    "CodecConfig",
    "CodedNetwork",
    "NetworkCodec",
    "RateReport",
    "rate_report",
]
