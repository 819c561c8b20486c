"""Zero-shot predicted against real training time of the demo's network over a grid.

Learning rates over two decades up to beyond the stability limit, batch sizes 8, 32, 128, momentum
0 and 0.9, targets at 70, 50, 30 and 15 % of the initial loss, one seed a configuration. Beside our
simulation stands the plain rule ``c / effective learning rate``, with ``c`` fitted on all real
times in hindsight. Writes ``digits.csv``, ``digits.json`` and ``digits.md`` (the README's table).

Run with ``python -m benchmarks.accuracy.digits``.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch

from benchmarks.environment import environment
from optuna_ttp import _demo
from optuna_ttp import compute_spectrum
from optuna_ttp import FineTuningTask
from optuna_ttp import TrainingTimePredictor
from optuna_ttp.calibration import smooth


_FRACTIONS = (0.7, 0.5, 0.3, 0.15)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="two configurations only")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tuning = _demo.pretrain(0)
    task = FineTuningTask(tuning.model, tuning.train)
    spectrum = compute_spectrum(task, measure_speed=False)
    predictors = {f: TrainingTimePredictor(spectrum, target_fraction=f) for f in _FRACTIONS}
    relative = (0.5,) if options.smoke else (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
    sizes = (32,) if options.smoke else (8, 32, 128)
    rows: list[dict[str, Any]] = []
    for share, size, momentum in itertools.product(relative, sizes, (0.0, 0.9)):
        limit = float(predictors[0.5].max_learning_rate(size, momentum))
        rows.extend(_rows(tuning, predictors, share * limit, size, momentum))
        print(f"stability {share:g}, batch size {size}, momentum {momentum:g} done", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "digits.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    summary = {"environment": environment(), **_summary(rows)}
    (options.output / "digits.json").write_text(json.dumps(summary, indent=2) + "\n")
    table = _table(summary)
    (options.output / "digits.md").write_text(table)
    print(table)


def _rows(
    tuning: _demo.FineTuning,
    predictors: dict[float, TrainingTimePredictor],
    rate: float,
    size: int,
    momentum: float,
) -> list[dict[str, Any]]:
    losses = _real_losses(tuning, rate, size, momentum, max_steps=1500)
    n_finite = len(losses) if np.isfinite(losses).all() else int(np.argmin(np.isfinite(losses)))
    curve = smooth(losses[:n_finite])
    rows = []
    for fraction, predictor in predictors.items():
        prediction = predictor.predict(rate, size, momentum, max_steps=4500)
        rows.append(
            {
                "learning_rate": f"{rate:.4g}",
                "batch_size": size,
                "momentum": momentum,
                "stability": f"{float(prediction.stability):.3g}",
                "fraction": fraction,
                "predicted_outcome": prediction.outcome,
                "predicted_steps": float(prediction.steps),
                "real_steps": predictor.target.first_passage(
                    np.arange(len(curve), dtype=float), curve
                ),
            }
        )
    return rows


def _real_losses(
    tuning: _demo.FineTuning, rate: float, size: int, momentum: float, max_steps: int
) -> NDArray[np.float64]:
    model = copy.deepcopy(tuning.model)
    generator = torch.Generator().manual_seed(1)
    losses: list[float] = []
    for loss in _demo.train(model, tuning.train, rate, size, momentum, max_steps, generator):
        losses.append(loss)
        # Long enough below the deepest target for the smoothed curve to be there as well.
        recent = losses[-max(20, len(losses) // 4) :]
        if not math.isfinite(loss) or (len(losses) > 30 and np.mean(recent) < 0.1):
            break
    return np.array(losses)


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for fraction in _FRACTIONS:
        mine = [row for row in rows if row["fraction"] == fraction]
        both = [
            row
            for row in mine
            if math.isfinite(row["predicted_steps"]) and 0 < row["real_steps"] < math.inf
        ]
        if not both:
            continue
        real = np.array([row["real_steps"] for row in both])
        ours = np.array([row["predicted_steps"] for row in both])
        effective = np.array([float(row["learning_rate"]) / (1 - row["momentum"]) for row in both])
        rule = np.exp(np.mean(np.log(real * effective))) / effective
        summary[f"{fraction:.0%} of the initial loss"] = {
            "configurations": len(mine),
            "reached_and_predicted_so": len(both),
            "reached_but_predicted_not": sum(
                math.isfinite(r["real_steps"]) and not math.isfinite(r["predicted_steps"])
                for r in mine
            ),
            "not_reached_but_predicted_so": sum(
                not math.isfinite(r["real_steps"]) and math.isfinite(r["predicted_steps"])
                for r in mine
            ),
            "ours": _errors(ours / real),
            "c_over_effective_learning_rate_in_hindsight": _errors(rule / real),
        }
    return summary


def _table(summary: dict[str, Any]) -> str:
    where = summary["environment"]
    lines = [
        "| target | mean error | median error | 95th percentile | predicted over real | "
        "mean error of `c / effective learning rate` |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for target, figures in summary.items():
        if target == "environment":
            continue
        ours, rule = figures["ours"], figures["c_over_effective_learning_rate_in_hindsight"]
        lines.append(
            f"| {target} | {ours['mean_absolute_error']:.0%} | "
            f"{ours['median_absolute_error']:.0%} | {ours['p95_absolute_error']:.0%} | "
            f"{ours['bias_factor']:.2f} | {rule['mean_absolute_error']:.0%} |"
        )
    counts = [figures for target, figures in summary.items() if target != "environment"]
    late = [figures["reached_but_predicted_not"] for figures in counts]
    early = [figures["not_reached_but_predicted_so"] for figures in counts]
    lines += [
        "",
        f"Measured {where['date']} with `{where['command']}` over "
        f"{counts[0]['configurations']} configurations, one seed each; errors where both reached "
        f"the target. Per target, {min(late)} to {max(late)} configurations reached it although "
        f"predicted not to, {min(early)} to {max(early)} the other way round.",
        "",
    ]
    return "\n".join(lines)


def _errors(ratio: NDArray[np.float64]) -> dict[str, float]:
    error = np.abs(ratio - 1)
    return {
        "mean_absolute_error": round(float(error.mean()), 4),
        "median_absolute_error": round(float(np.median(error)), 4),
        "p95_absolute_error": round(float(np.quantile(error, 0.95)), 4),
        "bias_factor": round(float(np.exp(np.log(ratio).mean())), 4),
    }


if __name__ == "__main__":
    main()
