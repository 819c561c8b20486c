"""Trials in a world whose kernel growth is known, for the tests of what is learned from them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
import math

import numpy as np
from numpy.typing import NDArray

from optuna_ttp.calibration import calibrate
from optuna_ttp.calibration import Calibration
from optuna_ttp.calibration import covariates
from optuna_ttp.calibration import DEPTHS
from optuna_ttp.calibration import KNOTS
from optuna_ttp.calibration import Observation
from optuna_ttp.prediction import Prediction


Growth = Callable[[NDArray[np.float64]], NDArray[np.float64]]
# Nothing is known of levels behind this depth, unless a test says otherwise.
DEEP = 3.7


def unchanged(depth: NDArray[np.float64]) -> NDArray[np.float64]:
    """The logarithm of a kernel's growth that is none."""
    return np.zeros_like(depth)


def first_passages(steps_to_one: float, log_growth: Growth = unchanged) -> NDArray[np.float64]:
    """Logarithms of the times at which a loss passes the levels.

    With the frozen kernel it gets to depth ``d`` after ``T d (1 + 0.3 d)`` steps; where the kernel
    has grown by ``kappa``, it goes ``kappa`` times as fast. Integrated on a grid of its own.

    Args:
        steps_to_one: T.
        log_growth: Logarithm of ``kappa`` as a function of the depth.
    """
    return math.log(steps_to_one) + _log_relative_times(log_growth)


@cache
def _log_relative_times(log_growth: Growth) -> NDArray[np.float64]:
    """Logarithms of :func:`first_passages` where T is one."""
    grid = np.linspace(0.0, 1.01 * DEPTHS[-1], 20_001)
    pace = (1.0 + 0.6 * grid) * np.exp(-log_growth(grid))
    times = np.concatenate([[0.0], np.cumsum(0.5 * (pace[1:] + pace[:-1]) * np.diff(grid))])
    return np.asarray(np.log(np.interp(DEPTHS, grid, times)))


def observation(
    log_growth: Growth = unchanged,
    *,
    learning_rate: float = 0.01,
    batch_size: int = 32,
    momentum: float = 0.0,
    stability: float = 0.05,
    deepest: float = DEEP,
    error: float = 0.0,
    n_steps: float | None = None,
    diverged: bool = False,
    rng: np.random.Generator | None = None,
    expected: NDArray[np.float64] | None = None,
    log_pace: float = 0.0,
) -> Observation:
    """A trial of a network whose kernel grows like this, predicted with a frozen kernel.

    Args:
        log_growth: Logarithm of ``kappa`` as a function of the depth.
        learning_rate: Of the trial.
        batch_size: Likewise.
        momentum: Likewise.
        stability: Its learning rate over the largest stable one.
        deepest: It was seen down to here.
        error: Its times are off by this factor's logarithm.
        n_steps: Its steps; those of its deepest level by default.
        diverged: Whether its loss became infinite.
        rng: Adds errors of single levels, and one that all levels of the trial have in common.
        expected: What it was told to take, where that is not the prediction itself.
        log_pace: Logarithm of how much longer all predictions are than they are by default.
    """
    rate = learning_rate / (1.0 - momentum)
    steps = math.exp(log_pace) / rate
    predicted = first_passages(steps)
    observed = first_passages(steps, log_growth) + error
    if rng is not None:
        observed = observed + rng.normal(0.0, 0.025) + rng.normal(0.0, 0.02, len(DEPTHS))
    observed = np.where(deepest >= DEPTHS, observed, np.nan)
    gamma = (1000 - batch_size) / (999 * batch_size)
    step = np.array([2.0 * stability * (1 + momentum) / (1 - momentum)])
    return Observation(
        predicted=predicted,
        expected=predicted if expected is None else expected,
        growth=np.zeros(len(KNOTS)),
        covariates=covariates(step, np.array([gamma]))[0],
        instability=np.full(len(DEPTHS), stability),
        effective_learning_rate=rate,
        lag=momentum / (1.0 - momentum),
        observed=observed,
        errors=np.full(len(DEPTHS), 0.01),
        n_steps=float(np.exp(np.nanmax(observed))) if n_steps is None else n_steps,
        diverged=diverged,
    )


def trials_of(
    log_growth: Growth, count: int, *, seed: int = 0, deepest: float = DEEP, scatter: float = 0.0
) -> list[Observation]:
    """Several trials of such a network, of random configurations."""
    rng = np.random.default_rng(seed)
    return [
        observation(
            log_growth,
            # Slow enough for the lag of momentum not to matter: the simulated times have none.
            learning_rate=10.0 ** rng.uniform(-4, -2.5),
            batch_size=int(rng.choice([8, 16, 64])),
            momentum=float(rng.choice([0.0, 0.5])),
            stability=float(rng.uniform(0.01, 0.1)),
            deepest=deepest,
            error=float(rng.normal(0.0, scatter)) if scatter else 0.0,
            rng=rng,
        )
        for _ in range(count)
    ]


def of_prediction(prediction: Prediction, log_factor: float) -> Observation:
    """A trial that took so many times the steps of what was predicted for it.

    Args:
        prediction: Of one configuration.
        log_factor: Logarithm of the factor.
    """
    observed = prediction.log_first_passage_times + log_factor
    momentum = float(prediction.momentum)
    return Observation(
        predicted=prediction.log_first_passage_times,
        expected=prediction.expected_log_first_passage_times,
        growth=prediction.log_growth,
        covariates=prediction.covariates,
        instability=prediction.instability,
        effective_learning_rate=float(prediction.learning_rate) / (1.0 - momentum),
        lag=momentum / (1.0 - momentum),
        observed=observed,
        errors=np.full(len(DEPTHS), 0.01),
        n_steps=float(np.exp(np.nanmax(observed))),
    )


def slower(factor: float, n_observed: int = 6) -> Calibration:
    """What is known for sure where everything takes so many times as long as predicted.

    Args:
        factor: By which the kernel is divided, at all depths.
        n_observed: The number of trials that told.
    """
    prior = calibrate([])
    weights = np.zeros_like(prior.weights)
    weights[: len(KNOTS)] = -math.log(factor)
    return Calibration(
        weights,
        1e-12 * np.eye(len(weights)),
        degrees_of_freedom=100.0,
        n_observed=n_observed,
        rank_agreement=1.0,
        log_error=0.01,
    )
