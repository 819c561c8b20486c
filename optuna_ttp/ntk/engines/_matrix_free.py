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
from optuna_ttp.ntk.engines._eigenpairs import Decomposition
from optuna_ttp.ntk.engines._eigenpairs import Eigenpairs
from optuna_ttp.ntk.engines._eigenpairs import eigenpairs_of_features
from optuna_ttp.ntk.engines._nystrom import check_overflow
from optuna_ttp.ntk.engines._nystrom import nystrom
from optuna_ttp.ntk.engines._rules import N_GROUPS
from optuna_ttp.ntk.engines._rules import PAIRS
from optuna_ttp.ntk.engines._sketch import Passes
from optuna_ttp.ntk.engines._sketch import sketch_jacobian
from optuna_ttp.ntk.jacobian._directions import Directions
from optuna_ttp.ntk.jacobian._prepare import lifting
from optuna_ttp.ntk.jacobian._samples import check_singles


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


@dataclass(frozen=True, eq=False)
class _AllPairs:
    """Eigenpairs and Ritz pairs, together in descending order."""

    values: torch.Tensor
    vectors: torch.Tensor
    n_ritz: int
    time_error: float


def leading_pairs(
    task: FineTuningTask, settings: EngineSettings, *, rank: int | None = None
) -> Decomposition:
    """Compute the leading ``rank`` eigenpairs of the kernel of a task, 100 by default.

    Where there are few outputs, rows of the Jacobian are made, used and thrown away, one batch
    after the other. Where there are many, products go through the network one direction at a time.
    Ritz pairs come beside the eigenpairs. There is an :exc:`~optuna_ttp.ApproximationWarning`
    where some have not converged, or the times of gradient flow with the Ritz pairs have not.
    Errors are those of :func:`~optuna_ttp.ntk.exact_kernel`; all learning-rate multipliers must be
    one.
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
    """Return how many vectors a block of products has where ``rank`` pairs are wanted."""
    n_rows = task.n_samples * task.n_outputs
    n_wanted = min(n_rows, PAIRS.n_pairs if rank is None else rank)
    return min(n_rows, n_wanted + max(10, int(PAIRS.extra_columns * n_wanted)))


def sketch_width(n_rows: int, dtype: torch.dtype, max_memory: int) -> int:
    """Return how wide the sketch is where products start, for ``n_rows`` outputs N C."""
    itemsize = dtype.itemsize
    width = int(PAIRS.sketch_share * max_memory / (n_rows * itemsize))
    return max(N_GROUPS, min(PAIRS.max_sketch_width, width) // N_GROUPS * N_GROUPS)


def check_vectors_memory(task: FineTuningTask, n_columns: int, max_memory: float) -> int:
    """Return the bytes that a block of vectors takes; raise ValueError if they do not fit.

    The bytes are in single precision, and those of the weights are added.
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
    """Return whether there are so many outputs that products go one direction at a time."""
    itemsize = dtype.itemsize
    # Products of the rows with the vectors must be held; else rows are made again by groups.
    n_groups = -(-2 * task.n_parameters * n_columns * itemsize // max_memory)
    # Rows take backward passes and as much again, twice; a direction takes a pass each way.
    return 2 * n_groups * (2 * task.n_outputs + 1) > 4 * n_columns


def _by_rows(
    task: FineTuningTask, settings: EngineSettings, n_wanted: int, n_columns: int
) -> Decomposition:
    """Compute the pairs from products that make rows of the Jacobian, batch by batch."""
    n_rows = task.n_samples * task.n_outputs
    width = sketch_width(n_rows, settings.dtype, settings.max_memory)
    sketch = sketch_jacobian(task, settings, width=width)
    trace, weight_outputs = sketch.trace, sketch.weight_outputs
    if not trace > 0.0:
        raise ValueError("The Jacobian must not be zero: no trainable parameter moves any output.")
    features = sketch.features()
    del sketch
    start = eigenpairs_of_features(features, rank=n_columns).eigenvectors
    del features
    # They are in single precision, because they are held to the end for another start.
    vectors = _filled(torch.as_tensor(start), n_columns, settings.seed).float()
    del start
    follower = PathFollower(task, task.initial_outputs(settings.device, settings.dtype))

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
            n_ritz=all_pairs.n_ritz,
        )

    return lifting(run)


