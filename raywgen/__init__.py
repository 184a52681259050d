"""raywgen: train generators of neural-network weights on a Ray cluster, and put them to use.

    generator = raywgen.train("mcdi", corpus="runs/zoo/corpus", out="runs/mcdi")
    model = generator.fill(MyNet(), instruction="Is the digit one of 1, 4 or 7?", data=(samples, labels))

All names below are imported when they are first used, so that `import raywgen` takes no time.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from raywgen.lazy import lazy_names

# Torch then asks for large pages for blocks of 2 MiB and more. In training these blocks are new at every step, and to
# be given their small pages one by one can take longer than the computation. Torch reads it when it first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if TYPE_CHECKING:
    from raywgen.api import adapt, build_corpus, evaluate, generate, load, train, train_zoo, tune
    from raywgen.corpus import BuildConfig, Checkpoint, Corpus, WeightsDataset
    from raywgen.evaluation.config import EvaluateConfig
    from raywgen.generation import AdaptConfig, GenerateConfig, TrainedGenerator
    from raywgen.nn.batch_norm import reestimate_statistics
    from raywgen.training import TrainConfig
    from raywgen.trust import trusting
    from raywgen.tuning import TuneConfig
    from raywgen.weights.adapters import LoRAAdapter, inject
    from raywgen.zoo import ZooConfig

__version__ = "0.2.0"
__all__ = [
    "AdaptConfig",
    "BuildConfig",
    "Checkpoint",
    "Corpus",
    "EvaluateConfig",
    "GenerateConfig",
    "LoRAAdapter",
    "TrainConfig",
    "TrainedGenerator",
    "TuneConfig",
    "WeightsDataset",
    "ZooConfig",
    "__version__",
    "adapt",
    "build_corpus",
    "evaluate",
    "generate",
    "inject",
    "load",
    "reestimate_statistics",
    "train",
    "train_zoo",
    "trusting",
    "tune",
]

if not TYPE_CHECKING:  # Type checkers would take any name for one that is there.
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "raywgen.api": ["adapt", "build_corpus", "evaluate", "generate", "load", "train", "train_zoo", "tune"],
            "raywgen.corpus": ["BuildConfig", "Checkpoint", "Corpus", "WeightsDataset"],
            "raywgen.evaluation.config": ["EvaluateConfig"],
            "raywgen.generation": ["AdaptConfig", "GenerateConfig", "TrainedGenerator"],
            "raywgen.nn.batch_norm": ["reestimate_statistics"],
            "raywgen.training": ["TrainConfig"],
            "raywgen.trust": ["trusting"],
            "raywgen.tuning": ["TuneConfig"],
            "raywgen.weights.adapters": ["LoRAAdapter", "inject"],
            "raywgen.zoo": ["ZooConfig"],
        },
    )
