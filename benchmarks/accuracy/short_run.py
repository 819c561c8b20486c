"""What a short training run of twenty steps does for predictions before the first trial.

Over the recorded runs of the sentence encoder (or the tasks that are named): mean error of the
times to 70, 50, 35, 25, 15 and 10 % of the initial loss, without the run and with it, and what it
cost. Writes ``short_run.json`` and ``short_run.md``, and its figure into ``summary.json``.

Run with ``python -m benchmarks.accuracy.short_run``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
import warnings

import numpy as np
import torch

from benchmarks.accuracy.closed_loop import errors_of
from benchmarks.accuracy.closed_loop_methods import load_task
from benchmarks.accuracy.evaluation import spectrum_of
from benchmarks.accuracy.evaluation import update_summary
from benchmarks.accuracy.record import RESULTS
from benchmarks.accuracy.tasks import load
from benchmarks.environment import environment
from optuna_ttp import Calibration
from optuna_ttp import TrainingTimePredictor


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", default=["minilm-0", "minilm-1"])
    parser.add_argument("--store", help="URL of the spectrum store; the default one by default")
    parser.add_argument("--curves", type=Path, default=RESULTS / "curves")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in options.tasks:
        spectrum = spectrum_of(name, options.store)
        task = load_task(options.curves / f"{name}.npz", spectrum)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            predictor = TrainingTimePredictor(spectrum, target_fraction=0.1)
            informed = predictor.short_run(load(name).task())
        rows.append(
            {
                "task": name,
                "without": float(np.nanmean(errors_of(Calibration.none(task.prior_scale), task))),
                "informed": float(np.nanmean(errors_of(informed.calibration, task))),
                "seconds": informed.short_run_seconds,
            }
        )
        print(rows[-1], flush=True)
    where = environment()
    options.output.mkdir(parents=True, exist_ok=True)
    document = {"environment": where, "tasks": rows}
    (options.output / "short_run.json").write_text(json.dumps(document, indent=2) + "\n")
    errors = [row["informed"] for row in rows if row["task"].startswith("minilm")]
    if errors:
        update_summary(options.output, {"transformer_mape_short_run": float(np.mean(errors))})
    lines = [
        "| | without | after a short training run | its seconds |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['task']} | {r['without']:.1%} | {r['informed']:.1%} | {r['seconds']:.0f} |"
        for r in rows
    ]
    lines += ["", f"Measured {where['date']} with `{where['command']}`.", ""]
    (options.output / "short_run.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
