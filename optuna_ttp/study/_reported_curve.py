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
    """Declare that a trial reports its training loss, so that predictions learn from the reports.

    Call it once in the objective, before training, instead of using a
    :class:`~optuna_ttp.TrainingLog`; if a trial has both, the log counts. Without this call,
    reports are not read as training losses, because most objectives report a validation metric.

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
            The optimiser steps per report, where the numbers of ``trial.report(value, number)``
            count from zero. One by default: the loss before each step.
        averaged:
            True (the default) if a value is the mean over the mini-batches of its steps, False if
            it is the training loss after them.

    Raises:
        TypeError:
            If ``trial`` is not a trial, ``steps_per_report`` not a whole number, or ``averaged``
            not a boolean.
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
