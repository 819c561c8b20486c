"""How sure a predicted training time is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from optuna_ttp.spectrum import Probe


# The 90 % quantile of the standard normal distribution.
Z_90 = 1.2816
# Standard deviation of the logarithm of a predicted time that linearisation leaves where the probe
# sees no deviation, and without any probe.
_LINEAR_SD = 0.12
_UNKNOWN_SD = 0.35
# A network whose loss on the linearised path is so many times the linearised one has left it.
_TOLERANCE = 1.5
# Learning rate over the stability limit at which half of all networks diverge, and the logarithmic
# width of the transition.
_HALF_DIVERGE = 6.0
_DIVERGE_WIDTH = 0.45


def deviation(probe: Probe | None, fraction: float) -> float:
    """Return by what factor the network's loss exceeds the linearised one on the way to a depth.

    Args:
        probe:
            Of the spectrum, or :obj:`None`.
        fraction:
            Depth: the training loss over the initial one.

    Returns:
        The largest factor up to that depth, at least one; beyond the deepest point of the probe
        that of the deepest point. NaN without a probe.
    """
    if probe is None:
        return float("nan")
    factors = np.maximum.accumulate(np.maximum(probe.real_fractions / probe.fractions, 1.0))
    depths = -np.log(probe.fractions)
    return float(np.interp(-np.log(max(fraction, 1e-12)), depths, factors))


def is_reliable(probe: Probe | None, fraction: float) -> bool:
    """Tell whether the network is still described by its linearisation at a depth.

    Args:
        probe:
            Of the spectrum, or :obj:`None`: then nothing speaks against it.
        fraction:
            Depth: the training loss over the initial one.

    Returns:
        Whether the network's loss on the linearised path is less than one and a half times the
        linearised one.
    """
    return not deviation(probe, fraction) >= _TOLERANCE


def linearisation_sd(probe: Probe | None, fraction: float) -> float:
    """Return the standard deviation of the logarithm of a time that comes from linearisation.

    Args:
        probe:
            Of the spectrum, or :obj:`None`.
        fraction:
            Depth: the training loss over the initial one.

    Returns:
        It grows with the logarithm of :func:`deviation`.
    """
    factor = deviation(probe, fraction)
    if np.isnan(factor):
        return _UNKNOWN_SD
    return float(np.hypot(_LINEAR_SD, np.log(factor)))


def stability_sd(stability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what the nearness of the stability limit adds to the standard deviation.

    Real training near the limit was 20 to 30 % slower than its linear simulation.

    Args:
        stability:
            Learning rate over the largest stable one, any shape.

    Returns:
        Zero up to half the limit, 0.25 at the limit.
    """
    return np.clip(0.5 * (stability - 0.5), 0.0, 1.0)


def probability_of_divergence(
    stability: NDArray[np.float64], blown_up: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return how likely training never recovers.

    Above the limit a network first goes through a loss spike, from which it may recover: the
    catapult of Lewkowycz et al., 2020 (arXiv 2003.02218). So the probability rises smoothly over
    the region, and is one half at six times the limit.

    Args:
        stability:
            Learning rate over the largest stable one, any shape.
        blown_up:
            Whether the simulated loss blew up, the same shape.

    Returns:
        Probabilities.
    """
    from scipy.special import expit

    with np.errstate(divide="ignore"):
        smooth = expit(np.log(stability / _HALF_DIVERGE) / _DIVERGE_WIDTH)
    return np.asarray(np.where(blown_up, np.maximum(smooth, 0.5), smooth))


def probability_below(
    steps: NDArray[np.float64], sd: NDArray[np.float64], horizon: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return how likely a log-normal time is at most the horizon.

    Args:
        steps:
            Its median, infinite where the target is not reached.
        sd:
            Standard deviation of its logarithm.
        horizon:
            Steps.

    Returns:
        Probabilities of the same shape; zero where the median is infinite.
    """
    from scipy.special import ndtr

    finite = np.isfinite(steps)
    ratio = np.log(horizon / np.where(finite, np.maximum(steps, 1.0), 1.0))
    return np.asarray(np.where(finite, ndtr(ratio / np.maximum(sd, 1e-6)), 0.0))
