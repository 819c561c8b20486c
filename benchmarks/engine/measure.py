"""One measurement in a process of its own: CPU seconds and the growth of its peak memory.

Started by :mod:`benchmarks.engine.record` and :mod:`benchmarks.engine.growth`, for ours in this
environment and for the peers in one that has them. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from pathlib import Path
import resource
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch

from benchmarks.engine.networks import problem
from benchmarks.engine.peers import DISTRIBUTIONS
from benchmarks.engine.peers import EIGENVALUES
from benchmarks.engine.peers import KERNELS
from benchmarks.engine.peers import PROJECTIONS
from benchmarks.environment import peak_memory


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method")
    parser.add_argument("network")
    parser.add_argument("n_samples", type=int)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--memory", type=int, help="the most that it may take, in bytes")
    parser.add_argument("--gram", type=Path, help="where the kernel is written")
    options = parser.parse_args()
    if options.memory is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (options.memory, options.memory))
    torch.set_num_threads(options.threads)
    model, inputs, labels = problem(
        options.network, options.n_samples, options.classes, width=options.width
    )
    kind = getattr(torch, options.dtype)
    model = model.to(kind)
    inputs = inputs.to(kind) if inputs.is_floating_point() else inputs
    # What the first call loads and allocates belongs to no method.
    torch.autograd.grad(model(inputs[:2]).sum(), list(model.parameters()))
    before, started = peak_memory(), time.process_time()
    wall = time.perf_counter()
    found = _run(options.method, model, inputs, labels, options.dtype)
    result: dict[str, Any] = {
        "method": options.method,
        "network": options.network,
        "n_samples": options.n_samples,
        "dtype": options.dtype,
        "threads": options.threads,
        "cpu_seconds": round(time.process_time() - started, 3),
        "wall_seconds": round(time.perf_counter() - wall, 3),
        "peak_mib": round((peak_memory() - before) / 2**20, 1),
    }
    if options.method in DISTRIBUTIONS:
        name = DISTRIBUTIONS[options.method]
        result["version"] = f"{name} {importlib.metadata.version(name)}"
    if options.gram is not None:
        projected = options.method in PROJECTIONS or options.method == "ours_columns"
        np.save(options.gram, found @ found.T if projected else found)
    print(json.dumps(result))


def _run(
    method: str, model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor, dtype: str
) -> NDArray[np.floating[Any]]:
    """Return the kernel, the largest eigenvalues or the projected rows."""
    if not method.startswith("ours"):
        return (KERNELS | EIGENVALUES | PROJECTIONS)[method](model, inputs)
    # The peers' environment does not have this library.
    from optuna_ttp import FineTuningTask
    from optuna_ttp.ntk import exact_kernel
    from optuna_ttp.ntk._settings import EngineSettings
    from optuna_ttp.ntk.engines._choice import first_columns
    from optuna_ttp.ntk.engines._columns import pick_columns

    task = FineTuningTask(model, (inputs, labels))
    settings = EngineSettings(torch.device("cpu"), getattr(torch, dtype), show_progress_bar=False)
    if method == "ours_columns":
        reference = task.initial_outputs(settings.device, settings.dtype)
        picked = pick_columns(task, settings, reference, n_columns=first_columns(task))
        return np.asarray((picked.columns * picked.inflation.sqrt().to(picked.columns)).numpy())
    return exact_kernel(task, **vars(settings)).gram


if __name__ == "__main__":
    main()
