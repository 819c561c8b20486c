"""Errors of predicted training times, and the baselines that every table shows beside ours."""

from __future__ import annotations

from collections.abc import Callable
import csv
from dataclasses import asdict
from dataclasses import dataclass
import json
import math
from pathlib import Path
from typing import Any
import warnings

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy.record import Recording
from benchmarks.accuracy.record import Run
from benchmarks.accuracy.tasks import load
from optuna_ttp import Spectrum
from optuna_ttp import SpectrumStore


# What the tables call the methods.
NAMES = {
    "linear": "ours: exact linear simulation",
    "noiseless": "ours without mini-batch noise",
    "sde": "the paper's equation (SDE)",
    "ode": "the paper's equation without noise (ODE)",
    "threshold": "median real time of the other runs at the threshold",
    "c/eta_e": "`c / eta_e`, calibrated on one run",
    "c/eta_e+lag": "`c / eta_e + m / (1 - m)`, calibrated on one run",
    "seed": "the same run with another order of the samples",
}


@dataclass(frozen=True)
class Point:
    """A predicted and a real training time.

    Attributes:
        task:
            Name of the task.
        run:
            Number of the run in its recording.
        method:
            A key of :data:`NAMES`.
        target:
            The target, or epsilon.
        real:
            Steps of real training; infinite where it did not get there.
        predicted:
            Predicted steps.
        low:
            Lower end of the predicted interval, NaN where there is none.
        high:
            Its upper end.
        reliable:
            Whether the prediction is not marked as unreliable.
    """

    task: str
    run: int
    method: str
    target: float
    real: float
    predicted: float
    low: float = math.nan
    high: float = math.nan
    reliable: bool = True

    @property
    def counts(self) -> bool:
        """Whether both times are there, so that they can be compared."""
        return math.isfinite(self.real) and math.isfinite(self.predicted) and self.real > 0


