"""The training-loss curve that is written on a trial."""

from __future__ import annotations

import math
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from optuna.trial import TrialState

from optuna_ttp.calibration import LossCurve
from optuna_ttp.study._records import CURVE
from optuna_ttp.study._records import entry
from optuna_ttp.study._records import or_nan
from optuna_ttp.study._records import PREDICTION
from optuna_ttp.study._reported_curve import curve_of_reports
from optuna_ttp.study._reported_curve import STEPS_PER_REPORT
from optuna_ttp.study._unusable_curve import UnusableCurve


if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from optuna_ttp.prediction import SearchPredictor


# How far above the target a curve may end and count as having reached it.
AT_TARGET = 1.05


def curve_entry(curve: LossCurve, first: float) -> dict[str, Any]:
    """Return what is written of a curve.

    Args:
        curve:
            The curve.
        first:
            The first loss that was recorded; NaN where none was a number.

    Returns:
        Values that every storage takes.
    """
    return {
        "n_steps": curve.n_steps,
        "diverged": curve.diverged,
        "n_gaps": curve.n_gaps,
        "first": first if math.isfinite(first) else None,
        "steps": [int(s) if s == int(s) else float(s) for s in curve.steps],
        "losses": [float(f"{loss:.6g}") for loss in curve.losses],
        "errors": [float(f"{error:.3g}") for error in curve.errors],
    }


def joined(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of a curve that goes on where another one ended.

    Args:
        earlier:
            An entry.
        later:
            Another one, whose steps begin after those of the first.

    Returns:
        An entry.
    """
    lists = {name: [*earlier[name], *later[name]] for name in ("steps", "losses", "errors")}
    n_gaps = earlier["n_gaps"] + later["n_gaps"]
    return {**later, **lists, "first": earlier["first"], "n_gaps": n_gaps}


def recorded(trial: FrozenTrial) -> dict[str, Any] | UnusableCurve | None:
    """Return what is written of a trial's curve, made of its reports where they are the loss.

    Args:
        trial:
            Any trial.

    Returns:
        An entry with at least one loss, or why there is none, or :obj:`None` where nothing was
        recorded.
    """
    value = entry(trial, CURVE)
    if value is None:
        return None
    if STEPS_PER_REPORT in value:
        reported = trial.intermediate_values
        completed = trial.state == TrialState.COMPLETE
        if not reported:
            return UnusableCurve("empty", "nothing was reported") if completed else None
        try:
            value = value | curve_entry(*curve_of_reports(value, reported))
        except ValueError as error:
            return UnusableCurve("values", str(error).rstrip("."))
        if completed and len(reported) == 1:
            return UnusableCurve("short", "it has a single value")
    # What a log has refused it has told.
    if "unusable" in value:
        return UnusableCurve(value.get("kind", "values"), value["unusable"])
    if not value["steps"]:
        return UnusableCurve("infinite", "none of its losses is a finite number")
    return value


def observed_curve(trial: FrozenTrial) -> LossCurve | None:
    """Return the smoothed training-loss curve of a trial.

    Args:
        trial:
            Any trial.

    Returns:
        The curve, or :obj:`None` where none was recorded, or none that can be used.
    """
    value = recorded(trial)
    return None if value is None or isinstance(value, UnusableCurve) else read_curve(value)


def lost_steps(trial: FrozenTrial) -> int:
    """Return for how many steps a trial's loss has been infinite or NaN by now.

    Args:
        trial:
            Any trial.

    Returns:
        A count; zero where the last loss is finite, or one that is not may be an accident.
    """
    value = recorded(trial)
    if isinstance(value, UnusableCurve):
        written = entry(trial, CURVE) or {}
        n_steps = int(written.get("n_steps", len(trial.intermediate_values)))
        return n_steps if value.kind == "infinite" else 0
    if value is None or not value["diverged"]:
        return 0
    return int(value["n_steps"] - 1 - value["steps"][-1])


def measured_seconds(trial: FrozenTrial) -> float:
    """Return the seconds that a step of a trial took.

    Args:
        trial:
            Any trial.

    Returns:
        The median; NaN where it was not measured.
    """
    value = recorded(trial)
    if value is None or isinstance(value, UnusableCurve):
        return math.nan
    return or_nan(value.get("seconds_per_step"))


def read_curve(value: dict[str, Any]) -> LossCurve:
    """Read an entry.

    Args:
        value:
            As :func:`recorded` returned it.

    Returns:
        The curve.
    """
    return LossCurve(
        np.array(value["steps"], dtype=np.float64),
        np.array(value["losses"], dtype=np.float64),
        np.array(value["errors"], dtype=np.float64),
        int(value["n_steps"]),
        bool(value["diverged"]),
        int(value["n_gaps"]),
    )


def progress_to_target(trial: FrozenTrial) -> float:
    """Return how far a trial has come to the training loss that was predicted for it, in time.

    Args:
        trial:
            A finished trial.

    Returns:
        The logarithm of the initial loss over its lowest smoothed one within its budget, or the
        horizon where it has none, less a standard error, over the same of the target; NaN where
        no curve tells, or nothing was predicted.
    """
    prediction = entry(trial, PREDICTION) or {}
    curve = observed_curve(trial)
    if curve is None or prediction.get("target") is None:
        return math.nan
    budget = prediction.get("budget_steps") or prediction.get("max_steps") or math.inf
    within = curve.steps <= budget
    if not within.any():
        return math.nan
    lowest = float((curve.losses[within] * np.exp(-curve.errors[within])).min())
    initial, target = float(prediction["initial_loss"]), AT_TARGET * float(prediction["target"])
    return math.log(initial / lowest) / max(math.log(initial / target), 1e-9)


def observed_steps(trial: FrozenTrial, predictor: SearchPredictor) -> float:
    """Return the step at which a trial's smoothed training loss was at the predictor's target.

    Args:
        trial:
            Any trial.
        predictor:
            Knows the target.

    Returns:
        The step; infinity where the target was not reached, NaN where nothing was recorded.
    """
    curve = observed_curve(trial)
    if curve is None or predictor.target.quantity != "loss":
        return float("nan")
    passage = predictor.target.first_passage(curve.steps, curve.losses)
    # A trial that stops at its target ends on it, give or take the noise of the last batches.
    if not np.isfinite(passage) and curve.losses[-1] <= AT_TARGET * predictor.target.value:
        return float(curve.steps[-1])
    return passage
