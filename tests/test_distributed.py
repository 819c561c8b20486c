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


def _task() -> FineTuningTask:
    return FineTuningTask(
        cnn(),
        images(13),
        validation_data=images(6, seed=2),
        learning_rate_multipliers={"9.": 3.0},
    )


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=_N_PROCESSES
    )
    try:
        kernel = exact_kernel(_task(), device=CPU, distributed=True, show_progress_bar=False)
        arrays = {k: v for k, v in vars(kernel).items() if v is not None}
        np.savez(f"{folder}/{rank}.npz", **arrays)
    finally:
        distributed.destroy_process_group()


def test_four_processes_give_the_kernel_of_one(tmp_path: Path) -> None:
    whole = exact_kernel(_task(), device=CPU, show_progress_bar=False)
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
    for rank in range(_N_PROCESSES):
        with np.load(tmp_path / f"{rank}.npz") as found:
            assert set(found) == {k for k, v in vars(whole).items() if v is not None}
            for key in found:
                assert relative_error(found[key], getattr(whole, key)) < 1e-6


def test_without_a_group_it_is_refused() -> None:
    task = FineTuningTask(mlp(), vectors(4))
    with pytest.raises(ValueError, match="distributed=True needs a group of processes"):
        exact_kernel(task, device=CPU, distributed=True)
    with pytest.raises(ValueError, match='distributed=True needs the engine "exact"'):
        compute_spectrum(task, engine="sketch", distributed=True)
