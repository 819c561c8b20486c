"""The matrix-free engine: leading eigenpairs from products ``J J^T V`` alone.

Neither the kernel nor a wide sketch is held: memory grows with N C times a few hundred columns.
A block Krylov method with a Rayleigh-Ritz projection (Saad, "Numerical Methods for Large
Eigenvalue Problems", 2011, chapter 6) starts at the leading space of a narrow sketch, or at
random, and goes on with the residuals. What it returns is Nystrom's approximation from all
products, which is one step further than the projection for no more passes (Tropp, Yurtsever, Udell
and Cevher, NeurIPS 2017, arXiv 1706.05736).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from typing import TYPE_CHECKING
import warnings

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_ttp._checks import check_enough_memory
from optuna_ttp.exceptions import ApproximationWarning
from optuna_ttp.jacobian._choice import check_multipliers
from optuna_ttp.jacobian._directions import Directions
from optuna_ttp.jacobian._eigenpairs import Eigenpairs
from optuna_ttp.jacobian._eigenpairs import eigenpairs_of_features
from optuna_ttp.jacobian._prepare import lifting
from optuna_ttp.jacobian._samples import check_singles
from optuna_ttp.jacobian._sketch import nystrom
from optuna_ttp.jacobian._sketch import Passes
from optuna_ttp.jacobian._sketch import sketch_jacobian


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


# Leading pairs where neither their number nor a share of the trace is asked for.
N_PAIRS = 100
# More columns than pairs, for the sake of the last of these.
_EXTRA = 1.5
# Residuals ``|Theta v - lambda v|`` relative to ``lambda`` at which a pair has converged. The
# eigenvalue is off by about the square of that, relative to the gap behind the block.
_TOLERANCE = 0.05
_MAX_BLOCKS = 8
_MAX_WIDTH = 4096
# Share of the memory budget for the sketch, whose columns are held about three times.
_SKETCH_SHARE = 0.5 / 3.0


@dataclass(frozen=True, eq=False)
class LeadingPairs:
    """Leading eigenpairs with what else is made of the Jacobian.

    Attributes:
        pairs:
            The eigenpairs.
        weight_outputs:
            ``J w_0``, of shape ``(N, C)``.
        validation_features:
            ``J_v J^T V Lambda^(-1/2)``, of shape ``(N_v C, r)``; nothing without any.
        width:
            Of the sketch at the start.
    """

    pairs: Eigenpairs
    weight_outputs: NDArray[np.float64]
    validation_features: NDArray[np.floating[Any]] | None
    width: int


def leading_pairs(
    task: FineTuningTask,
    *,
    rank: int | None = None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    max_memory: int = 4 * 2**30,
    show_progress_bar: bool = True,
    seed: int = 0,
) -> LeadingPairs:
    """Compute leading eigenpairs of the kernel of a task.

    Where there are few outputs, rows of the Jacobian are made, used and thrown away, one batch
    after the other. Where there are many, products go through the network one direction at a time.

    Args:
        task:
            What is fine-tuned. All learning-rate multipliers must be one.
        rank:
            How many pairs. 100 by default.
        device:
            Where to differentiate.
        dtype:
            Precision of the Jacobian. Single precision by default.
        max_memory:
            Bytes. 4 GiB by default.
        show_progress_bar:
            Show progress bars where the standard error stream is a terminal.
        seed:
            Of where it starts, and of what gradients are checked on. Zero by default.

    Returns:
        The pairs. There is an :exc:`~optuna_ttp.exceptions.ApproximationWarning` where some have
        not converged.

    Raises:
        ValueError:
            As for :func:`~optuna_ttp.jacobian.exact_kernel`, and for multipliers.
        JacobianMismatchError:
            If products differ from what plain automatic differentiation gives.
    """
    check_multipliers(task, "matrix_free")
    n_rows = task.n_samples * task.n_outputs
    n_wanted = min(n_rows, N_PAIRS if rank is None else rank)
    n_columns = columns_of(task, rank)
    check_vectors_memory(task, n_columns, max_memory)
    if by_directions(task, n_columns, dtype, max_memory):
        return _by_directions(task, n_wanted, n_columns, device, dtype, max_memory, seed)
    return _by_rows(task, n_wanted, n_columns, device, dtype, max_memory, show_progress_bar, seed)


def columns_of(task: FineTuningTask, rank: int | None) -> int:
    """Return how many vectors a block of products has.

    Args:
        task:
            The task.
        rank:
            How many pairs are wanted, or :obj:`None`.
    """
    n_rows = task.n_samples * task.n_outputs
    n_wanted = min(n_rows, N_PAIRS if rank is None else rank)
    return min(n_rows, n_wanted + max(10, int(_EXTRA * n_wanted)))


def sketch_width(n_rows: int, dtype: torch.dtype, max_memory: int) -> int:
    """Return how wide the sketch is where products start.

    Args:
        n_rows:
            N C.
        dtype:
            Precision of the Jacobian.
        max_memory:
            Bytes.
    """
    itemsize = torch.empty((), dtype=dtype).element_size()
    width = int(_SKETCH_SHARE * max_memory / (n_rows * itemsize))
    return max(2, min(_MAX_WIDTH, width) // 2 * 2)


def check_vectors_memory(task: FineTuningTask, n_columns: int, max_memory: float) -> int:
    """Refuse a memory budget that a block of vectors and the weights do not fit.

    Args:
        task:
            The task.
        n_columns:
            Of a block of vectors.
        max_memory:
            Bytes.

    Returns:
        The smallest budget, in single precision.

    Raises:
        ValueError:
            If they do not fit.
    """
    n_rows = task.n_samples * task.n_outputs
    minimum = 4 * (n_rows * n_columns + task.n_parameters)
    check_enough_memory(
        max_memory,
        minimum,
        f"{n_columns} vectors of {n_rows} outputs and {task.n_parameters} parameters",
        "a smaller rank, or fewer samples",
    )
    return minimum


def by_directions(
    task: FineTuningTask, n_columns: int, dtype: torch.dtype, max_memory: int
) -> bool:
    """Whether there are so many outputs that products go one direction at a time.

    Args:
        task:
            The task.
        n_columns:
            Of a block of vectors.
        dtype:
            Precision of the Jacobian.
        max_memory:
            Bytes.
    """
    itemsize = torch.empty((), dtype=dtype).element_size()
    # What rows give of all weights must be held; where it does not fit, they are made again.
    n_groups = -(-2 * task.n_parameters * n_columns * itemsize // max_memory)
    # Backward passes and as much again for rows, twice; against one pass each way a direction.
    return 2 * n_groups * (2 * task.n_outputs + 1) > 4 * n_columns


def _by_rows(
    task: FineTuningTask,
    n_wanted: int,
    n_columns: int,
    device: torch.device,
    dtype: torch.dtype,
    max_memory: int,
    show_progress_bar: bool,
    seed: int,
) -> LeadingPairs:
    n_rows = task.n_samples * task.n_outputs
    width = sketch_width(n_rows, dtype, max_memory)
    settings: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "seed": seed,
        "show_progress_bar": show_progress_bar,
    }
    sketch = sketch_jacobian(task, width=width, **settings)
    trace, weight_outputs = sketch.trace, sketch.weight_outputs
    if not trace > 0.0:
        raise ValueError("The Jacobian must not be zero: no trainable parameter moves any output.")
    features = sketch.features()
    del sketch
    start = eigenpairs_of_features(features, rank=n_columns).eigenvectors
    del features
    vectors = _filled(torch.as_tensor(start), n_columns, seed)

    def run(lifts: Mapping[str, int]) -> LeadingPairs:
        with Passes(task, device, dtype, seed, lifts, show_progress_bar) as passes:

            def product(v: torch.Tensor) -> torch.Tensor:
                return passes.images(v.to(device=device, dtype=dtype), max_memory)[0]

            values, basis, _ = _krylov(product, vectors, n_wanted)
            pairs = Eigenpairs(values.numpy(), basis.numpy(), trace)
            features = None
            if task.validation is not None:
                whitened = (basis / values.sqrt()).to(device=device, dtype=dtype)
                (images,) = passes.images(whitened, max_memory, own=False, others=True)
                features = images.to(dtype).numpy()
        return LeadingPairs(pairs, weight_outputs, features, width)

    return lifting(run)


def _by_directions(
    task: FineTuningTask,
    n_wanted: int,
    n_columns: int,
    device: torch.device,
    dtype: torch.dtype,
    max_memory: int,
    seed: int,
) -> LeadingPairs:
    generator = torch.Generator().manual_seed(seed)
    n_rows = task.n_samples * task.n_outputs
    reference = task.initial_outputs(device, dtype)
    with task.frozen(device, dtype) as frozen:
        check_singles(task, frozen, reference, device, dtype)
        directions = Directions(task, frozen, device, dtype, max_memory // 2)

        def product(v: torch.Tensor) -> torch.Tensor:
            return directions.images(v.to(device=device, dtype=dtype))

        signs = torch.randint(2, (n_rows, n_columns), generator=generator, dtype=torch.float64)
        start = 2.0 * signs - 1.0
        images = product(start)
        if not float((start * images).sum()) > 0.0:
            raise ValueError(
                "The Jacobian must not be zero: no trainable parameter moves any output."
            )
        values, basis, _ = _krylov(product, images, n_wanted)
        # The pairs hold their part of the trace; random signs estimate that of the rest
        # (Hutchinson, 1990).
        rest = (start * images).sum(0) - values @ (basis.T @ start).square()
        trace = float(values.sum() + rest.mean().clamp(min=0.0))
        weights = [p.detach() for p in frozen.parameters.values()]
        outputs = directions.forward(task, [weights])
        features = None
        if task.validation is not None:
            whitened = (basis / values.sqrt()).to(device=device, dtype=dtype)
            parts = [
                directions.forward(task.validation, directions.adjoint(some))
                for some in whitened.split(directions.n_together, dim=1)
            ]
            features = torch.cat(parts, 1).to(dtype).numpy()
    return LeadingPairs(
        Eigenpairs(values.numpy(), basis.numpy(), trace),
        outputs.reshape(task.n_samples, task.n_outputs).numpy(),
        features,
        0,
    )


def _filled(start: torch.Tensor, n_columns: int, seed: int) -> torch.Tensor:
    """Where the sketch has too few eigenpairs, random vectors beside them."""
    missing = n_columns - start.shape[1]
    if missing <= 0:
        return start
    generator = torch.Generator().manual_seed(seed)
    more = torch.randn((len(start), missing), generator=generator, dtype=start.dtype)
    return torch.cat([start, more], 1)


def _krylov(
    product: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, n_wanted: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Leading eigenvalues, eigenvectors, and the largest relative residual."""
    n_columns = start.shape[1]
    basis = torch.linalg.qr(start)[0]
    images = product(basis)
    for block in range(_MAX_BLOCKS):
        if not torch.isfinite(images).all():
            raise ValueError(
                "The kernel must be finite but overflowed. Scale the inputs, or compute with "
                'dtype="float64".'
            )
        inner = basis.T @ images
        values, mixing = torch.linalg.eigh((inner + inner.T) / 2)
        values, mixing = values.flip(0)[:n_columns], mixing.flip(1)[:, :n_columns]
        residuals = images @ mixing - (basis @ mixing) * values
        values, sizes = values[:n_wanted], residuals[:, :n_wanted].norm(dim=0)
        # Pairs at the level of rounding errors are dropped in the end.
        floor = float(values[0]) * torch.finfo(torch.float32).eps
        open_ = sizes > _TOLERANCE * values.clamp(min=floor)
        worst = float((sizes / values.clamp(min=floor)).max())
        n_left = len(basis) - basis.shape[1]
        if not open_.any() or n_left == 0 or block + 1 == _MAX_BLOCKS:
            break
        # Of all columns, not only of what is open: passes over the data cost more than columns.
        new = residuals[:, :n_left]
        for _ in range(2):
            new = torch.linalg.qr(new - basis @ (basis.T @ new))[0]
        basis = torch.cat([basis, new], 1)
        images = torch.cat([images, product(new)], 1)
    if open_.any() and n_left > 0:
        warnings.warn(
            f"{int(open_.sum())} of {n_wanted} eigenpairs have not converged: their residuals are "
            f'up to {worst:.0%} of the eigenvalue. Ask for a smaller rank, or use engine="exact".',
            ApproximationWarning,
            stacklevel=6,
        )
    vectors, values, _ = nystrom(basis, images, n_wanted)
    n_kept = int((values > float(values[0]) * torch.finfo(torch.float32).eps).sum())
    return values[:n_kept], vectors[:, :n_kept], worst
