"""The best value of a study against the seconds spent."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from optuna.study import StudyDirection
from optuna.trial import TrialState

from optuna_ttp.study._optuna_compat import trials_of


if TYPE_CHECKING:
    import optuna


def best_over_time(
    study: optuna.Study, *, head_start: float = 0.0
) -> tuple[list[float], list[float]]:
    """Return the times at which the best value of a study improved, and the best values.

    ``study`` has one objective, and ``head_start`` is the number of seconds that were spent before
    its first trial. The times are in seconds since the start of the first trial, plus
    ``head_start``. Both lists have one entry for each completed trial that was better than all
    before it.
    """
    sign = 1.0 if study.direction == StudyDirection.MINIMIZE else -1.0
    ended = [
        (trial.datetime_complete, trial)
        for trial in trials_of(study)
        if trial.datetime_complete is not None and trial.datetime_start is not None
    ]
    if not ended:
        return [], []
    begin = min(trial.datetime_start for _, trial in ended if trial.datetime_start is not None)
    seconds, values, best = [], [], math.inf
    for end, trial in sorted(ended, key=lambda pair: pair[0]):
        if trial.state == TrialState.COMPLETE and sign * trial.values[0] < best:
            best = sign * trial.values[0]
            seconds.append(head_start + (end - begin).total_seconds())
            values.append(trial.values[0])
    return seconds, values
