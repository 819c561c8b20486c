"""The demo's search over several seeds: TPE and the median pruner, plain and wrapped.

Writes ``demo.csv`` (a line a seed and search), ``demo.json`` (medians and spread, machine, date,
command) and ``demo.md`` (the README's table). The figures are seconds of one run each on one
machine, so what counts is the ratio of the two searches within a seed.

Run with ``python -m benchmarks.search.demo``.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch

from benchmarks.environment import environment
from optuna_ttp import demo
from optuna_ttp.prediction import TrainingTimePredictor
from optuna_ttp.reporting import report
from optuna_ttp.study import Action
from optuna_ttp.study import observed_steps


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many (default: 5)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first one (default: 0)")
    parser.add_argument("--seconds", type=float, default=40.0, help="budget (default: 40)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        plain, wrapped, predictor = demo.compare(
            seconds=options.seconds, seed=seed, say=lambda line: print(f"  {line}", flush=True)
        )
        goal, _ = plain.best
        for name, search in (("plain", plain), ("wrapped", wrapped)):
            rows.append({"seed": seed, "search": name, **_figures(search, goal, predictor)})
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "demo.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    summary = _summary(rows, options.seconds)
    (options.output / "demo.json").write_text(json.dumps(summary, indent=2) + "\n")
    table = _table(summary)
    (options.output / "demo.md").write_text(table)
    print(table)


def _figures(
    search: demo.Search, goal: float, predictor: TrainingTimePredictor
) -> dict[str, float]:
    ledger = report(search.study)
    best, at = search.best
    ratios = []
    for record in ledger.records:
        observed = observed_steps(search.study.trials[record.number], predictor)
        if record.decision != Action.SKIP and math.isfinite(observed) and observed > 0:
            ratios.append(abs(math.log(record.predicted_steps / observed)))
    finite = [r for r in ratios if math.isfinite(r)]
    return {
        "best_seconds": best,
        "seconds_to_best": at,
        "seconds_to_plain_best": search.seconds_to(goal),
        "seconds": search.seconds,
        "head_start_seconds": search.head_start,
        "trials": len(ledger.records),
        "skipped": ledger.n_skipped,
        "reached_target": search.n_reached,
        "wasted_seconds": search.wasted_seconds,
        "prediction_error_factor": math.exp(float(np.median(finite))) if finite else math.nan,
        "prediction_error_factor_p90": (
            math.exp(float(np.quantile(finite, 0.9))) if finite else math.nan
        ),
        "prediction_seconds": ledger.prediction_seconds,
        "avoided_seconds_estimate": ledger.avoided_seconds,
    }


def _summary(rows: list[dict[str, Any]], budget: float) -> dict[str, Any]:
    summary: dict[str, Any] = {"budget_seconds": budget, "environment": environment()}
    for name in ("plain", "wrapped"):
        mine = [row for row in rows if row["search"] == name]
        summary[name] = {
            key: _spread([row[key] for row in mine])
            for key in mine[0]
            if key not in ("seed", "search")
        }
    pairs = [
        (row["seconds_to_plain_best"], other["seconds_to_best"])
        for row in rows
        for other in rows
        if row["seed"] == other["seed"]
        and (row["search"], other["search"]) == ("wrapped", "plain")
    ]
    summary["seeds"] = len(pairs)
    summary["seeds_where_wrapped_found_plain_best"] = sum(math.isfinite(a) for a, _ in pairs)
    summary["ratio_of_seconds_to_plain_best"] = _spread([a / b for a, b in pairs])
    return summary


def _spread(values: list[float]) -> dict[str, float | None]:
    """Median, minimum and maximum; a target that was not reached counts as infinitely late."""
    worst = np.array([math.inf if math.isnan(v) else v for v in values])
    figures = {
        "median": float(np.median(worst)),
        "min": float(worst.min()),
        "max": float(worst.max()),
    }
    return {key: value if math.isfinite(value) else None for key, value in figures.items()}


def _table(summary: dict[str, Any]) -> str:
    def cell(name: str, key: str, form: str) -> str:
        spread = summary[name][key]
        if spread["median"] is None:
            return "-" if spread["min"] is None else "not reached"
        low, high = (
            format(spread[end], form) if spread[end] is not None else "never"
            for end in ("min", "max")
        )
        return f"{format(spread['median'], form)} ({low}..{high})"

    rows = [
        ("fastest fine-tuning found, seconds", "best_seconds", ".3f"),
        ("search seconds to its best", "seconds_to_best", ".1f"),
        ("search seconds to the plain search's best", "seconds_to_plain_best", ".1f"),
        ("trials", "trials", ".0f"),
        ("of these skipped before the first step", "skipped", ".0f"),
        ("trials that reached the target", "reached_target", ".0f"),
        ("search seconds spent on trials that did not", "wasted_seconds", ".1f"),
        ("typical factor between predicted and real steps", "prediction_error_factor", ".2f"),
    ]
    where = summary["environment"]
    lines = [
        f"| {summary['budget_seconds']:g} s a search, {summary['seeds']} seeds: median (min..max) "
        "| TPE + median pruner | the same, wrapped |",
        "| --- | --- | --- |",
        *(
            f"| {label} | {cell('plain', key, form)} | {cell('wrapped', key, form)} |"
            for label, key, form in rows
        ),
        "",
        f"Measured {where['date']} on {where['cores']} cores of {where['processor']} with "
        f"`{where['command']}`; "
        "the spectrum's seconds are charged to the wrapped search.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
