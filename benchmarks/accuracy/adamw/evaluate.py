"""Predicted against real training times of AdamW, without a single trial.

Every recorded run (``benchmarks.accuracy.adamw.record``) is predicted by its own configuration:
learning rate, batch size, betas, weight decay, schedule and clipping. Beside the predictions with
and without the growth of the kernel stand rules of thumb that are calibrated on one real run, each
in turn: a time proportional to ``1 / rate`` and to ``1 / (rate sqrt(B))``; and the difference of
two runs that differ in the order of the samples only.

Writes ``results/adamw/zero_shot.csv`` and ``zero_shot.md``, and figures into ``summary.json``.
Run with ``python -m benchmarks.accuracy.adamw.evaluate [TASK ...]``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
import math
from pathlib import Path
import warnings

import numpy as np
from numpy.typing import NDArray
import torch

from benchmarks.accuracy.adamw.recording import read
from benchmarks.accuracy.adamw.recording import Recording
from benchmarks.accuracy.adamw.run import Run
from benchmarks.accuracy.evaluation import figures
from benchmarks.accuracy.evaluation import Point
from benchmarks.accuracy.evaluation import update_summary
from benchmarks.accuracy.evaluation import write_points
from benchmarks.accuracy.record import RESULTS
from benchmarks.accuracy.tasks import load
from benchmarks.environment import environment
from optuna_ttp import AdamW
from optuna_ttp import Schedule
from optuna_ttp import Spectrum
from optuna_ttp import SpectrumStore
from optuna_ttp import TrainingTimePredictor
from optuna_ttp import UnreliablePredictionWarning
from optuna_ttp.prediction import PredictorSettings


FRACTIONS = (0.7, 0.5, 0.35, 0.25, 0.15, 0.1)
# Runs with rates up to this one are "small steps".
SMALL = 1e-4
_METHODS = {
    "ours": "ours, zero-shot",
    "frozen": "ours with a frozen kernel",
    "c/rate": "`c / rate`, calibrated on one run",
    "c/(rate sqrt B)": "`c / (rate sqrt(B))`, calibrated on one run",
    "seed": "the same run with another order of the samples",
}
_GROUPS: dict[str, tuple[str, ...]] = {
    "pretrained": ("efficientnet",),
    "transformer": ("minilm",),
    "small": ("residual", "digits"),
}


def main() -> None:
    """Evaluate the tasks that are named, or all that are recorded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tasks", nargs="*")
    parser.add_argument("--store", help="URL of the spectrum store; the default one by default")
    parser.add_argument("--recordings", type=Path, default=RESULTS / "adamw")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--frozen", action="store_true", help="with a frozen kernel, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recorded = {p.stem for p in options.recordings.glob("*.npz") if "lora" not in p.stem}
    points: list[Point] = []
    for name in options.tasks or sorted(recorded):
        recording = read(options.recordings / f"{name}.npz")
        spectrum = _spectrum(name, options.store)
        points += evaluate(name, recording, spectrum, frozen=options.frozen)
        print(name, figures([p for p in points if p.task == name and p.method == "ours"]))
    _write(points, options.recordings, options.output)


def evaluate(
    name: str, recording: Recording, spectrum: Spectrum, *, frozen: bool = False
) -> list[Point]:
    """Return the points of all methods for one task.

    Args:
        name:
            Of the task.
        recording:
            Its recorded runs.
        spectrum:
            With a sample of the Jacobian's columns.
        frozen:
            Also predict with a kernel that does not grow, which takes as long again.
    """
    runs = recording.runs
    real = np.array([[curve.steps_to(f) for f in FRACTIONS] for curve in recording.curves])
    points = _rules(name, runs, real)
    for k, run in enumerate(runs):
        print(name, k, flush=True)
        for method, growth in (("ours", "probed"), ("frozen", "frozen"))[: 1 + frozen]:
            predicted = predict(spectrum, run, growth)
            points += [
                Point(name, k, method, f, real[k, c], *predicted[c])
                for c, f in enumerate(FRACTIONS)
            ]
    return points


