"""Training losses that a trial reports to its pruner, as a curve to learn from."""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any
from typing import TYPE_CHECKING

import numpy as np

from optuna_ttp.loss_curve import LossCurve


if TYPE_CHECKING:
    import optuna


# The entry's keys in the attribute of a trial's curve.
STEPS_PER_REPORT = "steps_per_report"
_AVERAGED = "averaged"


def learn_from_reports(
    trial: optuna.trial.Trial, *, steps_per_report: int = 1, averaged: bool = True
) -> None:
    """Say that what a trial reports is the training loss, so that predictions learn from it.

    Call it once in the objective, before training, in place of a
    :class:`~optuna_ttp.TrainingLog`. Without it reports are never taken for training losses: most
    objectives report a validation metric.

    Example:
        >>> def objective(trial):
        ...     batch_size = trial.suggest_int("batch_size", 8, 128, log=True)
        ...     learn_from_reports(trial, steps_per_report=math.ceil(n_samples / batch_size))
        ...     for epoch in range(10):
        ...         trial.report(train_one_epoch(...), epoch)

    Args:
        trial:
            The trial of the objective.
        steps_per_report:
            Optimiser steps from one number of ``trial.report(value, number)``, which counts from
            zero, to the next. One by default: the loss of each step, before the step.
        averaged:
            Whether a value is the mean over the mini-batches of its steps (the default), or the
            training loss after them.

    Raises:
        ValueError:
            If ``steps_per_report`` is not a positive whole number.
    """
    from optuna_ttp.training_log import CURVE

    if isinstance(steps_per_report, bool) or int(steps_per_report) != steps_per_report:
        raise ValueError(f"steps_per_report must be a whole number but got {steps_per_report!r}.")
    if steps_per_report < 1:
        raise ValueError(f"steps_per_report must be at least 1 but got {steps_per_report}.")
    value = {
        "trial": trial.number,
        STEPS_PER_REPORT: int(steps_per_report),
        _AVERAGED: bool(averaged),
    }
    trial.set_user_attr(CURVE, value)


def curve_of_reports(
    setting: Mapping[str, Any], values: Mapping[int, float]
) -> tuple[LossCurve, float]:
    """Return the curve that a trial has reported.

    Args:
        setting:
            As :func:`learn_from_reports` wrote it.
        values:
            What was reported, by number; one at least.

    Returns:
        The curve, and the first value.

    Raises:
        ValueError:
            If a value or a number is negative.
    """
    per_report = int(setting[STEPS_PER_REPORT])
    numbers = sorted(values)
    # A mean over steps is that of their middle.
    ahead = 0.5 * (per_report - 1) if setting[_AVERAGED] else float(per_report)
    steps = [n * per_report + ahead for n in numbers]
    losses = [math.nan if values[n] is None else float(values[n]) for n in numbers]
    curve = LossCurve.of(np.array(losses), np.array(steps))
    done = int((numbers[-1] + 1) * per_report)
    return LossCurve(curve.steps, curve.losses, curve.errors, done, curve.diverged), losses[0]
