"""The pruner: skips before the first step what is predicted to be hopeless."""

from __future__ import annotations

import math
import threading
import time
from typing import Any
from typing import TYPE_CHECKING
import warnings

import numpy as np
from optuna.logging import get_logger
from optuna.pruners import BasePruner
from optuna.trial import TrialState

from optuna_ttp._optuna_compat import FINISHED
from optuna_ttp._optuna_compat import is_multi_objective
from optuna_ttp._optuna_compat import PerStudy
from optuna_ttp._optuna_compat import trials_of
from optuna_ttp.exceptions import UnreliablePredictionWarning
from optuna_ttp.hyperparameters import Configuration
from optuna_ttp.hyperparameters import HyperparameterMap
from optuna_ttp.hyperparameters import map_or_default
from optuna_ttp.hyperparameters import MissingParameterError
from optuna_ttp.ledger import DECISION
from optuna_ttp.ledger import n_skipped_in_a_row
from optuna_ttp.ledger import record_decision
from optuna_ttp.ledger import record_prediction
from optuna_ttp.ledger import RUN
from optuna_ttp.ledger import SKIP
from optuna_ttp.ledger import stored_entry
from optuna_ttp.prediction import DIVERGES
from optuna_ttp.prediction import NOT_REACHED
from optuna_ttp.prediction import Prediction
from optuna_ttp.training_log import informed_by


if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

    from optuna_ttp.predictor import TrainingTimePredictor


_logger = get_logger("optuna.ttp.pruner")


