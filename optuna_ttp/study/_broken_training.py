"""When a training has broken down: its loss is back where it began and will not come down."""

from __future__ import annotations

from dataclasses import dataclass
import math

import numpy as np
from numpy.typing import NDArray

from optuna_ttp.calibration import DEPTHS
from optuna_ttp.calibration import LossCurve


@dataclass(frozen=True)
class BrokenTrainingRules:
    """When a whole trial has broken down, so that its times are not learned from.

    Attributes:
        not_learned:
            A loss above this share of the one at the start is back where it began. 0.9 tells it
            from slow progress on the recorded runs (``benchmarks/search/parts.py``).
        spike:
            Only if the loss rose above so many times its first one. Without this one trial
            sequence of eight changes, and no average time (``benchmarks/search/ablate.py``).
        ample:
            Only after so many times the steps in which the loss was predicted to be halved. Not
            ablated yet.
    """

    not_learned: float = 0.9
    spike: float = 1.3
    ample: float = 3.0


@dataclass(frozen=True)
class ThrownBackRules:
    """When the loss of a running trial is back where it began, so that the trial is stopped.

    A wrong answer costs a trial, so that this looks back to when the loss was last below its
    start.

    Attributes:
        not_learned:
            As for a whole trial.
        ample:
            A trial is stopped after so many times the steps in which its loss was predicted to be
            halved, and as many as it took to get below its start. 32 of the 1,608 recorded runs
            are, at 56 % of their epochs; none of them reaches the target all the same, and none
            is close to the best.
        errors:
            A loss was below its start only if it was by so many standard errors: noise alone
            takes a curve below its start and back. Without this searches take 1.5 % longer, as
            they do without the whole rule (``benchmarks/search/ablate.py``).
    """

    not_learned: float = 0.9
    ample: float = 2.0
    errors: float = 1.0


RULES = BrokenTrainingRules()


def broke_down(curve: LossCurve, predicted: NDArray[np.float64]) -> bool:
    """Tell whether a trial's loss went through a spike and stayed above its start, in ample time.

    A network that is thrown where its gradients vanish ends with the loss of a guess: its loss is
    finite, but it comes down no more than one that is not. ``predicted`` holds the logarithms of
    the predicted steps to each of ``DEPTHS``, NaN where there are none.
    """
    first, last = float(curve.losses[0]), float(curve.losses[-1])
    if not (curve.losses.max() > RULES.spike * first and last > RULES.not_learned * first):
        return False
    log_halved = _log_steps_to_half(predicted)
    log_steps = math.log(max(curve.n_steps, 1))
    return log_steps > log_halved + math.log(RULES.ample)


def is_thrown_back(
    curve: LossCurve,
    predicted: NDArray[np.float64],
    expected: NDArray[np.float64],
    initial_loss: float,
    rules: ThrownBackRules,
) -> bool:
    """Tell whether a running trial is back where it began, in ample time to be elsewhere.

    ``predicted`` and ``expected`` hold the logarithms of the predicted steps to each of
    ``DEPTHS``, as simulated and as corrected by earlier trials; the later of the two counts. The
    loss at the pretrained weights is ``initial_loss``.
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
    """Return the predicted logarithm of the steps to half of the loss; infinity if there is none.

    That is the deepest level down to a half that has a prediction.
    """
    to_half = log_steps[np.isfinite(log_steps) & (math.log(2.0) + 1e-9 >= DEPTHS)]
    return float(to_half[-1]) if len(to_half) else math.inf
