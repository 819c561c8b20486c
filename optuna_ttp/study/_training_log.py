"""Records a trial's training loss on the trial, as it trains."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
import math
import time
from types import TracebackType
from typing import Any
from typing import SupportsFloat
from typing import TYPE_CHECKING
import weakref

import numpy as np
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import BaseTrial

from optuna_ttp._util.checks import check_kind
from optuna_ttp.study._attributes import CURVE
from optuna_ttp.study._curve_record import curve_attribute
from optuna_ttp.study._curve_record import CurveRecord
from optuna_ttp.study._curve_record import stored_curve
from optuna_ttp.study._curve_record import StoredCurve
from optuna_ttp.study._study_state import state_of
from optuna_ttp.study._study_warnings import warn_of_curve
from optuna_ttp.study._unusable_curve import CurveFault
from optuna_ttp.study._unusable_curve import UnusableCurve


if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class TrainingLogRules:
    """The numbers that decide when a log writes its curve to the trial.

    Attributes:
        first_write: The number of losses at the first write; it doubles for each further write.
            The written part of a curve survives a killed process.
        more: If somebody asks about the running trial, it is written once so many times as many
            losses were recorded as are written. With 3 searches take 1.03 times as long.
        few: But not before so many times this many. Half and twice change no time.
        most_steps: Nobody takes so many optimiser steps: larger numbers are no steps.
    """

    first_write: int = 32
    more: float = 1.5
    few: int = 6
    most_steps: int = 10**12


RULES = TrainingLogRules()


class TrainingLog:
    """Records a trial's training loss, so that predictions can be checked and corrected.

    Use one log per trial: the losses of a second log are ignored, unless its steps begin where the
    first log ended. A loss that is not finite is ignored if a later loss is finite, or if it is a
    single one at the end of a curve that has fallen, because one mini-batch may overflow; a curve
    that otherwise ends with such losses is the curve of a trial that diverged.

    Example:
        >>> with TrainingLog(trial) as log:
        ...     for x, y in loader:
        ...         loss = train_step(x, y)
        ...         log.step(loss)

    Args:
        trial:
            The trial of the objective.
        measure_speed:
            Measure the seconds per step, too, from one recorded loss to the next. On by default.
            Turn it off if losses are recorded after training, or if a search must depend on its
            seeds alone so that it can be repeated exactly.

    Raises:
        TypeError:
            If ``trial`` is not a trial, or ``measure_speed`` not a boolean.
    """

    def __init__(self, trial: optuna.trial.Trial, *, measure_speed: bool = True) -> None:
        if not isinstance(trial, BaseTrial):
            raise TypeError(f"trial must be the trial of the objective but got {trial!r}.")
        check_kind("measure_speed", measure_speed, bool)
        self._trial = trial
        self._measure_speed = measure_speed
        self._losses: list[float] = []
        self._steps: list[int] = []
        self._times: list[float] = []
        self._next_write = RULES.first_write
        self._n_written = 0
        self._unusable: UnusableCurve | None = None
        self._written: dict[str, Any] | None = None
        # The curve of an earlier log of the trial, which this log continues.
        self._earlier: CurveRecord | None = None
        self._warned_kinds: set[CurveFault] = set()
        study = getattr(trial, "study", None)
        # A fixed trial has no study.
        if study is not None:
            state = state_of(study)
            with state.lock:
                state.part(_OpenLogs).add(self)

    def is_of(self, trial: FrozenTrial) -> bool:
        """Return True if this log belongs to a trial of the same study, by its number."""
        return self._trial.number == trial.number

    @property
    def is_behind(self) -> bool:
        """True if recorded losses are not written yet, and the curve is usable."""
        return self._unusable is None and len(self._losses) > self._n_written

    @property
    def is_much_behind(self) -> bool:
        """True if at least 1.5 times as many losses are recorded as written, and at least 9."""
        enough = RULES.more * max(self._n_written, RULES.few)
        return self.is_behind and len(self._losses) >= enough

    def __enter__(self) -> TrainingLog:
        return self

    def __del__(self) -> None:
        # A log that was not closed is deleted when its objective returns.
        if getattr(self, "_losses", None) and self.is_behind:
            with contextlib.suppress(Exception):
                self.write()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Predictions also learn from a pruned or failed trial's curve, however short it is.
        if kind is None:
            self.close()
        else:
            self.write()

    def step(self, loss: SupportsFloat, step: int | None = None) -> None:
        """Record the mini-batch loss of one optimiser step, as a mean over the batch.

        A negative loss, or a step that is not larger than the last one, makes the whole curve
        unusable and warns once.

        Args:
            loss:
                The loss before the step, a number or a tensor of one element.
            step:
                The number of optimiser steps done before this one. By default one more than at the
                last call, zero at the first.

        Raises:
            TypeError:
                If the loss is not a number, or the step not a whole number.
        """
        value = _number(loss)
        last = self._steps[-1] if self._steps else -1
        place = last + 1 if step is None else _place(step)
        if place is None:
            self._refuse(CurveFault.STEPS, f"its steps are no numbers of optimiser steps: {step}")
        elif place <= last:
            self._refuse(CurveFault.STEPS, f"its steps do not ascend: {place} came after {last}")
        elif value < 0.0:
            self._refuse(CurveFault.NEGATIVE, f"its loss is negative: {value:g} at step {place}")
        else:
            self._losses.append(value)
            self._steps.append(place)
            self._times.append(time.perf_counter())
            # The written part of a curve survives a killed process.
            if len(self._losses) == self._next_write:
                self._next_write *= 2
                self.write()

    def close(self) -> None:
        """Write the whole curve to the trial. Leaving the ``with`` block does this.

        Warns:
            UnusableCurveWarning:
                If fewer than two losses were recorded.
        """
        if self._unusable is None and len(self._losses) < 2:
            few = (CurveFault.EMPTY, "it is empty")
            if self._losses:
                few = (CurveFault.SHORT, "it has a single loss")
            self._refuse(*few)
        self.write()

    def write(self) -> dict[str, Any] | None:
        """Write the curve recorded so far to the trial.

        Returns:
            The written attribute, or None if no loss was recorded, another log has written a
            curve, or the trial has finished.
        """
        if self._unusable is None and not self._losses:
            return None
        stored = curve_attribute(self._trial)
        if stored != self._written and not self._continues(stored_curve(stored)):
            return None
        self._written = {"trial": self._trial.number, **self._record().to_json()}
        try:
            self._trial.set_user_attr(CURVE, self._written)
            self._n_written = len(self._losses)
        except UpdateFinishedTrialError:
            self._warn(unwritten(stored_curve(stored)))
            return None
        return self._written

    def _record(self) -> CurveRecord | UnusableCurve:
        """Return the curve to store, joined with that of an earlier log, or why it is unusable."""
        if self._unusable is not None:
            return self._unusable
        record = CurveRecord.of(self._losses, self._steps, self._seconds_per_step())
        return record if self._earlier is None else self._earlier.followed_by(record)

    def _continues(self, stored: StoredCurve | None) -> bool:
        """Return True if this log may write in place of another log's ``stored`` curve.

        It may if that has fewer than two losses, or if its own steps follow; else warn once.
        """
        # Another log of the trial may have recorded too little.
        is_empty = isinstance(stored, UnusableCurve) and stored.kind in (
            CurveFault.EMPTY,
            CurveFault.SHORT,
        )
        if is_empty or not isinstance(stored, CurveRecord | UnusableCurve):
            return True
        first = ""
        if isinstance(stored, CurveRecord):
            if self._steps and self._steps[0] >= stored.curve.n_steps:
                self._earlier = stored
                return True
            first = f" after {stored.curve.n_steps:,} steps"
        begin = f" at step {self._steps[0]:,}" if self._steps else ""
        reason = f"it begins{begin}{first} of the first one, whose curve is kept"
        what = "The curve of a second TrainingLog of trial {} is left out"
        self._warn(UnusableCurve(CurveFault.SECOND, reason, what))
        return False

    def _refuse(self, kind: CurveFault, reason: str) -> None:
        """Mark this log's curve as unusable, and warn at the first fault."""
        if self._unusable is None:
            self._unusable = UnusableCurve(kind, reason)
            self._warn(self._unusable)

    def _warn(self, what: UnusableCurve) -> None:
        """Warn that a curve is left out, once per kind for this log."""
        if what.kind not in self._warned_kinds:
            self._warned_kinds.add(what.kind)
            study = getattr(self._trial, "study", None)
            warn_of_curve(study, self._trial.number, what)

    def _seconds_per_step(self) -> float:
        """Return the median of the seconds per step (pauses do not change it); NaN if unknown."""
        if not self._measure_speed or len(self._times) < 3:
            return math.nan
        return float(np.median(np.diff(self._times) / np.diff(self._steps)))


