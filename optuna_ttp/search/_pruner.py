"""The pruner: stops what is predicted to be hopeless, before its first step and on its way."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace
import math
import time
from typing import TYPE_CHECKING

import numpy as np
import optuna
from optuna.logging import get_logger
from optuna.pruners import BasePruner
from optuna.trial import TrialState

from optuna_ttp._util.checks import check_kind
from optuna_ttp._util.checks import check_seed
from optuna_ttp.calibration import probability_below
from optuna_ttp.calibration import Z_90
from optuna_ttp.prediction import check_predictor
from optuna_ttp.prediction import Outcome
from optuna_ttp.prediction import Prediction
from optuna_ttp.search._goal_of_study import GoalOfHalf
from optuna_ttp.search._pruner_rules import PrunerRules
from optuna_ttp.search._running_trial import blown_up
from optuna_ttp.search._running_trial import RunningTrialJudge
from optuna_ttp.study import Action
from optuna_ttp.study import as_logged
from optuna_ttp.study import best_depth
from optuna_ttp.study import Configuration
from optuna_ttp.study import Decision
from optuna_ttp.study import decision_of
from optuna_ttp.study import DecisionRecord
from optuna_ttp.study import FINISHED
from optuna_ttp.study import frozen
from optuna_ttp.study import has_constraints
from optuna_ttp.study import HyperparameterMap
from optuna_ttp.study import incumbent
from optuna_ttp.study import is_multi_objective
from optuna_ttp.study import Learner
from optuna_ttp.study import map_or_default
from optuna_ttp.study import n_skipped_in_a_row
from optuna_ttp.study import Objection
from optuna_ttp.study import observed_curve
from optuna_ttp.study import Override
from optuna_ttp.study import prediction_of
from optuna_ttp.study import PredictionRecord
from optuna_ttp.study import progress_to_target
from optuna_ttp.study import record_of
from optuna_ttp.study import resolve_for_trial
from optuna_ttp.study import state_of
from optuna_ttp.study import TrialRecord
from optuna_ttp.study import trials_of
from optuna_ttp.study import warn_that_nothing_ran
from optuna_ttp.study import warn_that_skipping_is_wrong
from optuna_ttp.study import write_constraint
from optuna_ttp.study import write_record


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optuna import Study
    from optuna.trial import FrozenTrial
    from optuna.trial import Trial

    from optuna_ttp.prediction import SearchPredictor
    from optuna_ttp.search._goal import Goal


_logger = get_logger("optuna.ttp.pruner")

# The constraint that says by how much a trial is predicted to exceed its budget.
CONSTRAINT = "ttp_budget"
# The bounds of its value, which is a logarithm: no storage takes infinity.
_LARGEST_VIOLATION = 50.0
# Trials that run in spite of their prediction only because skipping must not go on are stopped
# once they cannot win any more; those that are to show what skipping costs run to their end.
_UNWILLING = (Override.TURN, Override.REFUTED, Override.UNTRUSTED)
# Decisions about so many trials are remembered; others are read from the storage.
_MOST_REMEMBERED = 1024


class TTPPruner(BasePruner):
    """Stops hopeless trials: before their first step by prediction, then by their own curve.

    **Before the first step** a trial is skipped where training is predicted to diverge; to miss
    the target within the trial's budget; to cost more than a multiple of what the best trial was
    predicted to cost (:class:`~optuna_ttp.PrunerRules`); or not to fit into what is left of the
    study's budget. With :class:`~optuna_ttp.BestMetric` a trial that is predicted to miss the
    target runs all the same where its training loss is predicted to get as low as that of any
    among the best quarter of the completed trials: the target is not what their value depends on.

    The decision is made the first time that the objective calls ``trial.should_prune()``: call it
    once the hyperparameters are suggested, before training, or the steps before that call are
    paid for.

    **During training**, where the objective records its loss with
    :class:`~optuna_ttp.TrainingLog`, the time that is left is predicted from the trial's own
    curve after a fifth of the steps that it may take, and the trial is stopped once its chance to
    reach the target, or to get as far as those best trials, within its budget is below two per
    cent; with :class:`~optuna_ttp.FastestToTarget` also once its chance to be faster than the best
    trial is. A trial is also stopped once its loss has been back where it began for as long as it
    was below, and for twice the time in which it was predicted to be halved. Two facts, which are
    no predictions, stop trials whatever is thought of predictions: that the loss has been infinite
    or NaN for three steps and more; and, with :class:`~optuna_ttp.FastestToTarget`, that more time
    has passed than the fastest trial took, by the seconds of their steps as they were measured, or
    with the same batch size. Otherwise the wrapped pruner decides.

    Of any ``max_consecutive + 1`` trials in a row one runs at least, whatever is predicted, and
    nothing is skipped while predictions prove worse than a rule of thumb, or while most of the
    trials, two at least, that ran although the same was predicted for them reached the target.
    Such a trial runs to its end but for those two facts, and for the sake of an ``audit`` in spite
    of them.

    Example:
        >>> def objective(trial):
        ...     lr = trial.suggest_float("learning_rate", 1e-5, 1, log=True)
        ...     ...
        ...     if trial.should_prune():  # before the first step
        ...         raise optuna.TrialPruned
        >>> study = optuna.create_study(pruner=TTPPruner(predictor, BestMetric(max_epochs=10)))

    Args:
        predictor:
            Predicts the training time of a configuration.
        goal:
            What is searched for, and what a trial and the study may take:
            :class:`~optuna_ttp.BestMetric` or :class:`~optuna_ttp.FastestToTarget`. By default it
            is that of the study's :class:`~optuna_ttp.TTPSampler`; where neither has one, trials
            are compared by the study's own values, and a warning says so.
        wrapped_pruner:
            Any pruner of Optuna, which is asked about running trials. None by default.
        hyperparameters:
            Which trial parameter is which hyperparameter. The parameters ``"learning_rate"``,
            ``"batch_size"`` and ``"momentum"`` by default.
        shadow:
            Write down what would have been decided, and stop nothing. Off by default. The wrapped
            pruner decides as ever.
        constraint:
            Set the constraint ``"ttp_budget"`` of every trial (with Optuna 5): the logarithm of
            its predicted steps over its budget, for samplers that heed constraints. Trials above
            zero do not count as feasible. Off by default.
        seed:
            Of the draws that choose trials for the audit. Zero by default.
        rules:
            Settings for experts, such as the tolerance and the share of audits.

    Raises:
        ValueError:
            If an argument is out of its range, or a budget in seconds is given while the time of
            a step is not known.
        TypeError:
            If an argument is of the wrong kind.
    """

    def __init__(
        self,
        predictor: SearchPredictor,
        goal: Goal | None = None,
        wrapped_pruner: BasePruner | None = None,
        *,
        hyperparameters: HyperparameterMap | None = None,
        shadow: bool = False,
        constraint: bool = False,
        seed: int = 0,
        rules: PrunerRules | None = None,
    ) -> None:
        check_kind("shadow", shadow, bool)
        check_kind("constraint", constraint, bool)
        check_predictor(predictor)
        if wrapped_pruner is not None and not isinstance(wrapped_pruner, BasePruner):
            raise TypeError(f"wrapped_pruner must be a pruner but got {wrapped_pruner!r}.")
        if constraint and not has_constraints():
            raise ValueError(
                "constraint=True needs Optuna 5 or newer, whose trials have constraints, but got "
                f"Optuna {optuna.__version__}."
            )
        rules = PrunerRules() if rules is None else rules
        check_kind("rules", rules, PrunerRules)
        self._goal = GoalOfHalf(goal, predictor)
        mapping = map_or_default(hyperparameters)
        self._map = mapping.with_default_momentum(predictor.default_momentum)
        self._learner = Learner(predictor, self._map)
        self._wrapped = wrapped_pruner
        self._shadow = shadow
        self._constraint = constraint
        self._seed = check_seed(seed)
        self._rules = rules
        self._told = False

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Decide about a trial; where nothing speaks against it, ask the wrapped pruner.

        Args:
            study:
                The study.
            trial:
                The running trial.

        Returns:
            Whether to stop the trial.

        Raises:
            ValueError:
                If the study has several objectives, or the map reads a parameter that no trial of
                the study has, or a hyperparameter is out of its range.
        """
        if is_multi_objective(study):
            raise ValueError(
                f"TTPPruner prunes studies with one objective but got {len(study.directions)}. "
                "Ask it with TTPPruner.decide(trial) there."
            )
        if self._decided(study, trial).prune:
            return True
        return False if self._wrapped is None else bool(self._wrapped.prune(study, trial))

    def decide(self, trial: Trial) -> Decision:
        """Decide about a trial from within its objective, also with several objectives.

        Optuna forbids ``trial.should_prune()`` in studies with several objectives. There, the
        wrapped pruner is not asked.

        Example:
            >>> def objective(trial):
            ...     ...
            ...     decision = pruner.decide(trial)
            ...     if decision.prune:
            ...         raise optuna.TrialPruned(decision.reason)

        Args:
            trial:
                The trial of the objective.

        Returns:
            Whether to stop it, and why.

        Raises:
            ValueError:
                If the map reads a parameter that no trial of the study has, or a hyperparameter
                is out of its range.
        """
        study, current = trial.study, frozen(trial)
        decision = self._decided(study, current)
        if decision.prune or self._wrapped is None or is_multi_objective(study):
            return decision
        if self._wrapped.prune(study, current):
            return Decision(True, f"stopped by {type(self._wrapped).__name__}")
        return decision

    def _decided(self, study: Study, trial: FrozenTrial) -> Decision:
        state = state_of(study)
        known_trials = state.part_of(self, _KnownTrials)
        known = known_trials.get(trial.number)
        if known is None:
            trials = trials_of(study, (*FINISHED, TrialState.RUNNING))
            # The storage knows where another process asked before, as ask-and-tell may do.
            stored = next((t for t in trials if t.number == trial.number), None)
            record = None if stored is None else record_of(stored)
            if record is not None and record.decision is not None:
                known = _Known.of(record.prediction, record.decision, self._shadow)
            else:
                others = [t for t in trials if t.number != trial.number]
                known = self._decide(study, trial, others)
            with state.lock:
                while len(known_trials) >= _MOST_REMEMBERED:
                    known_trials.pop(next(iter(known_trials)))
                known_trials[trial.number] = known
        if not known.decision.prune:
            self._follow(study, trial, known)
        return known.decision

    def _decide(self, study: Study, trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> _Known:
        """Decide before the first step, and write it down."""
        configuration = resolve_for_trial(self._map, study, trial)
        if configuration is None:
            self._say_that_nothing_applies(trial)
            reason = "no prediction: the hyperparameter map does not apply to this trial"
            decision = DecisionRecord(Action.RUN, reason)
            write_record(study, trial, TrialRecord(trial.number, None, decision))
            return _Known.of(None, decision, self._shadow)
        started = time.perf_counter()
        goal = self._goal.in_study(study)
        predictor = self._learner.informed(study, trials)
        configuration = configuration.clipped(predictor.n_samples)
        budget = float(goal.steps(predictor, np.array(configuration.batch_size)))
        horizon = predictor.max_steps if math.isinf(budget) else self._rules.tolerance * budget
        prediction = predictor.estimate(*configuration, max_steps=max(1, int(horizon)))
        verdict = self._objection(
            study, goal, trials, predictor, configuration, prediction, budget
        )
        if verdict is None:
            decision = DecisionRecord(Action.RUN, prediction.summary)
        else:
            decision = self._decision_despite(verdict, study, trial, trials, predictor)
        record = PredictionRecord.of(
            predictor,
            configuration,
            prediction,
            budget_steps=budget,
            prediction_seconds=time.perf_counter() - started,
        )
        write_record(study, trial, TrialRecord(trial.number, record, decision))
        if self._constraint:
            violation = _log_ratio(prediction, horizon)
            write_constraint(study, trial, CONSTRAINT, violation)
        return _Known.of(record, decision, self._shadow)

    def _decision_despite(
        self,
        verdict: tuple[Objection, str],
        study: Study,
        trial: FrozenTrial,
        trials: Sequence[FrozenTrial],
        predictor: SearchPredictor,
    ) -> DecisionRecord:
        """Skip a trial that something speaks against, unless there is a reason to run it."""
        objection, reason = verdict
        override = self._override(study, trial, trials, predictor, objection, reason)
        if override is None:
            _logger.info(f"Trial {trial.number} is skipped: {reason}.")
            return DecisionRecord(Action.SKIP, reason, objection)
        kind, why = override
        return DecisionRecord(Action.RUN, f"{why}, although {reason}", objection, kind)

    def _say_that_nothing_applies(self, trial: FrozenTrial) -> None:
        if self._map == HyperparameterMap() and trial.params and not self._told:
            self._told = True
            _logger.warning(
                f"Trial {trial.number} has no 'learning_rate', 'batch_size' and 'momentum' (it "
                f"has {', '.join(map(repr, sorted(trial.params)))}), so nothing is predicted for "
                "it. "
                "Pass hyperparameters=HyperparameterMap(...) if they have other names."
            )

    def _objection(
        self,
        study: Study,
        goal: Goal,
        trials: Sequence[FrozenTrial],
        predictor: SearchPredictor,
        configuration: Configuration,
        prediction: Prediction,
        budget: float,
    ) -> tuple[Objection, str] | None:
        """Why a trial should not run, as a word and in words, or :obj:`None`."""
        if prediction.outcome == Outcome.DIVERGES:
            text = str(prediction).removeprefix("diverges: ")
            return Objection.DIVERGES, f"predicted to diverge: {text}"
        horizon = int(prediction.max_steps)
        if self._is_as_good_as_the_best(study, goal, trials, predictor, configuration, prediction):
            return self._cost_objection(study, goal, trials, predictor, prediction)
        least = self._rules.min_probability
        if goal.is_time and incumbent(study, trials) is None:
            least = min(least, self._rules.min_probability_at_first)
        if prediction.outcome == Outcome.NOT_REACHED and least >= 0.5:
            if math.isinf(budget):
                return Objection.BUDGET, f"predicted not to reach the target in {horizon:,} steps"
            return (
                Objection.BUDGET,
                f"predicted to miss the target by far: not reached in {horizon:,} steps, "
                f"{self._rules.tolerance:g} times the budget of {budget:,.0f}",
            )
        if float(prediction.p_converges) < least:
            return (
                Objection.BUDGET,
                f"predicted to reach the target in {horizon:,} steps with a probability of "
                f"{float(prediction.p_converges):.0%} only",
            )
        return self._cost_objection(study, goal, trials, predictor, prediction)

    def _is_as_good_as_the_best(
        self,
        study: Study,
        goal: Goal,
        trials: Sequence[FrozenTrial],
        predictor: SearchPredictor,
        configuration: Configuration,
        prediction: Prediction,
    ) -> bool:
        """Whether a trial gets to where one of the best ended, short of the target, in time."""
        if float(prediction.p_diverges) > 1.0 - self._rules.min_probability:
            return False
        # Where the time to the target is searched for, that and nothing short of it counts.
        if goal.is_time:
            return False
        depth = best_depth(study, trials, predictor)
        if not depth < predictor.target_depth:
            return False
        rate, size, mass = (np.array([value]) for value in configuration)
        horizon = np.array([float(prediction.max_steps)])
        return bool(predictor.depth_after(rate, size, mass, horizon)[0] >= depth)

    def _cost_objection(
        self,
        study: Study,
        goal: Goal,
        trials: Sequence[FrozenTrial],
        predictor: SearchPredictor,
        prediction: Prediction,
    ) -> tuple[Objection, str] | None:
        """Why a trial that would succeed costs too much, likewise."""
        seconds = _cost(prediction)
        best = None if self._rules.max_cost_ratio is None else incumbent(study, trials)
        if best is not None and self._rules.max_cost_ratio is not None:
            # NaN, where nothing was predicted for it, is not below anything.
            of_best = prediction_of(best)
            ratio = seconds / (math.nan if of_best is None else of_best.cost)
            if (
                self._probability(prediction, self._rules.max_cost_ratio / ratio)
                < self._rules.min_probability
            ):
                return (
                    Objection.COST,
                    f"predicted to take {ratio:.3g} times what the best trial, number "
                    f"{best.number}, was predicted to take",
                )
        budget = goal.study_budget
        if budget is not None:
            steps = float(np.exp(_log_median(prediction)))
            if not budget.fits(trials, seconds, steps):
                cost = f"{seconds:.3g} s" if budget.in_seconds else f"{steps:.3g} steps"
                return (
                    Objection.STUDY_BUDGET,
                    f"predicted to take {cost}, more than is left of {budget}",
                )
        return None

    @staticmethod
    def _probability(prediction: Prediction, ratio: float) -> float:
        """How likely it takes at most so many times its predicted time."""
        sd = np.array([_log_sd(prediction)])
        return float(probability_below(np.ones(1), sd, np.array([ratio]))[0])

    def _override(
        self,
        study: Study,
        trial: FrozenTrial,
        trials: Sequence[FrozenTrial],
        predictor: SearchPredictor,
        objection: Objection,
        reason: str,
    ) -> tuple[Override, str] | None:
        """Why a trial runs in spite of its prediction, as a word and in words."""
        if not predictor.calibration.trusted:
            return Override.UNTRUSTED, f"predictions are {predictor.calibration.fault}"
        rules = self._rules
        reached = _progress_of_similar_trials(trials, objection, rules.most_refuting)
        n_reached = sum(gone >= rules.nearly_reached for gone in reached)
        if n_reached >= rules.n_refuting and 2 * n_reached > len(reached):
            count = f"{n_reached} of {len(reached)}"
            warn_that_skipping_is_wrong(study, count)
            reason = f"{count} trials that this was predicted for reached the target"
            return Override.REFUTED, reason
        if self._shadow:
            return Override.SHADOW, "runs in shadow mode"
        n_skipped = n_skipped_in_a_row(trials)
        # Where the last one that ran in spite of its prediction did well, the next comes sooner.
        soon = bool(reached) and reached[-1] >= rules.half_way
        if n_skipped >= max(1, self._rules.max_consecutive // (rules.sooner if soon else 1)):
            if rules.n_skipped_to_warn <= n_skipped == len(trials) and not predictor.observations:
                warn_that_nothing_ran(study, n_skipped, reason)
            return Override.TURN, f"runs after {n_skipped} skipped trials in a row"
        # The same for every process that asks.
        if np.random.default_rng((self._seed, trial.number)).random() < self._rules.audit:
            return Override.AUDIT, "runs to see whether skipping would have been right"
        return None

    def _follow(self, study: Study, trial: FrozenTrial, known: _Known) -> None:
        """Decide again once a trial under way has recorded more of its curve."""
        if known.prediction is None or self._rules.min_chance == 0.0:
            return
        trial = as_logged(study, trial)
        curve = observed_curve(trial)
        if curve is not None and curve.n_steps <= known.n_steps:
            return
        predictor = self._learner.last(study)
        stop_reason = blown_up(trial, self._rules.running_trial)
        if stop_reason is None and curve is not None and not curve.diverged:
            known.n_steps = curve.n_steps
            judge = RunningTrialJudge(predictor, self._goal.in_study(study), self._rules)
            stop_reason = judge.stop_reason(study, trial, known.prediction, curve)
        if stop_reason is None:
            return
        decision = known.record
        may_stop = stop_reason.sure and decision.override in _UNWILLING
        if decision.override is not None and not may_stop:
            return  # It runs although its prediction is bad: to its end.
        # What it runs in spite of stays known: whether that was right is seen by its curve.
        decision = replace(decision, objection=decision.objection or Objection.CHANCE)
        if self._shadow:
            reason = f"runs in shadow mode, although {stop_reason.reason}"
            decision = replace(decision, override=Override.SHADOW, reason=reason)
        else:
            per_step = float(predictor.seconds_per_step(known.prediction.batch_size))
            seconds = float(max(stop_reason.steps_left, 0.0) * per_step)
            decision = replace(
                decision,
                action=Action.STOP,
                reason=stop_reason.reason,
                log_sd=stop_reason.log_sd,
                seconds_left=seconds if math.isfinite(seconds) else math.nan,
            )
            known.decision = Decision(True, stop_reason.reason)
            _logger.info(f"Trial {trial.number} is stopped: {stop_reason.reason}.")
        known.record = decision
        write_record(study, trial, TrialRecord(trial.number, known.prediction, decision))


@dataclass
class _Known:
    """What is known of a trial: what was predicted and decided, and how much of it was seen."""

    prediction: PredictionRecord | None
    record: DecisionRecord
    decision: Decision
    n_steps: float = 0.0

    @classmethod
    def of(
        cls, prediction: PredictionRecord | None, record: DecisionRecord, shadow: bool
    ) -> _Known:
        prune = record.action != Action.RUN and not shadow
        return cls(prediction, record, Decision(prune, record.reason))


class _KnownTrials(dict[int, _Known]):
    """What a pruner knows of a study's trials, by their number; others are in the storage."""


def _log_median(prediction: Prediction) -> float:
    """Logarithm of the predicted steps, also beyond the horizon."""
    return 0.5 * float(np.log(prediction.steps_low) + np.log(prediction.steps_high))


def _log_sd(prediction: Prediction) -> float:
    width = float(np.log(prediction.steps_high) - np.log(prediction.steps_low))
    return max(width / (2.0 * Z_90), 1e-6) if math.isfinite(width) else 1.0


def _progress_of_similar_trials(
    trials: Sequence[FrozenTrial], objection: Objection, most: int
) -> list[float]:
    """How far the newest trials got that ran in spite of this prediction, the target being one."""
    if objection not in (Objection.DIVERGES, Objection.BUDGET):
        return []
    reached: list[float] = []
    for trial in sorted(trials, key=lambda t: t.number, reverse=True):
        decision = decision_of(trial) if trial.state in FINISHED else None
        if decision is not None and decision.override and decision.objection == objection:
            gone = progress_to_target(trial)
            reached += [] if math.isnan(gone) else [gone]
        if len(reached) == most:
            break
    return reached[::-1]


def _cost(prediction: Prediction) -> float:
    """Predicted seconds; steps where the time of a step is not known."""
    seconds = float(prediction.seconds)
    return float(prediction.steps) if math.isnan(seconds) else seconds


def _log_ratio(prediction: Prediction, budget: float) -> float:
    """Logarithm of the predicted steps over a budget; no storage takes infinity."""
    steps = float(prediction.steps)
    log_steps = math.log(steps) if math.isfinite(steps) else _log_median(prediction)
    return float(np.clip(log_steps - math.log(budget), -_LARGEST_VIOLATION, _LARGEST_VIOLATION))
