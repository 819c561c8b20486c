"""Stacked observations of trials, and the expected errors of their times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math

import numpy as np

from optuna_ttp._util.arrays import Booleans
from optuna_ttp._util.arrays import Floats
from optuna_ttp.calibration._first_passages import SimulatedFirstPassages
from optuna_ttp.calibration._loss_levels import deepest
from optuna_ttp.calibration._loss_levels import DEPTHS
from optuna_ttp.calibration._observation import Observation
from optuna_ttp.calibration._rules import ErrorRules


@dataclass(frozen=True, eq=False)
class Trials:
    """The observations of n trials, stacked along the first axis."""

    simulated: SimulatedFirstPassages
    """Simulated times, extrapolated to the levels after the end of a simulation."""
    observed: Floats
    """Logarithms of observed times, ``(n, P)``; NaN if not observed or not predicted."""
    errors: Floats
    """Standard errors of these logarithms, ``(n, P)``."""
    bound: Floats
    """:attr:`Observation.bound` of each trial, ``(n,)``."""
    delay: Floats
    """Logarithm of a trial's steps over its steps without those lost in spikes, ``(n,)``."""
    predicted: Booleans
    """True for levels that the simulation reached, ``(n, P)``."""
    rules: ErrorRules
    """The rules of the expected errors."""

    @classmethod
    def of(cls, observations: Sequence[Observation], rules: ErrorRules) -> Trials:
        """Return the stacked observations of trials, each with a prediction at some level."""
        return cls(
            SimulatedFirstPassages(
                DEPTHS[None, :],
                np.array([_extended(o.predicted) for o in observations]),
                np.array([o.growth for o in observations]),
                np.array([o.covariates for o in observations]),
                np.array([o.instability for o in observations]),
                np.array([o.lag for o in observations]),
            ),
            # Times after the target, which have no prediction, cannot be compared.
            np.array(
                [np.where(np.isfinite(o.predicted), o.observed, np.nan) for o in observations]
            ),
            np.array([o.errors for o in observations]),
            np.array([o.bound for o in observations]),
            np.array([math.log(o.n_steps / max(o.n_steps - o.lost, 1.0)) for o in observations]),
            np.isfinite([o.predicted for o in observations]),
            rules,
        )

    def with_bounds(self, logs: Floats) -> tuple[Floats, Floats]:
        """Return observed logarithmic times and their errors, ``(n, P)``, with bounds added.

        If by the expected ``logs``, ``(n, P)``, a trial should have passed its next level before
        its end, the bound takes the place of the missing observed time.
        """
        observed, errors = self.observed.copy(), self.errors.copy()
        last = deepest(observed)
        rows = np.flatnonzero(last + 1 < observed.shape[1])
        following = last[rows] + 1
        late = self.predicted[rows, following] & (logs[rows, following] < self.bound[rows])
        rows, following = rows[late], following[late]
        observed[rows, following] = self.bound[rows]
        # A spike, if one is to be expected, may have caused any part of the delay.
        away = self.bound[rows] - logs[rows, following]
        spike = np.minimum(spike_sd(self.simulated.instability[rows], self.rules), 1.0)
        errors[rows, following] = np.hypot(
            self.rules.censored_error, np.maximum(spike * away, self.delay[rows])
        )
        return observed, errors

    def precision(self, errors: Floats, seen: Booleans, scales: tuple[float, float]) -> Floats:
        """Return inverse covariances ``(n, P, P)`` of the trials' errors at ``seen`` levels.

        ``errors`` and ``seen`` are ``(n, P)``, ``scales`` as in :meth:`scales`; zero if not seen.
        """
        both = seen[:, :, None] & seen[:, None, :]
        common = self.common(scales)
        level_variance = np.nan_to_num(errors) ** 2 + scales[0] * self.rules.level_sd**2
        apart = np.where(seen, level_variance, 1.0)
        covariance = np.where(both, common, 0.0) + apart[:, :, None] * np.eye(len(DEPTHS))
        return np.where(both, np.linalg.inv(covariance), 0.0)

    def common(self, scales: tuple[float, float]) -> Floats:
        """Return the covariance ``(n, P, P)`` of a trial's shared errors, scaled by ``scales``."""
        rules = self.rules
        apart = (DEPTHS[:, None] - DEPTHS[None, :]) / rules.trial_length
        unstable = instability_sd(self.simulated.instability, rules)
        # An error that instability causes at one level stays at all later levels.
        lasting = np.minimum(unstable[:, :, None], unstable[:, None, :]) ** 2
        stable = scales[0] * rules.trial_sd**2 * np.exp(-0.5 * apart**2)
        return np.asarray(stable + scales[1] * lasting)

    def ratios(
        self, away: Floats, errors: Floats, seen: Booleans, scales: tuple[float, float]
    ) -> Floats:
        """Return the mean of ``away**2`` over its expected value at a trial's seen levels."""
        stable, unstable = self._variances(scales)
        whole = unstable + stable + np.nan_to_num(errors) ** 2
        return np.asarray((_shares(seen) * away**2 / whole).sum(axis=1))

    def scales(
        self,
        away: Floats,
        errors: Floats,
        seen: Booleans,
        importance: Floats,
        expected: tuple[float, float],
    ) -> tuple[float, float]:
        """Return two factors, by which the expected variances of the errors are multiplied.

        The first variance is that of stable trials, the second is added by instability. The
        factors are estimated from the errors of the trials.

        Errors ``away``, their standard ``errors`` and ``seen`` are ``(n, P)``, ``importance`` are
        the weights of the trials, ``(n,)``, and ``expected`` the factors before any trial.
        """
        stable, unstable = self._variances(expected)
        whole = unstable + stable + np.nan_to_num(errors) ** 2
        # A trial counts for the factor that its errors are expected to come from.
        unstable_share = (_shares(seen) * unstable / whole).sum(axis=1)
        ratio = self.ratios(away, errors, seen, expected)
        stable_share = importance * (1.0 - unstable_share)
        weight = self.rules.scale_weight
        one, two = (
            (weight + (share * ratio).sum()) / (weight + share.sum())
            for share in (stable_share, unstable_share)
        )
        return expected[0] * float(one), expected[1] * float(two)

    def _variances(self, scales: tuple[float, float]) -> tuple[float, Floats]:
        """Return the variance of a stable trial's errors, and that of instability ``(n, P)``."""
        stable = scales[0] * (self.rules.trial_sd**2 + self.rules.level_sd**2)
        return stable, scales[1] * instability_sd(self.simulated.instability, self.rules) ** 2


