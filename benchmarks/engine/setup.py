"""What setting up costs, in full-batch training steps of the same network in the same run.

For EfficientNet-Lite0 (N = 200, C = 5, 64 pixels), the sentence encoder MiniLM (N = 80, C = 5) and
the residual network (N = 128, C = 10): the processor's seconds of ``compute_spectrum`` with all it
does (columns, eigenpairs, timing of steps, probe, saturation), and of its parts, over those of one
full-batch step; on one thread, each network in a process of its own, which also gives the peak of
memory over that after building the task. The steps are timed before and after, and the shorter
time counts, which is to the disadvantage of the engine.

Writes ``setup.json``. Run with ``python -m benchmarks.engine.setup`` on a quiet machine.
"""

from __future__ import annotations

import copy
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.engine.command import parser
from benchmarks.engine.command import write
from benchmarks.engine.networks import problem
from benchmarks.environment import environment
from optuna_ttp import compute_spectrum
from optuna_ttp import FineTuningTask


_PROBLEMS = {"efficientnet": (200, 5), "minilm": (80, 5), "residual": (128, 10)}
_CHUNK = 50
_N_STEPS = 3


def main() -> None:
    """Run the benchmark, or one network of it."""
    command = parser(__doc__)
    command.add_argument("--one", help="the network to measure in this process")
    options = command.parse_args()
    if options.one:
        print(json.dumps(_measure(options.one, smoke=options.smoke)))
        return
    results: dict[str, Any] = {}
    for name in ("residual",) if options.smoke else _PROBLEMS:
        arguments = [sys.executable, "-m", "benchmarks.engine.setup", "--one", name]
        arguments += ["--smoke"] * options.smoke
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
    write(options.output / "setup.json", {"environment": environment(), **results})


def _measure(name: str, *, smoke: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    n_samples, n_classes = (8, 4) if smoke else _PROBLEMS[name]
    model, inputs, labels = problem(name, n_samples, n_classes)
    task = FineTuningTask(model, (inputs, labels))
    before = _peak_mib()
    step = _step(model, inputs, labels)
    parts = {}
    for part, all_of_it in (("columns_and_eigenpairs", False), ("everything", True)):
        started = time.process_time()
        spectrum = compute_spectrum(
            task,
            engine="columns",
            measure_speed=all_of_it,
            probe=all_of_it,
            show_progress_bar=False,
        )
        parts[part] = time.process_time() - started
    step = min(step, _step(model, inputs, labels))
    assert spectrum.jacobian is not None
    return {
        "n_samples": n_samples,
        "n_outputs": n_classes,
        "step_seconds": round(step, 4),
        **{f"{part}_steps": round(seconds / step, 2) for part, seconds in parts.items()},
        "time_error": spectrum.metadata.time_error,
        "columns_kept": spectrum.jacobian.n_columns,
        "bytes_stored": len(spectrum.to_bytes()),
        "peak_mib_above_task": round(_peak_mib() - before),
    }


def _step(model: torch.nn.Module, inputs: Any, labels: torch.Tensor) -> float:
    """Seconds of the fastest of a few full-batch steps, in chunks that fit the cache."""
    network = copy.deepcopy(model)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-9)
    seconds = []
    for _ in range(_N_STEPS):
        started = time.process_time()
        optimizer.zero_grad()
        for start in range(0, len(labels), _CHUNK):
            rows = slice(start, start + _CHUNK)
            loss = torch.nn.functional.cross_entropy(
                network(inputs[rows]), labels[rows], reduction="sum"
            )
            (loss / len(labels)).backward()
        optimizer.step()
        seconds.append(time.process_time() - started)
    return min(seconds)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
