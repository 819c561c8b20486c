"""Training-loss curves of trials, into and out of Optuna's storage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math
import time
from types import TracebackType
from typing import Any
from typing import SupportsFloat
from typing import TYPE_CHECKING
import warnings

import numpy as np
from numpy.typing import NDArray
from optuna.trial import TrialState

from optuna_ttp._optuna_compat import FINISHED
from optuna_ttp._optuna_compat import PerStudy
from optuna_ttp._optuna_compat import trials_of
from optuna_ttp.calibration import DEPTHS
from optuna_ttp.calibration import Observation
from optuna_ttp.exceptions import UnusableCurveWarning
from optuna_ttp.ledger import entry
from optuna_ttp.ledger import PREDICTION
from optuna_ttp.loss_curve import LossCurve
from optuna_ttp.reported_curve import curve_of_reports
from optuna_ttp.reported_curve import STEPS_PER_REPORT


if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from optuna_ttp.predictor import TrainingTimePredictor


CURVE = "ttp:curve"
# How far above the target a curve may end and count as having reached it.
AT_TARGET = 1.05
# A first loss so many times the initial one, or so small a part of it, is not the same loss, even
# where it is that of a small mini-batch.
_TOO_HIGH, _TOO_LOW = 5.0, 0.02
# How close to the batch size that factor is where the loss is a sum over the batch.
_LIKE_A_SUM = 0.4
# Training that rose so many times above its first loss, and ends above so much of it, in a time in
# which its loss was predicted to be halved and twice as much, does not recover.
_SPIKE, _NOT_LEARNED = 1.3, 0.9
_HALVED, _AMPLE = math.log(2.0) + 1e-9, math.log(3.0)
# While fewer trials are finished every one counts; at the most so many are waited for.
_FEW = 8
_MOST_NEW = 32


class TrainingLog:
    """Records a trial's training loss, so that predictions can be checked and corrected.

    Example:
        >>> with TrainingLog(trial) as log:
        ...     for x, y in loader:
        ...         loss = train_step(x, y)
        ...         log.step(loss)

    Args:
        trial:
            The trial of the objective.
        measure_speed:
            Measure the seconds a step, too. On by default. Without them a search depends on its
            seeds alone, and can be repeated exactly.
    """

    def __init__(self, trial: optuna.trial.Trial, *, measure_speed: bool = True) -> None:
        self._trial = trial
        self._measure_speed = measure_speed
        self._losses: list[float] = []
        self._steps: list[int] = []
        self._times: list[float] = []
        self._next_write = 32
        self._unusable: str | None = None

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A pruned or failed trial's curve is an observation like any other.
        self.close()

    def step(self, loss: SupportsFloat, step: int | None = None) -> None:
        """Record the mini-batch loss of one optimiser step, as a mean over the batch.

        Args:
            loss:
                The loss before the step. A tensor of one element will do.
            step:
                The number of optimiser steps done before, where not every step is recorded. One
                more than at the last call by default.
        """
        # A tensor that requires gradients warns about being converted, but not about its item.
        item = getattr(loss, "item", None)
        value = float(loss if item is None else item())
        last = self._steps[-1] if self._steps else -1
        place = last + 1 if step is None else int(step)
        if place <= last:
            self._refuse(f"its steps do not ascend: {place} came after {last}")
            return
        if value < 0.0:
            self._refuse(f"its loss is negative: {value:g} at step {place}")
            return
        self._losses.append(value)
        self._steps.append(place)
        self._times.append(time.perf_counter())
        # What is written as training goes on survives a killed process.
        if len(self._losses) == self._next_write:
            self._next_write *= 2
            self.close()

    def close(self) -> None:
        """Write the smoothed curve to the trial. Leaving the ``with`` block does this."""
        value: dict[str, Any] = {"trial": self._trial.number}
        if self._unusable is not None:
            value["unusable"] = self._unusable
        elif not self._losses:
            return
        else:
            value |= _entry(LossCurve.of(self._losses, self._steps), self._losses[0])
            value["seconds_per_step"] = self._seconds_per_step()
        self._trial.set_user_attr(CURVE, value)

    def _refuse(self, reason: str) -> None:
        """Leave the curve out, and say so once."""
        if self._unusable is None:
            self._unusable = reason
            _warn(self._trial.number, reason)

    def _seconds_per_step(self) -> float | None:
        """The median over the steps: pauses for validation or another process do not count."""
        if not self._measure_speed or len(self._times) < 3:
            return None
        return float(f"{np.median(np.diff(self._times) / np.diff(self._steps)):.4g}")


def observed_curve(trial: FrozenTrial) -> LossCurve | None:
    """Return the smoothed training-loss curve of a trial.

    Args:
        trial:
            Any trial.

    Returns:
        The curve, or :obj:`None` where none was recorded, or none that can be used.
    """
    curve = _recorded(trial)
    if curve is None or "unusable" in curve or not curve.get("steps"):
        return None
    return LossCurve(
        np.array(curve["steps"], dtype=np.float64),
        np.array(curve["losses"], dtype=np.float64),
        np.array(curve["errors"], dtype=np.float64),
        int(curve["n_steps"]),
        bool(curve["diverged"]),
    )


def observed_steps(trial: FrozenTrial, predictor: TrainingTimePredictor) -> float:
    """Return the step at which a trial's smoothed training loss was at the predictor's target.

    Args:
        trial:
            Any trial.
        predictor:
            Knows the target.

    Returns:
        The step; infinity where the target was not reached, NaN where nothing was recorded.
    """
    curve = observed_curve(trial)
    if curve is None or predictor.target.quantity != "loss":
        return float("nan")
    passage = predictor.target.first_passage(curve.steps, curve.losses)
    # A trial that stops at its target ends on it, give or take the noise of the last batches.
    if not np.isfinite(passage) and curve.losses[-1] <= AT_TARGET * predictor.target.value:
        return float(curve.steps[-1])
    return passage


def final_loss(trial: FrozenTrial, predictor: TrainingTimePredictor) -> float:
    """Return the training loss that a trial ended at.

    Args:
        trial:
            Any trial.
        predictor:
            Knows the task.

    Returns:
        The smoothed loss; NaN where nothing was recorded, or another loss than the task's.
    """
    curve, record = observed_curve(trial), _recorded(trial)
    if curve is None or record is None:
        return math.nan
    prediction = entry(trial, PREDICTION) or {"batch_size": 1}
    if _other_loss(record, prediction, predictor.initial_loss) is not None:
        return math.nan
    return float(curve.losses[-1])


def observations_of(study: optuna.Study, predictor: TrainingTimePredictor) -> list[Observation]:
    """Return what a study's trials tell about a predictor.

    Finished, pruned, failed and running trials alike, in the order of their numbers, as far as
    they have a prediction for this task and a usable curve. What cannot be used is reported once.

    Args:
        study:
            The study.
        predictor:
            Knows the task. Predictions for another one are left out.

    Returns:
        One observation a trial.
    """
    return _observations(study, predictor, trials_of(study, (*FINISHED, TrialState.RUNNING)))


def _observations(
    study: optuna.Study, predictor: TrainingTimePredictor, trials: Sequence[FrozenTrial]
) -> list[Observation]:
    known = _OBSERVATIONS[study].setdefault(predictor.spectrum.metadata.fingerprint, {})
    observations = []
    for trial in sorted(trials, key=lambda t: t.number):
        if trial.number in known:
            one = known[trial.number]
        else:
            one = observation_of(trial, predictor, _REPORTED[study])
            if trial.state in FINISHED:
                known[trial.number] = one
        if one is not None:
            observations.append(one)
    return observations


def informed_by(study: optuna.Study, predictor: TrainingTimePredictor) -> TrainingTimePredictor:
    """Return the predictor as a study's trials have corrected it, steps and seconds.

    Args:
        study:
            The study.
        predictor:
            The predictor.

    Returns:
        A predictor that shares everything else with this one.
    """
    return predictor.informed(observations_of(study, predictor))


@dataclass(frozen=True)
class _Learned:
    """What was learned of a study, and from how many finished trials and how far running ones."""

    predictor: TrainingTimePredictor
    n_finished: int
    running: tuple[tuple[int, float], ...]


class Learner:
    """Keeps a predictor informed by a study's trials, at a cost that does not grow with them.

    Every finished trial counts at first, and while there are fewer than eight also what running
    ones have recorded. Later it learns anew from every second trial, every fourth, and so on up to
    every thirty-second. It depends on the trials alone when that is, so that a study which was put
    aside goes on as it would have.

    Args:
        predictor:
            The predictor.
    """

    def __init__(self, predictor: TrainingTimePredictor) -> None:
        self._predictor = predictor

    def informed(
        self, study: optuna.Study, trials: Sequence[FrozenTrial]
    ) -> TrainingTimePredictor:
        """Return the predictor as a study's trials have corrected it.

        Args:
            study:
                The study.
            trials:
                Its finished and running trials, as they were just read.

        Returns:
            A predictor that shares everything else with the given one.
        """
        finished = [trial for trial in trials if trial.state in FINISHED]
        step = min(2 ** max(0, (len(finished) // _FEW).bit_length() - 1), _MOST_NEW)
        n_finished = len(finished) - len(finished) % step
        under_way: list[FrozenTrial] = []
        if n_finished < _FEW:
            under_way = [t for t in trials if t.state not in FINISHED]
        curves = ((t.number, _recorded(t)) for t in under_way)
        running = tuple((n, float(c.get("n_steps", 0))) for n, c in curves if c is not None)
        # Sampler and pruner of a study mostly have the same predictor: they learn together.
        kept = _LEARNED[study]
        last = kept.get(id(self._predictor))
        if last is not None and (last.n_finished, last.running) == (n_finished, running):
            return last.predictor
        told = [*sorted(finished, key=lambda t: t.number)[:n_finished], *under_way]
        twin = self._predictor.informed(_observations(study, self._predictor, told))
        kept[id(self._predictor)] = _Learned(twin, n_finished, running)
        return twin

    def last(self, study: optuna.Study) -> TrainingTimePredictor:
        """Return the predictor as it was last corrected.

        Args:
            study:
                The study.

        Returns:
            The given one where nothing was learned yet.
        """
        last = _LEARNED[study].get(id(self._predictor))
        return self._predictor if last is None else last.predictor


# By the fingerprint of the task and the number of a finished trial.
_OBSERVATIONS: PerStudy[dict[str, dict[int, Observation | None]]] = PerStudy(dict)
_REPORTED: PerStudy[set[int]] = PerStudy(set)
# By the identity of a predictor, which what was learned keeps alive.
_LEARNED: PerStudy[dict[int, _Learned]] = PerStudy(dict)


def observation_of(
    trial: FrozenTrial, predictor: TrainingTimePredictor, reported: set[int]
) -> Observation | None:
    """Return what a trial tells about a predictor.

    Args:
        trial:
            Any trial.
        predictor:
            Knows the task.
        reported:
            Numbers of the trials whose curves were already reported as unusable; grows.

    Returns:
        The observation, or :obj:`None` where the trial has no prediction for this task or no
        usable curve.
    """
    prediction, record = entry(trial, PREDICTION), _recorded(trial)
    if prediction is None or record is None or prediction.get("ladder") is None:
        return None
    if prediction["fingerprint"] != predictor.spectrum.metadata.fingerprint:
        return None
    curve = observed_curve(trial)
    if curve is not None:
        reason = _other_loss(record, prediction, predictor.initial_loss)
    elif STEPS_PER_REPORT in record:
        reason = _unusable(record)
    else:
        # What a log has refused it has told, too.
        return None
    if reason is not None:
        if trial.number not in reported:
            reported.add(trial.number)
            _warn(trial.number, reason)
        return None
    if curve is None:
        return None
    levels = predictor.initial_loss * np.exp(-DEPTHS)
    observed, errors = curve.log_passages(levels)
    ladder = prediction["ladder"]
    momentum = float(prediction["momentum"])
    return Observation(
        predicted=_array(ladder["predicted"]),
        expected=_array(ladder["expected"]),
        growth=_array(ladder["growth"]),
        covariates=_array(ladder["covariates"]),
        instability=_array(ladder["instability"]),
        effective_learning_rate=float(prediction["learning_rate"]) / (1.0 - momentum),
        lag=momentum / (1.0 - momentum),
        observed=observed,
        errors=errors,
        n_steps=curve.n_steps,
        diverged=curve.diverged or broke_down(curve, _array(ladder["predicted"])),
        batch_size=int(prediction["batch_size"]),
        lost=curve.lost,
        seconds_per_step=_array([record.get("seconds_per_step")])[0],
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


def _unusable(record: dict[str, Any]) -> str | None:
    """Why reports are no curve, or :obj:`None` where nothing was reported."""
    reason = record.get("unusable")
    if reason is None and "first" in record and record["first"] is None:
        reason = "its first loss is not a number"
    return reason


def _other_loss(
    curve: dict[str, Any], prediction: dict[str, Any], initial_loss: float
) -> str | None:
    """Why a recorded curve is not that of the task's training loss, or :obj:`None`."""
    first = curve.get("first")
    if first is None or not math.isfinite(first):
        return "its first loss is not a number"
    ratio = first / initial_loss
    # A log that begins late may begin anywhere.
    if _TOO_LOW <= ratio <= _TOO_HIGH or curve["steps"][0] > 0:
        return None
    size = prediction["batch_size"]
    if abs(math.log(max(ratio, 1e-30) / size)) < _LIKE_A_SUM:
        return (
            f"its first loss, {first:.4g}, is about {size} times the initial training loss "
            f"{initial_loss:.4g}: it looks like a sum over the batch of {size} instead of a mean"
        )
    return (
        f"its first loss, {first:.4g}, is far from the task's initial training loss "
        f"{initial_loss:.4g}: it must be another loss, or another model"
    )


