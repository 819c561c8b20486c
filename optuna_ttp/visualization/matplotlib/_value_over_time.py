"""The plot of the best value against the seconds spent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from optuna_ttp._util.checks import check_kind
from optuna_ttp.study import best_over_time
from optuna_ttp.study import is_multi_objective
from optuna_ttp.visualization.matplotlib._axes import label_plainly
from optuna_ttp.visualization.matplotlib._axes import resolve_axes


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    import optuna


def plot_value_over_time(
    studies: Mapping[str, optuna.Study],
    *,
    head_start: Mapping[str, float] | None = None,
    end: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the best value so far against the seconds spent, one line for each study.

    A study in which no trial was completed has no line. If ``ax`` has a logarithmic axis of
    values, it is labelled with plain numbers.

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
        TypeError:
            If ``studies`` is not a mapping of studies.
        ValueError:
            If a study has several objectives.
        ImportError:
            If Matplotlib is not installed.
    """
    check_kind("studies", studies, Mapping)
    ax = resolve_axes(ax, *studies.values())
    for name, study in studies.items():
        if is_multi_objective(study):
            raise ValueError(
                f"studies must have one objective but {name!r} has {len(study.directions)}. "
                "optuna.visualization.plot_optimization_history(study, target=...) draws one."
            )
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
    if ax.get_yscale() == "log":
        label_plainly(ax.yaxis)
    return ax
