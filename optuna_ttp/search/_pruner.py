"""The pruner: stops hopeless trials, before their first step and while they train."""

from __future__ import annotations

from dataclasses import replace
import math
import time
from typing import TYPE_CHECKING

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.logging import get_logger
from optuna.pruners import BasePruner
from optuna.trial import TrialState

from optuna_ttp._util.checks import check_kind
from optuna_ttp._util.checks import check_seed
from optuna_ttp.prediction import check_predictor
from optuna_ttp.search._call_order import decision_without_prediction
from optuna_ttp.search._call_order import warn_of_early_call
from optuna_ttp.search._decided_trial import DecidedTrial
from optuna_ttp.search._decided_trial import remember
from optuna_ttp.search._decided_trial import remembered
from optuna_ttp.search._goal_of_study import GoalOfHalf
from optuna_ttp.search._objections import objection_to
from optuna_ttp.search._overrides import override_of
from optuna_ttp.search._planned_trial import PlannedTrial
from optuna_ttp.search._pruner_rules import PrunerRules
from optuna_ttp.search._running_trial import lost_for_good
from optuna_ttp.search._running_trial import RunningTrialCheck
from optuna_ttp.study import Action
from optuna_ttp.study import as_logged
from optuna_ttp.study import Decision
from optuna_ttp.study import decision_of
from optuna_ttp.study import DecisionRecord
from optuna_ttp.study import FINISHED
from optuna_ttp.study import frozen
from optuna_ttp.study import has_constraints
from optuna_ttp.study import HyperparameterMap
from optuna_ttp.study import is_multi_objective
from optuna_ttp.study import Learner
from optuna_ttp.study import map_or_default
from optuna_ttp.study import Objection
from optuna_ttp.study import observed_curve
from optuna_ttp.study import Override
from optuna_ttp.study import record_of
from optuna_ttp.study import record_prediction
from optuna_ttp.study import resolve_for_trial
from optuna_ttp.study import TrialRecord
from optuna_ttp.study import trials_of
from optuna_ttp.study import write_constraint
from optuna_ttp.study import write_record


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optuna import Study
    from optuna.trial import FrozenTrial
    from optuna.trial import Trial

    from optuna_ttp.prediction import SearchPredictor
    from optuna_ttp.search._goal import Goal
    from optuna_ttp.search._running_trial import StopReason


_logger = get_logger("optuna.ttp.pruner")

# The constraint that says by how much a trial is predicted to exceed its budget.
CONSTRAINT = "ttp_budget"
# Trials with these overrides are stopped once an observation shows that they cannot win. Trials of
# an audit and of shadow mode run to their end, because they measure the cost of skipping.
_UNWILLING = (Override.TURN, Override.REFUTED, Override.UNTRUSTED)


