"""Baselines of generators on few-shot tasks, by the same episodes and the same encoder.

This package needs neither Ray nor DeepSpeed.
"""

from raywgen.evaluation.few_shot.confidence import Estimate, estimate, paired_difference
from raywgen.evaluation.few_shot.errors import FewShotError
from raywgen.evaluation.few_shot.gradient_head import LEARNING_RATES, fit_head_autograd, fit_heads, head_accuracies
from raywgen.evaluation.few_shot.heads import accuracy, head_logits
from raywgen.evaluation.few_shot.prototypes import prototype_logits, prototypes
from raywgen.evaluation.few_shot.reptile import Learner, ReptileState, train_reptile, warm_start
from raywgen.evaluation.few_shot.reptile_config import ReptileConfig
from raywgen.evaluation.few_shot.reptile_steps import STEPS, accuracy_by_steps, fewest_steps
from raywgen.evaluation.few_shot.timing import Timing, one_thread, time_alternating

__all__ = [
    "LEARNING_RATES",
    "STEPS",
    "Estimate",
    "FewShotError",
    "Learner",
    "ReptileConfig",
    "ReptileState",
    "Timing",
    "accuracy",
    "accuracy_by_steps",
    "estimate",
    "fewest_steps",
    "fit_head_autograd",
    "fit_heads",
    "head_accuracies",
    "head_logits",
    "one_thread",
    "paired_difference",
    "prototype_logits",
    "prototypes",
    "time_alternating",
    "train_reptile",
    "warm_start",
]