def _by_directions(
    task: FineTuningTask, settings: EngineSettings, n_wanted: int, n_columns: int
) -> Decomposition:
    """Compute the pairs from products that go through the network one direction at a time."""
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
    """Return how many random sign vectors estimate the trace that the eigenpairs do not explain.

    The number grows with the ``n_columns`` vectors that the kernel is multiplied with at a time.
    """
    return max(PAIRS.min_probes, n_columns // PAIRS.columns_a_probe)


def _estimated_trace(
    product: Callable[[torch.Tensor], torch.Tensor],
    values: torch.Tensor,
    basis: torch.Tensor,
    n_columns: int,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Return an estimate of the trace, and its standard error as a share of it.

    The pairs hold their part of the trace; random signs that they do not know estimate that of the
    rest (Hutch++: Meyer, Musco, Musco and Woodruff, SOSA 2021, arXiv 2010.09649). Those that the
    products started at would find less of it than there is.
    """
    n_probes = probes_of(n_columns)
    signs = torch.randint(2, (len(basis), n_probes), generator=generator, dtype=torch.float64)
    probes = 2.0 * signs - 1.0
    probes = probes - basis @ (basis.T @ probes)
    rest = (probes * product(probes)).sum(0)
    trace = float(values.sum() + rest.mean())
    return trace, float(rest.std() / n_probes**0.5) / trace


def _filled(start: torch.Tensor, n_columns: int, seed: int) -> torch.Tensor:
    """Return start vectors, with random ones beside them where the sketch has too few."""
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
    """Compute leading eigenpairs, and Ritz pairs for what the residual sees of the others.

    The residual is in the block from its start, and what the kernel makes of it in the next one,
    so that the Ritz values with all of the basis are the points of Gauss' quadrature of its
    spectral measure for no more passes. Where the eigenpairs have converged and the residual's
    path has not, a few columns more are multiplied.
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
        # Pairs at the level of rounding errors are dropped in the end.
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
        # The path needs the residual itself, and what the kernel makes of its other part.
        new = [_remainder(path.residuals, basis), _remainder(images @ seen, basis)]
        if open_.any():
            # All columns go on, not only those that are open: a pass over the data costs more.
            new.append(residuals)
        elif moved <= PAIRS.time_error or n_narrow == PAIRS.max_narrow_blocks:
            break
        else:
            n_narrow += 1
        added = torch.cat(new, 1)[:, :n_left]
        # They are released first, because products take the most memory.
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
    """Return the leading pairs, and as many Ritz pairs as keep the times of ``path``.

    ``leading`` is what :func:`nystrom` gives, ``ritz`` makes Ritz pairs, and ``moved`` is by how
    much the last block of products changed the times. There is an
    :exc:`~optuna_ttp.ApproximationWarning` where the times are uncertain.
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
            f"{n_leading} eigenpairs, and {n_ritz} Ritz pairs for what the residual sees of the "
            f"others, leave predicted times {by_what}. Ask for a larger rank, or use "
            'engine="exact" or "sketch".',
            ApproximationWarning,
        )
    return _AllPairs(all_values, all_vectors, n_ritz, error)


def _remainder(columns: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Return what a basis does not have of some columns, where that is more than rounding."""
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
    """Return Ritz pairs, orthogonal to the leading eigenvectors, of what residuals see of others.

    They are those of the block Krylov space of the residuals and the other Ritz pairs.
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
    # The residual at the start is taken whole: leading vectors are not quite in this basis.
    coordinates = torch.cat([inside[:, :1], others @ torch.cat(powers, 1)], 1)
    columns = basis @ coordinates
    columns = columns - leading @ (leading.T @ columns)
    norms = columns.norm(dim=0)
    seen = norms > PAIRS.rounding * coordinates.norm(dim=0)
    columns, coordinates = columns[:, seen] / norms[seen], coordinates[:, seen] / norms[seen]
    squares, axes = torch.linalg.eigh(columns.T @ columns)
    good = squares > PAIRS.rounding**2
    whitening = axes[:, good] / squares[good].sqrt()
    # The kernel maps leading vectors to themselves, and these are orthogonal to them.
    inner = whitening.T @ (columns.T @ (images @ coordinates)) @ whitening
    ritz_values, turned = torch.linalg.eigh((inner + inner.T) / 2)
    return ritz_values.flip(0), columns @ (whitening @ turned.flip(1))