def predict(spectrum: Spectrum, run: Run, growth: str) -> list[tuple[float, float, float]]:
    """Return predicted steps, and the ends of the 80 % interval, at every target.

    Args:
        spectrum:
            Of the task.
        run:
            The configuration.
        growth:
            ``"probed"`` or ``"frozen"``.
    """
    optimizer = AdamW(
        (run.beta_1, run.beta_2),
        eps=run.eps,
        weight_decay=run.weight_decay,
        max_grad_norm=run.max_grad_norm,
    )
    schedule = None
    if run.schedule == "linear":
        schedule = Schedule.trainer("linear", run.schedule_steps, warmup_steps=run.warmup_steps)
    settings = PredictorSettings(n_seeds=2)
    if growth == "frozen":
        settings = replace(settings, kernel_growth="frozen")
    # A run that had to stop may be predicted to go on for a while.
    most = run.max_steps if schedule is not None else 2 * run.max_steps
    times = []
    for fraction in FRACTIONS:
        with warnings.catch_warnings():
            # Deep targets of large networks are marked as unreliable, which is counted.
            warnings.simplefilter("ignore", UnreliablePredictionWarning)
            predictor = TrainingTimePredictor(
                spectrum,
                target_fraction=fraction,
                optimizer=optimizer,
                schedule=schedule,
                settings=settings,
            )
        p = predictor.predict(run.learning_rate, run.batch_size, max_steps=most)
        values = (p.steps, p.steps_low, p.steps_high)
        times.append(tuple(float(np.ravel(v)[0]) for v in values))
    return times  # type: ignore[return-value]


def _rules(name: str, runs: list[Run], real: NDArray[np.float64]) -> list[Point]:
    """Return points of rules that are calibrated on one other run, and of repeated runs."""
    points = []
    for k, run in enumerate(runs):
        for j, other in enumerate(runs):
            if j == k:
                continue
            same = replace(other, seed=run.seed) == run
            for c, fraction in enumerate(FRACTIONS):
                known = float(real[j, c])
                if same:
                    points.append(Point(name, k, "seed", fraction, real[k, c], known))
                    continue
                ratio = other.learning_rate / run.learning_rate
                by_batch = ratio * math.sqrt(other.batch_size / run.batch_size)
                for method, factor in (("c/rate", ratio), ("c/(rate sqrt B)", by_batch)):
                    if math.isfinite(known):
                        points.append(Point(name, k, method, fraction, real[k, c], known * factor))
    return points


def _spectrum(name: str, url: str | None) -> Spectrum:
    store = SpectrumStore() if url is None else SpectrumStore(url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return store.get_or_compute(load(name).task(), engine="columns", measure_speed=False)


def _write(points: list[Point], recordings: Path, output: Path) -> None:
    runs = {n: read(recordings / f"{n}.npz").runs for n in {p.task for p in points}}
    small = [p for p in points if runs[p.task][p.run].learning_rate <= SMALL]
    lines = [
        "Predicted over real steps to 70, 50, 35, 25, 15 and 10 % of the initial loss, AdamW, "
        "no trial.",
        "",
    ]
    kept = {}
    for group, prefix in _GROUPS.items():
        for label, chosen in (("", points), (f", rates up to {SMALL:g}", small)):
            of_group = [p for p in chosen if p.task.startswith(prefix)]
            if not of_group:
                continue
            lines += [f"{group}{label} ({', '.join(sorted({p.task for p in of_group}))}):", ""]
            lines += _table(of_group)
            ours = figures([p for p in of_group if p.method == "ours"])
            suffix = "_small_rates" if label else ""
            if "mape" in ours:
                kept[f"adamw_{group}_mape_0{suffix}"] = ours["mape"]
                kept[f"adamw_{group}_tau_0{suffix}"] = ours["tau"]
                kept[f"adamw_{group}_coverage_0{suffix}"] = ours["coverage"]
    where = environment()
    lines += [f"Measured {where['date']} with `python -m benchmarks.accuracy.adamw.evaluate`."]
    (output / "adamw").mkdir(parents=True, exist_ok=True)
    (output / "adamw" / "zero_shot.md").write_text("\n".join(lines) + "\n")
    write_points(
        output / "adamw" / "zero_shot.csv", points, leave_out=("c/rate", "c/(rate sqrt B)", "seed")
    )
    update_summary(output, kept)


def _table(points: list[Point]) -> list[str]:
    lines = [
        "| | mean error | median | 95th percentile | predicted over real | Kendall's tau | in the "
        "80 % interval | reached although predicted not to |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, words in _METHODS.items():
        of_method = figures([p for p in points if p.method == method])
        if "mape" not in of_method:
            continue
        covered = of_method.get("coverage")
        lines.append(
            f"| {words} | {of_method['mape']:.1%} | {of_method['median']:.1%} | "
            f"{of_method['p95']:.1%} | {of_method['bias']:.2f} | {of_method['tau']:.2f} | "
            f"{'' if covered is None or method != 'ours' else f'{covered:.0%}'} | "
            f"{of_method['only_real']:.0f} of {of_method['n_points']:.0f} |"
        )
    return [*lines, ""]


if __name__ == "__main__":
    main()
