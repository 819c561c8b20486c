"""Record real training runs with AdamW, to measure predictions against.

Each task has 32 configurations, drawn by a seed (``configurations.py``): learning rates over three
decades, such that about a fifth fails, batch sizes 8 to 64, several betas, with and without weight
decay, constant and linear schedules, some with warm-up, some with gradients clipped to a norm of
1. Six are recorded again with another order of the samples.

Networks are in evaluation mode, as for SGD (frozen batch-norm statistics, no dropout), and all
weights are trained, by ``torch.optim.AdamW`` with one group. The samples' order is that of the
runs with SGD: each epoch takes a new ``torch.randperm(N, generator=g)`` cut into parts of B, the
last one smaller where B does not divide N, with ``g = torch.Generator().manual_seed(1000 + seed)``
(``benchmarks.accuracy.training.mini_batches``). A run ends where the loss over all samples is at
8 % of the initial one, at its last step, or when it has diverged: one mini-batch loss that is not
finite, or 20 in a row above ten times the initial loss.

After every run ``results/adamw/TASK.npz`` is written anew, so that an interrupted recording goes
on where it stopped; ``benchmarks.accuracy.adamw.recording.read`` reads it.

Run with ``python -m benchmarks.accuracy.adamw.record efficientnet-fashion-0 ...``.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch

from benchmarks.accuracy.adamw.configurations import configurations
from benchmarks.accuracy.adamw.configurations import GRIDS
from benchmarks.accuracy.adamw.recording import record_missing
from benchmarks.accuracy.adamw.training import train
from benchmarks.accuracy.record import RESULTS
from benchmarks.accuracy.tasks import load


def main() -> None:
    """Record the tasks that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tasks", nargs="*")
    parser.add_argument("--output", type=Path, default=RESULTS / "adamw")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-runs", type=int, default=10_000)
    parser.add_argument("--smoke", action="store_true", help="a few runs of the digits network")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in ["digits-0"] if options.smoke else options.tasks:
        record(name, options.output, 3 if options.smoke else options.max_runs)


def record(name: str, output: Path, max_runs: int) -> None:
    """Record what a task's file does not have yet.

    Args:
        name:
            Of the task.
        output:
            Folder of the file.
        max_runs:
            Only so many of the first runs.
    """
    tuning = load(name)
    spacing = GRIDS[name.rpartition("-")[0]].spacing
    record_missing(
        output / f"{name}.npz",
        configurations(name)[:max_runs],
        lambda run: train(copy.deepcopy(tuning.model), tuning, run, spacing),
        {"name": name, "n_samples": len(tuning.labels), "spacing": spacing},
    )


if __name__ == "__main__":
    main()
