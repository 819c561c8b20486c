"""Broken trainings, whose loss has returned to its initial value and does not fall again."""

from __future__ import annotations

from dataclasses import dataclass
import math

import numpy as np
from numpy.typing import NDArray

from optuna_ttp._util.checks import check_number
from optuna_ttp._util.checks import check_range
from optuna_ttp.calibration import DEPTHS
from optuna_ttp.calibration import LossCurve


@dataclass(frozen=True)
class BrokenTrainingRules:
    """The numbers that decide whether a whole trial is broken and counts as diverged.

    Attributes:
        not_learned: The last loss must be above this share of the first loss. 0.9 tells it from
            slow progress on the recorded runs (``benchmarks/search/parts.py``).
        spike: The loss must have risen above this factor of the first loss. Without this one trial
            sequence of eight changes, and no average time (``benchmarks/search/ablate.py``).
        ample: The trial must be longer than this factor of the steps in which its loss was
            predicted to be halved. It changes no replayed search of 12 trials. Of 1,464 recorded
            runs cut after a twentieth of their steps 96 would count as broken without it, of
            which 6 end below half of their loss; with it 5 do, and all of them are broken
            (``python -m benchmarks.search.broken_runs``).
    """

    not_learned: float = 0.9
    spike: float = 1.3
    ample: float = 3.0

    def __post_init__(self) -> None:
        _check_share("not_learned", self.not_learned)
        check_range("spike", self.spike, 1.0)
        check_range("ample", self.ample)


@dataclass(frozen=True)
class LostProgressRules:
    """The numbers that decide whether the loss of a running trial has returned to its start.

    Such a trial is stopped, and a wrong answer costs a trial. So the steps are counted from when
    the loss was last below its start.

    Attributes:
        not_learned: The loss is below its start if it is below this share of the initial loss.
        ample: The loss must have been back for more than this factor of the steps in which it was
            predicted to be halved, and for more steps than until it was last below. 32 of the
            1,608 recorded runs are stopped, at 56 % of their epochs; none of them reaches the
            target, and none is close to the best.
        errors: The loss must have been below its start by this many standard errors, because noise
            takes a curve below its start and back. Without this searches take 1.5 % longer, as
            they do without the whole rule (``benchmarks/search/ablate.py``).
    """

    not_learned: float = 0.9
    ample: float = 2.0
    errors: float = 1.0

    def __post_init__(self) -> None:
        _check_share("not_learned", self.not_learned)
        check_range("ample", self.ample)
        check_range("errors", self.errors)


def _check_share(name: str, value: float) -> None:
    """Raise TypeError or ValueError if a value is not a share of a loss, in (0, 1]."""
    check_number(name, value)
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must be in (0, 1] but got {value}.")


RULES = BrokenTrainingRules()


def broke_down(curve: LossCurve, predicted: NDArray[np.float64]) -> bool:
    """Return True if a trial's loss rose in a spike and ended near its first loss or above.

    The trial must have had more steps than the predicted ones to half of the loss, by a factor.
    Such a network has vanishing gradients: its loss is finite, but does not fall any more.
    ``predicted`` has the logarithms of the predicted steps to each of ``DEPTHS``, NaN if unknown.
    """
    first, last = float(curve.losses[0]), float(curve.losses[-1])
    if not (curve.losses.max() > RULES.spike * first and last > RULES.not_learned * first):
        return False
    log_halved = _log_steps_to_half(predicted)
    log_steps = math.log(max(curve.n_steps, 1))
    return log_steps > log_halved + math.log(RULES.ample)


def has_lost_progress(
    curve: LossCurve,
    predicted: NDArray[np.float64],
    expected: NDArray[np.float64],
    initial_loss: float,
    rules: LostProgressRules,
) -> bool:
    """Return True if a running trial's loss fell, returned to ``initial_loss`` and stayed there.

    ``predicted`` and ``expected`` have the logarithms of the predicted steps to each of
    ``DEPTHS``, as simulated and as corrected by earlier trials; the larger steps count.
    ``initial_loss`` is the loss at the pretrained weights.
    """
    start = rules.not_learned * initial_loss
    below = np.flatnonzero(curve.losses * np.exp(rules.errors * curve.errors) < start)
    if not len(below) or curve.losses[-1] < start or not curve.has_risen:
        return False
    log_halved = [_log_steps_to_half(predicted), _log_steps_to_half(expected)]
    halved = max((math.exp(logs) for logs in log_halved if math.isfinite(logs)), default=math.inf)
    last_below = float(curve.steps[below[-1]])
    ample = max(rules.ample * halved, last_below)
    return curve.n_steps - last_below > ample


def _log_steps_to_half(log_steps: NDArray[np.float64]) -> float:
    """Return the logarithm of the predicted steps to half of the loss; infinity if unknown.

    If that is unknown, the lowest loss level above a half that has a prediction counts.
    """
    to_half = log_steps[np.isfinite(log_steps) & (math.log(2.0) + 1e-9 >= DEPTHS)]
    return float(to_half[-1]) if len(to_half) else math.inf
