"""Tables, pictures and ``summary.json`` from the searches of :mod:`benchmarks.search.compare`.

Run with ``python -m benchmarks.search.summary FOLDER``.

Searches that did not come close to the grid's best count as if they had at the end of their
budget. That flatters whoever fails; how many failed stands beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import csv
from dataclasses import dataclass
import json
import math
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


_N_RESAMPLED = 2000
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
_NUMBERS = {
    "workers": int,
    "seed": int,
    "trials": int,
    "pruned": int,
    "pruned_before_training": int,
    "winners": int,
    "wrongly_pruned": int,
}
_NAMES = ("task", "goal", "contestant")
_AVOIDABLE = "avoidable_seconds_vs_best_standard_{}"
_AIMS = {
    "avoidable_seconds_vs_best_standard_1_worker": ("avoidable seconds, 1 worker", "≤ 0.2"),
    "avoidable_seconds_vs_best_standard_4_workers": ("avoidable seconds, 4 workers", "≤ 0.2"),
    "seconds_vs_oracle": ("seconds over the oracle's", "≤ 2"),
    "goal_time_vs_tpe": ("the fastest configuration: seconds over TPE's", "≤ 0.1"),
    "shuffled_vs_wrapped": ("shuffled predictor: seconds over TPE's", "≤ 1.15"),
    "wrongly_pruned_winners": ("winners pruned", "< 0.02"),
    "worst_task_vs_wrapped": ("worst task: seconds over TPE's", "≤ 1.1"),
}


@dataclass(frozen=True, eq=False)
class Searches:
    """The searches of one goal with one number of workers.

    Attributes:
        rows:
            Of ``searches.csv``.
    """

    rows: list[dict[str, Any]]

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, sorted."""
        return sorted({row["task"] for row in self.rows})

    @property
    def contestants(self) -> list[str]:
        """Names of the contestants, sorted."""
        return sorted({row["contestant"] for row in self.rows})

    def of(self, contestant: str, task: str | None = None) -> list[dict[str, Any]]:
        """Return the rows of a contestant.

        Args:
            contestant:
                Its name.
            task:
                On this task. On all by default.

        Returns:
            The rows.
        """
        return [
            row
            for row in self.rows
            if row["contestant"] == contestant and task in (None, row["task"])
        ]

    def seconds(self, contestant: str, task: str) -> NDArray[np.float64]:
        """Return the seconds to come close to the grid's best, at most the budget.

        Args:
            contestant:
                Its name.
            task:
                Name of the task.

        Returns:
            A value a seed.
        """
        return np.array(
            [min(r["seconds_to_close"], r["budget_seconds"]) for r in self.of(contestant, task)]
        )

    def oracle(self, task: str) -> float:
        """Return the seconds of the oracle.

        Args:
            task:
                Name of the task.

        Returns:
            The seconds.
        """
        return float(next(r["oracle_seconds"] for r in self.rows if r["task"] == task))

    def without_setup(self) -> Searches:
        """Return the searches as if nothing had been charged before their first trials."""
        return self._with(lambda r: r["seconds_to_close"] - r["setup_seconds"])

    def with_best_choice(self, contestant: str) -> Searches:
        """Return the searches as if a contestant's first trial had been the oracle's.

        Args:
            contestant:
                Its name.
        """
        return self._with(
            lambda r: (
                r["setup_seconds"] + r["oracle_seconds"]
                if r["contestant"] == contestant
                else r["seconds_to_close"]
            )
        )

    def _with(self, seconds: Callable[[dict[str, Any]], float]) -> Searches:
        return Searches([{**r, "seconds_to_close": seconds(r)} for r in self.rows])

    def best_pair(self, task: str) -> str:
        """Return the standard sampler and pruner that were fastest on a task, in hindsight.

        Args:
            task:
                Name of the task.

        Returns:
            The contestant's name.
        """
        present = set(self.contestants)
        pairs = [name for name in STANDARD if name in present]
        return min(pairs, key=lambda name: float(np.median(self.seconds(name, task))))


