"""What observed trials say about a predictor."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
import math

import numpy as np
from numpy.typing import NDArray

from optuna_ttp.calibration._divergence import DivergenceLimit
from optuna_ttp.calibration._first_passages import SimulatedFirstPassages
from optuna_ttp.calibration._loss_levels import DEPTHS
from optuna_ttp.calibration._loss_levels import KNOTS
from optuna_ttp.calibration._observation import Observation
from optuna_ttp.calibration._paths import corrected
from optuna_ttp.calibration._paths import Paths
from optuna_ttp.calibration._prior import prior
from optuna_ttp.calibration._prior import PriorScale
from optuna_ttp.calibration._rules import CalibrationRules
from optuna_ttp.calibration._rules import RULES
from optuna_ttp.calibration._trials import Trials
from optuna_ttp.calibration._trials import wildness


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """What observed trials say about a predictor.

    Attributes:
        weights:
            Posterior mean of ``u`` at :data:`KNOTS` and of the covariates' effects, ``(W,)``.
        covariance:
            Posterior covariance of the weights, ``(W, W)``.
        scale:
            Scale of the errors' variance. One by default.
        instability_scale:
            Scale of the variance that comes with instability. One by default.
        degrees_of_freedom:
            Those of the predictive Student's t. Two by default.
        n_observed:
            The number of trials that were learned from. Zero by default.
        rank_agreement:
            Kendall's tau of times as predicted before each trial and as observed; NaN for fewer
            than two trials.
        log_error:
            Root mean square of log(observed / predicted before the trial), where trials near the
            edge of stability weigh less; NaN for no trials.
        baseline_error:
            The same error of the better of two rules without a spectrum, ``c / eta_e`` and
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
        rules:
            The tuned numbers that it was learned with. Those of the package by default.
    """

    weights: NDArray[np.float64]
    covariance: NDArray[np.float64]
    scale: float = 1.0
    instability_scale: float = 1.0
    degrees_of_freedom: float = RULES.errors.scale_weight
    n_observed: int = 0
    rank_agreement: float = math.nan
    log_error: float = math.nan
    baseline_error: float = math.nan
    compared_error: float = math.nan
    n_compared: float = 0.0
    superiority: float = 0.0
    calm_start: float = math.nan
    divergence: DivergenceLimit = field(default_factory=DivergenceLimit.of)
    failure: DivergenceLimit = field(
        default_factory=lambda: DivergenceLimit.of(rules=RULES.failure)
    )
    rules: CalibrationRules = RULES

    @classmethod
    def none(
        cls, prior_scale: PriorScale | None = None, rules: CalibrationRules = RULES
    ) -> Calibration:
        """Return what is known before any trial: simulated times are not corrected.

        Args:
            prior_scale:
                How far the network may be from its linearisation. That of a usual one by default.
            rules:
                The tuned numbers to learn with. Those of the package by default.

        Returns:
            The calibration.
        """
        prior_scale = prior_scale or PriorScale()
        _, covariance = prior(prior_scale, rules.growth_prior)
        return cls(
            np.zeros(len(covariance)),
            covariance,
            *prior_scale.scales,
            degrees_of_freedom=rules.errors.scale_weight,
            divergence=DivergenceLimit.of(rules=rules.divergence),
            failure=DivergenceLimit.of(rules=rules.failure),
            rules=rules,
        )

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
        return text + ("" if self.trusted else "; not trusted, so that they are ignored")

    @property
    def log_growth(self) -> NDArray[np.float64]:
        """Logarithm of the correction of the kernel at :data:`KNOTS`, shape ``(M,)``."""
        return self.weights[: len(KNOTS)]

    @property
    def log_growth_sd(self) -> NDArray[np.float64]:
        """Standard deviation of :attr:`log_growth`, shape ``(M,)``."""
        return np.sqrt(np.diag(self.covariance)[: len(KNOTS)])

    @property
    def trust(self) -> float:
        """Share of the better trivial rule's squared error that predictions avoid, at most one.

        Every trial was predicted before it was learned from. Negative where the rule is better.
        Trials near the edge of stability, about which no spectrum says much, weigh less. Errors of
        20 % are added to both sides, so that small errors do not decide. NaN for fewer than three
        trials.
        """
        rules = self.rules.trust
        if self.n_observed < rules.min_observations or math.isnan(self.baseline_error):
            return math.nan
        added = rules.added_error**2
        return 1.0 - (self.compared_error**2 + added) / (self.baseline_error**2 + added)

    @property
    def trusted(self) -> bool:
        """Whether predictions may decide about trials of a search.

        They may not where they are off by more than a factor 1.65 and a trivial rule's squared
        error is less, or less than twice as much, where they are off by more than a factor e or
        do not rank the trials (Kendall's tau below 0.2). Five trials must say so, or three that
        are off by more than e and have twice the rule's squared error; and surely: that they are
        off by e and unranked, or ranked backwards (a tau of at most -0.75), or by a difference
        above its own standard deviation. The last two do not count where one trial, or trials near
        the edge of stability alone, say so.
        """
        rules = self.rules.trust
        gross = self.log_error > rules.gross_error
        unranked = self.rank_agreement < rules.min_agreement
        calm = self.n_compared >= rules.least_compared
        sure = calm and self.superiority >= rules.least_superiority
        if gross and (unranked or sure) and self.trust < rules.gross_trust:
            return False
        if self.n_observed < rules.min_distrust or not self.log_error > rules.harmless_error:
            return True
        backwards = calm and self.rank_agreement <= rules.backwards
        if not (sure or backwards or (gross and unranked)):
            return True
        return not self.trust < (rules.clear_trust if unranked or gross else 0.0)

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
        """Whether :attr:`start_factor` is close to one, as far as three trials or more show.

        Not where it is more than half as much again, or two thirds, and three standard deviations
        away, predictions were typically off by more than 28 %, and trials far from the edge of
        stability say so, too, if it is less than four times: fast trials say little about it.
        With the right spectra of the recorded runs in benchmarks/accuracy it was never more than
        1.42 times away after one, three or five trials; with those of shuffled eigenvectors and
        other data sets, as far as predictions were still trusted, mostly 1.2 to 1.8 times.
        """
        rules = self.rules.first_steps
        away = abs(float(self.log_growth[0]))
        known = away > rules.deviation_sds * float(self.log_growth_sd[0])
        enough = self.n_observed >= self.rules.trust.min_observations
        # Not where large steps alone say so.
        calm = self.calm_start * math.copysign(1.0, float(self.log_growth[0]))
        shown = calm > rules.calm_deviation or away > rules.gross_deviation
        off = away > rules.deviation and known and shown
        return not (enough and self.log_error > rules.least_error and off)

    def correct(
        self, simulated: SimulatedFirstPassages
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the corrected times of K configurations at P loss levels.

        Args:
            simulated:
                Their simulated times.

        Returns:
            Logarithms of the corrected times and their standard deviation, both ``(K, P)``.
        """
        errors = self.rules.errors
        logs, slopes = corrected(simulated, self.weights, self.rules.growth_prior)
        known = np.nan_to_num(slopes)
        variance = np.einsum("kpv,vw,kpw->kp", known, self.covariance, known)
        calm = self.scale * (errors.trial_sd**2 + errors.level_sd**2)
        wild = self.instability_scale * wildness(simulated.instability, errors) ** 2
        return logs, np.sqrt(variance + calm + wild)

    def remaining(
        self, running: Observation, depths: NDArray[np.float64], log_steps: NDArray[np.float64]
    ) -> tuple[float, float]:
        """Return how long a running trial still takes to the last level, given its curve so far.

        Its errors so far are taken for the error common to its levels, as far as they are larger
        than what single levels scatter by; the remaining time is stretched by the part of this
        error that is expected to last until the target. A trial that is later than can be
        explained is taken to lose as many steps again.

        Args:
            running:
                What was predicted for the trial and seen of it so far.
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
        stacked = Trials.of([running], self.rules.errors)
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
        if late > self.rules.errors.unexplained_sds * sd[0, j]:
            # No error that the model knows of explains this. Whatever has cost so many steps will
            # cost as many again, but no more than if the whole trial went at this pace.
            lost = min(passed - expected, left * math.expm1(late))
            total_steps = max(total_steps, passed + left + lost)
        rest = total_steps - running.n_steps
        shrunk = max(float(common[j, j] - gain @ common[j]), 0.0)
        total = max(spread**2 - float(common[j, j]) + shrunk, (0.5 * spread) ** 2)
        return max(rest, 1.0), math.sqrt(total)

    def expected(self, simulated: SimulatedFirstPassages) -> NDArray[np.float64]:
        """Return corrected times without their deviation, which is quick for many configurations.

        Args:
            simulated:
                Their simulated times.

        Returns:
            Logarithms of the corrected times, ``(K, P)``.
        """
        return np.log(Paths.of(simulated, self.weights, self.rules.growth_prior).times()[0])
