"""One measurement in a process of its own: CPU seconds and the growth of its peak memory.

Started by :mod:`benchmarks.engine.record`, for ours in this environment and for the peers in one
that has them. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch

from benchmarks.engine.networks import problem
from benchmarks.environment import peak_memory


# Numbers a row that a sketch keeps here.
SKETCH_WIDTH = 4096


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method")
    parser.add_argument("network")
    parser.add_argument("n_samples", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--gram", type=Path, help="where the kernel is written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, images, labels = problem(options.network, options.n_samples)
    kind = getattr(torch, options.dtype)
    model, images = model.to(kind), images.to(kind)
    # What the first call loads and allocates belongs to no method.
    torch.autograd.grad(model(images[:2]).sum(), list(model.parameters()))
    before, started = peak_memory(), time.process_time()
    wall = time.perf_counter()
    gram = _run(options.method, model, images, labels, options.dtype)
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
    if options.gram is not None and gram is not None:
        np.save(options.gram, gram)
    print(json.dumps(result))


def _run(
    method: str, model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, dtype: str
) -> NDArray[np.floating[Any]] | None:
    if not method.startswith("ours"):
        from benchmarks.engine.peers import KERNELS

        return KERNELS[method](model, images)
    # The peers' environment does not have this library.
    from optuna_ttp import FineTuningTask
    from optuna_ttp.jacobian import exact_kernel
    from optuna_ttp.jacobian._sketch import sketch_jacobian

    task = FineTuningTask(model, (images, labels))
    settings: dict[str, Any] = {"device": torch.device("cpu"), "show_progress_bar": False}
    if method == "ours_sketch":
        # A sketch is not a kernel.
        sketch_jacobian(task, width=SKETCH_WIDTH, **settings)
        return None
    return exact_kernel(task, dtype=getattr(torch, dtype), **settings).gram


if __name__ == "__main__":
    main()
