"""The exact kernel by four processes against one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as distributed

from optuna_ttp.jacobian import compute_spectrum
from optuna_ttp.jacobian import exact_kernel
from optuna_ttp.jacobian import plan_spectrum
from optuna_ttp.task import FineTuningTask
from tests.models import cnn
from tests.models import images
from tests.models import mlp
from tests.models import vectors
from tests.reference import relative_error


CPU = torch.device("cpu")
_N_PROCESSES = 4
pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="needs gloo"
)


def _multipliers() -> FineTuningTask:
    """More validation samples than processes, and learning rates of their own."""
    return FineTuningTask(
        cnn(),
        images(13),
        validation_data=images(6, seed=2),
        learning_rate_multipliers={"9.": 3.0},
    )


def _methods() -> FineTuningTask:
    """All ways of a product: a table, tokens, rows of many weights and of few, pooled tokens."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(30, 6),
        torch.nn.Linear(6, 40),
        torch.nn.Tanh(),
        torch.nn.Linear(40, 60),
        torch.nn.Tanh(),
        torch.nn.Conv1d(5, 8, 3),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 58, 40),
        torch.nn.Tanh(),
        torch.nn.Linear(40, 3),
    )

    def data(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randint(30, (n, 5)), torch.arange(n) % 3

    return FineTuningTask(model, data(12), validation_data=data(2))


def _pooled() -> FineTuningTask:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 12, 3, groups=2),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(12, 3),
    )
    return FineTuningTask(model, images(9))


TASKS = {
    "multipliers": _multipliers,
    "methods": _methods,
    "pooled": _pooled,
    "half": _methods,
}
HELD = {"half": torch.bfloat16}


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=_N_PROCESSES
    )
    try:
        for name, make in TASKS.items():
            kernel = exact_kernel(make(), device=CPU, distributed=True, held=HELD.get(name))
            arrays = {k: v for k, v in vars(kernel).items() if v is not None}
            np.savez(f"{folder}/{name}-{rank}.npz", **arrays)
    finally:
        distributed.destroy_process_group()


def test_four_processes_give_the_kernel_of_one(tmp_path: Path) -> None:
    context: Any = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_process, args=(rank, str(tmp_path)))
        for rank in range(_N_PROCESSES)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
        assert process.exitcode == 0
    for name, make in TASKS.items():
        whole = exact_kernel(make(), device=CPU, held=HELD.get(name))
        for rank in range(_N_PROCESSES):
            with np.load(tmp_path / f"{name}-{rank}.npz") as found:
                assert set(found) == {k for k, v in vars(whole).items() if v is not None}
                for key in found:
                    assert relative_error(found[key], getattr(whole, key)) < 1e-6


def test_all_ways_of_a_product_are_shared() -> None:
    found = {p.method for make in TASKS.values() for p in plan_spectrum(make()).layers}
    assert found == {"rows", "panels", "ghost", "separable"}


def test_without_a_group_it_is_refused() -> None:
    task = FineTuningTask(mlp(), vectors(4))
    with pytest.raises(ValueError, match="distributed=True needs a group of processes"):
        exact_kernel(task, device=CPU, distributed=True)
    with pytest.raises(ValueError, match='distributed=True needs the engine "exact"'):
        compute_spectrum(task, engine="sketch", distributed=True)
