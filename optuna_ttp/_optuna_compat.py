"""Every private touch of Optuna (4.8 to 5.x), and nothing else."""

from __future__ import annotations

from collections.abc import Callable
import json
from typing import Any
from typing import Generic
from typing import TypeVar
from weakref import WeakKeyDictionary

import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial
from optuna.trial import TrialState


_TPE_RELATIVE_PARAMS = "tpe:relative_params"
# Optuna's own chunk length for system attributes.
_CHUNK = 2045
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
_T = TypeVar("_T")


class PerStudy(Generic[_T]):
    """Something for each study, forgotten with the study's storage and when it is pickled.

    A study's id does not tell studies apart: it is the same in any two in-memory storages.
    """

    def __init__(self, make: Callable[[], _T]) -> None:
        self._make = make
        self._made: WeakKeyDictionary[BaseStorage, dict[int, _T]] = WeakKeyDictionary()

    def __getitem__(self, study: optuna.Study) -> _T:
        made = self._made.setdefault(study._storage, {})
        if study._study_id not in made:
            made[study._study_id] = self._make()
        return made[study._study_id]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._make,)


def write_user_attr(study: optuna.Study, trial: FrozenTrial, key: str, value: Any) -> None:
    """Set a user attribute of a running trial from a sampler or pruner."""
    study._storage.set_trial_user_attr(trial._trial_id, key, value)


def read_user_attrs(study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
    """Return a trial's user attributes as they are in the storage now."""
    attributes: dict[str, Any] = study._storage.get_trial_user_attrs(trial._trial_id)
    return attributes


def fail_trial(study: optuna.Study, trial: FrozenTrial) -> None:
    """Mark a trial as failed that cannot even begin, so that it does not stay running for ever."""
    study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def trials_of(study: optuna.Study, states: tuple[TrialState, ...] = FINISHED) -> list[FrozenTrial]:
    """Return the trials in these states without copying them. They must not be changed."""
    return study._get_trials(deepcopy=False, states=states, use_cache=False)


def fixed_params(study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
    """Return what an enqueued trial, or a sampler around the one in use, has fixed."""
    fixed: dict[str, Any] = {}
    sampler = study.sampler
    while isinstance(sampler, optuna.samplers.PartialFixedSampler):
        fixed = {**sampler._fixed_params, **fixed}
        sampler = sampler._base_sampler
    attributes = study._storage.get_trial_system_attrs(trial._trial_id)
    return {**fixed, **attributes.get("fixed_params", {})}


def single_value(distribution: BaseDistribution) -> Any:
    """Return the first value of a distribution, the only one where ``single()`` holds."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    return distribution.low  # type: ignore[attr-defined]


def is_multi_objective(study: optuna.Study) -> bool:
    """Tell whether a study, or a bracket of one, has several objectives."""
    return len(study.directions) > 1


def innermost_sampler(sampler: BaseSampler) -> BaseSampler:
    """Return the sampler inside of any :class:`~optuna.samplers.PartialFixedSampler`."""
    while isinstance(sampler, optuna.samplers.PartialFixedSampler):
        sampler = sampler._base_sampler
    return sampler


def share_relative_params(study: optuna.Study, trial: FrozenTrial, params: dict[str, Any]) -> None:
    """Tell other workers which of several draws was taken.

    The TPE sampler leaves its last draw on the running trial, for the constant liar of other
    workers. Where several were drawn and another one was taken, that has to be put right.
    """
    attributes = study._storage.get_trial_system_attrs(trial._trial_id)
    n_chunks = 0
    while f"{_TPE_RELATIVE_PARAMS}:{n_chunks}" in attributes:
        n_chunks += 1
    if n_chunks == 0:
        return
    # Chunks cannot be deleted; blanks at the end do not change what the text means.
    text = json.dumps(params).ljust((n_chunks - 1) * _CHUNK + 1)
    for start in range(0, len(text), _CHUNK):
        study._storage.set_trial_system_attr(
            trial._trial_id,
            f"{_TPE_RELATIVE_PARAMS}:{start // _CHUNK}",
            text[start : start + _CHUNK],
        )
