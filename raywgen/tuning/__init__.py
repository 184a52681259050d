"""Hyperparameter search over any keys of a whole pipeline: prepare a corpus, train a generator, judge its networks."""

from raywgen.tuning.config import ObjectiveConfig, TuneConfig
from raywgen.tuning.driver import tune
from raywgen.tuning.results import TrialRow, TuneError, TuneResult

__all__ = ["ObjectiveConfig", "TrialRow", "TuneConfig", "TuneError", "TuneResult", "tune"]
