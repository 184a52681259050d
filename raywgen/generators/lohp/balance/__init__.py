"""Balance objectives on potentials of paths: detailed, trajectory and sub-trajectory balance, and their hybrid."""

from raywgen.generators.lohp.balance.detailed_balance import detailed_balance_loss
from raywgen.generators.lohp.balance.hybrid import draw_stored
from raywgen.generators.lohp.balance.residuals import potentials
from raywgen.generators.lohp.balance.sub_trajectory_balance import sub_trajectory_balance_loss, window_weights
from raywgen.generators.lohp.balance.trajectory_balance import trajectory_balance_loss

__all__ = [
    "detailed_balance_loss",
    "draw_stored",
    "potentials",
    "sub_trajectory_balance_loss",
    "trajectory_balance_loss",
    "window_weights",
]
