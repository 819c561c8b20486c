"""How a trial's parameters are chosen: a preference among parameters as a trial has them."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from optuna_ttp.search._candidates import Candidates
from optuna_ttp.search._preference import Preference
from optuna_ttp.study import MissingParameterError


if TYPE_CHECKING:
    from optuna_ttp.prediction import SearchPredictor
    from optuna_ttp.study import Configuration
    from optuna_ttp.study import HyperparameterMap


Resolve = Callable[[Mapping[str, Any]], "Configuration | None"]

# Nats against what was tried before.
_NATS_AGAINST_REPEATING = 1e6


@dataclass(frozen=True, eq=False)
class Choice:
    """Weighs and proposes the parameters of one trial.

    Attributes:
        preference: How good configurations are expected to be.
        resolve: Gives the hyperparameters of a trial's parameters; None where there are none.
        settled: The trial's parameters whose values are settled already.
        to_choose: The names of the parameters to be chosen.
        weight: What the preference is multiplied by.
        repeat: Whether what was tried may be tried again.
        n_before: How many trials the study has besides, failed ones left out.
        n_undecided: How many of them are about to choose their parameters.
    """

    preference: Preference
    resolve: Resolve
    settled: Mapping[str, Any]
    to_choose: frozenset[str]
    weight: float
    repeat: bool
    n_before: int
    n_undecided: int

    def weigh(self, params: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
        """Return the nats of K configurations, shape ``(K,)``; zero where nothing is predicted."""
        configurations = [self.resolve({**self.settled, **p}) for p in params]
        is_resolved = np.array([c is not None for c in configurations])
        weights = np.zeros(len(params))
        candidates = Candidates.resolved([c for c in configurations if c is not None])
        if len(candidates):
            nats = self.weight * self.preference.weigh(candidates)
            if not self.repeat:
                tried = self.preference.is_tried(candidates)
                nats = np.where(tried, -_NATS_AGAINST_REPEATING, nats)
            weights[is_resolved] = nats
        return weights

    def propose(self, n: int) -> list[dict[str, Any]]:
        """Return up to ``n`` configurations that are expected to be best."""
        return [self._params_of(j) for j in self.preference.best(n, repeat=self.repeat)]

    def next_of_design(self) -> dict[str, Any] | None:
        """Return the parameters of the initial design's next candidate, None if there is none.

        Better candidates are left to the running trials that have not chosen their parameters yet.
        """
        places = self.preference.best(1 + self.n_undecided, repeat=self.repeat)
        return self._params_of(places[-1]) if places else None

    def _params_of(self, place: int) -> dict[str, Any]:
        params = self.preference.pool.params[place]
        return {name: params[name] for name in self.to_choose}


def resolved(
    mapping: HyperparameterMap, predictor: SearchPredictor, params: Mapping[str, Any]
) -> Configuration | None:
    """Return the hyperparameters of a trial's parameters; None where it has none."""
    try:
        configuration = mapping.resolve(params)
    except MissingParameterError:
        # In a branch of a conditional space whose parameters are not known.
        return None
    return None if configuration is None else configuration.clipped(predictor.n_samples)
