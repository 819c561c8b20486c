"""The uncertainty of predicted training times before any trial."""

from __future__ import annotations

from dataclasses import dataclass
import math

import numpy as np

from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers
from optuna_ttp.calibration._prior import PriorScale
from optuna_ttp.spectrum import Probe


# The 90 % quantile of the standard normal distribution.
Z_90 = 1.2816


@dataclass(frozen=True)
class UncertaintyRules:
    """The uncertainty of predicted times before any trial, and limits of linearisation.

    The standard deviations were chosen on the first draw of every network in benchmarks/accuracy,
    by the score of 80 % intervals (Gneiting and Raftery, 2007, equation 43), where displacement
    and deviation added nothing; the scales of the prior on the same draws, by the likelihood of
    held-out times after one, three and ten trials. The other draws test them. Coverage and
    score below are those of all draws before any trial, from
    ``benchmarks/accuracy/results/ablation.md``: 90 % of the times are in the 80 % interval, and
    the score is 1.85 (smaller is better).
    """

    shallow_sd: float = 0.05
    """Standard deviation of the logarithm of a predicted time at the initial loss. Half of it
    gives 88 % and 1.84, twice of it 92 % and 1.88."""
    depth_sd: float = 0.02
    """Standard deviation that every factor e by which the loss falls adds. Without it 84 % and
    1.84: it stays because an interval should rather be too wide."""
    unknown_sd: float = 0.5
    """Standard deviation due to linearisation without a probe: like a mismatch by a factor of
    five. All recorded spectra have a probe, so it was not measured."""
    mismatch_sd: float = 0.3
    """Standard deviation due to linearisation for every factor e of the kernel's mismatch. Without
    it 61 % and 2.09."""
    most_sd: float = 2.0
    """Largest standard deviation due to linearisation, and largest mismatch in the prior scale.
    Without it 90 % and 1.88."""
    mismatch_fraction: float = 0.5
    """Share of the initial loss at which the prior scale takes the kernel's mismatch."""
    deviation_fraction: float = 0.25
    """Share of the initial loss at which the prior scale takes the deviation of the outputs."""
    least_growth: float = 0.7
    """Factor on the prior of the growth without any mismatch."""
    growth_mismatch: float = 1.5
    """Addition to this factor per mismatch, if the outputs do not deviate."""
    least_scatter: float = 0.5
    """Factor on the prior of the scatter, to which the square root of the deviation is added."""
    most_deviation: float = 16.0
    """Largest deviation in the prior scale."""
    unreliable_displacement: float = 1.0
    """Relative change of a weight matrix from which on linearisation is unreliable."""
    unreliable_deviation: float = 1.0
    """Deviation of the outputs, over their movement, from which on it is unreliable."""
    unreliable_mismatch: float = math.log(3.0)
    """Logarithm of the factor between kernel and prediction from which on it is unreliable."""


RULES = UncertaintyRules()


def displacement(probe: Probe | None, fraction: float) -> float:
    """Return ``|w - w_0| / |w_0|`` of the weight matrix that changes most, at a loss fraction.

    ``fraction`` is the training loss over the initial one; below the lowest fraction of the probe
    the displacement is that at the lowest fraction. NaN without a probe.
    """
    return math.nan if probe is None else _at(probe, probe.relative_displacements, fraction)


def deviation(probe: Probe | None, fraction: float) -> float:
    """Return ``|f - f_lin| / |f_lin - f_0|`` of the outputs at a loss fraction; NaN if unknown."""
    return math.nan if probe is None else _at(probe, probe.output_deviations, fraction)


def kernel_mismatch(probe: Probe | None, fraction: float) -> float:
    """Return the difference ``|log(ratio / kappa)|`` of two estimates of the kernel's growth.

    ``ratio`` is the kernel ratio that the probe measured at a fraction of the initial loss, and
    ``kappa = (1 + rho^2)^2`` the growth by the relative displacement ``rho`` of the weights.
    :meth:`~optuna_ttp.dynamics.KernelGrowth.from_probe` uses both. NaN without a probe.
    """
    if probe is None:
        return math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        growth = 2.0 * np.log1p(probe.relative_displacements**2)
        mismatch = np.abs(np.log(probe.kernel_ratios) - growth)
    return _at(probe, np.nan_to_num(mismatch, nan=np.inf, posinf=np.inf), fraction)


