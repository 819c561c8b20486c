"""The matrix-free engine: leading eigenpairs from products ``J J^T V`` alone.

Neither the kernel nor many columns of the Jacobian are stored: memory grows with N C times a few
hundred columns. A block Krylov method with a Rayleigh-Ritz projection (Saad, "Numerical Methods
for Large Eigenvalue Problems", 2011, chapter 6) starts at the leading space of a small sample of
columns, or at random, and continues with the residuals. The result is Nystrom's approximation from
all products, which is one step of subspace iteration more accurate than the projection (Tropp,
Yurtsever, Udell and Cevher, NeurIPS 2017, arXiv 1706.05736).

The rest of the kernel moves the outputs as well. The loss depends on it only through its products
with the residual (the gradient of the loss by the outputs), so that the residual is in the first
block, and a few Ritz pairs replace the other eigenpairs.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from optuna_ttp._util.checks import check_enough_memory
from optuna_ttp._util.exceptions import ApproximationWarning
from optuna_ttp._util.warn import warn_caller
from optuna_ttp.dynamics import PathFollower
from optuna_ttp.dynamics import ResidualPath
from optuna_ttp.ntk._settings import EngineSettings
from optuna_ttp.ntk.engines._choice import check_multipliers
from optuna_ttp.ntk.engines._columns import pick_columns
from optuna_ttp.ntk.engines._eigenpairs import Decomposition
from optuna_ttp.ntk.engines._eigenpairs import Eigenpairs
from optuna_ttp.ntk.engines._eigenpairs import eigenpairs_of_features
from optuna_ttp.ntk.engines._nystrom import check_overflow
from optuna_ttp.ntk.engines._nystrom import nystrom
from optuna_ttp.ntk.engines._passes import Passes
from optuna_ttp.ntk.engines._rules import PAIRS
from optuna_ttp.ntk.jacobian._directions import Directions
from optuna_ttp.ntk.jacobian._prepare import lifting
from optuna_ttp.ntk.jacobian._samples import check_singles


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


@dataclass(frozen=True, eq=False)
class _AllPairs:
    """``r`` eigenpairs and Ritz pairs: descending values ``(r,)`` and vectors ``(N C, r)``."""

    values: torch.Tensor
    vectors: torch.Tensor
    n_ritz: int
    time_error: float


def leading_pairs(
    task: FineTuningTask, settings: EngineSettings, *, rank: int | None = None
) -> Decomposition:
    """Compute the leading ``rank`` eigenpairs of the kernel of a task, 100 by default.

    For few outputs, rows of the Jacobian are computed and used one batch at a time; for many, the
    kernel is multiplied by forward and backward passes for one direction at a time. Ritz pairs are
    added. An :exc:`~optuna_ttp.ApproximationWarning` is given if eigenpairs, or the predicted
    times of gradient flow, have not converged. Errors are those of
    :func:`~optuna_ttp.ntk.exact_kernel`; also ValueError for learning-rate multipliers but one.
    """
    check_multipliers(task, "matrix_free")
    n_rows = task.n_samples * task.n_outputs
    n_wanted = min(n_rows, PAIRS.n_pairs if rank is None else rank)
    n_columns = columns_of(task, rank)
    check_vectors_memory(task, n_columns, settings.max_memory)
    if by_directions(task, n_columns, settings.dtype, settings.max_memory):
        return _by_directions(task, settings, n_wanted, n_columns)
    return _by_rows(task, settings, n_wanted, n_columns)


def columns_of(task: FineTuningTask, rank: int | None) -> int:
    """Return the number of vectors per block: 2.5 ``rank``, at least ten more, at most N C."""
    n_rows = task.n_samples * task.n_outputs
    n_wanted = min(n_rows, PAIRS.n_pairs if rank is None else rank)
    return min(n_rows, n_wanted + max(10, int(PAIRS.extra_columns * n_wanted)))


def n_start_columns(task: FineTuningTask, dtype: torch.dtype, max_memory: int) -> int:
    """Return the number of columns of the Jacobian whose leading space has the start vectors."""
    n_rows = task.n_samples * task.n_outputs
    n_columns = int(PAIRS.start_share * max_memory / (n_rows * dtype.itemsize))
    return max(1, min(PAIRS.start_columns, n_columns, task.n_parameters))


def check_vectors_memory(task: FineTuningTask, n_columns: int, max_memory: float) -> int:
    """Return the bytes of a block of vectors and of one vector of weights in single precision.

    ValueError is raised if they exceed ``max_memory``.
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
    """Return whether products by direction take fewer passes than products by rows."""
    itemsize = dtype.itemsize
    # J^T V must fit the memory; else rows are computed again for each group of parameters.
    n_groups = -(-2 * task.n_parameters * n_columns * itemsize // max_memory)
    # Rows are computed twice, for J^T V and J W; a direction takes a forward and a backward pass.
    return 2 * n_groups * (2 * task.n_outputs + 1) > 4 * n_columns


def _by_rows(
    task: FineTuningTask, settings: EngineSettings, n_wanted: int, n_columns: int
) -> Decomposition:
    """Compute the pairs from products that compute rows of the Jacobian, batch by batch."""
    reference = task.initial_outputs(settings.device, settings.dtype)
    n_start = n_start_columns(task, settings.dtype, settings.max_memory)
    picked = pick_columns(task, settings, reference, n_columns=n_start, products=False)
    trace, trace_error, weight_outputs = *picked.trace(), picked.weight_outputs
    features = picked.columns * picked.inflation.sqrt().to(picked.columns)
    del picked
    start = eigenpairs_of_features(features, rank=n_columns).eigenvectors
    del features
    # Single precision saves memory: they are stored until the end, for a second run.
    vectors = _filled(torch.as_tensor(start), n_columns, settings.seed).float()
    del start
    follower = PathFollower(task, reference)

    def run(lifts: Mapping[str, int]) -> Decomposition:
        with Passes(task, settings, lifts) as passes:

            def product(v: torch.Tensor) -> torch.Tensor:
                return passes.images(v.to(**settings.place))[0]

            all_pairs = _krylov(product, vectors, n_wanted, follower)
            values, basis = all_pairs.values, all_pairs.vectors
            pairs = Eigenpairs(values.numpy(), basis.numpy(), trace)
            features = None
            if task.validation is not None:
                whitened = (basis / values.sqrt()).to(**settings.place)
                (images,) = passes.images(whitened, training=False, others=True)
                features = images.to(settings.dtype).numpy()
        return Decomposition(
            pairs,
            weight_outputs,
            features,
            time_error=all_pairs.time_error,
            trace_error=trace_error,
            n_ritz=all_pairs.n_ritz,
        )

    return lifting(run)


def _by_directions(
    task: FineTuningTask, settings: EngineSettings, n_wanted: int, n_columns: int
) -> Decomposition:
    """Compute the pairs from passes through the network for one direction at a time."""
    generator = torch.Generator().manual_seed(settings.seed)
    n_rows = task.n_samples * task.n_outputs
    reference = task.initial_outputs(settings.device, settings.dtype)
    with task.frozen(settings.device, settings.dtype) as frozen:
        check_singles(task, frozen, reference, settings)
        directions = Directions(task, frozen, settings)

        def product(v: torch.Tensor) -> torch.Tensor:
            return directions.images(v.to(**settings.place))

        signs = torch.randint(2, (n_rows, n_columns), generator=generator, dtype=torch.float64)
        start = 2.0 * signs - 1.0
        images = product(start)
        if not float((start * images).sum()) > 0.0:
            raise ValueError(
                "The Jacobian must not be zero: no trainable parameter moves any output."
            )
        all_pairs = _krylov(product, images, n_wanted, PathFollower(task, reference))
        values, basis = all_pairs.values, all_pairs.vectors
        trace, trace_error = _estimated_trace(product, values, basis, n_columns, generator)
        weights = [p.detach() for p in frozen.parameters.values()]
        outputs = directions.forward(task, [weights])
        features = None
        if task.validation is not None:
            whitened = (basis / values.sqrt()).to(**settings.place)
            parts = [
                directions.forward(task.validation, directions.adjoint(some))
                for some in whitened.split(directions.n_together, dim=1)
            ]
            features = torch.cat(parts, 1).to(settings.dtype).numpy()
    return Decomposition(
        Eigenpairs(values.numpy(), basis.numpy(), trace),
        outputs.reshape(task.n_samples, task.n_outputs).numpy(),
        features,
        time_error=all_pairs.time_error,
        trace_error=trace_error,
        n_ritz=all_pairs.n_ritz,
    )


def probes_of(n_columns: int) -> int:
    """Return the number of random sign vectors that estimate the rest of the trace.

    It is a tenth of ``n_columns``, the vectors of a block, and at least ten.
    """
    return max(PAIRS.min_probes, n_columns // PAIRS.columns_a_probe)


def _estimated_trace(
    product: Callable[[torch.Tensor], torch.Tensor],
    values: torch.Tensor,
    basis: torch.Tensor,
    n_columns: int,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Return an estimate of the trace, and its standard error relative to the trace.

    The eigenvalues are added to a mean over new random signs, orthogonal to ``basis``, for the
    rest (Hutch++: Meyer, Musco, Musco and Woodruff, SOSA 2021, arXiv 2010.09649). The signs of the
    start would underestimate the rest, because the basis was computed from them.
    """
    n_probes = probes_of(n_columns)
    signs = torch.randint(2, (len(basis), n_probes), generator=generator, dtype=torch.float64)
    probes = 2.0 * signs - 1.0
    probes = probes - basis @ (basis.T @ probes)
    rest = (probes * product(probes)).sum(0)
    trace = float(values.sum() + rest.mean())
    return trace, float(rest.std() / n_probes**0.5) / trace


def _filled(start: torch.Tensor, n_columns: int, seed: int) -> torch.Tensor:
    """Return start vectors, filled up to ``n_columns`` with random ones if there are fewer."""
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
) -> _AllPairs:
    """Compute ``n_wanted`` leading eigenpairs, and Ritz pairs for the rest of the kernel.

    The residual is a column of the first block, and its product with the kernel of the second, so
    that the Ritz values of the whole basis are the points of Gauss' quadrature of its spectral
    measure. If the eigenpairs have converged but the times have not, blocks of a few columns
    follow. An ApproximationWarning is given if pairs or times have not converged.
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
    for block in range(PAIRS.max_blocks):
        check_overflow(images)
        inner = basis.T @ images
        values, mixing = torch.linalg.eigh((inner + inner.T) / 2)
        values, mixing = values.flip(0), mixing.flip(1)
        path = follower.follow(basis, mixing, values)
        moved = float("inf") if before is None else path.time_difference(before)
        before = path
        leading = mixing[:, :n_columns]
        residuals = images @ leading - (basis @ leading) * values[:n_columns]
        # Pairs below the rounding error are dropped at the end.
        floor = float(values[0]) * torch.finfo(torch.float32).eps
        norms = residuals[:, :n_wanted].norm(dim=0)
        limits = values[:n_wanted].clamp(min=floor)
        open_ = norms > PAIRS.pair_tolerance * limits
        worst = float((norms / limits).max())
        n_left = len(basis) - basis.shape[1]
        if n_left == 0 or block + 1 == PAIRS.max_blocks:
            break
        others = mixing[:, n_wanted:]
        seen = others @ (others.T @ (basis.T @ path.residuals))
        # The path needs the residual, and the image of its part outside the wanted pairs.
        new = [_remainder(path.residuals, basis), _remainder(images @ seen, basis)]
        if open_.any():
            # All columns continue, because more passes over the data would cost more.
            new.append(residuals)
        elif moved <= PAIRS.time_error or n_narrow == PAIRS.max_narrow_blocks:
            break
        else:
            n_narrow += 1
        added = torch.cat(new, 1)[:, :n_left]
        # These are released first, because products take the most memory.
        del new, residuals, leading
        if added.shape[1] == 0:
            moved = 0.0
            break
        for _ in range(2):
            added = torch.linalg.qr(added - basis @ (basis.T @ added))[0]
        basis = torch.cat([basis, added], 1)
        images = torch.cat([images, product(added)], 1)
    if n_left == 0:
        # The basis spans the whole space, so that everything is exact.
        moved, open_ = 0.0, torch.zeros_like(open_)
    if open_.any():
        warn_caller(
            f"{int(open_.sum())} of {n_wanted} eigenpairs have not converged: their residuals are "
            f'up to {worst:.0%} of the eigenvalue. Ask for a smaller rank, or use engine="exact".',
            ApproximationWarning,
        )
    ritz = partial(_condensed, basis, images, mixing, values)
    return _with_ritz_pairs(nystrom(basis, images, n_wanted), ritz, follower, path, moved)


def _with_ritz_pairs(
    leading: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ritz: Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
    follower: PathFollower,
    path: ResidualPath,
    moved: float,
) -> _AllPairs:
    """Return the leading pairs, and as many Ritz pairs as reproduce the times of ``path``.

    ``leading`` is the result of :func:`nystrom`, ``ritz`` computes Ritz pairs, and ``moved`` is
    the relative change of the times by the last block. An ApproximationWarning is given if the
    times are uncertain by more than 10 %.
    """
    vectors, leading_values, _ = leading
    smallest = float(leading_values[0]) * torch.finfo(torch.float32).eps
    n_leading = int((leading_values > smallest).sum())
    leading_values, vectors = leading_values[:n_leading], vectors[:, :n_leading]
    for n_powers in PAIRS.n_powers:
        ritz_values, ritz_vectors = ritz(vectors, path.residuals, n_powers)
        n_ritz = int((ritz_values > smallest).sum())
        joined = torch.cat([leading_values, ritz_values[:n_ritz]])
        all_values, order = joined.sort(descending=True, stable=True)
        all_vectors = torch.cat([vectors, ritz_vectors[:, :n_ritz]], 1)[:, order]
        identity = torch.eye(len(all_values), dtype=all_values.dtype)
        condensed = follower.follow(all_vectors, identity, all_values).time_difference(path)
        if condensed <= PAIRS.condensed_error:
            break
    error = max(moved, condensed)
    if error > PAIRS.time_error:
        by_what = f"uncertain by {error:.0%}" if np.isfinite(error) else "of unknown error"
        warn_caller(
            f"{n_leading} eigenpairs, and {n_ritz} Ritz pairs for the rest of the kernel, leave "
            f"predicted times {by_what}. Ask for a larger rank, or use "
            'engine="exact" or "columns".',
            ApproximationWarning,
        )
    return _AllPairs(all_values, all_vectors, n_ritz, error)


def _remainder(columns: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Return the parts of columns orthogonal to a basis; parts at rounding level are dropped."""
    norms = columns.norm(dim=0)
    left = columns - basis @ (basis.T @ columns)
    return left[:, left.norm(dim=0) > PAIRS.rounding * norms]


def _condensed(
    basis: torch.Tensor,
    images: torch.Tensor,
    mixing: torch.Tensor,
    values: torch.Tensor,
    leading: torch.Tensor,
    residuals: torch.Tensor,
    n_powers: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values ``(m,)`` and vectors ``(N C, m)`` of Ritz pairs for the rest of the kernel.

    They are orthogonal to the ``leading`` eigenvectors, and span the block Krylov space, with
    ``n_powers`` blocks, of the part of ``residuals`` in the other Ritz vectors.
    """
    n_leading = leading.shape[1]
    others, rest = mixing[:, n_leading:], values[n_leading:]
    if residuals.shape[1] == 0 or len(rest) == 0:
        return values.new_zeros(0), basis.new_zeros((len(basis), 0))
    inside = basis.T @ residuals
    powers = [others.T @ inside]
    for _ in range(n_powers - 1):
        more = rest[:, None] * powers[-1]
        powers.append(more / more.norm(dim=0).clamp(min=1e-300))
    # The first residual is taken whole, because leading vectors are not quite in this basis.
    coordinates = torch.cat([inside[:, :1], others @ torch.cat(powers, 1)], 1)
    columns = basis @ coordinates
    columns = columns - leading @ (leading.T @ columns)
    norms = columns.norm(dim=0)
    seen = norms > PAIRS.rounding * coordinates.norm(dim=0)
    columns, coordinates = columns[:, seen] / norms[seen], coordinates[:, seen] / norms[seen]
    squares, axes = torch.linalg.eigh(columns.T @ columns)
    good = squares > PAIRS.rounding**2
    whitening = axes[:, good] / squares[good].sqrt()
    # The kernel maps the leading space to itself, and these columns are orthogonal to it.
    inner = whitening.T @ (columns.T @ (images @ coordinates)) @ whitening
    ritz_values, turned = torch.linalg.eigh((inner + inner.T) / 2)
    return ritz_values.flip(0), columns @ (whitening @ turned.flip(1))
