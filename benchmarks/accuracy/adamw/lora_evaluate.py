"""Predicted against real training times of low-rank adapters (LoRA), without a single trial.

Every run that ``benchmarks.accuracy.adamw.lora`` recorded is simulated with its own configuration,
on one spectrum: the inputs of the adapted layers and the cotangents of their outputs do not depend
on alpha, which multiplies the cotangents. Beside it stands the simulation with A fixed, as a
Jacobian at the start, where B is zero, sees it. Nothing is corrected or calibrated. The simulated
loss is taken at the steps at which the real one was taken, and both are interpolated in the same
way.

Writes ``results/adamw/lora.csv`` and ``lora.md``, and figures into ``summary.json``. Needs what
``lora.txt`` beside this file lists. Run with
``python -m benchmarks.accuracy.adamw.lora_evaluate``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
import math
from pathlib import Path
import time
import warnings

import numpy as np
from numpy.typing import NDArray
import torch

from benchmarks.accuracy.adamw.lora import load
from benchmarks.accuracy.adamw.lora import NAME
from benchmarks.accuracy.adamw.recording import Curve
from benchmarks.accuracy.adamw.recording import read
from benchmarks.accuracy.adamw.recording import Recording
from benchmarks.accuracy.adamw.run import LoraRun
from benchmarks.accuracy.adamw.training import evaluated_steps
from benchmarks.accuracy.evaluation import figures
from benchmarks.accuracy.evaluation import Point
from benchmarks.accuracy.evaluation import update_summary
from benchmarks.accuracy.evaluation import write_points
from benchmarks.accuracy.record import RESULTS
from benchmarks.accuracy.training import accumulate_gradient
from benchmarks.accuracy.training import mini_batches
from benchmarks.environment import environment
from optuna_ttp import AdamW
from optuna_ttp import compute_spectrum
from optuna_ttp import ParameterGroup
from optuna_ttp import Schedule
from optuna_ttp import Spectrum
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import simulate


FRACTIONS = (0.7, 0.5, 0.25)
_ALPHA = 16.0
_METHODS = {"ours": "with the product B A", "fixed": "with A fixed", "seed": "other order"}


def main() -> None:
    """Evaluate the recorded runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--spectrum", type=Path, help="a file that keeps the spectrum")
    parser.add_argument("--recordings", type=Path, default=RESULTS / "adamw")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recording = read(options.recordings / f"{NAME}.npz")
    spectrum = _spectrum(recording, options.spectrum)
    points, share = evaluate(recording, spectrum)
    _write(points, share, options.output)


def evaluate(recording: Recording, spectrum: Spectrum) -> tuple[list[Point], float]:
    """Return the points of all methods, and the seconds of a prediction over those of its run.

    Args:
        recording:
            The recorded runs.
        spectrum:
            Of the same task with alpha 16.

    Returns:
        The points; the mean over the runs of the processor's seconds of a prediction with one
        order of the samples, over those that all steps of the run take.
    """
    points: list[Point] = []
    shares = []
    a_step = _seconds_a_sample()
    runs = recording.runs
    real = np.array([[c.steps_to(f) for f in FRACTIONS] for c in recording.curves])
    for k, run in enumerate(runs):
        assert isinstance(run, LoraRun)
        for method in ("ours", "fixed"):
            started = time.process_time()
            predicted = predict(spectrum, run, with_a=method == "ours")
            if method == "ours":
                n_steps = len(recording.curves[k].batch_losses)
                seconds = (time.process_time() - started) / _N_SEEDS
                shares.append(seconds / (a_step * run.batch_size * n_steps))
            points += [
                Point(NAME, k, method, f, real[k, c], predicted[c])
                for c, f in enumerate(FRACTIONS)
            ]
        for j, other in enumerate(runs):
            if j != k and replace(other, seed=run.seed) == run:
                points += [
                    Point(NAME, k, "seed", f, real[k, c], real[j, c])
                    for c, f in enumerate(FRACTIONS)
                ]
        print(k, run.learning_rate, real[k], [round(p.predicted, 1) for p in points[-6:]])
    return points, float(np.mean(shares))


_N_SEEDS = 2


