"""The exact engine: Jacobian rows by plain reverse-mode automatic differentiation.

Right for every architecture that PyTorch can differentiate, because each row is what
:func:`torch.autograd.grad` gives for one output of one sample. Memory is bounded: a block of rows
is held, the rows of all later samples are streamed past it, and the product is accumulated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
import torch
from tqdm import tqdm


if TYPE_CHECKING:
    from optuna_ttp.frozen_model import FrozenModel
    from optuna_ttp.task import FineTuningTask


# Weights whose products are summed in the Jacobian's own precision.
_CHUNK = 2**14


@dataclass(frozen=True, eq=False)
class Kernel:
    """Products of Jacobian rows.

    With learning-rate multipliers ``c`` of the weights, ``Theta = J diag(c) J^T``: SGD on ``w``
    with the learning rates ``c eta`` is SGD on ``w / sqrt(c)`` with the learning rate ``eta``.

    Attributes:
        gram:
            The empirical NTK ``Theta = J J^T``, of shape ``(N C, N C)``, symmetric.
        cross:
            ``J_v J^T`` with the Jacobian of the validation samples, of shape ``(N_v C, N C)``;
            :obj:`None` where the task has none.
        weight_outputs:
            ``J diag(c) w_0`` with the trainable weights ``w_0``, of shape ``(N, C)``.
        stretched:
            ``J diag(c)^2 J^T``, of the shape of ``gram``; :obj:`None` where all multipliers are 1.
    """

    gram: NDArray[np.floating[Any]]
    cross: NDArray[np.floating[Any]] | None
    weight_outputs: NDArray[np.float64]
    stretched: NDArray[np.floating[Any]] | None


def exact_kernel(
    task: FineTuningTask,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    max_memory: int = 4 * 2**30,
    show_progress_bar: bool = True,
) -> Kernel:
    """Compute the empirical NTK ``Theta = J J^T`` without ever holding more rows than fit.

    Of ``K`` blocks of rows, the rows of block ``k`` are held while those of the blocks after it
    are computed again, one sample at a time: ``(K + 1) / 2`` backward passes a row in all, one
    where all rows fit. The rows of validation samples are computed once a block.

    Args:
        task:
            What is fine-tuned.
        device:
            Where to differentiate.
        dtype:
            Precision of the Jacobian and the product. Single precision by default.
        max_memory:
            Bytes for the rows that are held and the result. 4 GiB by default. The activations of
            one sample come on top.
        show_progress_bar:
            Show a progress bar where the standard error stream is a terminal.

    Returns:
        The kernel, that of validation and training samples, and the outputs of the weights.

    Raises:
        ValueError:
            If two samples' rows do not fit the memory budget, a gradient is not finite, an output
            depends on no trainable parameter, or a sample's outputs depend on the other samples.
    """
    n_samples, n_outputs = task.n_samples, task.n_outputs
    held = _samples_per_block(task, dtype, max_memory)
    gram = np.zeros((n_samples * n_outputs,) * 2, dtype=_numpy_dtype(dtype))
    weight_outputs = np.zeros((n_samples, n_outputs))
    reference = task.initial_outputs(device, dtype)
    cross, held_out, n_held_out = None, None, 0
    if task.validation is not None:
        n_held_out = task.validation.n_samples
        cross = np.zeros((n_held_out * n_outputs, len(gram)), dtype=gram.dtype)
        held_out = task.validation.initial_outputs(device, dtype)
    starts = list(range(0, n_samples, held))
    with (
        task.frozen(device, dtype) as frozen,
        tqdm(
            total=sum(n_samples - start + n_held_out for start in starts) * n_outputs,
            desc="Jacobian rows",
            unit="row",
            disable=None if show_progress_bar else True,
            leave=False,
        ) as bar,
    ):
        roots = _root_multipliers(task, frozen, device, dtype)
        stretched = None if roots is None else np.zeros_like(gram)
        weights = torch.cat([p.detach().reshape(-1) for p in frozen.parameters.values()])
        if roots is not None:
            weights = weights * roots
        block = torch.empty(
            (min(held, n_samples) * n_outputs, task.n_parameters), dtype=dtype, device=device
        )
        for start in starts:
            stop = min(start + held, n_samples)
            rows = block[: (stop - start) * n_outputs]
            columns = slice(start * n_outputs, stop * n_outputs)
            for n, sample_rows in _rows(task, frozen, start, reference, device, dtype, roots):
                if n < stop:
                    rows[(n - start) * n_outputs : (n - start + 1) * n_outputs] = sample_rows
                    weight_outputs[n] = _product(sample_rows, weights[None])[:, 0]
                    if n == stop - 1:
                        gram[columns, columns] = _product(rows, rows)
                        if stretched is not None:
                            stretched[columns, columns] = _product(rows, rows, roots)
                    bar.update(n_outputs)
                    continue
                own = slice(n * n_outputs, (n + 1) * n_outputs)
                gram[columns, own] = _product(rows, sample_rows)
                gram[own, columns] = gram[columns, own].T
                if stretched is not None:
                    stretched[columns, own] = _product(rows, sample_rows, roots)
                    stretched[own, columns] = stretched[columns, own].T
                bar.update(n_outputs)
            if task.validation is None or cross is None or held_out is None:
                continue
            for n, sample_rows in _rows(
                task.validation, frozen, 0, held_out, device, dtype, roots
            ):
                own = slice(n * n_outputs, (n + 1) * n_outputs)
                cross[own, columns] = _product(sample_rows, rows)
                bar.update(n_outputs)
    return Kernel(gram, cross, weight_outputs, stretched)


def _root_multipliers(
    task: FineTuningTask, frozen: FrozenModel, device: torch.device, dtype: torch.dtype
) -> torch.Tensor | None:
    """Square roots of the weights' learning-rate multipliers, ``(D,)``; nothing if all are 1."""
    multipliers = task.multipliers
    if all(factor == 1.0 for factor in multipliers.values()):
        return None
    parts = [
        torch.full((p.numel(),), factor**0.5, dtype=dtype, device=device)
        for factor, p in zip(multipliers.values(), frozen.parameters.values(), strict=True)
    ]
    return torch.cat(parts)


