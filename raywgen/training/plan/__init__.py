"""Plans a run before anything of it runs: what it would take, whether it fits, how long it would train.

config.py        what is planned for, where no corpus and no cluster say so
corpus.py        the corpus that is there, or to come
nodes.py         the nodes
shapes.py        sizes of stages, found by steps of tensors without values (valueless.py)
worker_bytes.py  the memory of a worker, part by part
tokens.py        tokens of a network, what they keep, the time to write it
hours.py         time and price
plan.py          all of it together
"""

from raywgen.training.plan.config import PlanConfig, split_overrides
from raywgen.training.plan.plan import Plan, PlannedStage, make_plan
from raywgen.training.plan.tokens import PlannedTokens

__all__ = ["Plan", "PlanConfig", "PlannedStage", "PlannedTokens", "make_plan", "split_overrides"]
