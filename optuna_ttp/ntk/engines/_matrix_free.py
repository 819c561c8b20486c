"""The matrix-free engine: leading eigenpairs from products ``J J^T V`` alone.

Neither the kernel nor a wide sketch is held: memory grows with N C times a few hundred columns.
A block Krylov method with a Rayleigh-Ritz projection (Saad, "Numerical Methods for Large
Eigenvalue Problems", 2011, chapter 6) starts at the leading space of a narrow sketch, or at
random, and goes on with the residuals. What it returns is Nystrom's approximation from all
products, which is one step further than the projection for no more passes (Tropp, Yurtsever, Udell
and Cevher, NeurIPS 2017, arXiv 1706.05736).

What the leading pairs do not hold still moves the outputs. How the loss falls depends on it only
through what the residual sees of it, so that the residual is in the blocks from the start and
a few Ritz pairs stand for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_ttp._util.checks import check_enough_memory
from optuna_ttp._util.exceptions import ApproximationWarning
from optuna_ttp._util.warn import warn_caller
from optuna_ttp.dynamics import PathFollower
from optuna_ttp.dynamics import ResidualPath
from optuna_ttp.ntk.engines._choice import check_multipliers
from optuna_ttp.ntk.engines._eigenpairs import Eigenpairs
from optuna_ttp.ntk.engines._eigenpairs import eigenpairs_of_features
from optuna_ttp.ntk.engines._sketch import N_GROUPS
from optuna_ttp.ntk.engines._sketch import nystrom
from optuna_ttp.ntk.engines._sketch import Passes
from optuna_ttp.ntk.engines._sketch import sketch_jacobian
from optuna_ttp.ntk.jacobian._directions import Directions
from optuna_ttp.ntk.jacobian._prepare import lifting
from optuna_ttp.ntk.jacobian._samples import check_singles


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
# By how much the times of training may change with the last block of products: what is left then
# is about a tenth of that. Narrow blocks cost a pass each way for few columns, so nearly as much.
_TIME_ERROR = 0.1
# And by how much if only the Ritz pairs are kept.
_CONDENSED_ERROR = 0.01
_MAX_NARROW = 3
# Ritz pairs are those of the residuals on the path and of what the kernel makes of them, so many
# together; the second where the first do not suffice.
_N_POWERS = (3, 6)
# Shares of a column that are less count as nothing.
_ROUNDING = 1e-4
# Random signs that estimate a trace: a few, or one for so many columns of a block.
_MIN_PROBES, _PROBE_SHARE = 10, 10
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
        n_ritz:
            How many of the pairs are Ritz pairs.
        time_error:
            As in :class:`~optuna_ttp.spectrum.SpectrumMetadata`.
        trace_error:
            As in :class:`~optuna_ttp.spectrum.SpectrumMetadata`.
    """

    pairs: Eigenpairs
    weight_outputs: NDArray[np.float64]
    validation_features: NDArray[np.floating[Any]] | None
    width: int
    n_ritz: int
    time_error: float
    trace_error: float | None = None


@dataclass(frozen=True, eq=False)
class _Found:
    """Eigenpairs and Ritz pairs, together in descending order."""

    values: torch.Tensor
    vectors: torch.Tensor
    n_ritz: int
    time_error: float


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
            How many leading eigenpairs. 100 by default. Ritz pairs come beside them.
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
        The pairs. There is an :exc:`~optuna_ttp.ApproximationWarning` where some have
        not converged, or the times of gradient flow with the Ritz pairs have not.

    Raises:
        ValueError:
            As for :func:`~optuna_ttp.ntk.exact_kernel`, and for multipliers.
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
    return max(N_GROUPS, min(_MAX_WIDTH, width) // N_GROUPS * N_GROUPS)


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
    # In single precision, because they are held to the end: it may have to start anew.
    vectors = _filled(torch.as_tensor(start), n_columns, seed).float()
    del start
    follower = PathFollower(task, task.initial_outputs(device, dtype))

    def run(lifts: Mapping[str, int]) -> LeadingPairs:
        with Passes(task, device, dtype, seed, lifts, show_progress_bar) as passes:

            def product(v: torch.Tensor) -> torch.Tensor:
                return passes.images(v.to(device=device, dtype=dtype), max_memory)[0]

            found = _krylov(product, vectors, n_wanted, follower)
            values, basis = found.values, found.vectors
            pairs = Eigenpairs(values.numpy(), basis.numpy(), trace)
            features = None
            if task.validation is not None:
                whitened = (basis / values.sqrt()).to(device=device, dtype=dtype)
                (images,) = passes.images(whitened, max_memory, own=False, others=True)
                features = images.to(dtype).numpy()
        return LeadingPairs(pairs, weight_outputs, features, width, found.n_ritz, found.time_error)

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
        found = _krylov(product, images, n_wanted, PathFollower(task, reference))
        values, basis = found.values, found.vectors
        trace, trace_error = _estimated_trace(product, values, basis, n_columns, generator)
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
        found.n_ritz,
        found.time_error,
        trace_error,
    )


