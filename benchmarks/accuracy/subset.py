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
from collections.abc import Iterator
from collections.abc import Sequence
import copy
import csv
from dataclasses import dataclass
import json
import math
from pathlib import Path
from typing import Any
from typing import Literal
import warnings

import numpy as np
from numpy.typing import NDArray
import torch
from torch.func import functional_call
from torch.func import jacrev
from torch.func import vmap
import torch.nn.functional as functional

from benchmarks.accuracy.evaluation import update_summary
from benchmarks.accuracy.tasks import residual
from benchmarks.accuracy.tasks import Tuning
from benchmarks.environment import environment
from optuna_ttp import compute_spectrum
from optuna_ttp import PredictorSettings
from optuna_ttp import Spectrum
from optuna_ttp import TrainingTimePredictor
from optuna_ttp import UnreliablePredictionWarning
from optuna_ttp.dynamics import power_law_modes
from optuna_ttp.dynamics import SampleConvergence
from optuna_ttp.dynamics import Target


_LOSSES = ("cross_entropy", "mse")
_FRACTIONS = (0.7, 0.5, 0.35, 0.25, 0.15)
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
_MAX_STEPS = 40_000
# Of real training, on all samples and on mini-batches.
_MAX_REAL_STEPS = (100, 600)
# Later losses are taken at steps so much further apart.
_SPACING = 1.08


