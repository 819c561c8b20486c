"""Candidate configurations of a search space, and how they are drawn."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
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


if TYPE_CHECKING:
    from optuna_ttp.search._sampler_rules import SamplerRules
    from optuna_ttp.study import Configuration


@dataclass(frozen=True, eq=False)
class Candidates:
    """K configurations among which a sampler chooses.

    Attributes:
        params: The trial parameters of each configuration, K dictionaries or none.
        learning_rate: Learning rates, shape ``(K,)``.
        batch_size: Batch sizes, shape ``(K,)``.
        momentum: Momenta, shape ``(K,)``.
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
        """Return the candidates with these parameters; those that resolve to None are left out."""
        both = [(p, resolve(p)) for p in params]
        resolved = [(p, c) for p, c in both if c is not None]
        return cls(
            [p for p, _ in resolved],
            np.array([c.learning_rate for _, c in resolved], dtype=np.float64),
            np.array([c.batch_size for _, c in resolved], dtype=np.int64),
            np.array([c.momentum for _, c in resolved], dtype=np.float64),
        )

    @classmethod
    def resolved(cls, configurations: Sequence[Configuration]) -> Candidates:
        """Return candidates with these hyperparameters and an empty list ``params``."""
        # Three times as fast as an array of tuples, and a long study has a thousand of them.
        numbers = chain.from_iterable(configurations)
        flat = np.fromiter(numbers, dtype=np.float64, count=3 * len(configurations))
        rate, batch_size, momentum = flat.reshape(-1, 3).T
        return cls([], rate, batch_size.astype(np.int64), momentum)

    def __len__(self) -> int:
        return len(self.learning_rate)

    @property
    def coordinates(self) -> NDArray[np.float64]:
        """Logarithms of learning rate, batch size and ``1 / (1 - momentum)``, shape ``(K, 3)``."""
        return np.stack(
            [np.log(self.learning_rate), np.log(self.batch_size), -np.log1p(-self.momentum)],
            axis=1,
        )


def drawn(
    space: Mapping[str, BaseDistribution], rng: np.random.Generator, rules: SamplerRules
) -> list[dict[str, Any]]:
    """Return trial parameters of a search space, one dictionary by name per configuration.

    A finite space of up to ``rules.largest_grid`` configurations gives all of them, any other one
    gives ``rules.n_drawn`` random ones.
    """
    values = {name: _values(space[name], rules) for name in sorted(space)}
    n = math.prod(math.inf if v is None else len(v) for v in values.values())
    if n <= rules.largest_grid:
        finite = [v or [] for v in values.values()]
        return [dict(zip(values, combination, strict=True)) for combination in product(*finite)]
    columns = {name: _draw(space[name], rng, rules) for name in sorted(space)}
    return [{name: column[i] for name, column in columns.items()} for i in range(rules.n_drawn)]


def _values(distribution: BaseDistribution, rules: SamplerRules) -> list[Any] | None:
    """Return all values of a distribution; None if it has more than ``rules.largest_grid``."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        values = range(distribution.low, distribution.high + 1, distribution.step)
        return list(values) if len(values) <= rules.largest_grid else None
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        n = round((distribution.high - distribution.low) / distribution.step) + 1
        if n <= rules.largest_grid:
            steps = distribution.low + distribution.step * np.arange(n)
            return [float(v) for v in np.clip(steps, distribution.low, distribution.high)]
    return None


def _draw(
    distribution: BaseDistribution, rng: np.random.Generator, rules: SamplerRules
) -> list[Any]:
    """Draw ``rules.n_drawn`` values of a distribution, log-uniformly if it is logarithmic."""
    values = _values(distribution, rules)
    if values is not None and not getattr(distribution, "log", False):
        return [values[i] for i in rng.integers(len(values), size=rules.n_drawn)]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    whole = isinstance(distribution, IntDistribution)
    # Half a step more at both ends, so that the outermost whole numbers are as likely as others.
    low, high = distribution.low - 0.5 * whole, distribution.high + 0.5 * whole
    if distribution.log:
        points = np.exp(rng.uniform(math.log(low), math.log(high), rules.n_drawn))
    else:
        points = rng.uniform(low, high, rules.n_drawn)
    if distribution.step is not None and not distribution.log:
        points = distribution.low + distribution.step * np.rint(
            (points - distribution.low) / distribution.step
        )
    points = np.clip(np.rint(points) if whole else points, distribution.low, distribution.high)
    return [int(v) for v in points] if whole else [float(v) for v in points]
