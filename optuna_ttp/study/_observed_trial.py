"""The observation of a trial: its predicted beside its observed first passage times."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from optuna_ttp.calibration import DEPTHS
from optuna_ttp.calibration import Observation
from optuna_ttp.study._broken_training import broke_down
from optuna_ttp.study._curve_objections import InitialLoss
from optuna_ttp.study._curve_objections import jump_in
from optuna_ttp.study._curve_record import curve_of
from optuna_ttp.study._curve_record import CurveRecord
from optuna_ttp.study._curve_record import observed_curve
from optuna_ttp.study._trial_record import prediction_of
from optuna_ttp.study._unusable_curve import UnusableCurve


if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from optuna_ttp.prediction import SearchPredictor
    from optuna_ttp.study._prediction_record import PredictionRecord


# The factor of the target up to which the end of a curve counts as having reached it.
AT_TARGET = 1.05


def final_loss(trial: FrozenTrial, initial: InitialLoss) -> float:
    """Return the last smoothed training loss of a trial.

    It is NaN if no curve was recorded, or if it cannot belong to the task with this initial loss.
    """
    record = curve_of(trial)
    if not isinstance(record, CurveRecord):
        return math.nan
    prediction = prediction_of(trial)
    if prediction is None:
        objection = initial.objection(record, batch_size=1)
    else:
        objection = initial.objection(record, prediction.batch_size, prediction.stability)
    return math.nan if objection is not None else float(record.curve.losses[-1])


def observation_of(
    trial: FrozenTrial, prediction: PredictionRecord, initial: InitialLoss
) -> Observation | UnusableCurve | None:
    """Return the observation of a trial on a task with this initial loss, for its calibration.

    Return an :class:`UnusableCurve` with the reason if its curve cannot be used, or None if no
    curve or no predicted first passage times were recorded.
    """
    record = curve_of(trial)
    if not isinstance(record, CurveRecord):
        return record
    objection = jump_in(record) or initial.objection(
        record, prediction.batch_size, prediction.stability
    )
    if objection is not None:
        return objection
    curve, first_passages = record.curve, prediction.first_passages
    if first_passages is None:
        return None
    observed, errors = curve.log_first_passage_times(initial.mean * np.exp(-DEPTHS))
    predicted = np.array(first_passages.predicted)
    momentum = prediction.momentum
    return Observation(
        predicted=predicted,
        expected=np.array(first_passages.expected),
        growth=np.array(first_passages.growth),
        covariates=np.array(first_passages.covariates),
        instability=np.array(first_passages.instability),
        effective_learning_rate=prediction.learning_rate / (1.0 - momentum),
        lag=momentum / (1.0 - momentum),
        observed=observed,
        errors=errors,
        n_steps=curve.n_steps,
        diverged=curve.diverged or broke_down(curve, predicted),
        batch_size=prediction.batch_size,
        lost=curve.lost,
        seconds_per_step=record.seconds_per_step,
    )


def progress_to_target(trial: FrozenTrial) -> float:
    """Return the progress of a trial to its target within its budget: one at the target.

    That is ``log(initial / lowest) / log(initial / (1.05 target))``. ``lowest`` is the lowest
    smoothed loss minus a standard error, within the budget or else the prediction's horizon. It is
    NaN without a usable curve or a prediction.
    """
    prediction, curve = prediction_of(trial), observed_curve(trial)
    if curve is None or prediction is None:
        return math.nan
    if math.isnan(prediction.target + prediction.initial_loss):
        return math.nan
    limits = [prediction.budget_steps, prediction.max_steps]
    budget = next((limit for limit in limits if limit > 0.0), math.inf)
    within = curve.steps <= budget
    if not within.any():
        return math.nan
    lowest = float((curve.losses[within] * np.exp(-curve.errors[within])).min())
    initial, target = prediction.initial_loss, AT_TARGET * prediction.target
    return math.log(initial / lowest) / max(math.log(initial / target), 1e-9)


def observed_steps(trial: FrozenTrial, predictor: SearchPredictor) -> float:
    """Return the step at which a trial's smoothed training loss reached the predictor's target.

    It is infinity if the target was not reached, and NaN if the trial has no usable curve or the
    target is not a training loss.
    """
    curve = observed_curve(trial)
    if curve is None or predictor.target.quantity != "loss":
        return math.nan
    step = predictor.target.first_passage(curve.steps, curve.losses)
    # A trial that stops at its target ends near it, up to the noise of the last batches.
    if not np.isfinite(step) and curve.losses[-1] <= AT_TARGET * predictor.target.value:
        return float(curve.steps[-1])
    return step
