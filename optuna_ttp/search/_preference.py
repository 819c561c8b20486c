"""The preference among configurations, by their forecasts and by the study's values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
import math

import numpy as np
from numpy.typing import NDArray

from optuna_ttp.search._candidates import Candidates
from optuna_ttp.search._forecast import Forecast
from optuna_ttp.search._sampler_rules import PreferenceRules
from optuna_ttp.search._surrogate import finite
from optuna_ttp.search._surrogate import Surrogate


@dataclass(frozen=True, eq=False)
class Evidence:
    """The configurations and values of a study's trials.

    Attributes:
        tried: All configurations that ran, run or were skipped.
        known: The k tried configurations that have a value.
        values: The values of ``known``, smaller is better, shape ``(k,)``; infinite for a trial
            that the pruner stopped or whose training failed.
    """

    tried: Candidates
    known: Candidates
    values: NDArray[np.float64]


class Preference:
    """How good configurations are expected to be, in nats, from predictions and from values.

    ``pool`` has candidates of the whole search space, ``forecast`` is their forecast, and
    ``expected`` computes the forecast of other candidates. The goal is a time to the target
    (``is_time``) or a metric. A metric gets no better once the depth of the training loss, the
    logarithm of the initial loss over the loss, exceeds ``best_depth``. ``cooling`` is the
    exponent of the cost.
    """

    def __init__(
        self,
        pool: Candidates,
        forecast: Forecast,
        is_time: bool,
        best_depth: float,
        evidence: Evidence,
        expected: Callable[[Candidates], Forecast],
        cooling: float,
        rules: PreferenceRules,
    ) -> None:
        from scipy.spatial import cKDTree

        self.pool = pool
        self._forecast = forecast
        self._is_time = is_time
        self._best_depth = best_depth
        self._evidence = evidence
        self._expected = expected
        self._cooling = cooling
        self._rules = rules
        self._span = np.maximum(np.ptp(pool.coordinates, axis=0), 1e-9)
        self._sorted = np.sort(self._raw_merit(forecast))
        self._median_cost = float(np.median(forecast.log_cost))
        self._agreement = 1.0
        self._surrogate: Surrogate | None = None
        self._scores = self._sorted_scores = np.zeros(0)
        self._tried = cKDTree(evidence.tried.coordinates) if len(evidence.tried) else None
        if not is_time and len(evidence.known):
            self._learn_from_values()

    def _learn_from_values(self) -> None:
        """Measure how well predictions rank the values, and fit a Gaussian process to these."""
        rules = self._rules
        known, values = self._evidence.known, self._evidence.values
        forecast = self._expected(known)
        merit = self._ranked(forecast) + forecast.log_success
        n = len(values)
        if np.ptp(merit) > 0.5 and n >= 2:
            from scipy.stats import kendalltau

            tau = float(np.nan_to_num(kendalltau(merit, -finite(values)).statistic))
            skill = min(1.0, max(0.0, 2.0 * tau))
            self._agreement = (rules.prior_values + n * skill) / (rules.prior_values + n)
        if n >= rules.fewest_values:
            features = self._features(self.pool, self._forecast)
            mean, sd = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-9)
            x = (self._features(known, forecast) - mean) / sd
            self._surrogate = Surrogate.fit(x, finite(values), mean, sd, rules.noise)
            self._scores = self._surrogate.optimistic(features)
            self._sorted_scores = np.sort(self._scores)

    def weigh(
        self, candidates: Candidates, forecast: Forecast | None = None
    ) -> NDArray[np.float64]:
        """Return nats to add to a base sampler's log acquisition values of K candidates, ``(K,)``.

        They are the predicted merit plus the logarithm of the probability of success; if the goal
        is a metric, minus penalties of an unstable learning rate, of the lag of momentum and of
        the cost. ``forecast`` is the forecast of the candidates, computed by default.
        """
        if not len(candidates):
            return np.zeros(0)
        forecast = self._expected(candidates) if forecast is None else forecast
        if self._is_time:
            return self._timed(forecast) + forecast.log_success
        merit = self._metric_merit(candidates, forecast)
        # Training that recovers from loss spikes may fit the data, and generalises worse.
        merit = merit - np.logaddexp(0.0, 2.0 * np.log(forecast.stability / self._rules.unsteady))
        merit = merit - self._rules.lag_nats * np.minimum(forecast.lag / self._rules.lag, 1.0)
        # Cost cooling (Lee et al., 2020): cost counts less when less of the budget is left.
        merit = merit - self._cooling * (forecast.log_cost - self._median_cost)
        return merit + forecast.log_success

    def _metric_merit(self, candidates: Candidates, forecast: Forecast) -> NDArray[np.float64]:
        """Return how good the metrics of K candidates are expected to be, in nats, ``(K,)``.

        The rank of the predicted depth counts, and the rank by the Gaussian process with the
        weight of its skill.
        """
        merit = self._agreement * self._ranked(forecast)
        if self._surrogate is None:
            return merit
        scores = self._scores
        if candidates is not self.pool:
            scores = self._surrogate.optimistic(self._features(candidates, forecast))
        rank = np.searchsorted(self._sorted_scores, scores, side="right")
        learned = self._rules.rank_nats * (rank / len(self.pool) - 1.0)
        share = self._surrogate.skill
        return (1.0 - share) * merit + 2.0 * share * learned

    def is_tried(self, candidates: Candidates) -> NDArray[np.bool_]:
        """Return a mask of the candidates within ``rules.same`` of a tried one, shape ``(K,)``."""
        if self._tried is None or not len(candidates):
            return np.zeros(len(candidates), dtype=bool)
        distance, _ = self._tried.query(candidates.coordinates, p=math.inf)
        return np.asarray(distance < self._rules.same)

    def best(self, n: int, *, repeat: bool) -> list[int]:
        """Return indices of up to ``n`` candidates of the pool to try next, best first.

        Candidates that score high and lie far from tried ones come first, as in the cost-effective
        initial design of CArBO (Lee et al., 2020, "Cost-aware Bayesian optimization", arXiv
        2003.10870, section 4). Tried ones are left out unless ``repeat`` holds or all were tried.
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
        nats = rules.time_spread_nats if self._is_time else rules.metric_spread_nats
        chosen: list[int] = []
        for _ in range(min(n, int(np.isfinite(scores).sum()))):
            j = int(np.argmax(scores + nats * np.minimum(nearest / rules.spread, 1.0)))
            chosen.append(j)
            scores[j] = -math.inf
            nearest[:] = np.minimum(nearest, np.linalg.norm(places - places[j], axis=1))
        return chosen

    def _timed(self, forecast: Forecast) -> NDArray[np.float64]:
        """Return ``(fastest - log time) / sd`` of K candidates in nats, shape ``(K,)``."""
        # A candidate that never reaches the target counts as the slowest one that does.
        reached = self._sorted[np.isfinite(self._sorted)]
        slowest = -reached[0] if len(reached) else 0.0
        fastest = -reached[-1] if len(reached) else 0.0
        logs = np.where(np.isfinite(forecast.log_seconds), forecast.log_seconds, slowest)
        return (fastest - logs) / forecast.sd

    def _raw_merit(self, forecast: Forecast) -> NDArray[np.float64]:
        """Return the number by which K candidates are ranked, larger is better, shape ``(K,)``.

        It is minus the logarithm of the seconds, or the depth of the loss up to a saturation.
        """
        if self._is_time:
            return -forecast.log_seconds
        return np.minimum(forecast.depth, min(self._best_depth, self._rules.saturated_depth))

    def _ranked(self, forecast: Forecast) -> NDArray[np.float64]:
        """Return nats by the rank in the pool, ``-rank_nats`` to zero for the best, ``(K,)``."""
        rank = np.searchsorted(self._sorted, self._raw_merit(forecast), side="right")
        return np.asarray(self._rules.rank_nats * (rank / len(self.pool) - 1.0))

    def _features(self, candidates: Candidates, forecast: Forecast) -> NDArray[np.float64]:
        """Return the depth of the loss and the logarithms of stability and gradient noise.

        They are the Gaussian process's features of K candidates, shape ``(K, 3)``; the noise is
        ``learning rate / (1 - momentum) / batch size``.
        """
        return np.stack(
            [
                forecast.depth,
                np.log(forecast.stability),
                np.log(candidates.learning_rate / (1.0 - candidates.momentum))
                - np.log(candidates.batch_size),
            ],
            axis=1,
        )
