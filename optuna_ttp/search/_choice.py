"""The choice of one trial's parameters by a preference among configurations."""

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

# Nats subtracted from a configuration that was tried before, far more than all others together.
_NATS_AGAINST_REPEATING = 1e6


@dataclass(frozen=True, eq=False)
class Choice:
    """Weighs and proposes the parameters of one trial.

    Attributes:
        preference: How good configurations are expected to be.
        resolve: Function from a trial's parameters to its hyperparameters, or None.
        settled: The values of the trial's parameters that are settled already, by name.
        to_choose: The names of the parameters to be chosen.
        weight: The factor of the preference in :meth:`weigh`.
        repeat: True if a tried configuration may be tried again.
        n_before: The number of other trials of the study that did not fail.
        n_undecided: The number of running trials that have not chosen their parameters yet.
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
        """Return nats to add to the log acquisition values of K parameter dictionaries, ``(K,)``.

        A dictionary without hyperparameters gets zero. Unless ``repeat`` holds, a tried
        configuration gets ``-1e6``.
        """
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
        """Return the parameters to choose of the up to ``n`` best candidates, best first."""
        return [self._params_of(j) for j in self.preference.best(n, repeat=self.repeat)]

    def next_of_design(self) -> dict[str, Any] | None:
        """Return the parameters to choose of the initial design's next candidate, or None.

        It is the best candidate after ``n_undecided`` better ones, which are left to the running
        trials that have not chosen their parameters yet.
        """
        places = self.preference.best(1 + self.n_undecided, repeat=self.repeat)
        return self._params_of(places[-1]) if places else None

    def _params_of(self, place: int) -> dict[str, Any]:
        params = self.preference.pool.params[place]
        return {name: params[name] for name in self.to_choose}


def resolved(
    mapping: HyperparameterMap, predictor: SearchPredictor, params: Mapping[str, Any]
) -> Configuration | None:
    """Return a trial's hyperparameters, with a batch size of at most the number of samples.

    The result is None if the map does not apply or a parameter that it reads is missing.
    """
    try:
        configuration = mapping.resolve(params)
    except MissingParameterError:
        # The trial is in a branch of a conditional space whose parameters are not known.
        return None
    return None if configuration is None else configuration.clipped(predictor.n_samples)
