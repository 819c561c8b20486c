"""The sampler: among what its base sampler finds good, it avoids what trains slowly."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from datetime import datetime
from functools import partial
import time
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.logging import get_logger
from optuna.samplers import BaseSampler
from optuna.samplers import CmaEsSampler
from optuna.samplers import GPSampler
from optuna.samplers import NSGAIIISampler
from optuna.samplers import NSGAIISampler
from optuna.samplers import QMCSampler
from optuna.samplers import RandomSampler
from optuna.samplers import TPESampler
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import TrialState

from optuna_ttp._optuna_compat import fail_trial
from optuna_ttp._optuna_compat import fixed_params
from optuna_ttp._optuna_compat import innermost_sampler
from optuna_ttp._optuna_compat import is_multi_objective
from optuna_ttp._optuna_compat import PerStudy
from optuna_ttp._optuna_compat import share_relative_params
from optuna_ttp._optuna_compat import single_value
from optuna_ttp._optuna_compat import trials_of
from optuna_ttp.hyperparameters import map_or_default
from optuna_ttp.hyperparameters import MissingParameterError
from optuna_ttp.ledger import PREDICTION
from optuna_ttp.ledger import record_paid
from optuna_ttp.ledger import record_prediction
from optuna_ttp.ledger import stored_entry
from optuna_ttp.pruner import clip_batch_size
from optuna_ttp.pruner import resolve_for_trial
from optuna_ttp.pruner import TTPPruner
from optuna_ttp.training_log import informed_by


if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

    from optuna_ttp.hyperparameters import Configuration
    from optuna_ttp.hyperparameters import HyperparameterMap
    from optuna_ttp.predictor import TrainingTimePredictor


_logger = get_logger("optuna.ttp.sampler")

# Samplers of which a relative proposal can be asked for again without harm.
_REDRAWABLE = (RandomSampler, TPESampler)
# Samplers whose independent proposals are random draws that do not depend on each other.
_INDEPENDENT = (
    *_REDRAWABLE,
    CmaEsSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    QMCSampler,
)


class TTPSampler(BaseSampler):
    """Passes over those proposals of its base sampler that are predicted to train slowly.

    The base sampler is asked for a few candidates. The first one is proposed, unless its predicted
    time to the target (in seconds, or in steps where the time of a step is not known) is clearly
    longer than the shortest of all: by more than predictions are typically off, a factor of two
    until trials have told (see :class:`~optuna_ttp.Calibration`). Then it is the first that is
    not. A share of the trials takes the first candidate, whatever is predicted. Parameters other
    than learning rate, batch size and momentum come along with the chosen candidate; in a search
    space that has none of the three, this sampler is its base sampler. So it is once the
    predictions turn out neither to rank the trials that ran nor to come close.

    Several candidates are drawn where the base sampler permits it: from
    :class:`~optuna.samplers.RandomSampler` and :class:`~optuna.samplers.TPESampler` always, from
    the Gaussian process, CMA-ES, quasi-Monte Carlo and NSGA samplers in their random first trials.
    Otherwise the single proposal of the base sampler is used as it is.

    Example:
        >>> study = optuna.create_study(
        ...     sampler=TTPSampler(predictor, base_sampler=TPESampler(seed=1), seed=1)
        ... )

    Args:
        predictor:
            Predicts the training time of a configuration.
        base_sampler:
            Any sampler of Optuna. A :class:`~optuna.samplers.TPESampler` with the same seed by
            default.
        hyperparameters:
            Which trial parameter is which hyperparameter. The parameters ``"learning_rate"``,
            ``"batch_size"`` and ``"momentum"`` by default.
        search_space:
            Distributions of the parameters that the map reads, so that they are chosen together
            from the first trial on. By default they are found from the finished trials.
        n_candidates:
            How many proposals to choose from. Eight by default.
        exploration:
            The share of trials that take the first proposal. 0.1 by default.
        seed:
            For that share, and for the default base sampler.

    Raises:
        ValueError:
            If an argument is out of its range.
        TypeError:
            If an argument is of the wrong kind.
    """

    def __init__(
        self,
        predictor: TrainingTimePredictor,
        base_sampler: BaseSampler | None = None,
        *,
        hyperparameters: HyperparameterMap | None = None,
        search_space: Mapping[str, BaseDistribution] | None = None,
        n_candidates: int = 8,
        exploration: float = 0.1,
        seed: int | None = None,
    ) -> None:
        from optuna_ttp.predictor import TrainingTimePredictor

        if not isinstance(predictor, TrainingTimePredictor):
            raise TypeError(
                f"predictor must be a TrainingTimePredictor but got {type(predictor).__name__}."
            )
        if base_sampler is not None and not isinstance(base_sampler, BaseSampler):
            raise TypeError(f"base_sampler must be a sampler but got {base_sampler!r}.")
        for name, distribution in (search_space or {}).items():
            if not isinstance(distribution, BaseDistribution):
                raise TypeError(
                    f"search_space must map names to distributions but got {distribution!r} for "
                    f"{name!r}."
                )
        if n_candidates < 1:
            raise ValueError(f"n_candidates must be at least 1 but got {n_candidates}.")
        if not 0.0 <= exploration <= 1.0:
            raise ValueError(f"exploration must be in [0, 1] but got {exploration}.")
        self._predictor = predictor
        self._base = TPESampler(seed=seed) if base_sampler is None else base_sampler
        self._map = map_or_default(hyperparameters)
        self._given_space = None if search_space is None else dict(search_space)
        self._n_candidates = n_candidates
        self._exploration = exploration
        self._rng = np.random.default_rng(seed)
        self._intersection = PerStudy(partial(IntersectionSearchSpace, include_pruned=True))

    def __str__(self) -> str:
        return f"TTPSampler({self._base})"

    def reseed_rng(self) -> None:
        """Draw fresh random states, for this sampler and its base sampler."""
        self._rng = np.random.default_rng()
        self._base.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Pass the call on to the base sampler.

        Args:
            study:
                The study.
            trial:
                The new trial.

        Raises:
            ValueError:
                If the study has several objectives and a :class:`~optuna_ttp.TTPPruner`.
        """
        if is_multi_objective(study) and isinstance(study.pruner, TTPPruner):
            fail_trial(study, trial)
            raise ValueError(
                "Optuna does not prune in studies with several objectives, but this one has "
                f"{len(study.directions)} and a TTPPruner. Use TTPSampler alone."
            )
        self._base.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the base sampler's search space and the parameters that the map reads.

        Args:
            study:
                The study.
            trial:
                The new trial.

        Returns:
            Distributions by name.
        """
        space = self._base.infer_relative_search_space(study, trial)
        own = self._own_space(study)
        return {**own, **space}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Choose among the base sampler's proposals.

        Args:
            study:
                The study.
            trial:
                The new trial.
            search_space:
                What :meth:`infer_relative_search_space` returned.

        Returns:
            Values by name.
        """
        known = self._known_params(study, trial)
        examples = {name: single_value(d) for name, d in search_space.items()}
        # What the base sampler would get without us, in its own order: its draws depend on it.
        inferred = self._base.infer_relative_search_space(study, trial)
        base_space = {name: search_space[name] for name in inferred if name in search_space}
        relative = self._base.sample_relative(study, trial, base_space)
        if not (
            self._applies({**examples, **known})
            and self._may_complete(search_space, relative)
            and self._may_choose(redrawn=bool(relative))
            and (predictor := informed_by(study, self._predictor)).calibration.trusted
        ):
            # Where a parameter is left out, the base sampler is asked once the trial suggests it.
            return relative
        relatives = [relative]
        for _ in range(self._n_candidates - 1):
            again = self._base.sample_relative(study, trial, base_space) if relative else {}
            relatives.append(again)
        candidates = [self._complete(study, trial, search_space, r) for r in relatives]
        chosen = self._choose([{**candidate, **known} for candidate in candidates], predictor)
        if relative:
            share_relative_params(study, trial, relatives[chosen])
        return candidates[chosen]

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Pass the call on to the base sampler.

        Args:
            study:
                The study.
            trial:
                The running trial.
            param_name:
                The parameter's name.
            param_distribution:
                Its distribution.

        Returns:
            The base sampler's value.
        """
        return self._base.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Write into the ledger what the trial took, and what is predicted for it.

        Args:
            study:
                The study.
            trial:
                The trial that is about to finish.
            state:
                Its state.
            values:
                Its objective values.

        Raises:
            ValueError:
                If the map reads a parameter that no trial of the study has.
        """
        try:
            if trial.datetime_start is not None:
                now = datetime.now(trial.datetime_start.tzinfo)
                record_paid(study, trial, (now - trial.datetime_start).total_seconds())
            if state != TrialState.FAIL and stored_entry(study, trial, PREDICTION) is None:
                try:
                    self._record_prediction(study, trial)
                except MissingParameterError:
                    # A pruned trial may not have got as far as suggesting its parameters.
                    if state == TrialState.COMPLETE:
                        raise
        finally:
            self._base.after_trial(study, trial, state, values)

    def _record_prediction(self, study: Study, trial: FrozenTrial) -> None:
        """Without our pruner nobody predicted yet. Nothing was learned from this trial either."""
        configuration = resolve_for_trial(self._map, study, trial)
        if configuration is None:
            return
        started = time.perf_counter()
        # The trial itself is not finished yet, so nothing is learned from it here.
        predictor = informed_by(study, self._predictor)
        configuration = clip_batch_size(configuration, predictor)
        prediction = predictor.predict(*configuration)
        record_prediction(
            study,
            trial,
            predictor,
            configuration,
            prediction,
            budget_steps=float("inf"),
            prediction_seconds=time.perf_counter() - started,
        )

    def _own_space(self, study: Study) -> dict[str, BaseDistribution]:
        """The distributions of the parameters that the map reads, where all are known."""
        if self._given_space is not None:
            return {n: d for n, d in self._given_space.items() if not d.single()}
        if not isinstance(innermost_sampler(self._base), _INDEPENDENT):
            return {}
        space = self._intersection[study].calculate(study)
        example = self._example_params(study)
        names = self._map.parameters_read(example)
        if not names or not names <= set(space):
            return {}
        return {name: space[name] for name in sorted(names) if not space[name].single()}

    def _example_params(self, study: Study) -> dict[str, Any]:
        for trial in reversed(trials_of(study, (TrialState.COMPLETE, TrialState.PRUNED))):
            if trial.params:
                return trial.params
        return {}

    def _known_params(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        """Values that are settled before sampling: fixed, suggested, or the only possible."""
        space = {**self._intersection[study].calculate(study), **(self._given_space or {})}
        singles = {n: single_value(d) for n, d in space.items() if d.single()}
        return {**singles, **fixed_params(study, trial), **trial.params}

    def _applies(self, names: Mapping[str, Any]) -> bool:
        """Whether the map reads something, and all that it reads is among these names."""
        read = self._map.parameters_read(names)
        return bool(read) and read <= set(names)

    def _may_complete(
        self, search_space: Mapping[str, BaseDistribution], relative: Mapping[str, Any]
    ) -> bool:
        """Whether what the base sampler left out may be drawn independently here."""
        if set(search_space) <= set(relative):
            return True
        return isinstance(innermost_sampler(self._base), _INDEPENDENT)

    def _may_choose(self, *, redrawn: bool) -> bool:
        if self._n_candidates == 1 or self._rng.random() < self._exploration:
            return False
        return not redrawn or isinstance(innermost_sampler(self._base), _REDRAWABLE)

    def _complete(
        self,
        study: Study,
        trial: FrozenTrial,
        search_space: Mapping[str, BaseDistribution],
        relative: Mapping[str, Any],
    ) -> dict[str, Any]:
        candidate = dict(relative)
        # Sorted, because the order of a dictionary may differ between processes.
        for name in sorted(set(search_space) - set(relative)):
            candidate[name] = self._base.sample_independent(study, trial, name, search_space[name])
        return candidate

    def _choose(self, candidates: list[dict[str, Any]], predictor: TrainingTimePredictor) -> int:
        """The first candidate within a margin of the shortest predicted time.

        Between candidates that predictions cannot tell apart, the base sampler knows better.
        """
        resolved = [self._resolve(candidate) for candidate in candidates]
        if any(configuration is None for configuration in resolved):
            return 0
        rates, sizes, momenta = zip(
            *(clip_batch_size(c, predictor) for c in resolved if c is not None), strict=True
        )
        seconds = predictor.score(rates, sizes, momenta)
        margin = predictor.calibration.typical_factor
        chosen = int(np.argmax(seconds <= margin * seconds.min()))
        _logger.debug(f"Predicted seconds of the candidates: {np.round(seconds, 3).tolist()}.")
        return chosen

    def _resolve(self, candidate: dict[str, Any]) -> Configuration | None:
        try:
            return self._map.resolve(candidate)
        except MissingParameterError:
            # The candidate is in a branch of a conditional space whose parameters are not known.
            return None