def _at(probe: Probe, values: Floats, fraction: float) -> float:
    """Return values ``(P,)`` of a probe, interpolated in the logarithm of the loss fraction.

    If a value is not finite, the result is the largest value, or zero at the initial loss.
    """
    depths = -np.log(probe.fractions)
    wanted = -np.log(max(fraction, 1e-12))
    if np.isnan(wanted):
        return math.nan
    if not np.isfinite(values).all():
        return float(values.max()) if wanted > 0 else 0.0
    return float(np.interp(wanted, depths, values))


def is_reliable(probe: Probe | None, fraction: float, rules: UncertaintyRules = RULES) -> bool:
    """Return True if the network is close to its linearisation at a fraction of the initial loss.

    That is the case if every weight matrix changes by less than its own norm, the outputs at the
    changed weights are closer to the linearised outputs than these are to the initial ones, and
    the kernel is within a factor of three of the predicted kernel. True without a probe.
    """
    return not (
        displacement(probe, fraction) >= rules.unreliable_displacement
        or deviation(probe, fraction) >= rules.unreliable_deviation
        or kernel_mismatch(probe, fraction) >= rules.unreliable_mismatch
    )


def linearisation_sd(
    probe: Probe | None, fraction: float, rules: UncertaintyRules = RULES
) -> float:
    """Return the standard deviation of the logarithm of a time due to linearisation.

    It grows as the ``fraction`` of the initial loss falls and with :func:`kernel_mismatch`, up to
    about 2.
    """
    depth = -np.log(np.clip(fraction, 1e-3, 1.0)) if np.isfinite(fraction) else 1.0
    near = rules.shallow_sd + rules.depth_sd * float(depth)
    mismatch = kernel_mismatch(probe, fraction)
    far = min(rules.mismatch_sd * mismatch, rules.most_sd)
    far = rules.unknown_sd if math.isnan(mismatch) else far
    return math.hypot(near, far)


def prior_scale(probe: Probe | None, rules: UncertaintyRules = RULES) -> PriorScale:
    """Return the prior scale of the errors of trials, by the probe of the linearisation.

    The scatter between trials grows with the deviation of the outputs. The growth's factor grows
    with the mismatch of the kernel, which is the same for all configurations, but less so if the
    outputs deviate by more than they moved, since then the probe is off the path of training.
    Without a probe the scale is that of a usual pretrained network.
    """
    if probe is None:
        return PriorScale()
    off = min(deviation(probe, rules.deviation_fraction), rules.most_deviation)
    mismatch = min(kernel_mismatch(probe, rules.mismatch_fraction), rules.most_sd)
    growth = rules.least_growth + rules.growth_mismatch * mismatch / (1.0 + off**2)
    return PriorScale(growth, rules.least_scatter + math.sqrt(off))


def stability_sd(stability: Floats) -> Floats:
    """Return the standard deviation of log times that closeness to the stability limit adds.

    ``stability`` is the learning rate over the largest stable one, of any shape: zero up to half
    the limit, 0.25 at the limit, at most 1. Real training near the limit was 20 to 30 % slower
    than its linear simulation.
    """
    return np.clip(0.5 * (stability - 0.5), 0.0, 1.0)


def probability_below(steps: Floats, sd: Floats, horizon: Integers) -> Floats:
    """Return the probability that log-normal times are at most the horizons, in one shape.

    ``steps`` are the medians, infinite (probability zero) if the target is not reached; ``sd``
    are the standard deviations of the logarithms.
    """
    from scipy.special import ndtr

    finite = np.isfinite(steps)
    ratio = np.log(horizon / np.where(finite, np.maximum(steps, 1.0), 1.0))
    return np.asarray(np.where(finite, ndtr(ratio / np.maximum(sd, 1e-6)), 0.0))
