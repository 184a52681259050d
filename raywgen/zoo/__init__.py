"""Zoos: many small networks trained on real tasks with Ray, straight into a corpus."""

from raywgen.zoo.config import ZooConfig
from raywgen.zoo.train import train_zoo

__all__ = ["ZooConfig", "train_zoo"]
