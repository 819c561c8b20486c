"""The paper's protocol: the time to come within epsilon of the loss at step 150.

ImageNet-pretrained EfficientNet-Lite0 (the paper: ResNet-18 and -34), random draws of five classes
of Fashion-MNIST and of the digits, 40 images a class (the paper: 150; two cores), RGB, 64 pixels,
frozen batch-norm statistics, no augmentation. Full-batch gradient descent (GD) and mini-batch SGD;
learning rates over two decades up to the stability limit, momentum 0, 0.9 and 0.95, batch sizes 8,
16 and 50. The training time is the first step at which the training loss (over all samples) is
within epsilon of its own value at step T = 150, at ten levels from 1 to 40 % of the change of the
loss from step 0 to T (the paper does not say which ten, nor of what).

The real runs are those of ``python -m benchmarks.accuracy.record``. Writes
``paper_protocol.csv``, ``.json``, ``.md`` and ``.png``, and its figures into ``summary.json``.

Run with ``python -m benchmarks.accuracy.paper_protocol``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch

from benchmarks.accuracy.evaluation import baselines
from benchmarks.accuracy.evaluation import by_method
from benchmarks.accuracy.evaluation import full_curve
from benchmarks.accuracy.evaluation import geometric_mean_over_seeds
from benchmarks.accuracy.evaluation import NAMES
from benchmarks.accuracy.evaluation import Point
from benchmarks.accuracy.evaluation import spectrum_of
from benchmarks.accuracy.evaluation import table
from benchmarks.accuracy.evaluation import update_summary
from benchmarks.accuracy.evaluation import write_points
from benchmarks.accuracy.record import HORIZON
from benchmarks.accuracy.record import read
from benchmarks.accuracy.record import RESULTS
from benchmarks.environment import environment
from optuna_ttp import PredictorSettings
from optuna_ttp import Spectrum
from optuna_ttp import TrainingTimePredictor
from optuna_ttp.dynamics import Target


LEVELS = (0.01, 0.02, 0.03, 0.04, 0.10, 0.16, 0.22, 0.28, 0.34, 0.40)
_TASKS = (
    "efficientnet-fashion-0",
    "efficientnet-digits-0",
    "efficientnet-fashion-1",
    "efficientnet-digits-1",
)
_N_SEEDS = 4


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--store", help="URL of the spectrum store; the default one by default")
    parser.add_argument("--curves", type=Path, default=RESULTS / "curves")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="the small digits network only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    points: dict[str, list[Point]] = {"GD": [], "SGD": []}
    n_short = 0
    for name in ("digits-0",) if options.smoke else _TASKS:
        spectrum = spectrum_of(name, options.store)
        recording = read(options.curves / f"{name}.npz")
        complete = [
            k for k in range(len(recording.runs)) if full_curve(recording, k)[0][-1] >= HORIZON
        ]
        n_short += len(recording.runs) - len(complete)
        complete = complete[:: 4 if options.smoke else 1]
        for mode in points:
            chosen = [
                k
                for k in complete
                if (recording.runs[k].batch_size == spectrum.n_samples) == (mode == "GD")
            ]
            runs = [recording.runs[k] for k in chosen]
            real = np.array([_times(*full_curve(recording, k, HORIZON)) for k in chosen])
            if not runs:
                continue
            for method in ("linear", "noiseless", "sde", "ode"):
                if method == "noiseless" and mode == "GD":
                    continue
                predicted = _predicted(spectrum, method, runs)
                points[mode] += [
                    Point(name, k, method, level, real[row, column], predicted[row, column])
                    for row, k in enumerate(chosen)
                    for column, level in enumerate(LEVELS)
                ]
            points[mode] += [
                Point(p.task, chosen[p.run], p.method, p.target, p.real, p.predicted)
                for p in baselines(name, runs, real, LEVELS, longest=HORIZON)
            ]
        print(f"{name} done", flush=True)
    _write(points, n_short, options.output)


def _times(steps: NDArray[np.float64], losses: NDArray[np.float64]) -> list[float]:
    return [Target("loss", level, settled=True).first_passage(steps, losses) for level in LEVELS]


def _predicted(spectrum: Spectrum, method: str, runs: list[Any]) -> NDArray[np.float64]:
    """Predicted times of K runs, of shape (K, levels)."""
    rates = [r.learning_rate for r in runs]
    momenta = [r.momentum for r in runs]
    batch_sizes = [r.batch_size for r in runs]
    if method == "noiseless":
        batch_sizes = [spectrum.n_samples] * len(runs)

    def times_of_seed(seed: int) -> NDArray[np.float64]:
        predictor = TrainingTimePredictor(
            spectrum,
            target_epsilon=0.1,
            max_steps=HORIZON,
            settings=PredictorSettings(
                method=method if method in ("sde", "ode") else "linear",  # type: ignore[arg-type]
                n_seeds=1,
                seed=seed,
            ),
        )
        curves = predictor.predict(rates, batch_sizes, momenta, full_curve=True)
        return np.array(
            [
                _times(steps[np.isfinite(steps)], losses[np.isfinite(steps)])
                for steps, losses in zip(curves.curve_steps, curves.curve_losses, strict=True)
            ]
        )

    noisy = method in ("linear", "sde") and min(batch_sizes) < spectrum.n_samples
    return geometric_mean_over_seeds(times_of_seed, _N_SEEDS if noisy else 1)


def _write(points: dict[str, list[Point]], n_short: int, output: Path) -> None:
    results = {mode: by_method(of_mode) for mode, of_mode in points.items()}
    output.mkdir(parents=True, exist_ok=True)
    write_points(
        output / "paper_protocol.csv",
        [p for of_mode in points.values() for p in of_mode],
        leave_out=("c/eta_e", "c/eta_e+lag", "threshold", "seed"),
    )
    where = environment()
    document = {"environment": where, "runs_that_ended_early": n_short, **results}
    (output / "paper_protocol.json").write_text(json.dumps(document, indent=2) + "\n")
    for_summary: dict[str, float] = {}
    for mode, prefix in (("GD", "paper_gd"), ("SGD", "paper_sgd")):
        for method, start in (("linear", ""), ("ode" if mode == "GD" else "sde", "sde_")):
            for name in ("mape", "p95") if mode == "GD" else ("mape", "p95", "tau"):
                if method in results[mode]:
                    for_summary[f"{start}{prefix}_{name}"] = results[mode][method][name]
    update_summary(output, for_summary)
    lines = []
    for mode, of_mode in results.items():
        if of_mode:
            n_runs = int(of_mode["linear"]["n_runs"])
            lines += [f"{mode}, {n_runs} runs:", "", *table(of_mode), ""]
    lines += [
        f"Measured {where['date']} with `{where['command']}`; {n_short} runs blew up before step "
        f"{HORIZON} and are left out.",
        "",
    ]
    (output / "paper_protocol.md").write_text("\n".join(lines))
    print("\n".join(lines))
    _draw(points, output / "paper_protocol.png")


def _draw(points: dict[str, list[Point]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(9, 9), sharex=True, sharey=True)
    for row, (mode, of_mode) in zip(panels, points.items(), strict=True):
        methods = ("linear", "ode" if mode == "GD" else "sde")
        for panel, method in zip(row, methods, strict=True):
            for task in sorted({p.task for p in of_mode}):
                chosen = [p for p in of_mode if p.method == method and p.task == task]
                panel.scatter(
                    [p.predicted for p in chosen], [p.real for p in chosen], s=8, label=task
                )
            panel.plot([0, HORIZON], [0, HORIZON], color="black", linewidth=0.8)
            panel.set_title(f"{mode}, {NAMES[method]}", fontsize=9)
            panel.set_xlabel("predicted training time in steps")
            panel.set_ylabel("real training time in steps")
    panels[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
