"""The times at which simulated curves pass their levels, and what corrects them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class SimulatedFirstPassages:
    """Simulated times of K configurations at P levels, and what their errors may depend on.

    Attributes:
        depths:
            Loss levels, ascending, shape ``(K, P)``, or ``(1, P)`` where all have the same.
        log_steps:
            Logarithm of the predicted step at each, as simulated, shape ``(K, P)``; NaN behind
            a curve's end.
        growth:
            Logarithm of the correction that they were simulated with, at :data:`KNOTS`, shape
            ``(K, M)``, or ``(1, M)``.
        covariates:
            See :func:`covariates`, shape ``(K, F)``.
        instability:
            See :class:`Observation`, shape ``(K, P)``.
        lag:
            Steps by which momentum lags behind, shape ``(K,)``.
    """

    depths: NDArray[np.float64]
    log_steps: NDArray[np.float64]
    growth: NDArray[np.float64]
    covariates: NDArray[np.float64]
    instability: NDArray[np.float64]
    lag: NDArray[np.float64]


def covariates(
    effective_step: NDArray[np.float64], noise_scale: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return what the error of a predicted time may depend on beside the depth.

    The kernel's growth multiplies both as training goes on, and the speed depends on the logarithm
    of one plus them: configurations that take larger steps come out slower than predicted, on all
    networks in benchmarks/accuracy, and the more so the further the kernel has grown.

    Args:
        effective_step:
            ``eta_e h_1``, effective learning rate times largest curvature, shape ``(K,)``.
        noise_scale:
            ``gamma = (N - B) / ((N - 1) B)``, shape ``(K,)``.

    Returns:
        The effective step, and five times the effective step times the noise scale; shape
        ``(K, F)``.
    """
    return np.stack([effective_step, 5.0 * effective_step * noise_scale], axis=1)
