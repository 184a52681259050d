"""Data sets, tasks, networks, and fitting them in stacks."""

from raywgen.tasks.base import Inputs, Task, TaskError, draw_condition, draw_few_shot
from raywgen.tasks.digits import digits_subset, draw_subset_tasks
from raywgen.tasks.fit_config import FitConfig, SAMConfig
from raywgen.tasks.networks import build_network, network_name
from raywgen.tasks.registry import build_task
from raywgen.tasks.stacked import balanced_accuracy, balanced_cross_entropy, stacked_logits
from raywgen.tasks.train_loop import FitData, OnStep, Recorded, fit, repeat_state

__all__ = [
    "FitConfig",
    "FitData",
    "Inputs",
    "OnStep",
    "Recorded",
    "SAMConfig",
    "Task",
    "TaskError",
    "balanced_accuracy",
    "balanced_cross_entropy",
    "build_network",
    "build_task",
    "digits_subset",
    "draw_condition",
    "draw_few_shot",
    "draw_subset_tasks",
    "fit",
    "network_name",
    "repeat_state",
    "stacked_logits",
]
