"""Conversion of a prediction into the record that is stored with a trial."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from optuna_ttp.study._prediction_record import FirstPassageRecord
from optuna_ttp.study._prediction_record import PredictionRecord


if TYPE_CHECKING:
    from optuna_ttp.prediction import Prediction
    from optuna_ttp.prediction import SearchPredictor
    from optuna_ttp.study._hyperparameters import Configuration


def record_prediction(
    predictor: SearchPredictor,
    configuration: Configuration,
    prediction: Prediction,
    *,
    budget_steps: float,
    prediction_seconds: float,
) -> PredictionRecord:
    """Return the record of a prediction for a trial; infinite ``budget_steps`` mean no budget."""
    budget_seconds = budget_steps * float(predictor.seconds_per_step(configuration.batch_size))
    return PredictionRecord(
        fingerprint=predictor.fingerprint,
        spectrum_seconds=predictor.setup_seconds,
        initial_loss=predictor.initial_loss,
        initial_loss_sd=predictor.initial_loss_sd,
        target=predictor.target.value,
        learning_rate=configuration.learning_rate,
        batch_size=configuration.batch_size,
        momentum=configuration.momentum,
        outcome=prediction.outcome,
        steps=_or_nan(float(prediction.steps)),
        seconds=_or_nan(float(prediction.seconds)),
        stability=_or_nan(float(prediction.stability)),
        budget_steps=_or_nan(budget_steps),
        budget_seconds=_or_nan(budget_seconds),
        max_steps=_or_nan(float(prediction.max_steps)),
        prediction_seconds=prediction_seconds,
        first_passages=FirstPassageRecord.of(prediction),
    )


def _or_nan(value: float) -> float:
    return value if math.isfinite(value) else math.nan