def _rows(
    task: FineTuningTask,
    frozen: FrozenModel,
    start: int,
    reference: NDArray[np.float64],
    device: torch.device,
    dtype: torch.dtype,
    roots: torch.Tensor | None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each sample from ``start`` on with its Jacobian rows, of shape ``(C, D)``."""
    parameters = list(frozen.parameters.values())
    scale = float(np.abs(reference).max())
    # Half precision models cast inside may round a single sample and a batch differently.
    tolerance = 1e-3 * scale + 1e-5
    buffer = torch.empty((task.n_outputs, task.n_parameters), dtype=dtype, device=device)
    for n, (inputs, _) in enumerate(task.batches(1, device, dtype, start=start), start):
        batch_of_one = frozen(inputs)
        if batch_of_one.shape != (1, task.n_outputs):
            raise ValueError(
                f"The model must give outputs of shape (1, {task.n_outputs}) for a batch of one "
                f"but got {tuple(batch_of_one.shape)}. Does it squeeze its outputs?"
            )
        outputs = batch_of_one[0]
        if not outputs.requires_grad:
            raise ValueError(
                "The outputs do not depend on any trainable parameter. Does the model or forward= "
                "run under torch.no_grad, or detach its result?"
            )
        deviation = float(np.abs(outputs.detach().double().cpu().numpy() - reference[n]).max())
        if deviation > tolerance:
            raise ValueError(
                f"The outputs of sample {n} depend on the other samples of its batch: they differ "
                f"by {deviation:.2g} (outputs up to {scale:.2g}) between a batch of one and a "
                "larger batch. The empirical NTK is only defined sample by sample."
            )
        for c in range(task.n_outputs):
            gradients = torch.autograd.grad(
                outputs[c],
                parameters,
                retain_graph=c + 1 < task.n_outputs,
                allow_unused=True,
                materialize_grads=True,
            )
            torch.cat([_dense(g).reshape(-1) for g in gradients], out=buffer[c])
        if not torch.isfinite(buffer).all():
            c = int((~torch.isfinite(buffer).all(dim=1)).nonzero()[0])
            raise ValueError(
                f"The gradient of output {c} of sample {n} must be finite but got NaN or infinity."
            )
        if roots is not None:
            buffer *= roots
        yield n, buffer


def _product(
    rows: torch.Tensor, others: torch.Tensor, roots: torch.Tensor | None = None
) -> NDArray[np.floating[Any]]:
    """``rows diag(roots)^2 others.T``, with sums over many weights in double precision.

    In single precision the many small products would drown in the sum of those before them: with
    22 million weights that took 0.2 % from every entry.
    """
    # Apple's devices have no double precision.
    device = torch.device("cpu") if rows.device.type == "mps" else rows.device
    total = torch.zeros((len(rows), len(others)), dtype=torch.float64, device=device)
    for start in range(0, rows.shape[1], _CHUNK):
        chunk = slice(start, start + _CHUNK)
        left, right = rows[:, chunk], others[:, chunk]
        if roots is not None:
            left = left * roots[chunk] ** 2
        total += (left @ right.T).to(device)
    return total.to(rows.dtype).cpu().numpy()


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    # Embeddings may give sparse gradients.
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def _samples_per_block(task: FineTuningTask, dtype: torch.dtype, max_memory: int) -> int:
    itemsize = torch.empty((), dtype=dtype).element_size()
    n_rows = task.n_samples * task.n_outputs
    # The streamed sample needs its rows and the gradients they are gathered from.
    per_sample = task.n_outputs * task.n_parameters * itemsize
    n_held_out = 0 if task.validation is None else task.validation.n_samples * task.n_outputs
    # The matrices, and a product of two blocks in both precisions.
    n_matrices = 2 if all(c == 1.0 for c in task.multipliers.values()) else 3
    fixed = (
        n_rows**2 * (n_matrices * itemsize + 8) + n_rows * n_held_out * itemsize + 2 * per_sample
    )
    n_held = (max_memory - fixed) // per_sample
    if n_held < 1:
        raise ValueError(
            f"max_memory must be at least {(fixed + per_sample) / 2**30:.3g} GiB for {n_rows} "
            f"outputs and {task.n_parameters} parameters but got {max_memory / 2**30:.3g} GiB. "
            "Give more memory, or fewer samples."
        )
    return min(int(n_held), task.n_samples)


def _numpy_dtype(dtype: torch.dtype) -> type[np.floating[Any]]:
    return np.float64 if dtype == torch.float64 else np.float32
