"""Predicted validation loss and accuracy against real training.

The digits network and two draws of the small residual network, with 200 more samples to validate
on. Batch sizes 16 and 50, momentum 0 and 0.9, learning rates at 5, 15 and 40 % of the largest
stable one, two orders of the samples. Compared are, up to the step where the real training loss is
at 15 % of its start,

- the time to half of the way of the validation loss from its start to its lowest real value, and
  to half of the way of the validation accuracy to its highest: what an early target is;
- the lowest validation loss and the highest validation accuracy that the curves come to.

Writes ``validation.csv``, ``validation.json`` and ``validation.md``.

Run with ``python -m benchmarks.accuracy.validation``.
"""

from __future__ import annotations

import argparse
import copy
import csv
from dataclasses import dataclass
from dataclasses import replace
import itertools
import json
import math
from pathlib import Path
from typing import Any
import warnings

import numpy as np
from numpy.typing import NDArray
import torch

from benchmarks.accuracy.tasks import load
from benchmarks.accuracy.tasks import residual
from benchmarks.accuracy.tasks import Tuning
from benchmarks.environment import environment
from optuna_ttp import compute_spectrum
from optuna_ttp import demo
from optuna_ttp import FineTuningTask
from optuna_ttp import PredictorSettings
from optuna_ttp import TrainingTimePredictor


_TASKS = ("digits-0", "residual-0", "residual-1")
_SHARES = (0.05, 0.15, 0.4)
_N_HELD_OUT = 200
_DEEPEST = 0.15
_MAX_STEPS = 1500
# Later losses are taken at steps so much further apart.
_SPACING = 1.04


@dataclass(frozen=True, eq=False)
class Curves:
    """Curves of one run, or of its prediction.

    Attributes:
        steps:
            Ascending, shape ``(T,)``.
        losses:
            Validation loss there.
        accuracies:
            Validation accuracy there.
    """

    steps: NDArray[np.float64]
    losses: NDArray[np.float64]
    accuracies: NDArray[np.float64]

    def first_loss(self, loss: float) -> float:
        """Return the first step at a loss; infinity if there is none."""
        return _first(self.steps, self.losses <= loss)

    def first_accuracy(self, accuracy: float) -> float:
        """Return the first step at an accuracy; infinity if there is none."""
        return _first(self.steps, self.accuracies >= accuracy)

    def until(self, step: float) -> Curves:
        """Return the part up to a step."""
        on = self.steps <= step
        return Curves(self.steps[on], self.losses[on], self.accuracies[on])


