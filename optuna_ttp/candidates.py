"""Configurations of a search space, what is expected of them, and which to try next."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
import math
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from optuna_ttp.outlook import Outlook


if TYPE_CHECKING:
    from optuna_ttp.hyperparameters import Configuration


# So many candidates are drawn where the space is not finite, or larger than this.
_N_DRAWN = 512
_MOST_ENUMERATED = 2048
# Configurations that differ by less than so much in every hyperparameter are the same.
_SAME = 0.03
# A spread-out design gives so many nats for being this far, as a share of the space's extent, from
# all that was tried.
_SPREAD_NATS = 1.5
_SPREAD = 0.25
# From the worst to the best by rank.
_RANK_NATS = 6.0
# Below 2 % of its initial value, a training loss says no more about a metric. On the recorded
# tasks of draw 0 the best metrics lie at predicted depths from 3.3 to 4.6.
_SATURATED_DEPTH = 4.0
# A learning rate of so many times the largest stable one halves the odds of a good metric. On the
# same tasks the best lie at 0.02 to 0.7 times, and above 1.5 times there is none.
_UNSTEADY = 1.0
# Of the surrogate: what counts as noise, and the least number of values.
_NOISE = 0.3
_FEWEST_VALUES = 4
# Values are compared with predictions from so many on; what they weigh before that.
_PRIOR_VALUES = 4.0


@dataclass(frozen=True, eq=False)
class Candidates:
    """K configurations.

    Attributes:
        params:
            Their parameters.
        learning_rate:
            Shape ``(K,)``.
        batch_size:
            Shape ``(K,)``.
        momentum:
            Shape ``(K,)``.
    """

    params: list[dict[str, Any]]
    learning_rate: NDArray[np.float64]
    batch_size: NDArray[np.int64]
    momentum: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        params: Sequence[dict[str, Any]],
        resolve: Callable[[dict[str, Any]], Configuration | None],
    ) -> Candidates:
        """Resolve parameters.

        Args:
            params:
                The parameters, as a trial would have them.
            resolve:
                Gives the hyperparameters, or :obj:`None` where a configuration has none: it is
                left out.

        Returns:
            Those that have some.
        """
        resolved = [(p, resolve(p)) for p in params]
        kept = [(p, c) for p, c in resolved if c is not None]
        return cls(
            [p for p, _ in kept],
            np.array([c.learning_rate for _, c in kept], dtype=np.float64),
            np.array([c.batch_size for _, c in kept], dtype=np.int64),
            np.array([c.momentum for _, c in kept], dtype=np.float64),
        )

    @classmethod
    def resolved(cls, configurations: Sequence[Configuration]) -> Candidates:
        """Return candidates whose parameters do not matter.

        Args:
            configurations:
                Their hyperparameters.

        Returns:
            The candidates.
        """
        rate, size, mass = np.array(configurations, dtype=np.float64).reshape(-1, 3).T
        return cls([], rate, size.astype(np.int64), mass)

    def __len__(self) -> int:
        return len(self.learning_rate)

    @property
    def coordinates(self) -> NDArray[np.float64]:
        """Logarithms of learning rate, batch size and ``1 / (1 - m)``, shape ``(K, 3)``."""
        return np.stack(
            [np.log(self.learning_rate), np.log(self.batch_size), -np.log1p(-self.momentum)],
            axis=1,
        )


def drawn(space: Mapping[str, BaseDistribution], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return all configurations of a small finite space, or random ones of any other.

    Args:
        space:
            Distributions by name.
        rng:
            Draws.

    Returns:
        Parameters of each.
    """
    values = {name: _values(space[name]) for name in sorted(space)}
    n = math.prod(math.inf if v is None else len(v) for v in values.values())
    if n <= _MOST_ENUMERATED:
        finite = [v or [] for v in values.values()]
        return [dict(zip(values, combination, strict=True)) for combination in product(*finite)]
    columns = {name: _draw(space[name], rng) for name in sorted(space)}
    return [{name: column[i] for name, column in columns.items()} for i in range(_N_DRAWN)]


