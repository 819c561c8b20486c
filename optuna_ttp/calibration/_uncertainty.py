"""How sure a predicted training time is."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from optuna_ttp.calibration._prior_scale import PriorScale
from optuna_ttp.spectrum import Probe


# The 90 % quantile of the standard normal distribution.
Z_90 = 1.2816
# Standard deviation of the logarithm of a predicted time: at the start, for every factor e that
# the loss falls, without any probe, and for every factor e of the kernel's mismatch. The first
# draw of every network in benchmarks/accuracy chose them, by the score of 80 % intervals (Gneiting
# and Raftery, 2007, equation 43); displacement and deviation added nothing. The other draws test
# them.
_SHALLOW_SD = 0.05
_DEPTH_SD = 0.02
_UNKNOWN_SD = 0.5
_MISMATCH_SD = 0.3
_MOST_SD = 2.0
# Depths at which the probe is asked how wrong a kernel is, and how far configurations may differ;
# and what the one and the other say.
_NEAR, _FAR = 0.5, 0.25
_LEAST_GROWTH, _GROWTH_PRIOR_SCALE = 0.7, 1.5
_LEAST_SCATTER = 0.5
_MOST_DEVIATION = 16.0
# A weight matrix that changes by as much as it was has left its linearisation; so have outputs
# that are as far off as they moved, and a kernel of three times the predicted one, or a third.
_UNRELIABLE_DISPLACEMENT = 1.0
_UNRELIABLE_DEVIATION = 1.0
_UNRELIABLE_MISMATCH = math.log(3.0)


def displacement(probe: Probe | None, fraction: float) -> float:
    """Return the largest relative displacement of a weight matrix on the way to a depth.

    Args:
        probe:
            Of the spectrum, or :obj:`None`.
        fraction:
            Depth: the training loss over the initial one.

    Returns:
        ``|w - w_0| / |w_0|``; beyond the deepest point of the probe that of the deepest point.
        NaN without a probe.
    """
    return math.nan if probe is None else _at(probe, probe.relative_displacements, fraction)


def deviation(probe: Probe | None, fraction: float) -> float:
    """Return how far the outputs are from the linearised ones at a depth.

    Args:
        probe:
            Of the spectrum, or :obj:`None`.
        fraction:
            Depth: the training loss over the initial one.

    Returns:
        ``|f - f_lin| / |f_lin - f_0|``, likewise.
    """
    return math.nan if probe is None else _at(probe, probe.output_deviations, fraction)


def kernel_mismatch(probe: Probe | None, fraction: float) -> float:
    """Return by how much the kernel seen at a depth differs from the one that is predicted.

    Args:
        probe:
            Of the spectrum, or :obj:`None`.
        fraction:
            Depth: the training loss over the initial one.

    Returns:
        ``|log(ratio / kappa)|`` of the probe's kernel ratio and of ``kappa = (1 + rho^2)^2``, the
        two estimates behind :meth:`~optuna_ttp.dynamics.KernelGrowth.from_probe`, interpolated
        likewise.
    """
    if probe is None:
        return math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        growth = 2.0 * np.log1p(probe.relative_displacements**2)
        mismatch = np.abs(np.log(probe.kernel_ratios) - growth)
    return _at(probe, np.nan_to_num(mismatch, nan=np.inf, posinf=np.inf), fraction)


def _at(probe: Probe, values: NDArray[np.float64], fraction: float) -> float:
    """Interpolate in the logarithm of the loss."""
    depths = -np.log(probe.fractions)
    wanted = -np.log(max(fraction, 1e-12))
    if np.isnan(wanted):
        return math.nan
    if not np.isfinite(values).all():
        return float(values.max()) if wanted > 0 else 0.0
    return float(np.interp(wanted, depths, values))


def is_reliable(probe: Probe | None, fraction: float) -> bool:
    """Tell whether the network is still close to its linearisation at a depth.

    Args:
        probe:
            Of the spectrum, or :obj:`None`: then nothing speaks against it.
        fraction:
            Depth: the training loss over the initial one.

    Returns:
        Whether no weight matrix has to change by as much as it was, the outputs at the changed
        weights are closer to the linearised ones than these are to the initial ones, and the
        kernel there is within a factor of three of the predicted one.
    """
    return not (
        displacement(probe, fraction) >= _UNRELIABLE_DISPLACEMENT
        or deviation(probe, fraction) >= _UNRELIABLE_DEVIATION
        or kernel_mismatch(probe, fraction) >= _UNRELIABLE_MISMATCH
    )


def linearisation_sd(probe: Probe | None, fraction: float) -> float:
    """Return the standard deviation of the logarithm of a time that comes from linearisation.

    Args:
        probe:
            Of the spectrum, or :obj:`None`.
        fraction:
            Depth: the training loss over the initial one.

    Returns:
        It grows with the depth and with :func:`kernel_mismatch`, up to about 2.
    """
    depth = -np.log(np.clip(fraction, 1e-3, 1.0)) if np.isfinite(fraction) else 1.0
    near = _SHALLOW_SD + _DEPTH_SD * float(depth)
    mismatch = kernel_mismatch(probe, fraction)
    far = _UNKNOWN_SD if math.isnan(mismatch) else min(_MISMATCH_SD * mismatch, _MOST_SD)
    return math.hypot(near, far)


def prior_scale(probe: Probe | None) -> PriorScale:
    """Return what a probe says about the errors that trials will show.

    The further the outputs are from the linearised ones, the more the configurations differ. A
    kernel that differs from the predicted one is wrong for all of them alike; but where the
    outputs are further off than they moved, the probe was not on the path that training takes.
    The first draws of the networks in benchmarks/accuracy chose the constants, by the likelihood
    of held-out times after one, three and ten trials; the other draws test them.

    Args:
        probe:
            Of the spectrum, or :obj:`None`.

    Returns:
        That of a usual pretrained network without a probe.
    """
    if probe is None:
        return PriorScale()
    off = min(deviation(probe, _FAR), _MOST_DEVIATION)
    mismatch = min(kernel_mismatch(probe, _NEAR), _MOST_SD)
    growth = _LEAST_GROWTH + _GROWTH_PRIOR_SCALE * mismatch / (1.0 + off**2)
    return PriorScale(growth, _LEAST_SCATTER + math.sqrt(off))


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
