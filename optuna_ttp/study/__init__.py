"""What is written on and read from the trials of an Optuna study."""

from __future__ import annotations

from optuna_ttp.study._best_trials import best_depth
from optuna_ttp.study._best_trials import incumbent
from optuna_ttp.study._curve_start import CurveStart
from optuna_ttp.study._curve_start import joint_objections
from optuna_ttp.study._decision import Decision
from optuna_ttp.study._hyperparameters import Configuration
from optuna_ttp.study._hyperparameters import HyperparameterMap
from optuna_ttp.study._hyperparameters import map_or_default
from optuna_ttp.study._hyperparameters import MissingParameterError
from optuna_ttp.study._learner import Learner
from optuna_ttp.study._learner import tell_that_nothing_ran
from optuna_ttp.study._learner import tell_that_skipping_is_wrong
from optuna_ttp.study._memory import Memory
from optuna_ttp.study._observed_trial import InitialLoss
from optuna_ttp.study._observed_trial import observation_of
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
from optuna_ttp.study._recorded_curve import lost_steps
from optuna_ttp.study._recorded_curve import measured_seconds
from optuna_ttp.study._recorded_curve import observed_curve
from optuna_ttp.study._recorded_curve import observed_steps
from optuna_ttp.study._recorded_curve import progress_to_target
from optuna_ttp.study._recorded_curve import recorded
from optuna_ttp.study._records import DECISION
from optuna_ttp.study._records import entry
from optuna_ttp.study._records import n_skipped_in_a_row
from optuna_ttp.study._records import or_nan
from optuna_ttp.study._records import paid_seconds
from optuna_ttp.study._records import predicted_cost
from optuna_ttp.study._records import PREDICTION
from optuna_ttp.study._records import prediction_entry
from optuna_ttp.study._records import RECORD
from optuna_ttp.study._records import RUN
from optuna_ttp.study._records import SKIP
from optuna_ttp.study._records import STOP
from optuna_ttp.study._records import write_record
from optuna_ttp.study._reported_curve import learn_from_reports
from optuna_ttp.study._resolution import resolve_for_trial
from optuna_ttp.study._study_budget import StudyBudget
from optuna_ttp.study._study_state import state_of
from optuna_ttp.study._training_log import as_logged
from optuna_ttp.study._training_log import TrainingLog
from optuna_ttp.study._training_log import unclosed
from optuna_ttp.study._unusable_curve import UnusableCurve


__all__ = [
    "DECISION",
    "FINISHED",
    "PREDICTION",
    "RECORD",
    "RUN",
    "SKIP",
    "STOP",
    "Configuration",
    "CurveStart",
    "Decision",
    "HyperparameterMap",
    "InitialLoss",
    "Learner",
    "Memory",
    "MissingParameterError",
    "StudyBudget",
    "TrainingLog",
    "UnusableCurve",
    "as_logged",
    "best_depth",
    "entry",
    "fail_trial",
    "fixed_params",
    "frozen",
    "has_constraints",
    "incumbent",
    "inner_fixed_params",
    "innermost_sampler",
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
    "or_nan",
    "paid_seconds",
    "predicted_cost",
    "prediction_entry",
    "progress_to_target",
    "recorded",
    "resolve_for_trial",
    "single_value",
    "state_of",
    "tell_that_nothing_ran",
    "tell_that_skipping_is_wrong",
    "trials_of",
    "unclosed",
    "weighed",
    "write_constraint",
    "write_record",
]
