"""The exact kernel by several processes.

Every process differentiates its share of the samples for all weights, and receives the Jacobian of
all samples for its share of the weights, whose part of the kernel it computes. So nothing is
computed twice, and the sum of all parts is the kernel, in every process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from itertools import pairwise
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
import torch
import torch.distributed as distributed

from optuna_ttp.ntk._processes import gathered_objects
from optuna_ttp.ntk._processes import together
from optuna_ttp.ntk.engines._kernel import Kernel
from optuna_ttp.ntk.jacobian._layout import Layout
from optuna_ttp.ntk.jacobian._layout import ParameterLayout
from optuna_ttp.ntk.jacobian._prepare import Preparation
from optuna_ttp.ntk.jacobian._rules import LAYOUTS
from optuna_ttp.ntk.jacobian._samples import SampleReader
from optuna_ttp.ntk.jacobian._separable import Separated
from optuna_ttp.ntk.jacobian._state import BlockState
from optuna_ttp.ntk.jacobian._state import multiply
from optuna_ttp.ntk.layers._factors import Factors


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

    ``reader`` is of the training samples, ``others`` of the validation samples (None without any).
    ValueError is raised if there are fewer samples than processes, or batches whose layers have
    different numbers of positions.
    """
    rank, n_processes = distributed.get_rank(), distributed.get_world_size()
    if task.n_samples < n_processes:
        raise ValueError(
            f"There must be at least one sample for each of the {n_processes} processes but got "
            f"{task.n_samples}."
        )
    layout, c = preparation.layout, task.n_outputs
    shares = _shares(task.n_samples, n_processes)
    inner = np.zeros((task.n_samples, c))
    share = shares[rank]
    state, inner[share] = together(lambda: reader.read(layout, share.start, share.stop))
    pieces = _cut(_pieces(layout, state, task.n_samples, c), n_processes)
    whole = _exchanged(state, shares, pieces)
    layout_here = _layout_of(pieces[rank], layout.held)
    gram, stretched = multiply(layout_here, whole, whole)
    if layout.has_multipliers and stretched is None:
        # The multipliers of all weights of this process are one.
        stretched = gram.clone()
    cross = None
    if others is not None and task.validation is not None:
        n = task.validation.n_samples
        if n < n_processes:
            # With fewer samples than processes, each process differentiates all of them.
            held_out, _ = together(lambda: others.read(layout, 0, n))
            left = _chosen(held_out, pieces[rank])
        else:
            parts = _shares(n, n_processes)
            some = parts[rank]
            held_out, _ = together(lambda: others.read(layout, some.start, some.stop))
            left = _exchanged(held_out, parts, pieces)
        cross, _ = multiply(layout_here, left, whole)
    kind = np.float64 if dtype == torch.float64 else np.float32

    def summed(part: torch.Tensor | None) -> NDArray[Any] | None:
        if part is None:
            return None
        # Parts are added in double precision, as in a single process.
        distributed.all_reduce(part)
        return part.cpu().numpy().astype(kind)

    total = summed(gram)
    assert total is not None
    outputs = torch.from_numpy(inner).to(gram.device)
    distributed.all_reduce(outputs)
    return Kernel(total, summed(cross), outputs.cpu().numpy(), summed(stretched))


