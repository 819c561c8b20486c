"""Which configurations to try next, from what is expected of them and what was seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
import math

import numpy as np
from numpy.typing import NDArray

from optuna_ttp.search._candidates import Candidates
from optuna_ttp.search._forecast import Forecast
from optuna_ttp.search._goal import Goal
from optuna_ttp.search._sampler_rules import PreferenceRules
from optuna_ttp.search._surrogate import finite
from optuna_ttp.search._surrogate import Surrogate


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the trials of a study say about configurations.

    Attributes:
        tried:
            All that ran, runs or was skipped.
        known:
            Candidates of those trials that have a value.
        values:
            Their values, smaller is better, shape ``(k,)``; infinite where training failed.
    """

    tried: Candidates
    known: Candidates
    values: NDArray[np.float64]


class Preference:
    """How good configurations are expected to be, in nats, from predictions and from values.

    Args:
        pool:
            Candidates of the whole search space.
        forecast:
            What is expected of them.
        goal:
            Of the search.
        best_depth:
            Depth of the training loss behind which a metric does not get better.
        evidence:
            What was seen.
        expected:
            Gives the forecast of other candidates.
        cooling:
            Exponent of the cost.
        rules:
            Its tuned numbers.
    """

    def __init__(
        self,
        pool: Candidates,
        forecast: Forecast,
        goal: Goal,
        best_depth: float,
        evidence: Evidence,
        expected: Callable[[Candidates], Forecast],
        cooling: float,
        rules: PreferenceRules,
    ) -> None:
        from scipy.spatial import cKDTree

        self.pool = pool
        self._forecast = forecast
        self._goal = goal
        self._best_depth = best_depth
        self._evidence = evidence
        self._expected = expected
        self._cooling = cooling
        self._rules = rules
        self._span = np.maximum(np.ptp(pool.coordinates, axis=0), 1e-9)
        self._sorted = np.sort(self._raw(forecast))
        self._cost = float(np.median(forecast.log_cost))
        self._agreement = 1.0
        self._surrogate: Surrogate | None = None
        self._scores = self._sorted_scores = np.zeros(0)
        self._tried = cKDTree(evidence.tried.coordinates) if len(evidence.tried) else None
        if not goal.is_time and len(evidence.known):
            self._learn()

    def _learn(self) -> None:
        known, values = self._evidence.known, self._evidence.values
        forecast = self._expected(known)
        merit = self._ranked(forecast) + forecast.log_success
        n = len(values)
        if np.ptp(merit) > 0.5 and n >= 2:
            from scipy.stats import kendalltau

            tau = float(np.nan_to_num(kendalltau(merit, -finite(values)).statistic))
            told = min(1.0, max(0.0, 2.0 * tau))
            self._agreement = (self._rules.prior_values + n * told) / (
                self._rules.prior_values + n
            )
        if n >= self._rules.fewest_values:
            features = self._features(self.pool, self._forecast)
            mean, sd = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-9)
            x = (self._features(known, forecast) - mean) / sd
            self._surrogate = Surrogate.fit(x, finite(values), mean, sd, self._rules.noise)
            self._scores = self._surrogate.optimistic(features)
            self._sorted_scores = np.sort(self._scores)

    def weigh(
        self, candidates: Candidates, forecast: Forecast | None = None
    ) -> NDArray[np.float64]:
        """Return what to add to the logarithm of how good a base sampler finds candidates.

        Args:
            candidates:
                Any.
            forecast:
                Theirs, where it is known.

        Returns:
            Nats, shape ``(K,)``.
        """
        if not len(candidates):
            return np.zeros(0)
        forecast = self._expected(candidates) if forecast is None else forecast
        if self._goal.is_time:
            merit = self._timed(forecast)
        else:
            merit = self._agreement * self._ranked(forecast)
            if self._surrogate is not None:
                scores = self._scores
                if candidates is not self.pool:
                    scores = self._surrogate.optimistic(self._features(candidates, forecast))
                rank = np.searchsorted(self._sorted_scores, scores, side="right")
                learned = self._rules.rank_nats * (rank / len(self.pool) - 1.0)
                share = self._surrogate.skill
                merit = (1.0 - share) * merit + 2.0 * share * learned
            # Training that recovers from loss spikes may fit the data, and generalises worse.
            merit = merit - np.logaddexp(
                0.0, 2.0 * np.log(forecast.stability / self._rules.unsteady)
            )
            merit = merit - self._rules.lag_nats * np.minimum(forecast.lag / self._rules.lag, 1.0)
            # Cost cooling (Lee et al., 2020): the less is left to spend, the less cost counts.
            merit = merit - self._cooling * (forecast.log_cost - self._cost)
        return merit + forecast.log_success

    def is_tried(self, candidates: Candidates) -> NDArray[np.bool_]:
        """Tell which candidates are what was tried, or nearly so.

        Args:
            candidates:
                Any.

        Returns:
            Shape ``(K,)``.
        """
        if self._tried is None or not len(candidates):
            return np.zeros(len(candidates), dtype=bool)
        apart, _ = self._tried.query(candidates.coordinates, p=math.inf)
        return np.asarray(apart < self._rules.same)

    def best(self, n: int, *, repeat: bool) -> list[int]:
        """Return the candidates of the pool to try next, spread out, best first.

        Cheap ones that are predicted to succeed and lie far from what was tried, in the manner of
        the cost-effective initial design of CArBO (Lee et al., 2020, "Cost-aware Bayesian
        optimization", arXiv 2003.10870, section 4).

        Args:
            n:
                How many.
            repeat:
                Whether what was tried may be tried again.

        Returns:
            Up to so many places in the pool.
        """
        from scipy.spatial import cKDTree

        scores = self.weigh(self.pool, self._forecast)
        tried = self.is_tried(self.pool)
        if not repeat and not tried.all():
            scores[tried] = -np.inf
        places = self.pool.coordinates / self._span
        nearest = np.full(len(places), np.inf)
        if len(self._evidence.tried):
            nearest[:] = cKDTree(self._evidence.tried.coordinates / self._span).query(places)[0]
        rules = self._rules
        nats = rules.time_spread_nats if self._goal.is_time else rules.metric_spread_nats
        chosen: list[int] = []
        for _ in range(min(n, int(np.isfinite(scores).sum()))):
            far = np.minimum(nearest / rules.spread, 1.0)
            j = int(np.argmax(scores + nats * far))
            chosen.append(j)
            scores[j] = -math.inf
            nearest[:] = np.minimum(nearest, np.linalg.norm(places - places[j], axis=1))
        return chosen

    def _timed(self, forecast: Forecast) -> NDArray[np.float64]:
        # What is never reached is no better than the slowest that is.
        finite = self._sorted[np.isfinite(self._sorted)]
        worst = -finite[0] if len(finite) else 0.0
        best = -finite[-1] if len(finite) else 0.0
        logs = np.where(np.isfinite(forecast.log_seconds), forecast.log_seconds, worst)
        return (best - logs) / forecast.sd

    def _raw(self, forecast: Forecast) -> NDArray[np.float64]:
        if self._goal.is_time:
            return -forecast.log_seconds
        return np.minimum(forecast.depth, min(self._best_depth, self._rules.saturated_depth))

    def _ranked(self, forecast: Forecast) -> NDArray[np.float64]:
        rank = np.searchsorted(self._sorted, self._raw(forecast), side="right")
        return np.asarray(self._rules.rank_nats * (rank / len(self.pool) - 1.0))

    def _features(self, candidates: Candidates, forecast: Forecast) -> NDArray[np.float64]:
        """What a metric depends on: how far training gets, how near instability, how noisy."""
        return np.stack(
            [
                forecast.depth,
                np.log(forecast.stability),
                np.log(candidates.learning_rate / (1.0 - candidates.momentum))
                - np.log(candidates.batch_size),
            ],
            axis=1,
        )
