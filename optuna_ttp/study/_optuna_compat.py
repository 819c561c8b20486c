"""Every private touch of Optuna (4.8 to 5.x), and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any
from typing import cast
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import GPSampler
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial
from optuna.trial import TrialState


# Points at which the Gaussian process' acquisition function is weighed. Not ablated yet.
_N_POINTS = 512
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
_T = TypeVar("_T")


# The attribute of a storage object under which we keep what is remembered of its studies.
_REMEMBERED = "_optuna_ttp_remembered"


class _RememberedStudies(dict[int, Any]):
    """What is remembered of a storage's studies, by their id; a pickled or copied one is empty."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def remembered_for(study: optuna.Study, make: Callable[[], _T]) -> _T:
    """Return the object that is remembered of a study, made at the first call.

    It is an attribute of the study's storage object. That is the one object that sampler, pruner,
    training log and report of a study share, it ends when nobody uses the study any more, and no
    module has to keep a registry of studies. The id alone does not tell studies apart: it is the
    same in any two in-memory storages.
    """
    studies = vars(study._storage).get(_REMEMBERED)
    # Setting a default is atomic, so that threads get the same objects.
    if studies is None:
        studies = vars(study._storage).setdefault(_REMEMBERED, _RememberedStudies())
    if study._study_id not in studies:
        studies.setdefault(study._study_id, make())
    return cast(_T, studies[study._study_id])


def write_user_attr(study: optuna.Study, trial: FrozenTrial, key: str, value: Any) -> None:
    """Set a user attribute of a running trial from a sampler or pruner."""
    study._storage.set_trial_user_attr(trial._trial_id, key, value)


def has_constraints() -> bool:
    """Return whether trials have constraints, as from Optuna 5 on."""
    return hasattr(optuna.trial.Trial, "set_constraint")


def write_constraint(study: optuna.Study, trial: FrozenTrial, key: str, value: float) -> None:
    """Set a constraint of a running trial."""
    study._storage.set_trial_system_attr(trial._trial_id, f"constraints:{key}", value)


def frozen(trial: optuna.trial.Trial) -> FrozenTrial:
    """Return a running trial as the storage has it."""
    return trial.study._storage.get_trial(trial._trial_id)


def fail_trial(study: optuna.Study, trial: FrozenTrial) -> None:
    """Mark a trial that cannot begin as failed, so that it does not stay running for ever."""
    study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def trials_of(
    study: optuna.Study,
    states: tuple[TrialState, ...] = FINISHED,
    *,
    since_asked: bool = False,
) -> list[FrozenTrial]:
    """Return the trials in these states without copying them. They must not be changed.

    With ``since_asked`` they are read at most once for a trial, together with its sampler.
    """
    return study._get_trials(deepcopy=False, states=states, use_cache=since_asked)


def fixed_params(
    study: optuna.Study, trial: FrozenTrial, stored: FrozenTrial | None = None
) -> dict[str, Any]:
    """Return what an enqueued trial, or a sampler around the one in use, has fixed.

    ``stored`` is the running trial as it was just read from the storage, if it was.
    """
    fixed = inner_fixed_params(study.sampler)
    attributes = trial.system_attrs if stored is None else stored.system_attrs
    return {**fixed, **attributes.get("fixed_params", {})}


def inner_fixed_params(sampler: BaseSampler) -> dict[str, Any]:
    """Return what a sampler has fixed of its own base sampler's parameters."""
    fixed: dict[str, Any] = {}
    while isinstance(sampler, optuna.samplers.PartialFixedSampler):
        fixed = {**sampler._fixed_params, **fixed}
        sampler = sampler._base_sampler
    return fixed


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


Weigh = Callable[[list[dict[str, Any]]], "NDArray[np.float64]"]


def weighed(
    base: TPESampler | GPSampler,
    weigh: Weigh,
    propose: Callable[[int], list[dict[str, Any]]],
    call: Callable[[BaseSampler], dict[str, Any]],
) -> dict[str, Any]:
    """Call a sampler with something added to its acquisition function, in one pass.

    The sampler scores its own candidates, draws no more than once, and itself tells other workers
    what it chose, as their constant liar needs it. It is used through a copy, because threads may
    share it. ``weigh`` gives what to add to the logarithm of how good candidates are; ``propose``
    gives up to so many further candidates, with all or some of the parameters. Return what
    ``call`` returns for the copy.
    """
    mixin = _WeighedTPE if isinstance(base, TPESampler) else _WeighedGP
    copied: Any = object.__new__(_mixed(mixin, type(base)))
    copied.__dict__.update(base.__dict__)
    copied.__dict__.update(_weigh=weigh, _propose=propose)
    result = call(copied)
    # What it keeps between calls, such as the starting point of the next fit.
    base.__dict__.update({k: v for k, v in copied.__dict__.items() if k in base.__dict__})
    return result


@lru_cache
def _mixed(mixin: type, base: type) -> type:
    """Return the class of a sampler that is weighed; made once for each class of sampler."""
    return type(f"Weighed{base.__name__}", (mixin, base), {})


class _WeighedTPE:
    """A TPE sampler whose candidates are weighed, and are joined by proposed ones."""

    _weigh: Weigh
    _propose: Callable[[int], list[dict[str, Any]]]

    def _build_parzen_estimator(
        self, study: optuna.Study, search_space: dict[str, BaseDistribution], *args: Any, **kw: Any
    ) -> Any:
        self._space = search_space
        build = super()._build_parzen_estimator  # type: ignore[misc]
        return build(study, search_space, *args, **kw)

    def _compute_acquisition_func(
        self, samples: dict[str, NDArray[np.float64]], mpe_below: Any, mpe_above: Any
    ) -> NDArray[np.float64]:
        n = len(next(iter(samples.values())))
        ours = self._propose(n // 2)
        # Side by side with those that it has drawn itself from what is good. Parameters that ours
        # lack are as it has drawn them.
        for name, values in samples.items():
            distribution = self._space[name]
            further = values[: len(ours)].copy()
            for i, params in enumerate(ours):
                if name in params:
                    further[i] = distribution.to_internal_repr(params[name])
            samples[name] = np.concatenate([values, further])
        compute = super()._compute_acquisition_func  # type: ignore[misc]
        scores = np.asarray(compute(samples, mpe_below, mpe_above))
        proposed = [
            {name: self._space[name].to_external_repr(v[i].item()) for name, v in samples.items()}
            for i in range(len(scores))
        ]
        return np.asarray(scores + self._weigh(proposed))


class _WeighedGP:
    """A Gaussian-process sampler that also weighs random points with its own best one."""

    _weigh: Weigh
    _propose: Callable[[int], list[dict[str, Any]]]

    def _optimize_acqf(
        self, acqf: Any, best_params: NDArray[np.float64] | None
    ) -> NDArray[np.float64]:
        best = super()._optimize_acqf(acqf, best_params)  # type: ignore[misc]
        rng = self._rng.rng  # type: ignore[attr-defined]
        points = acqf.search_space.sample_normalized_params(_N_POINTS, rng=rng)
        points = np.concatenate([best[None], points])
        values = np.asarray(acqf.eval_acqf_no_grad(points))
        params = [acqf.search_space.get_unnormalized_param(point) for point in points]
        return np.asarray(points[int(np.argmax(values + self._weigh(params)))])
