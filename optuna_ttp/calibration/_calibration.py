"""What observed trials say about a predictor."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
import math

import numpy as np
from numpy.typing import NDArray

from optuna_ttp.calibration._divergence import DivergenceLimit
from optuna_ttp.calibration._errors import failure_limit
from optuna_ttp.calibration._errors import LEVEL_SD
from optuna_ttp.calibration._errors import SCALE_WEIGHT
from optuna_ttp.calibration._errors import TRIAL_SD
from optuna_ttp.calibration._errors import wildness
from optuna_ttp.calibration._first_passages import SimulatedFirstPassages
from optuna_ttp.calibration._loss_levels import DEPTHS
from optuna_ttp.calibration._loss_levels import KNOTS
from optuna_ttp.calibration._observation import Observation
from optuna_ttp.calibration._paths import corrected
from optuna_ttp.calibration._paths import Paths
from optuna_ttp.calibration._prior import prior
from optuna_ttp.calibration._prior_scale import PriorScale
from optuna_ttp.calibration._trials import Trials


# No error of the model explains why a running trial is later than so many standard deviations.
_UNEXPLAINED = 4.0
# Compared with trivial rules from so many trials on, and how much better these must be.
_MIN_OBSERVATIONS = 3
_MIN_DISTRUST = 5
_CLEARLY = 0.5
_MIN_AGREEMENT = 0.2
# Typical errors below this (a factor 1.65) do no harm, whatever a rule of thumb does; and what is
# added to the errors of both.
_HARMLESS_ERROR = 0.5
_PRIOR_SCALE = 0.2
# Typical errors above this (a factor e) that are also so much worse than a rule's: three trials
# are enough. Of the recorded runs in benchmarks/accuracy one order of 200 looks like that after
# three where the spectrum is right, six of ten where its eigenvectors are shuffled.
_GROSS_ERROR = 1.0
_GROSSLY = -1.0
# One trial that is far off, or trials near the edge of stability alone, say little about all
# others: the rule's advantage must be above its own standard deviation, and what is compared
# weigh as much as half a calm trial, where errors are not gross. Without these two the right
# spectrum of the residual net in benchmarks/accuracy was distrusted after five trials in 24 of 100
# orders, with them in six, and in no search of benchmarks/search (40 looked at), where shuffled
# predictions are found out nearly as often.
_LEAST_ADVANTAGE = 1.05
_LEAST_COMPARED = 0.5
# Or as much as this: of five trials one pair at most may be in order (by chance in 4 %).
_BACKWARDS = -0.75


# A correction of the first steps, where the spectrum is exact, that is too large for its own: as a
# logarithm, and in standard deviations.
_START = 0.4
_START_OFF = 0.25
_START_ERRORS = 3.0
_START_CALM = 0.25
_START_GROSSLY = math.log(4.0)


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """What observed trials say about a predictor. Nothing, by default.

    Attributes:
        weights:
            Posterior mean of ``u`` at :data:`KNOTS` and of the covariates' effects, ``(W,)``.
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
            Root mean square of log(observed / predicted before the trial), where trials near the
            edge of stability weigh less; NaN for no trials.
        baseline_error:
            The same of the better of two rules without a spectrum, ``c / eta_e`` and
            ``c / eta_e + m / (1 - m)``, with ``c`` from the trials before; NaN for fewer than two.
        compared_error:
            :attr:`log_error` over those trials that the rules can be compared on.
        n_compared:
            What those trials weigh: one for each that is far from the edge of stability.
        superiority:
            The rule's advantage, as a sum of squared errors, over its standard deviation.
        calm_start:
            Logarithm of how much faster than simulated trials far from the edge of stability
            began; NaN where there are none.
        divergence:
            From which learning rate on training does not recover.
        failure:
            From which learning rate on trials do not do as predicted: they diverge, or take more
            than twice as long.
    """

    weights: NDArray[np.float64]
    covariance: NDArray[np.float64]
    scale: float = 1.0
    instability_scale: float = 1.0
    degrees_of_freedom: float = SCALE_WEIGHT
    n_observed: int = 0
    rank_agreement: float = math.nan
    log_error: float = math.nan
    baseline_error: float = math.nan
    compared_error: float = math.nan
    n_compared: float = 0.0
    superiority: float = 0.0
    calm_start: float = math.nan
    divergence: DivergenceLimit = field(default_factory=DivergenceLimit.of)
    failure: DivergenceLimit = field(default_factory=failure_limit)

    @classmethod
    def none(cls, prior_scale: PriorScale | None = None) -> Calibration:
        """Return what is known before any trial. The simulation stands as it is.

        Args:
            prior_scale:
                How far the network may be from its linearisation. That of a usual one by default.

        Returns:
            The calibration.
        """
        prior_scale = prior_scale or PriorScale()
        _, covariance = prior(prior_scale)
        return cls(np.zeros(len(covariance)), covariance, *prior_scale.scales)

    def __repr__(self) -> str:
        return f"Calibration({self})"

    def __str__(self) -> str:
        if not self.n_observed:
            return "nothing learned from trials yet"
        text = f"learned from {self.n_observed} trial{'s' if self.n_observed > 1 else ''}"
        if not math.isnan(self.log_error):
            factor = math.exp(self.log_error)
            text += f", typically off by a factor of {factor:.2f} when it was predicted"
        if not math.isnan(self.trust):
            text += (
                f" ({math.exp(self.compared_error):.2f} where a rule of thumb, learned from the "
                f"same trials, was by {math.exp(self.baseline_error):.2f})"
            )
        if not math.isnan(self.rank_agreement):
            text += f", Kendall's tau {self.rank_agreement:.2f}"
        if not self.starts_as_predicted:
            text += f"; training begins {self.start_factor:.2g} times as fast as predicted"
        return text + ("" if self.trusted else "; not trusted, so that they steer nothing")

    @property
    def log_growth(self) -> NDArray[np.float64]:
        """Logarithm of the correction of the kernel at :data:`KNOTS`, shape ``(M,)``."""
        return self.weights[: len(KNOTS)]

    @property
    def log_growth_sd(self) -> NDArray[np.float64]:
        """Its standard deviation, shape ``(M,)``."""
        return np.sqrt(np.diag(self.covariance)[: len(KNOTS)])

    @property
    def trust(self) -> float:
        """Share of the better trivial rule's squared error that predictions avoid, at most one.

        Held out: every trial was predicted before it was learned from. Negative where the rule is
        better. Trials near the edge of stability, where no spectrum tells much, weigh less. Errors
        of 20 % are added to both sides, so that it does not hang on a hair. NaN for fewer than
        three trials.
        """
        if self.n_observed < _MIN_OBSERVATIONS or math.isnan(self.baseline_error):
            return math.nan
        prior_scale = _PRIOR_SCALE**2
        return 1.0 - (self.compared_error**2 + prior_scale) / (
            self.baseline_error**2 + prior_scale
        )

    @property
    def trusted(self) -> bool:
        """Whether predictions may steer a search.

        They may not where they are off by more than a factor 1.65 and a trivial rule's squared
        error is less, or less than twice as much, where they are off by more than a factor e or
        do not rank the trials (Kendall's tau below 0.2). Five trials must say so, or three that
        are off by more than e and have twice the rule's squared error; and surely: that they are
        off by e and unranked, or ranked backwards (a tau of at most -0.75), or by a difference
        above its own standard deviation. The last two not on the word of one trial, nor of trials
        near the edge of stability alone.
        """
        gross = self.log_error > _GROSS_ERROR
        unranked = self.rank_agreement < _MIN_AGREEMENT
        calm = self.n_compared >= _LEAST_COMPARED
        sure = calm and self.superiority >= _LEAST_ADVANTAGE
        if gross and (unranked or sure) and self.trust < _GROSSLY:
            return False
        if self.n_observed < _MIN_DISTRUST or not self.log_error > _HARMLESS_ERROR:
            return True
        backwards = calm and self.rank_agreement <= _BACKWARDS
        if not (sure or backwards or (gross and unranked)):
            return True
        return not self.trust < (_CLEARLY if unranked or gross else 0.0)

    @property
    def fault(self) -> str:
        """What is wrong with predictions that are not trusted, in words."""
        if self.trust < 0.0:
            return "worse than a rule of thumb"
        return "far off and in no order"

    @property
    def start_factor(self) -> float:
        """How many times as fast as predicted training is in its first steps.

        The network is still the pretrained one there, so with its own spectrum this is close to
        one, however the kernel grows later.
        """
        return math.exp(self.log_growth[0])

    @property
    def starts_as_predicted(self) -> bool:
        """Whether that is so, as far as three trials or more can tell.

        Not where it is more than half as much again, or two thirds, and three standard deviations
        away, predictions were typically off by more than 28 %, and trials far from the edge of
        stability say so, too, if it is less than four times: fast ones say little about theirs.
        With the right spectra of the recorded runs in benchmarks/accuracy it was never more than
        1.42 times away after one, three or five trials; with those of shuffled eigenvectors and
        other data sets, as far as predictions were still trusted, mostly 1.2 to 1.8 times.
        """
        away = abs(float(self.log_growth[0]))
        known = away > _START_ERRORS * float(self.log_growth_sd[0])
        off = self.n_observed >= _MIN_OBSERVATIONS and self.log_error > _START_OFF
        # Not on the word of large steps alone.
        calm = self.calm_start * math.copysign(1.0, float(self.log_growth[0])) > _START_CALM
        return not (off and away > _START and known and (calm or away > _START_GROSSLY))

    def correct(
        self, passages: SimulatedFirstPassages
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Correct predicted times.

        Args:
            passages:
                As simulated.

        Returns:
            Logarithms of the corrected times and their standard deviation, both ``(K, P)``.
        """
        logs, slopes = corrected(passages, self.weights)
        known = np.nan_to_num(slopes)
        variance = np.einsum("kpv,vw,kpw->kp", known, self.covariance, known)
        own = self.scale * (TRIAL_SD**2 + LEVEL_SD**2)
        wild = self.instability_scale * wildness(passages.instability) ** 2
        return logs, np.sqrt(variance + own + wild)

    def remaining(
        self, running: Observation, depths: NDArray[np.float64], log_steps: NDArray[np.float64]
    ) -> tuple[float, float]:
        """Return how long a running trial still takes to the last level, given its own curve.

        Its errors so far are taken for the error common to its levels, as far as they are larger
        than what single levels scatter by; what is left of the way is stretched by what of it is
        expected to last until the target. A trial that is later than can be explained is taken to
        lose as many steps again.

        Args:
            running:
                What was predicted for it and seen of it so far.
            depths:
                Loss levels, ascending, for this trial alone, shape ``(P,)``: the first ones
                are :data:`DEPTHS`, the last is the target.
            log_steps:
                As simulated with :attr:`Observation.growth`, shape ``(P,)``.

        Returns:
            Steps from :attr:`Observation.n_steps` on, and the standard deviation of their
            logarithm. Infinite where the target is out of reach.
        """
        logs, sd = self.correct(
            SimulatedFirstPassages(
                depths[None],
                log_steps[None],
                running.growth[None],
                running.covariates[None],
                np.interp(depths, DEPTHS, running.instability)[None],
                np.array([running.lag]),
            )
        )
        goal, spread = float(logs[0, -1]), float(sd[0, -1])
        if not math.isfinite(goal):
            return math.inf, spread
        stacked = Trials.of([running])
        # A level that should have been passed by now has not been: it is later.
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
        # The correction itself is uncertain in the same way for all levels.
        gain = common[j] @ inverse
        error = float(gain @ away)
        expected = math.exp(float(logs[0, j]))
        passed = math.exp(float(observed[0, j]))
        left = math.exp(goal) - expected
        # At the target the errors are correlated as far as the model says.
        ahead = np.array([np.interp(depths[-1], DEPTHS, column) for column in common.T])
        there = float((ahead @ inverse) @ away)
        total_steps = expected * math.exp(error) + left * math.exp(there)
        late = float(away[j])
        if late > _UNEXPLAINED * sd[0, j]:
            # So late is nothing that the model knows of. What has cost so many steps will cost as
            # many again, but no more than a pace of the trial's own would.
            lost = min(passed - expected, left * math.expm1(late))
            total_steps = max(total_steps, passed + left + lost)
        rest = total_steps - running.n_steps
        shrunk = max(float(common[j, j] - gain @ common[j]), 0.0)
        total = max(spread**2 - float(common[j, j]) + shrunk, (0.5 * spread) ** 2)
        return max(rest, 1.0), math.sqrt(total)

    def expected(self, passages: SimulatedFirstPassages) -> NDArray[np.float64]:
        """Correct predicted times without their deviation: for many at once.

        Args:
            passages:
                As simulated.

        Returns:
            Logarithms of the corrected times, ``(K, P)``.
        """
        return np.log(Paths.of(passages, self.weights).times()[0])