@dataclass(frozen=True)
class Configuration:
    """One configuration of SGD.

    Attributes:
        learning_rate:
            Of SGD.
        batch_size:
            N is full-batch gradient descent.
        momentum:
            Of SGD.
        share:
            Of the largest stable learning rate.
    """

    learning_rate: float
    batch_size: int
    momentum: float
    share: float


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
    n_samples, sizes, n_seeds = (200, (100,), 1) if options.smoke else (2000, _SIZES, 3)
    main_size = sizes[len(sizes) // 2]
    rows: list[dict[str, Any]] = []
    recommended: dict[str, list[int]] = {}
    options.output.mkdir(parents=True, exist_ok=True)
    references = _References(options.output / "subset_references.json", options.smoke)
    for loss in _LOSSES:
        tuning = residual(f"residual-{loss}", 0, n_samples=n_samples, loss=loss)
        spectra = {
            (size, seed): _spectrum(tuning, size, seed)
            for size in sizes
            for seed in range(n_seeds)
        }
        configurations = _configurations(loss, n_samples)
        linear, real = references.of(tuning, configurations)
        for (size, seed), spectrum in spectra.items():
            fractions = _FRACTIONS if size == main_size else (0.5, _MAIN_FRACTION)
            for fraction in fractions:
                predictor = _predictor(spectrum, fraction, n_samples, "frozen")
                # The real network is compared with what a user gets by default.
                grown = predictor
                if size == main_size:
                    grown = _predictor(spectrum, fraction, n_samples, "predicted")
                if size == main_size and fraction == _MAIN_FRACTION:
                    more = predictor.sample_convergence().recommended(n_samples)
                    recommended.setdefault(loss, []).append(more)
                column = _FRACTIONS.index(fraction)
                for k, configuration in enumerate(configurations):
                    rows.append(
                        {
                            "loss": loss,
                            "batch_size": configuration.batch_size,
                            "momentum": configuration.momentum,
                            "share": configuration.share,
                            "learning_rate": f"{configuration.learning_rate:.5g}",
                            "fraction": fraction,
                            "subset_size": size,
                            "subset_seed": seed,
                            "linearised": linear[k][column],
                            "real": real[k][column],
                            "ours_with_growth": _time(grown, configuration),
                            **_predictions(
                                predictor, spectrum, configuration, fraction, n_samples
                            ),
                        }
                    )
            print(f"{loss}: subset of {size}, seed {seed} done", flush=True)
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


class _References:
    """Times of the linearised and of the real network, kept in a file."""

    def __init__(self, path: Path, smoke: bool) -> None:
        self._path = path
        self._smoke = smoke
        # Network and samples, and so the kernel, are the same for both losses.
        self._kernel: torch.Tensor | None = None
        self._known: dict[str, list[float]] = {}
        if path.exists() and not smoke:
            self._known = json.loads(path.read_text())

    def of(
        self, tuning: Tuning, configurations: list[Configuration]
    ) -> tuple[list[list[float]], list[list[float]]]:
        """Train what is not known."""
        keys = [
            f"{tuning.name} learning rate {c.learning_rate:.5g} batch size {c.batch_size} "
            f"momentum {c.momentum:g}"
            for c in configurations
        ]
        missing = [k for k, key in enumerate(keys) if f"linearised {key}" not in self._known]
        if missing:
            kernel = self._kernel = whole_kernel(tuning) if self._kernel is None else self._kernel
            found = linear_times(tuning, kernel, [configurations[k] for k in missing], 0)
            self._keep({f"linearised {keys[k]}": t for k, t in zip(missing, found, strict=True)})
        for key, configuration in zip(keys, configurations, strict=True):
            if f"real {key}" not in self._known:
                times = [math.nan] * len(_FRACTIONS)
                if not self._smoke:
                    times = _real_times(tuning, configuration)
                self._keep({f"real {key}": times})
        linear = [self._known[f"linearised {key}"] for key in keys]
        return linear, [self._known[f"real {key}"] for key in keys]

    def _keep(self, times: dict[str, list[float]]) -> None:
        self._known.update(times)
        if not self._smoke:
            self._path.write_text(json.dumps(self._known, indent=2) + "\n")
        for key in times:
            print(f"{key}: {times[key]}", flush=True)


def whole_kernel(tuning: Tuning, chunk: int = 50) -> torch.Tensor:
    """Return the kernel of all samples, of shape ``(N C, N C)``, by way of the whole Jacobian.

    Args:
        tuning:
            Network and data.
        chunk:
            Samples at a time.

    Returns:
        ``J J^T`` in single precision.
    """
    weights = {name: p.detach() for name, p in tuning.model.named_parameters()}

    def outputs(weights: dict[str, torch.Tensor], x: torch.Tensor) -> Any:
        return functional_call(tuning.model, weights, (x[None],))[0]

    jacobian_of = vmap(jacrev(outputs), in_dims=(None, 0))
    rows = []
    for inputs in tuning.inputs.split(chunk):
        parts = jacobian_of(weights, inputs)
        rows.append(torch.cat([part.flatten(2).flatten(0, 1) for part in parts.values()], dim=1))
    jacobian = torch.cat(rows)
    return jacobian @ jacobian.T


def linear_times(
    tuning: Tuning,
    kernel: torch.Tensor,
    configurations: Sequence[Configuration],
    seed: int,
) -> list[list[float]]:
    """Train the linearised network on all samples.

    A step moves all outputs by the kernel's columns of the batch times the gradient of the batch's
    loss with respect to its outputs.

    Args:
        tuning:
            Network and data.
        kernel:
            Of all samples.
        configurations:
            Of SGD.
        seed:
            Of the order of the samples.

    Returns:
        For each configuration the step at which each target is reached; infinity if it is not.
    """
    times: dict[int, list[float]] = {}
    for size in {c.batch_size for c in configurations}:
        members = [k for k, c in enumerate(configurations) if c.batch_size == size]
        curves = _linear_curves(tuning, kernel, [configurations[k] for k in members], size, seed)
        for k, curve in zip(members, curves, strict=True):
            times[k] = _passages(np.arange(len(curve), dtype=float), curve)
    return [times[k] for k in range(len(configurations))]


def _linear_curves(
    tuning: Tuning, kernel: torch.Tensor, members: list[Configuration], size: int, seed: int
) -> list[NDArray[np.float64]]:
    """Losses over all samples at every step, until the deepest target."""
    with torch.no_grad():
        initial = torch.cat([tuning.model(x) for x in tuning.inputs.split(250)])
    n, c = initial.shape
    rates = torch.tensor([m.learning_rate for m in members])[:, None]
    masses = torch.tensor([m.momentum for m in members])[:, None]
    outputs = initial.repeat(len(members), 1, 1)
    velocity = torch.zeros(len(members), n * c)
    curves: list[list[float]] = [[] for _ in members]
    active = list(range(len(members)))
    batches = _orders(n, size, seed)
    for _ in range(_MAX_STEPS + 1):
        losses = [_loss(tuning, o).item() for o in outputs]
        for k, loss in zip(active, losses, strict=True):
            curves[k].append(loss)
        on = [
            j for j, k in enumerate(active) if losses[j] > 0.999 * min(_FRACTIONS) * curves[k][0]
        ]
        if not on:
            break
        if len(on) < len(active):
            outputs, velocity, rates, masses = (t[on] for t in (outputs, velocity, rates, masses))
            active = [active[j] for j in on]
        batch = next(batches)
        own = outputs[:, batch]
        target = tuning.labels[batch]
        if tuning.labels.is_floating_point():
            gradient = (own - target) * (2.0 / (c * len(batch)))
        else:
            gradient = (own.softmax(dim=2) - functional.one_hot(target, c)) / len(batch)
        index = (batch[:, None] * c + torch.arange(c)).flatten()
        columns = kernel if len(batch) == n else kernel[index]
        velocity = masses * velocity + gradient.flatten(1) @ columns
        outputs = outputs - (rates * velocity).view_as(outputs)
    return [np.array(curve) for curve in curves]


def _orders(n_samples: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        if size == n_samples:
            yield torch.arange(n_samples)
        else:
            yield from torch.randperm(n_samples, generator=generator).split(size)


def real_curve(
    tuning: Tuning, configuration: Configuration, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Train the network.

    Args:
        tuning:
            Network and data.
        configuration:
            Of SGD.
        seed:
            Of the order of the samples.

    Returns:
        Steps, and losses over all samples.
    """
    model = copy.deepcopy(tuning.model)
    optimiser = torch.optim.SGD(
        model.parameters(), lr=configuration.learning_rate, momentum=configuration.momentum
    )
    n = len(tuning.labels)
    batches = _orders(n, configuration.batch_size, seed)
    steps: list[float] = []
    losses: list[float] = []
    wanted = 0
    whole = configuration.batch_size == n
    for step in range(_MAX_REAL_STEPS[0 if whole else 1] + 1):
        if step == wanted and not whole:
            with torch.no_grad():
                outputs = torch.cat([model(x) for x in tuning.inputs.split(250)])
            steps.append(step)
            losses.append(_loss(tuning, outputs).item())
            wanted = max(step + 1, int(step * _SPACING))
        optimiser.zero_grad()
        total = 0.0
        batch = next(batches)
        for part in batch.split(250):
            loss = tuning.loss(model(tuning.inputs[part]), tuning.labels[part])
            loss = loss * (len(part) / len(batch))
            loss.backward()
            total += loss.item()
        if whole:
            steps.append(step)
            losses.append(total)
        if not math.isfinite(losses[-1]) or losses[-1] <= 0.999 * min(_FRACTIONS) * losses[0]:
            break
        optimiser.step()
    return np.array(steps), np.array(losses)


def _real_times(tuning: Tuning, configuration: Configuration) -> list[float]:
    n_orders = 1 if configuration.batch_size == len(tuning.labels) else 2
    runs = [_passages(*real_curve(tuning, configuration, seed)) for seed in range(n_orders)]
    return [_geometric_mean(column) for column in zip(*runs, strict=True)]


def _passages(steps: NDArray[np.float64], curve: NDArray[np.float64]) -> list[float]:
    return [Target("loss", f * curve[0]).first_passage(steps, curve) for f in _FRACTIONS]


def _loss(tuning: Tuning, outputs: torch.Tensor) -> torch.Tensor:
    return tuning.loss(outputs, tuning.labels)


def _spectrum(tuning: Tuning, size: int, seed: int) -> Spectrum:
    task = tuning.task().subset(size, seed=seed)
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
            max_steps=10 * _MAX_STEPS,
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
    found = {"ours": ours, "extrapolated": ours * math.exp(longer)}
    for alpha in _ALPHAS:
        wanted = spectrum.loss.kind == "mse" and configuration.batch_size == n_samples
        found[f"power_law_{alpha:g}"] = (
            _power_law_time(spectrum, configuration, fraction, n_samples, alpha)
            if wanted
            else math.nan
        )
    return found


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
    steps = np.arange(10 * _MAX_STEPS + 1)
    low, high = 0, len(steps) - 1
    while low < high:
        middle = (low + high) // 2
        left = float((weights * np.exp(-rates * middle)).sum())
        low, high = (low, middle) if left <= fraction * total else (middle + 1, high)
    return float(low) if low < len(steps) - 1 else math.inf


def _geometric_mean(times: Sequence[float]) -> float:
    return round(float(np.exp(np.mean(np.log(np.maximum(times, 1e-9))))), 2)


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
        for fraction in _FRACTIONS:
            mine = chosen(subset_size=main_size, fraction=fraction, loss=loss)
            found = {m: _errors(mine, m, "linearised") for m in methods}
            found["ours against the real network"] = _errors(mine, "ours_with_growth", "real")
            summary["by_target"].setdefault(loss, {})[f"{fraction:.0%}"] = found
        for size in sorted({r["subset_size"] for r in rows}):
            mine = chosen(subset_size=size, fraction=_MAIN_FRACTION, loss=loss)
            summary["by_subset_size"].setdefault(loss, {})[str(size)] = {
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
    where, size, n = summary["environment"], summary["subset_size"], summary["n_samples"]
    lines = [
        f"Mean error of the time on {n} samples, predicted from {size} of them, against the "
        "linearised network on all samples (in brackets: predicted over real):",
        "",
        "| loss | target | ours | extrapolated | power laws, alpha "
        + ", ".join(f"{alpha:g}" for alpha in _ALPHAS)
        + " | ours against the real network |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for loss, targets in summary["by_target"].items():
        for target, found in targets.items():
            laws = ", ".join(_cell(found[f"power_law_{alpha:g}"]) for alpha in _ALPHAS)
            lines.append(
                f"| {loss} | {target} | {_cell(found['ours'])} | "
                f"{_cell(found['extrapolated'])} | {laws} | "
                f"{_cell(found['ours against the real network'])} |"
            )
    lines += [
        "",
        f"To {_MAIN_FRACTION:.0%} of the initial loss:",
        "",
        "| loss | samples | ours | extrapolated |",
        "| --- | --- | --- | --- |",
    ]
    for loss, sizes in summary["by_subset_size"].items():
        for own, found in sizes.items():
            lines.append(
                f"| {loss} | {own} | {_cell(found['ours'])} | {_cell(found['extrapolated'])} |"
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
