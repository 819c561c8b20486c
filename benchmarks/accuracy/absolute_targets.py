"""Training times to absolute targets, without any training, on all recorded networks.

Targets at 70, 50, 35, 25, 15 and 10 % of the initial training loss (over all samples). Four kinds
of networks: EfficientNet-Lite0 with ImageNet weights (the runs of the paper's protocol), the small
residual network, the digits network, and the sentence encoder with a new head. Predictions that
are marked as unreliable count like all others; the table says how many there are.

The real runs are those of ``python -m benchmarks.accuracy.record``. Writes
``absolute_targets.csv``, ``.json`` and ``.md``, and its figures into ``summary.json``.

Run with ``python -m benchmarks.accuracy.absolute_targets``.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
import json
from multiprocessing import get_context
from pathlib import Path
from typing import Any
import warnings

import numpy as np
from numpy.typing import NDArray
import torch

from benchmarks.accuracy.evaluation import baselines
from benchmarks.accuracy.evaluation import by_method
from benchmarks.accuracy.evaluation import full_curve
from benchmarks.accuracy.evaluation import Point
from benchmarks.accuracy.evaluation import spectrum_of
from benchmarks.accuracy.evaluation import table
from benchmarks.accuracy.evaluation import update_summary
from benchmarks.accuracy.evaluation import write_points
from benchmarks.accuracy.record import read
from benchmarks.accuracy.record import RESULTS
from benchmarks.environment import environment
from optuna_ttp import PredictorSettings
from optuna_ttp import Spectrum
from optuna_ttp import TrainingTimePredictor
from optuna_ttp.dynamics import Target


FRACTIONS = (0.7, 0.5, 0.35, 0.25, 0.15, 0.1)
_KINDS = {
    "EfficientNet-Lite0, pretrained on ImageNet": "efficientnet",
    "small residual network, pretrained on half of the classes": "residual",
    "digits network, pretrained on half of the classes": "digits",
    "MiniLM sentence encoder with a new head": "minilm",
}
# A prediction is cut off where it is so many times later than the run was observed.
_PATIENCE = 5
_MIN_RUNS = 5
# The paper's equation is integrated in the directions that hold this share of the trace.
_EQUATION_TRACE = 0.98


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--store", help="URL of the spectrum store; the default one by default")
    parser.add_argument("--curves", type=Path, default=RESULTS / "curves")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="the small digits network only")
    options = parser.parse_args()
    points: dict[str, list[Point]] = {}
    paths: list[tuple[str, Path]] = []
    for kind, start in _KINDS.items():
        if options.smoke and start != "digits":
            continue
        # Calibration on one run and ranks need a few runs.
        paths += [
            (kind, path)
            for path in sorted(options.curves.glob(f"{start}-*.npz"))
            if len(read(path).runs) >= _MIN_RUNS
        ]
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        every = 4 if options.smoke else 1
        files, n = [path for _, path in paths], len(paths)
        results = pool.map(_points, files, [options.store] * n, [every] * n)
        for (kind, path), chosen_points in zip(paths, results, strict=True):
            points.setdefault(kind, []).extend(chosen_points)
            print(f"{path.stem} done", flush=True)
    _write(points, options.output)


def _points(path: Path, store: str | None, every: int) -> list[Point]:
    """Points of a task, from each or only every so many of its runs."""
    torch.set_num_threads(1)
    name, recording = path.stem, read(path)
    spectrum = spectrum_of(name, store)
    runs = recording.runs[::every]
    rates = [r.learning_rate for r in runs]
    batch_sizes = [r.batch_size for r in runs]
    momenta = [r.momentum for r in runs]
    curves = [full_curve(recording, k) for k in range(0, len(recording.runs), every)]
    ends = np.array([max(1.0, steps[-1]) for steps, _ in curves])
    real = np.array(
        [
            [Target("loss", f * losses[0]).first_passage(steps, losses) for f in FRACTIONS]
            for steps, losses in curves
        ]
    )
    points = baselines(name, runs, real, FRACTIONS)
    for method in ("noiseless", "sde", "ode"):
        predicted = _beside(spectrum, method, rates, batch_sizes, momenta, 2 * ends)
        points += [
            Point(name, k, method, fraction, real[k, column], predicted[k, column])
            for k in range(len(runs))
            for column, fraction in enumerate(FRACTIONS)
        ]
    for column, fraction in enumerate(FRACTIONS):
        p = _predictor(spectrum, fraction, n_seeds=4).predict(
            rates, batch_sizes, momenta, max_steps=_PATIENCE * ends
        )
        points += [
            Point(
                name,
                k,
                "linear",
                fraction,
                real[k, column],
                float(p.steps[k]),
                float(p.steps_low[k]),
                float(p.steps_high[k]),
                bool(p.reliable[k]),
            )
            for k in range(len(runs))
        ]
    return points


def _predictor(spectrum: Spectrum, fraction: float, **settings: Any) -> TrainingTimePredictor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TrainingTimePredictor(
            spectrum, target_fraction=fraction, settings=PredictorSettings(**settings)
        )


def _beside(
    spectrum: Spectrum,
    method: str,
    rates: list[float],
    batch_sizes: list[int],
    momenta: list[float],
    max_steps: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Times of the methods beside ours, of shape (K, targets), from one curve a run."""
    if method == "noiseless":
        batch_sizes = [spectrum.n_samples] * len(batch_sizes)
    else:
        spectrum = spectrum.truncate(explained_trace=_EQUATION_TRACE)
    predictor = _predictor(
        spectrum, FRACTIONS[-1], method="linear" if method == "noiseless" else method, n_seeds=1
    )
    p = predictor.predict(rates, batch_sizes, momenta, max_steps=max_steps)
    return np.array(
        [
            [
                Target("loss", f * predictor.initial_loss).first_passage(
                    steps[np.isfinite(steps)], losses[np.isfinite(steps)]
                )
                for f in FRACTIONS
            ]
            for steps, losses in zip(p.curve_steps, p.curve_losses, strict=True)
        ]
    )


