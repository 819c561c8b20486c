"""Spectra of a sample of the Jacobian's columns against those of the exact kernel.

On the residual network and the perceptron on white noise with their random weights, the network of
digits and EfficientNet-Lite0: the CPU seconds of each engine, also in full-batch training steps
of the same network, the errors of the predicted times to 70, 50, 35, 25, 15 and 10 % of the
initial loss, and how often the error bar covers those to 50, 25 and 10 %, over several seeds. The
times are those of SGD with small learning rates, which is gradient flow. Writes ``columns.json``,
after each network. The recorded
file also has the engines that columns have replaced, as they were measured in the same run.

Run with ``OMP_NUM_THREADS=1 python -m benchmarks.engine.columns``.
"""

from __future__ import annotations

from dataclasses import dataclass
import time
from typing import Any
import warnings

import numpy as np
from numpy.typing import NDArray
import torch

from benchmarks.accuracy import tasks
from benchmarks.engine.command import parser
from benchmarks.engine.command import write
from benchmarks.engine.networks import problem
from benchmarks.environment import environment
from optuna_ttp import compute_spectrum
from optuna_ttp import FineTuningTask
from optuna_ttp.spectrum import Spectrum
from tests.gradient_flow import follow_flow


FRACTIONS = (0.7, 0.5, 0.35, 0.25, 0.15, 0.1)
# The levels of the error bar.
OF_BAR = [FRACTIONS.index(f) for f in (0.5, 0.25, 0.1)]
SETTINGS: dict[str, Any] = {
    "measure_speed": False,
    "probe": False,
    "show_progress_bar": False,
    "device": "cpu",
}


@dataclass(frozen=True)
class Network:
    """A network of the benchmark, and the number of seeds."""

    name: str
    n_samples: int
    n_classes: int
    n_seeds: int


NETWORKS = (
    Network("flat", 128, 10, 30),
    Network("digits", 200, 5, 30),
    Network("residual", 128, 10, 30),
    Network("efficientnet", 200, 5, 3),
)


def main() -> None:
    """Run the benchmark."""
    command = parser(__doc__)
    command.add_argument("--networks", nargs="+", default=[n.name for n in NETWORKS])
    command.add_argument("--seeds", type=int, help="the most of a network")
    options = command.parse_args()
    torch.set_num_threads(1)
    cells = []
    for network in NETWORKS:
        if network.name not in options.networks:
            continue
        most = 2 if options.smoke else options.seeds or 1000
        cells.append(_cell(network, 10 if options.smoke else network.n_samples, most))
        write(options.output / "columns.json", {"environment": environment(), "cells": cells})


def _cell(network: Network, n_samples: int, most_seeds: int) -> dict[str, Any]:
    model, inputs, labels = _problem(network.name, n_samples, network.n_classes)
    task = FineTuningTask(model, (inputs, labels))
    step = _step_seconds(model, inputs, labels)
    started = time.process_time()
    exact = compute_spectrum(task, engine="exact", **SETTINGS)
    seconds = time.process_time() - started
    cell: dict[str, Any] = {
        "network": network.name,
        "n_samples": task.n_samples,
        "n_outputs": task.n_outputs,
        "n_parameters": task.n_parameters,
        "full_batch_step_cpu_seconds": round(step, 4),
        "exact": {"cpu_seconds": round(seconds, 3), "full_batch_steps": round(seconds / step, 1)},
    }
    cell["columns"] = _against(task, exact, min(network.n_seeds, most_seeds), step)
    return cell


def _problem(
    name: str, n_samples: int, n_classes: int
) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The network, inputs and labels; the digits' are those of the accuracy benchmark."""
    if name != "digits":
        return problem(name, n_samples, n_classes)
    tuning = tasks.load("digits-0")
    return tuning.model, tuning.inputs[:n_samples], tuning.labels[:n_samples]


def _step_seconds(model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    """CPU seconds of a full-batch training step: forward and backward pass, the best of three."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    seconds = []
    for _ in range(3):
        started = time.process_time()
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        torch.autograd.grad(loss, parameters)
        seconds.append(time.process_time() - started)
    return min(seconds)


def _against(task: FineTuningTask, exact: Spectrum, n_seeds: int, step: float) -> dict[str, Any]:
    """Errors of the columns' times for several seeds, and what it costs."""
    expected = _times(exact)
    rows, bars, seconds = [], [], []
    for seed in range(n_seeds):
        started = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spectrum = compute_spectrum(task, engine="columns", seed=seed, **SETTINGS)
        seconds.append(time.process_time() - started)
        rows.append(_times(spectrum) / expected - 1.0)
        bars.append(spectrum.metadata.time_error or 0.0)
    errors = np.array(rows)
    away = np.abs(errors)
    cost = float(np.median(seconds))
    return {
        "cpu_seconds": round(cost, 3),
        "full_batch_steps": round(cost / step, 1),
        "n_seeds": n_seeds,
        "time_error_mean": round(float(away.mean()), 5),
        "time_error_p95": round(float(np.quantile(away, 0.95)), 5),
        "time_bias": round(float(errors.mean()), 5),
        "time_bias_by_level": [round(float(b), 5) for b in errors.mean(axis=0)],
        "error_bar_median": round(float(np.median(bars)), 5),
        "share_within_bar": float(np.mean(away[:, OF_BAR] <= np.array(bars)[:, None])),
    }


def _times(spectrum: Spectrum) -> NDArray[np.float64]:
    return follow_flow(spectrum, rank=spectrum.rank, fractions=FRACTIONS).times


if __name__ == "__main__":
    main()
