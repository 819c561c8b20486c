"""Training losses that a trial reports to its pruner, as a curve to learn from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
import math
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from optuna.trial import BaseTrial

from optuna_ttp._util.checks import check_count
from optuna_ttp._util.checks import check_kind
from optuna_ttp.calibration import LossCurve
from optuna_ttp.study._records import CURVE
from optuna_ttp.study._records import entry


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
    :class:`~optuna_ttp.TrainingLog`, which counts instead where the trial has both. Without it
    reports are never taken for training losses: most objectives report a validation metric.

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
        TypeError:
            If ``trial`` is no trial, ``steps_per_report`` no whole number, or ``averaged`` no
            boolean.
        ValueError:
            If ``steps_per_report`` is not positive.
    """
    if not isinstance(trial, BaseTrial):
        raise TypeError(f"trial must be the trial of the objective but got {trial!r}.")
    per_report = check_count("steps_per_report", steps_per_report)
    check_kind("averaged", averaged, bool)
    logged = entry(trial, CURVE)
    if logged is not None and STEPS_PER_REPORT not in logged:
        return  # A TrainingLog knows every step.
    value = {
        "trial": trial.number,
        STEPS_PER_REPORT: per_report,
        _AVERAGED: averaged,
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
        The curve, and the first value that is finite; NaN where none is.

    Raises:
        ValueError:
            If a value or a number is negative.
    """
    per_report = int(setting[STEPS_PER_REPORT])
    numbers = sorted(values)
    # A mean over steps is that of their middle.
    ahead = 0.5 * (per_report - 1) if setting[_AVERAGED] else float(per_report)
    steps = [n * per_report + ahead for n in numbers]
    losses = np.array([math.nan if values[n] is None else float(values[n]) for n in numbers])
    curve = LossCurve.of(losses, np.array(steps))
    finite = losses[np.isfinite(losses)]
    done = int((numbers[-1] + 1) * per_report)
    return replace(curve, n_steps=done), float(finite[0]) if len(finite) else math.nan
