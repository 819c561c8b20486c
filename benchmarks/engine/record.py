"""Our engines against other libraries: CPU seconds, peak memory and the error of the kernel.

Every measurement runs in a process of its own, so that its peak memory is its own; all on the same
networks, data and number of threads, one after the other. The reference is ours in double
precision, which the tests hold against plain automatic differentiation. The lower bound on the
time counts the floating-point operations of one forward and C backward passes and of the product
of all rows (half of it, by symmetry), at the rate of a large matrix product on this machine.

With ``--cells`` and ``--methods`` only some are measured; the others in the file stay, each with
the date of its measurement. ``torch_func`` takes 21 GiB on ResNet-18.

``--methods ours_sketch torch_func`` measures a sketch of 4096 numbers a row between its peers, in
the same rounds. What such a run measures of it and of the peers also goes into ``sketch.json``.

``--peers`` is the Python of an environment with ``benchmarks/engine/peers.txt``. Writes
``exact.json``.

Run with ``python -m benchmarks.engine.record --peers PYTHON``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.engine.networks import problem
from benchmarks.environment import environment
from optuna_ttp import FineTuningTask
from optuna_ttp.jacobian import plan_spectrum


# Networks, sizes, the methods that are measured there, and how often.
CELLS: tuple[tuple[str, int, tuple[str, ...], int], ...] = (
    ("residual", 32, ("ours_exact", "torch_func", "torch_func_by_parameter", "torchjd"), 2),
    ("residual", 64, ("ours_exact", "torch_func", "torchjd"), 1),
    ("residual", 128, ("ours_exact", "torch_func", "torchjd"), 2),
    ("resnet18", 24, ("ours_exact", "torch_func", "torchjd"), 1),
    ("residual", 256, ("ours_exact", "torch_func"), 1),
    ("residual", 512, ("ours_exact", "torch_func"), 1),
)
SMOKE = (("residual", 4, ("ours_exact", "ours_sketch", "torch_func"), 1),)
OF_OTHERS = ("torchjd",)
SKETCH = "ours_sketch"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="one small size only")
    parser.add_argument("--peers", help="a Python that has the other libraries")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cells", nargs="+", help="such as residual-32; all by default")
    parser.add_argument("--methods", nargs="+", help="such as ours_exact; a cell's by default")
    parser.add_argument("--rounds", type=int, help="how often each method is measured")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "exact.json"
    known = json.loads(path.read_text()) if path.exists() else {"environment": {}, "cells": []}
    for cell in known["cells"]:
        for result in cell["results"]:
            result.setdefault("date", cell.get("date", known["environment"]["date"]))
    cells = {(cell["network"], cell["n_samples"]): cell for cell in known["cells"]}
    for network, n_samples, methods, n_repeats in SMOKE if options.smoke else CELLS:
        if options.cells is not None and f"{network}-{n_samples}" not in options.cells:
            continue
        chosen = methods if options.methods is None else tuple(options.methods)
        cell = _cell(network, n_samples, chosen, options.rounds or n_repeats, options)
        if SKETCH in chosen:
            _write_sketch(cell, options.output / "sketch.json")
        cell["results"] = _merged(cells.get((network, n_samples)), cell["results"])
        cells[network, n_samples] = cell
        document = {**known, "environment": environment(), "cells": list(cells.values())}
        path.write_text(json.dumps(document, indent=2) + "\n")
        print(json.dumps(cell, indent=2), flush=True)


def _cell(
    network: str, n_samples: int, methods: tuple[str, ...], n_repeats: int, options: Any
) -> dict[str, Any]:
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gram.npy"
        _measure("ours_exact", network, n_samples, options, path, dtype="float64")
        reference = np.load(path)
        for _ in range(n_repeats):
            # Interleaved, so that a busy machine is busy for all.
            for method in methods:
                if method in OF_OTHERS and options.peers is None:
                    continue
                result = _measure(method, network, n_samples, options, path)
                if "failed" not in result and method != SKETCH:
                    result["error"] = _error(np.load(path), reference)
                results.append({**result, "date": environment()["date"]})
    return {
        "network": network,
        "n_samples": n_samples,
        "plan": _plan(network, n_samples),
        "bound": _bound(network, n_samples),
        "results": results,
    }


def _merged(before: dict[str, Any] | None, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put in place of the same methods' results; sketches have a file of their own."""
    measured = {r["method"] for r in results}
    kept = [] if before is None else before["results"]
    others = [r for r in kept if r["method"] not in measured]
    return [r for r in results if r["method"] != SKETCH] + others


def _write_sketch(cell: dict[str, Any], path: Path) -> None:
    document = json.loads(path.read_text()) if path.exists() else {}
    document["against_peers"] = {
        "environment": environment(),
        "network": cell["network"],
        "n_samples": cell["n_samples"],
        "results": [r for r in cell["results"] if r["method"] != "ours_exact"],
    }
    path.write_text(json.dumps(document, indent=2) + "\n")


def _measure(
    method: str,
    network: str,
    n_samples: int,
    options: Any,
    path: Path,
    *,
    dtype: str = "float32",
) -> dict[str, Any]:
    python = options.peers if method in OF_OTHERS else sys.executable
    command = [python, "-m", "benchmarks.engine.measure", method, network, str(n_samples)]
    command += ["--threads", str(options.threads), "--dtype", dtype, "--gram", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return {"method": method, "failed": reason[0][:200]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _error(gram: NDArray[Any], reference: NDArray[Any]) -> float:
    return float(np.linalg.norm(gram - reference) / np.linalg.norm(reference))


def _plan(network: str, n_samples: int) -> dict[str, Any]:
    model, images, labels = problem(network, n_samples)
    plan = plan_spectrum(FineTuningTask(model, (images, labels)))
    return {"seconds": round(plan.seconds, 2), "mib": round(plan.bytes / 2**20, 1)}


def _bound(network: str, n_samples: int) -> dict[str, float]:
    """Floating-point operations that no way around this can do without, and the machine's rate."""
    model, images, _ = problem(network, min(n_samples, 8))
    n_outputs = int(model(images[:1]).shape[1])
    n_parameters = sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(images[:1])
    # A backward pass with respect to activations costs what a forward pass does.
    passes = n_samples * (1 + n_outputs) * forward.get_total_flops()
    product = float((n_samples * n_outputs) ** 2) * n_parameters
    matrix = torch.randn(2048, 2048)
    seconds = []
    for _ in range(3):
        started = time.process_time()
        matrix @ matrix
        seconds.append(time.process_time() - started)
    rate = 2.0 * 2048**3 / min(seconds)
    return {
        "passes_gflop": round(passes / 1e9, 1),
        "product_gflop": round(product / 1e9, 1),
        "gflop_per_second": round(rate / 1e9, 1),
        "cpu_seconds": round((passes + product) / rate, 3),
    }


if __name__ == "__main__":
    main()
