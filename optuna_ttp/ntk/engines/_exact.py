"""The exact engine: the whole kernel, layer by layer, without ever holding the Jacobian.

One forward and C backward passes give the inputs and output cotangents of all layers. Each layer's
part of the kernel is then the cheaper of a product of rows, made slice by slice, and a contraction
of inputs and cotangents; see :mod:`optuna_ttp.ntk.jacobian._layout` for what is counted. Memory is
bounded: what is held of a block of samples stays, all later samples are streamed past it.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace
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
from optuna_ttp.ntk._processes import check_same_task
from optuna_ttp.ntk._processes import together
from optuna_ttp.ntk.engines._checkpoint import check_checkpoint
from optuna_ttp.ntk.engines._checkpoint import KernelCheckpoint
from optuna_ttp.ntk.engines._checkpoint import load_arrays
from optuna_ttp.ntk.engines._kernel import Kernel
from optuna_ttp.ntk.engines._self_check import check_rows
from optuna_ttp.ntk.engines._sharded import sharded_kernel
from optuna_ttp.ntk.jacobian._prepare import lifting
from optuna_ttp.ntk.jacobian._prepare import Preparation
from optuna_ttp.ntk.jacobian._prepare import prepare
from optuna_ttp.ntk.jacobian._samples import check_singles
from optuna_ttp.ntk.jacobian._samples import SampleReader
from optuna_ttp.ntk.jacobian._state import BlockState
from optuna_ttp.ntk.jacobian._state import multiply
from optuna_ttp.ntk.jacobian._state import PANEL
from optuna_ttp.ntk.layers._factors import CHUNK


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


# Bytes for activations and cotangents of the samples that go through the network together: more
# of them hardly make it faster.
_BATCH_BYTES = {"cpu": 200 * 2**20, "cuda": 2**31}
# Smaller than what the outputs are first computed in, so that samples see other neighbours.
_MAX_BATCH = 32
# With a checkpoint the samples are cut in so many blocks, whose products are stored one by one.
_CHECKPOINT_BLOCKS = 6


@dataclass(frozen=True)
class BlockSizes:
    """How samples are grouped.

    Attributes:
        batch:
            Go through the network together.
        held:
            Their part of the Jacobian is held; all samples where it fits.
        streamed:
            Are multiplied with those that are held at a time.
        n_bytes:
            What that takes at its peak.
        minimum:
            The smallest memory budget that can be kept.
    """

    batch: int
    held: int
    streamed: int
    n_bytes: int
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
    distributed: bool = False,
    held: torch.dtype | None = None,
) -> Kernel:
    """Compute the empirical NTK ``Theta = J J^T`` without ever holding the Jacobian.

    Where what is needed of all samples fits the memory budget, each is differentiated once.
    Otherwise, of ``K`` blocks of samples, what is held of block ``k`` stays while the samples
    after it are differentiated again: ``(K + 1) / 2`` passes over the data in all. Validation
    samples are differentiated once a block.

    Args:
        task:
            What is fine-tuned.
        device:
            Where to differentiate.
        dtype:
            Precision of the Jacobian and the product. Single precision by default.
        max_memory:
            Bytes for what is held of the Jacobian and the result. 4 GiB by default. The
            activations of one sample come on top where nothing else fits.
        show_progress_bar:
            Show a progress bar where the standard error stream is a terminal.
        seed:
            Of the samples and directions that are compared with plain automatic differentiation.
        checkpoint:
            Keeps finished blocks of the kernel, so that an interrupted computation goes on where
            it stopped. None by default.
        distributed:
            Share samples and weights with the other processes of the default group of
            :mod:`torch.distributed`, all of which must call this with the same task. What a
            process holds of its samples, and of its weights for all samples, is not limited by
            ``max_memory``, and there is no checkpoint. Off by default.
        held:
            Precision that the Jacobian is held in; products are made of it in single precision.
            That it is computed in by default.

    Returns:
        The kernel, that of validation and training samples, and the outputs of the weights.

    Raises:
        ValueError:
            If two samples do not fit the memory budget, a gradient is not finite, an output
            depends on no trainable parameter, a sample's outputs depend on the other samples, or
            processes were given different tasks; all of them raise then.
        JacobianMismatchError:
            If rows differ from what plain automatic differentiation gives.
    """
    check_bytes(max_memory)
    check_checkpoint(checkpoint)
    seed = check_seed(seed)
    if distributed:
        # Before anything that only some of them might refuse.
        check_same_task(task, {"dtype": dtype, "held": held, "seed": seed})

    def run(lifts: Mapping[str, int]) -> Kernel:
        return _kernel(
            task,
            device,
            dtype,
            max_memory,
            show_progress_bar,
            seed,
            checkpoint,
            distributed,
            lifts,
            held,
        )

    return lifting(run)


def _kernel(
    task: FineTuningTask,
    device: torch.device,
    dtype: torch.dtype,
    max_memory: int,
    show_progress_bar: bool,
    seed: int,
    checkpoint: KernelCheckpoint | None,
    distributed: bool,
    lifts: Mapping[str, int],
    held: torch.dtype | None,
) -> Kernel:
    reference = task.initial_outputs(device, dtype)
    held_out = None if task.validation is None else task.validation.initial_outputs(device, dtype)
    with task.frozen(device, dtype) as frozen:

        def prepared() -> tuple[Preparation, BlockSizes]:
            check_singles(task, frozen, reference, device, dtype)
            found = prepare(
                task, frozen, device=device, dtype=dtype, seed=seed, lifts=lifts, held=held
            )
            return found, block_sizes(task, found, dtype, device, max_memory)

        preparation, sizes = together(prepared) if distributed else prepared()
        if checkpoint is not None:
            sizes = _cut(sizes, task.n_samples)
        blocks = _blocks(task.n_samples, sizes.held)
        n_held_out = 0 if task.validation is None else task.validation.n_samples
        n_passes = sum(task.n_samples - b.start + n_held_out for b in blocks)
        with (
            preparation.claims.tape(frozen).attached() as tape,
            tqdm(
                total=n_passes * task.n_outputs,
                desc="Jacobian rows",
                unit="row",
                disable=None if show_progress_bar else True,
                leave=False,
            ) as bar,
        ):

            def reader(of: FineTuningTask, outputs: NDArray[np.float64]) -> SampleReader:
                return SampleReader(
                    of,
                    frozen,
                    preparation.claims,
                    tape,
                    batch_size=sizes.batch,
                    device=device,
                    dtype=dtype,
                    reference=outputs,
                    advance=bar.update,
                )

            others = None
            if task.validation is not None and held_out is not None:
                others = reader(task.validation, held_out)
            own = reader(task, reference)
            if distributed:
                kernel = sharded_kernel(task, preparation, own, others, dtype)
            else:
                assembly = _Assembly(task, preparation, own, others, dtype, checkpoint)
                for block in blocks:
                    assembly.add_block(block, sizes.streamed)
                kernel = assembly.kernel()
        check_rows(task, frozen, preparation, kernel, device=device, dtype=dtype, seed=seed)
    return kernel


def block_sizes(
    task: FineTuningTask,
    preparation: Preparation,
    dtype: torch.dtype,
    device: torch.device,
    max_memory: int,
) -> BlockSizes:
    """Choose how many samples are held under a memory budget.

    Args:
        task:
            What is fine-tuned.
        preparation:
            What a sample takes.
        dtype:
            Precision of the Jacobian.
        device:
            Where.
        max_memory:
            Bytes.

    Returns:
        Sizes that fit.

    Raises:
        ValueError:
            If not even two samples fit.
    """
    itemsize = torch.empty((), dtype=dtype).element_size()
    n_samples, n_outputs = task.n_samples, task.n_outputs
    n_rows = n_samples * n_outputs
    n_held_out = 0 if task.validation is None else task.validation.n_samples * n_outputs
    n_matrices = 2 if preparation.layout.has_multipliers else 1
    results = n_rows * (n_matrices * n_rows + n_held_out) * itemsize
    held, making = preparation.layout.bytes_per_sample, preparation.bytes_per_sample
    wanted = max(1, min(_MAX_BATCH, -(-n_samples // 2)))
    at_best = max(1, min(wanted, _BATCH_BYTES.get(device.type, 200 * 2**20) // max(1, making)))

    def needed(n_held: int, n_streamed: int, batch: int) -> int:
        columns = n_streamed * n_outputs
        # A tile in double precision, and a slice of rows on both sides.
        tile = n_held * n_outputs * columns * 8 * n_matrices
        slices = (n_held + n_streamed) * n_outputs * itemsize
        slices *= min(CHUNK, max(1, task.n_parameters))
        streamed = 0 if n_held == n_streamed == n_samples else n_streamed
        states = (n_held + streamed) * (held + preparation.layout.scratch_per_sample)
        # The activations of one sample come on top.
        return results + tile + slices + states + (batch - 1) * making

    minimum = min(needed(1, 1, 1), needed(n_samples, n_samples, 1))
    what = f"{n_rows} outputs and {task.n_parameters} parameters"
    check_enough_memory(max_memory, minimum, what, "or fewer samples")
    for batch in (at_best, 1):
        if needed(n_samples, n_samples, batch) <= max_memory:
            total = needed(n_samples, n_samples, batch) + making
            return BlockSizes(batch, n_samples, n_samples, total, minimum)
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
            total = needed(n_held, streamed, batch) + making
            return BlockSizes(batch, n_held, streamed, total, minimum)
    raise AssertionError("The smallest sizes fit.")


def expected_bytes(
    task: FineTuningTask,
    preparation: Preparation,
    sizes: BlockSizes,
    dtype: torch.dtype,
) -> int:
    """Say what computing the kernel takes at its peak, on top of the model and the data.

    :func:`block_sizes` adds up everything that could be held at once, for the budget must not be
    exceeded. This is what is held at once.

    Args:
        task:
            The task.
        preparation:
            What a sample takes.
        sizes:
            How samples are grouped.
        dtype:
            Precision of the Jacobian.

    Returns:
        Bytes.
    """
    itemsize = torch.empty((), dtype=dtype).element_size()
    layout, n_outputs = preparation.layout, task.n_outputs
    n_matrices = 2 if layout.has_multipliers else 1
    n_held_out = 0 if task.validation is None else task.validation.n_samples
    n_rows = task.n_samples * n_outputs
    results = n_rows * itemsize * (n_matrices * n_rows + n_held_out * n_outputs)
    whole = sizes.held == task.n_samples and n_held_out == 0
    streamed = 0 if whole else sizes.streamed
    states = (sizes.held + streamed) * layout.bytes_per_sample
    reading = sizes.batch * preparation.bytes_per_sample
    tile = sizes.held * max(sizes.held, streamed) * n_outputs**2 * 8 * n_matrices
    scratch = (sizes.held + streamed) * layout.scratch_per_sample
    panel = (sizes.held + streamed) * n_outputs * min(PANEL, task.n_parameters) * itemsize
    if not any(p.method == "panels" for p in layout.parameters):
        panel = 0
    # Entries of the result take memory only once they are written.
    multiplying = tile + max(scratch + panel, results) if whole else tile + scratch + panel
    before = 0 if whole else results
    # Weights in another layout, and two gradients of all that are compared in the end.
    weights = 3 * task.n_parameters * itemsize
    return states + before + max(reading, multiplying) + weights


def _cut(sizes: BlockSizes, n_samples: int) -> BlockSizes:
    """Blocks that are small enough to be worth storing one by one."""
    held = min(sizes.held, max(1, -(-n_samples // _CHECKPOINT_BLOCKS)))
    return replace(
        sizes, batch=min(sizes.batch, held), held=held, streamed=min(sizes.streamed, held)
    )


def _blocks(n_samples: int, size: int, start: int = 0) -> list[slice]:
    return [slice(s, min(s + size, n_samples)) for s in range(start, n_samples, size)]


class _Assembly:
    """The kernel while it is put together from blocks."""

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
        """Multiply a block of samples with itself, all later ones, and the validation samples."""
        later = _blocks(self._n_samples, streamed, block.stop)
        state: BlockState | None = None
        if not self._restore(block, block):
            state = self._state(block)
            product, stretched = multiply(self._layout, state, state)
            self._refuse_infinite(state, product, block)
            self._put(block, block, product, stretched)
        for other in later:
            if self._restore(block, other):
                continue
            state = self._state(block) if state is None else state
            right, _ = self._reader.read(self._layout, other.start, other.stop)
            self._put(block, other, *multiply(self._layout, state, right))
        if self._others is None:
            return
        size = self._n_held_out if not later and block.start == 0 else streamed
        for held_out in _blocks(self._n_held_out, min(size, max(1, self._n_samples))):
            state = self._state(block) if state is None else state
            left, _ = self._others.read(self._layout, held_out.start, held_out.stop)
            product, _ = multiply(self._layout, left, state)
            assert self._cross is not None
            self._cross[self._rows(held_out), self._rows(block)] = product.cpu().numpy()

    def kernel(self) -> Kernel:
        """Return the finished kernel."""
        return Kernel(self._gram, self._cross, self._inner, self._stretched)

    def _state(self, block: slice) -> BlockState:
        state, inner = self._reader.read(self._layout, block.start, block.stop)
        self._inner[block] = inner
        return state

    def _rows(self, samples: slice) -> slice:
        return slice(samples.start * self._n_outputs, samples.stop * self._n_outputs)

    def _matrices(self) -> Iterator[NDArray[Any]]:
        yield self._gram
        if self._stretched is not None:
            yield self._stretched

    def _put(
        self, left: slice, right: slice, product: torch.Tensor, stretched: torch.Tensor | None
    ) -> None:
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

    def _refuse_infinite(self, state: BlockState, product: torch.Tensor, block: slice) -> None:
        if torch.isfinite(product.diagonal()).all():
            return
        bad = state.first_not_finite(self._n_outputs)
        if bad is not None:
            raise ValueError(
                f"The gradient of output {bad[1]} of sample {block.start + bad[0]} must be finite "
                "but got NaN or infinity."
            )
