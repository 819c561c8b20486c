"""The records stored with the trials of an Optuna study, and learning from them."""

from __future__ import annotations

from optuna_ttp.study._best_over_time import best_over_time
from optuna_ttp.study._best_trials import best_depth
from optuna_ttp.study._best_trials import incumbent
from optuna_ttp.study._broken_training import broke_down
from optuna_ttp.study._broken_training import has_lost_progress
from optuna_ttp.study._broken_training import LostProgressRules
from optuna_ttp.study._curve_objections import CurveStart
from optuna_ttp.study._curve_objections import InitialLoss
from optuna_ttp.study._curve_objections import joint_objections
from optuna_ttp.study._curve_record import curve_of
from optuna_ttp.study._curve_record import CurveRecord
from optuna_ttp.study._curve_record import lost_steps
from optuna_ttp.study._curve_record import measured_seconds
from optuna_ttp.study._curve_record import observed_curve
from optuna_ttp.study._decision import Decision
from optuna_ttp.study._decision_record import Action
from optuna_ttp.study._decision_record import DecisionRecord
from optuna_ttp.study._decision_record import Objection
from optuna_ttp.study._decision_record import Override
from optuna_ttp.study._hyperparameters import Configuration
from optuna_ttp.study._hyperparameters import HyperparameterMap
from optuna_ttp.study._hyperparameters import map_or_default
from optuna_ttp.study._hyperparameters import MissingParameterError
from optuna_ttp.study._learner import Learner
from optuna_ttp.study._memory import Memory
from optuna_ttp.study._observed_trial import observation_of
from optuna_ttp.study._observed_trial import observed_steps
from optuna_ttp.study._observed_trial import progress_to_target
from optuna_ttp.study._optuna_compat import fail_trial
from optuna_ttp.study._optuna_compat import FINISHED
from optuna_ttp.study._optuna_compat import fixed_params
from optuna_ttp.study._optuna_compat import frozen
from optuna_ttp.study._optuna_compat import has_constraints
from optuna_ttp.study._optuna_compat import inner_fixed_params
from optuna_ttp.study._optuna_compat import innermost_sampler
from optuna_ttp.study._optuna_compat import is_multi_objective
from optuna_ttp.study._optuna_compat import single_value
from optuna_ttp.study._optuna_compat import trials_of
from optuna_ttp.study._optuna_compat import weighed
from optuna_ttp.study._optuna_compat import write_constraint
from optuna_ttp.study._prediction_record import FirstPassageRecord
from optuna_ttp.study._prediction_record import PredictionRecord
from optuna_ttp.study._record_prediction import record_prediction
from optuna_ttp.study._reported_curve import learn_from_reports
from optuna_ttp.study._resolution import resolve_for_trial
from optuna_ttp.study._study_budget import StudyBudget
from optuna_ttp.study._study_state import state_of
from optuna_ttp.study._study_warnings import is_first_warning
from optuna_ttp.study._study_warnings import warn_that_nothing_ran
from optuna_ttp.study._study_warnings import warn_that_skipping_is_wrong
from optuna_ttp.study._training_log import as_logged
from optuna_ttp.study._training_log import TrainingLog
from optuna_ttp.study._training_log import unclosed
from optuna_ttp.study._trial_record import decision_of
from optuna_ttp.study._trial_record import n_skipped_in_a_row
from optuna_ttp.study._trial_record import paid_seconds
from optuna_ttp.study._trial_record import prediction_of
from optuna_ttp.study._trial_record import record_of
from optuna_ttp.study._trial_record import TrialRecord
from optuna_ttp.study._trial_record import write_record
from optuna_ttp.study._unusable_curve import UnusableCurve


__all__ = [
    "FINISHED",
    "Action",
    "Configuration",
    "CurveRecord",
    "CurveStart",
    "Decision",
    "DecisionRecord",
    "FirstPassageRecord",
    "HyperparameterMap",
    "InitialLoss",
    "Learner",
    "LostProgressRules",
    "Memory",
    "MissingParameterError",
    "Objection",
    "Override",
    "PredictionRecord",
    "StudyBudget",
    "TrainingLog",
    "TrialRecord",
    "UnusableCurve",
    "as_logged",
    "best_depth",
    "best_over_time",
    "broke_down",
    "curve_of",
    "decision_of",
    "fail_trial",
    "fixed_params",
    "frozen",
    "has_constraints",
    "has_lost_progress",
    "incumbent",
    "inner_fixed_params",
    "innermost_sampler",
    "is_first_warning",
    "is_multi_objective",
    "joint_objections",
    "learn_from_reports",
    "lost_steps",
    "map_or_default",
    "measured_seconds",
    "n_skipped_in_a_row",
    "observation_of",
    "observed_curve",
    "observed_steps",
    "paid_seconds",
    "prediction_of",
    "progress_to_target",
    "record_of",
    "record_prediction",
    "resolve_for_trial",
    "single_value",
    "state_of",
    "trials_of",
    "unclosed",
    "warn_that_nothing_ran",
    "warn_that_skipping_is_wrong",
    "weighed",
    "write_constraint",
    "write_record",
]
