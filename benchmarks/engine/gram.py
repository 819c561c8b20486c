"""CPU seconds and accuracy of the exact engine against torch.func, on the demo's network.

The peer is the way of the torch.func tutorial on neural tangent kernels: ``vmap(jacrev(f))`` for
all samples at once, contracted parameter by parameter. Both use one thread. Writes ``gram.json``.

Run with ``python -m benchmarks.engine.gram``.
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

from benchmarks.environment import environment
from optuna_ttp import _demo
from optuna_ttp import FineTuningTask
from optuna_ttp.jacobian import exact_kernel


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="one small size only")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tuning = _demo.pretrain(0, steps=50)
    results = []
    for n_samples in (8,) if options.smoke else (32, 128, 300):
        images, labels = tuning.train[0][:n_samples], tuning.train[1][:n_samples]
        task = FineTuningTask(tuning.model, (images, labels))
        seconds: dict[str, list[float]] = {"ours": [], "torch_func": []}
        for _ in range(1 if options.smoke else 3):
            started = time.process_time()
            ours = exact_kernel(task, device=torch.device("cpu"), show_progress_bar=False).gram
            seconds["ours"].append(time.process_time() - started)
            started = time.process_time()
            peer = _torch_func_gram(tuning.model, images)
            seconds["torch_func"].append(time.process_time() - started)
        results.append(
            {
                "n_samples": n_samples,
                "n_outputs": task.n_outputs,
                "n_parameters": task.n_parameters,
                **{
                    f"{name}_cpu_seconds": round(float(np.median(s)), 3)
                    for name, s in seconds.items()
                },
                "ratio": round(
                    float(np.median(seconds["ours"]) / np.median(seconds["torch_func"])), 3
                ),
                "relative_frobenius_difference": float(
                    np.linalg.norm(ours - peer) / np.linalg.norm(peer)
                ),
            }
        )
    summary: dict[str, Any] = {"environment": environment(), "results": results}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "gram.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


def _torch_func_gram(model: torch.nn.Module, images: torch.Tensor) -> NDArray[np.float32]:
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def single(weights: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = torch.func.functional_call(model, weights, (image[None],))
        return outputs[0]

    jacobians = torch.func.vmap(torch.func.jacrev(single), (None, 0))(parameters, images)
    rows = [j.flatten(2) for j in jacobians.values()]
    gram = sum(torch.einsum("naf,mbf->namb", j, j) for j in rows)
    assert isinstance(gram, torch.Tensor)
    size = gram.shape[0] * gram.shape[1]
    return np.asarray(gram.reshape(size, size).numpy())


if __name__ == "__main__":
    main()
