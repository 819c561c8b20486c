"""The goal of a search, with the limits of each trial and of the whole study."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import fields
import math
from typing import ClassVar
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from optuna_ttp._util.checks import check_number
from optuna_ttp.study import StudyBudget


if TYPE_CHECKING:
    from optuna_ttp.prediction import SearchPredictor


@dataclass(frozen=True, kw_only=True, repr=False)
class Goal:
    """The limits of each trial, of which the smallest counts, and the budget of the study.

    Attributes:
        is_time: True if the goal is a time to the target, False if it is a metric.
        max_steps: A trial's limit in optimiser steps.
        max_epochs: A trial's limit in passes over the data.
        max_seconds: A trial's limit in seconds of training.
        study_budget: The budget of all trials of the study together.
    """

    is_time: ClassVar[bool]

    max_steps: float | None = None
    max_epochs: float | None = None
    max_seconds: float | None = None
    study_budget: StudyBudget | None = None

    def __post_init__(self) -> None:
        for name in ("max_steps", "max_epochs", "max_seconds"):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value)
                if not value > 0:
                    raise ValueError(f"{name} must be positive but got {value}.")
        if self.study_budget is not None and not isinstance(self.study_budget, StudyBudget):
            raise TypeError(f"study_budget must be a StudyBudget but got {self.study_budget!r}.")

    def __repr__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        given = (f"{name}={value!r}" for name, value in values.items() if value is not None)
        return f"{type(self).__name__}({', '.join(given)})"

    def check(self, predictor: SearchPredictor) -> None:
        """Raise ValueError if a limit is in seconds and the seconds per step are not known."""
        if self.max_seconds is not None and predictor.throughput is None:
            raise ValueError(
                "max_seconds needs to know the time of a step, but the spectrum was computed with "
                "measure_speed=False. Give max_steps or max_epochs instead."
            )

    def steps(
        self, predictor: SearchPredictor, batch_size: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Return the smallest limit of trials with these batch sizes, in optimiser steps.

        The result has the shape of ``batch_size`` and is infinite without a limit. The predictor
        gives the number of samples and the seconds per step.
        """
        batch_sizes = np.asarray(batch_size, dtype=np.float64)
        limit = np.full(
            batch_sizes.shape, math.inf if self.max_steps is None else float(self.max_steps)
        )
        if self.max_epochs is not None:
            steps_per_epoch = np.ceil(predictor.n_samples / batch_sizes)
            limit = np.minimum(limit, self.max_epochs * steps_per_epoch)
        if self.max_seconds is not None:
            limit = np.minimum(limit, self.max_seconds / predictor.seconds_per_step(batch_sizes))
        return limit


@dataclass(frozen=True, kw_only=True, repr=False)
class BestMetric(Goal):
    """The goal of a search for the best value of the objective at the end of a trial's budget.

    The study's own values count, in the study's own direction: a loss, an accuracy or anything
    else that training makes better. Several limits may be given, of which the smallest counts.

    Example:
        >>> goal = BestMetric(max_epochs=3)
        >>> study = optuna.create_study(
        ...     direction="maximize",
        ...     sampler=TTPSampler(predictor, goal),
        ...     pruner=TTPPruner(predictor, goal),
        ... )

    Args:
        max_steps:
            The training time of a trial in optimiser steps. No limit by default: then the
            predictor's own ``max_steps`` counts.
        max_epochs:
            The training time of a trial in passes over the data. No limit by default.
        max_seconds:
            The training time of a trial in seconds. No limit by default.
        study_budget:
            The budget of all trials of the study together. No limit by default.

    Raises:
        ValueError:
            If a limit is not positive.
        TypeError:
            If a limit is not a number, or ``study_budget`` not a
            :class:`~optuna_ttp.StudyBudget`.
    """

    is_time: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True, repr=False)
class FastestToTarget(Goal):
    """The goal of a search for the configuration that reaches the predictor's target first.

    The objective's value is the time that training took to the target, in any unit, and the study
    minimises it. Several limits may be given, of which the smallest counts.

    Example:
        >>> goal = FastestToTarget(max_epochs=30, study_budget=StudyBudget(seconds=3600))
        >>> study = optuna.create_study(
        ...     sampler=TTPSampler(predictor, goal), pruner=TTPPruner(predictor, goal)
        ... )

    Args:
        max_steps:
            The largest number of optimiser steps of a trial. No limit by default: then the
            predictor's own ``max_steps`` counts.
        max_epochs:
            The largest number of passes of a trial over the data. No limit by default.
        max_seconds:
            The largest number of seconds of a trial's training. No limit by default.
        study_budget:
            The budget of all trials of the study together. No limit by default.

    Raises:
        ValueError:
            If a limit is not positive.
        TypeError:
            If a limit is not a number, or ``study_budget`` not a
            :class:`~optuna_ttp.StudyBudget`.
    """

    is_time: ClassVar[bool] = True
