"""Training time on 2,000 samples, predicted from the spectrum of 250 of them.

The residual network, cross-entropy and mean squared error, all samples and batch size 50, momentum
0 and 0.9, learning rates 0.1 and 0.3 of the largest stable one, and three random subsets. The time
to a share of the initial loss is compared with

- that of the linearised network on all samples, which has no error but the subset's: its outputs
  are trained with SGD step by step with the whole kernel, without an eigendecomposition;
- that of the real network.

The first is predicted with a frozen kernel, the second with the kernel growth that is predicted by
default. Our prediction (``n_samples=2000``) takes the subset as it is, with the batch noise of
2,000 samples. Beside it stand the same with the time extrapolated (Aitken's rule over the times of
an eighth to all of the subset), and, for the mean squared error on all samples, the power laws of
Zancato et al., NeurIPS 2020, appendix D, with their effective learning rate. Subsets of 125 and
500 samples show how fast the error falls.
``subset_error`` in the JSON is the mean absolute relative error of our
times to 25 % of the initial loss against the linearised network on all samples, over losses,
configurations and subsets of 250; ``subset_error_real`` is that against the real network. Writes
``subset.csv``, ``subset.json`` and ``subset.md``, and keeps the times of the linearised and of the
real network, which take most of the time, in ``subset_references.json``.

Run with ``python -m benchmarks.accuracy.subset``.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path
from typing import Any
from typing import Literal
import warnings

import numpy as np
import torch

from benchmarks.accuracy.evaluation import update_summary
from benchmarks.accuracy.power_laws import power_law_modes
from benchmarks.accuracy.subset_references import Configuration
from benchmarks.accuracy.subset_references import FRACTIONS
from benchmarks.accuracy.subset_references import MAX_STEPS
from benchmarks.accuracy.subset_references import References
from benchmarks.accuracy.tasks import residual
from benchmarks.accuracy.tasks import Tuning
from benchmarks.environment import environment
from optuna_ttp import compute_spectrum
from optuna_ttp import PredictorSettings
from optuna_ttp import Spectrum
from optuna_ttp import TrainingTimePredictor
from optuna_ttp import UnreliablePredictionWarning
from optuna_ttp.dynamics import SampleConvergence


_LOSSES = ("cross_entropy", "mse")
_MAIN_FRACTION = 0.25
_MAIN_SIZE = 250
_SIZES = (125, _MAIN_SIZE, 500)
_BATCH = 50
# Predicted from the first subset when the benchmark was made; written down so that the learning
# rates stay the same. By whether all samples are a batch, and momentum.
_LARGEST = {
    "cross_entropy": {
        (True, 0.0): 0.1314280,
        (True, 0.9): 0.2497132,
        (False, 0.0): 0.1287719,
        (False, 0.9): 0.1438865,
    },
    "mse": {
        (True, 0.0): 0.06647092,
        (True, 0.9): 0.1262947,
        (False, 0.0): 0.06509978,
        (False, 0.9): 0.06556697,
    },
}
_ALPHAS = (0.1, 0.15, 0.2)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="100 samples of 200, no real training"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    n_samples, subset_sizes, n_seeds = (200, (100,), 1) if options.smoke else (2000, _SIZES, 3)
    main_size = subset_sizes[len(subset_sizes) // 2]
    rows: list[dict[str, Any]] = []
    recommended: dict[str, list[int]] = {}
    options.output.mkdir(parents=True, exist_ok=True)
    references = References(options.output / "subset_references.json", options.smoke)
    for loss in _LOSSES:
        tuning = residual(f"residual-{loss}", 0, n_samples=n_samples, loss=loss)
        spectra = {
            (subset_size, seed): _spectrum(tuning, subset_size, seed)
            for subset_size in subset_sizes
            for seed in range(n_seeds)
        }
        configurations = _configurations(loss, n_samples)
        linear, real = references.of(tuning, configurations)
        for (subset_size, seed), spectrum in spectra.items():
            fractions = FRACTIONS if subset_size == main_size else (0.5, _MAIN_FRACTION)
            for fraction in fractions:
                predictor = _predictor(spectrum, fraction, n_samples, "frozen")
                # The real network is compared with what a user gets by default.
                grown = predictor
                if subset_size == main_size:
                    grown = _predictor(spectrum, fraction, n_samples, "predicted")
                if subset_size == main_size and fraction == _MAIN_FRACTION:
                    more = predictor.sample_convergence().recommended(n_samples)
                    recommended.setdefault(loss, []).append(more)
                column = FRACTIONS.index(fraction)
                for k, configuration in enumerate(configurations):
                    rows.append(
                        {
                            "loss": loss,
                            "batch_size": configuration.batch_size,
                            "momentum": configuration.momentum,
                            "share": configuration.share,
                            "learning_rate": f"{configuration.learning_rate:.5g}",
                            "fraction": fraction,
                            "subset_size": subset_size,
                            "subset_seed": seed,
                            "linearised": linear[k][column],
                            "real": real[k][column],
                            "ours_with_growth": _time(grown, configuration),
                            **_predictions(
                                predictor, spectrum, configuration, fraction, n_samples
                            ),
                        }
                    )
            print(f"{loss}: subset of {subset_size}, seed {seed} done", flush=True)
    with (options.output / "subset.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    summary = {
        "environment": environment(),
        "subset_size": main_size,
        "n_samples": n_samples,
        **_summary(rows, main_size),
        "recommended_samples": recommended,
    }
    (options.output / "subset.json").write_text(json.dumps(summary, indent=2) + "\n")
    if not options.smoke:
        keys = ("subset_error", "subset_error_real")
        update_summary(options.output, {key: summary[key] for key in keys})
    table = _table(summary)
    (options.output / "subset.md").write_text(table)
    print(table)


def _spectrum(tuning: Tuning, subset_size: int, seed: int) -> Spectrum:
    task = tuning.task().subset(subset_size, seed=seed)
    return compute_spectrum(task, measure_speed=False, show_progress_bar=False)


def _predictor(
    spectrum: Spectrum, fraction: float, n_samples: int, growth: Literal["predicted", "frozen"]
) -> TrainingTimePredictor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliablePredictionWarning)
        return TrainingTimePredictor(
            spectrum,
            target_fraction=fraction,
            n_samples=n_samples,
            max_steps=10 * MAX_STEPS,
            settings=PredictorSettings(kernel_growth=growth),
        )


def _configurations(loss: str, n_samples: int) -> list[Configuration]:
    return [
        Configuration(share * largest, n_samples if whole else _BATCH, momentum, share)
        for (whole, momentum), largest in _LARGEST[loss].items()
        for share in (0.1, 0.3)
    ]


def _time(predictor: TrainingTimePredictor, configuration: Configuration) -> float:
    prediction = predictor.predict(
        configuration.learning_rate, configuration.batch_size, configuration.momentum
    )
    return float(prediction.steps)


def _predictions(
    predictor: TrainingTimePredictor,
    spectrum: Spectrum,
    configuration: Configuration,
    fraction: float,
    n_samples: int,
) -> dict[str, float]:
    ours = _time(predictor, configuration)
    longer = _extrapolated(predictor.sample_convergence(), n_samples)
    times = {"ours": ours, "extrapolated": ours * math.exp(longer)}
    for alpha in _ALPHAS:
        wanted = spectrum.loss.kind == "mse" and configuration.batch_size == n_samples
        times[f"power_law_{alpha:g}"] = (
            _power_law_time(spectrum, configuration, fraction, n_samples, alpha)
            if wanted
            else math.nan
        )
    return times


def _extrapolated(convergence: SampleConvergence, n_samples: int) -> float:
    """Logarithm of how much longer it takes, where the last changes shrink by their ratio."""
    first, second = np.diff(convergence.log_times[-3:])
    doublings = math.log2(n_samples / convergence.n_samples[-1])
    ratio = float(np.clip(second / first, 0.0, 1.0)) if first > 0 else 0.0
    geometric = doublings if ratio > 0.999 else ratio * (1 - ratio**doublings) / (1 - ratio)
    return max(float(second), 0.0) * geometric


def _power_law_time(
    spectrum: Spectrum, configuration: Configuration, fraction: float, n_samples: int, alpha: float
) -> float:
    """Time by the paper's power laws, with momentum by its effective learning rate."""
    dy = (np.asarray(spectrum.targets) - spectrum.initial_outputs).ravel().astype(np.float64)
    projections = (dy @ spectrum.eigenvectors.astype(np.float64)) ** 2
    eigenvalues, weights = power_law_modes(
        spectrum.eigenvalues,
        projections,
        float(dy @ dy),
        spectrum.n_samples,
        n_samples,
        alpha=alpha,
    )
    effective = configuration.learning_rate / (1.0 - configuration.momentum)
    x = effective * 2.0 * eigenvalues / (n_samples * spectrum.n_outputs)
    with np.errstate(divide="ignore"):
        rates = -2.0 * (np.log(np.abs(1.0 - x)) if configuration.momentum == 0.0 else -x)
    total = float(weights.sum())
    steps = np.arange(10 * MAX_STEPS + 1)
    low, high = 0, len(steps) - 1
    while low < high:
        middle = (low + high) // 2
        left = float((weights * np.exp(-rates * middle)).sum())
        low, high = (low, middle) if left <= fraction * total else (middle + 1, high)
    return float(low) if low < len(steps) - 1 else math.inf


