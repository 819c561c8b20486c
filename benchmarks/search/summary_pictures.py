"""Regret, rank and critical differences of searches, drawn."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.search.contestants import COST
from benchmarks.search.contestants import KNOWN
from benchmarks.search.contestants import OURS
from benchmarks.search.contestants import RULE
from benchmarks.search.contestants import SHUFFLED
from benchmarks.search.contestants import STANDARD
from benchmarks.search.searches import by_goal
from benchmarks.search.searches import Searches


_SHOWN = (
    "random + none",
    "tpe + none",
    "tpe + median",
    "tpe + hyperband",
    "gp + none",
    COST,
    *OURS,
    SHUFFLED[0],
)


def ordered(names: Iterable[str]) -> list[str]:
    """Return the names of contestants in the order of the tables, ours first."""
    known = [*OURS, *SHUFFLED, RULE, KNOWN, COST, *STANDARD]
    return sorted(names, key=known.index)


def draw(
    rows: list[dict[str, Any]],
    times: NDArray[np.float64],
    regrets: NDArray[np.float64],
    folder: Path,
) -> None:
    """Regret and rank against seconds, and the critical-difference diagrams."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for goal, workers, searches in by_goal(rows):
        shown = [name for name in _SHOWN if name in searches.contestants]
        chosen = np.array([(r["goal"], r["workers"]) == (goal, workers) for r in rows])
        curves = _mean_curves(searches.rows, regrets[chosen], shown, searches.tasks)
        figure = Figure(figsize=(12, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        ranks = _ranks(curves)
        for k, name in enumerate(shown):
            width = 2.5 if name in OURS else 1.2
            left.plot(times, curves[k].mean(axis=0), label=name, linewidth=width)
            right.plot(times, ranks[k], label=name, linewidth=width)
        for axes, label in ((left, "normalised regret"), (right, "average rank")):
            axes.set_xscale("log")
            axes.set_xlabel("seconds over those of an average configuration")
            axes.set_ylabel(label)
        left.legend(fontsize="small", loc="upper right")
        figure.suptitle(f"goal: {goal}, {workers} worker{'s' * (workers > 1)}")
        figure.savefig(folder / f"{goal}-{workers}.png", dpi=110)
        _draw_critical_difference(searches, folder / f"{goal}-{workers}-ranks.png")


def _mean_curves(
    rows: Sequence[dict[str, Any]],
    regrets: NDArray[np.float64],
    names: Sequence[str],
    tasks: Sequence[str],
) -> NDArray[np.float64]:
    """Regrets averaged over the seeds: contestants, tasks, times."""
    return np.array(
        [
            [
                regrets[
                    [k for k, r in enumerate(rows) if (r["contestant"], r["task"]) == (name, task)]
                ].mean(axis=0)
                for task in tasks
            ]
            for name in names
        ]
    )


def _ranks(curves: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks among the contestants, averaged over the tasks."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(curves, axis=0).mean(axis=1))


def _draw_critical_difference(searches: Searches, path: Path) -> None:
    """Average ranks over the tasks, joined where Nemenyi's test tells no difference.

    Demsar, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 7, 2006.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    import pandas
    import scikit_posthocs
    from scipy.stats import rankdata

    names = [name for name in ordered(searches.contestants) if name not in (KNOWN, RULE)]
    if len(names) < 3 or len(searches.tasks) < 2:
        return
    medians = np.array(
        [[np.median(searches.seconds(name, task)) for name in names] for task in searches.tasks]
    )
    ranks = pandas.Series(rankdata(medians, axis=1).mean(axis=0), index=names)
    data = pandas.DataFrame(medians, columns=names)
    p_values = scikit_posthocs.posthoc_nemenyi_friedman(data)
    figure = Figure(figsize=(11, 0.3 * len(names) + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    scikit_posthocs.critical_difference_diagram(ranks, p_values, ax=axes)
    axes.set_title("average rank of the median seconds over the tasks")
    figure.savefig(path, dpi=110)