def _first(steps: NDArray[np.float64], there: NDArray[np.bool_]) -> float:
    return float(steps[np.argmax(there)]) if there.any() else math.inf


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="one configuration only")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in ("digits-0",) if options.smoke else _TASKS:
        rows += _rows(name, options.smoke)
        print(f"{name} done", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "validation.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    summary = {"environment": environment(), **_summary(rows)}
    (options.output / "validation.json").write_text(json.dumps(summary, indent=2) + "\n")
    table = _table(summary)
    (options.output / "validation.md").write_text(table)
    print(table)


def _split(name: str) -> tuple[Tuning, Tuning]:
    """The task, and the same network with samples that are not trained on."""
    tuning = load(name)
    n, draw = len(tuning.labels), int(name.rpartition("-")[2])
    # The first samples are the same for every number.
    if name.startswith("digits"):
        inputs, labels = demo.pretrain(draw, n_train=n + _N_HELD_OUT).train
    else:
        more = residual(name, draw, n_samples=n + _N_HELD_OUT)
        inputs, labels = more.inputs, more.labels
    return tuning, replace(tuning, inputs=inputs[n:], labels=labels[n:])


def _rows(name: str, smoke: bool) -> list[dict[str, Any]]:
    tuning, held_out = _split(name)
    task = FineTuningTask(
        tuning.model,
        (tuning.inputs, tuning.labels),
        validation_data=(held_out.inputs, held_out.labels),
    )
    spectrum = compute_spectrum(task, measure_speed=False, show_progress_bar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        predictor = TrainingTimePredictor(
            spectrum, target_fraction=_DEEPEST, settings=PredictorSettings(exact=True)
        )
    rows = []
    grid = itertools.product(_SHARES, (16, 50), (0.0, 0.9), (0, 1))
    for share, batch_size, momentum, seed in [next(grid)] if smoke else grid:
        rate = share * float(predictor.max_learning_rate(batch_size, momentum))
        real = _real(tuning, held_out, rate, batch_size, momentum, seed)
        predicted = _predicted(predictor, rate, batch_size, momentum, int(real.steps[-1]))
        loss = 0.5 * (real.losses[0] + real.losses.min())
        accuracy = 0.5 * (real.accuracies[0] + real.accuracies.max())
        predicted_until_end = predicted.until(real.steps[-1])
        rows.append(
            {
                "task": name,
                "learning_rate": rate,
                "batch_size": batch_size,
                "momentum": momentum,
                "share": share,
                "seed": seed,
                "real_steps_to_loss": real.first_loss(loss),
                "predicted_steps_to_loss": predicted.first_loss(loss),
                "real_steps_to_accuracy": real.first_accuracy(accuracy),
                "predicted_steps_to_accuracy": predicted.first_accuracy(accuracy),
                "initial_loss": float(real.losses[0]),
                "real_lowest_loss": float(real.losses.min()),
                "predicted_lowest_loss": float(predicted_until_end.losses.min()),
                "initial_accuracy": float(real.accuracies[0]),
                "real_highest_accuracy": float(real.accuracies.max()),
                "predicted_highest_accuracy": float(predicted_until_end.accuracies.max()),
            }
        )
    return rows


def _real(
    tuning: Tuning, held_out: Tuning, rate: float, batch_size: int, momentum: float, seed: int
) -> Curves:
    model = copy.deepcopy(tuning.model)
    optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    generator = torch.Generator().manual_seed(1000 + seed)
    points: list[tuple[float, float, float]] = []
    order: list[torch.Tensor] = []
    wanted, initial = 0, math.nan
    for step in range(_MAX_STEPS + 1):
        if step == wanted:
            with torch.no_grad():
                outputs = model(held_out.inputs)
                whole = float(tuning.loss(model(tuning.inputs), tuning.labels))
            if not math.isfinite(whole):
                break
            hits = (outputs.argmax(dim=1) == held_out.labels).double().mean()
            points.append((step, float(tuning.loss(outputs, held_out.labels)), float(hits)))
            initial = whole if step == 0 else initial
            if whole <= _DEEPEST * initial:
                break
            wanted = max(step + 1, int(step * _SPACING))
        if not order:
            shuffled = torch.randperm(len(tuning.labels), generator=generator)
            order = list(shuffled.split(batch_size))
        chosen = order.pop(0)
        optimiser.zero_grad()
        tuning.loss(model(tuning.inputs[chosen]), tuning.labels[chosen]).backward()
        optimiser.step()
    return Curves(*np.array(points).T)


def _predicted(
    predictor: TrainingTimePredictor, rate: float, batch_size: int, momentum: float, last: int
) -> Curves:
    p = predictor.predict(rate, batch_size, momentum, max_steps=3 * last + 10, full_curve=True)
    good = np.isfinite(p.curve_steps)
    return Curves(
        p.curve_steps[good],
        p.curves["validation_loss"][good],
        p.curves["validation_accuracy"][good],
    )


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for name in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == name]
        figures_of_task: dict[str, Any] = {"runs": len(mine)}
        for what in ("loss", "accuracy"):
            real, predicted = (
                np.array([row[f"{who}_steps_to_{what}"] for row in mine])
                for who in ("real", "predicted")
            )
            good = np.isfinite(real) & np.isfinite(predicted) & (real > 0)
            error = np.abs(predicted[good] / real[good] - 1.0)
            figures_of_task[f"steps_to_{what}"] = {
                "compared": int(good.sum()),
                "mean_error": float(error.mean()) if good.any() else math.nan,
                "median_error": float(np.median(error)) if good.any() else math.nan,
            }
        for key in ("lowest_loss", "highest_accuracy"):
            real, predicted = (
                np.array([row[f"{who}_{key}"] for row in mine]) for who in ("real", "predicted")
            )
            figures_of_task[key] = {
                "real": float(real.mean()),
                "predicted": float(predicted.mean()),
                "mean_absolute_difference": float(np.abs(predicted - real).mean()),
            }
        summary[name] = figures_of_task
    return summary


def _table(summary: dict[str, Any]) -> str:
    where = summary["environment"]
    lines = [
        "| network | runs | steps half-way to the best validation loss: mean (median) error | "
        "the same for accuracy | best validation loss: predicted (real) | best validation "
        "accuracy: predicted (real) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, figures_of_task in summary.items():
        if name == "environment":
            continue
        times = (figures_of_task["steps_to_loss"], figures_of_task["steps_to_accuracy"])
        errors = [f"{t['mean_error']:.0%} ({t['median_error']:.0%})" for t in times]
        loss, accuracy = figures_of_task["lowest_loss"], figures_of_task["highest_accuracy"]
        lines.append(
            f"| {name} | {figures_of_task['runs']} | {errors[0]} | {errors[1]} | "
            f"{loss['predicted']:.2f} ({loss['real']:.2f}) | "
            f"{accuracy['predicted']:.1%} ({accuracy['real']:.1%}) |"
        )
    lines += ["", f"Measured {where['date']} with `{where['command']}`.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
