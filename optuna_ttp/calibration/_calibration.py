"""The corrections of a predictor that observed trials give."""

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
from optuna_ttp.calibration._trials import instability_sd
from optuna_ttp.calibration._trials import Trials


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """Corrections of predicted times by observed trials, and the errors of earlier predictions.

    Attributes:
        weights:
            Posterior mean of ``u`` (the logarithm of the factor on the kernel) at :data:`KNOTS`
            and of the effects of covariates and instability, ``(W,)``.
        covariance:
            Posterior covariance of the weights, ``(W, W)``.
        scale:
            Factor on the variance of stable trials' errors. One by default.
        instability_scale:
            Factor on the variance that instability adds. One by default.
        degrees_of_freedom:
            The degrees of freedom of the predictive Student's t. Two by default.
        n_observed:
            The number of trials that were learned from. Zero by default.
        rank_agreement:
            Kendall's tau between the times predicted before each trial and the observed times;
            NaN for fewer than two trials.
        log_error:
            Root mean square of log(observed / predicted before the trial), in which trials near
            the edge of stability weigh less; NaN for no trials.
        baseline_error:
            The same error of the better of two trivial rules, ``c / eta_e`` and
            ``c / eta_e + m / (1 - m)``, with ``c`` from earlier trials; NaN for fewer than two.
        compared_error:
            :attr:`log_error` over the trials for which the rules have a prediction.
        n_compared:
            The sum of these trials' weights, which are one far from the edge of stability.
        superiority:
            The sum of predictions' minus the rule's squared errors, over its standard deviation.
        divergence:
            The learning rate above which training does not recover.
        failure:
            The learning rate above which trials diverge or take more than twice as long as
            predicted.
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
    divergence: DivergenceLimit = field(default_factory=DivergenceLimit.of)
    failure: DivergenceLimit = field(
        default_factory=lambda: DivergenceLimit.of(rules=RULES.failure)
    )
    rules: CalibrationRules = RULES

    @classmethod
    def none(
        cls, prior_scale: PriorScale | None = None, rules: CalibrationRules = RULES
    ) -> Calibration:
        """Return the calibration before any trial, which does not change simulated times.

        Args:
            prior_scale:
                How far the network may be from its linearisation. By default as far as a usual
                pretrained network.
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
        """The correction ``u``, logarithm of the kernel's factor, at :data:`KNOTS`, ``(M,)``."""
        return self.weights[: len(KNOTS)]

    @property
    def log_growth_sd(self) -> NDArray[np.float64]:
        """Posterior standard deviation of the correction ``u`` at the M :data:`KNOTS`."""
        return np.sqrt(np.diag(self.covariance)[: len(KNOTS)])

    @property
    def trust(self) -> float:
        """One minus the mean squared error of predictions over that of the better trivial rule.

        Every prediction was made before its trial ran. Trust is negative if the rule is better.
        Trials near the edge of stability, which no spectrum predicts well, weigh less. Errors of
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
        """True if predictions may decide about trials of a search.

        They are distrusted after three trials if the typical error is above a factor e, trust is
        below zero, and Kendall's tau is below 0.2 or the rule's superiority is significant (at
        least 1.05). After five trials they are distrusted if the typical error is above a factor
        1.65, trust is below zero (below 0.5 if tau is below 0.2 or the error above e), and the
        superiority is significant, or the error is above e with tau below 0.2. The superiority
        does not count if :attr:`n_compared` is below 0.5, as for trials near the edge alone.
        """
        rules = self.rules.trust
        gross = self.log_error > rules.gross_error
        unranked = self.rank_agreement < rules.min_agreement
        known = self.n_compared >= rules.least_compared
        sure = known and self.superiority >= rules.least_superiority
        if gross and (unranked or sure) and self.trust < 0.0:
            return False
        if self.n_observed < rules.min_distrust or not self.log_error > rules.harmless_error:
            return True
        if not (sure or (gross and unranked)):
            return True
        return not self.trust < (rules.clear_trust if unranked or gross else 0.0)

    @property
    def fault(self) -> str:
        """A text that says what is wrong with predictions that are not trusted."""
        if self.trust < 0.0:
            return "worse than a rule of thumb"
        return "far off and in no order"

    @property
    def start_factor(self) -> float:
        """The speed of training in its first steps over the predicted speed.

        The first steps happen at almost the pretrained weights, so with the right spectrum this
        is close to one, however the kernel grows later.
        """
        return math.exp(self.log_growth[0])

    @property
    def starts_as_predicted(self) -> bool:
        """False if :attr:`start_factor` is too far from one for the right spectrum.

        This needs three trials, and a factor above 1.49 or below its inverse, see
        :class:`TrustRules`.
        """
        rules = self.rules.trust
        if self.n_observed < rules.min_observations:
            return True
        return abs(float(self.log_growth[0])) <= rules.first_steps

    def correct(
        self, simulated: SimulatedFirstPassages
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the corrected times of K configurations at P loss levels.

        Args:
            simulated:
                The simulated times of the configurations.

        Returns:
            Logarithms of the corrected times and their standard deviations, both ``(K, P)``.
        """
        errors = self.rules.errors
        logs, slopes = corrected(simulated, self.weights, self.rules.growth_prior)
        known = np.nan_to_num(slopes)
        variance = np.einsum("kpv,vw,kpw->kp", known, self.covariance, known)
        stable = self.scale * (errors.trial_sd**2 + errors.level_sd**2)
        unstable = self.instability_scale * instability_sd(simulated.instability, errors) ** 2
        return logs, np.sqrt(variance + stable + unstable)

    def remaining(
        self, running: Observation, depths: NDArray[np.float64], log_steps: NDArray[np.float64]
    ) -> tuple[float, float]:
        """Return the steps that a running trial still needs to the last level, given its curve.

        The error common to its levels is estimated from its errors so far, which also scatter
        from level to level; the remaining time is stretched by the part of the common error that
        is expected to last until the target. A trial whose delay is larger than the errors
        explain is expected to lose as many steps again.

        Args:
            running:
                The prediction of the trial and its observed curve so far.
            depths:
                Depths, ascending, for this trial alone, shape ``(P,)``: the first ones are
                :data:`DEPTHS`, the last is the target.
            log_steps:
                Logarithms of the steps simulated with :attr:`Observation.growth`, ``(P,)``.

        Returns:
            Steps from :attr:`Observation.n_steps` on (infinite if the target is not reached), and
            the standard deviation of their logarithm.
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
        # A level that should have been passed by now, but has not been, gives a bound.
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
            # No error of the model explains this delay. Its cause is expected to cost as many
            # steps again, but no more than if the whole trial went on at this pace.
            lost = min(passed - expected, left * math.expm1(late))
            total_steps = max(total_steps, passed + left + lost)
        rest = total_steps - running.n_steps
        shrunk = max(float(common[j, j] - gain @ common[j]), 0.0)
        total = max(spread**2 - float(common[j, j]) + shrunk, (0.5 * spread) ** 2)
        return max(rest, 1.0), math.sqrt(total)

    def expected(self, simulated: SimulatedFirstPassages) -> NDArray[np.float64]:
        """Return corrected times without standard deviations, which is faster.

        Args:
            simulated:
                The simulated times of the configurations.

        Returns:
            Logarithms of the corrected times, ``(K, P)``.
        """
        return np.log(Paths.of(simulated, self.weights, self.rules.growth_prior).times()[0])
