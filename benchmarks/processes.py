"""A few processes of a gloo group that compute something together."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
import multiprocessing
from typing import Any

import torch.distributed as distributed


def run_together(target: Callable[..., None], n_processes: int, *arguments: Any) -> None:
    """Start processes, and wait for them.

    Args:
        target:
            What each one runs, on its rank and ``arguments``.
        n_processes:
            How many.
        arguments:
            The same for all.

    Raises:
        RuntimeError:
            If one has failed.
    """
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=target, args=(rank, *arguments)) for rank in range(n_processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    for rank, process in enumerate(processes):
        if process.exitcode != 0:
            raise RuntimeError(f"Process {rank} ended with {process.exitcode}.")


@contextmanager
def group(rank: int, n_processes: int, folder: str) -> Iterator[None]:
    """Be one of a group; alone, of none.

    Args:
        rank:
            Of this process.
        n_processes:
            How many there are.
        folder:
            Where they meet.

    Yields:
        Nothing.
    """
    if n_processes == 1:
        yield
        return
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=n_processes
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()
