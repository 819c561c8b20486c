"""Simulated first passage times, and the variables that their errors depend on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optuna_ttp._util.arrays import Floats


@dataclass(frozen=True, eq=False)
class SimulatedFirstPassages:
    """Simulated times of K configurations at P levels, and the variables of their errors."""

    depths: Floats
    """Depths of the levels, ascending, shape ``(K, P)``, or ``(1, P)`` if all have the same."""
    log_steps: Floats
    """Logarithm of the simulated step at each depth, shape ``(K, P)``; NaN after a curve's end."""
    growth: Floats
    """Correction ``u`` of the kernel in the simulation, at :data:`KNOTS`, shape ``(K, M)`` or
    ``(1, M)``."""
    covariates: Floats
    """The variables of :func:`covariates`, shape ``(K, F)``."""
    instability: Floats
    """:attr:`Observation.instability` of each configuration, shape ``(K, P)``."""
    lag: Floats
    """Steps ``m / (1 - m)`` by which momentum delays a gradient, shape ``(K,)``."""


def covariates(effective_step: Floats, noise_scale: Floats) -> Floats:
    """Return the two variables ``(K, 2)`` that errors depend on beside the depth.

    These are the effective step ``eta_e h_1`` (effective learning rate times largest curvature)
    and five times the effective step times the noise scale ``gamma = (N - B) / ((N - 1) B)``. The
    kernel's growth multiplies both as training goes on, and the speed depends on the logarithm of
    one plus them: configurations with larger steps are slower than predicted, on all networks in
    benchmarks/accuracy, and the more so the further the kernel has grown. Arguments are ``(K,)``.
    """
    return np.stack([effective_step, 5.0 * effective_step * noise_scale], axis=1)