def _warn(number: int, reason: str) -> None:
    warnings.warn(
        f"The training-loss curve of trial {number} is left out: {reason}. Log the mean loss of "
        "each mini-batch, in the order of the steps.",
        UnusableCurveWarning,
        stacklevel=3,
    )


def _recorded(trial: FrozenTrial) -> dict[str, Any] | None:
    """The entry of a trial's curve; where its reports are the training loss, made of them."""
    value = entry(trial, CURVE)
    if value is None or STEPS_PER_REPORT not in value or not trial.intermediate_values:
        return value
    try:
        return value | _entry(*curve_of_reports(value, trial.intermediate_values))
    except ValueError as error:
        return value | {"unusable": str(error).rstrip(".")}


def _entry(curve: LossCurve, first: float) -> dict[str, Any]:
    return {
        "n_steps": curve.n_steps,
        "diverged": curve.diverged,
        "first": first if math.isfinite(first) else None,
        "steps": [int(s) if s == int(s) else float(s) for s in curve.steps],
        "losses": [float(f"{loss:.6g}") for loss in curve.losses],
        "errors": [float(f"{error:.3g}") for error in curve.errors],
    }


def _array(values: list[float | None]) -> NDArray[np.float64]:
    return np.array([math.nan if v is None else v for v in values], dtype=np.float64)