class _OpenLogs(weakref.WeakSet[TrainingLog]):
    """The logs of a study's trials that are alive in this process."""


def _logs_of(study: optuna.Study, trial: FrozenTrial) -> list[TrainingLog]:
    """Return the logs of a trial that are alive in this process."""
    state = state_of(study)
    with state.lock:
        return [log for log in state.part(_OpenLogs) if log.is_of(trial)]


def as_logged(study: optuna.Study, trial: FrozenTrial) -> FrozenTrial:
    """Return a running trial with the curve of its log in this process.

    It is the trial itself, or a copy with a newer curve. If the log has grown by half since it
    was written to the storage, it is written again first.
    """
    for log in _logs_of(study, trial):
        if log.is_much_behind:
            written = log.write()
            if written is not None:
                trial = copy.copy(trial)
                trial.user_attrs = {**trial.user_attrs, CURVE: written}
    return trial


def unwritten(stored: StoredCurve | None) -> UnusableCurve:
    """Return the fault that a curve, or its part after ``stored``, was not written in time."""
    n_steps = stored.curve.n_steps if isinstance(stored, CurveRecord) else 0
    if not n_steps:
        return UnusableCurve(CurveFault.FINISHED, "the trial ended before it was written")
    reason = f"the trial ended before it was written, behind step {n_steps:,}"
    what = "The end of the training-loss curve of trial {} is left out"
    return UnusableCurve(CurveFault.FINISHED, reason, what)