def spectrum_of(name: str, url: str | None) -> Spectrum:
    """Return the spectrum of a task, computed where the store does not have it.

    Args:
        name:
            Of the task.
        url:
            Of the spectrum store; the default one where it is :obj:`None`.

    Returns:
        The spectrum, probed.
    """
    store = SpectrumStore() if url is None else SpectrumStore(url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return store.get_or_compute(load(name).task(), measure_speed=False)


def baselines(
    task: str,
    runs: list[Run],
    real: NDArray[np.float64],
    targets: tuple[float, ...],
    *,
    longest: float = math.inf,
) -> list[Point]:
    """Return what rules without a spectrum predict.

    The rules with a constant are calibrated on one run, each in turn, and asked for all others:
    the geometric mean of these answers would hide their spread, so each is a point of its own.

    Args:
        task:
            Its name.
        runs:
            K configurations.
        real:
            Real training times, shape (K, targets).
        targets:
            The targets.
        longest:
            Times are cut off there.

    Returns:
        Points of the methods ``"threshold"``, ``"c/eta_e"``, ``"c/eta_e+lag"`` and ``"seed"``.
    """
    effective = np.array([r.learning_rate / (1.0 - r.momentum) for r in runs])
    lag = np.array([r.momentum / (1.0 - r.momentum) for r in runs])
    points = []
    for k, run in enumerate(runs):
        others = [j for j in range(len(runs)) if not _same(runs[j], run)]
        for column, target in enumerate(targets):
            real_time = float(real[k, column])
            known = [j for j in others if np.isfinite(real[j, column])]
            if known:
                middle = float(np.median(real[known, column]))
                points.append(Point(task, k, "threshold", target, real_time, middle))
            for j in known:
                c = real[j, column] * effective[j]
                points.append(
                    Point(task, k, "c/eta_e", target, real_time, min(longest, c / effective[k]))
                )
                c = max(0.0, real[j, column] - lag[j]) * effective[j]
                shifted = min(longest, c / effective[k] + lag[k])
                points.append(Point(task, k, "c/eta_e+lag", target, real_time, shifted))
            points += [
                Point(task, k, "seed", target, real_time, float(real[j, column]))
                for j in range(len(runs))
                if j != k and _same(runs[j], run)
            ]
    return points


def _same(one: Run, other: Run) -> bool:
    """Whether two runs differ in the order of the samples only."""
    return (one.learning_rate, one.batch_size, one.momentum) == (
        other.learning_rate,
        other.batch_size,
        other.momentum,
    )


def full_curve(
    recording: Recording, k: int, last_step: float = math.inf
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return steps and training losses over all samples of a recorded run.

    Args:
        recording:
            The runs.
        k:
            The run.
        last_step:
            Where the curve is cut off. At its end by default.

    Returns:
        Two arrays of the same length.
    """
    steps, losses = recording.full_steps[k], recording.full_losses[k]
    good = np.isfinite(losses) & (steps <= last_step)
    return steps[good], losses[good]


def figures(points: list[Point], *, seed: int = 0, n_resamples: int = 1000) -> dict[str, float]:
    """Return the errors of one method.

    Args:
        points:
            Of one method.
        seed:
            For the bootstrap over runs.
        n_resamples:
            Of the bootstrap.

    Returns:
        ``mape`` (mean absolute percentage error, as a fraction) with the ends ``mape_low`` and
        ``mape_high`` of its 90 % bootstrap interval over runs, ``median``, ``p95`` (95th
        percentile) likewise, ``within_20`` (share of errors up to 20 %), ``bias`` (geometric mean
        of predicted over real), ``tau`` (Kendall's, over the runs at one target, the mean over
        targets and tasks), ``n_points``, ``n_runs``, ``only_real`` (reached although predicted
        not to), ``only_predicted`` (the run ended before it got there); where there are intervals
        ``coverage`` (share of real times within), ``coverage_or_marked`` (or marked as unreliable)
        and ``marked``.
    """
    both = [p for p in points if p.counts]
    result: dict[str, float] = {
        "n_points": len(both),
        "n_runs": len({(p.task, p.run) for p in both}),
        "only_real": sum(math.isfinite(p.real) and math.isinf(p.predicted) for p in points),
        "only_predicted": sum(math.isinf(p.real) and math.isfinite(p.predicted) for p in points),
    }
    if not both:
        return result
    ratio = np.array([p.predicted / p.real for p in both])
    error = np.abs(ratio - 1.0)
    result |= {
        "mape": float(error.mean()),
        "median": float(np.median(error)),
        "p95": float(np.quantile(error, 0.95)),
        "within_20": float((error <= 0.2).mean()),
        "bias": float(np.exp(np.log(np.maximum(ratio, 1e-3)).mean())),
        "tau": _mean_tau(both),
    }
    owners = np.unique([f"{p.task} {p.run}" for p in both], return_inverse=True)[1]
    groups = [np.flatnonzero(owners == g) for g in range(owners.max() + 1)]
    rng = np.random.default_rng(seed)
    for name, statistic in (("mape", np.mean), ("p95", lambda e: np.quantile(e, 0.95))):
        resampled = [
            statistic(
                error[np.concatenate([groups[g] for g in rng.choice(len(groups), len(groups))])]
            )
            for _ in range(n_resamples)
        ]
        result[f"{name}_low"], result[f"{name}_high"] = (
            float(q) for q in np.quantile(resampled, (0.05, 0.95))
        )
    reached = [p for p in points if math.isfinite(p.real) and not math.isnan(p.low)]
    if reached:
        inside = np.array([p.low <= p.real <= p.high for p in reached])
        marked = np.array([not p.reliable for p in reached])
        result |= {
            "coverage": float(inside.mean()),
            "coverage_or_marked": float((inside | marked).mean()),
            "marked": float(marked.mean()),
        }
    return result


def _mean_tau(points: list[Point]) -> float:
    from scipy.stats import kendalltau

    values = []
    for key in {(p.task, p.target) for p in points}:
        at_target = [p for p in points if (p.task, p.target) == key]
        if len({p.run for p in at_target}) >= 4:
            tau = kendalltau(
                [p.predicted for p in at_target], [p.real for p in at_target]
            ).statistic
            values.append(0.0 if math.isnan(tau) else float(tau))
    return float(np.mean(values)) if values else math.nan


def by_method(points: list[Point]) -> dict[str, dict[str, float]]:
    """Return the figures of every method that occurs, in the order of :data:`NAMES`."""
    by_name = {m: [p for p in points if p.method == m] for m in NAMES}
    return {m: figures(of_method) for m, of_method in by_name.items() if of_method}


def table(results: dict[str, dict[str, float]]) -> list[str]:
    """Return the lines of a Markdown table with one row a method."""
    lines = [
        "| | mean error (90 % bootstrap interval) | median | 95th percentile | within 20 % | "
        "predicted over real | Kendall's tau |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, values in results.items():
        if "mape" not in values:
            continue
        lines.append(
            f"| {NAMES[method]} | {values['mape']:.1%} ({values['mape_low']:.1%} to "
            f"{values['mape_high']:.1%}) | {values['median']:.1%} | {values['p95']:.1%} | "
            f"{values['within_20']:.0%} | {values['bias']:.2f} | {values['tau']:.2f} |"
        )
    return lines


def write_points(path: Path, points: list[Point], *, leave_out: tuple[str, ...] = ()) -> None:
    """Write raw results.

    Args:
        path:
            Of a CSV file.
        points:
            What to write.
        leave_out:
            Methods that follow from the others' real times.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        rows = [asdict(p) for p in points if p.method not in leave_out]
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        for row in rows:
            writer.writerow({k: _short(v) for k, v in row.items()})


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def update_summary(folder: Path, figures_to_keep: dict[str, float]) -> None:
    """Put figures into ``summary.json``, leaving those of other benchmarks there.

    Args:
        folder:
            Of the results.
        figures_to_keep:
            By name.
    """
    path = folder / "summary.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known |= {name: round(float(value), 5) for name, value in figures_to_keep.items()}
    path.write_text(json.dumps(dict(sorted(known.items())), indent=2) + "\n")


def geometric_mean_over_seeds(
    times_of_seed: Callable[[int], NDArray[np.float64]], n_seeds: int
) -> NDArray[np.float64]:
    """Return the geometric mean of times over seeds; infinite where most seeds do not get there.

    Args:
        times_of_seed:
            From a seed to times of any shape.
        n_seeds:
            How many seeds.

    Returns:
        Times of that shape.
    """
    times = np.array([times_of_seed(seed) for seed in range(n_seeds)])
    finite = np.isfinite(times)
    logs = np.where(finite, np.log(np.where(finite, np.maximum(times, 1e-9), 1.0)), 0.0)
    mean = np.exp(logs.sum(axis=0) / np.maximum(finite.sum(axis=0), 1))
    return np.where(2 * finite.sum(axis=0) > n_seeds, mean, np.inf)
