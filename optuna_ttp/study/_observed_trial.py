"""What a trial tells about a predictor: what was predicted for it beside what was seen."""

from __future__ import annotations

from dataclasses import dataclass
import math
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from optuna_ttp.calibration import DEPTHS
from optuna_ttp.calibration import Observation
from optuna_ttp.study._recorded_curve import read_curve
from optuna_ttp.study._recorded_curve import recorded
from optuna_ttp.study._records import entry
from optuna_ttp.study._records import PREDICTION
from optuna_ttp.study._unusable_curve import UnusableCurve


if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from optuna_ttp.calibration import LossCurve
    from optuna_ttp.prediction import SearchPredictor


# A first loss so many times the initial one, or so small a part of it, is not the same loss, as
# far as it is not the luck of a small mini-batch: by so many of its standard deviations.
_TOO_HIGH, _TOO_LOW = 1.8, 0.6
_LUCKY, _UNLUCKY = 4.0, 6.0
# A curve that begins late may have come down, or gone up, but not so far up where the learning
# rate is below so much of the largest stable one.
_RISEN, _MILD = 5.0, 0.5
# How close to the batch size that factor is where the loss is a sum over the batch.
_LIKE_A_SUM = 0.4
# A curve that begins after so many steps, still at the initial loss, and halves before twice as
# many, was counted from another start.
_LATE, _STILL, _HALF = 10, 0.1, 0.5
# A gap in the steps that is so many times as large as those before and behind it.
_JUMP = 1000.0
# Training that rose so many times above its first loss, and ends above so much of it, in a time in
# which its loss was predicted to be halved and twice as much, does not recover.
_SPIKE, _NOT_LEARNED = 1.3, 0.9
_HALVED, _AMPLE = math.log(2.0) + 1e-9, math.log(3.0)


@dataclass(frozen=True)
class InitialLoss:
    """The task's training loss at the pretrained weights, before the first step.

    Attributes:
        mean:
            Over all samples.
        sd:
            Standard deviation of the losses of single samples.
    """

    mean: float
    sd: float

    @classmethod
    def of(cls, predictor: SearchPredictor) -> InitialLoss:
        """Take it from a predictor.

        Args:
            predictor:
                Knows the task.

        Returns:
            The loss.
        """
        return cls(predictor.initial_loss, predictor.initial_loss_sd)

    def objection(self, value: dict[str, Any], prediction: dict[str, Any]) -> UnusableCurve | None:
        """Tell why a curve is not that of the task's training loss.

        Args:
            value:
                The curve's entry.
            prediction:
                What was predicted for the trial.

        Returns:
            Why, or :obj:`None`.
        """
        size, first = prediction["batch_size"], value["first"]
        ratio = first / self.mean
        noise = self.sd / (self.mean * math.sqrt(size))
        text = f"its first loss, {first:.4g}, is"
        initial = f"the initial training loss {self.mean:.4g}"
        if value["steps"][0] > 0:
            stability = prediction.get("stability")
            mild = stability is not None and stability < _MILD
            high = mild and ratio > _RISEN + _UNLUCKY * noise
            if not high and self._is_counted_from_elsewhere(value, noise):
                return UnusableCurve(
                    "late",
                    f"it begins after {value['steps'][0]:,} steps, but still at {initial}, and "
                    "halves soon after: steps must be those of this trial, from 0 on",
                )
        else:
            high = ratio > _TOO_HIGH and ratio - 1.0 > _UNLUCKY * noise
            if ratio < _TOO_LOW and 1.0 - ratio > _LUCKY * noise:
                return UnusableCurve(
                    "low",
                    f"{text} {ratio:.2g} times {initial}: it must be another loss, or another "
                    "model, or one that was divided, as for the accumulation of gradients",
                )
        if not high:
            return None
        if abs(math.log(ratio / size)) < _LIKE_A_SUM:
            return UnusableCurve(
                "sum",
                f"{text} about {size} times {initial}: it looks like a sum over the batch of "
                f"{size} instead of a mean",
            )
        return UnusableCurve(
            "high",
            f"{text} {ratio:.3g} times {initial}: it must be another loss, or another model, or "
            f"a sum over {ratio:.0f} samples instead of a mean",
        )

    def _is_counted_from_elsewhere(self, value: dict[str, Any], noise: float) -> bool:
        steps, losses = np.array(value["steps"]), np.array(value["losses"])
        soon = losses[steps <= 2 * steps[0]]
        still = abs(losses[0] / self.mean - 1.0) < _STILL
        return bool(
            steps[0] >= _LATE and noise < _STILL and still and soon.min() < _HALF * losses[0]
        )


