"""How often the error bar of a sketch covers the error of its times, over networks and seeds.

Small networks on which the exact engine runs in a moment: perceptrons and a convolutional network
with random weights, for both losses, on data that are noise or nearly so. An error is that of the
time of gradient flow to 50, 25 or 10 % of the initial loss. Writes ``coverage.json``.

Run with ``python -m benchmarks.engine.coverage``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
import warnings

import numpy as np
import torch

from benchmarks.engine.command import parser
from benchmarks.engine.command import write
from benchmarks.environment import environment
from optuna_ttp import compute_spectrum
from optuna_ttp import FineTuningTask
from tests.gradient_flow import follow_flow


ENGINES = ("sketch", "refined_sketch")


def perceptron(n_samples: int) -> FineTuningTask:
    """A wide perceptron on separated classes, whose spectrum decays quickly."""
    model = torch.nn.Sequential(
        torch.nn.Linear(20, 150), torch.nn.Tanh(), torch.nn.Linear(150, 150), torch.nn.Tanh()
    )
    model.append(torch.nn.Linear(150, 4))
    y = torch.arange(n_samples) % 4
    x = torch.randn(n_samples, 20) + 2.0 * torch.randn(4, 20)[y]
    return FineTuningTask(model, (x, y))


def regression(n_samples: int) -> FineTuningTask:
    """A perceptron that is to learn a smooth function by the squared error."""
    model = torch.nn.Sequential(
        torch.nn.Linear(10, 200), torch.nn.ReLU(), torch.nn.Linear(200, 100), torch.nn.ReLU()
    )
    model.append(torch.nn.Linear(100, 2))
    x = torch.randn(n_samples, 10)
    return FineTuningTask(model, (x, torch.sin(x[:, :2] + x[:, 2:4])), loss="mse")


def noise(n_samples: int) -> FineTuningTask:
    """White noise of many dimensions: the spectrum hardly decays."""
    model = torch.nn.Sequential(torch.nn.Linear(800, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5))
    return FineTuningTask(model, (torch.randn(n_samples, 800), torch.arange(n_samples) % 5))


def convolution(n_samples: int) -> FineTuningTask:
    """A convolutional network on noisy images of ten classes."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 24, 3), torch.nn.ReLU(), torch.nn.Conv2d(24, 48, 3), torch.nn.ReLU()
    )
    model.extend([torch.nn.AvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(192, 10)])
    y = torch.arange(n_samples) % 10
    x = torch.randn(n_samples, 1, 8, 8) + torch.randn(10, 1, 8, 8)[y]
    return FineTuningTask(model, (x, y))


NETWORKS: tuple[tuple[Callable[[int], FineTuningTask], int], ...] = (
    (perceptron, 80),
    (regression, 100),
    (noise, 60),
    (convolution, 50),
)


def main() -> None:
    """Run the benchmark."""
    command = parser(__doc__)
    command.add_argument("--seeds", type=int, default=10)
    options = command.parse_args()
    torch.set_num_threads(1)
    cells = [
        _cell(
            make, 12 if options.smoke else n_samples, engine, 2 if options.smoke else options.seeds
        )
        for make, n_samples in NETWORKS
        for engine in ENGINES
    ]
    shares = {
        engine: float(np.mean([c["share_within_bar"] for c in cells if c["engine"] == engine]))
        for engine in ENGINES
    }
    summary = {"environment": environment(), "share_within_bar": shares, "cells": cells}
    write(options.output / "coverage.json", summary)


def _cell(
    make: Callable[[int], FineTuningTask], n_samples: int, engine: str, n_seeds: int
) -> dict[str, Any]:
    torch.manual_seed(0)
    task = make(n_samples)
    settings: dict[str, Any] = {"measure_speed": False, "probe": False}
    exact = compute_spectrum(task, engine="exact", **settings)
    times = follow_flow(exact, rank=exact.rank).times
    bars, widths, errors = [], [], []
    for seed in range(n_seeds):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spectrum_of_seed = compute_spectrum(task, engine=engine, seed=seed, **settings)
        assert spectrum_of_seed.metadata.time_error is not None
        bars.append(spectrum_of_seed.metadata.time_error)
        widths.append(spectrum_of_seed.metadata.sketch_width)
        reached = np.isfinite(times)
        ours = follow_flow(spectrum_of_seed, rank=spectrum_of_seed.rank).times
        errors.append(np.abs(ours[reached] / times[reached] - 1.0).tolist())
    within = np.array(errors) <= np.array(bars)[:, None]
    return {
        "network": make.__name__,
        "engine": engine,
        "n_samples": n_samples,
        "widths": widths,
        "error_bars": [round(b, 5) for b in bars],
        "time_errors": [[round(e, 5) for e in some] for some in errors],
        "share_within_bar": float(within.mean()),
        "largest_error": float(np.max(errors)),
    }


if __name__ == "__main__":
    main()
