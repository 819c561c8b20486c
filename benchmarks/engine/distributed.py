"""Four gloo processes against one: the difference of their kernels, and each one's share.

Each process runs on one thread. What it computes is measured twice: as CPU seconds, which on a
machine with fewer cores than processes also contain what they take from each other's caches, and
as counted floating-point operations of matrix products and convolutions. What every process does
for itself (looking at a few samples, the outputs, the comparison with plain automatic
differentiation) counts as well. Writes ``distributed.json``.

Run with ``python -m benchmarks.engine.distributed``.
"""

from __future__ import annotations

import json
from pathlib import Path
import tempfile
import time
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.engine.command import parser
from benchmarks.engine.command import write
from benchmarks.engine.networks import problem
from benchmarks.environment import environment
from benchmarks.processes import group
from benchmarks.processes import run_together
from optuna_ttp import FineTuningTask
from optuna_ttp.ntk import exact_kernel


N_PROCESSES = 4
CELLS = (("residual", 64), ("residual", 128), ("resnet18", 24))
SMOKE = (("residual", 8),)


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__).parse_args()
    cells = [_cell(network, n) for network, n in (SMOKE if options.smoke else CELLS)]
    summary = {"environment": environment(), "n_processes": N_PROCESSES, "cells": cells}
    write(options.output / "distributed.json", summary)


def _cell(network: str, n_samples: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run_together(_process, 1, 1, folder, network, n_samples)
        whole, alone = np.load(f"{folder}/1-0.npy"), _read(folder, 1, 0)
        run_together(_process, N_PROCESSES, N_PROCESSES, folder, network, n_samples)
        grams = [np.load(f"{folder}/{N_PROCESSES}-{k}.npy") for k in range(N_PROCESSES)]
        by_process = [_read(folder, N_PROCESSES, k) for k in range(N_PROCESSES)]
    differences = [float(np.linalg.norm(g - whole) / np.linalg.norm(whole)) for g in grams]
    return {
        "network": network,
        "n_samples": n_samples,
        "relative_difference": max(differences),
        "one_process": alone,
        "processes": by_process,
        **{
            f"largest_share_of_{key}": max(f[key] for f in by_process) / alone[key]
            for key in ("cpu_seconds", "gflop")
        },
    }


def _process(rank: int, n_processes: int, folder: str, network: str, n_samples: int) -> None:
    torch.set_num_threads(1)
    model, images, labels = problem(network, n_samples)
    # What the first call loads and allocates belongs to neither.
    torch.autograd.grad(model(images[:2]).sum(), list(model.parameters()))
    task = FineTuningTask(model, (images, labels))
    with group(rank, n_processes, folder):
        settings: dict[str, Any] = {"distributed": n_processes > 1, "show_progress_bar": False}
        started = time.process_time()
        kernel = exact_kernel(task, device=torch.device("cpu"), **settings)
        seconds = time.process_time() - started
        with FlopCounterMode(display=False) as counter:
            exact_kernel(task, device=torch.device("cpu"), **settings)
    np.save(f"{folder}/{n_processes}-{rank}.npy", kernel.gram)
    measured = {
        "cpu_seconds": round(seconds, 2),
        "gflop": round(counter.get_total_flops() / 1e9, 1),
    }
    Path(f"{folder}/{n_processes}-{rank}.json").write_text(json.dumps(measured))


def _read(folder: str, n_processes: int, rank: int) -> dict[str, float]:
    measured: dict[str, float] = json.loads(
        Path(f"{folder}/{n_processes}-{rank}.json").read_text()
    )
    return measured


if __name__ == "__main__":
    main()
