"""Our searches on parts of the recorded grids: more tasks than ten to choose rules by.

A part has 70 % of the learning rates and all but one of the batch sizes and momenta, where there
are more than two. With the whole grids there are forty, whose searches are counted in average
trials, the setup aside. Adds a line a search to ``results/parts.csv`` under a label, replacing
those of the same one, and writes the means of all labels to ``results/parts.md``.

Also counts the recorded runs whose loss rises back to where it began, as our pruner sees them
epoch by epoch, and what becomes of them: ``results/risen_runs.json``.

Run with ``python -m benchmarks.search.parts LABEL`` (ten minutes).
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any
import warnings

import numpy as np
from numpy.typing import NDArray
import optuna
import torch

from benchmarks.environment import environment
from benchmarks.search import contestants
from benchmarks.search.compare import complete_tasks
from benchmarks.search.compare import predictor_of
from benchmarks.search.compare import RESULTS
from benchmarks.search.replay import replay
from benchmarks.search.table import Goal
from benchmarks.search.table import recorded
from benchmarks.search.table import Table
from optuna_ttp import OptunaTTPWarning
from optuna_ttp.calibration import LossCurve
from optuna_ttp.study import has_lost_progress
from optuna_ttp.study import LostProgressRules


_SHARE = 0.7
_BUDGET_TRIALS = 100
_GOALS: tuple[Goal, ...] = ("metric", "time")
# No trial is stopped before.
_EARLIEST = 0.2


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("label")
    parser.add_argument("--tasks", nargs="+", help="all that are recorded by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parts", type=int, default=4, help="the first one is the whole grid")
    parser.add_argument("--recordings", type=Path, default=RESULTS, help="has other spectra")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", OptunaTTPWarning)
    names = options.tasks or complete_tasks(options.recordings)
    rows = []
    for goal in _GOALS:
        for name in names:
            whole = recorded(name, options.recordings / "recordings", goal)
            for k in range(options.parts):
                part = part_of(whole, k)
                if np.isfinite([t.value for t in part.trajectories.values()]).any():
                    rows += searches(part, options.recordings, k, options.seeds)
            print(f"{name}, {goal}", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    _keep(options.output, options.label, rows)
    figures = risen_runs(names, options.recordings)
    text = json.dumps({**figures, "environment": environment()}, indent=2)
    (options.output / "risen_runs.json").write_text(text + "\n")


def part_of(whole: Table, k: int) -> Table:
    """Return a part of a grid, always the same one.

    Args:
        whole:
            The grid.
        k:
            Number of the part; zero is the whole grid.

    Returns:
        The part.
    """
    if k == 0:
        return whole
    rng = np.random.default_rng([k, sum(map(ord, whole.name))])
    counts = {name: max(2, len(v) - 1) if len(v) > 1 else 1 for name, v in whole.values.items()}
    counts["learning_rate"] = round(_SHARE * len(whole.values["learning_rate"]))
    remaining = {
        name: sorted(rng.choice(len(v), counts[name], replace=False).tolist())
        for name, v in whole.values.items()
    }
    trajectories = {
        tuple(
            remaining[name].index(place) for name, place in zip(remaining, places, strict=True)
        ): run
        for places, run in whole.trajectories.items()
        if all(place in remaining[name] for name, place in zip(remaining, places, strict=True))
    }
    values = {name: tuple(v[i] for i in remaining[name]) for name, v in whole.values.items()}
    return Table(whole.name, whole.goal, values, trajectories, whole.direction, whole.n_epochs)


def searches(part: Table, recordings: Path, k: int, n_seeds: int) -> list[dict[str, Any]]:
    """Search a part.

    Args:
        part:
            The part.
        recordings:
            The folder of recordings and spectra.
        k:
            Its number.
        n_seeds:
            How often.

    Returns:
        A line a search.
    """
    predictor, _ = predictor_of(part.name, recordings)
    budget = _BUDGET_TRIALS * part.mean_seconds
    rows = []
    for seed in range(n_seeds):
        ours = contestants.players(contestants.OURS[0], part, seed, lambda: predictor)
        search = replay(part, ours.sampler, ours.pruner, budget_seconds=budget, logged=True)
        trials = min(search.seconds_to_close, budget) / part.mean_seconds
        winners, pruned = search.winners()
        rows.append(
            {
                "goal": part.goal,
                "task": part.name,
                "part": k,
                "seed": seed,
                "average_trials": float(f"{trials:.4g}"),
                "winners": winners,
                "wrongly_pruned": pruned,
            }
        )
    return rows


def risen_runs(names: list[str], recordings: Path) -> dict[str, Any]:
    """Count the recorded runs whose loss rises back to its start, and what becomes of them.

    Args:
        names:
            Of the tasks.
        recordings:
            The folder of recordings and spectra.

    Returns:
        How many of all, at which share of their epochs, and how many of these reach the target of
        the predictor later, or are close to the grid's best.
    """
    shares, n_runs, n_reached, n_close = [], 0, 0, 0
    for name in names:
        table = recorded(name, recordings / "recordings", "metric")
        predictor, _ = predictor_of(name, recordings)
        for places, run in table.trajectories.items():
            n_runs += 1
            rate, batch_size, momentum = (
                v[i] for v, i in zip(table.values.values(), places, strict=True)
            )
            predicted = predictor.estimate(
                rate, min(int(batch_size), predictor.n_samples), momentum
            )
            epochs = len(run.seconds)
            for k in range(max(1, int(np.ceil(_EARLIEST * epochs))), epochs):
                losses: NDArray[np.float64] = np.concatenate(run.batch_losses[:k])
                if not np.isfinite(losses).all():
                    break
                times = (
                    predicted.log_first_passage_times,
                    predicted.expected_log_first_passage_times,
                )
                curve, initial = LossCurve.of(losses), run.training_losses[0]
                if has_lost_progress(curve, *times, initial, LostProgressRules()):
                    shares.append(k / epochs)
                    n_reached += bool(np.nanmin(run.training_losses[k:]) <= predictor.target.value)
                    n_close += table.is_close(run.value)
                    break
    return {
        "runs": n_runs,
        "lost_progress": len(shares),
        "share_of_epochs": round(float(np.mean(shares)), 3) if shares else None,
        "reached_the_target": n_reached,
        "close_to_the_best": n_close,
    }


def _keep(output: Path, label: str, rows: list[dict[str, Any]]) -> None:
    path = output / "parts.csv"
    remaining: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            remaining = [row for row in csv.DictReader(file) if row["label"] != label]
    remaining += [{"label": label, **row} for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, remaining[0].keys())
        writer.writeheader()
        writer.writerows(remaining)
    lines = ["| | metric | time | winners pruned |", "| --- | --- | --- | --- |"]
    for name in dict.fromkeys(row["label"] for row in remaining):
        of_label = [row for row in remaining if row["label"] == name]
        means = [_mean([row for row in of_label if row["goal"] == goal]) for goal in _GOALS]
        pruned = sum(int(row["wrongly_pruned"]) for row in of_label)
        of = sum(int(row["winners"]) for row in of_label)
        lines.append(f"| {name} | {means[0]:.2f} | {means[1]:.2f} | {pruned} of {of} |")
    (output / "parts.md").write_text("\n".join([*lines, ""]))


def _mean(rows: list[dict[str, Any]]) -> float:
    """Geometric mean over tasks and parts of average trials, those over seeds first."""
    logs: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        key = row["task"], str(row["part"])
        logs.setdefault(key, []).append(float(np.log(float(row["average_trials"]))))
    return float(np.exp(np.mean([np.mean(v) for v in logs.values()]))) if logs else float("nan")


if __name__ == "__main__":
    main()