class TTPPruner(BasePruner):
    """Prunes a trial before its first step where its prediction says that it is hopeless.

    A trial is hopeless where training is predicted to diverge, or to miss the target within the
    trial's budget. The decision is made the first time that the objective calls
    ``trial.should_prune()``: call it once the hyperparameters are suggested, before training, or
    the steps before that call are paid for. From then on the wrapped pruner decides.

    Example:
        >>> def objective(trial):
        ...     lr = trial.suggest_float("learning_rate", 1e-5, 1, log=True)
        ...     ...
        ...     if trial.should_prune():  # before the first step
        ...         raise optuna.TrialPruned
        >>> study = optuna.create_study(pruner=TTPPruner(predictor, max_epochs=10))

    Args:
        predictor:
            Predicts the training time of a configuration.
        wrapped_pruner:
            Any pruner of Optuna, which is asked about trials that are under way. None by default.
        hyperparameters:
            Which trial parameter is which hyperparameter. The parameters ``"learning_rate"``,
            ``"batch_size"`` and ``"momentum"`` by default.
        max_steps:
            A trial's budget in optimiser steps. The predictor's horizon by default.
        max_epochs:
            A trial's budget in passes over the data. None by default.
        max_seconds:
            A trial's budget in seconds of training. None by default.
        tolerance:
            Skip only what is predicted to take more than so many times the budget, because
            predictions are not exact. 1.5 by default.
        max_consecutive:
            After so many skipped trials in a row one runs regardless, so that a study cannot
            starve. Ten by default.

    Raises:
        ValueError:
            If an argument is out of its range, or a budget in seconds is given while the time of
            a step is not known.
        TypeError:
            If an argument is of the wrong kind.
    """

    def __init__(
        self,
        predictor: TrainingTimePredictor,
        wrapped_pruner: BasePruner | None = None,
        *,
        hyperparameters: HyperparameterMap | None = None,
        max_steps: int | None = None,
        max_epochs: float | None = None,
        max_seconds: float | None = None,
        tolerance: float = 1.5,
        max_consecutive: int = 10,
    ) -> None:
        from optuna_ttp.predictor import TrainingTimePredictor

        if not isinstance(predictor, TrainingTimePredictor):
            raise TypeError(
                f"predictor must be a TrainingTimePredictor but got {type(predictor).__name__}."
            )
        if wrapped_pruner is not None and not isinstance(wrapped_pruner, BasePruner):
            raise TypeError(f"wrapped_pruner must be a pruner but got {wrapped_pruner!r}.")
        budgets = {"max_steps": max_steps, "max_epochs": max_epochs, "max_seconds": max_seconds}
        for name, value in budgets.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive but got {value}.")
        if max_seconds is not None and predictor.throughput is None:
            raise ValueError(
                "max_seconds needs to know the time of a step, but the spectrum was computed with "
                "measure_speed=False. Give max_steps or max_epochs instead."
            )
        if not 1 <= tolerance < math.inf:
            raise ValueError(f"tolerance must be finite and at least 1 but got {tolerance}.")
        if max_consecutive < 1:
            raise ValueError(f"max_consecutive must be at least 1 but got {max_consecutive}.")
        self._predictor = predictor
        self._wrapped = wrapped_pruner
        self._map = map_or_default(hyperparameters)
        self._budgets = {name: value for name, value in budgets.items() if value is not None}
        self._tolerance = tolerance
        self._max_consecutive = max_consecutive
        self._warned = False
        self._told = False
        # By the trial's number. What is not in here is read from the storage.
        self._skipped: PerStudy[dict[int, bool]] = PerStudy(dict)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Decide about a trial when first asked about it; from then on ask the wrapped pruner.

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
                f"TTPPruner prunes studies with one objective but got {len(study.directions)}."
            )
        if self._is_skipped(study, trial):
            return True
        return False if self._wrapped is None else bool(self._wrapped.prune(study, trial))

    def _is_skipped(self, study: Study, trial: FrozenTrial) -> bool:
        with self._lock:
            known = self._skipped[study]
            if trial.number in known:
                return known[trial.number]
        # The storage knows where another process asked before, as ask-and-tell may do.
        decision = stored_entry(study, trial, DECISION)
        if decision is not None:
            skipped = bool(decision["decision"] == SKIP)
        else:
            skipped = self._decide(study, trial)
        with self._lock:
            while len(known) >= 1024:
                known.pop(next(iter(known)))
            known[trial.number] = skipped
        return skipped

    def _decide(self, study: Study, trial: FrozenTrial) -> bool:
        configuration = resolve_for_trial(self._map, study, trial)
        if configuration is None:
            self._say_that_nothing_applies(trial)
            reason = "no prediction: the hyperparameter map does not apply to this trial"
            record_decision(study, trial, RUN, reason)
            return False
        started = time.perf_counter()
        predictor = informed_by(study, self._predictor)
        configuration = clip_batch_size(configuration, predictor)
        budget = self._budget_steps(configuration)
        horizon = predictor.max_steps if math.isinf(budget) else self._tolerance * budget
        prediction = predictor.predict(*configuration, max_steps=max(1, int(horizon)))
        record_prediction(
            study,
            trial,
            predictor,
            configuration,
            prediction,
            budget_steps=budget,
            prediction_seconds=time.perf_counter() - started,
        )
        objection = self._objection(prediction, budget)
        if objection is None:
            record_decision(study, trial, RUN, f"predicted: {prediction}")
            return False
        override = self._override(study, predictor)
        if override is not None:
            record_decision(study, trial, RUN, f"{override}, although {objection}")
            return False
        record_decision(study, trial, SKIP, objection)
        _logger.info(f"Trial {trial.number} is skipped: {objection}.")
        return True

    def _say_that_nothing_applies(self, trial: FrozenTrial) -> None:
        if self._map == HyperparameterMap() and trial.params and not self._told:
            self._told = True
            _logger.warning(
                f"Trial {trial.number} has no 'learning_rate', 'batch_size' and 'momentum' (it "
                f"has {', '.join(map(repr, sorted(trial.params)))}), so nothing is predicted for "
                "it. "
                "Pass hyperparameters=HyperparameterMap(...) if they have other names."
            )

    def _objection(self, prediction: Prediction, budget: float) -> str | None:
        """Why a trial should not run, in words, or :obj:`None`."""
        if prediction.outcome == DIVERGES:
            return f"predicted to diverge: {str(prediction).removeprefix('diverges: ')}"
        if prediction.outcome == NOT_REACHED:
            if math.isinf(budget):
                return f"predicted not to reach the target in {prediction.max_steps:,} steps"
            return (
                f"predicted to miss the target by far: not reached in {prediction.max_steps:,} "
                f"steps, {self._tolerance:g} times the budget of {budget:,.0f}"
            )
        return None

    def _override(self, study: Study, predictor: TrainingTimePredictor) -> str | None:
        """Why a trial runs in spite of its prediction, in words, or :obj:`None`."""
        calibration = predictor.calibration
        if not calibration.trusted:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    "Predicted training times were further from the observed ones (typically by "
                    f"a factor {math.exp(calibration.compared_error):.2f}) than those of "
                    "`c / effective learning rate`, learned from the same trials (a factor "
                    f"{math.exp(calibration.baseline_error):.2f}, {calibration.n_observed} "
                    "trials). Nothing is skipped until that changes.",
                    UnreliablePredictionWarning,
                    stacklevel=2,
                )
            return "predictions are worse than a rule of thumb"
        if n_skipped_in_a_row(study) >= self._max_consecutive:
            return f"runs after {self._max_consecutive} skipped trials in a row"
        return None

    def _budget_steps(self, configuration: Configuration) -> float:
        budgets = [math.inf]
        n_samples = self._predictor.spectrum.n_samples
        if "max_steps" in self._budgets:
            budgets.append(self._budgets["max_steps"])
        if "max_epochs" in self._budgets:
            per_epoch = math.ceil(n_samples / configuration.batch_size)
            budgets.append(self._budgets["max_epochs"] * per_epoch)
        if "max_seconds" in self._budgets:
            per_step = self._predictor.seconds_per_step(np.array(configuration.batch_size))
            budgets.append(self._budgets["max_seconds"] / float(per_step))
        return min(budgets)


def clip_batch_size(
    configuration: Configuration, predictor: TrainingTimePredictor
) -> Configuration:
    """Return the configuration with at most N samples a batch, which is all a data loader gives.

    Args:
        configuration:
            The hyperparameters.
        predictor:
            Knows N.

    Returns:
        The configuration.
    """
    size = min(configuration.batch_size, predictor.spectrum.n_samples)
    return configuration._replace(batch_size=size)


def resolve_for_trial(
    mapping: HyperparameterMap, study: Study, trial: FrozenTrial
) -> Configuration | None:
    """Return a trial's hyperparameters, telling a conditional parameter from a wrong name.

    Args:
        mapping:
            The map.
        study:
            The study.
        trial:
            The trial, with its parameters suggested.

    Returns:
        The hyperparameters, or :obj:`None` where the map does not apply to this trial.

    Raises:
        ValueError:
            If the map reads a parameter that no trial of the study has.
    """
    try:
        return mapping.resolve(trial.params)
    except MissingParameterError:
        trials = trials_of(study, (*FINISHED, TrialState.RUNNING))
        seen = {name for t in trials for name in t.params}
        if mapping.parameters_read(trial.params) <= seen | set(trial.params):
            return None
        raise
