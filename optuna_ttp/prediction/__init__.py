"""The predictor of training times from hyperparameters, and its predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna_ttp._util.lazy import lazy_names


if TYPE_CHECKING:
    from optuna_ttp.prediction._outcome import Outcome
    from optuna_ttp.prediction._prediction import Prediction
    from optuna_ttp.prediction._predictor import TrainingTimePredictor
    from optuna_ttp.prediction._protocol import check_predictor
    from optuna_ttp.prediction._protocol import SearchPredictor
    from optuna_ttp.prediction._settings import PredictorSettings


__all__ = [
    "Outcome",
    "Prediction",
    "PredictorSettings",
    "SearchPredictor",
    "TrainingTimePredictor",
    "check_predictor",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_outcome": ("Outcome",),
        "_prediction": ("Prediction",),
        "_predictor": ("TrainingTimePredictor",),
        "_protocol": ("SearchPredictor", "check_predictor"),
        "_settings": ("PredictorSettings",),
    },
)
