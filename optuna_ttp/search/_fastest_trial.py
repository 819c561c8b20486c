"""The trial that reached the target fastest, and its time in steps of a running trial."""

from __future__ import annotations

from dataclasses import dataclass
import math
from typing import TYPE_CHECKING

import numpy as np

from optuna_ttp.study import incumbent
from optuna_ttp.study import measured_seconds
from optuna_ttp.study import observed_curve
from optuna_ttp.study import observed_steps
from optuna_ttp.study import prediction_of
from optuna_ttp.study import progress_to_target


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optuna import Study
    from optuna.trial import FrozenTrial

    from optuna_ttp.calibration import Observation
    from optuna_ttp.prediction import SearchPredictor


@dataclass(frozen=True)
class FastestTrial:
    """The fastest trial so far, and its time in steps of a running trial.

    Attributes:
        number: The number of the fastest trial.
        steps: The number of steps that the running trial makes in the fastest trial's time.
        is_measured: True if both trials' seconds per step were measured or batch sizes agree.
    """

    number: int
    steps: float
    is_measured: bool


def fastest_trial(
    study: Study,
    trials: Sequence[FrozenTrial],
    running: Observation,
    predictor: SearchPredictor,
) -> FastestTrial | None:
    """Return the completed trial that took the least time to the target; None if none reached it.

    ``running`` is the observation of the trial in whose steps that time is returned.
    """
    best = incumbent(study, trials)
    candidates: list[FastestTrial] = []
    for trial in trials:
        record = prediction_of(trial)
        is_best = best is not None and trial.number == best.number
        steps = _steps_to_target(trial, predictor, is_best)
        if record is not None and math.isfinite(steps):
            ratio, is_measured = _ratio_of_steps(trial, record.batch_size, running, predictor)
            candidates.append(FastestTrial(trial.number, ratio * steps, is_measured))
    return min(candidates, key=lambda one: (one.steps, one.number), default=None)


def _steps_to_target(trial: FrozenTrial, predictor: SearchPredictor, is_best: bool) -> float:
    """Return the steps of a trial to the target; infinity if it missed it, NaN if unknown."""
    steps = observed_steps(trial, predictor)
    if is_best and math.isinf(steps) and progress_to_target(trial) >= 1.0:
        # It stopped at its target, but the smoothed loss of its batches follows with a delay.
        curve = observed_curve(trial)
        return steps if curve is None else curve.n_steps
    return steps


def _ratio_of_steps(
    trial: FrozenTrial, batch_size: int, running: Observation, predictor: SearchPredictor
) -> tuple[float, bool]:
    """Return a trial's seconds per step over the running trial's, and True if that is certain.

    It is certain if both were measured or the batch sizes agree. Otherwise the predicted seconds
    count; if these are unknown, the ratio is one.
    """
    seconds = measured_seconds(trial), running.seconds_per_step
    if min(seconds) > 0.0 and math.isfinite(sum(seconds)):
        return seconds[0] / seconds[1], True
    batch_sizes = np.array([batch_size, running.batch_size])
    predicted = predictor.seconds_per_step(batch_sizes)
    ratio = float(predicted[0] / predicted[1])
    return (1.0 if math.isnan(ratio) else ratio), bool(batch_sizes[0] == batch_sizes[1])
