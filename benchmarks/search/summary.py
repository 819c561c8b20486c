"""Tables, pictures and ``summary.json`` from the searches of :mod:`benchmarks.search.compare`.

Run with ``python -m benchmarks.search.summary FOLDER``.

Searches that did not come close to the grid's best count as if they had at the end of their
budget. That flatters whoever fails; how many failed stands beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from collections.abc import Iterable
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.search.contestants import OURS
from benchmarks.search.contestants import SHUFFLED
from benchmarks.search.contestants import STANDARD
from benchmarks.search.searches import by_goal
from benchmarks.search.searches import read
from benchmarks.search.searches import Searches
from benchmarks.search.summary_pictures import draw
from benchmarks.search.summary_pictures import ordered


_N_RESAMPLED = 2000
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


def main() -> None:
    """Summarise the searches in a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    summarise(parser.parse_args().folder)


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
            *(line for group in by_goal(rows) for line in (*_table(*group), "")),
        ]
    )
    (folder / "summary.md").write_text(text)
    print(text)
    with np.load(folder / "regrets.npz") as archive:
        times = archive["times"]
    draw(rows, times, np.array(regrets), folder)


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the figures that were promised, with bootstrap intervals over tasks and seeds.

    Args:
        rows:
            Of ``searches.csv``.

    Returns:
        By the figure's name: ``"value"``, ``"low"`` and ``"high"`` (95 %), and values by task. For
        our seconds also ``"without_setup"``, the value excluding the cost of the spectrum and of
        the surface, and ``"best_choice"``, the value if only the setup and the oracle's trial were
        paid for: no sampler can do better with this setup.
    """
    groups = {(goal, workers): searches for goal, workers, searches in by_goal(rows)}
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


def _headline(figures: dict[str, Any], about: dict[str, Any]) -> list[str]:
    where = about["environment"]
    lines = [
        "| | aimed at | measured (95 % interval) | excluding the spectrum's cost | "
        "the best first trial |",
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
    for name in ordered(searches.contestants):
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


if __name__ == "__main__":
    main()