class TTPPruner(BasePruner):
    """Stops hopeless trials: before their first step by prediction, then by their own curve.

    **Before the first step** a trial is skipped if its training is predicted to diverge, to miss
    the target within the trial's budget, to cost more than a multiple of the best trial's
    predicted cost (:class:`~optuna_ttp.PrunerRules`), or to exceed the rest of the study's budget.
    With :class:`~optuna_ttp.BestMetric` a trial that is predicted to miss the target still runs if
    its training loss is predicted to get as low as that of one of the best quarter of the
    completed trials, because their values do not depend on the target.

    The decision is made when the objective first calls ``trial.should_prune()``: call it after the
    hyperparameters are suggested and before training, or the steps before that call cannot be
    saved. A :exc:`~optuna_ttp.CallOrderWarning` warns of a call that is too early.

    **During training**, if the objective records its loss with
    :class:`~optuna_ttp.TrainingLog`, the remaining time is predicted from the trial's own curve
    after a fifth of its budget. The trial is stopped once its chance to reach the target (or the
    loss of those best trials) within its budget is below two per cent; with
    :class:`~optuna_ttp.FastestToTarget` also once its chance to be faster than the best trial is.
    A trial is also stopped if its loss has returned to the initial loss and stayed there for as
    long as it was below, and for twice the time in which it was predicted to be halved. Two
    observations stop trials even if predictions are not trusted: the loss has been infinite or NaN
    for at least three steps; or, with :class:`~optuna_ttp.FastestToTarget`, the trial has taken
    longer than the fastest trial, by measured seconds per step or at the same batch size.
    Otherwise the wrapped pruner decides.

    Of any eleven trials in a row at least one runs. No trial is skipped while predictions are
    less accurate than a rule of thumb, nor for a reason in spite of which other trials ran and
    mostly reached the target. A trial that runs in spite of its prediction is stopped by those two
    observations only, and a trial of an audit by nothing. :class:`~optuna_ttp.PrunerRules` has
    these numbers.

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
            The goal of the search with its limits: :class:`~optuna_ttp.BestMetric` or
            :class:`~optuna_ttp.FastestToTarget`. By default the goal of the study's
            :class:`~optuna_ttp.TTPSampler`; if neither has one, trials are compared by the study's
            own values, and a warning is given.
        wrapped_pruner:
            Any pruner of Optuna, which is asked about running trials. None by default.
        hyperparameters:
            The map from trial parameters to hyperparameters. The parameters ``"learning_rate"``,
            ``"batch_size"`` and ``"momentum"`` by default.
        shadow:
            Record the decisions with the trials, but stop no trial. Off by default. The wrapped
            pruner is still asked.
        constraint:
            Set the constraint ``"ttp_budget"`` of every trial (with Optuna 5), the logarithm of
            its predicted steps over its budget times the tolerance, for samplers that use
            constraints. A trial is feasible if it is not above zero. Off by default.
        seed:
            The seed of the draws that choose trials for the audit. Zero by default.
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
        self._has_logged_names = False

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Decide about a trial, record the decision with it, and else ask the wrapped pruner.

        Args:
            study:
                The study.
            trial:
                The running trial.

        Returns:
            True if the trial should stop, by this pruner or by the wrapped one.

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
        if self._decision(study, trial).prune:
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
            The decision with its reason. For a finished trial, the decision before it ended.

        Raises:
            TypeError:
                If ``trial`` is not the trial of an objective.
            ValueError:
                If the map reads a parameter that no trial of the study has, or a hyperparameter
                is out of its range.
        """
        if not isinstance(trial, optuna.trial.Trial):
            raise TypeError(f"trial must be the trial of the objective but got {trial!r}.")
        study, current = trial.study, frozen(trial)
        decision = self._decision(study, current)
        if decision.prune or self._wrapped is None or is_multi_objective(study):
            return decision
        if self._wrapped.prune(study, current):
            return Decision(True, f"stopped by {type(self._wrapped).__name__}")
        return decision

    def _decision(self, study: Study, trial: FrozenTrial) -> Decision:
        """Decide about a trial before its first step, and again as its loss curve grows."""
        if trial.state.is_finished():
            return self._decision_about_finished(trial)
        decided = remembered(study, self, trial)
        try:
            if decided is None:
                decided = self._first_decision(study, trial)
                remember(study, self, trial, decided)
            if not decided.decision.prune:
                self._decide_by_curve(study, trial, decided)
        except UpdateFinishedTrialError:
            # After study.tell(trial) Optuna still asks with the trial as it was before it ended.
            ended = next((t for t in trials_of(study) if t.number == trial.number), trial)
            return self._decision_about_finished(ended)
        return decided.decision

    def _decision_about_finished(self, trial: FrozenTrial) -> Decision:
        """Return the last decision before a trial ended; it does not prune if there is none."""
        record = decision_of(trial)
        if record is None:
            reason = f"trial {trial.number} has ended, and nothing was decided before"
            return Decision(False, reason)
        return DecidedTrial.of(None, record, shadow=self._shadow).decision

    def _first_decision(self, study: Study, trial: FrozenTrial) -> DecidedTrial:
        """Return a trial's stored decision, or decide before its first step and store that."""
        trials = trials_of(study, (*FINISHED, TrialState.RUNNING))
        # With ask-and-tell another process may have decided and stored its decision.
        stored = next((t for t in trials if t.number == trial.number), None)
        record = None if stored is None else record_of(stored)
        if record is not None and record.decision is not None and record.prediction is not None:
            return DecidedTrial.of(record.prediction, record.decision, shadow=self._shadow)
        others = [t for t in trials if t.number != trial.number]
        configuration = resolve_for_trial(self._map, study, trial)
        if configuration is None:
            return self._run_without_prediction(study, trial, others)
        started = time.perf_counter()
        predictor = self._learner.informed(study, others)
        planned = PlannedTrial.of(
            study,
            trial.number,
            others,
            self._goal.in_study(study),
            predictor,
            configuration,
            self._rules.tolerance,
        )
        decision = self._decision_before_training(planned)
        prediction = record_prediction(
            predictor,
            planned.configuration,
            planned.prediction,
            budget_steps=planned.budget_steps,
            prediction_seconds=time.perf_counter() - started,
        )
        write_record(study, trial, TrialRecord(trial.number, prediction, decision))
        if self._constraint:
            write_constraint(study, trial, CONSTRAINT, planned.log_excess)
        return DecidedTrial.of(prediction, decision, shadow=self._shadow)

    def _run_without_prediction(
        self, study: Study, trial: FrozenTrial, others: Sequence[FrozenTrial]
    ) -> DecidedTrial:
        """Let a trial without known hyperparameters run, store that, and warn of likely causes."""
        warn_of_early_call(study, trial, others, self._map)
        if self._map == HyperparameterMap() and trial.params and not self._has_logged_names:
            self._has_logged_names = True
            names = ", ".join(map(repr, sorted(trial.params)))
            _logger.warning(
                f"Trial {trial.number} has no 'learning_rate', 'batch_size' and 'momentum' (it "
                f"has {names}), so nothing is predicted for it. Pass "
                "hyperparameters=HyperparameterMap(...) if they have other names."
            )
        decision = decision_without_prediction(trial)
        write_record(study, trial, TrialRecord(trial.number, None, decision))
        n_params = len(trial.params)
        return DecidedTrial.of(None, decision, shadow=self._shadow, n_params=n_params)

    def _decision_before_training(self, trial: PlannedTrial) -> DecisionRecord:
        """Return the decision to skip a trial with an objection but no override, or to run it."""
        verdict = objection_to(trial, self._rules)
        if verdict is None:
            return DecisionRecord(Action.RUN, trial.prediction.summary)
        objection, reason = verdict
        override = override_of(trial, verdict, self._rules, shadow=self._shadow, seed=self._seed)
        if override is None:
            _logger.info(f"Trial {trial.number} is skipped: {reason}.")
            return DecisionRecord(Action.SKIP, reason, objection)
        kind, text = override
        return DecisionRecord(Action.RUN, f"{text}, although {reason}", objection, kind)

    def _decide_by_curve(self, study: Study, trial: FrozenTrial, decided: DecidedTrial) -> None:
        """Stop a running trial, changing ``decided``, if its newly recorded loss curve says so.

        Nothing happens without a prediction or new losses, or if an override forbids the stop.
        """
        if decided.prediction is None or self._rules.min_chance == 0.0:
            return
        trial = as_logged(study, trial)
        curve = observed_curve(trial)
        if curve is not None and curve.n_steps <= decided.n_steps:
            return
        predictor = self._learner.last(study)
        stop_reason = lost_for_good(trial, self._rules)
        if stop_reason is None and curve is not None and not curve.diverged:
            decided.n_steps = curve.n_steps
            check = RunningTrialCheck(study, predictor, self._goal.in_study(study), self._rules)
            stop_reason = check.stop_reason(trial, decided.prediction, curve)
        if stop_reason is None:
            return
        override = decided.record.override
        if override is None or (stop_reason.is_observed and override in _UNWILLING):
            seconds_per_step = float(predictor.seconds_per_step(decided.prediction.batch_size))
            self._stop(study, trial, decided, stop_reason, seconds_per_step)

    def _stop(
        self,
        study: Study,
        trial: FrozenTrial,
        decided: DecidedTrial,
        stop_reason: StopReason,
        seconds_per_step: float,
    ) -> None:
        """Change ``decided`` to stop a running trial and store that; in shadow mode only note it.

        ``seconds_per_step`` turns the steps that are saved into seconds, NaN if unknown.
        """
        # An earlier objection is kept, so that its correctness can be judged by the curve.
        objection = decided.record.objection or Objection.CHANCE
        decision = replace(decided.record, objection=objection)
        if self._shadow:
            reason = f"runs in shadow mode, although {stop_reason.text}"
            decision = replace(decision, override=Override.SHADOW, reason=reason)
        else:
            seconds = max(stop_reason.steps_left, 0.0) * seconds_per_step
            decision = replace(
                decision,
                action=Action.STOP,
                reason=stop_reason.text,
                log_sd=stop_reason.log_sd,
                seconds_left=seconds if math.isfinite(seconds) else math.nan,
            )
        write_record(study, trial, TrialRecord(trial.number, decided.prediction, decision))
        decided.record = decision
        if not self._shadow:
            decided.decision = Decision(True, stop_reason.text)
            _logger.info(f"Trial {trial.number} is stopped: {stop_reason.text}.")
