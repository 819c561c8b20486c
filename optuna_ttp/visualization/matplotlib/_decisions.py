"""The plot of the configurations that ran, were skipped or were stopped."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from optuna_ttp.prediction import Outcome
from optuna_ttp.study import Action
from optuna_ttp.study import decision_of
from optuna_ttp.study import DecisionRecord
from optuna_ttp.study import Objection
from optuna_ttp.study import prediction_of
from optuna_ttp.study import PredictionRecord
from optuna_ttp.study import trials_of
from optuna_ttp.visualization.matplotlib._axes import resolve_axes


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    import optuna


# Label, marker and colour of each group, in the order of the legend.
_GROUPS = (
    ("ran", "o", "tab:blue"),
    ("ran despite its prediction", "D", "tab:green"),
    ("stopped while it ran", "s", "tab:purple"),
    ("skipped: diverges", "^", "tab:red"),
    ("skipped: too slow", "v", "tab:orange"),
    ("no decision", "x", "0.5"),
)
# More batch sizes than this are not labelled one by one.
_MOST_LABELS = 8


def plot_decisions(study: optuna.Study, *, ax: Axes | None = None) -> Axes:
    """Plot finished trials by effective learning rate and batch size, marked by the decision.

    The effective learning rate is ``learning_rate / (1 - momentum)``. A trial is marked "no
    decision" if it has a prediction but no :class:`~optuna_ttp.TTPPruner` was asked about it.
    A finished trial without a prediction is left out, because it is not known which of its
    parameters are its learning rate, batch size and momentum.

    Example:
        >>> from optuna_ttp.visualization.matplotlib import plot_decisions
        >>> plot_decisions(study).figure.savefig("decisions.png")

    Args:
        study:
            A study with a :class:`~optuna_ttp.TTPPruner`.
        ax:
            Axes to draw into. A new figure by default.

    Returns:
        The axes.

    Raises:
        TypeError:
            If ``study`` is not a study of Optuna.
        ImportError:
            If Matplotlib is not installed.
    """
    ax = resolve_axes(ax, study)
    points = _points_by_group(study)
    for label, marker, color in _GROUPS:
        if points[label]:
            x, y = zip(*points[label], strict=True)
            ax.plot(
                x, y, marker, color=color, alpha=0.6, linestyle="", label=f"{label} ({len(x)})"
            )
    ax.set_xscale("log")
    ax.set_yscale("log", base=2)
    _label_batch_sizes(ax, {y for group in points.values() for _, y in group})
    ax.set_xlabel("Effective learning rate")
    ax.set_ylabel("Batch size")
    ax.set_title("What ran and what was skipped")
    if any(points.values()):
        # The legend is above the highest points, not on them.
        low, high = ax.get_ylim()
        ax.set_ylim(low, high * (high / low) ** (0.1 + 0.08 * sum(map(bool, points.values()))))
        ax.legend(loc="upper left")
    return ax


def _label_batch_sizes(ax: Axes, batch_sizes: set[float]) -> None:
    """Label the vertical axis with the batch sizes themselves if there are at most eight."""
    if 0 < len(batch_sizes) <= _MOST_LABELS:
        ax.set_yticks(sorted(batch_sizes))
    ax.yaxis.set_major_formatter("{x:g}")


def _points_by_group(study: optuna.Study) -> defaultdict[str, list[tuple[float, float]]]:
    """Return pairs of effective learning rate and batch size of finished trials, by label."""
    points: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for trial in trials_of(study):
        prediction = prediction_of(trial)
        if prediction is not None:
            effective = prediction.learning_rate / (1 - prediction.momentum)
            label = _label(prediction, decision_of(trial))
            points[label].append((effective, prediction.batch_size))
    return points


def _label(prediction: PredictionRecord, decision: DecisionRecord | None) -> str:
    """Return the label of the group that a trial with a prediction belongs to."""
    if decision is None:
        return "no decision"
    if decision.action == Action.STOP:
        return "stopped while it ran"
    if decision.action == Action.SKIP:
        diverges = prediction.outcome == Outcome.DIVERGES
        diverges = diverges or decision.objection == Objection.DIVERGES
        return "skipped: diverges" if diverges else "skipped: too slow"
    return "ran" if decision.override is None else "ran despite its prediction"
