"""Which configurations ran and which were skipped."""

from __future__ import annotations

from typing import Any
from typing import TYPE_CHECKING

from optuna_ttp.study import DECISION
from optuna_ttp.study import entry
from optuna_ttp.study import PREDICTION
from optuna_ttp.study import RUN
from optuna_ttp.study import SKIP
from optuna_ttp.study import trials_of
from optuna_ttp.visualization.matplotlib._axes import resolve_axes


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    import optuna


_GROUPS = (
    ("ran", "o", "tab:blue"),
    ("skipped: diverges", "^", "tab:red"),
    ("skipped: too slow", "v", "tab:orange"),
)


def plot_decisions(study: optuna.Study, *, ax: Axes | None = None) -> Axes:
    """Plot trials by effective learning rate and batch size, marked by what was decided.

    The effective learning rate is ``learning_rate / (1 - momentum)``.

    Args:
        study:
            A study with a :class:`~optuna_ttp.TTPPruner`.
        ax:
            Axes to draw into. A new figure by default.

    Returns:
        The axes.
    """
    ax = resolve_axes(ax)
    points: dict[str, list[tuple[float, float]]] = {label: [] for label, _, _ in _GROUPS}
    for trial in trials_of(study):
        prediction, decision = entry(trial, PREDICTION), entry(trial, DECISION)
        if prediction is not None and decision is not None:
            effective = prediction["learning_rate"] / (1 - prediction["momentum"])
            points[_group(prediction, decision)].append((effective, prediction["batch_size"]))
    for label, marker, color in _GROUPS:
        if points[label]:
            x, y = zip(*points[label], strict=True)
            ax.plot(
                x, y, marker, color=color, alpha=0.6, linestyle="", label=f"{label} ({len(x)})"
            )
    ax.set_xscale("log")
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("Effective learning rate")
    ax.set_ylabel("Batch size")
    ax.set_title("What ran and what was skipped")
    if any(points.values()):
        # Above the highest points, not on them.
        low, high = ax.get_ylim()
        ax.set_ylim(low, high * (high / low) ** 0.35)
        ax.legend(loc="upper left")
    return ax


def _group(prediction: dict[str, Any], decision: dict[str, Any]) -> str:
    if decision["decision"] == RUN:
        return "ran"
    assert decision["decision"] == SKIP
    return "skipped: diverges" if prediction["outcome"] == "diverges" else "skipped: too slow"