def _summary(rows: list[dict[str, Any]], main_size: int) -> dict[str, Any]:
    def chosen(**wanted: Any) -> list[dict[str, Any]]:
        return [r for r in rows if all(r[k] == v for k, v in wanted.items())]

    at_main = chosen(subset_size=main_size, fraction=_MAIN_FRACTION)
    linear, real = (
        _errors(at_main, "ours", "linearised"),
        _errors(at_main, "ours_with_growth", "real"),
    )
    summary: dict[str, Any] = {
        "subset_error": linear.get("mean_absolute_error"),
        "subset_error_real": real.get("mean_absolute_error"),
        "linearisation_error": {
            loss: _errors(
                chosen(subset_size=main_size, fraction=_MAIN_FRACTION, loss=loss, subset_seed=0),
                "linearised",
                "real",
            )
            for loss in _LOSSES
        },
        "by_target": {},
        "by_subset_size": {},
    }
    methods = ("ours", "extrapolated", *(f"power_law_{alpha:g}" for alpha in _ALPHAS))
    for loss in _LOSSES:
        for fraction in FRACTIONS:
            mine = chosen(subset_size=main_size, fraction=fraction, loss=loss)
            by_method = {m: _errors(mine, m, "linearised") for m in methods}
            by_method["ours against the real network"] = _errors(mine, "ours_with_growth", "real")
            summary["by_target"].setdefault(loss, {})[f"{fraction:.0%}"] = by_method
        for subset_size in sorted({r["subset_size"] for r in rows}):
            mine = chosen(subset_size=subset_size, fraction=_MAIN_FRACTION, loss=loss)
            summary["by_subset_size"].setdefault(loss, {})[str(subset_size)] = {
                m: _errors(mine, m, "linearised") for m in methods
            }
    return summary


