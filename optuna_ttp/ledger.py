"""What was predicted, decided and paid for every trial, and what that saved."""

from __future__ import annotations

from dataclasses import dataclass
import math
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from optuna.trial import TrialState

from optuna_ttp._optuna_compat import FINISHED
from optuna_ttp._optuna_compat import read_user_attrs
from optuna_ttp._optuna_compat import trials_of
from optuna_ttp._optuna_compat import write_user_attr


if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from optuna_ttp.hyperparameters import Configuration
    from optuna_ttp.prediction import Prediction
    from optuna_ttp.predictor import TrainingTimePredictor


PREDICTION = "ttp:prediction"
DECISION = "ttp:decision"
PAID = "ttp:paid"
RUN = "run"
SKIP = "skip"


@dataclass(frozen=True)
class TrialRecord:
    """The ledger's line of one trial. Values that are not known are NaN.

    Attributes:
        number:
            The trial's number.
        state:
            Its state in Optuna.
        params:
            Its parameters.
        outcome:
            The predicted outcome, or :obj:`None` where nothing was predicted.
        predicted_steps:
            Predicted steps to the target.
        predicted_seconds:
            The same in seconds.
        decision:
            ``"run"``, ``"skip"``, or :obj:`None` where nothing was decided.
        reason:
            Why, in words.
        paid_seconds:
            From the trial's start to its end.
        avoided_seconds:
            What a skipped trial would have cost, by estimate: the share of its budget that trials
            which ran took on average, or their mean seconds where there is no budget.
        prediction_seconds:
            What its prediction took.
        value:
            Its objective value, where it has a single one.
    """

    number: int
    state: str
    params: dict[str, Any]
    outcome: str | None
    predicted_steps: float
    predicted_seconds: float
    decision: str | None
    reason: str
    paid_seconds: float
    avoided_seconds: float
    prediction_seconds: float
    value: float


