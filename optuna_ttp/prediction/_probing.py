"""A few real steps, of which configuration, and what they tell."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from optuna_ttp.calibration import FRACTIONS
from optuna_ttp.calibration import LossCurve
from optuna_ttp.calibration import Observation
from optuna_ttp.dynamics import Target
from optuna_ttp.prediction._configurations import Configurations
from optuna_ttp.prediction._corrected_path import CorrectedPath


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


# Learning rates that a probe chooses from, over the largest stable one, and what their product
# with the kernel's growth may come to.
_PROBE_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
_PROBE_INSTABILITY = 0.3


def probing_configuration(
    path: CorrectedPath, steps: int, learning_rate: float | None, momentum: float | None
) -> tuple[float, float]:
    """Return the configuration that comes furthest in a few steps and stays stable on the way.

    Args:
        path:
            Of the predictor.
        steps:
            How many.
        learning_rate:
            Where it is given.
        momentum:
            Likewise.

    Returns:
        Learning rate and momentum.
    """
    if learning_rate is not None:
        return float(learning_rate), 0.0 if momentum is None else float(momentum)
    wanted = (0.0, 0.9) if momentum is None else (float(momentum),)
    shares = np.tile(_PROBE_SHARES, len(wanted))
    masses = np.repeat(wanted, len(_PROBE_SHARES))
    simulator = path.path.simulator
    sizes = np.full(len(shares), simulator.n_samples)
    rates = shares * simulator.largest(sizes, masses)
    candidates = Configurations.of(rates, sizes, masses, steps, simulator.n_samples)
    p = path.predict(candidates, np.full(len(rates), np.nan), full_curve=True)
    losses = np.array(
        [
            np.interp(steps, s[np.isfinite(s)], c[np.isfinite(s)])
            for s, c in zip(p.curve_steps, p.curve_losses, strict=True)
        ]
    )
    # A loss may come out as zero where the simulated outputs grow without bound.
    depths = np.log(simulator.initial_loss / np.maximum(losses, 1e-30))[:, None]
    unstable = simulator.instability(depths, shares)[:, 0]
    # One of them is always slow enough.
    best = int(np.argmin(np.where(unstable <= _PROBE_INSTABILITY, losses, np.inf)))
    return float(rates[best]), float(masses[best])


def probed(
    path: CorrectedPath,
    task: FineTuningTask,
    steps: int,
    rate: float,
    mass: float,
    device: str | None,
) -> tuple[Observation, float]:
    """Train a few full-batch steps.

    Args:
        path:
            Of the predictor.
        task:
            The task of its spectrum.
        steps:
            How many.
        rate:
            Learning rate.
        mass:
            Momentum.
        device:
            Where to train. As :func:`~optuna_ttp.compute_spectrum` by default.

    Returns:
        What was seen, and the seconds that it took.
    """
    from optuna_ttp.ntk import resolve_device
    from optuna_ttp.prediction._short_run import train_short_run

    simulator = path.path.simulator
    short_run = train_short_run(
        task,
        simulator.model,
        learning_rate=rate,
        momentum=mass,
        steps=steps,
        device=resolve_device(task, device),
    )
    # All levels that the short run passed count, also what is deeper than the target.
    target = Target("loss", min(np.nanmin(short_run.losses), 0.99 * simulator.initial_loss))
    deep = replace(path, path=replace(path.path, target=target))
    whole = Configurations.of(
        rate, simulator.spectrum.n_samples, mass, 100 * steps, simulator.n_samples
    )
    prediction = deep.predict(whole, np.array([np.nan]), full_curve=False)
    curve = LossCurve.of(short_run.losses)
    observed, errors = curve.log_first_passage_times(simulator.initial_loss * FRACTIONS)
    observation = Observation(
        predicted=prediction.log_first_passage_times,
        expected=prediction.expected_log_first_passage_times,
        growth=prediction.log_growth,
        covariates=prediction.covariates,
        instability=prediction.instability,
        effective_learning_rate=rate / (1.0 - mass),
        lag=mass / (1.0 - mass),
        observed=observed,
        errors=errors,
        n_steps=steps,
        diverged=curve.diverged or len(short_run.losses) <= steps,
    )
    return observation, short_run.seconds
