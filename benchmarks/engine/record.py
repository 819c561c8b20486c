"""Our engines against other libraries: CPU seconds, peak memory and errors.

Every measurement runs in a process of its own, so that its peak memory is its own; all on the same
networks, data and number of threads, one after the other. The reference is ours in double
precision, which the tests hold against plain automatic differentiation. Against it stand the
relative error of the kernel in Frobenius norm and, up to 1500 rows, the largest relative error of
the times at which gradient flow reaches 50, 25 and 10 % of the initial loss; or, for what finds
the largest eigenvalues and no kernel, their largest relative error. The lower bound on the time
counts the floating-point operations of one forward and C backward passes and of the product of all
rows (half of it, by symmetry), at the rate of a large matrix product on this machine.

With ``--cells`` and ``--methods`` only some are measured; the others in the file stay, each with
the date of its measurement. A method may take all memory that is free but one GiB, and ``--limit``
seconds; what it does not do with these, or cannot do, is recorded as its failure. ``torch_func``
takes 21 GiB on ResNet-18 at N = 24.

``--peers`` is the Python of an environment with ``benchmarks/engine/peers.txt``, ``--peers-jax``
of one with ``peers_jax.txt``; without them these methods are left out. Writes ``exact.json``.

Run with ``python -m benchmarks.engine.record --peers PYTHON --peers-jax PYTHON``.
"""

from __future__ import annotations

from dataclasses import dataclass
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import eigsh
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.engine.command import add_peers
from benchmarks.engine.command import parser
from benchmarks.engine.command import write
from benchmarks.engine.networks import problem
from benchmarks.engine.peers import DISTRIBUTIONS
from benchmarks.engine.peers_jax import IMPLEMENTATIONS
from benchmarks.environment import environment
from optuna_ttp import FineTuningTask
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.spectrum import SpectrumMetadata
from tests.gradient_flow import follow_flow


@dataclass(frozen=True)
class Cell:
    """A size of a network, and what is measured there.

    Attributes:
        network:
            Its name, see :func:`~benchmarks.engine.networks.problem`.
        n_samples:
            N.
        methods:
            Of :mod:`~benchmarks.engine.measure` and :mod:`~benchmarks.engine.peers_jax`.
        n_rounds:
            How often each is measured. Once by default.
        n_classes:
            C. Ten by default.
    """

    network: str
    n_samples: int
    methods: tuple[str, ...]
    n_rounds: int = 1
    n_classes: int = 10

    @property
    def name(self) -> str:
        """For the command line."""
        return f"{self.network}-{self.n_samples}"


_OURS = ("ours_exact", "ours_columns")
_PEERS = ("torch_func", "torch_func_by_parameter", "torchjd")
# What takes minutes at larger sizes.
_SLOW = (
    "backpack",
    "nngeometry",
    "curvlinops",
    "torch_func_products",
    "trak",
    *IMPLEMENTATIONS,
)
CELLS = (
    Cell("residual", 32, (*_OURS, *_PEERS, *_SLOW), 2),
    Cell("residual", 64, (*_OURS, *_PEERS)),
    Cell("residual", 128, (*_OURS, *_PEERS), 2),
    Cell("residual", 256, (*_OURS, "torch_func", "torch_func_by_parameter")),
    Cell("residual", 512, (*_OURS, "torch_func", "torch_func_by_parameter")),
    Cell("resnet18", 12, (*_OURS, *_PEERS)),
    Cell("resnet18", 24, (*_OURS, *_PEERS)),
    Cell("resnet18", 48, _OURS),
    Cell("efficientnet", 200, (*_OURS, *_PEERS), n_classes=5),
    Cell("minilm", 240, (*_OURS, *_PEERS), n_classes=6),
)
SMOKE = (Cell("residual", 4, ("ours_exact", "ours_columns", "torch_func", "torch_func_products")),)
_SPARE_MEMORY = 2**30
# Rows from which on simulating gradient flow takes as long as the kernels do.
_MOST_ROWS = 1500


def main() -> None:
    """Run the benchmark."""
    command = parser(__doc__)
    add_peers(command)
    command.add_argument("--cells", nargs="+", help="such as residual-32; all by default")
    command.add_argument("--methods", nargs="+", help="such as ours_exact; a cell's by default")
    command.add_argument("--rounds", type=int, help="how often each method is measured")
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    path = options.output / "exact.json"
    known = json.loads(path.read_text()) if path.exists() else {"environment": {}, "cells": []}
    cells = {(c["network"], c["n_samples"], c["threads"]): c for c in known["cells"]}
    for cell in SMOKE if options.smoke else CELLS:
        if options.cells is not None and cell.name not in options.cells:
            continue
        cell_results = _measured(cell, options)
        key = (cell.network, cell.n_samples, options.threads)
        cell_results["results"] = _merged(cells.get(key), cell_results["results"])
        cells[key] = cell_results
        write(path, {**known, "environment": environment(), "cells": list(cells.values())})


def _measured(cell: Cell, options: Any) -> dict[str, Any]:
    chosen = cell.methods if options.methods is None else tuple(options.methods)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gram.npy"
        reference = measure("ours_exact", cell, options, path, dtype="float64")
        if "failed" in reference:
            raise RuntimeError(f"The reference of {cell.name} failed: {reference['failed']}")
        errors = _Errors(np.load(path), cell)
        for _ in range(options.rounds or cell.n_rounds):
            # Interleaved, so that a busy machine is busy for all.
            for method in chosen:
                if _python(method, options) is None:
                    continue
                result = measure(method, cell, options, path)
                if "failed" not in result:
                    result |= errors.of(np.load(path))
                results.append({**result, "date": environment()["date"]})
    return {
        "network": cell.network,
        "n_samples": cell.n_samples,
        "n_classes": cell.n_classes,
        "threads": options.threads,
        "bound": _bound(cell),
        "results": results,
    }


