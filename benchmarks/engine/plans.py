"""What a plan says beforehand against what computing took, for every engine.

A plan and what it plans run in processes of their own. The seconds are those of the processor, on
one thread; the memory is the growth of the process's peak. For a sketch one of 4096 numbers a row
is measured, as it is planned. Writes ``plans.json``.

Run with ``python -m benchmarks.engine.plans``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.engine.command import parser
from benchmarks.engine.command import write
from benchmarks.engine.networks import problem
from benchmarks.environment import environment
from benchmarks.environment import peak_memory
from optuna_ttp import FineTuningTask
from optuna_ttp.ntk import exact_kernel
from optuna_ttp.ntk import plan_spectrum
from optuna_ttp.ntk._settings import EngineSettings
from optuna_ttp.ntk.engines._matrix_free import leading_pairs
from optuna_ttp.ntk.engines._sketch import sketch_jacobian


CELLS = (
    ("exact", "residual", 32),
    ("exact", "residual", 64),
    ("exact", "residual", 128),
    ("exact", "residual", 256),
    ("exact", "resnet18", 12),
    ("exact", "resnet18", 24),
    ("sketch", "residual", 64),
    ("sketch", "residual", 128),
    ("matrix_free", "residual", 64),
)
SMOKE = (("exact", "residual", 4), ("sketch", "residual", 4))


def main() -> None:
    """Run the benchmark."""
    command = parser(__doc__)
    command.add_argument("--repeats", type=int, default=3)
    command.add_argument("--single", nargs=4, help=argparse.SUPPRESS)
    options = command.parse_args()
    if options.single is not None:
        what, engine, network, n_samples = options.single
        print(json.dumps(_single(what, engine, network, int(n_samples))))
        return
    cells = [_cell(*c, 1 if options.smoke else options.repeats) for c in _chosen(options.smoke)]
    ratios = [c[key] for c in cells for key in ("seconds_ratio", "memory_ratio")]
    summary = {
        "environment": environment(),
        "largest_factor_of_seconds": max(_factor(r) for r in ratios[::2]),
        "largest_factor_of_memory": max(_factor(r) for r in ratios[1::2]),
        "cells": cells,
    }
    write(options.output / "plans.json", summary)


def _chosen(smoke: bool) -> tuple[tuple[str, str, int], ...]:
    return SMOKE if smoke else CELLS


def _factor(ratio: float) -> float:
    return round(max(ratio, 1.0 / ratio), 3)


def _cell(engine: str, network: str, n_samples: int, n_repeats: int) -> dict[str, Any]:
    plan = _process("plan", engine, network, n_samples)
    found = [_process("run", engine, network, n_samples) for _ in range(n_repeats)]
    seconds = statistics.median(f["seconds"] for f in found)
    memory = statistics.median(f["mib"] for f in found)
    return {
        "engine": engine,
        "network": network,
        "n_samples": n_samples,
        "plan": plan,
        "runs": found,
        "seconds_ratio": round(plan["seconds"] / seconds, 3),
        "memory_ratio": round(plan["mib"] / memory, 3),
    }


def _process(what: str, engine: str, network: str, n_samples: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.engine.plans"]
    command += ["--single", what, engine, network, str(n_samples)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _single(what: str, engine: str, network: str, n_samples: int) -> dict[str, float]:
    torch.set_num_threads(1)
    model, images, labels = problem(network, n_samples)
    # What the first call loads and allocates belongs to no engine.
    torch.autograd.grad(model(images[:2]).sum(), list(model.parameters()))
    task = FineTuningTask(model, (images, labels))
    started = time.process_time()
    if what == "plan":
        plan = plan_spectrum(task, engine=engine)
        return {
            "seconds": round(plan.seconds, 2),
            "mib": round(plan.bytes / 2**20, 1),
            "seconds_of_planning": round(time.process_time() - started, 2),
        }
    before = peak_memory()
    settings = EngineSettings(torch.device("cpu"), show_progress_bar=False)
    if engine == "exact":
        exact_kernel(task, **vars(settings))
    elif engine == "sketch":
        sketch_jacobian(task, settings, width=4096)
    else:
        leading_pairs(task, settings)
    return {
        "seconds": round(time.process_time() - started, 2),
        "mib": round((peak_memory() - before) / 2**20, 1),
    }


if __name__ == "__main__":
    main()