def _errors(rows: list[dict[str, Any]], upper: str, lower: str) -> dict[str, Any]:
    """Errors where both times are known."""
    pairs = np.array([(r[upper], r[lower]) for r in rows], dtype=np.float64).reshape(-1, 2)
    good = np.isfinite(pairs).all(axis=1)
    if not good.any():
        return {"found": 0}
    ratio = pairs[good, 0] / pairs[good, 1]
    error = np.abs(ratio - 1.0)
    return {
        "found": int(good.sum()),
        "mean_absolute_error": round(float(error.mean()), 4),
        "largest_absolute_error": round(float(error.max()), 4),
        "bias_factor": round(float(np.exp(np.log(ratio).mean())), 4),
    }


def _table(summary: dict[str, Any]) -> str:
    where, subset_size, n = summary["environment"], summary["subset_size"], summary["n_samples"]
    lines = [
        f"Mean error of the time on {n} samples, predicted from {subset_size} of them, against "
        "the linearised network on all samples (in brackets: predicted over real):",
        "",
        "| loss | target | ours | extrapolated | power laws, alpha "
        + ", ".join(f"{alpha:g}" for alpha in _ALPHAS)
        + " | ours against the real network |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for loss, targets in summary["by_target"].items():
        for target, by_method in targets.items():
            laws = ", ".join(_cell(by_method[f"power_law_{alpha:g}"]) for alpha in _ALPHAS)
            lines.append(
                f"| {loss} | {target} | {_cell(by_method['ours'])} | "
                f"{_cell(by_method['extrapolated'])} | {laws} | "
                f"{_cell(by_method['ours against the real network'])} |"
            )
    lines += [
        "",
        f"To {_MAIN_FRACTION:.0%} of the initial loss:",
        "",
        "| loss | samples | ours | extrapolated |",
        "| --- | --- | --- | --- |",
    ]
    for loss, subset_sizes in summary["by_subset_size"].items():
        for n_samples, by_method in subset_sizes.items():
            lines.append(
                f"| {loss} | {n_samples} | {_cell(by_method['ours'])} | "
                f"{_cell(by_method['extrapolated'])} |"
            )
    lines += [
        "",
        f"Measured {where['date']} with `{where['command']}`. `recommended({n})` says "
        + ", ".join(f"{v} for {k}" for k, v in summary["recommended_samples"].items())
        + " (one number a subset).",
        "",
    ]
    return "\n".join(lines)


def _cell(errors: dict[str, Any]) -> str:
    if not errors["found"]:
        return "-"
    return f"{errors['mean_absolute_error']:.0%} ({errors['bias_factor']:.2f})"


if __name__ == "__main__":
    main()
