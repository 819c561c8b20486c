"""The objections to a trial before its first step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from optuna_ttp._util.words import counted
from optuna_ttp.prediction import Outcome
from optuna_ttp.study import best_depth
from optuna_ttp.study import incumbent
from optuna_ttp.study import Objection
from optuna_ttp.study import prediction_of


if TYPE_CHECKING:
    from optuna_ttp.search._planned_trial import PlannedTrial
    from optuna_ttp.search._planned_trial import Verdict
    from optuna_ttp.search._pruner_rules import PrunerRules


def objection_to(trial: PlannedTrial, rules: PrunerRules) -> Verdict | None:
    """Return the first objection to a trial with its reason in words, or None.

    The order is: divergence, the trial's own budget, its cost beside the best trial's, and the
    study's budget.
    """
    if trial.prediction.outcome == Outcome.DIVERGES:
        text = str(trial.prediction).removeprefix("diverges: ")
        return Objection.DIVERGES, f"predicted to diverge: {text}"
    if not _is_as_good_as_the_best(trial, rules):
        reason = _miss_of_the_target(trial, rules)
        if reason is not None:
            return Objection.BUDGET, reason
    reason = _cost_beside_the_best(trial, rules)
    if reason is not None:
        return Objection.COST, reason
    reason = _excess_of_the_study_budget(trial)
    return None if reason is None else (Objection.STUDY_BUDGET, reason)


def _is_as_good_as_the_best(trial: PlannedTrial, rules: PrunerRules) -> bool:
    """Return True if a trial's loss is predicted to get as low as that of the best trials.

    It is False if the goal is a time, if the best trials reached the target, or if the trial is
    likely to diverge.
    """
    if trial.goal.is_time or float(trial.prediction.p_diverges) > 1.0 - rules.min_probability:
        return False
    depth = best_depth(trial.study, trial.others, trial.predictor)
    if not depth < trial.predictor.target_depth:
        return False
    rate, batch_size, momentum = (np.array([value]) for value in trial.configuration)
    steps = np.array([float(trial.prediction.max_steps)])
    return bool(trial.predictor.depth_after(rate, batch_size, momentum, steps)[0] >= depth)


def _miss_of_the_target(trial: PlannedTrial, rules: PrunerRules) -> str | None:
    """Return, in words, that a trial is unlikely to reach the target in its horizon, or None."""
    prediction, horizon = trial.prediction, int(trial.prediction.max_steps)
    least = rules.min_probability
    if trial.goal.is_time and incumbent(trial.study, trial.others) is None:
        least = min(least, rules.min_probability_at_first)
    if prediction.outcome == Outcome.NOT_REACHED and least >= 0.5:
        if math.isinf(trial.budget_steps):
            return f"predicted not to reach the target in {counted(horizon, 'step')}"
        return (
            f"predicted to miss the target by far: not reached in {counted(horizon, 'step')}, "
            f"{rules.tolerance:g} times the budget of {trial.budget_steps:,.0f}"
        )
    probability = float(prediction.p_converges)
    if probability < least:
        return (
            f"predicted to reach the target in {counted(horizon, 'step')} with a probability of "
            f"{probability:.0%} only"
        )
    return None


def _cost_beside_the_best(trial: PlannedTrial, rules: PrunerRules) -> str | None:
    """Return, in words, that a trial costs too much in comparison with the best one, or None."""
    if rules.max_cost_ratio is None:
        return None
    best = incumbent(trial.study, trial.others)
    if best is None:
        return None
    record = prediction_of(best)
    # Without a prediction for the best trial the ratio is NaN, and comparisons with it are False.
    ratio = trial.predicted_seconds / (math.nan if record is None else record.cost)
    if trial.probability_within(rules.max_cost_ratio / ratio) < rules.min_probability:
        return (
            f"predicted to take {ratio:.3g} times what the best trial, number {best.number}, was "
            "predicted to take"
        )
    return None


def _excess_of_the_study_budget(trial: PlannedTrial) -> str | None:
    """Return, in words, that a trial exceeds the rest of the study's budget, or None."""
    budget = trial.goal.study_budget
    if budget is None:
        return None
    seconds, steps = trial.predicted_seconds, float(np.exp(trial.log_steps))
    if budget.fits(trial.others, seconds, steps):
        return None
    cost = f"{seconds:.3g} s" if budget.in_seconds else f"{steps:.3g} steps"
    return f"predicted to take {cost}, more than is left of {budget}"
