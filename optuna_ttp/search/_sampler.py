"""The sampler: a base sampler weighted by predicted time and probability of success."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from functools import partial
import math
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
from optuna.trial import TrialState

from optuna_ttp._util.checks import check_kind
from optuna_ttp._util.checks import check_seed
from optuna_ttp.prediction import check_predictor
from optuna_ttp.search._candidates import Candidates
from optuna_ttp.search._candidates import drawn
from optuna_ttp.search._choice import Choice
from optuna_ttp.search._choice import resolved
from optuna_ttp.search._end_of_trial import record_at_end
from optuna_ttp.search._forecast import Forecast
from optuna_ttp.search._goal import Goal
from optuna_ttp.search._goal_of_study import GoalOfHalf
from optuna_ttp.search._goal_of_study import half_of
from optuna_ttp.search._preference import Preference
from optuna_ttp.search._sampler_memory import evidence
from optuna_ttp.search._sampler_memory import intersection
from optuna_ttp.search._sampler_memory import Pool
from optuna_ttp.search._sampler_memory import pool
from optuna_ttp.search._sampler_rules import SamplerRules
from optuna_ttp.search._search_space import check_space
from optuna_ttp.search._search_space import settled_params
from optuna_ttp.search._search_space import space_of_map
from optuna_ttp.search._search_space import without_singles
from optuna_ttp.study import fail_trial
from optuna_ttp.study import FINISHED
from optuna_ttp.study import innermost_sampler
from optuna_ttp.study import is_multi_objective
from optuna_ttp.study import Learner
from optuna_ttp.study import map_or_default
from optuna_ttp.study import prediction_of
from optuna_ttp.study import single_value
from optuna_ttp.study import trials_of
from optuna_ttp.study import weighed


if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

    from optuna_ttp.prediction import SearchPredictor
    from optuna_ttp.study import HyperparameterMap


_logger = get_logger("optuna.ttp.sampler")

# Samplers to whose acquisition function weights can be added.
_WEIGHED = (GPSampler, TPESampler)
# Samplers that need not be asked about every trial, so that the design can replace them at first.
_PATIENT = (RandomSampler, TPESampler, GPSampler, CmaEsSampler)
# Samplers whose independent proposals are random draws that do not depend on each other.
_INDEPENDENT = (*_PATIENT, NSGAIIISampler, NSGAIISampler, QMCSampler)


class TTPSampler(BaseSampler):
    """Weights its base sampler's proposals by predicted time and probability of success.

    The first trials are a cheap, spread-out design among the configurations that are predicted to
    reach the target (the cost-effective initial design of CArBO: Lee et al., 2020, "Cost-aware
    Bayesian optimization", arXiv 2003.10870). Then predictions are a prior of the optimum (piBO:
    Hvarfner et al., 2022, "piBO: Augmenting acquisition functions with user beliefs for Bayesian
    optimization", arXiv 2204.11051): the configuration ``x`` with the largest
    ``log a(x) + w_n (m(x) + log p(x) - alpha log c(x))`` is chosen. Here ``a`` is the base
    sampler's acquisition function; ``m`` the predicted merit; ``p`` the probability that training
    neither diverges nor misses the target; ``c`` the predicted cost, whose exponent ``alpha`` is
    the share of the study's budget that is left (cost cooling, CArBO section 3); and ``w_n`` a
    weight that is the measured trust in predictions (see :class:`~optuna_ttp.Calibration`) and
    falls with the number of trials ``n``. The base sampler alone decides about a share of the
    trials after the design, and about all trials while predictions are not trusted.

    With :class:`~optuna_ttp.FastestToTarget` the merit ``m`` is minus the logarithm of the
    predicted time to the target, in units of its error, and the cost is left out. With
    :class:`~optuna_ttp.BestMetric` it is the rank of the predicted depth (the logarithm of initial
    loss over loss) of the training loss at the end of a trial's budget, up to the depth at which
    the validation loss is predicted to be lowest. As values come in, a Gaussian process of the
    values over predicted depth, stability and gradient noise replaces it, weighted by its skill. A
    trial that :class:`~optuna_ttp.TTPPruner` stopped, or whose training loss became infinite or
    NaN, counts as one of the worst.

    :class:`~optuna.samplers.TPESampler` and :class:`~optuna.samplers.GPSampler` are weighted in
    one pass over their own candidates. Other base samplers draw several independent proposals, of
    which the best is taken; their relative proposals are used unchanged. Parameters other than
    learning rate, batch size and momentum are left to the base sampler; in a search space without
    these three, the base sampler decides alone.

    Example:
        >>> study = optuna.create_study(
        ...     sampler=TTPSampler(predictor, goal, TPESampler(seed=1), seed=1)
        ... )

    Args:
        predictor:
            Predicts the training time of a configuration.
        goal:
            The goal of the search with its limits: :class:`~optuna_ttp.BestMetric` or
            :class:`~optuna_ttp.FastestToTarget`. By default the goal of the study's
            :class:`~optuna_ttp.TTPPruner`; if neither has one, trials are compared by the study's
            own values, and a warning is given.
        base_sampler:
            Any sampler of Optuna. A :class:`~optuna.samplers.TPESampler` with the same seed by
            default.
        hyperparameters:
            The map from trial parameters to hyperparameters. The parameters ``"learning_rate"``,
            ``"batch_size"`` and ``"momentum"`` by default.
        search_space:
            Distributions of the parameters that the map reads, so that they are chosen together
            from the first trial on. By default they are taken from the finished trials.
        allow_duplicates:
            True if a configuration that ran may be proposed again, as for a noisy objective. Off
            by default. In a search space with other parameters, a learning rate, batch size and
            momentum may always be proposed again with other values of those.
        seed:
            The seed of the design, of the draws that leave trials to the base sampler, and of the
            default base sampler. A sampler that joins a study after its first trial also uses the
            number of its own first trial. Random by default.
        rules:
            Settings for experts, such as the length of the design.

    Raises:
        ValueError:
            If an argument is out of its range.
        TypeError:
            If an argument is of the wrong kind.
    """

    def __init__(
        self,
        predictor: SearchPredictor,
        goal: Goal | None = None,
        base_sampler: BaseSampler | None = None,
        *,
        hyperparameters: HyperparameterMap | None = None,
        search_space: Mapping[str, BaseDistribution] | None = None,
        allow_duplicates: bool = False,
        seed: int | None = None,
        rules: SamplerRules | None = None,
    ) -> None:
        check_predictor(predictor)
        if base_sampler is not None and not isinstance(base_sampler, BaseSampler):
            raise TypeError(f"base_sampler must be a sampler but got {base_sampler!r}.")
        check_space(search_space)
        check_kind("allow_duplicates", allow_duplicates, bool)
        if seed is not None:
            check_seed(seed)
        rules = SamplerRules() if rules is None else rules
        check_kind("rules", rules, SamplerRules)
        self._goal = GoalOfHalf(goal, predictor)
        mapping = map_or_default(hyperparameters)
        self._map = mapping.with_default_momentum(predictor.default_momentum)
        self._learner = Learner(predictor, self._map)
        self._base = TPESampler(seed=seed) if base_sampler is None else base_sampler
        self._given_space = None if search_space is None else dict(search_space)
        self._allow_duplicates = allow_duplicates
        self._seed = seed
        self._rules = rules
        self._has_default_base = base_sampler is None
        self._has_begun = False
        self._rng = np.random.default_rng(seed)
        self._pool_seed = int(self._rng.integers(2**32))

    def __str__(self) -> str:
        return f"TTPSampler({self._base})"

    def reseed_rng(self) -> None:
        """Draw fresh random states, for this sampler and its base sampler."""
        self._rng = np.random.default_rng()
        self._pool_seed = int(self._rng.integers(2**32))
        self._base.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Warn of a goal that does not fit the study, and call the base sampler's method.

        A sampler that joins a study after its first trial reseeds itself from its seed and the
        trial's number, because the same seed alone would propose the same trials again.

        Args:
            study:
                The study.
            trial:
                The new trial.

        Raises:
            ValueError:
                If the study has several objectives and a :class:`~optuna_ttp.TTPPruner`.
        """
        if is_multi_objective(study) and half_of(study.pruner) is not None:
            fail_trial(study, trial)
            raise ValueError(
                "Optuna does not prune in studies with several objectives, but this one has "
                f"{len(study.directions)} and a TTPPruner. Use TTPSampler alone, and call "
                "TTPPruner.decide(trial) in the objective."
            )
        if not self._has_begun:
            self._has_begun = True
            if self._seed is not None and trial.number > 0:
                self._rng = np.random.default_rng((self._seed, trial.number))
                if self._has_default_base:
                    self._base = TPESampler(seed=int(self._rng.integers(2**32)))
        self._goal.in_study(study)
        self._base.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the base sampler's search space joined with the parameters that the map reads.

        Args:
            study:
                The study.
            trial:
                The new trial.

        Returns:
            Distributions by the name of the parameter.
        """
        space = self._base.infer_relative_search_space(study, trial)
        return {**self._space_of_map(study), **space}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Choose the values of a new trial's parameters.

        Args:
            study:
                The study.
            trial:
                The new trial.
            search_space:
                The result of :meth:`infer_relative_search_space`.

        Returns:
            Values by the name of the parameter. A parameter that is left out is sampled
            independently once the trial suggests it.
        """
        # The base sampler gets its own search space in its own order: its draws depend on it.
        inferred = self._base.infer_relative_search_space(study, trial)
        base_space = {name: search_space[name] for name in inferred if name in search_space}
        choice = self._choice(study, trial, search_space)
        if choice is None:
            return self._base.sample_relative(study, trial, base_space)
        base = innermost_sampler(self._base)
        if isinstance(base, _PATIENT) and choice.n_before < self._rules.n_design_trials:
            chosen = choice.next_of_design()
            if chosen is not None:
                return self._complete(study, trial, search_space, chosen)
        if isinstance(base, _WEIGHED) and base_space:
            relative = weighed(
                base,
                choice.weigh,
                choice.propose,
                lambda sampler: sampler.sample_relative(study, trial, base_space),
            )
            # The base sampler's own first trials are random, so the design goes on.
            chosen = None if relative else choice.next_of_design()
            if relative or chosen is not None:
                return self._complete(study, trial, search_space, relative or chosen or {})
        relative = self._base.sample_relative(study, trial, base_space)
        if relative or not isinstance(base, _INDEPENDENT):
            # If a parameter is left out, the base sampler is asked once the trial suggests it.
            return relative
        candidates = [
            self._complete(study, trial, search_space, {}) for _ in range(self._rules.n_candidates)
        ]
        weights = choice.weigh(candidates)
        _logger.debug(f"Weights of the candidates: {np.round(weights, 3).tolist()}.")
        return candidates[int(np.argmax(weights))]

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return the base sampler's value of one parameter.

        Args:
            study:
                The study.
            trial:
                The running trial.
            param_name:
                The parameter's name.
            param_distribution:
                The parameter's distribution.

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
        """Store a prediction with a trial that did not fail and has none; call the base sampler.

        Args:
            study:
                The study.
            trial:
                The trial that is about to finish.
            state:
                The state in which the trial will finish.
            values:
                The objective values of the trial.

        Raises:
            ValueError:
                If the map reads a parameter that no trial of the study has.
        """
        try:
            if state != TrialState.FAIL and prediction_of(trial) is None:
                record_at_end(study, trial, state, self._map, self._learner)
        finally:
            self._base.after_trial(study, trial, state, values)

    def _space_of_map(self, study: Study) -> dict[str, BaseDistribution]:
        """Return the distributions of parameters that the map reads, or none if one is unknown."""
        if self._given_space is not None:
            return without_singles(self._given_space)
        if not isinstance(innermost_sampler(self._base), _INDEPENDENT):
            return {}
        return space_of_map(study, self._map, intersection(study, self))

    def _choice(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> Choice | None:
        """Return the choice of a trial's parameters, or None if the base sampler decides alone.

        That is so if a parameter that the map reads is unknown, if the trial is left to
        exploration, if predictions are not trusted, or if there is nothing to choose from.
        """
        trials = trials_of(study, (*FINISHED, TrialState.RUNNING), since_asked=True)
        known_space = {**intersection(study, self), **(self._given_space or {})}
        settled = settled_params(study, trial, trials, self._base, known_space)
        examples = {name: single_value(d) for name, d in search_space.items()}
        names = self._map.parameters_read({**examples, **settled})
        if not names or not names <= {*examples, *settled}:
            return None
        others = [t for t in trials if t.number != trial.number]
        n_before = sum(t.state != TrialState.FAIL for t in others)
        if self._rules.n_candidates == 1 or self._explores(n_before):
            return None
        predictor = self._learner.informed(study, others)
        if not predictor.calibration.trusted:
            return None
        space = {n: d for n, d in search_space.items() if n in names and n not in settled}
        if not space:
            return None
        fixed = {name: settled[name] for name in names if name in settled}
        candidates = self._pool(study, predictor, space, fixed, settled)
        if not len(candidates.candidates):
            return None
        resolve = partial(resolved, self._map, predictor)
        seen = evidence(study, self, others, resolve, self._rules.n_newest_values)
        goal = self._goal.in_study(study)
        budget = goal.study_budget
        preference = Preference(
            candidates.candidates,
            candidates.forecast(predictor, goal, self._expected),
            goal.is_time,
            math.inf if goal.is_time else predictor.best_depth,
            seen[0],
            partial(self._expected, goal, predictor),
            1.0 if budget is None else budget.share_left(others),
            self._rules.preference,
        )
        return Choice(
            preference,
            resolve,
            settled,
            frozenset(space),
            self._weight(predictor.calibration.trust, n_before),
            self._allow_duplicates or not set(search_space) <= set(space),
            n_before,
            seen[1],
        )

    def _explores(self, n_before: int) -> bool:
        """Draw True if the base sampler decides alone; in the design only if exploration is 1."""
        explores = self._rng.random() < self._rules.exploration
        after_design = n_before >= self._rules.n_design_trials
        return explores and (after_design or self._rules.exploration == 1.0)

    def _pool(
        self,
        study: Study,
        predictor: SearchPredictor,
        space: dict[str, BaseDistribution],
        fixed: dict[str, Any],
        settled: dict[str, Any],
    ) -> Pool:
        """Return the candidates of a search space with these fixed values, made at first use."""

        def make() -> Candidates:
            # A new generator per pool gives the same candidates when the study is resumed.
            rng = np.random.default_rng(self._pool_seed)
            params = [{**settled, **p} for p in drawn(space, rng, self._rules)]
            return Candidates.of(params, partial(resolved, self._map, predictor))

        return pool(study, self, (sorted(space.items()), sorted(fixed.items())), make)

    def _expected(
        self, goal: Goal, predictor: SearchPredictor, candidates: Candidates
    ) -> Forecast:
        """Return a predictor's forecast of candidates for trials with the limits of a goal."""
        limit = goal.steps(predictor, candidates.batch_size)
        rules = self._rules.forecast
        return Forecast.of(predictor, candidates, limit, rules, ends_at_target=goal.is_time)

    def _weight(self, trust: float, n_before: int) -> float:
        """Return the weight ``w_n`` of predictions, in [0, 1] (piBO).

        It is the trust in predictions, at least ``least_trust`` and one if unknown (NaN), times
        ``min(1, prior_trials / n_before)``.
        """
        weight = 1.0 if math.isnan(trust) else min(1.0, max(self._rules.least_trust, trust))
        return weight * min(1.0, self._rules.prior_trials / max(n_before, 1))

    def _complete(
        self,
        study: Study,
        trial: FrozenTrial,
        search_space: Mapping[str, BaseDistribution],
        relative: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return chosen values, with the base sampler's draws for the other parameters.

        A base sampler whose draws depend on each other is not asked.
        """
        candidate = {name: value for name, value in relative.items() if name in search_space}
        if not isinstance(innermost_sampler(self._base), _INDEPENDENT):
            return candidate
        # Sorted, because the order of a dictionary may differ between processes.
        for name in sorted(set(search_space) - set(candidate)):
            candidate[name] = self._base.sample_independent(study, trial, name, search_space[name])
        return candidate