def unclosed(study: optuna.Study, trial: FrozenTrial) -> UnusableCurve | None:
    """Return the fault of a finished trial with a log in this process that has unwritten losses.

    It is None if no loss is missing.
    """
    for log in _logs_of(study, trial):
        if log.is_behind:
            return unwritten(stored_curve(curve_attribute(trial)))
    return None


def _number(loss: Any) -> float:
    """Return a number or a tensor of one number as a float; raise TypeError for other losses."""
    item = getattr(loss, "item", None)
    try:
        if isinstance(loss, bool | str | bytes):
            raise TypeError
        return float(loss if item is None else item())
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        shape = getattr(loss, "shape", None)
        got = repr(loss) if shape is None else f"a {type(loss).__name__} of shape {tuple(shape)}"
        raise TypeError(
            f"loss must be a number, or a tensor of one element, but got {got}. Log the mean "
            "over the mini-batch."
        ) from error


def _place(step: Any) -> int | None:
    """Return a number of steps as an int; None if it is a fraction, negative or above 1e12.

    Raise TypeError if it is not a number.
    """
    plain = step.item() if getattr(step, "shape", None) == () else step
    if isinstance(plain, float):
        if not plain.is_integer():
            return None
        plain = int(plain)
    if isinstance(plain, bool) or not isinstance(plain, int | np.integer):
        raise TypeError(f"step must be a whole number of optimiser steps but got {step!r}.")
    return int(plain) if 0 <= plain < RULES.most_steps else None
