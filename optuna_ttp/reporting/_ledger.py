"""What was predicted, decided and paid for every trial, and what that saved."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from dataclasses import field
import math
from typing import Any

import numpy as np
import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_ttp._util.checks import check_kind
from optuna_ttp.calibration import calibrate
from optuna_ttp.calibration import Calibration
from optuna_ttp.calibration import Observation
from optuna_ttp.study import CurveStart
from optuna_ttp.study import DECISION
from optuna_ttp.study import entry
from optuna_ttp.study import FINISHED
from optuna_ttp.study import InitialLoss
from optuna_ttp.study import joint_objections
from optuna_ttp.study import observation_of
from optuna_ttp.study import or_nan
from optuna_ttp.study import paid_seconds
from optuna_ttp.study import PREDICTION
from optuna_ttp.study import progress_to_target
from optuna_ttp.study import recorded
from optuna_ttp.study import SKIP
from optuna_ttp.study import STOP
from optuna_ttp.study import unclosed
from optuna_ttp.study import UnusableCurve


# So many curves that cannot be used are named.
_SHOWN = 3


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
            ``"run"``, ``"skip"`` before its first step, ``"stop"`` under way, or :obj:`None` where
            nothing was decided.
        kind:
            What a prediction spoke against: ``"diverges"``, ``"budget"``, ``"cost"``,
            ``"study_budget"`` or ``"chance"``; :obj:`None` where it did not.
        override:
            Why it ran nevertheless: ``"untrusted"``, ``"refuted"``, ``"shadow"``, ``"turn"`` or
            ``"audit"``;
            :obj:`None` where it did not, or had no need to.
        reason:
            Why, in words.
        paid_seconds:
            From the trial's start to its end.
        avoided_seconds:
            What a skipped trial would have cost, by estimate: the share of its budget that trials
            which ran took on average, or their mean seconds where there is no budget; of a
            stopped one what it was predicted to go on for.
        avoided_sd:
            Its standard deviation.
        prediction_seconds:
            What its prediction took.
        value:
            Its objective value, where it has a single one.
        was_wrong:
            Of a trial that ran in spite of its prediction: whether it reached the target within
            its budget, or became the best one. :obj:`None` of others, and where nobody can tell.
    """

    number: int
    state: str
    params: dict[str, Any]
    outcome: str | None
    predicted_steps: float
    predicted_seconds: float
    decision: str | None
    kind: str | None
    override: str | None
    reason: str
    paid_seconds: float
    avoided_seconds: float
    avoided_sd: float
    prediction_seconds: float
    value: float
    was_wrong: bool | None


