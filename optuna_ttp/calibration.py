"""Observed loss curves in; a corrected clock, its uncertainty and a measure of trust out.

The clock's error is mostly one function of the depth, shared by all configurations of a task: the
kernel grows (or shrinks) as the network is trained, by a factor ``kappa`` that depends on how far
the loss has come. What is left depends a little on the configuration. Both are learned together,
from the times at which observed trials passed a ladder of depths.

``u``, a function of the depth, is the logarithm of what the kernel is multiplied by on top of the
growth that a prediction was simulated with. Without momentum it divides the time between two rungs
by ``exp(u)``. Momentum has to pick up speed first: along the path of the linearised network, with
``tau`` the intrinsic time, ``l`` the lag ``m / (1 - m)`` and ``K`` the growth, the heavy ball is
``tau' = sqrt(K) v``, ``l v' = sqrt(K) - v``. A simulated ladder is turned into intrinsic times by
this equation with the growth it was simulated with, and back into steps with the corrected one.

The logarithms of the times are linearised about the current estimate (Gauss-Newton), and the
posterior of ``u`` and of the covariates' effects is that of a Bayesian linear regression, in
closed form; a few rounds suffice. ``u`` has a Gaussian-process prior whose slope in the depth is
smooth, so that a depth that was never seen is uncertain, not wild. The scale of the errors is
learned too (conjugate inverse gamma), which makes predictive distributions Student's t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from functools import lru_cache
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray

from optuna_ttp.divergence import DivergenceLimit


# Rungs of the ladder: the training loss over the initial one, and its negative logarithm.
# fmt: off
FRACTIONS = np.array([
    0.95, 0.9, 0.82, 0.7, 0.6, 0.5, 0.42, 0.35, 0.3, 0.25, 0.2, 0.15, 0.12, 0.1, 0.07, 0.05, 0.03,
    0.01, 0.0025,
])
# fmt: on
DEPTHS = -np.log(FRACTIONS)
# Depths between which `u` is interpolated linearly.
NODES = np.array([0.0, 0.25, 0.5, 0.75, 1.0, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0, 6.0])
N_COVARIATES = 2

# The constants below maximise, roughly, the likelihood of held-out times after one to five trials
# of the first draw of each network in benchmarks/accuracy; the other draws test them.
# Prior of `u`: standard deviation of its slope per unit of depth, over which depths the slope goes
# along, and its standard deviation at the start.
_SLOPE_SD = 0.35
_SLOPE_LENGTH = 0.6
_START_SD = 0.15
# Prior of the effects of the covariates and of instability on the logarithm of the speed: means
# and standard deviations. Large steps are slower than predicted on all networks.
_EFFECTS = (-0.09, -0.09, 0.0)
_EFFECT_SDS = (0.1, 0.15, 0.2)
# The product of stability and kernel growth from which on instability shows, where it stops
# growing, and from which on it makes times scatter.
_SHOWS = 1.3
_EDGE = 3.0
_SCATTERS = 0.6
# The learning rate over the largest stable one from which on a loss spike at the start delays a
# trial by nobody knows how much, and the standard deviation that this comes to.
_CATAPULTS = 0.3
_CATAPULT_SD = 4.0
# Errors of a trial's logarithmic times: common to neighbouring rungs over such a length, more of
# it with instability, and of single rungs.
_TRIAL_SD = 0.02
_INSTABILITY_SD = 0.35
_TRIAL_LENGTH = 0.7
_RUNG_SD = 0.025
# Weight of the prior of the errors' scale, in trials, and what a trial counts for it.
_SCALE_WEIGHT = 2.0
# Degrees of freedom with which a trial that does not fit loses its weight.
_ROBUSTNESS = 4.0
_ROUNDS = 4
# Learned from the newest so many trials: enough, and quick.
_MOST_TRIALS = 128
# A trial that went on without reaching its next rung tells that it is later, within this error.
_CENSORED_ERROR = 0.15
# A running trial that is later than so many standard deviations is as late as it is.
_UNEXPLAINED = 4.0
# Corrections beyond this factor are no corrections.
_MOST_LOG = 12.0
_NEWTON_STEPS = 6
# Compared with trivial rules from so many trials on, and how much better these must be.
_MIN_OBSERVATIONS = 3
_MIN_DISTRUST = 5
_CLEARLY = 0.5
_MIN_AGREEMENT = 0.2
# The newest so many trials say how good predictions are.
_RECENT = 15
# So many are compared with rules that learn from the trials before.
_MOST_COMPARED = 256
# Typical errors below this (a factor 1.65) do no harm, whatever a rule of thumb does; and what is
# added to the errors of both.
_HARMLESS_ERROR = 0.5
_DOUBT = 0.2
# What counts as the error where a prediction was out of reach.
_LARGE_ERROR = 3.0


@dataclass(frozen=True, eq=False)
class Observation:
    """What was predicted for a trial before it ran, and what was seen of it.

    Attributes:
        predicted:
            Logarithm of the predicted step at each of :data:`DEPTHS`, as simulated; NaN behind
            the end of the simulation. Shape ``(P,)``.
        expected:
            The same as corrected by what had been learned then.
        growth:
            Logarithm of the correction of the kernel that it was simulated with, at
            :data:`NODES`, shape ``(M,)``.
        covariates:
            Of the configuration, shape ``(F,)``; see :func:`covariates`.
        instability:
            Learning rate over the largest stable one, times what the kernel was predicted to have
            grown by, at each of :data:`DEPTHS`, shape ``(P,)``.
        effective_learning_rate:
            ``eta / (1 - m)``.
        lag:
            Steps by which momentum lags behind.
        observed:
            Logarithm of the step at which each of :data:`DEPTHS` was passed; NaN where not seen.
        errors:
            Its standard error.
        n_steps:
            Steps that the trial has taken.
        diverged:
            Whether its loss became infinite or NaN.
        batch_size:
            Of the configuration; zero where it is not known.
        seconds_per_step:
            Median over its steps; NaN where it was not measured.
    """

    predicted: NDArray[np.float64]
    expected: NDArray[np.float64]
    growth: NDArray[np.float64]
    covariates: NDArray[np.float64]
    instability: NDArray[np.float64]
    effective_learning_rate: float
    lag: float
    observed: NDArray[np.float64]
    errors: NDArray[np.float64]
    n_steps: float
    diverged: bool = False
    batch_size: int = 0
    seconds_per_step: float = math.nan

    def to_json(self) -> dict[str, Any]:
        """Return plain values that JSON takes; NaN as :obj:`None`."""
        return {name: _plain(value) for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Observation:
        """Read what :meth:`to_json` returned.

        Args:
            values:
                The plain values.

        Returns:
            The observation.

        Raises:
            ValueError:
                If they are no observation, or one of another version of this package.
        """
        sizes = {"growth": len(NODES), "covariates": N_COVARIATES}
        try:
            read = {name: _unplain(values[name]) for name in cls.__dataclass_fields__}
            for name, value in read.items():
                if isinstance(value, np.ndarray) and len(value) != sizes.get(name, len(DEPTHS)):
                    raise ValueError(f"{name} has {len(value)} values")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"These values are no observation: {error}.") from error
        return cls(**read)


@dataclass(frozen=True, eq=False)
class Calibration:
    """What observed trials say about a predictor. Nothing, by default.

    Attributes:
        weights:
            Posterior mean of ``u`` at :data:`NODES` and of the covariates' effects, ``(W,)``.
        covariance:
            Its covariance, ``(W, W)``.
        scale:
            Scale of the errors' variance; one before anything is observed.
        instability_scale:
            Scale of the variance that comes with instability, likewise.
        degrees_of_freedom:
            Of the predictive Student's t.
        n_observed:
            The number of trials behind it.
        rank_agreement:
            Kendall's tau of times as predicted before each trial and as observed; NaN for fewer
            than two trials.
        log_error:
            Root mean square of log(observed / predicted before the trial); NaN for no trials.
        baseline_error:
            The same of the better of two rules without a spectrum, ``c / eta_e`` and
            ``c / eta_e + m / (1 - m)``, with ``c`` from the trials before; NaN for fewer than two.
        compared_error:
            :attr:`log_error` over those trials that the rules can be compared on.
        divergence:
            From which learning rate on training does not recover.
    """

    weights: NDArray[np.float64]
    covariance: NDArray[np.float64]
    scale: float = 1.0
    instability_scale: float = 1.0
    degrees_of_freedom: float = _SCALE_WEIGHT
    n_observed: int = 0
    rank_agreement: float = math.nan
    log_error: float = math.nan
    baseline_error: float = math.nan
    compared_error: float = math.nan
    divergence: DivergenceLimit = field(default_factory=DivergenceLimit.of)

    @classmethod
    def none(cls) -> Calibration:
        """Return what is known before any trial. The simulation stands as it is."""
        _, covariance = _prior()
        return cls(np.zeros(len(covariance)), covariance)

    @property
    def log_growth(self) -> NDArray[np.float64]:
        """Logarithm of the correction of the kernel at :data:`NODES`, shape ``(M,)``."""
        return self.weights[: len(NODES)]

    @property
    def log_growth_sd(self) -> NDArray[np.float64]:
        """Its standard deviation, shape ``(M,)``."""
        return np.sqrt(np.diag(self.covariance)[: len(NODES)])

    @property
    def trust(self) -> float:
        """Share of the better trivial rule's squared error that predictions avoid, at most one.

        Held out: every trial was predicted before it was learned from. Negative where the rule is
        better. Errors of 20 % are added to both sides, so that it does not hang on a hair. NaN
        for fewer than three trials.
        """
        if self.n_observed < _MIN_OBSERVATIONS or math.isnan(self.baseline_error):
            return math.nan
        doubt = _DOUBT**2
        return 1.0 - (self.compared_error**2 + doubt) / (self.baseline_error**2 + doubt)

    @property
    def trusted(self) -> bool:
        """Whether predictions may steer a search.

        Unless five trials or more say that predictions are off by more than a factor 1.65, and
        that a trivial rule does clearly better (its squared error is less than two thirds), or not
        much worse while predictions do not even rank the trials (Kendall's tau below 0.2).
        """
        unranked = self.rank_agreement < _MIN_AGREEMENT
        worse = self.trust < (_CLEARLY if unranked else -_CLEARLY)
        return not (
            self.n_observed >= _MIN_DISTRUST and self.log_error > _HARMLESS_ERROR and worse
        )

    def correct(
        self,
        depths: NDArray[np.float64],
        log_steps: NDArray[np.float64],
        growth: NDArray[np.float64],
        covariates: NDArray[np.float64],
        instability: NDArray[np.float64],
        lag: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Correct predicted times.

        Args:
            depths:
                Rungs, ascending, shape ``(K, P)``.
            log_steps:
                Logarithm of the predicted step at each, as simulated, shape ``(K, P)``; NaN behind
                a curve's end.
            growth:
                Logarithm of the correction that they were simulated with, at :data:`NODES`,
                shape ``(M,)``.
            covariates:
                Shape ``(K, F)``.
            instability:
                See :class:`Observation`, shape ``(K, P)``.
            lag:
                Steps by which momentum lags behind, shape ``(K,)``.

        Returns:
            Logarithms of the corrected times and their standard deviation, both ``(K, P)``.
        """
        logs, slopes = _ladder(
            self.weights, depths, log_steps, growth[None, :], covariates, instability, lag
        )
        known = np.nan_to_num(slopes)
        variance = np.einsum("kpv,vw,kpw->kp", known, self.covariance, known)
        own = self.scale * (_TRIAL_SD**2 + _RUNG_SD**2)
        wild = self.instability_scale * _wildness(instability) ** 2
        return logs, np.sqrt(variance + own + wild)

    def remaining(
        self, running: Observation, depths: NDArray[np.float64], log_steps: NDArray[np.float64]
    ) -> tuple[float, float]:
        """Return how long a running trial still takes to the last rung, given its own curve.

        Its errors so far are taken for the error common to its rungs, as far as they are larger
        than what single rungs scatter by; what is left of the way is stretched by it.

        Args:
            running:
                What was predicted for it and seen of it so far.
            depths:
                Rungs as in :meth:`correct`, for this trial alone, shape ``(P,)``: the first ones
                are :data:`DEPTHS`, the last is the target.
            log_steps:
                As simulated with :attr:`Observation.growth`, shape ``(P,)``.

        Returns:
            Steps from :attr:`Observation.n_steps` on, and the standard deviation of their
            logarithm. Infinite where the target is out of reach.
        """
        logs, sd = self.correct(
            depths[None],
            log_steps[None],
            running.growth,
            running.covariates[None],
            np.interp(depths, DEPTHS, running.instability)[None],
            np.array([running.lag]),
        )
        goal, spread = float(logs[0, -1]), float(sd[0, -1])
        if not math.isfinite(goal):
            return math.inf, spread
        stacked = _Trials.of([running])
        # A rung that should have been passed by now has not been: it is later.
        observed, errors = stacked.with_bounds(logs[:, : len(DEPTHS)])
        known = np.flatnonzero(np.isfinite(observed[0]) & np.isfinite(logs[0, : len(DEPTHS)]))
        known = known[DEPTHS[known] < depths[-1]]
        if not len(known):
            return max(math.exp(goal) - running.n_steps, 1.0), spread
        j = known[-1]
        seen = np.zeros((1, len(DEPTHS)), dtype=bool)
        seen[0, known] = True
        scales = self.scale, self.instability_scale
        inverse = stacked.precision(errors, seen, scales)[0]
        common = stacked.common(scales)[0]
        away = np.where(seen[0], observed[0] - logs[0, : len(DEPTHS)], 0.0)
        # The correction itself is uncertain in the same way for all rungs.
        gain = common[j] @ inverse
        error = float(gain @ away)
        if away[j] > _UNEXPLAINED * sd[0, j]:
            # So late is nothing that the model knows of: the trial has a pace of its own.
            error = float(away[j])
        left = math.exp(goal) - math.exp(float(logs[0, j]))
        passed = math.exp(float(observed[0, j]))
        rest = passed + left * math.exp(error) - running.n_steps
        shrunk = max(float(common[j, j] - gain @ common[j]), 0.0)
        total = max(spread**2 - float(common[j, j]) + shrunk, (0.5 * spread) ** 2)
        return max(rest, 1.0), math.sqrt(total)

    def expected(
        self,
        depths: NDArray[np.float64],
        log_steps: NDArray[np.float64],
        growth: NDArray[np.float64],
        covariates: NDArray[np.float64],
        instability: NDArray[np.float64],
        lag: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Correct predicted times without their deviation: for many at once.

        Args:
            depths:
                As in :meth:`correct`, or of shape ``(1, P)``.
            log_steps:
                As in :meth:`correct`, like the others.
            growth:
                Shape ``(M,)``.
            covariates:
                Shape ``(K, F)``.
            instability:
                Shape ``(K, P)``.
            lag:
                Shape ``(K,)``.

        Returns:
            Logarithms of the corrected times, ``(K, P)``.
        """
        paths = _Paths.of(
            self.weights, depths, log_steps, growth[None, :], covariates, instability, lag
        )
        return np.log(paths.times()[0])


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


def calibrate(observations: Sequence[Observation]) -> Calibration:
    """Learn from trials.

    Args:
        observations:
            Trials, oldest first. Those of which nothing was seen are left out, and only the newest
            128 shape the correction.

    Returns:
        The posterior, and how good the predictions were that were made before each trial.
    """
    every = [o for o in observations if _n_seen(o) > 0]
    usable = every[-_MOST_TRIALS:]
    mean, covariance = _prior()
    divergence = _divergence(observations)
    if not usable:
        return replace(Calibration.none(), divergence=divergence)
    trials = _Trials.of(usable)
    precision = np.linalg.inv(covariance)
    weights = mean
    importance = np.ones(len(usable))
    scales = (1.0, 1.0)
    logs, slopes = trials.ladder(weights)
    for _ in range(_ROUNDS):
        observed, errors = trials.with_bounds(logs)
        seen = np.isfinite(observed) & np.isfinite(logs)
        inverse = trials.precision(errors, seen, scales)
        x = np.where(seen[:, :, None], slopes, 0.0)
        y = np.where(seen, observed - logs, 0.0) + x @ weights
        weighted = np.einsum("n,npq,nqw->npw", importance, inverse, x)
        posterior = precision + np.einsum("npv,npw->vw", x, weighted)
        weights = np.linalg.solve(
            posterior, precision @ mean + np.einsum("np,npw->w", y, weighted)
        )
        logs, slopes = trials.ladder(weights)
        away = np.where(seen, observed - logs, 0.0)
        own = np.where(np.isfinite(trials.observed), away, 0.0)
        squares = trials.ratios(own, errors, seen, scales)
        importance = (_ROBUSTNESS + 1.0) / (_ROBUSTNESS + squares)
        scales = trials.scales(own, errors, seen, importance)
    return Calibration(
        weights,
        np.linalg.inv(posterior),
        *scales,
        _SCALE_WEIGHT + len(usable),
        len(every),
        *_held_out(every[-_MOST_COMPARED:]),
        divergence,
    )


def _divergence(observations: Sequence[Observation]) -> DivergenceLimit:
    """A trial diverged, or it passed a rung; one that did neither tells nothing."""
    telling = [o for o in observations if o.diverged or np.isfinite(o.observed).any()]
    # At the first rung the kernel has hardly grown.
    stability = [o.instability[0] for o in telling]
    return DivergenceLimit.of(stability, [o.diverged for o in telling])


@dataclass(frozen=True, eq=False)
class _Trials:
    """The observations, stacked."""

    predicted: NDArray[np.float64]
    growth: NDArray[np.float64]
    covariates: NDArray[np.float64]
    instability: NDArray[np.float64]
    lag: NDArray[np.float64]
    observed: NDArray[np.float64]
    errors: NDArray[np.float64]
    bound: NDArray[np.float64]
    told: NDArray[np.bool_]

    @classmethod
    def of(cls, observations: Sequence[Observation]) -> _Trials:
        return cls(
            np.array([_extended(o.predicted) for o in observations]),
            np.array([o.growth for o in observations]),
            np.array([o.covariates for o in observations]),
            np.array([o.instability for o in observations]),
            np.array([o.lag for o in observations]),
            # What nothing was predicted for, behind the target, tells nothing.
            np.array(
                [np.where(np.isfinite(o.predicted), o.observed, np.nan) for o in observations]
            ),
            np.array([o.errors for o in observations]),
            # Nobody knows how late a trial would have been that never came back.
            np.array([-math.inf if o.diverged else math.log(o.n_steps) for o in observations]),
            np.isfinite([o.predicted for o in observations]),
        )

    def ladder(
        self, weights: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return _ladder(
            weights,
            DEPTHS[None, :],
            self.predicted,
            self.growth,
            self.covariates,
            self.instability,
            self.lag,
        )

    def with_bounds(
        self, logs: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Observed times and errors; where a trial has not got as far as expected, its end."""
        observed, errors = self.observed.copy(), self.errors.copy()
        deepest = np.array([_deepest(row) for row in observed])
        rows = np.flatnonzero(deepest + 1 < observed.shape[1])
        following = deepest[rows] + 1
        late = self.told[rows, following] & (logs[rows, following] < self.bound[rows])
        rows, following = rows[late], following[late]
        observed[rows, following] = self.bound[rows]
        errors[rows, following] = _CENSORED_ERROR
        return observed, errors

    def precision(
        self,
        errors: NDArray[np.float64],
        seen: NDArray[np.bool_],
        scales: tuple[float, float],
    ) -> NDArray[np.float64]:
        """Inverse covariance of the errors of each trial; zero where nothing was seen."""
        both = seen[:, :, None] & seen[:, None, :]
        common = self.common(scales)
        own = np.where(seen, np.nan_to_num(errors) ** 2 + scales[0] * _RUNG_SD**2, 1.0)
        covariance = np.where(both, common, 0.0) + own[:, :, None] * np.eye(len(DEPTHS))
        return np.where(both, np.linalg.inv(covariance), 0.0)

    def common(self, scales: tuple[float, float]) -> NDArray[np.float64]:
        """Covariance of what the rungs of a trial have in common, ``(n, P, P)``."""
        apart = (DEPTHS[:, None] - DEPTHS[None, :]) / _TRIAL_LENGTH
        wild = _wildness(self.instability)
        # What comes with instability stays with the trial from then on.
        lasting = np.minimum(wild[:, :, None], wild[:, None, :]) ** 2
        return np.asarray(scales[0] * _TRIAL_SD**2 * np.exp(-0.5 * apart**2) + scales[1] * lasting)

    def ratios(
        self,
        away: NDArray[np.float64],
        errors: NDArray[np.float64],
        seen: NDArray[np.bool_],
        scales: tuple[float, float],
    ) -> NDArray[np.float64]:
        """Mean squared error of each trial over what is expected of it, ``(n,)``."""
        calm = scales[0] * (_TRIAL_SD**2 + _RUNG_SD**2)
        whole = scales[1] * _wildness(self.instability) ** 2 + calm + np.nan_to_num(errors) ** 2
        share = seen / np.maximum(seen.sum(axis=1), 1)[:, None]
        return np.asarray((share * away**2 / whole).sum(axis=1))

    def scales(
        self,
        away: NDArray[np.float64],
        errors: NDArray[np.float64],
        seen: NDArray[np.bool_],
        importance: NDArray[np.float64],
    ) -> tuple[float, float]:
        """Scales of the errors' variances: of calm trials, and of what instability adds."""
        wild = _wildness(self.instability) ** 2
        whole = wild + _TRIAL_SD**2 + _RUNG_SD**2 + np.nan_to_num(errors) ** 2
        share = seen / np.maximum(seen.sum(axis=1), 1)[:, None]
        # A trial counts for the one or the other by what its errors are expected to come from.
        unstable = (share * wild / whole).sum(axis=1)
        ratio = self.ratios(away, errors, seen, (1.0, 1.0))
        stable = importance * (1.0 - unstable)
        one = (_SCALE_WEIGHT + (stable * ratio).sum()) / (_SCALE_WEIGHT + stable.sum())
        two = (_SCALE_WEIGHT + (unstable * ratio).sum()) / (_SCALE_WEIGHT + unstable.sum())
        return float(one), float(two)


def _ladder(
    weights: NDArray[np.float64],
    depths: NDArray[np.float64],
    log_steps: NDArray[np.float64],
    growth: NDArray[np.float64],
    x: NDArray[np.float64],
    instability: NDArray[np.float64],
    lag: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Corrected logarithmic times, ``(K, P)``, and their derivatives by the weights."""
    paths = _Paths.of(weights, depths, log_steps, growth, x, instability, lag)
    times, slopes = paths.times(derivatives=True)
    return np.log(times), slopes / times[:, :, None]


@dataclass(frozen=True, eq=False)
class _Paths:
    """Simulated paths from rung to rung, and how much faster they are taken.

    Attributes:
        before:
            Simulated steps between the rungs, ``(K, P)``.
        roots:
            Square roots of the growth that was simulated with, up to a factor, ``(K, P)``.
        faster:
            The same of the corrected growth.
        slopes:
            Derivatives of the logarithm of the corrected growth by the weights, ``(K, P, W)``.
        lag:
            Shape ``(K,)``.
    """

    before: NDArray[np.float64]
    roots: NDArray[np.float64]
    faster: NDArray[np.float64]
    slopes: NDArray[np.float64]
    lag: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        weights: NDArray[np.float64],
        depths: NDArray[np.float64],
        log_steps: NDArray[np.float64],
        growth: NDArray[np.float64],
        x: NDArray[np.float64],
        instability: NDArray[np.float64],
        lag: NDArray[np.float64],
    ) -> _Paths:
        steps = np.exp(log_steps)
        before = np.maximum(np.diff(steps, axis=1, prepend=0.0), 1e-6 * steps)
        middle = 0.5 * (
            depths + np.concatenate([np.zeros_like(depths[:, :1]), depths[:, :-1]], axis=1)
        )
        hats = _hats(middle)
        shape = steps.shape
        grown = np.broadcast_to(instability / instability[:, :1], shape)
        # The kernel stops growing at the edge of stability.
        bounded = np.broadcast_to(instability / (1.0 + instability / _EDGE), shape)
        slopes = np.concatenate(
            [
                np.broadcast_to(hats, (*shape, len(NODES))),
                np.log1p(x[:, None, :] * (bounded / instability[:, :1])[:, :, None]),
                np.log1p(bounded / _SHOWS)[:, :, None],
            ],
            axis=2,
        )
        simulated = np.einsum("kpm,km->kp", hats, growth)
        log_speed = slopes @ weights - simulated
        # Any multiple of the growth does: it cancels.
        roots = np.sqrt(grown) * np.exp(0.5 * simulated)
        faster = roots * np.exp(0.5 * np.clip(log_speed, -_MOST_LOG, _MOST_LOG))
        slopes = np.where((np.abs(log_speed) < _MOST_LOG)[:, :, None], slopes, 0.0)
        return cls(before, roots, faster, slopes, np.maximum(lag, 1e-9))

    def times(
        self, *, derivatives: bool = False
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Corrected times at the rungs, and their derivatives by the weights (or zeros)."""
        lag, shape = self.lag, self.faster.shape
        speed, new_speed = np.zeros_like(lag), np.zeros_like(lag)
        times, slopes = np.empty(shape), np.zeros((*shape, self.slopes.shape[2]))
        speed_slope = np.zeros((shape[0], self.slopes.shape[2]))
        for j in range(shape[1]):
            root, new_root, t = self.roots[:, j], self.faster[:, j], self.before[:, j]
            decay = np.exp(-t / lag)
            gone = root * (root * t - lag * (root - speed) * (1.0 - decay))
            speed = root - (root - speed) * decay
            times[:, j] = t = _passed(gone, new_root, new_speed, lag)
            decay, settled = np.exp(-t / lag), -np.expm1(-t / lag)
            reached = new_speed + (new_root - new_speed) * settled
            if derivatives:
                # Implicit: what solves ``_passed`` keeps solving it as root and speed change.
                by_root = gone / new_root + new_root * (t - lag * settled)
                by_speed = new_root * lag * settled
                root_slope = 0.5 * new_root[:, None] * self.slopes[:, j]
                slopes[:, j] = (
                    by_root[:, None] * root_slope + by_speed[:, None] * speed_slope
                ) / -(new_root * reached)[:, None]
                speed_slope = (
                    root_slope * settled[:, None]
                    + speed_slope * decay[:, None]
                    + ((new_root - new_speed) * decay / lag)[:, None] * slopes[:, j]
                )
            new_speed = reached
        return np.cumsum(times, axis=1), np.cumsum(slopes, axis=1)


def _passed(
    gone: NDArray[np.float64],
    root: NDArray[np.float64],
    speed: NDArray[np.float64],
    lag: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Time that a heavy ball takes for an intrinsic time.

    Solves ``root (root t - lag (root - speed) (1 - exp(-t / lag))) = gone`` by Newton's method,
    from the side on which it cannot overshoot.
    """
    late = gone / root**2 + lag
    t = np.where(
        speed < root, np.minimum(late, np.sqrt(2.0 * lag * gone) / root + gone / root**2), 0.0
    )
    t = np.where(speed < root, np.maximum(t, 1e-12), gone / np.maximum(root * speed, 1e-300))
    for _ in range(_NEWTON_STEPS):
        # One minus the decay, exactly where it is tiny.
        settled = -np.expm1(-t / lag)
        away = root * (root * t - lag * (root - speed) * settled) - gone
        t = np.maximum(t - away / (root * (speed + (root - speed) * settled)), 1e-3 * t)
    return t


def _hats(depths: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear interpolation between the nodes, as weights: ``(..., M)``. Constant beyond them."""
    place = np.interp(np.nan_to_num(depths), NODES, np.arange(len(NODES)))
    hats: NDArray[np.float64] = np.maximum(
        0.0, 1.0 - np.abs(place[..., None] - np.arange(len(NODES)))
    )
    return hats


@lru_cache(maxsize=1)
def _prior() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Prior mean and covariance of the weights: an integrated Gaussian process, and effects."""
    grid = np.linspace(0.0, NODES[-1], 241)
    apart = (grid[:, None] - grid[None, :]) / _SLOPE_LENGTH
    width = grid[1] - grid[0]
    summed = np.tril(np.full((len(grid), len(grid)), width))
    summed[:, 0] *= 0.5
    summed -= np.diag(np.full(len(grid), 0.5 * width))
    integrated = summed @ (_SLOPE_SD**2 * np.exp(-0.5 * apart**2)) @ summed.T
    at = np.array([np.interp(NODES, grid, row) for row in integrated])
    at = np.array([np.interp(NODES, grid, row) for row in at.T])
    whole = np.zeros((len(NODES) + N_COVARIATES + 1,) * 2)
    whole[: len(NODES), : len(NODES)] = at + _START_SD**2 + 1e-8 * np.eye(len(NODES))
    whole[len(NODES) :, len(NODES) :] = np.diag(np.square(_EFFECT_SDS))
    mean = np.append(np.zeros(len(NODES)), _EFFECTS)
    return mean, whole


def _wildness(instability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard deviation that comes with instability; what was unstable once stays so."""
    lasting = np.log1p(np.fmax.accumulate(instability, axis=-1) / _SCATTERS)
    share = instability[..., :1] / (instability[..., :1] + _CATAPULTS)
    return _INSTABILITY_SD * lasting + _CATAPULT_SD * share**3


def _extended(log_steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Go on behind the end of a simulation as it was going."""
    known = np.flatnonzero(np.isfinite(log_steps))
    last = known[-1]
    slope = 0.5
    if len(known) > 1:
        run = DEPTHS[last] - DEPTHS[known[-2]]
        slope = max(slope, (log_steps[last] - log_steps[known[-2]]) / run)
    behind = np.arange(len(log_steps)) > last
    return np.where(behind, log_steps[last] + slope * (DEPTHS - DEPTHS[last]), log_steps)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return round(float(value), 6) if math.isfinite(value) else None
    return bool(value) if isinstance(value, bool | np.bool_) else int(value)


def _unplain(value: Any) -> Any:
    if isinstance(value, list):
        return np.array([math.nan if v is None else v for v in value], dtype=np.float64)
    return math.nan if value is None else value


def _deepest(row: NDArray[np.float64]) -> int:
    known = np.flatnonzero(np.isfinite(row))
    return int(known[-1]) if len(known) else -1


def _n_seen(observation: Observation) -> int:
    if not np.isfinite(observation.predicted).any() or observation.n_steps < 1:
        return 0
    return int(np.isfinite(observation.observed).sum())


def _held_out(observations: Sequence[Observation]) -> tuple[float, float, float, float]:
    """Rank agreement and errors of what was predicted before each trial, and of trivial rules."""
    observed = np.array([o.observed for o in observations])
    expected = np.array([o.expected for o in observations])
    rates = np.log([[o.effective_learning_rate] for o in observations])
    lags = np.array([[o.lag] for o in observations])
    # Every trial counts once, with the deepest rung that it was seen on.
    told = np.where(np.isfinite(expected), observed, np.nan)
    told = np.where(np.isfinite(told).any(axis=1, keepdims=True), told, observed)
    chosen = (np.arange(len(observed)), np.array([_deepest(row) for row in told]))
    errors = np.where(np.isfinite(expected), observed - expected, _LARGE_ERROR)[chosen]
    plain = _mean_before(observed + rates) - rates
    intrinsic = _mean_before(np.log(np.maximum(np.exp(observed) - lags, 1.0)) + rates)
    shifted = np.log(np.exp(intrinsic - rates) + lags)
    rules = np.stack([(observed - plain)[chosen], (observed - shifted)[chosen]])
    # Old errors are forgotten: what was learned since may have mended them.
    recent = np.arange(len(observed)) >= len(observed) - _RECENT
    compared = np.isfinite(rules).all(axis=0) & recent
    squared = np.square(rules[:, compared]).mean(axis=1) if compared.any() else np.array([np.nan])
    # Times are ranked at one depth: the deepest that at least half of the trials have passed.
    common = _deepest(np.where(2 * np.isfinite(told).sum(axis=0) >= len(observed), 1, np.nan))
    there = np.isfinite(observed[:, common]) & recent
    late = np.where(np.isfinite(expected), expected, np.inf)
    return (
        _kendall(late[there, common], observed[there, common]),
        float(np.sqrt(np.square(errors[recent]).mean())),
        float(np.sqrt(squared.min())),
        float(np.sqrt(np.square(errors[compared]).mean())) if compared.any() else math.nan,
    )


def _mean_before(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the rows above each, of what is not NaN."""
    known = np.isfinite(values)
    total = np.cumsum(np.where(known, values, 0.0), axis=0) - np.where(known, values, 0.0)
    count = np.cumsum(known, axis=0) - known
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _kendall(first: ArrayLike, second: ArrayLike) -> float:
    if np.size(first) < 2:
        return math.nan
    from scipy.stats import kendalltau

    # Ranks, because the statistic does not take infinities.
    tau = kendalltau(
        np.unique(first, return_inverse=True)[1], np.unique(second, return_inverse=True)[1]
    ).statistic
    # Without any difference in the predictions there is no ranking, hence no agreement.
    return 0.0 if math.isnan(tau) else float(tau)
