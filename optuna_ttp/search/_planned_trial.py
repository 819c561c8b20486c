"""A trial before its first step: its configuration, its prediction and its study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import TYPE_CHECKING

import numpy as np

from optuna_ttp.calibration import probability_below
from optuna_ttp.calibration import Z_90
from optuna_ttp.study import Objection


if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

    from optuna_ttp.prediction import Prediction
    from optuna_ttp.prediction import SearchPredictor
    from optuna_ttp.search._goal import Goal
    from optuna_ttp.study import Configuration


# The logarithm of steps over budget is clipped to this, because storages refuse infinity.
_LARGEST_LOG_EXCESS = 50.0

# An objection to a trial, and its reason in words.
Verdict = tuple[Objection, str]


@dataclass(frozen=True, eq=False)
class PlannedTrial:
    """A trial that the pruner decides about before its first step.

    Attributes:
        study: The study.
        number: The trial's number.
        others: The other finished and running trials of the study.
        goal: The goal of the search.
        predictor: The predictor as the other trials have corrected it.
        configuration: The trial's hyperparameters.
        budget_steps: The trial's limit in optimiser steps; infinity if it has none.
        horizon: The limit times the tolerance in steps; without a limit, the predictor's horizon.
        prediction: The prediction for the configuration within that horizon.
    """

    study: Study
    number: int
    others: Sequence[FrozenTrial]
    goal: Goal
    predictor: SearchPredictor
    configuration: Configuration
    budget_steps: float
    horizon: float
    prediction: Prediction

    @classmethod
    def of(
        cls,
        study: Study,
        number: int,
        others: Sequence[FrozenTrial],
        goal: Goal,
        predictor: SearchPredictor,
        configuration: Configuration,
        tolerance: float,
    ) -> PlannedTrial:
        """Return a trial with its prediction up to its limit in steps times ``tolerance``."""
        clipped = configuration.clipped(predictor.n_samples)
        budget_steps = float(goal.steps(predictor, np.array(clipped.batch_size)))
        horizon = predictor.max_steps if math.isinf(budget_steps) else tolerance * budget_steps
        prediction = predictor.estimate(*clipped, max_steps=max(1, int(horizon)))
        return cls(
            study, number, others, goal, predictor, clipped, budget_steps, horizon, prediction
        )

    @property
    def predicted_seconds(self) -> float:
        """The predicted seconds, or the predicted steps if the seconds per step are not known."""
        seconds = float(self.prediction.seconds)
        return float(self.prediction.steps) if math.isnan(seconds) else seconds

    @property
    def log_steps(self) -> float:
        """Logarithm of the predicted steps, the middle of its interval, beyond the horizon too."""
        steps_low, steps_high = self.prediction.steps_low, self.prediction.steps_high
        return 0.5 * float(np.log(steps_low) + np.log(steps_high))

    @property
    def log_excess(self) -> float:
        """Logarithm of the predicted steps over the horizon, clipped to [-50, 50]."""
        steps = float(self.prediction.steps)
        log_steps = math.log(steps) if math.isfinite(steps) else self.log_steps
        excess = log_steps - math.log(self.horizon)
        return float(np.clip(excess, -_LARGEST_LOG_EXCESS, _LARGEST_LOG_EXCESS))

    def probability_within(self, ratio: float) -> float:
        """Return the probability that the trial takes at most ``ratio`` times its predicted time.

        The logarithm of the time is normally distributed; its standard deviation comes from the
        80 % interval, and is one if that is not finite.
        """
        width = float(np.log(self.prediction.steps_high) - np.log(self.prediction.steps_low))
        sd = max(width / (2.0 * Z_90), 1e-6) if math.isfinite(width) else 1.0
        return float(probability_below(np.ones(1), np.array([sd]), np.array([ratio]))[0])
