"""Sketches against the exact engine: predicted times, eigenvalues and error bars.

On the residual network with its random weights, and on a perceptron on white noise, whose spectrum
hardly decays at all: there the error bar of a sketch of a fixed width is compared with its error
for several seeds as well. Writes ``sketch.json``.

Run with ``python -m benchmarks.engine.sketch``.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch

from benchmarks.engine.command import parser
from benchmarks.engine.command import write
from benchmarks.engine.networks import problem
from benchmarks.environment import environment
from optuna_ttp import compute_spectrum
from optuna_ttp import FineTuningTask
from optuna_ttp.spectrum import Spectrum
from tests.gradient_flow import follow_flow


N_SEEDS = 8


def main() -> None:
    """Run the benchmark."""
    command = parser(__doc__)
    command.add_argument("--n-samples", type=int, default=128)
    options = command.parse_args()
    torch.set_num_threads(1)
    n_samples = 4 if options.smoke else options.n_samples
    model, images, labels = problem("residual", n_samples)
    torch.autograd.grad(model(images[:2]).sum(), list(model.parameters()))
    task = FineTuningTask(model, (images, labels))
    results: dict[str, Any] = {"n_samples": n_samples, **_against_exact(task)}
    results["slow_spectrum"] = _slow_spectrum(n_samples, 2 if options.smoke else N_SEEDS)
    summary = {"environment": environment(), **results}
    write(options.output / "sketch.json", summary)


def _against_exact(task: FineTuningTask) -> dict[str, Any]:
    settings: dict[str, Any] = {"measure_speed": False, "probe": False}
    exact = compute_spectrum(task, engine="exact", **settings)
    results: dict[str, Any] = {}
    for engine in ("sketch", "refined_sketch"):
        started = time.process_time()
        sketched = compute_spectrum(task, engine=engine, **settings)
        n = min(100, sketched.rank, exact.rank)
        values = np.abs(sketched.eigenvalues[:n] / exact.eigenvalues[:n] - 1.0)
        results[engine] = {
            "cpu_seconds": round(time.process_time() - started, 3),
            "width": sketched.metadata.sketch_width,
            "error_bar": sketched.metadata.time_error,
            "time_errors": _time_errors(sketched, exact).tolist(),
            "eigenvalue_error_top_10": float(values[:10].max()),
            "eigenvalue_error_top_100": float(values.max()),
        }
    return results


def _slow_spectrum(n_samples: int, n_seeds: int) -> dict[str, Any]:
    """A spectrum that hardly decays, and how often the error is within the error bar."""
    model, images, labels = problem("flat", n_samples)
    task = FineTuningTask(model, (images, labels))
    exact = compute_spectrum(task, engine="exact", measure_speed=False, probe=False)
    values = exact.eigenvalues
    ratios = []
    for seed in range(n_seeds):
        sketched = compute_spectrum(
            task, engine="sketch", seed=seed, measure_speed=False, probe=False
        )
        bar = sketched.metadata.time_error
        assert bar is not None
        ratios.append(float(_time_errors(sketched, exact).max()) / bar)
    return {
        "n_samples": n_samples,
        "effective_rank": float(values.sum() ** 2 / np.square(values).sum()),
        **_against_exact(task),
        "error_over_error_bar_by_seed": ratios,
        "share_within_two_error_bars": float(np.mean(np.array(ratios) <= 2.0)),
    }


def _time_errors(sketched: Spectrum, exact: Spectrum) -> NDArray[np.float64]:
    """Relative errors of the times to 50, 25 and 10 % of the initial loss, with all directions."""
    return np.abs(
        follow_flow(sketched, rank=sketched.rank).times / follow_flow(exact, rank=exact.rank).times
        - 1.0
    )


if __name__ == "__main__":
    main()