def main() -> None:
    """Summarise the searches in a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    summarise(parser.parse_args().folder)


def read(folder: Path) -> tuple[list[dict[str, Any]], list[NDArray[np.float64]]]:
    """Read searches.

    Args:
        folder:
            Of ``searches.csv`` and ``regrets.npz``.

    Returns:
        A row a search, numbers as numbers, and their regrets.
    """
    with (folder / "searches.csv").open(newline="") as file:
        rows = [
            {
                key: value if key in _NAMES else _NUMBERS.get(key, float)(value)
                for key, value in row.items()
            }
            for row in csv.DictReader(file)
        ]
    with np.load(folder / "regrets.npz") as archive:
        return rows, list(archive["regrets"].astype(np.float64))


def summarise(folder: Path) -> None:
    """Write tables, pictures and ``summary.json`` beside the searches.

    Args:
        folder:
            Holds ``searches.csv`` and ``regrets.npz``.
    """
    rows, regrets = read(folder)
    figures = summary(rows)
    about = json.loads((folder / "run.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**figures, **about}, indent=2) + "\n")
    text = "\n".join(
        [
            *_headline(figures, about),
            "",
            *(line for group in _groups(rows) for line in (*_table(*group), "")),
        ]
    )
    (folder / "summary.md").write_text(text)
    print(text)
    with np.load(folder / "regrets.npz") as archive:
        times = archive["times"]
    _draw(rows, times, np.array(regrets), folder)


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the figures that were promised, with bootstrap intervals over tasks and seeds.

    Args:
        rows:
            Of ``searches.csv``.

    Returns:
        By the figure's name: ``"value"``, ``"low"`` and ``"high"`` (95 %), and values by task. Of
        those of our seconds also ``"without_setup"``, the value if spectrum and surface were a
        gift, and ``"best_choice"``, if nothing else were paid for but the oracle's trial: no
        sampler can do better with this setup.
    """
    groups = {(goal, workers): searches for goal, workers, searches in _groups(rows)}
    ours, shuffled, plain = OURS[0], SHUFFLED[0], "tpe + none"
    wanted: list[tuple[str, tuple[str, int], str, Ratio, Callable[[Any], Any]]] = [
        (_AVOIDABLE.format("1_worker"), ("metric", 1), ours, _avoidable, np.median),
        (_AVOIDABLE.format("4_workers"), ("metric", 4), ours, _avoidable, np.median),
        ("seconds_vs_oracle", ("metric", 1), ours, _over_oracle, np.median),
        ("goal_time_vs_tpe", ("time", 1), ours, _over(plain), np.median),
        ("shuffled_vs_wrapped", ("metric", 1), shuffled, _over(plain), np.median),
        ("worst_task_vs_wrapped", ("metric", 1), ours, _over(plain), np.max),
    ]
    figures: dict[str, dict[str, Any]] = {}
    for key, group, contestant, ratio, combine in wanted:
        searches = groups.get(group)
        if searches is not None and {contestant, plain} <= set(searches.contestants):
            figures[key] = _figure(searches, contestant, ratio, combine)
            if contestant == ours:
                figures[key] |= {
                    "without_setup": _value(searches.without_setup(), ours, ratio, combine),
                    "best_choice": _value(searches.with_best_choice(ours), ours, ratio, combine),
                }
    mine = [row for row in rows if row["contestant"] == ours and row["goal"] == "metric"]
    if mine:
        figures["wrongly_pruned_winners"] = _pruned_share(mine)
    return figures


Ratio = Callable[[Searches, str, NDArray[np.float64], dict[str, NDArray[np.float64]]], Any]


def _avoidable(
    searches: Searches, task: str, mine: NDArray[np.float64], others: dict[str, Any]
) -> Any:
    """Seconds beyond the oracle's over those of the best standard pair."""
    oracle = searches.oracle(task)
    best = float(np.median(others[searches.best_pair(task)])) - oracle
    return (mine - oracle) / max(best, 1e-9)


def _over_oracle(
    searches: Searches, task: str, mine: NDArray[np.float64], others: dict[str, Any]
) -> Any:
    return mine / searches.oracle(task)


def _over(name: str) -> Ratio:
    def ratio(
        searches: Searches, task: str, mine: NDArray[np.float64], others: dict[str, Any]
    ) -> Any:
        """Of the medians, because seeds of different samplers have nothing in common."""
        return np.atleast_1d(np.median(mine) / np.median(others[name]))

    return ratio


def _value(
    searches: Searches, contestant: str, ratio: Ratio, combine: Callable[[Any], Any]
) -> float | None:
    """A ratio over all tasks and seeds."""
    names = [name for name in searches.contestants if name in (*STANDARD, contestant)]
    ratios = []
    for task in searches.tasks:
        seconds = {name: searches.seconds(name, task) for name in names}
        ratios.append(ratio(searches, task, seconds[contestant], seconds))
    return _rounded(float(combine(np.concatenate(ratios))))