@dataclass(frozen=True)
class Report:
    """The ledger of a study.

    Attributes:
        records:
            A line a trial.
        spectrum_seconds:
            What the spectra behind the predictions took to compute, also where they were read
            from a store.
    """

    records: tuple[TrialRecord, ...]
    spectrum_seconds: float

    @property
    def n_skipped(self) -> int:
        """The number of trials that were skipped on their prediction."""
        return sum(record.decision == SKIP for record in self.records)

    @property
    def paid_seconds(self) -> float:
        """Seconds that the finished trials took, predictions included."""
        return _sum(record.paid_seconds for record in self.records)

    @property
    def prediction_seconds(self) -> float:
        """Seconds spent on predictions."""
        return _sum(record.prediction_seconds for record in self.records)

    @property
    def avoided_seconds(self) -> float:
        """Seconds that the skipped trials would have taken, by estimate."""
        return _sum(record.avoided_seconds for record in self.records)

    @property
    def saved_seconds(self) -> float:
        """The seconds avoided, less those of the predictions and of the spectra. May be negative.

        An estimate, because nobody knows when a wrapped pruner, or an objective that gives up on
        NaN, would have stopped the skipped trials.
        """
        return self.avoided_seconds - self.prediction_seconds - self.spectrum_seconds

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the records as dictionaries, for a data frame or a file."""
        return [dict(vars(record)) for record in self.records]

    def __str__(self) -> str:
        lines = [
            f"{'trial':>5}  {'state':<8}  {'predicted':>11}  {'seconds':>9}  {'paid':>8}  "
            f"{'value':>9}  decision"
        ]
        for r in self.records:
            predicted = (
                _number(r.predicted_steps, ",.0f") if r.outcome == "converges" else r.outcome
            )
            decision = r.decision or "-"
            lines.append(
                f"{r.number:>5}  {r.state:<8}  {predicted or '-':>11}  "
                f"{_number(r.predicted_seconds, '.3g'):>9}  {_number(r.paid_seconds, '.3g'):>8}  "
                f"{_number(r.value, '.4g'):>9}  {decision}{': ' + r.reason if r.reason else ''}"
            )
        lines.append(
            f"{len(self.records)} trials, {self.n_skipped} skipped on their prediction. "
            f"Paid {self.paid_seconds:.1f} s; avoided about {self.avoided_seconds:.1f} s."
        )
        lines.append(
            f"Net of the spectrum ({self.spectrum_seconds:.1f} s) and of the predictions "
            f"({self.prediction_seconds:.1f} s): about {self.saved_seconds:.1f} s saved."
        )
        return "\n".join(lines)


def report(study: optuna.Study) -> Report:
    """Draw up the ledger of a study.

    Example:
        >>> print(optuna_ttp.report(study))

    Args:
        study:
            Any study; trials that our sampler and pruner did not see have empty fields.

    Returns:
        A table when printed, the records and sums as attributes.
    """
    trials = sorted(study.get_trials(deepcopy=False), key=lambda trial: trial.number)
    typical = _typical_cost(trials)
    spectra = {
        p["fingerprint"]: p["spectrum_seconds"]
        for p in (entry(trial, PREDICTION) for trial in trials)
        if p is not None
    }
    return Report(tuple(_record(trial, typical) for trial in trials), float(sum(spectra.values())))


def entry(trial: FrozenTrial, key: str) -> dict[str, Any] | None:
    """Return what we wrote on a trial under a key.

    Args:
        trial:
            Any trial.
        key:
            One of the ``ttp:`` keys.

    Returns:
        The entry, or :obj:`None` where there is none. A retried trial carries the attributes of
        the trial it repeats; those do not count.
    """
    value = trial.user_attrs.get(key)
    if not isinstance(value, dict) or value.get("trial") != trial.number:
        return None
    return value


def record_prediction(
    study: optuna.Study,
    trial: FrozenTrial,
    predictor: TrainingTimePredictor,
    configuration: Configuration,
    prediction: Prediction,
    *,
    budget_steps: float,
    prediction_seconds: float,
) -> None:
    """Write down what was predicted for a trial.

    Args:
        study:
            The study.
        trial:
            The running trial.
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
    """
    budget_seconds = budget_steps * float(predictor.seconds_per_step(configuration.batch_size))
    write_user_attr(
        study,
        trial,
        PREDICTION,
        {
            "trial": trial.number,
            "fingerprint": predictor.spectrum.metadata.fingerprint,
            "spectrum_seconds": predictor.spectrum.metadata.compute_seconds
            + predictor.probe_seconds,
            "target": predictor.target.value,
            "learning_rate": configuration.learning_rate,
            "batch_size": configuration.batch_size,
            "momentum": configuration.momentum,
            "outcome": prediction.outcome,
            "steps": _finite(float(prediction.steps)),
            "seconds": _finite(float(prediction.seconds)),
            "stability": _finite(float(prediction.stability)),
            "budget_seconds": _finite(budget_seconds),
            "prediction_seconds": prediction_seconds,
            "ladder": {
                "predicted": _rounded(prediction.log_passages),
                "expected": _rounded(prediction.expected_log_passages),
                "growth": _rounded(prediction.log_growth),
                "covariates": _rounded(prediction.covariates),
                "instability": _rounded(prediction.instability),
            },
        },
    )


def record_decision(study: optuna.Study, trial: FrozenTrial, decision: str, reason: str) -> None:
    """Write down what was decided about a trial and why.

    Args:
        study:
            The study.
        trial:
            The running trial.
        decision:
            ``"run"`` or ``"skip"``.
        reason:
            Why, in words.
    """
    value = {"trial": trial.number, "decision": decision, "reason": reason}
    write_user_attr(study, trial, DECISION, value)


def record_paid(study: optuna.Study, trial: FrozenTrial, seconds: float) -> None:
    """Write down what a trial took.

    Args:
        study:
            The study.
        trial:
            The trial that is about to finish.
        seconds:
            From its start to its end.
    """
    write_user_attr(study, trial, PAID, {"trial": trial.number, "seconds": seconds})


def stored_entry(study: optuna.Study, trial: FrozenTrial, key: str) -> dict[str, Any] | None:
    """Like :func:`entry`, but as the storage has it now.

    Args:
        study:
            The study.
        trial:
            The running trial.
        key:
            One of the ``ttp:`` keys.

    Returns:
        The entry, or :obj:`None`.
    """
    value = read_user_attrs(study, trial).get(key)
    if not isinstance(value, dict) or value.get("trial") != trial.number:
        return None
    return value


def n_skipped_in_a_row(study: optuna.Study) -> int:
    """Return how many of the newest trials were skipped without one that ran, or still runs.

    Args:
        study:
            The study.

    Returns:
        A count.
    """
    count = 0
    trials = trials_of(study, (*FINISHED, TrialState.RUNNING))
    for trial in sorted(trials, key=lambda t: t.number, reverse=True):
        decision = entry(trial, DECISION)
        if decision is None and trial.state == TrialState.RUNNING:
            continue  # Nothing is decided about it yet.
        if decision is None or decision["decision"] != SKIP:
            break
        count += 1
    return count


@dataclass(frozen=True)
class _TypicalCost:
    """What trials cost here that were not skipped.

    Attributes:
        seconds:
            Their mean seconds; NaN where none ran.
        share:
            The mean share of their budget that they took; one where none had a budget.
    """

    seconds: float
    share: float


def _typical_cost(trials: list[FrozenTrial]) -> _TypicalCost:
    seconds, shares = [], []
    for trial in trials:
        paid = _paid_seconds(trial)
        if (entry(trial, DECISION) or {}).get("decision") == SKIP or not math.isfinite(paid):
            continue
        seconds.append(paid)
        budget = (entry(trial, PREDICTION) or {}).get("budget_seconds")
        if budget:
            shares.append(min(1.0, paid / budget))
    return _TypicalCost(
        sum(seconds) / len(seconds) if seconds else math.nan,
        sum(shares) / len(shares) if shares else 1.0,
    )


def _record(trial: FrozenTrial, typical: _TypicalCost) -> TrialRecord:
    prediction = entry(trial, PREDICTION) or {}
    decision = entry(trial, DECISION) or {}
    paid = _paid_seconds(trial)
    avoided = 0.0
    if decision.get("decision") == SKIP:
        budget = prediction.get("budget_seconds")
        # Wrapped pruners and the objective stop trials early, so few would have used it up.
        avoided = typical.seconds if budget is None else typical.share * budget
    values = trial.values or []
    return TrialRecord(
        number=trial.number,
        state=trial.state.name,
        params=dict(trial.params),
        outcome=prediction.get("outcome"),
        predicted_steps=_or_nan(prediction.get("steps")),
        predicted_seconds=_or_nan(prediction.get("seconds")),
        decision=decision.get("decision"),
        reason=decision.get("reason", ""),
        paid_seconds=paid,
        avoided_seconds=avoided,
        prediction_seconds=float(prediction.get("prediction_seconds", 0.0)),
        value=values[0] if len(values) == 1 else math.nan,
    )


def _paid_seconds(trial: FrozenTrial) -> float:
    paid = entry(trial, PAID)
    if paid is not None:
        return float(paid["seconds"])
    return math.nan if trial.duration is None else trial.duration.total_seconds()


def _finite(value: float) -> float | None:
    """JSON has no infinity, and not every storage takes Python's extension of it."""
    return value if math.isfinite(value) else None


def _rounded(values: NDArray[np.float64]) -> list[float | None]:
    return [_finite(round(float(v), 4)) if math.isfinite(v) else None for v in values]


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _sum(values: Any) -> float:
    return float(sum(value for value in values if math.isfinite(value)))


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"