def _values(distribution: BaseDistribution) -> list[Any] | None:
    """All values of a distribution that has not too many."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        values = range(distribution.low, distribution.high + 1, distribution.step)
        return list(values) if len(values) <= _MOST_ENUMERATED else None
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        n = round((distribution.high - distribution.low) / distribution.step) + 1
        if n <= _MOST_ENUMERATED:
            steps = distribution.low + distribution.step * np.arange(n)
            return [float(v) for v in np.clip(steps, distribution.low, distribution.high)]
    return None


def _draw(distribution: BaseDistribution, rng: np.random.Generator) -> list[Any]:
    values = _values(distribution)
    if values is not None and not getattr(distribution, "log", False):
        return [values[i] for i in rng.integers(len(values), size=_N_DRAWN)]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    whole = isinstance(distribution, IntDistribution)
    # Half a step more at both ends, so that the outermost whole numbers are as likely as others.
    low, high = distribution.low - 0.5 * whole, distribution.high + 0.5 * whole
    if distribution.log:
        points = np.exp(rng.uniform(math.log(low), math.log(high), _N_DRAWN))
    else:
        points = rng.uniform(low, high, _N_DRAWN)
    if distribution.step is not None and not distribution.log:
        points = distribution.low + distribution.step * np.rint(
            (points - distribution.low) / distribution.step
        )
    points = np.clip(np.rint(points) if whole else points, distribution.low, distribution.high)
    return [int(v) for v in points] if whole else [float(v) for v in points]


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
        outlook:
            What is expected of them.
        goal:
            ``"time"`` or ``"metric"``.
        best_depth:
            Depth of the training loss behind which a metric does not get better.
        evidence:
            What was seen.
        expected:
            Gives the outlook of other candidates.
        cooling:
            Exponent of the cost.
    """

    def __init__(
        self,
        pool: Candidates,
        outlook: Outlook,
        goal: str,
        best_depth: float,
        evidence: Evidence,
        expected: Callable[[Candidates], Outlook],
        cooling: float,
    ) -> None:
        from scipy.spatial import cKDTree

        self.pool = pool
        self._outlook = outlook
        self._goal = goal
        self._best_depth = best_depth
        self._evidence = evidence
        self._expected = expected
        self._cooling = cooling
        self._span = np.maximum(np.ptp(pool.coordinates, axis=0), 1e-9)
        self._sorted = np.sort(self._raw(outlook))
        self._cost = float(np.median(outlook.log_cost))
        self._agreement = 1.0
        self._surrogate: _Surrogate | None = None
        self._scores = self._sorted_scores = np.zeros(0)
        self._tried = cKDTree(evidence.tried.coordinates) if len(evidence.tried) else None
        if goal == "metric" and len(evidence.known):
            self._learn()

    def _learn(self) -> None:
        known, values = self._evidence.known, self._evidence.values
        outlook = self._expected(known)
        merit = self._ranked(outlook) + outlook.log_success
        n = len(values)
        if np.ptp(merit) > 0.5 and n >= 2:
            from scipy.stats import kendalltau

            tau = float(np.nan_to_num(kendalltau(merit, -_finite(values)).statistic))
            told = min(1.0, max(0.0, 2.0 * tau))
            self._agreement = (_PRIOR_VALUES + n * told) / (_PRIOR_VALUES + n)
        if n >= _FEWEST_VALUES:
            features = self._features(self.pool, self._outlook)
            mean, sd = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-9)
            x = (self._features(known, outlook) - mean) / sd
            self._surrogate = _Surrogate.fit(x, _finite(values), mean, sd)
            self._scores = self._surrogate.optimistic(features)
            self._sorted_scores = np.sort(self._scores)

    def weigh(self, candidates: Candidates, outlook: Outlook | None = None) -> NDArray[np.float64]:
        """Return what to add to the logarithm of how good a base sampler finds candidates.

        Args:
            candidates:
                Any.
            outlook:
                Theirs, where it is known.

        Returns:
            Nats, shape ``(K,)``.
        """
        if not len(candidates):
            return np.zeros(0)
        outlook = self._expected(candidates) if outlook is None else outlook
        if self._goal == "time":
            merit = self._timed(outlook)
        else:
            merit = self._agreement * self._ranked(outlook)
            if self._surrogate is not None:
                scores = self._scores
                if candidates is not self.pool:
                    scores = self._surrogate.optimistic(self._features(candidates, outlook))
                rank = np.searchsorted(self._sorted_scores, scores, side="right")
                learned = _RANK_NATS * (rank / len(self.pool) - 1.0)
                share = self._surrogate.skill
                merit = (1.0 - share) * merit + 2.0 * share * learned
            # Training that recovers from loss spikes may fit the data, and generalises worse.
            merit = merit - np.logaddexp(0.0, 2.0 * np.log(outlook.stability / _UNSTEADY))
            # Cost cooling (Lee et al., 2020): the less is left to spend, the less cost counts.
            merit = merit - self._cooling * (outlook.log_cost - self._cost)
        return merit + outlook.log_success

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
        return np.asarray(apart < _SAME)

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

        scores = self.weigh(self.pool, self._outlook)
        tried = self.is_tried(self.pool)
        if not repeat and not tried.all():
            scores[tried] = -np.inf
        places = self.pool.coordinates / self._span
        nearest = np.full(len(places), np.inf)
        if len(self._evidence.tried):
            nearest[:] = cKDTree(self._evidence.tried.coordinates / self._span).query(places)[0]
        chosen: list[int] = []
        for _ in range(min(n, int(np.isfinite(scores).sum()))):
            far = np.minimum(nearest / _SPREAD, 1.0)
            j = int(np.argmax(scores + _SPREAD_NATS * far))
            chosen.append(j)
            scores[j] = -math.inf
            nearest[:] = np.minimum(nearest, np.linalg.norm(places - places[j], axis=1))
        return chosen

    def _timed(self, outlook: Outlook) -> NDArray[np.float64]:
        # What is never reached is no better than the slowest that is.
        finite = self._sorted[np.isfinite(self._sorted)]
        worst = -finite[0] if len(finite) else 0.0
        best = -finite[-1] if len(finite) else 0.0
        logs = np.where(np.isfinite(outlook.log_seconds), outlook.log_seconds, worst)
        return (best - logs) / outlook.sd

    def _raw(self, outlook: Outlook) -> NDArray[np.float64]:
        if self._goal == "time":
            return -outlook.log_seconds
        return np.minimum(outlook.depth, min(self._best_depth, _SATURATED_DEPTH))

    def _ranked(self, outlook: Outlook) -> NDArray[np.float64]:
        rank = np.searchsorted(self._sorted, self._raw(outlook), side="right")
        return np.asarray(_RANK_NATS * (rank / len(self.pool) - 1.0))

    def _features(self, candidates: Candidates, outlook: Outlook) -> NDArray[np.float64]:
        """What a metric depends on: how far training gets, how near instability, how noisy."""
        return np.stack(
            [
                outlook.depth,
                np.log(outlook.stability),
                np.log(candidates.learning_rate / (1.0 - candidates.momentum))
                - np.log(candidates.batch_size),
            ],
            axis=1,
        )


