"""The simulated times at which loss levels are passed, and what their errors depend on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optuna_ttp._util.arrays import Floats


@dataclass(frozen=True, eq=False)
class SimulatedFirstPassages:
    """Simulated times of K configurations at P levels, and what their errors may depend on."""

    depths: Floats
    """Loss levels, ascending, shape ``(K, P)``, or ``(1, P)`` where all have the same."""
    log_steps: Floats
    """Logarithm of the predicted step at each, as simulated, shape ``(K, P)``; NaN behind a
    curve's end."""
    growth: Floats
    """Logarithm of the correction that they were simulated with, at :data:`KNOTS`, shape ``(K,
    M)``, or ``(1, M)``."""
    covariates: Floats
    """See :func:`covariates`, shape ``(K, F)``."""
    instability: Floats
    """See :class:`Observation`, shape ``(K, P)``."""
    lag: Floats
    """Steps by which momentum lags behind, shape ``(K,)``."""


def covariates(effective_step: Floats, noise_scale: Floats) -> Floats:
    """Return what the errors of K configurations may depend on beside the depth, ``(K, 2)``.

    These are the effective step ``eta_e h_1`` (effective learning rate times largest curvature)
    and five times the effective step times the noise scale ``gamma = (N - B) / ((N - 1) B)``. The
    kernel's growth multiplies both as training goes on, and the speed depends on the logarithm of
    one plus them: configurations that take larger steps come out slower than predicted, on all
    networks in benchmarks/accuracy, and the more so the further the kernel has grown.
    """
    return np.stack([effective_step, 5.0 * effective_step * noise_scale], axis=1)
