"""The plot of the best value against the seconds spent."""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import TYPE_CHECKING

from optuna.study import StudyDirection
from optuna.trial import TrialState

from optuna_ttp._util.checks import check_kind
from optuna_ttp.study import trials_of
from optuna_ttp.visualization.matplotlib._axes import resolve_axes


if TYPE_CHECKING:
    from matplotlib.axes import Axes
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


def plot_value_over_time(
    studies: Mapping[str, optuna.Study],
    *,
    head_start: Mapping[str, float] | None = None,
    end: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the best value so far against the seconds spent, one line for each study.

    A study in which no trial was completed has no line.

    Example:
        >>> from optuna_ttp.visualization.matplotlib import plot_value_over_time
        >>> ax = plot_value_over_time(
        ...     {"TPE": plain, "TPE, wrapped": study}, head_start={"TPE, wrapped": 12.0}
        ... )

    Args:
        studies:
            Studies with one objective, by the name that the legend shows.
        head_start:
            Seconds that were spent before the first trial, such as those that the spectrum took,
            by the name of the study. Zero for each by default.
        end:
            The lines are drawn up to this number of seconds. By default they end at the last
            improvement in any of the studies.
        ax:
            Axes to draw into. A new figure by default.

    Returns:
        The axes.

    Raises:
        ImportError:
            If Matplotlib is not installed.
    """
    check_kind("studies", studies, Mapping)
    ax = resolve_axes(ax, *studies.values())
    curves = {
        name: best_over_time(study, head_start=(head_start or {}).get(name, 0.0))
        for name, study in studies.items()
    }
    last = max((seconds[-1] for seconds, _ in curves.values() if seconds), default=1.0)
    for name, (seconds, values) in curves.items():
        if seconds:
            ax.step(
                [*seconds, max(end or last, seconds[-1])],
                [*values, values[-1]],
                where="post",
                marker=".",
                markevery=slice(len(seconds)),
                label=name,
            )
    ax.set_xlabel("Seconds spent")
    ax.set_ylabel("Best objective value")
    ax.set_title("Best value against seconds")
    if any(seconds for seconds, _ in curves.values()):
        ax.legend()
    return ax
