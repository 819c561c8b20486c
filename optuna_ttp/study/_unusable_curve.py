"""Why a training-loss curve cannot be learned from, and saying so once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optuna.logging import get_logger

from optuna_ttp._util.exceptions import UnusableCurveWarning
from optuna_ttp._util.warn import warn_caller
from optuna_ttp.study._study_state import state_of


if TYPE_CHECKING:
    import optuna


_logger = get_logger("optuna.ttp.training_log")
# What to do, by the kind of the reason; what is not in here is no mean loss of mini-batches.
_ADVICE: Mapping[str, str] = {
    "empty": "Record a loss at every optimiser step, with TrainingLog.step or Trial.report.",
    "finished": "Close the log, or leave its with block, before the trial ends.",
    "gaps": "",
    "infinite": "",
    "jump": "Count the optimiser steps of this trial, from 0 on.",
    "late": "Count the optimiser steps of this trial, from 0 on.",
    "names": "Say what its parameters are called now with HyperparameterMap, where that matters.",
    "samples": "Count optimiser steps, not samples.",
    "short": "One tells nothing; record more of them, where that matters.",
    "second": "Use one TrainingLog a trial.",
    "steps": "Count the optimiser steps of this trial, from 0 on.",
}
_MEANS = "Log the mean loss of each mini-batch."


class _WarnedKinds(set[str]):
    """The kinds of reasons that a study has warned of."""


@dataclass(frozen=True)
class UnusableCurve:
    """Why a curve, or part of it, cannot be learned from.

    Attributes:
        kind:
            As a word. Of each kind a study warns once.
        reason:
            In words.
        what:
            What is left out, with a place for the number of the trial. The training-loss curve by
            default.
    """

    kind: str
    reason: str
    what: str = "The training-loss curve of trial {} is left out"

    def tell(self, study: optuna.Study | None, number: int) -> None:
        """Warn about the first of its kind in a study. Others are logged for debugging.

        Args:
            study:
                The study; :obj:`None` for a trial outside of one.
            number:
                Of the trial.

        Warns:
            UnusableCurveWarning:
                If it is the first.
        """
        text = f"{self.what.format(number)}: {self.reason}."
        if study is not None:
            state = state_of(study)
            with state.lock:
                warned = state.part(_WarnedKinds)
                if self.kind in warned:
                    _logger.debug(text)
                    return
                warned.add(self.kind)
        advice = _ADVICE.get(self.kind, _MEANS)
        warn_caller(
            f"{text} {advice} ".rstrip() + " Others like it are left out without a warning.",
            UnusableCurveWarning,
        )