def _shares(seen: Booleans) -> Floats:
    """Return weights ``(n, P)``, equal for all seen levels of a trial, that sum to one."""
    return np.asarray(seen / np.maximum(seen.sum(axis=1), 1)[:, None])


def _extended(log_steps: Floats) -> Floats:
    """Return log times ``(P,)``, extrapolated in the depth with a slope of at least 0.5."""
    known = np.flatnonzero(np.isfinite(log_steps))
    last = known[-1]
    slope = 0.5
    if len(known) > 1:
        run = DEPTHS[last] - DEPTHS[known[-2]]
        slope = max(slope, (log_steps[last] - log_steps[known[-2]]) / run)
    behind = np.arange(len(log_steps)) > last
    return np.where(behind, log_steps[last] + slope * (DEPTHS - DEPTHS[last]), log_steps)


def instability_sd(instability: Floats, rules: ErrorRules) -> Floats:
    """Return the standard deviation of logarithmic times that instability causes.

    ``instability``, see :class:`Observation`, has the levels in its last axis; the result has the
    same shape and never falls along the levels.
    """
    lasting = np.log1p(np.fmax.accumulate(instability, axis=-1) / rules.instability_from)
    return rules.instability_sd * lasting + spike_sd(instability, rules)[..., None]


def spike_sd(instability: Floats, rules: ErrorRules) -> Floats:
    """Return the standard deviation that a loss spike at the start of training causes.

    It depends on the instability at the first level; the result lacks the last axis, the levels.
    """
    share = instability[..., 0] / (instability[..., 0] + rules.spike_from)
    return np.asarray(rules.spike_sd * share**3)