@dataclass(frozen=True)
class Report:
    """The ledger of a study.

    Attributes:
        records:
            A line a trial.
        spectrum_seconds:
            What the spectra behind the predictions took to compute, also where they were read
            from a store.
        calibration:
            What the study's trials say about the predictions that were made for them, for the task
            of the newest one.
        unusable:
            Why training-loss curves could not be learned from, by the number of the trial.
    """

    records: tuple[TrialRecord, ...]
    spectrum_seconds: float
    calibration: Calibration = field(default_factory=Calibration.none, repr=False)
    unusable: dict[int, str] = field(default_factory=dict)

    @property
    def n_skipped(self) -> int:
        """The number of trials that were skipped on their prediction."""
        return sum(record.decision == SKIP for record in self.records)

    @property
    def n_stopped(self) -> int:
        """The number of trials that were stopped under way on their own curve."""
        return sum(record.decision == STOP for record in self.records)

    @property
    def skipped_by_kind(self) -> dict[str, int]:
        """How many trials were skipped or stopped for which kind of reason."""
        kinds = [r.kind or "other" for r in self.records if r.decision in (SKIP, STOP)]
        return dict(sorted(Counter(kinds).items()))

    @property
    def n_audited(self) -> int:
        """The number of trials that ran in spite of their prediction, and of which one can tell.

        For an audit, in shadow mode, or because it was their turn.
        """
        return sum(record.was_wrong is not None for record in self.records)

    @property
    def n_wrong(self) -> int:
        """How many of these would have been skipped wrongly."""
        return sum(record.was_wrong is True for record in self.records)

    def wrong_share(self, coverage: float = 0.8) -> tuple[float, float, float]:
        """Estimate how often skipping is wrong.

        Args:
            coverage:
                Of the interval. 0.8 by default.

        Returns:
            The share, and the ends of its Jeffreys interval (Brown, Cai and DasGupta, 2001,
            section 3.1.2). NaN, 0 and 1 where nothing was audited.
        """
        from scipy.stats import beta

        n, k = self.n_audited, self.n_wrong
        if n == 0:
            return math.nan, 0.0, 1.0
        low, high = (
            float(beta.ppf(0.5 + sign * coverage / 2, k + 0.5, n - k + 0.5)) for sign in (-1, 1)
        )
        return k / n, 0.0 if k == 0 else low, 1.0 if k == n else high

    @property
    def saved_sd(self) -> float:
        """Standard deviation of :attr:`saved_seconds`.

        From how much the trials that ran differ in what they took, or in their share of the
        budget. Zero where nothing was skipped, NaN where fewer than two ran.
        """
        own = [r for r in self.records if r.avoided_seconds > 0]
        if not own:
            return 0.0
        # The mean of those that ran is uncertain in the same way for all that were skipped.
        single = sum(r.avoided_sd**2 for r in own)
        common = sum(r.avoided_sd for r in own) ** 2 / max(self._n_ran, 1)
        return math.sqrt(single + common)

    @property
    def _n_ran(self) -> int:
        return sum(r.decision != SKIP and math.isfinite(r.paid_seconds) for r in self.records)

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
        stopped = f", {self.n_stopped} stopped under way" if self.n_stopped else ""
        lines.append(
            f"{len(self.records)} trials, {self.n_skipped} skipped on their prediction{stopped}. "
            f"Paid {self.paid_seconds:.1f} s; avoided about {self.avoided_seconds:.1f} s."
        )
        lines.append(
            f"Net of the spectrum ({self.spectrum_seconds:.1f} s) and of the predictions "
            f"({self.prediction_seconds:.1f} s): about {self.saved_seconds:.1f} s saved"
            + (f", give or take {self.saved_sd:.1f} s." if self.saved_sd > 0 else ".")
        )
        if self.n_audited:
            share, low, high = self.wrong_share()
            lines.append(
                f"{self.n_audited} ran in spite of their prediction; {self.n_wrong} of them would "
                f"have been skipped wrongly ({share:.0%}, 80 % interval {low:.0%} to {high:.0%})."
            )
        if self.calibration.n_observed:
            lines.append(f"Predictions: {self.calibration}.")
        if self.unusable:
            first = [f"trial {n}: {reason}" for n, reason in list(self.unusable.items())[:_SHOWN]]
            more = ["..."] if len(self.unusable) > _SHOWN else []
            count = len(self.unusable)
            curves = "curve" if count == 1 else "curves"
            lines.append(
                f"{count} training-loss {curves} could not be learned from ("
                f"{'; '.join(first + more)})."
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

    Raises:
        TypeError:
            If ``study`` is none.
    """
    check_kind("study", study, optuna.Study)
    trials = sorted(study.get_trials(deepcopy=False), key=lambda trial: trial.number)
    typical = _typical_cost(trials)
    spectra = {
        p["fingerprint"]: p["spectrum_seconds"]
        for p in (entry(trial, PREDICTION) for trial in trials)
        if p is not None
    }
    best = _best(study, trials)
    records = tuple(_record(trial, typical, best) for trial in trials)
    return Report(records, float(sum(spectra.values())), *_learned(study, trials))


def _learned(study: optuna.Study, trials: list[FrozenTrial]) -> tuple[Calibration, dict[int, str]]:
    """What the trials of the newest one's task say of its predictions, and which say nothing."""
    observations: dict[str, dict[int, Observation]] = {}
    starts: dict[int, CurveStart] = {}
    unusable: dict[int, str] = {}
    newest = ""
    for trial in trials:
        prediction = entry(trial, PREDICTION) or {}
        told: Observation | UnusableCurve | dict[str, Any] | None
        if prediction.get("ladder") is None:
            told = recorded(trial)
        else:
            initial = InitialLoss(prediction["initial_loss"], prediction["initial_loss_sd"])
            told = observation_of(trial, prediction, initial)
            newest = prediction["fingerprint"]
        missing = unclosed(study, trial) if trial.state in FINISHED else None
        if missing is not None:
            unusable[trial.number] = missing.reason
        if isinstance(told, UnusableCurve):
            unusable[trial.number] = told.reason
        elif isinstance(told, Observation):
            observations.setdefault(newest, {})[trial.number] = told
            start = CurveStart.of(trial, prediction, initial)
            if start is not None and trial.state in FINISHED:
                starts[trial.number] = start
    found = joint_objections(starts)
    unusable |= {number: one.reason for number, one in found.items()}
    usable = [o for n, o in observations.get(newest, {}).items() if n not in found]
    return calibrate(usable), dict(sorted(unusable.items()))


@dataclass(frozen=True)
class _TypicalCost:
    """What trials cost here that were not skipped.

    Attributes:
        seconds:
            Their mean seconds; NaN where none ran.
        share:
            The mean share of their budget that they took; one where none had a budget.
        seconds_sd:
            Standard deviation of their seconds; NaN where fewer than two ran.
        share_sd:
            The same of the share.
    """

    seconds: float
    share: float
    seconds_sd: float
    share_sd: float


def _typical_cost(trials: list[FrozenTrial]) -> _TypicalCost:
    seconds, shares = [], []
    for trial in trials:
        paid = paid_seconds(trial)
        if (entry(trial, DECISION) or {}).get("decision") == SKIP or not math.isfinite(paid):
            continue
        seconds.append(paid)
        budget = (entry(trial, PREDICTION) or {}).get("budget_seconds")
        if budget:
            shares.append(min(1.0, paid / budget))
    return _TypicalCost(
        sum(seconds) / len(seconds) if seconds else math.nan,
        sum(shares) / len(shares) if shares else 1.0,
        float(np.std(seconds, ddof=1)) if len(seconds) > 1 else math.nan,
        float(np.std(shares, ddof=1)) if len(shares) > 1 else math.nan,
    )


def _record(trial: FrozenTrial, typical: _TypicalCost, best: int | None) -> TrialRecord:
    prediction = entry(trial, PREDICTION) or {}
    decision = entry(trial, DECISION) or {}
    paid = paid_seconds(trial)
    avoided, avoided_sd = 0.0, 0.0
    if decision.get("decision") == SKIP:
        budget = prediction.get("budget_seconds")
        # Wrapped pruners and the objective stop trials early, so few would have used it up.
        avoided = typical.seconds if budget is None else typical.share * budget
        avoided_sd = typical.seconds_sd if budget is None else typical.share_sd * budget
    elif decision.get("decision") == STOP:
        avoided = or_nan(decision.get("seconds_left"))
        avoided_sd = avoided * float(decision.get("log_sd", 0.0))
    values = trial.values or []
    return TrialRecord(
        number=trial.number,
        state=trial.state.name,
        params=dict(trial.params),
        outcome=prediction.get("outcome"),
        predicted_steps=or_nan(prediction.get("steps")),
        predicted_seconds=or_nan(prediction.get("seconds")),
        decision=decision.get("decision"),
        kind=decision.get("kind"),
        override=decision.get("override"),
        reason=decision.get("reason", ""),
        paid_seconds=paid,
        avoided_seconds=avoided,
        avoided_sd=avoided_sd,
        prediction_seconds=float(prediction.get("prediction_seconds", 0.0)),
        value=values[0] if len(values) == 1 else math.nan,
        was_wrong=_was_wrong(trial, best) if decision.get("override") else None,
    )


def _was_wrong(trial: FrozenTrial, best: int | None) -> bool | None:
    """Whether a trial did well that had been predicted to do badly."""
    if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
        return None
    if trial.number == best:
        return True
    gone = progress_to_target(trial)
    if math.isnan(gone):
        return False if trial.state == TrialState.COMPLETE and best is not None else None
    return gone >= 1.0


def _best(study: optuna.Study, trials: list[FrozenTrial]) -> int | None:
    """The number of the best trial of a study with one objective, if there is a good one."""
    done = [t for t in trials if t.state == TrialState.COMPLETE and t.values]
    # Of trials that were all to be skipped the best one may be as bad as predicted.
    willing = any("override" not in (entry(t, DECISION) or {}) for t in done)
    if len(study.directions) > 1 or not willing:
        return None
    sign = -1.0 if study.directions[0] == StudyDirection.MAXIMIZE else 1.0
    return min(done, key=lambda t: sign * t.values[0]).number


def _sum(values: Any) -> float:
    return float(sum(value for value in values if math.isfinite(value)))


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"