def predict(spectrum: Spectrum, run: LoraRun, *, with_a: bool) -> NDArray[np.float64]:
    """Return the geometric mean over two orders of the samples of the steps to every target.

    Args:
        spectrum:
            Of the same task with alpha 16.
        run:
            The configuration.
        with_a:
            False to leave A as it is at the start.
    """
    scale = run.alpha / math.sqrt(run.rank) if run.rank_stabilised else run.alpha / run.rank
    factor = np.array([1.0, scale / (_ALPHA / run.rank)])
    layers = tuple(replace(one, scales=one.scales * factor) for one in spectrum.low_rank)
    model = LinearisedModel.from_columns(replace(spectrum, low_rank=layers))
    assert spectrum.jacobian is not None
    firsts = tuple(n for n in spectrum.jacobian.names if "lora_A" in n)
    optimizer = AdamW(
        (run.beta_1, run.beta_2),
        eps=run.eps,
        weight_decay=run.weight_decay,
        max_grad_norm=run.max_grad_norm,
        groups=None if with_a else (ParameterGroup(firsts, rate=0.0),),
    )
    schedule = None
    if run.schedule == "linear":
        schedule = Schedule.trainer("linear", run.schedule_steps, warmup_steps=run.warmup_steps)
    # A run that had to stop may be predicted to go on for a while.
    most = run.max_steps if schedule is not None else 3 * run.max_steps
    grid = np.array(evaluated_steps(most, 1.5))
    logs = []
    for seed in range(_N_SEEDS):
        curves = simulate(
            model,
            optimizer.configurations(run.learning_rate, run.beta_1, schedule),
            np.array([run.batch_size]),
            max_steps=np.array([most]),
            exact=True,
            seed=seed,
        )
        steps, losses = curves.steps[0], np.log(curves.curves["loss"][0])
        known = np.isfinite(losses)
        taken = np.array([s for s in grid if s <= steps[known][-1]])
        at = np.exp(np.interp(taken, steps[known], losses[known]))
        none = np.empty(0)
        curve = Curve(none, none, taken.astype(np.float64), at, none, 0.0, "steps")
        logs.append([math.log(curve.steps_to(f)) for f in FRACTIONS])
    return np.asarray(np.exp(np.mean(logs, axis=0)))


def _spectrum(recording: Recording, path: Path | None) -> Spectrum:
    """The spectrum with alpha 16, from a file where it is there."""
    if path is not None and path.exists():
        return Spectrum.load(path)
    rank = {run.rank for run in recording.runs if isinstance(run, LoraRun)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spectrum = compute_spectrum(
            load(rank.pop(), _ALPHA, rank_stabilised=False).task(),
            engine="columns",
            measure_speed=False,
            probe=False,
        )
    if path is not None:
        spectrum.save(path)
    return spectrum


def _seconds_a_sample() -> float:
    """Seconds of the processor of a real training step, for each sample."""
    tuning = load(8, _ALPHA, rank_stabilised=False)
    batches = mini_batches(len(tuning.labels), 16, 0)
    accumulate_gradient(tuning.model, tuning, next(batches))
    started = time.process_time()
    for _ in range(2):
        accumulate_gradient(tuning.model, tuning, next(batches))
    return (time.process_time() - started) / 32


def _write(points: list[Point], share: float, output: Path) -> None:
    lines = [
        "Predicted over real steps to 70, 50 and 25 % of the initial loss, LoRA of SmolLM2-135M "
        "with AdamW, no trial.",
        "",
        "| | mean error | median | 95th percentile | predicted over real | Kendall's tau | "
        "reached although predicted not to |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    kept = {"lora_prediction_cost": share}
    for method, words in _METHODS.items():
        ours = figures([p for p in points if p.method == method])
        if "mape" not in ours:
            continue
        if method == "ours":
            kept |= {"lora_mape_0": ours["mape"], "lora_tau_0": ours["tau"]}
        lines.append(
            f"| {words} | {ours['mape']:.1%} | {ours['median']:.1%} | {ours['p95']:.1%} | "
            f"{ours['bias']:.2f} | {ours['tau']:.2f} | "
            f"{ours['only_real']:.0f} of {ours['n_points']:.0f} |"
        )
    where = environment()
    lines += [
        "",
        f"A prediction takes {share:.1%} of the processor's time of the run that it predicts.",
        "",
        f"Measured {where['date']} with `python -m benchmarks.accuracy.adamw.lora_evaluate`.",
    ]
    (output / "adamw" / "lora.md").write_text("\n".join(lines) + "\n")
    write_points(output / "adamw" / "lora.csv", points, leave_out=("seed",))
    update_summary(output, kept)


if __name__ == "__main__":
    main()
