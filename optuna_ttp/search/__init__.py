"""The goal of a search, the sampler and the pruner."""

from __future__ import annotations

from optuna_ttp.search._goal import BestMetric
from optuna_ttp.search._goal import FastestToTarget
from optuna_ttp.search._goal import Goal
from optuna_ttp.search._pruner import TTPPruner
from optuna_ttp.search._pruner_rules import PrunerRules
from optuna_ttp.search._pruner_rules import RunningTrialRules
from optuna_ttp.search._sampler import TTPSampler
from optuna_ttp.search._sampler_rules import ForecastRules
from optuna_ttp.search._sampler_rules import PreferenceRules
from optuna_ttp.search._sampler_rules import SamplerRules


__all__ = [
    "BestMetric",
    "FastestToTarget",
    "ForecastRules",
    "Goal",
    "PreferenceRules",
    "PrunerRules",
    "RunningTrialRules",
    "SamplerRules",
    "TTPPruner",
    "TTPSampler",
]
