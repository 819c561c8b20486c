"""The trial that reached the target first, and how many steps of another trial take as long."""

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
    """The fastest trial so far, in steps of a running trial.

    Attributes:
        number: The number of the fastest trial.
        steps: How many steps of the running trial take as long as the fastest one took.
        is_measured: Whether that is what the steps of both were seen to take.
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
    """Return the completed trial that reached the target first; None where none reached it."""
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
    """Return the steps that a completed trial took to the target; not finite where unknown."""
    steps = observed_steps(trial, predictor)
    if is_best and math.isinf(steps) and progress_to_target(trial) >= 1.0:
        # It stopped at its target, which the smoothed loss of its batches lags behind.
        curve = observed_curve(trial)
        return steps if curve is None else curve.n_steps
    return steps


def _ratio_of_steps(
    trial: FrozenTrial, batch_size: int, running: Observation, predictor: SearchPredictor
) -> tuple[float, bool]:
    """Return how long a trial's steps are beside those of the running one, and if it was measured.

    Steps of the same batch size are as long, and one where nothing is known.
    """
    seconds = measured_seconds(trial), running.seconds_per_step
    if min(seconds) > 0.0 and math.isfinite(sum(seconds)):
        return seconds[0] / seconds[1], True
    batch_sizes = np.array([batch_size, running.batch_size])
    predicted = predictor.seconds_per_step(batch_sizes)
    ratio = float(predicted[0] / predicted[1])
    return (1.0 if math.isnan(ratio) else ratio), bool(batch_sizes[0] == batch_sizes[1])