def _shares(n_samples: int, n_processes: int) -> list[slice]:
    """Return one slice of the samples per process, of about equal lengths."""
    bounds = [n_samples * k // n_processes for k in range(n_processes + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]


@dataclass(frozen=True)
class _Piece:
    """Some weights of one parameter, or some columns of the common rows (``parameter`` is None).

    The range from ``start`` to ``stop`` is of columns for rows, of a layer's outputs for factors,
    and of channels for separable gradients. ``flops`` count its products for all samples.
    """

    parameter: ParameterLayout | None
    multiplier: float
    start: int
    stop: int
    flops: float


def _pieces(layout: Layout, state: BlockState, n_samples: int, n_outputs: int) -> list[_Piece]:
    """Return one piece per section of common columns and per other parameter, with its flops."""
    pairs = LAYOUTS.triangle * n_samples**2
    column = 2.0 * n_outputs**2 * pairs
    pieces = [
        _Piece(None, multiplier, start, stop, column * (stop - start))
        for start, stop, multiplier in layout.sections
    ]
    for p in layout.parameters:
        if p.name in layout.offsets:
            continue
        n_columns = p.n_weights
        flops = pairs * p.flops_per_pair
        if p.method in ("ghost", "panels"):
            n_columns = state.factors[p.name].shape[2]
            flops *= LAYOUTS.ghost_overhead if p.method == "ghost" else 1.0
            flops += n_samples * p.flops_per_sample
        elif p.method == "separable":
            n_columns = state.separated[p.name].weights.shape[2]
        pieces.append(_Piece(p, p.multiplier, 0, n_columns, flops))
    return pieces


def _cut(pieces: list[_Piece], n_processes: int) -> list[list[_Piece]]:
    """Cut the sequence of pieces into one list per process, with about equal flops."""
    total = sum(p.flops for p in pieces)
    owned: list[list[_Piece]] = [[] for _ in range(n_processes)]
    before = 0.0
    for piece in pieces:
        n = piece.stop - piece.start
        bounds = [
            min(n, max(0, round(n * (total * k / n_processes - before) / max(piece.flops, 1.0))))
            for k in range(n_processes + 1)
        ]
        bounds[0], bounds[-1] = 0, n
        for process, (a, b) in enumerate(pairwise(bounds)):
            if a < b:
                start, stop = piece.start + a, piece.start + b
                owned[process].append(
                    replace(piece, start=start, stop=stop, flops=piece.flops * (b - a) / n)
                )
        before += piece.flops
    return owned


def _layout_of(pieces: list[_Piece], held: torch.dtype | None) -> Layout:
    """Return the layout in which one process stores its pieces."""
    sections: list[tuple[int, int, float]] = []
    column = 0
    for p in pieces:
        if p.parameter is None:
            sections.append((column, column + p.stop - p.start, p.multiplier))
            column = sections[-1][1]
    parameters = tuple(p.parameter for p in pieces if p.parameter is not None)
    return Layout(parameters, column, {}, tuple(sections), held)


def _tensors(state: BlockState, piece: _Piece) -> list[torch.Tensor]:
    """Return the tensors that store the piece of a state; the first axis is of samples or rows."""
    columns = slice(piece.start, piece.stop)
    if piece.parameter is None:
        return [state.rows[:, columns]]
    name = piece.parameter.name
    if name in state.matrices:
        return [state.matrices[name][:, columns]]
    if name in state.separated:
        separated = state.separated[name]
        return [separated.weights[:, :, columns], separated.rows[:, columns]]
    factors = state.factors[name]
    return [*factors.sources, *(d[:, :, :, columns] for d in factors.cotangents)]


def _assembled(
    like: BlockState, n_samples: int, pieces: list[_Piece], tensors: list[list[torch.Tensor]]
) -> BlockState:
    """Return a state from the tensors of each piece, with factors and terms as in ``like``."""
    rows: list[torch.Tensor] = []
    factors: dict[str, Factors] = {}
    matrices: dict[str, torch.Tensor] = {}
    separated: dict[str, Separated] = {}
    for piece, held in zip(pieces, tensors, strict=True):
        if piece.parameter is None:
            rows.extend(held)
            continue
        name = piece.parameter.name
        if name in like.matrices:
            (matrices[name],) = held
        elif name in like.separated:
            separated[name] = Separated(*held)
        else:
            n = len(like.factors[name].sources)
            factors[name] = replace(
                like.factors[name], sources=tuple(held[:n]), cotangents=tuple(held[n:])
            )
    n_rows = n_samples * (len(like.rows) // like.n_samples)
    together = torch.cat(rows, 1) if rows else like.rows.new_empty((n_rows, 0))
    return BlockState(n_samples, together, factors, matrices, separated)


def _chosen(state: BlockState, pieces: list[_Piece]) -> BlockState:
    """Return the part of a state that belongs to the weights of the pieces."""
    return _assembled(state, state.n_samples, pieces, [_tensors(state, p) for p in pieces])


def _exchanged(state: BlockState, shares: list[slice], pieces: list[list[_Piece]]) -> BlockState:
    """Exchange tensors; return the state of all samples for the pieces of this process."""
    state = _alike(state)
    rank = distributed.get_rank()
    n_samples = [share.stop - share.start for share in shares]
    gathered: list[list[torch.Tensor]] = []
    for owner, some in enumerate(pieces):
        for piece in some:
            rows = [
                # A tensor has one entry per sample, or one per output of a sample.
                _gathered(t, n_samples, len(t) // state.n_samples, owner)
                for t in _tensors(state, piece)
            ]
            if owner == rank:
                gathered.append([t for t in rows if t is not None])
    return _assembled(state, sum(n_samples), pieces[rank], gathered)


def _gathered(
    tensor: torch.Tensor, n_samples: Sequence[int], n_rows: int, owner: int
) -> torch.Tensor | None:
    """Send the rows of all processes to ``owner``; return them joined there, elsewhere None."""
    most = n_rows * max(n_samples)
    missing = most - len(tensor)
    kind = tensor.dtype
    # Half precision is sent as bytes, because not every backend supports it.
    sent = tensor.contiguous().view(torch.uint8) if kind == torch.bfloat16 else tensor.contiguous()
    if missing:
        sent = torch.cat([sent, sent.new_zeros((missing, *sent.shape[1:]))])
    if distributed.get_rank() != owner:
        distributed.gather(sent, None, dst=owner)
        return None
    received = [torch.empty_like(sent) for _ in n_samples]
    distributed.gather(sent, received, dst=owner)
    parts = [r[: n_rows * n] for r, n in zip(received, n_samples, strict=True)]
    return torch.cat(parts).view(kind)


def _alike(state: BlockState) -> BlockState:
    """Return the state with separable terms padded to the same number in all processes.

    ValueError is raised if the shapes of factors differ between processes.
    """
    shapes = [
        (name, tuple(t.shape[1:]))
        for name, f in sorted(state.factors.items())
        for t in (*f.sources, *f.cotangents)
    ]
    ranks = {n: s.weights.shape[3] for n, s in state.separated.items()}
    described = gathered_objects((shapes, ranks))
    if any(other != shapes for other, _ in described):
        raise ValueError(
            "All batches must have the same length for several processes. Pad the samples to one "
            "length."
        )
    pad = torch.nn.functional.pad
    separated = {}
    for name, s in state.separated.items():
        # Some samples may have more terms than others.
        missing = max(ranks_there[name] for _, ranks_there in described) - ranks[name]
        separated[name] = Separated(pad(s.weights, (0, missing)), pad(s.rows, (0, 0, 0, missing)))
    return replace(state, separated=separated)
