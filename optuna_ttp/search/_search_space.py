"""The distributions of the parameters that a sampler chooses, and the values already settled."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import TYPE_CHECKING

from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from optuna_ttp.study import fixed_params
from optuna_ttp.study import inner_fixed_params
from optuna_ttp.study import single_value
from optuna_ttp.study import trials_of


if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

    from optuna_ttp.study import HyperparameterMap


Space = Mapping[str, BaseDistribution]


def check_space(search_space: Any) -> None:
    """Raise TypeError unless a search space is None or maps names to distributions."""
    if search_space is not None and not isinstance(search_space, Mapping):
        raise TypeError(f"search_space must map names to distributions but got {search_space!r}.")
    for name, distribution in (search_space or {}).items():
        if not isinstance(distribution, BaseDistribution):
            raise TypeError(
                f"search_space must map names to distributions but got {distribution!r} for "
                f"{name!r}."
            )


def without_singles(space: Space) -> dict[str, BaseDistribution]:
    """Return the distributions that have more than one value, in their order."""
    return {
        name: distribution for name, distribution in space.items() if not distribution.single()
    }


def space_of_map(
    study: Study, mapping: HyperparameterMap, intersection: Space
) -> dict[str, BaseDistribution]:
    """Return the distributions of the parameters that a map reads; empty unless all are known.

    ``intersection`` has the distributions that all finished trials have in common. Those with a
    single value are left out.
    """
    names = mapping.parameters_read(_example_params(study))
    if not names or not names <= set(intersection):
        return {}
    return without_singles({name: intersection[name] for name in sorted(names)})


def _example_params(study: Study) -> dict[str, Any]:
    """Return the parameters of the newest completed or pruned trial that has any, or none."""
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    for trial in reversed(trials_of(study, states, since_asked=True)):
        if trial.params:
            return trial.params
    return {}


def settled_params(
    study: Study,
    trial: FrozenTrial,
    trials: Sequence[FrozenTrial],
    base: BaseSampler,
    space: Space,
) -> dict[str, Any]:
    """Return the values by name that are settled before a trial is sampled.

    These are the only values of their distributions in ``space``, values that a sampler or an
    enqueued trial has fixed, and values that the trial has suggested.
    """
    stored = next((t for t in reversed(trials) if t.number == trial.number), None)
    singles = {n: single_value(d) for n, d in space.items() if d.single()}
    fixed = fixed_params(study, trial, stored)
    return {**singles, **inner_fixed_params(base), **fixed, **trial.params}