def _write(points: dict[str, list[Point]], output: Path) -> None:
    results = {kind: by_method(chosen_points) for kind, chosen_points in points.items()}
    depths = {
        kind: {
            f"{f:.0%}": by_method([p for p in chosen_points if p.target == f])["linear"]
            for f in FRACTIONS
        }
        for kind, chosen_points in points.items()
    }
    output.mkdir(parents=True, exist_ok=True)
    write_points(
        output / "absolute_targets.csv",
        [p for chosen_points in points.values() for p in chosen_points],
        leave_out=("c/eta_e", "c/eta_e+lag", "threshold", "seed"),
    )
    where = environment()
    document = {"environment": where, "all targets": results, "ours by target": depths}
    (output / "absolute_targets.json").write_text(json.dumps(document, indent=2) + "\n")
    for_summary: dict[str, float] = {}
    for kind, start in _KINDS.items():
        if kind in results:
            name = "pretrained" if start == "efficientnet" else start
            ours = results[kind]["linear"]
            for_summary |= {
                f"absolute_{name}_mape_0": ours["mape"],
                f"absolute_{name}_tau_0": ours["tau"],
                f"absolute_{name}_coverage_0": ours["coverage"],
                f"absolute_{name}_coverage_or_marked_0": ours["coverage_or_marked"],
            }
    update_summary(output, for_summary)
    lines = []
    for kind, chosen_points in results.items():
        lines += [f"{kind}, {int(chosen_points['linear']['n_runs'])} runs:", ""]
        lines += [*table(chosen_points), ""]
        lines += _depths(depths[kind])
    lines += [
        f"Measured {where['date']} with `{where['command']}`; errors where both reached the "
        "target.",
        "",
    ]
    (output / "absolute_targets.md").write_text("\n".join(lines))
    print("\n".join(lines))


def _depths(chosen_points: dict[str, dict[str, float]]) -> list[str]:
    lines = [
        "| ours, by target | mean error | predicted over real | in the 80 % interval | marked "
        "unreliable | reached although predicted not to | the run had ended before |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for fraction in FRACTIONS:
        row = chosen_points[f"{fraction:.0%}"]
        if "mape" in row:
            lines.append(
                f"| {fraction:.0%} of the initial loss | {row['mape']:.1%} | {row['bias']:.2f} | "
                f"{row['coverage']:.0%} | {row['marked']:.0%} | {row['only_real']:.0f} | "
                f"{row['only_predicted']:.0f} |"
            )
    return [*lines, ""]


if __name__ == "__main__":
    main()
