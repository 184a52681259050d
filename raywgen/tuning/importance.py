"""Importance of knobs: the share of the variance of scores that each explains (functional ANOVA, by Optuna)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from raywgen.tuning.results import TrialRow
from raywgen.tuning.space import Knob

_FEWEST = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """Importance of the knobs that every trial has.

    Attributes:
        shares: Share of the variance by key, the largest first; they add up to 1.
        rung: The rung of the scores: the last one that all trials reached, so that all are trained equally long.
        num_trials: Trials with a score there.
    """

    shares: dict[str, float]
    rung: int
    num_trials: int


def importance(rows: Sequence[TrialRow], knobs: Sequence[Knob]) -> Importance | None:
    """Estimates the importance from judged trials; None where they are too few or all have the same score."""
    judged = [row for row in rows if row.score is not None]
    everywhere = [knob for knob in knobs if not knob.when]
    if len(judged) < _FEWEST or not everywhere:
        return None
    rung = min(row.scores[-1].rung for row in judged)
    scored = [(row, score) for row in judged if (score := row.score_at(rung)) is not None]
    if len({score for _, score in scored}) < 2:
        return None
    # Late, as in `raywgen.tasks.digits`.
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    study = optuna.create_study(direction="maximize")
    distributions = {knob.key: distribution(knob) for knob in everywhere}
    for row, score in scored:
        values = {knob.key: _value(knob, row) for knob in everywhere}
        study.add_trial(optuna.trial.create_trial(params=values, distributions=distributions, value=score))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    return Importance(shares=dict(shares), rung=rung, num_trials=len(scored))


def distribution(knob: Knob) -> BaseDistribution:
    """Returns Optuna's distribution of a knob; a choice is one of the indices of its values."""
    if knob.kind == "choice":
        return CategoricalDistribution(list(range(len(knob.choices))))
    if knob.kind == "int":
        return IntDistribution(int(knob.low), int(knob.high))
    return FloatDistribution(knob.low, knob.high, log=knob.kind == "loguniform")


def _value(knob: Knob, row: TrialRow) -> float | int:
    value = row.knobs[knob.key]
    return knob.choices.index(value) if knob.kind == "choice" else value
