"""All uses of private attributes and methods of Optuna (4.8 to 5.x)."""

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


# Points at which the Gaussian process' acquisition function is weighed: a choice of cost.
_N_POINTS = 512
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
_T = TypeVar("_T")
# The attribute of a storage object that holds the state of its studies.
_REMEMBERED = "_optuna_ttp_remembered"


class _RememberedStudies(dict[int, Any]):
    """The state of a storage's studies, by their id; pickled and copied ones are empty."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def remembered_for(study: optuna.Study, make: Callable[[], _T]) -> _T:
    """Return the object that is kept for a study in this process; ``make`` makes it at first use.

    It is kept in an attribute of the study's storage object, which sampler, pruner, training log
    and report of a study share, and which ends with the study. A registry by id would not do: the
    ids of studies in two in-memory storages are the same.
    """
    studies = vars(study._storage).get(_REMEMBERED)
    # The method setdefault is atomic, so that threads get the same objects.
    if studies is None:
        studies = vars(study._storage).setdefault(_REMEMBERED, _RememberedStudies())
    if study._study_id not in studies:
        studies.setdefault(study._study_id, make())
    return cast(_T, studies[study._study_id])


def write_user_attr(study: optuna.Study, trial: FrozenTrial, key: str, value: Any) -> None:
    """Set a user attribute of a running trial from a sampler or pruner."""
    study._storage.set_trial_user_attr(trial._trial_id, key, value)


def has_constraints() -> bool:
    """Return True if Optuna's trials have constraints, that is, from Optuna 5 on."""
    return hasattr(optuna.trial.Trial, "set_constraint")


def write_constraint(study: optuna.Study, trial: FrozenTrial, key: str, value: float) -> None:
    """Set a constraint of a running trial."""
    study._storage.set_trial_system_attr(trial._trial_id, f"constraints:{key}", value)


def frozen(trial: optuna.trial.Trial) -> FrozenTrial:
    """Return a running trial as the storage holds it; it must not be changed."""
    return trial.study._storage.get_trial(trial._trial_id)


def fail_trial(study: optuna.Study, trial: FrozenTrial) -> None:
    """Set the state of a trial that cannot begin to failed, so that it does not remain running."""
    study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def trials_of(
    study: optuna.Study,
    states: tuple[TrialState, ...] = FINISHED,
    *,
    since_asked: bool = False,
) -> list[FrozenTrial]:
    """Return a study's trials in these states, uncopied, so that they must not be changed.

    With ``since_asked`` they may be as old as the last new trial of this thread, because Optuna's
    samplers cache them; otherwise they are read from the storage.
    """
    return study._get_trials(deepcopy=False, states=states, use_cache=since_asked)


def fixed_params(
    study: optuna.Study, trial: FrozenTrial, stored: FrozenTrial | None = None
) -> dict[str, Any]:
    """Return the parameters, by name, that an enqueued trial or the study's sampler has fixed.

    ``stored`` is a newer version of the running trial from the storage, if there is one.
    """
    fixed = inner_fixed_params(study.sampler)
    attributes = trial.system_attrs if stored is None else stored.system_attrs
    return {**fixed, **attributes.get("fixed_params", {})}


def inner_fixed_params(sampler: BaseSampler) -> dict[str, Any]:
    """Return the parameters, by name, that nested PartialFixedSamplers fix; empty if none is."""
    fixed: dict[str, Any] = {}
    while isinstance(sampler, optuna.samplers.PartialFixedSampler):
        fixed = {**sampler._fixed_params, **fixed}
        sampler = sampler._base_sampler
    return fixed


def single_value(distribution: BaseDistribution) -> Any:
    """Return the first value of a distribution, its only value if ``single()`` is True."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    return distribution.low  # type: ignore[attr-defined]


def is_multi_objective(study: optuna.Study) -> bool:
    """Return True if a study, or a Hyperband bracket of it, has several objectives."""
    return len(study.directions) > 1


def innermost_sampler(sampler: BaseSampler) -> BaseSampler:
    """Return the sampler inside nested PartialFixedSamplers, or the sampler itself."""
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
    """Return the result of ``call`` for a copy of a sampler with a weighted acquisition function.

    The copy scores its own candidates once, adds ``weigh(candidates)`` to its log acquisition
    values, shape ``(K,)``, and as usual stores its choice for the constant liar of other workers.
    A TPE sampler also scores the up to n candidates of ``propose(n)``, which may lack parameters.
    It is a copy because threads may share the sampler, whose state is updated in the end.
    """
    mixin = _WeighedTPE if isinstance(base, TPESampler) else _WeighedGP
    copied: Any = object.__new__(_mixed(mixin, type(base)))
    copied.__dict__.update(base.__dict__)
    copied.__dict__.update(_weigh=weigh, _propose=propose)
    result = call(copied)
    # The sampler keeps its state between calls, such as the starting point of the next fit.
    base.__dict__.update({k: v for k, v in copied.__dict__.items() if k in base.__dict__})
    return result


@lru_cache
def _mixed(mixin: type, base: type) -> type:
    """Return a subclass of a sampler's class with the mixin, made once per pair of classes."""
    return type(f"Weighed{base.__name__}", (mixin, base), {})


class _WeighedTPE:
    """Mixin of a TPE sampler that adds proposed candidates and weights all candidates."""

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
        # Proposed candidates are appended to the sampler's own ones. Parameters that they lack are
        # copied from the sampler's own candidates.
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
    """Mixin of a GP sampler that weights random points and the sampler's own best point."""

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