@dataclass(frozen=True, eq=False)
class _Surrogate:
    """A Gaussian process of the values over what predictions say of a configuration."""

    x: NDArray[np.float64]
    solved: NDArray[np.float64]
    inverse: NDArray[np.float64]
    mean: NDArray[np.float64]
    sd: NDArray[np.float64]
    skill: float

    @classmethod
    def fit(
        cls,
        x: NDArray[np.float64],
        values: NDArray[np.float64],
        mean: NDArray[np.float64],
        sd: NDArray[np.float64],
    ) -> _Surrogate:
        from scipy.stats import kendalltau
        from scipy.stats import norm
        from scipy.stats import rankdata

        # Normal scores: a loss that blew up is worst, not a million times worse.
        y = np.asarray(norm.ppf((rankdata(values) - 0.5) / len(values)), dtype=np.float64)
        kernel = _kernel(x, x) + _NOISE**2 * np.eye(len(x))
        inverse = np.linalg.inv(kernel)
        solved = inverse @ y
        # Left out one at a time (Rasmussen and Williams, 2006, equation 5.12).
        held_out = y - solved / np.diag(inverse)
        tau = float(np.nan_to_num(kendalltau(held_out, y).statistic))
        n = len(y)
        skill = min(1.0, max(0.0, 1.5 * tau)) * n / (n + 4.0)
        return cls(x, solved, np.asarray(inverse, dtype=np.float64), mean, sd, skill)

    def optimistic(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """How good features may be: mean and one standard deviation, larger is better."""
        k = _kernel((features - self.mean) / self.sd, self.x)
        variance = 1.0 - ((k @ self.inverse) * k).sum(axis=1)
        return np.asarray(-(k @ self.solved) + np.sqrt(np.maximum(variance, 1e-12)))


def _kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    apart = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2.0 * a @ b.T
    return np.asarray(np.exp(-0.5 * np.maximum(apart, 0.0)))


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.isfinite(values), values, np.finfo(np.float64).max)
