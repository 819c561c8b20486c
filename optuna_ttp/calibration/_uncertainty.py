"""How sure a predicted training time is."""

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
    """How sure a predicted time is before any trial, and when linearisation is unreliable.

    The standard deviations were chosen on the first draw of every network in benchmarks/accuracy,
    by the score of 80 % intervals (Gneiting and Raftery, 2007, equation 43), where displacement
    and deviation added nothing; the scales of the prior on the same draws, by the likelihood of
    held-out times after one, three and ten trials. The other draws test them.
    """

    shallow_sd: float = 0.05
    """Standard deviation of the logarithm of a predicted time at the start."""
    depth_sd: float = 0.02
    """What every factor e that the loss falls adds to it."""
    unknown_sd: float = 0.5
    """That of linearisation where there is no probe."""
    mismatch_sd: float = 0.3
    """That of linearisation for every factor e of the kernel's mismatch."""
    most_sd: float = 2.0
    """Its largest value, and the largest mismatch that scales the prior."""
    mismatch_fraction: float = 0.5
    """Share of the initial loss at which the probe is asked how wrong a kernel is."""
    deviation_fraction: float = 0.25
    """Share of the initial loss at which it is asked how far configurations may differ."""
    least_growth: float = 0.7
    """Scale of the growth's prior without any mismatch."""
    growth_mismatch: float = 1.5
    """What a mismatch adds to it, where the outputs are as predicted."""
    least_scatter: float = 0.5
    """Scale of the scatter's prior without any deviation, whose square root is added."""
    most_deviation: float = 16.0
    """Largest deviation that scales the prior."""
    unreliable_displacement: float = 1.0
    """A weight matrix that changes by as much as it was has left its linearisation."""
    unreliable_deviation: float = 1.0
    """So have outputs that are as far off as they moved."""
    unreliable_mismatch: float = math.log(3.0)
    """So has a kernel of three times the predicted one, or a third."""


RULES = UncertaintyRules()


def displacement(probe: Probe | None, fraction: float) -> float:
    """Return ``|w - w_0| / |w_0|`` of the weight matrix that changes most on the way to a depth.

    The depth is given as the fraction of the initial training loss; beyond the deepest point of
    the probe the displacement is that of the deepest point. NaN without a probe.
    """
    return math.nan if probe is None else _at(probe, probe.relative_displacements, fraction)


def deviation(probe: Probe | None, fraction: float) -> float:
    """Return ``|f - f_lin| / |f_lin - f_0|`` of the outputs at a fraction of the initial loss."""
    return math.nan if probe is None else _at(probe, probe.output_deviations, fraction)


def kernel_mismatch(probe: Probe | None, fraction: float) -> float:
    """Return ``|log(ratio / kappa)|``: how far two estimates of the kernel's growth disagree.

    ``ratio`` is the kernel ratio that the probe measured at a fraction of the initial loss, and
    ``kappa = (1 + rho^2)^2`` is what the relative displacement ``rho`` of the weights there
    predicts. :meth:`~optuna_ttp.dynamics.KernelGrowth.from_probe` uses both. NaN without a probe.
    """
    if probe is None:
        return math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        growth = 2.0 * np.log1p(probe.relative_displacements**2)
        mismatch = np.abs(np.log(probe.kernel_ratios) - growth)
    return _at(probe, np.nan_to_num(mismatch, nan=np.inf, posinf=np.inf), fraction)


def _at(probe: Probe, values: Floats, fraction: float) -> float:
    """Interpolate values of a probe in the logarithm of the loss."""
    depths = -np.log(probe.fractions)
    wanted = -np.log(max(fraction, 1e-12))
    if np.isnan(wanted):
        return math.nan
    if not np.isfinite(values).all():
        return float(values.max()) if wanted > 0 else 0.0
    return float(np.interp(wanted, depths, values))


def is_reliable(probe: Probe | None, fraction: float, rules: UncertaintyRules = RULES) -> bool:
    """Tell whether the network is still close to its linearisation at a fraction of the loss.

    That is: no weight matrix has to change by as much as it was, the outputs at the changed
    weights are closer to the linearised ones than these are to the initial ones, and the kernel
    there is within a factor of three of the predicted one. True without a probe.
    """
    return not (
        displacement(probe, fraction) >= rules.unreliable_displacement
        or deviation(probe, fraction) >= rules.unreliable_deviation
        or kernel_mismatch(probe, fraction) >= rules.unreliable_mismatch
    )


def linearisation_sd(
    probe: Probe | None, fraction: float, rules: UncertaintyRules = RULES
) -> float:
    """Return the standard deviation of the logarithm of a time that comes from linearisation.

    It grows with the depth and with :func:`kernel_mismatch`, up to about 2.
    """
    depth = -np.log(np.clip(fraction, 1e-3, 1.0)) if np.isfinite(fraction) else 1.0
    near = rules.shallow_sd + rules.depth_sd * float(depth)
    mismatch = kernel_mismatch(probe, fraction)
    far = min(rules.mismatch_sd * mismatch, rules.most_sd)
    far = rules.unknown_sd if math.isnan(mismatch) else far
    return math.hypot(near, far)


def prior_scale(probe: Probe | None, rules: UncertaintyRules = RULES) -> PriorScale:
    """Return what a probe says about the errors that trials will show.

    The further the outputs are from the linearised ones, the more the configurations differ. A
    kernel that differs from the predicted one is wrong for all of them alike; but where the
    outputs are further off than they moved, the probe was not on the path that training takes.
    Without a probe the scale is that of a usual pretrained network.
    """
    if probe is None:
        return PriorScale()
    off = min(deviation(probe, rules.deviation_fraction), rules.most_deviation)
    mismatch = min(kernel_mismatch(probe, rules.mismatch_fraction), rules.most_sd)
    growth = rules.least_growth + rules.growth_mismatch * mismatch / (1.0 + off**2)
    return PriorScale(growth, rules.least_scatter + math.sqrt(off))


def stability_sd(stability: Floats) -> Floats:
    """Return what the nearness of the stability limit adds to the standard deviation.

    Of learning rates over the largest stable one, any shape: zero up to half the limit, 0.25 at
    the limit. Real training near the limit was 20 to 30 % slower than its linear simulation.
    """
    return np.clip(0.5 * (stability - 0.5), 0.0, 1.0)


def probability_below(steps: Floats, sd: Floats, horizon: Integers) -> Floats:
    """Return how likely log-normal times are at most the horizons, all of one shape.

    ``steps`` are the medians, infinite (probability zero) where the target is not reached; ``sd``
    are the standard deviations of the logarithms.
    """
    from scipy.special import ndtr

    finite = np.isfinite(steps)
    ratio = np.log(horizon / np.where(finite, np.maximum(steps, 1.0), 1.0))
    return np.asarray(np.where(finite, ndtr(ratio / np.maximum(sd, 1e-6)), 0.0))
