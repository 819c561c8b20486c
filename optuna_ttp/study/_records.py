"""What is written on a trial: what was predicted and decided for it, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
import math
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from optuna.trial import TrialState

from optuna_ttp.study._optuna_compat import write_user_attr


if TYPE_CHECKING:
    import optuna
    from optuna.trial import BaseTrial
    from optuna.trial import FrozenTrial

    from optuna_ttp.prediction import Prediction
    from optuna_ttp.prediction import SearchPredictor
    from optuna_ttp.study._hyperparameters import Configuration


# All that is known of a trial before it runs is one attribute: every write is a journey to the
# database.
RECORD = "ttp:record"
PREDICTION = "prediction"
DECISION = "decision"
# An objective with a clock of its own may write what a trial took, {"trial": number, "seconds":
# ...}; otherwise it is the time from the trial's start to its end.
PAID = "ttp:paid"
# The curve of its training loss is another one, which grows while it runs.
CURVE = "ttp:curve"
RUN = "run"
SKIP = "skip"
STOP = "stop"


def entry(trial: BaseTrial, key: str) -> dict[str, Any] | None:
    """Return what is written on a trial under a key.

    Args:
        trial:
            Any trial.
        key:
            :data:`PREDICTION` or :data:`DECISION`, or an attribute that begins with ``ttp:``.

    Returns:
        The entry, or :obj:`None` where there is none. A retried trial carries the attributes of
        the trial it repeats; those do not count.
    """
    value = trial.user_attrs.get(key if key.startswith("ttp:") else RECORD)
    if not isinstance(value, dict) or value.get("trial") != trial.number:
        return None
    return value if key.startswith("ttp:") else value.get(key)


def prediction_entry(
    predictor: SearchPredictor,
    configuration: Configuration,
    prediction: Prediction,
    *,
    budget_steps: float,
    prediction_seconds: float,
) -> dict[str, Any]:
    """Return what is written down of a prediction.

    Args:
        predictor:
            What predicted.
        configuration:
            For which hyperparameters.
        prediction:
            What it said.
        budget_steps:
            The steps that the trial may take; infinity where no budget was given.
        prediction_seconds:
            What the prediction took.

    Returns:
        Values that every storage takes.
    """
    budget_seconds = budget_steps * float(predictor.seconds_per_step(configuration.batch_size))
    return {
        "fingerprint": predictor.fingerprint,
        "spectrum_seconds": predictor.setup_seconds,
        "initial_loss": predictor.initial_loss,
        "initial_loss_sd": predictor.initial_loss_sd,
        "target": predictor.target.value,
        "learning_rate": configuration.learning_rate,
        "batch_size": configuration.batch_size,
        "momentum": configuration.momentum,
        "outcome": prediction.outcome.value,
        "steps": _finite(float(prediction.steps)),
        "seconds": _finite(float(prediction.seconds)),
        "stability": _finite(float(prediction.stability)),
        "budget_steps": _finite(budget_steps),
        "budget_seconds": _finite(budget_seconds),
        "max_steps": _finite(float(prediction.max_steps)),
        "prediction_seconds": prediction_seconds,
        "ladder": {
            "predicted": _rounded(prediction.log_first_passage_times),
            "expected": _rounded(prediction.expected_log_first_passage_times),
            "growth": _rounded(prediction.log_growth),
            "covariates": _rounded(prediction.covariates),
            "instability": _rounded(prediction.instability, "{:.5g}"),
        },
    }


def write_record(study: optuna.Study, trial: FrozenTrial, record: dict[str, Any]) -> None:
    """Write down what was predicted and decided for a trial.

    Args:
        study:
            The study.
        trial:
            The running trial.
        record:
            Its number under ``"trial"``, and entries under the names :data:`PREDICTION` and
            :data:`DECISION`.
    """
    write_user_attr(study, trial, RECORD, record)


def n_skipped_in_a_row(trials: Sequence[FrozenTrial]) -> int:
    """Return how many of the newest trials were skipped without one that ran, or still runs.

    Args:
        trials:
            Finished and running ones.

    Returns:
        A count.
    """
    count = 0
    for trial in sorted(trials, key=lambda t: t.number, reverse=True):
        decision = entry(trial, DECISION)
        if decision is None and trial.state == TrialState.RUNNING:
            continue  # Nothing is decided about it yet.
        if decision is None or decision["decision"] != SKIP:
            break
        count += 1
    return count


def predicted_cost(trial: FrozenTrial) -> float:
    """Return what a trial was predicted to take.

    Args:
        trial:
            Any trial.

    Returns:
        Seconds, steps where the time of a step is not known; NaN where nothing was predicted, or
        nothing finite.
    """
    prediction = entry(trial, PREDICTION) or {}
    seconds = prediction.get("seconds")
    return or_nan(prediction.get("steps") if seconds is None else seconds)


def paid_seconds(trial: FrozenTrial) -> float:
    """Return what a trial took.

    Args:
        trial:
            Any trial.

    Returns:
        Seconds; NaN where it is not finished.
    """
    paid = entry(trial, PAID)
    if paid is not None:
        return float(paid["seconds"])
    return math.nan if trial.duration is None else trial.duration.total_seconds()


def _finite(value: float) -> float | None:
    """JSON has no infinity, and not every storage takes Python's extension of it."""
    return value if math.isfinite(value) else None


def _rounded(values: NDArray[np.float64], digits: str = "{:.4f}") -> list[float | None]:
    return [float(digits.format(v)) if math.isfinite(v) else None for v in values]


def or_nan(value: float | None) -> float:
    """Read a number that may be missing.

    Args:
        value:
            As it was written.

    Returns:
        The number, or NaN.
    """
    return math.nan if value is None else float(value)
