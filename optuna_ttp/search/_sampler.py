"""The sampler: predicted time and success weigh what its base sampler finds good."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
import math
import time
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
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
from optuna.study import StudyDirection
from optuna.trial import TrialState

from optuna_ttp._util.checks import check_kind
from optuna_ttp._util.checks import check_seed
from optuna_ttp.prediction import check_predictor
from optuna_ttp.search._candidates import Candidates
from optuna_ttp.search._candidates import drawn
from optuna_ttp.search._forecast import Forecast
from optuna_ttp.search._goal import Goal
from optuna_ttp.search._goal_of_study import GoalOfHalf
from optuna_ttp.search._goal_of_study import half_inside
from optuna_ttp.search._preference import Evidence
from optuna_ttp.search._preference import Preference
from optuna_ttp.search._sampler_rules import SamplerRules
from optuna_ttp.study import Action
from optuna_ttp.study import decision_of
from optuna_ttp.study import fail_trial
from optuna_ttp.study import FINISHED
from optuna_ttp.study import fixed_params
from optuna_ttp.study import inner_fixed_params
from optuna_ttp.study import innermost_sampler
from optuna_ttp.study import is_multi_objective
from optuna_ttp.study import Learner
from optuna_ttp.study import lost_steps
from optuna_ttp.study import map_or_default
from optuna_ttp.study import MissingParameterError
from optuna_ttp.study import prediction_of
from optuna_ttp.study import PredictionRecord
from optuna_ttp.study import resolve_for_trial
from optuna_ttp.study import single_value
from optuna_ttp.study import state_of
from optuna_ttp.study import TrialRecord
from optuna_ttp.study import trials_of
from optuna_ttp.study import weighed
from optuna_ttp.study import write_record


if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

    from optuna_ttp.prediction import SearchPredictor
    from optuna_ttp.study import Configuration
    from optuna_ttp.study import HyperparameterMap


_logger = get_logger("optuna.ttp.sampler")

# Samplers whose acquisition function can be weighed.
_WEIGHED = (GPSampler, TPESampler)
# Samplers that do without being asked about some trials. Their first ones may be ours.
_PATIENT = (RandomSampler, TPESampler, GPSampler, CmaEsSampler)
# Samplers whose independent proposals are random draws that do not depend on each other.
_INDEPENDENT = (*_PATIENT, NSGAIIISampler, NSGAIISampler, QMCSampler)
# Pools of candidates that are remembered: fixed parameters make a space of their own.
_MOST_POOLS = 32
# Nats against what was tried before.
_UNWANTED = 1e6


class TTPSampler(BaseSampler):
    """Weighs what its base sampler finds good by predicted time and probability of success.

    The first trials are a cheap, spread-out design among the configurations that are predicted to
    reach the target (the cost-effective initial design of CArBO: Lee et al., 2020, "Cost-aware
    Bayesian optimization", arXiv 2003.10870). Then predictions are a prior of where the optimum is
    (piBO: Hvarfner et al., 2022, "piBO: Augmenting acquisition functions with user beliefs for
    Bayesian optimization", arXiv 2204.11051):
    ``log a(x) + w_n (m(x) + log p(x) - alpha log c(x))`` with the base sampler's acquisition
    function ``a``; how good ``m`` the configuration is predicted to be; the probability ``p`` that
    training neither diverges nor misses the target; the predicted cost ``c``, whose exponent
    ``alpha`` is the share of the study's budget that is left (cost cooling, CArBO section 3); and
    a weight ``w_n`` that falls with the number of trials ``n``, and with the measured trust in
    predictions (see :class:`~optuna_ttp.Calibration`). A share of the trials after the design is
    left to the base sampler. So are all once predictions turn out neither to rank the trials that
    ran nor to come close.

    Two questions can be asked. With :class:`~optuna_ttp.FastestToTarget`, which configuration is
    the fastest to the predictor's target: ``m`` is the logarithm of the predicted time, in units
    of its error. With :class:`~optuna_ttp.BestMetric`, which one is best at the end of a trial's
    budget: ``m`` ranks configurations by the depth that their training loss is predicted to get to
    by then, up to where the validation loss is predicted to turn; as values come in, a Gaussian
    process of the values over
    predicted depth, stability and noise takes its place, as far as it proves right. A trial that
    :class:`~optuna_ttp.TTPPruner` stopped, or whose training loss became infinite or NaN, counts
    as one of the worst.

    :class:`~optuna.samplers.TPESampler` and :class:`~optuna.samplers.GPSampler` are weighed in one
    pass over their own candidates. Of others the independent proposals are drawn a few times, and
    the best of them is taken; their relative proposals are used as they are. Parameters other than
    learning rate, batch size and momentum are the base sampler's; in a search space that has none
    of the three, this sampler is its base sampler.

    Example:
        >>> study = optuna.create_study(
        ...     sampler=TTPSampler(predictor, goal, TPESampler(seed=1), seed=1)
        ... )

    Args:
        predictor:
            Predicts the training time of a configuration.
        goal:
            What is searched for, and what a trial and the study may take:
            :class:`~optuna_ttp.BestMetric` or :class:`~optuna_ttp.FastestToTarget`. By default it
            is that of the study's :class:`~optuna_ttp.TTPPruner`; where neither has one, trials
            are compared by the study's own values, and a warning says so.
        base_sampler:
            Any sampler of Optuna. A :class:`~optuna.samplers.TPESampler` with the same seed by
            default.
        hyperparameters:
            Which trial parameter is which hyperparameter. The parameters ``"learning_rate"``,
            ``"batch_size"`` and ``"momentum"`` by default.
        search_space:
            Distributions of the parameters that the map reads, so that they are chosen together
            from the first trial on. By default they are taken from the finished trials.
        allow_duplicates:
            Whether a configuration that ran may be proposed again, as makes sense where the
            objective is noisy. Off by default. Where the search space has other parameters, the
            three may be proposed again with other values of those.
        seed:
            Of the design and of the draws that leave trials to the base sampler, and of the
            default base sampler. Where a study goes on with a new sampler, the number of its
            first trial counts, too. Random by default.
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
        _check_space(search_space)
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
        self._own_base = base_sampler is None
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
        """Pass the call on to the base sampler.

        A sampler that joins a study after its first trial draws other random numbers than the one
        that began it with the same seed: it would propose the same again.

        Args:
            study:
                The study.
            trial:
                The new trial.

        Raises:
            ValueError:
                If the study has several objectives and a :class:`~optuna_ttp.TTPPruner`.
        """
        if is_multi_objective(study) and half_inside(study.pruner) is not None:
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
                if self._own_base:
                    self._base = TPESampler(seed=int(self._rng.integers(2**32)))
        self._goal.in_study(study)
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
        """Choose a configuration.

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
        # What the base sampler would get without us, in its own order: its draws depend on it.
        inferred = self._base.infer_relative_search_space(study, trial)
        base_space = {name: search_space[name] for name in inferred if name in search_space}
        preference = self._preference(study, trial, search_space)
        if preference is None:
            return self._base.sample_relative(study, trial, base_space)
        base = innermost_sampler(self._base)
        if isinstance(base, _PATIENT) and preference.n_before < self._rules.n_design_trials:
            chosen = preference.next_of_design()
            if chosen is not None:
                return self._complete(study, trial, search_space, chosen)
        if isinstance(base, _WEIGHED) and base_space:
            relative = weighed(
                base,
                preference.weigh,
                preference.propose,
                lambda sampler: sampler.sample_relative(study, trial, base_space),
            )
            # The base sampler's own first trials are random, so the design goes on.
            chosen = None if relative else preference.next_of_design()
            if relative or chosen is not None:
                return self._complete(study, trial, search_space, relative or chosen or {})
        relative = self._base.sample_relative(study, trial, base_space)
        if relative or not isinstance(base, _INDEPENDENT):
            # Where a parameter is left out, the base sampler is asked once the trial suggests it.
            return relative
        candidates = [
            self._complete(study, trial, search_space, {}) for _ in range(self._rules.n_candidates)
        ]
        weights = preference.weigh(candidates)
        _logger.debug(f"Weights of the candidates: {np.round(weights, 3).tolist()}.")
        return candidates[int(np.argmax(weights))]

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
        """Write into the ledger what is predicted for the trial, unless the pruner did.

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
            if state != TrialState.FAIL and prediction_of(trial) is None:
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
        trials = trials_of(study, (*FINISHED, TrialState.RUNNING))
        others = [t for t in trials if t.number != trial.number]
        predictor = self._learner.informed(study, others)
        configuration = configuration.clipped(predictor.n_samples)
        prediction = predictor.estimate(*configuration)
        made = PredictionRecord.of(
            predictor,
            configuration,
            prediction,
            budget_steps=math.inf,
            prediction_seconds=time.perf_counter() - started,
        )
        write_record(study, trial, TrialRecord(trial.number, made))

    def _own_space(self, study: Study) -> dict[str, BaseDistribution]:
        """The distributions of the parameters that the map reads, where all are known."""
        if self._given_space is not None:
            return {n: d for n, d in self._given_space.items() if not d.single()}
        if not isinstance(innermost_sampler(self._base), _INDEPENDENT):
            return {}
        space = self._intersection(study)
        example = self._example_params(study)
        names = self._map.parameters_read(example)
        if not names or not names <= set(space):
            return {}
        return {name: space[name] for name in sorted(names) if not space[name].single()}

    def _memory(self, study: Study) -> _SamplerMemory:
        return state_of(study).part_of(self, _SamplerMemory)

    def _intersection(self, study: Study) -> dict[str, BaseDistribution]:
        """The distributions that all finished trials have in common."""
        with state_of(study).lock:
            return self._memory(study).intersection.calculate(study, use_cache=True)

    def _example_params(self, study: Study) -> dict[str, Any]:
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        for trial in reversed(trials_of(study, states, since_asked=True)):
            if trial.params:
                return trial.params
        return {}

    def _preference(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> _Choice | None:
        """What predictions say of this search space; nothing where the base sampler decides."""
        trials = trials_of(study, (*FINISHED, TrialState.RUNNING), since_asked=True)
        stored = next((t for t in reversed(trials) if t.number == trial.number), None)
        known = self._known_params(study, trial, stored)
        examples = {name: single_value(d) for name, d in search_space.items()}
        read = self._map.parameters_read({**examples, **known})
        if not read or not read <= {*examples, *known}:
            return None
        others = [t for t in trials if t.number != trial.number]
        n_before = sum(t.state != TrialState.FAIL for t in others)
        if self._rules.n_candidates == 1 or self._explores(n_before):
            return None
        predictor = self._learner.informed(study, others)
        if not predictor.calibration.trusted:
            return None
        own = {name: d for name, d in search_space.items() if name in read and name not in known}
        if not own:
            return None
        pool = self._pool(study, predictor, own, {n: known[n] for n in read if n in known}, known)
        if not len(pool.candidates):
            return None
        repeat = self._allow_duplicates or not set(search_space) <= set(own)
        evidence, n_unknown = self._evidence(study, others, predictor)
        goal = self._goal.in_study(study)
        share = 1.0 if goal.study_budget is None else goal.study_budget.share_left(others)
        preference = Preference(
            pool.candidates,
            pool.forecast(predictor, goal, self._expected),
            goal,
            math.inf if goal.is_time else predictor.best_depth,
            evidence,
            partial(self._expected, goal, predictor),
            share,
            self._rules.preference,
        )
        trust = predictor.calibration.trust
        weight = 1.0 if math.isnan(trust) else min(1.0, max(self._rules.least_trust, trust))
        weight *= min(1.0, self._rules.prior_trials / max(n_before, 1))
        return _Choice(
            preference,
            partial(self._resolve, predictor),
            known,
            frozenset(own),
            weight,
            repeat,
            n_before,
            n_unknown,
        )

    def _pool(
        self,
        study: Study,
        predictor: SearchPredictor,
        space: dict[str, BaseDistribution],
        fixed: dict[str, Any],
        known: dict[str, Any],
    ) -> _Pool:
        """Return the candidates of a search space with these values fixed, the same every time."""
        key = repr((sorted(space.items()), sorted(fixed.items())))
        with state_of(study).lock:
            pools = self._memory(study).pools
            if key not in pools:
                if len(pools) >= _MOST_POOLS:
                    pools.clear()
                # The same ones again after the study was put aside.
                rng = np.random.default_rng(self._pool_seed)
                params = [{**known, **p} for p in drawn(space, rng, self._rules)]
                pools[key] = _Pool(Candidates.of(params, partial(self._resolve, predictor)))
            return pools[key]

    def _explores(self, n_before: int) -> bool:
        """Draw whether a trial is left to the base sampler. The design spreads out by itself."""
        drawn_one = self._rng.random() < self._rules.exploration
        return drawn_one and (
            n_before >= self._rules.n_design_trials or self._rules.exploration == 1.0
        )

    def _known_params(
        self, study: Study, trial: FrozenTrial, stored: FrozenTrial | None
    ) -> dict[str, Any]:
        """Values that are settled before sampling: fixed, suggested, or the only possible."""
        space = {**self._intersection(study), **(self._given_space or {})}
        singles = {n: single_value(d) for n, d in space.items() if d.single()}
        inner = inner_fixed_params(self._base)
        return {**singles, **inner, **fixed_params(study, trial, stored), **trial.params}

    def _evidence(
        self, study: Study, trials: Sequence[FrozenTrial], predictor: SearchPredictor
    ) -> tuple[Evidence, int]:
        """What was tried and what it gave; and how many trials are about to try something."""
        sign = -1.0 if study.directions[0] == StudyDirection.MAXIMIZE else 1.0
        valued = not is_multi_objective(study)
        under_way: list[Configuration] = []
        n_unknown = 0
        with state_of(study).lock:
            seen = self._memory(study).seen
            for trial in [trial for trial in trials if trial.number not in seen.numbers]:
                configuration = self._resolve(predictor, trial.params) if trial.params else None
                if trial.state != TrialState.RUNNING:
                    value = sign * trial.values[0] if valued and trial.values else _without(trial)
                    seen.add(trial.number, configuration, value if valued else math.nan)
                elif configuration is None:
                    n_unknown += 1
                else:
                    under_way.append(configuration)
            tried, newest = [*seen.tried, *under_way], seen.values[-self._rules.n_newest_values :]
        evidence = Evidence(
            Candidates.resolved(tried),
            Candidates.resolved([configuration for configuration, _ in newest]),
            np.array([value for _, value in newest], dtype=np.float64),
        )
        return evidence, n_unknown

    def _expected(
        self, goal: Goal, predictor: SearchPredictor, candidates: Candidates
    ) -> Forecast:
        return Forecast.of(
            predictor,
            candidates.learning_rate,
            candidates.batch_size,
            candidates.momentum,
            goal,
            self._rules.forecast,
        )

    def _complete(
        self,
        study: Study,
        trial: FrozenTrial,
        search_space: Mapping[str, BaseDistribution],
        relative: Mapping[str, Any],
    ) -> dict[str, Any]:
        candidate = {name: value for name, value in relative.items() if name in search_space}
        if not isinstance(innermost_sampler(self._base), _INDEPENDENT):
            return candidate
        # Sorted, because the order of a dictionary may differ between processes.
        for name in sorted(set(search_space) - set(candidate)):
            candidate[name] = self._base.sample_independent(study, trial, name, search_space[name])
        return candidate

    def _resolve(
        self, predictor: SearchPredictor, params: Mapping[str, Any]
    ) -> Configuration | None:
        try:
            configuration = self._map.resolve(params)
        except MissingParameterError:
            # In a branch of a conditional space whose parameters are not known.
            return None
        return None if configuration is None else configuration.clipped(predictor.n_samples)


def _check_space(search_space: Any) -> None:
    """Raise TypeError unless an argument maps names to distributions, or is none."""
    if search_space is not None and not isinstance(search_space, Mapping):
        raise TypeError(f"search_space must map names to distributions but got {search_space!r}.")
    for name, distribution in (search_space or {}).items():
        if not isinstance(distribution, BaseDistribution):
            raise TypeError(
                f"search_space must map names to distributions but got {distribution!r} for "
                f"{name!r}."
            )


def _without(trial: FrozenTrial) -> float:
    """What a trial without a value counts as: it failed, or nobody knows."""
    if trial.state != TrialState.PRUNED:
        return math.nan
    decision = decision_of(trial)
    if decision is not None and decision.action == Action.STOP:
        return math.inf
    return math.inf if lost_steps(trial) else math.nan


class _Seen:
    """Finished trials of a study."""

    def __init__(self) -> None:
        self.numbers: set[int] = set()
        self.tried: list[Configuration] = []
        self.values: list[tuple[Configuration, float]] = []

    def add(self, number: int, configuration: Configuration | None, value: float) -> None:
        self.numbers.add(number)
        if configuration is not None:
            self.tried.append(configuration)
            if not math.isnan(value):
                self.values.append((configuration, value))


class _Pool:
    """Candidates of a search space, and what was last expected of them."""

    def __init__(self, candidates: Candidates) -> None:
        self.candidates = candidates
        self._last: tuple[SearchPredictor, Goal, Forecast] | None = None

    def forecast(
        self,
        predictor: SearchPredictor,
        goal: Goal,
        expected: Callable[[Goal, SearchPredictor, Candidates], Forecast],
    ) -> Forecast:
        last = self._last
        if last is None or last[0] is not predictor or last[1] != goal:
            last = predictor, goal, expected(goal, predictor, self.candidates)
            self._last = last
        return last[2]


class _SamplerMemory:
    """What a sampler remembers of a study: its search spaces, their candidates, its trials."""

    def __init__(self) -> None:
        self.intersection = IntersectionSearchSpace(include_pruned=True)
        self.pools: dict[str, _Pool] = {}
        self.seen = _Seen()


@dataclass(frozen=True, eq=False)
class _Choice:
    """A preference, for parameters as the base sampler has them."""

    preference: Preference
    resolve: Callable[[Mapping[str, Any]], Configuration | None]
    known: Mapping[str, Any]
    own: frozenset[str]
    weight: float
    repeat: bool
    n_before: int
    n_unknown: int

    def weigh(self, params: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
        """Nats for each; none where predictions say nothing."""
        resolved = [self.resolve({**self.known, **p}) for p in params]
        told = np.array([c is not None for c in resolved])
        weights = np.zeros(len(params))
        candidates = Candidates.resolved([c for c in resolved if c is not None])
        if len(candidates):
            own = self.weight * self.preference.weigh(candidates)
            if not self.repeat:
                own = np.where(self.preference.is_tried(candidates), -_UNWANTED, own)
            weights[told] = own
        return weights

    def propose(self, n: int) -> list[dict[str, Any]]:
        """Up to so many configurations that are expected to be best."""
        pool = self.preference.pool
        return [self._own(pool.params[j]) for j in self.preference.best(n, repeat=self.repeat)]

    def next_of_design(self) -> dict[str, Any] | None:
        """The next one of the design, leaving those before it to trials about to begin."""
        places = self.preference.best(1 + self.n_unknown, repeat=self.repeat)
        return self._own(self.preference.pool.params[places[-1]]) if places else None

    def _own(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {name: params[name] for name in self.own}
