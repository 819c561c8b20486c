"""Predict fine-tuning time before the first step, and let Optuna skip the hopeless trials.

The public names are imported on first use, so that ``import optuna_ttp`` stays quick: torch,
SQLAlchemy and scipy are loaded only by what needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any
from typing import TYPE_CHECKING

from optuna_ttp.version import __version__


if TYPE_CHECKING:
    from optuna_ttp.calibration import Calibration
    from optuna_ttp.decision import Decision
    from optuna_ttp.dynamics import Schedule
    from optuna_ttp.dynamics import Smoothing
    from optuna_ttp.hyperparameters import HyperparameterMap
    from optuna_ttp.jacobian import compute_spectrum
    from optuna_ttp.jacobian import plan_spectrum
    from optuna_ttp.ledger import Report
    from optuna_ttp.ledger import report
    from optuna_ttp.loss import Loss
    from optuna_ttp.memory import Memory
    from optuna_ttp.prediction import Prediction
    from optuna_ttp.predictor import TrainingTimePredictor
    from optuna_ttp.pruner import TTPPruner
    from optuna_ttp.reported_curve import learn_from_reports
    from optuna_ttp.sampler import TTPSampler
    from optuna_ttp.spectrum import Spectrum
    from optuna_ttp.store import SpectrumStore
    from optuna_ttp.study_budget import StudyBudget
    from optuna_ttp.task import FineTuningTask
    from optuna_ttp.throughput import Throughput
    from optuna_ttp.training_log import TrainingLog


_MODULES = {
    "Calibration": "calibration",
    "Decision": "decision",
    "FineTuningTask": "task",
    "HyperparameterMap": "hyperparameters",
    "Loss": "loss",
    "Memory": "memory",
    "Prediction": "prediction",
    "Report": "ledger",
    "Schedule": "dynamics",
    "Smoothing": "dynamics",
    "Spectrum": "spectrum",
    "SpectrumStore": "store",
    "StudyBudget": "study_budget",
    "TTPPruner": "pruner",
    "TTPSampler": "sampler",
    "Throughput": "throughput",
    "TrainingLog": "training_log",
    "TrainingTimePredictor": "predictor",
    "compute_spectrum": "jacobian",
    "learn_from_reports": "reported_curve",
    "plan_spectrum": "jacobian",
    "report": "ledger",
}

__all__ = [
    "Calibration",
    "Decision",
    "FineTuningTask",
    "HyperparameterMap",
    "Loss",
    "Memory",
    "Prediction",
    "Report",
    "Schedule",
    "Smoothing",
    "Spectrum",
    "SpectrumStore",
    "StudyBudget",
    "TTPPruner",
    "TTPSampler",
    "Throughput",
    "TrainingLog",
    "TrainingTimePredictor",
    "__version__",
    "compute_spectrum",
    "learn_from_reports",
    "plan_spectrum",
    "report",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(import_module(f"optuna_ttp.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