def final_loss(trial: FrozenTrial, initial: InitialLoss) -> float:
    """Return the training loss that a trial ended at.

    Args:
        trial:
            Any trial.
        initial:
            Of the task.

    Returns:
        The smoothed loss; NaN where nothing was recorded, or another loss than the task's.
    """
    value = recorded(trial)
    if value is None or isinstance(value, UnusableCurve):
        return math.nan
    prediction = entry(trial, PREDICTION) or {"batch_size": 1}
    if initial.objection(value, prediction) is not None:
        return math.nan
    return float(value["losses"][-1])


def observation_of(
    trial: FrozenTrial, prediction: dict[str, Any], initial: InitialLoss
) -> Observation | UnusableCurve | None:
    """Return what a trial tells about a predictor.

    Args:
        trial:
            Any trial.
        prediction:
            What was predicted for it, for the task of the predictor.
        initial:
            Of the task.

    Returns:
        The observation, or why there is none, or :obj:`None` where nothing was recorded.
    """
    value = recorded(trial)
    if value is None or isinstance(value, UnusableCurve):
        return value
    objection = _jump(value) or initial.objection(value, prediction)
    if objection is not None:
        return objection
    curve = read_curve(value)
    observed, errors = curve.log_first_passage_times(initial.mean * np.exp(-DEPTHS))
    first_passages = prediction["ladder"]
    momentum = float(prediction["momentum"])
    return Observation(
        predicted=_array(first_passages["predicted"]),
        expected=_array(first_passages["expected"]),
        growth=_array(first_passages["growth"]),
        covariates=_array(first_passages["covariates"]),
        instability=_array(first_passages["instability"]),
        effective_learning_rate=float(prediction["learning_rate"]) / (1.0 - momentum),
        lag=momentum / (1.0 - momentum),
        observed=observed,
        errors=errors,
        n_steps=curve.n_steps,
        diverged=curve.diverged or broke_down(curve, _array(first_passages["predicted"])),
        batch_size=int(prediction["batch_size"]),
        lost=curve.lost,
        seconds_per_step=_array([value.get("seconds_per_step")])[0],
    )


def _jump(value: dict[str, Any]) -> UnusableCurve | None:
    """Why steps that jump and go on as before are no numbers of optimiser steps."""
    gaps = np.diff(value["steps"])
    if len(gaps) < 3:
        return None
    beside = np.maximum(gaps[:-2], gaps[2:])
    places = np.flatnonzero(gaps[1:-1] > _JUMP * beside)
    if not len(places):
        return None
    before, after = value["steps"][places[0] + 1 : places[0] + 3]
    return UnusableCurve(
        "jump", f"its steps jump from {before:,} to {after:,}, and go on as before"
    )


def broke_down(curve: LossCurve, predicted: NDArray[np.float64]) -> bool:
    """Tell whether training went through a spike and stayed above its start, in ample time.

    A network that is thrown where its gradients vanish ends with the loss of a guess: its loss is
    finite, but it comes down no more than one that is not.

    Args:
        curve:
            Of the trial.
        predicted:
            Logarithms of the predicted steps to :data:`DEPTHS`, NaN where there are none.

    Returns:
        Whether it will not recover.
    """
    first, last = float(curve.losses[0]), float(curve.losses[-1])
    if not (curve.losses.max() > _SPIKE * first and last > _NOT_LEARNED * first):
        return False
    known = np.isfinite(predicted)
    halved = predicted[known & (DEPTHS <= _HALVED)]
    return bool(len(halved) and math.log(max(curve.n_steps, 1)) > halved[-1] + _AMPLE)


def _array(values: list[float | None]) -> NDArray[np.float64]:
    return np.array([math.nan if v is None else v for v in values], dtype=np.float64)
