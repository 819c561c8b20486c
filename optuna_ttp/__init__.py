"""Predict fine-tuning time before the first step, and let Optuna skip trials that are too slow.

The public names are imported on first use, so that ``import optuna_ttp`` stays quick: torch,
SQLAlchemy and scipy are loaded only with the names that need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna_ttp._util.lazy import lazy_names
from optuna_ttp.version import __version__


if TYPE_CHECKING:
    from optuna_ttp._util.exceptions import ApproximationWarning
    from optuna_ttp._util.exceptions import CallOrderWarning
    from optuna_ttp._util.exceptions import DamagedSpectrumError
    from optuna_ttp._util.exceptions import DamagedSpectrumWarning
    from optuna_ttp._util.exceptions import DataOrderWarning
    from optuna_ttp._util.exceptions import FingerprintMismatchError
    from optuna_ttp._util.exceptions import GoalWarning
    from optuna_ttp._util.exceptions import JacobianMismatchError
    from optuna_ttp._util.exceptions import LearnedConflictError
    from optuna_ttp._util.exceptions import OptunaTTPError
    from optuna_ttp._util.exceptions import OptunaTTPWarning
    from optuna_ttp._util.exceptions import StoreError
    from optuna_ttp._util.exceptions import StoreVersionError
    from optuna_ttp._util.exceptions import UnreliablePredictionWarning
    from optuna_ttp._util.exceptions import UnusableCurveWarning
    from optuna_ttp.calibration import Calibration
    from optuna_ttp.dynamics import Adam
    from optuna_ttp.dynamics import AdamW
    from optuna_ttp.dynamics import optimizer_from_torch
    from optuna_ttp.dynamics import ParameterGroup
    from optuna_ttp.dynamics import Schedule
    from optuna_ttp.dynamics import SGD
    from optuna_ttp.dynamics import Smoothing
    from optuna_ttp.ntk import compute_spectrum
    from optuna_ttp.ntk import plan_spectrum
    from optuna_ttp.prediction import Outcome
    from optuna_ttp.prediction import Prediction
    from optuna_ttp.prediction import PredictorSettings
    from optuna_ttp.prediction import TrainingTimePredictor
    from optuna_ttp.reporting import Report
    from optuna_ttp.reporting import report
    from optuna_ttp.search import BestMetric
    from optuna_ttp.search import FastestToTarget
    from optuna_ttp.search import PrunerRules
    from optuna_ttp.search import SamplerRules
    from optuna_ttp.search import TTPPruner
    from optuna_ttp.search import TTPSampler
    from optuna_ttp.spectrum import Spectrum
    from optuna_ttp.spectrum import Throughput
    from optuna_ttp.store import SpectrumStore
    from optuna_ttp.study import Decision
    from optuna_ttp.study import HyperparameterMap
    from optuna_ttp.study import learn_from_reports
    from optuna_ttp.study import Memory
    from optuna_ttp.study import StudyBudget
    from optuna_ttp.study import TrainingLog
    from optuna_ttp.task import FineTuningTask
    from optuna_ttp.task import Loss


__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "ApproximationWarning",
    "BestMetric",
    "Calibration",
    "CallOrderWarning",
    "DamagedSpectrumError",
    "DamagedSpectrumWarning",
    "DataOrderWarning",
    "Decision",
    "FastestToTarget",
    "FineTuningTask",
    "FingerprintMismatchError",
    "GoalWarning",
    "HyperparameterMap",
    "JacobianMismatchError",
    "LearnedConflictError",
    "Loss",
    "Memory",
    "OptunaTTPError",
    "OptunaTTPWarning",
    "Outcome",
    "ParameterGroup",
    "Prediction",
    "PredictorSettings",
    "PrunerRules",
    "Report",
    "SamplerRules",
    "Schedule",
    "Smoothing",
    "Spectrum",
    "SpectrumStore",
    "StoreError",
    "StoreVersionError",
    "StudyBudget",
    "TTPPruner",
    "TTPSampler",
    "Throughput",
    "TrainingLog",
    "TrainingTimePredictor",
    "UnreliablePredictionWarning",
    "UnusableCurveWarning",
    "__version__",
    "compute_spectrum",
    "learn_from_reports",
    "optimizer_from_torch",
    "plan_spectrum",
    "report",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_util.exceptions": (
            "CallOrderWarning",
            "GoalWarning",
            "ApproximationWarning",
            "DamagedSpectrumError",
            "DamagedSpectrumWarning",
            "DataOrderWarning",
            "FingerprintMismatchError",
            "JacobianMismatchError",
            "LearnedConflictError",
            "OptunaTTPError",
            "OptunaTTPWarning",
            "StoreError",
            "StoreVersionError",
            "UnreliablePredictionWarning",
            "UnusableCurveWarning",
        ),
        "calibration": ("Calibration",),
        "dynamics": (
            "Adam",
            "AdamW",
            "ParameterGroup",
            "SGD",
            "Schedule",
            "Smoothing",
            "optimizer_from_torch",
        ),
        "ntk": (
            "compute_spectrum",
            "plan_spectrum",
        ),
        "prediction": (
            "Outcome",
            "Prediction",
            "PredictorSettings",
            "TrainingTimePredictor",
        ),
        "reporting": (
            "Report",
            "report",
        ),
        "search": (
            "SamplerRules",
            "PrunerRules",
            "FastestToTarget",
            "BestMetric",
            "TTPPruner",
            "TTPSampler",
        ),
        "spectrum": (
            "Spectrum",
            "Throughput",
        ),
        "store": ("SpectrumStore",),
        "study": (
            "Decision",
            "HyperparameterMap",
            "Memory",
            "StudyBudget",
            "TrainingLog",
            "learn_from_reports",
        ),
        "task": (
            "FineTuningTask",
            "Loss",
        ),
    },
)
