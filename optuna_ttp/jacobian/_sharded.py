"""The exact kernel by several processes, each with its own samples.

Every process differentiates its share of the samples. What it holds of their Jacobian goes round
once; each pair of shares is multiplied by one of its two owners, and the sum of all parts is the
kernel, in every process.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
import torch
import torch.distributed as distributed

from optuna_ttp.jacobian._kernel import Kernel
from optuna_ttp.jacobian._prepare import Preparation
from optuna_ttp.jacobian._samples import SampleReader
from optuna_ttp.jacobian._separable import Separated
from optuna_ttp.jacobian._state import BlockState
from optuna_ttp.jacobian._state import multiply


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


def sharded_kernel(
    task: FineTuningTask,
    preparation: Preparation,
    reader: SampleReader,
    others: SampleReader | None,
    dtype: torch.dtype,
) -> Kernel:
    """Compute the kernel together with the other processes of the default group.

    Args:
        task:
            What is fine-tuned; the same in all processes.
        preparation:
            Claims and layout, which only depend on the task and the seed.
        reader:
            Of the training samples.
        others:
            Of the validation samples, or :obj:`None`.
        dtype:
            Precision of the Jacobian.

    Returns:
        The whole kernel.

    Raises:
        ValueError:
            If there are fewer samples than processes, or batches of different lengths.
    """
    rank, size = distributed.get_rank(), distributed.get_world_size()
    if task.n_samples < size:
        raise ValueError(
            f"There must be at least one sample for each of the {size} processes but got "
            f"{task.n_samples}."
        )
    shares = _shares(task.n_samples, size)
    layout, c = preparation.layout, task.n_outputs
    n_rows = task.n_samples * c
    kind = np.float64 if dtype == torch.float64 else np.float32
    gram = np.zeros((n_rows, n_rows), dtype=kind)
    stretched = np.zeros_like(gram) if layout.has_multipliers else None
    inner = np.zeros((task.n_samples, c))
    own = shares[rank]
    state, inner[own] = reader.read(layout, own.start, own.stop)

    def put(left: slice, right: slice, parts: Any) -> None:
        rows = slice(left.start * c, left.stop * c)
        columns = slice(right.start * c, right.stop * c)
        for matrix, part in zip((gram, stretched), parts, strict=True):
            if matrix is not None:
                matrix[rows, columns] = part.cpu().numpy()
                if left != right:
                    matrix[columns, rows] = matrix[rows, columns].T

    for source in range(size):
        received = _broadcast(state, shares[source], source, c)
        if source == rank:
            put(own, own, multiply(layout, state, state))
        elif _owner(rank, source) == rank:
            put(own, shares[source], multiply(layout, state, received))
    cross = None
    if others is not None and task.validation is not None:
        cross = _cross(task, preparation, others, state, own, rank, size, kind)
    for array in (gram, stretched, inner, cross):
        if array is not None:
            _add_up(array, reader.device)
    return Kernel(gram, cross, inner, stretched)


def check_group() -> None:
    """Refuse to go on where there is no group of processes.

    Raises:
        ValueError:
            If there is none.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError(
            "distributed=True needs a group of processes: call "
            "torch.distributed.init_process_group first, as under torchrun."
        )


def _cross(
    task: FineTuningTask,
    preparation: Preparation,
    others: SampleReader,
    state: BlockState,
    own: slice,
    rank: int,
    size: int,
    kind: type[np.floating[Any]],
) -> NDArray[Any]:
    """``J_v J^T`` for the columns of this process's samples."""
    assert task.validation is not None
    c, n = task.n_outputs, task.validation.n_samples
    cross = np.zeros((n * c, task.n_samples * c), dtype=kind)
    # Where there are fewer than processes, each differentiates all of them.
    shares = _shares(n, size) if n >= size else [slice(0, n)]
    held_out = None
    if len(shares) == 1 or shares[rank].stop > shares[rank].start:
        mine = shares[rank] if len(shares) > 1 else shares[0]
        held_out, _ = others.read(preparation.layout, mine.start, mine.stop)
    assert held_out is not None
    for source, share in enumerate(shares):
        left = held_out if len(shares) == 1 else _broadcast(held_out, share, source, c)
        product, _ = multiply(preparation.layout, left, state)
        rows = slice(share.start * c, share.stop * c)
        cross[rows, own.start * c : own.stop * c] = product.cpu().numpy()
    return cross


def _shares(n_samples: int, size: int) -> list[slice]:
    bounds = [n_samples * k // size for k in range(size + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def _owner(one: int, other: int) -> int:
    """Which of two processes multiplies their shares: each has as many as the others."""
    low, high = sorted((one, other))
    return low if (low + high) % 2 else high


def _broadcast(state: BlockState, share: slice, source: int, n_outputs: int) -> BlockState:
    """What one process holds, for all: a new state, or the own one at its source."""
    mine = distributed.get_rank() == source
    n_samples = share.stop - share.start
    ranks = {n: s.rows.shape[2] for n, s in state.separated.items()}
    sent: list[Any] = [_shapes(state), ranks] if mine else [None, None]
    distributed.broadcast_object_list(sent, src=source)
    shapes, ranks = sent
    if shapes != _shapes(state):
        raise ValueError(
            "All batches must have the same length for several processes. Pad the samples to one "
            "length."
        )

    def send(tensor: torch.Tensor, n_rows: int) -> torch.Tensor:
        whole = tensor.contiguous() if mine else tensor.new_empty((n_rows, *tensor.shape[1:]))
        distributed.broadcast(whole, src=source)
        return whole

    rows = send(state.rows, n_samples * n_outputs)
    factors = {
        name: replace(
            f,
            sources=tuple(send(s, n_samples) for s in f.sources),
            cotangents=tuple(send(d, n_samples) for d in f.cotangents),
        )
        for name, f in sorted(state.factors.items())
    }
    matrices = {n: send(m, n_samples * n_outputs) for n, m in sorted(state.matrices.items())}
    separated = {}
    for name, s in sorted(state.separated.items()):
        # Some samples may need more terms than others.
        weights, terms = s.weights, s.rows
        if not mine:
            weights = weights.new_empty((1, *weights.shape[1:3], ranks[name]))
            terms = terms.new_empty((1, terms.shape[1], ranks[name], terms.shape[3]))
        separated[name] = Separated(send(weights, n_samples), send(terms, n_samples))
    return state if mine else BlockState(n_samples, rows, factors, matrices, separated)


def _shapes(state: BlockState) -> list[tuple[str, tuple[int, ...]]]:
    """Shapes of all that is held but for the number of samples."""
    return [
        (name, tuple(t.shape[1:]))
        for name, f in sorted(state.factors.items())
        for t in (*f.sources, *f.cotangents)
    ]


def _add_up(array: NDArray[Any], device: torch.device) -> None:
    tensor = torch.from_numpy(array).to(device)
    distributed.all_reduce(tensor)
    array[...] = tensor.cpu().numpy()
