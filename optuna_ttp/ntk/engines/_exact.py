"""The exact engine: the whole kernel, layer by layer, without storing the whole Jacobian.

One forward and C backward passes give the inputs and output cotangents of all layers. Each layer's
part of the kernel is then a product of rows or a contraction of inputs and cotangents, whichever
takes fewer operations, see :mod:`optuna_ttp.ntk.jacobian._layout`. Memory is bounded: the Jacobian
of one block of samples is stored while all later samples are differentiated again.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace
from functools import partial
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
import torch
from tqdm import tqdm

from optuna_ttp._util.checks import check_bytes
from optuna_ttp._util.checks import check_enough_memory
from optuna_ttp._util.checks import check_seed
from optuna_ttp.ntk._autocast import without_autocast
from optuna_ttp.ntk._settings import EngineSettings
from optuna_ttp.ntk.engines._checkpoint import check_checkpoint
from optuna_ttp.ntk.engines._checkpoint import KernelCheckpoint
from optuna_ttp.ntk.engines._checkpoint import load_arrays
from optuna_ttp.ntk.engines._kernel import Kernel
from optuna_ttp.ntk.engines._rules import EXACT
from optuna_ttp.ntk.engines._self_check import check_rows
from optuna_ttp.ntk.jacobian._prepare import lifting
from optuna_ttp.ntk.jacobian._prepare import Preparation
from optuna_ttp.ntk.jacobian._prepare import prepare
from optuna_ttp.ntk.jacobian._samples import check_singles
from optuna_ttp.ntk.jacobian._samples import SampleReader
from optuna_ttp.ntk.jacobian._state import BlockState
from optuna_ttp.ntk.jacobian._state import multiply
from optuna_ttp.ntk.layers._rules import PRODUCTS


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


@dataclass(frozen=True)
class Grouping:
    """How samples are grouped under a memory budget.

    ``batch`` samples go through the network together; the Jacobian of ``held`` samples is stored,
    and multiplied with that of ``streamed`` other samples at a time. ``minimum`` is the smallest
    memory budget in bytes that suffices.
    """

    batch: int
    held: int
    streamed: int
    minimum: int


@without_autocast
def exact_kernel(
    task: FineTuningTask,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    max_memory: int = 4 * 2**30,
    show_progress_bar: bool = True,
    seed: int = 0,
    checkpoint: KernelCheckpoint | None = None,
    held: torch.dtype | None = None,
) -> Kernel:
    """Compute the empirical NTK ``Theta = J J^T`` without storing the whole Jacobian.

    If the stored form of all samples fits ``max_memory`` bytes, each sample is differentiated
    once. Otherwise there are ``K`` blocks of samples, and while one is stored the samples of later
    blocks are differentiated again, which makes ``(K + 1) / 2`` passes over the data. Validation
    samples are differentiated once per block. Activations of one sample may exceed the budget.

    A ``checkpoint`` stores finished blocks. ``held`` is the precision for storing the Jacobian, by
    default ``dtype``.

    ValueError is raised if two samples do not fit the memory, a gradient is not finite, or an
    output depends on no trainable parameter or on other samples; JacobianMismatchError if rows
    differ from those of plain automatic differentiation.
    """
    check_bytes(max_memory)
    check_checkpoint(checkpoint)
    seed = check_seed(seed)
    settings = EngineSettings(device, dtype, held, max_memory, seed, show_progress_bar)
    return lifting(partial(_kernel, task, settings, checkpoint))


def _kernel(
    task: FineTuningTask,
    settings: EngineSettings,
    checkpoint: KernelCheckpoint | None,
    lifts: Mapping[str, int],
) -> Kernel:
    """Compute the kernel with ``lifts`` as for :func:`prepare`; see :func:`exact_kernel`."""
    device, dtype = settings.device, settings.dtype
    reference = task.initial_outputs(device, dtype)
    held_out = None if task.validation is None else task.validation.initial_outputs(device, dtype)
    with task.frozen(device, dtype) as frozen:
        check_singles(task, frozen, reference, settings)
        preparation = prepare(task, frozen, settings, lifts)
        grouping = choose_grouping(task, preparation, settings)
        if checkpoint is not None:
            grouping = _cut(grouping, task.n_samples)
        blocks = _blocks(task.n_samples, grouping.held)
        n_held_out = 0 if task.validation is None else task.validation.n_samples
        n_passes = sum(task.n_samples - b.start + n_held_out for b in blocks)
        with (
            preparation.claims.tape(frozen).attached() as tape,
            tqdm(
                total=n_passes * task.n_outputs,
                desc="Jacobian rows",
                unit="row",
                disable=None if settings.show_progress_bar else True,
                leave=False,
            ) as bar,
        ):

            def reader(of: FineTuningTask, outputs: NDArray[np.float64]) -> SampleReader:
                return SampleReader(
                    of,
                    frozen,
                    preparation.claims,
                    tape,
                    settings,
                    batch_size=grouping.batch,
                    reference=outputs,
                    advance=bar.update,
                )

            others = None
            if task.validation is not None and held_out is not None:
                others = reader(task.validation, held_out)
            training = reader(task, reference)
            assembly = _Assembly(task, preparation, training, others, dtype, checkpoint)
            for block in blocks:
                assembly.add_block(block, grouping.streamed)
            kernel = assembly.kernel()
        check_rows(task, frozen, preparation.claims, kernel, settings)
    return kernel


def choose_grouping(
    task: FineTuningTask, preparation: Preparation, settings: EngineSettings
) -> Grouping:
    """Choose numbers of samples for batches and blocks that fit ``max_memory`` bytes.

    ValueError is raised if not even two samples fit.
    """
    max_memory, itemsize = settings.max_memory, settings.dtype.itemsize
    n_samples, n_outputs = task.n_samples, task.n_outputs
    n_rows = n_samples * n_outputs
    n_held_out = 0 if task.validation is None else task.validation.n_samples * n_outputs
    n_matrices = 2 if preparation.layout.has_multipliers else 1
    results = n_rows * (n_matrices * n_rows + n_held_out) * itemsize
    held, making = preparation.layout.bytes_per_sample, preparation.bytes_per_sample
    wanted = max(1, min(EXACT.max_batch, -(-n_samples // 2)))
    batch_bytes = EXACT.gpu_batch_bytes if settings.device.type == "cuda" else EXACT.batch_bytes
    at_best = max(1, min(wanted, batch_bytes // max(1, making)))

    def needed(n_held: int, n_streamed: int, batch: int) -> int:
        columns = n_streamed * n_outputs
        # A tile is in double precision, and each side has a slice of rows.
        tile = n_held * n_outputs * columns * 8 * n_matrices
        slices = (n_held + n_streamed) * n_outputs * itemsize
        slices *= min(PRODUCTS.chunk, max(1, task.n_parameters))
        streamed = 0 if n_held == n_streamed == n_samples else n_streamed
        states = (n_held + streamed) * (held + preparation.layout.scratch_per_sample)
        # The activations of one sample come on top.
        return results + tile + slices + states + (batch - 1) * making

    minimum = min(needed(1, 1, 1), needed(n_samples, n_samples, 1))
    what = f"{n_rows} outputs and {task.n_parameters} parameters"
    check_enough_memory(max_memory, minimum, what, "or fewer samples")
    for batch in (at_best, 1):
        if needed(n_samples, n_samples, batch) <= max_memory:
            return Grouping(batch, n_samples, n_samples, minimum)
    for batch in (at_best, 1):
        n_held = 0
        for candidate in range(1, n_samples + 1):
            streamed = max(1, candidate // 4)
            if needed(candidate, streamed, min(batch, streamed)) > max_memory:
                break
            n_held = candidate
        if n_held >= min(batch, n_samples):
            streamed = max(1, n_held // 4)
            batch = min(batch, streamed)
            return Grouping(batch, n_held, streamed, minimum)
    raise AssertionError("The smallest sizes fit.")


def expected_bytes(
    task: FineTuningTask,
    preparation: Preparation,
    grouping: Grouping,
    dtype: torch.dtype,
) -> int:
    """Return the peak of memory for computing the kernel in bytes, beside the model and the data.

    It is an estimate of the tensors that exist at the same time, not an upper bound like the count
    of :func:`choose_grouping`.
    """
    itemsize = dtype.itemsize
    layout, n_outputs = preparation.layout, task.n_outputs
    n_matrices = 2 if layout.has_multipliers else 1
    n_held_out = 0 if task.validation is None else task.validation.n_samples
    n_rows = task.n_samples * n_outputs
    results = n_rows * itemsize * (n_matrices * n_rows + n_held_out * n_outputs)
    whole = grouping.held == task.n_samples and n_held_out == 0
    streamed = 0 if whole else grouping.streamed
    states = (grouping.held + streamed) * layout.bytes_per_sample
    reading = grouping.batch * preparation.bytes_per_sample
    tile = grouping.held * max(grouping.held, streamed) * n_outputs**2 * 8 * n_matrices
    scratch = (grouping.held + streamed) * layout.scratch_per_sample
    panel = (
        (grouping.held + streamed) * n_outputs * min(PRODUCTS.panel, task.n_parameters) * itemsize
    )
    if not any(p.method == "panels" for p in layout.parameters):
        panel = 0
    # Entries of the result take no memory before they are written.
    multiplying = tile + max(scratch + panel, results) if whole else tile + scratch + panel
    before = 0 if whole else results
    # There is a copy of the weights, and at the end two gradients of all weights are compared.
    weights = 3 * task.n_parameters * itemsize
    return states + before + max(reading, multiplying) + weights


def _cut(grouping: Grouping, n_samples: int) -> Grouping:
    """Return a grouping with about six blocks or more, whose products a checkpoint stores."""
    held = min(grouping.held, max(1, -(-n_samples // EXACT.n_checkpoint_blocks)))
    return replace(
        grouping, batch=min(grouping.batch, held), held=held, streamed=min(grouping.streamed, held)
    )


def _blocks(n_samples: int, block_size: int, start: int = 0) -> list[slice]:
    """Return slices of at most ``block_size`` samples from ``start`` up to ``n_samples``."""
    return [slice(s, min(s + block_size, n_samples)) for s in range(start, n_samples, block_size)]


class _Assembly:
    """Computes the kernel block by block, with a checkpoint of finished blocks if there is one."""

    def __init__(
        self,
        task: FineTuningTask,
        preparation: Preparation,
        reader: SampleReader,
        others: SampleReader | None,
        dtype: torch.dtype,
        checkpoint: KernelCheckpoint | None,
    ) -> None:
        self._n_samples, self._n_outputs = task.n_samples, task.n_outputs
        self._n_held_out = 0 if task.validation is None else task.validation.n_samples
        self._layout = preparation.layout
        self._reader, self._others = reader, others
        self._checkpoint = checkpoint
        n_rows = task.n_samples * task.n_outputs
        kind = np.float64 if dtype == torch.float64 else np.float32
        self._gram = np.zeros((n_rows, n_rows), dtype=kind)
        self._stretched = np.zeros_like(self._gram) if self._layout.has_multipliers else None
        self._cross = None
        if others is not None:
            self._cross = np.zeros((self._n_held_out * task.n_outputs, n_rows), dtype=kind)
        self._inner = np.zeros((task.n_samples, task.n_outputs))

    def add_block(self, block: slice, streamed: int) -> None:
        """Write the products of the Jacobian rows of a block of training samples into the kernel.

        They are the products with the rows of the block, of all later training samples,
        ``streamed`` samples at a time, and of the validation samples.
        """
        later = _blocks(self._n_samples, streamed, block.stop)
        state: BlockState | None = None
        if not self._restore(block, block):
            state = self._state(block)
            product, stretched = multiply(self._layout, state, state)
            if not torch.isfinite(product.diagonal()).all():
                state.check_finite(block.start, self._n_outputs)
            self._put(block, block, product, stretched)
        for other in later:
            if self._restore(block, other):
                continue
            state = self._state(block) if state is None else state
            right, _ = self._reader.read(self._layout, other.start, other.stop)
            self._put(block, other, *multiply(self._layout, state, right))
        if self._others is None:
            return
        block_size = self._n_held_out if not later and block.start == 0 else streamed
        for held_out in _blocks(self._n_held_out, min(block_size, max(1, self._n_samples))):
            state = self._state(block) if state is None else state
            left, _ = self._others.read(self._layout, held_out.start, held_out.stop)
            product, _ = multiply(self._layout, left, state)
            assert self._cross is not None
            self._cross[self._rows(held_out), self._rows(block)] = product.cpu().numpy()

    def kernel(self) -> Kernel:
        """Return the kernel, which is complete after :meth:`add_block` of every block."""
        return Kernel(self._gram, self._cross, self._inner, self._stretched)

    def _state(self, block: slice) -> BlockState:
        """Differentiate a block of samples; return its state, and store its ``J diag(c) w_0``."""
        state, inner = self._reader.read(self._layout, block.start, block.stop)
        self._inner[block] = inner
        return state

    def _rows(self, samples: slice) -> slice:
        """Return the rows of the kernel that belong to a range of samples."""
        return slice(samples.start * self._n_outputs, samples.stop * self._n_outputs)

    def _matrices(self) -> Iterator[NDArray[Any]]:
        """Yield the kernel, and ``J diag(c)^2 J^T`` if multipliers are not all one."""
        yield self._gram
        if self._stretched is not None:
            yield self._stretched

    def _put(
        self, left: slice, right: slice, product: torch.Tensor, stretched: torch.Tensor | None
    ) -> None:
        """Write the products of two blocks into the kernel and to the checkpoint."""
        rows, columns = self._rows(left), self._rows(right)
        parts = [p.cpu().numpy() for p in (product, stretched) if p is not None]
        for matrix, part in zip(self._matrices(), parts, strict=True):
            matrix[rows, columns] = part
            if left != right:
                matrix[columns, rows] = part.T
        if self._checkpoint is not None:
            arrays = [m[rows, columns] for m in self._matrices()]
            if left == right:
                arrays.append(self._inner[left])
            self._checkpoint.save_block((left.start, right.start), arrays)

    def _restore(self, left: slice, right: slice) -> bool:
        """Copy the products of two blocks from the checkpoint; return False if it has none."""
        if self._checkpoint is None:
            return False
        rows, columns = self._rows(left), self._rows(right)
        shapes: list[tuple[int, ...]] = [m[rows, columns].shape for m in self._matrices()]
        if left == right:
            shapes.append(self._inner[left].shape)
        arrays = load_arrays(self._checkpoint, (left.start, right.start), shapes)
        if arrays is None:
            return False
        for matrix, part in zip(self._matrices(), arrays, strict=False):
            matrix[rows, columns] = part
            matrix[columns, rows] = part.T
        if left == right:
            self._inner[left] = arrays[-1]
        return True