def probes_of(n_columns: int) -> int:
    """Return how many vectors of random signs estimate a trace.

    Args:
        n_columns:
            Of a block of vectors.
    """
    return max(_MIN_PROBES, n_columns // _PROBE_SHARE)


def _estimated_trace(
    product: Callable[[torch.Tensor], torch.Tensor],
    values: torch.Tensor,
    basis: torch.Tensor,
    n_columns: int,
    generator: torch.Generator,
) -> tuple[float, float]:
    """The trace and its standard error, as a share of it.

    The pairs hold their part of the trace; random signs that they do not know estimate that of
    the rest (Hutch++: Meyer, Musco, Musco and Woodruff, SOSA 2021, arXiv 2010.09649). Those that
    the products started at would find less of it than there is.
    """
    n_probes = probes_of(n_columns)
    signs = torch.randint(2, (len(basis), n_probes), generator=generator, dtype=torch.float64)
    probes = 2.0 * signs - 1.0
    probes = probes - basis @ (basis.T @ probes)
    rest = (probes * product(probes)).sum(0)
    trace = float(values.sum() + rest.mean())
    return trace, float(rest.std() / n_probes**0.5) / trace


def _filled(start: torch.Tensor, n_columns: int, seed: int) -> torch.Tensor:
    """Where the sketch has too few eigenpairs, random vectors beside them."""
    missing = n_columns - start.shape[1]
    if missing <= 0:
        return start
    generator = torch.Generator().manual_seed(seed)
    more = torch.randn((len(start), missing), generator=generator, dtype=start.dtype)
    return torch.cat([start, more], 1)


def _krylov(
    product: Callable[[torch.Tensor], torch.Tensor],
    start: torch.Tensor,
    n_wanted: int,
    follower: PathFollower,
) -> _Found:
    """Leading eigenpairs, and Ritz pairs for what the residual sees of the others.

    The residual is in the block from its start, and what the kernel makes of it in the next one,
    so that the Ritz values with all of the basis are the nodes of Gauss' quadrature of its
    spectral measure for no more passes. Where the eigenpairs have
    converged and the residual's path has not, a few columns more are multiplied.
    """
    residual = follower.residual
    n_columns = start.shape[1]
    start = start.to(residual)
    if float(residual.norm()) > 0.0:
        start = torch.cat([residual / residual.norm(), start], 1)[:, : len(start)]
    basis = torch.linalg.qr(start)[0]
    del start
    images = product(basis)
    before: ResidualPath | None = None
    n_narrow = 0
    for block in range(_MAX_BLOCKS):
        if not torch.isfinite(images).all():
            raise ValueError(
                "The kernel must be finite but overflowed. Scale the inputs, or compute with "
                'dtype="float64".'
            )
        inner = basis.T @ images
        values, mixing = torch.linalg.eigh((inner + inner.T) / 2)
        values, mixing = values.flip(0), mixing.flip(1)
        path = follower.follow(basis, mixing, values)
        moved = float("inf") if before is None else path.time_difference(before)
        before = path
        leading = mixing[:, :n_columns]
        residuals = images @ leading - (basis @ leading) * values[:n_columns]
        # Pairs at the level of rounding errors are dropped in the end.
        floor = float(values[0]) * torch.finfo(torch.float32).eps
        sizes = residuals[:, :n_wanted].norm(dim=0)
        limits = values[:n_wanted].clamp(min=floor)
        open_ = sizes > _TOLERANCE * limits
        worst = float((sizes / limits).max())
        n_left = len(basis) - basis.shape[1]
        if n_left == 0 or block + 1 == _MAX_BLOCKS:
            break
        others = mixing[:, n_wanted:]
        seen = others @ (others.T @ (basis.T @ path.residuals))
        # What the path needs: the residual itself, and what the kernel makes of its other part.
        new = [_remainder(path.residuals, basis), _remainder(images @ seen, basis)]
        if open_.any():
            # Of all columns, not only of what is open: passes over the data cost more.
            new.append(residuals)
        elif moved <= _TIME_ERROR or n_narrow == _MAX_NARROW:
            break
        else:
            n_narrow += 1
        added = torch.cat(new, 1)[:, :n_left]
        # Products take the most memory.
        del new, residuals, leading
        if added.shape[1] == 0:
            moved = 0.0
            break
        for _ in range(2):
            added = torch.linalg.qr(added - basis @ (basis.T @ added))[0]
        basis = torch.cat([basis, added], 1)
        images = torch.cat([images, product(added)], 1)
    if n_left == 0:
        # All of the space.
        moved, open_ = 0.0, torch.zeros_like(open_)
    if open_.any():
        warn_caller(
            f"{int(open_.sum())} of {n_wanted} eigenpairs have not converged: their residuals are "
            f'up to {worst:.0%} of the eigenvalue. Ask for a smaller rank, or use engine="exact".',
            ApproximationWarning,
        )
    vectors, kept, _ = nystrom(basis, images, n_wanted)
    n_kept = int((kept > float(kept[0]) * torch.finfo(torch.float32).eps).sum())
    kept, vectors = kept[:n_kept], vectors[:, :n_kept]
    for n_powers in _N_POWERS:
        ritz, more = _condensed(basis, images, mixing, values, vectors, path.residuals, n_powers)
        n_ritz = int((ritz > float(kept[0]) * torch.finfo(torch.float32).eps).sum())
        all_values, order = torch.cat([kept, ritz[:n_ritz]]).sort(descending=True, stable=True)
        all_vectors = torch.cat([vectors, more[:, :n_ritz]], 1)[:, order]
        identity = torch.eye(len(all_values), dtype=all_values.dtype)
        condensed = follower.follow(all_vectors, identity, all_values).time_difference(path)
        if condensed <= _CONDENSED_ERROR:
            break
    error = max(moved, condensed)
    if error > _TIME_ERROR:
        by_what = f"uncertain by {error:.0%}" if np.isfinite(error) else "of unknown error"
        warn_caller(
            f"{n_kept} eigenpairs, and {n_ritz} Ritz pairs for what the residual sees of the "
            f"others, leave predicted times {by_what}. Ask for a larger rank, or use "
            'engine="exact" or "sketch".',
            ApproximationWarning,
        )
    return _Found(all_values, all_vectors, n_ritz, error)


def _remainder(columns: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """What a basis does not have of some columns, where that is more than rounding."""
    sizes = columns.norm(dim=0)
    left = columns - basis @ (basis.T @ columns)
    return left[:, left.norm(dim=0) > _ROUNDING * sizes]


def _condensed(
    basis: torch.Tensor,
    images: torch.Tensor,
    mixing: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor,
    residuals: torch.Tensor,
    n_powers: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ritz pairs, orthogonal to kept eigenvectors, of what residuals see of all others.

    Those of the block Krylov space of the residuals and the other Ritz pairs.
    """
    n_kept = kept.shape[1]
    others, rest = mixing[:, n_kept:], values[n_kept:]
    if residuals.shape[1] == 0 or len(rest) == 0:
        return values.new_zeros(0), basis.new_zeros((len(basis), 0))
    inside = basis.T @ residuals
    powers = [others.T @ inside]
    for _ in range(n_powers - 1):
        more = rest[:, None] * powers[-1]
        powers.append(more / more.norm(dim=0).clamp(min=1e-300))
    # The residual at the start has a part of its own: kept vectors are not quite of this basis.
    coordinates = torch.cat([inside[:, :1], others @ torch.cat(powers, 1)], 1)
    columns = basis @ coordinates
    columns = columns - kept @ (kept.T @ columns)
    sizes = columns.norm(dim=0)
    seen = sizes > _ROUNDING * coordinates.norm(dim=0)
    columns, coordinates = columns[:, seen] / sizes[seen], coordinates[:, seen] / sizes[seen]
    squares, axes = torch.linalg.eigh(columns.T @ columns)
    good = squares > _ROUNDING**2
    whitening = axes[:, good] / squares[good].sqrt()
    # The kernel takes kept vectors to themselves, to which these are orthogonal.
    inner = whitening.T @ (columns.T @ (images @ coordinates)) @ whitening
    found, turned = torch.linalg.eigh((inner + inner.T) / 2)
    return found.flip(0), columns @ (whitening @ turned.flip(1))
