"""Training losses that a trial reports to its pruner, as a curve to learn from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna.trial import BaseTrial

from optuna_ttp._util.checks import check_count
from optuna_ttp._util.checks import check_kind
from optuna_ttp.study._attributes import CURVE
from optuna_ttp.study._curve_record import curve_attribute
from optuna_ttp.study._curve_record import ReportedCurveRecord
from optuna_ttp.study._curve_record import stored_curve


if TYPE_CHECKING:
    import optuna


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
    stored = stored_curve(curve_attribute(trial))
    if stored is not None and not isinstance(stored, ReportedCurveRecord):
        return  # A TrainingLog knows every step.
    record = ReportedCurveRecord(per_report, averaged)
    trial.set_user_attr(CURVE, {"trial": trial.number, **record.to_json()})
