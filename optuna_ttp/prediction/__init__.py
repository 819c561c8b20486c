"""From hyperparameters to training time: the predictor and what it answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna_ttp._util.lazy import lazy_names


if TYPE_CHECKING:
    from optuna_ttp.prediction._prediction import DIVERGES
    from optuna_ttp.prediction._prediction import NOT_REACHED
    from optuna_ttp.prediction._prediction import Prediction
    from optuna_ttp.prediction._predictor import TrainingTimePredictor


__all__ = [
    "DIVERGES",
    "NOT_REACHED",
    "Prediction",
    "TrainingTimePredictor",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_prediction": (
            "DIVERGES",
            "NOT_REACHED",
            "Prediction",
        ),
        "_predictor": ("TrainingTimePredictor",),
    },
)