def _figure(
    searches: Searches, contestant: str, ratio: Ratio, combine: Callable[[Any], Any]
) -> dict[str, Any]:
    """A ratio over all tasks and seeds, and its spread when both are drawn again."""
    rng = np.random.default_rng(0)
    tasks = searches.tasks
    names = [name for name in searches.contestants if name in (*STANDARD, contestant)]
    seconds = {task: {name: searches.seconds(name, task) for name in names} for task in tasks}

    def resampled(chosen: Iterable[str]) -> float:
        ratios = []
        for task in chosen:
            drawn = {
                name: rng.choice(values, len(values)) for name, values in seconds[task].items()
            }
            ratios.append(ratio(searches, task, drawn[contestant], drawn))
        return float(combine(np.concatenate(ratios)))

    draws = [resampled(rng.choice(tasks, len(tasks))) for _ in range(_N_RESAMPLED)]
    low, high = np.quantile(draws, [0.025, 0.975])
    by_task = {
        task: _rounded(
            float(np.median(ratio(searches, task, seconds[task][contestant], seconds[task])))
        )
        for task in tasks
    }
    return {
        "value": _value(searches, contestant, ratio, combine),
        "low": _rounded(float(low)),
        "high": _rounded(float(high)),
        "by_task": by_task,
    }


def _pruned_share(rows: list[dict[str, Any]]) -> dict[str, Any]:
    winners = np.array([row["winners"] for row in rows])
    pruned = np.array([row["wrongly_pruned"] for row in rows])
    draws = np.random.default_rng(0).integers(len(rows), size=(_N_RESAMPLED, len(rows)))
    shares = pruned[draws].sum(axis=1) / np.maximum(winners[draws].sum(axis=1), 1)
    low, high = np.quantile(shares, [0.025, 0.975])
    return {
        "value": _rounded(float(pruned.sum() / max(int(winners.sum()), 1))),
        "low": _rounded(float(low)),
        "high": _rounded(float(high)),
        "winners": int(winners.sum()),
        "pruned": int(pruned.sum()),
    }


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _groups(rows: list[dict[str, Any]]) -> list[tuple[str, int, Searches]]:
    keys = sorted({(row["goal"], row["workers"]) for row in rows})
    return [
        (
            goal,
            workers,
            Searches([r for r in rows if (r["goal"], r["workers"]) == (goal, workers)]),
        )
        for goal, workers in keys
    ]


def _headline(figures: dict[str, Any], about: dict[str, Any]) -> list[str]:
    where = about["environment"]
    lines = [
        "| | aimed at | measured (95 % interval) | the spectrum a gift | the best first trial |",
        "| --- | --- | --- | --- | --- |",
    ]
    for key, (label, aim) in _AIMS.items():
        if key in figures:
            f = figures[key]
            low, high = _short(f["low"]), _short(f["high"])
            cells = [label, aim, f"{_short(f['value'])} ({low}..{high})"]
            cells += [_short(f.get(name)) for name in ("without_setup", "best_choice")]
            lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        f"Measured {where['date']} on {where['cores']} cores of {where['processor']} with "
        f"`{where['command']}`.",
    ]


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _table(goal: str, workers: int, searches: Searches) -> list[str]:
    """Median seconds of every contestant on every task."""
    what = "within 1 % of the grid's best metric" if goal == "metric" else "the fastest + 10 %"
    tasks = searches.tasks
    lines = [
        f"Seconds to {what}, {workers} worker{'s' * (workers > 1)}: median over seeds, and how "
        "many of the seeds never got there",
        "",
        "| | " + " | ".join(tasks) + " | winners pruned | setup, s | overhead, s |",
        "| --- |" + " --- |" * (len(tasks) + 3),
        "| oracle | " + " | ".join(f"{searches.oracle(task):.3g}" for task in tasks) + " | | | |",
    ]
    compared = any(name in STANDARD for name in searches.contestants)
    best = {task: searches.best_pair(task) for task in tasks} if compared else {}
    for name in _ordered(searches.contestants):
        cells = []
        for task in tasks:
            rows = searches.of(name, task)
            never = sum(math.isinf(row["seconds_to_close"]) for row in rows)
            cell = f"{np.median(searches.seconds(name, task)):.3g}" + (f" ({never})" * (never > 0))
            cells.append(f"**{cell}**" if best.get(task) == name else cell)
        rows = searches.of(name)
        share = sum(r["wrongly_pruned"] for r in rows) / max(sum(r["winners"] for r in rows), 1)
        setup, overhead = (
            float(np.median([row[key] for row in rows]))
            for key in ("setup_seconds", "overhead_seconds")
        )
        lines.append(
            f"| {name} | {' | '.join(cells)} | {share:.0%} | {setup:.2g} | {overhead:.2g} |"
        )
    return lines


def _ordered(names: Iterable[str]) -> list[str]:
    known = [*OURS, *SHUFFLED, RULE, KNOWN, COST, *STANDARD]
    return sorted(names, key=known.index)


def _draw(
    rows: list[dict[str, Any]],
    times: NDArray[np.float64],
    regrets: NDArray[np.float64],
    folder: Path,
) -> None:
    """Regret and rank against seconds, and the critical-difference diagrams."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for goal, workers, searches in _groups(rows):
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

    names = [name for name in _ordered(searches.contestants) if name not in (KNOWN, RULE)]
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


if __name__ == "__main__":
    main()