def _merged(before: dict[str, Any] | None, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put in place of the same methods' results."""
    measured = {r["method"] for r in results}
    earlier = [] if before is None else before["results"]
    return results + [r for r in earlier if r["method"] not in measured]


def _python(method: str, options: Any) -> str | None:
    """The interpreter that has the method's library."""
    python: str | None = sys.executable
    if method in DISTRIBUTIONS:
        python = options.peers
    elif method in IMPLEMENTATIONS:
        python = options.peers_jax
    return python


def measure(
    method: str,
    cell: Cell,
    options: Any,
    path: Path,
    *,
    dtype: str = "float32",
    width: float = 1.0,
) -> dict[str, Any]:
    """Measure one method once.

    Args:
        method:
            One of a cell's.
        cell:
            The network and its size.
        options:
            Of :func:`~benchmarks.engine.command.add_peers`.
        path:
            Where the kernel is written.
        dtype:
            Precision of the Jacobian. Single precision by default.
        width:
            Of the residual network. One by default.

    Returns:
        What the process found, or under ``failed`` how it failed.
    """
    command: list[Any] = [_python(method, options), "-m"]
    if method in IMPLEMENTATIONS:
        command += ["benchmarks.engine.peers_jax", method, _weights(cell, path)]
    else:
        command += ["benchmarks.engine.measure", method, cell.network, cell.n_samples]
        command += ["--classes", cell.n_classes, "--width", width, "--dtype", dtype]
        if (free := _free_memory()) is not None:
            command += ["--memory", free - _SPARE_MEMORY]
    command += ["--threads", options.threads, "--gram", path]
    try:
        done = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            check=False,
            timeout=options.limit,
            # Of NumPy's own products, too.
            env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
        )
    except subprocess.TimeoutExpired:
        return {"method": method, "failed": f"took more than {options.limit:.0f} seconds"}
    if done.returncode != 0:
        return {"method": method, "failed": _reason(done)}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith(" ")]
    # The line that names the exception: explanations may follow it.
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return (named or lines or [f"exit status {done.returncode}"])[-1][:200]


def _free_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def _weights(cell: Cell, path: Path) -> Path:
    """The network and its images in a file that needs no PyTorch."""
    model, images, _ = problem(cell.network, cell.n_samples, cell.n_classes)
    weights = {k: v.numpy() for k, v in model.state_dict().items() if v.is_floating_point()}
    path = path.with_name("problem.npz")
    np.savez(path, images=images.numpy(), **weights)
    return path


class _Errors:
    """What kernels and eigenvalues are held against."""

    def __init__(self, reference: NDArray[Any], cell: Cell) -> None:
        model, inputs, labels = problem(cell.network, cell.n_samples, cell.n_classes)
        self._task = FineTuningTask(model, (inputs, labels))
        with torch.no_grad():
            self._outputs = model(inputs).double().numpy()
        self._reference = reference
        self._rank: int | None = None
        self._times = self._flow(reference) if len(reference) <= _MOST_ROWS else None

    def of(self, computed: NDArray[Any]) -> dict[str, float]:
        """Return the errors of a kernel, or of eigenvalues."""
        reference = self._reference
        if computed.ndim == 1:
            start = np.random.default_rng(0).standard_normal(len(reference))
            values = eigsh(reference, k=len(computed), v0=start, return_eigenvectors=False)
            return {
                "eigenvalue_error": float(np.abs(computed / np.sort(values)[::-1] - 1.0).max())
            }
        away = float(np.linalg.norm(computed - reference) / np.linalg.norm(reference))
        if self._times is None:
            return {"error": away}
        relative = np.abs(self._flow(computed) / self._times - 1.0)[np.isfinite(self._times)]
        return {"error": away, "time_error": float(relative.max(initial=0.0))}

    def _flow(self, gram: NDArray[Any]) -> NDArray[np.float64]:
        values, vectors = np.linalg.eigh(gram.astype(np.float64))
        # As many directions of every kernel, or the losses that they can reach would differ. What
        # rounding in single precision makes of the smallest may be negative.
        smallest = len(gram) * np.finfo(np.float64).eps * values[-1]
        if self._rank is None:
            self._rank = int((values > smallest).sum())
        largest = np.arange(len(gram))[::-1][: self._rank]
        task = self._task
        spectrum = Spectrum(
            np.maximum(values[largest], smallest),
            vectors[:, largest],
            float(np.trace(gram)),
            self._outputs,
            task.targets,
            task.loss,
            None,
            SpectrumMetadata("", "", "", "", "", task.n_parameters, 0.0, "", "", ""),
        )
        return follow_flow(spectrum, rank=spectrum.rank).times


def _bound(cell: Cell) -> dict[str, float]:
    """Floating-point operations that no way around this can do without, and the machine's rate."""
    n_samples = cell.n_samples
    fewest = min(n_samples, cell.n_classes if cell.n_classes < 10 else 8)
    model, inputs, _ = problem(cell.network, fewest, cell.n_classes)
    n_outputs = int(model(inputs[:1]).shape[1])
    n_parameters = sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(inputs[:1])
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
