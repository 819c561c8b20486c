"""The configurations that are recorded, drawn by a seed."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace
from typing import TypeVar

import numpy as np

from benchmarks.accuracy.adamw.run import Run


_Value = TypeVar("_Value")
_BETAS = (
    *((0.9, 0.999),) * 20,
    *((0.8, 0.999),) * 3,
    *((0.95, 0.999),) * 3,
    *((0.5, 0.999),) * 2,
    *((0.9, 0.99),) * 4,
)
_N_RUNS = len(_BETAS)
# Shares of the schedule's length that are warm-up; None is a constant rate.
_WARMUPS = (*(None,) * 18, *(0.0,) * 8, 0.06, 0.06, 0.1, 0.1, 0.2, 0.2)
_NORMS = (*(None,) * 22, *(1.0,) * 10)
_DECAYS = (*(0.01,) * 16, *(0.0,) * 16)
# A linear schedule lasts so many times as long as half of the way down should take.
_LENGTHS = (4.0, 8.0, 16.0)
_N_REPEATED = 6


@dataclass(frozen=True)
class Grid:
    """What the configurations of one kind of network are drawn from.

    Attributes:
        lowest_rate:
            Takes about ``max_steps`` steps to half of the initial loss, or a little less.
        highest_rate:
            Is well above what can be trained with.
        batch_sizes:
            Are taken equally often, as often as they are named.
        max_steps:
            Of every run.
        shortest_schedule:
            The least number of steps of a linear schedule.
        spacing:
            Ratio of two steps at which the loss over all samples is taken.
    """

    lowest_rate: float
    highest_rate: float
    batch_sizes: tuple[int, ...]
    max_steps: int
    shortest_schedule: int
    spacing: float


# Chosen by a few runs, such that about a fifth of the configurations fails, at the highest rates.
GRIDS = {
    "efficientnet-fashion": Grid(3e-6, 3e-3, (8, 16, 32, 64), 200, 40, 1.1),
    "efficientnet-digits": Grid(3e-6, 3e-3, (8, 8, 16, 16, 32, 64), 120, 40, 1.2),
    # Large batches of the transformer would take longer than all other runs together.
    "minilm": Grid(6e-6, 5e-3, (8, 8, 8, 16, 16, 16, 32, 64), 120, 40, 1.2),
    "residual": Grid(3e-5, 5e-2, (8, 16, 32, 64), 700, 100, 1.05),
    "digits": Grid(5e-5, 3e-1, (8, 16, 32, 64), 400, 50, 1.05),
}


def configurations(name: str) -> list[Run]:
    """Return the task's runs.

    Every hyperparameter is shuffled by itself. Learning rates are log-uniform, one in each of
    equal parts of the range.

    Args:
        name:
            Of the task.

    Returns:
        32 runs in random order, and 6 of them, at medium rates, again with another order of the
        samples.
    """
    kind, _, draw = name.rpartition("-")
    grid = GRIDS[kind]
    rng = np.random.default_rng([int(draw), *name.encode()])
    parts = (rng.permutation(_N_RUNS) + rng.random(_N_RUNS)) / _N_RUNS
    rates = grid.lowest_rate * (grid.highest_rate / grid.lowest_rate) ** parts
    batch_sizes = _shuffled(tuple(np.resize(grid.batch_sizes, _N_RUNS).tolist()), rng)
    betas = _shuffled(_BETAS, rng)
    warmups = _shuffled(_WARMUPS, rng)
    norms = _shuffled(_NORMS, rng)
    decays = _shuffled(_DECAYS, rng)
    lengths = rng.choice(_LENGTHS, _N_RUNS)
    runs = []
    for k, rate in enumerate(rates):
        warmup = warmups[k]
        steps = round(lengths[k] * grid.max_steps * grid.lowest_rate / rate)
        steps = min(max(steps, grid.shortest_schedule), grid.max_steps)
        linear = warmup is not None
        runs.append(
            Run(
                learning_rate=float(rate),
                batch_size=batch_sizes[k],
                beta_1=betas[k][0],
                beta_2=betas[k][1],
                weight_decay=decays[k],
                eps=1e-8,
                schedule="linear" if linear else "constant",
                schedule_steps=steps if linear else 0,
                warmup_steps=round(steps * warmup) if warmup is not None else 0,
                max_grad_norm=norms[k],
                seed=0,
                max_steps=steps if linear else grid.max_steps,
            )
        )
    medium = [runs[int(k)] for k in np.argsort(rates)[np.linspace(4, 22, _N_REPEATED).astype(int)]]
    return runs + [replace(run, seed=1) for run in medium]


def _shuffled(values: tuple[_Value, ...], rng: np.random.Generator) -> list[_Value]:
    return [values[int(k)] for k in rng.permutation(len(values))]
