"""The matrix-free engine: memory and time at N C = 50,000, eigenvalues where the exact one runs.

On the residual network with its random weights, whose spectrum decays slowly behind its first ten
eigenvalues. Each measurement runs in a process of its own, whose whole peak memory counts: the
interpreter, the network and the data included. Writes ``matrix_free.json``.

Run with ``python -m benchmarks.engine.matrix_free``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any
import warnings

import numpy as np
import torch

from benchmarks.engine.command import parser
from benchmarks.engine.command import write
from benchmarks.engine.networks import problem
from benchmarks.environment import environment
from benchmarks.environment import peak_memory
from optuna_ttp import compute_spectrum
from optuna_ttp import FineTuningTask


# Samples where both engines run, and of the large problem; eigenpairs.
SIZES = (256, 5000, 100)
SMOKE = (12, 24, 5)
MEMORY = 2**30


def main() -> None:
    """Run the benchmark."""
    command = parser(__doc__)
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--single", nargs=3, help=argparse.SUPPRESS)
    options = command.parse_args()
    if options.single is not None:
        engine, n_samples, rank = options.single
        print(json.dumps(_measure(engine, int(n_samples), int(rank), options.threads)))
        return
    small, large, rank = SMOKE if options.smoke else SIZES
    exact, leading = (_process(e, small, rank, options.threads) for e in ("exact", "matrix_free"))
    n = min(len(exact["eigenvalues"]), len(leading["eigenvalues"]))
    values, expected = (np.array(r.pop("eigenvalues")[:n]) for r in (leading, exact))
    summary: dict[str, Any] = {
        "environment": environment(),
        "max_memory_gib": MEMORY / 2**30,
        "threads": options.threads,
        "exact": exact,
        "matrix_free": leading,
        "n_eigenvalues": n,
        "eigenvalue_error": float(np.abs(values / expected - 1.0).max()),
    }
    path = options.output / "matrix_free.json"
    write(path, summary)
    summary["large"] = _process("matrix_free", large, rank, options.threads)
    write(path, summary)


def _process(engine: str, n_samples: int, rank: int, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.engine.matrix_free"]
    command += ["--threads", str(threads), "--single", engine, str(n_samples), str(rank)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _measure(engine: str, n_samples: int, rank: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    model, images, labels = problem("residual", n_samples)
    task = FineTuningTask(model, (images, labels))
    started, wall = time.process_time(), time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spectrum = compute_spectrum(
            task,
            engine=engine,
            rank=rank,
            max_memory=MEMORY,
            measure_speed=False,
            probe=False,
            show_progress_bar=False,
        )
    return {
        "engine": engine,
        "n_samples": n_samples,
        "n_rows": n_samples * task.n_outputs,
        "cpu_seconds": round(time.process_time() - started, 1),
        "wall_seconds": round(time.perf_counter() - wall, 1),
        "peak_gib": round(peak_memory() / 2**30, 3),
        "warnings": [str(w.message)[:200] for w in caught if "converged" in str(w.message)],
        "eigenvalues": spectrum.eigenvalues.tolist(),
    }


if __name__ == "__main__":
    main()
