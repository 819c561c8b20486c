"""What is held of the Jacobian for some samples, and the products of two such states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import torch

from optuna_ttp.jacobian._claims import UnclaimedError
from optuna_ttp.jacobian._factors import CHUNK
from optuna_ttp.jacobian._factors import Factors
from optuna_ttp.jacobian._factors import ghost_gram
from optuna_ttp.jacobian._factors import sums_device
from optuna_ttp.jacobian._layout import Layout
from optuna_ttp.jacobian._rules import Contribution


# Rows of the kernel that are multiplied at a time: of the triangle, half a tile is wasted.
_TILE = 64


@dataclass(frozen=True, eq=False)
class BlockState:
    """The Jacobian of some samples: rows for some parameters, factors for the others.

    Attributes:
        n_samples:
            How many samples.
        rows:
            Shape ``(n C, columns of the layout)``.
        factors:
            By parameter.
    """

    n_samples: int
    rows: torch.Tensor
    factors: dict[str, Factors]

    @staticmethod
    def concatenate(parts: list[BlockState]) -> BlockState:
        """Return the state of all samples of the parts, in order."""
        if len(parts) == 1:
            return parts[0]
        names = parts[0].factors
        return BlockState(
            sum(p.n_samples for p in parts),
            torch.cat([p.rows for p in parts]),
            {n: Factors.concatenate([p.factors[n] for p in parts]) for n in names},
        )

    def first_not_finite(self, n_outputs: int) -> tuple[int, int] | None:
        """Return the first (sample, output) with a gradient that is not finite."""
        finite = torch.isfinite(self.rows).all(1).reshape(self.n_samples, n_outputs)
        for factors in self.factors.values():
            for d in factors.cotangents:
                finite &= torch.isfinite(d).all(-1).all(-1).all(1)
        bad = (~finite).nonzero()
        return None if len(bad) == 0 else (int(bad[0, 0]), int(bad[0, 1]))


class StateBuilder:
    """Gathers the gradients of some samples, batch by batch, as the layout holds them.

    Args:
        layout:
            How each parameter is held.
        n_samples:
            How many samples are going to be added.
        n_outputs:
            C.
        device:
            Where.
        dtype:
            Precision of the Jacobian.
    """

    def __init__(
        self,
        layout: Layout,
        n_samples: int,
        n_outputs: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._layout = layout
        self._n_outputs = n_outputs
        self._n_samples = n_samples
        self._rows = torch.zeros(
            (n_samples, n_outputs, layout.n_columns), dtype=dtype, device=device
        )
        self._parts: dict[str, list[Factors]] = {
            p.name: [] for p in layout.parameters if p.method != "rows"
        }
        self._parameters = {p.name: p for p in layout.parameters}
        self._batch = slice(0, 0)

    def begin(self, batch_size: int) -> None:
        """Start the next batch of samples."""
        self._batch = slice(self._batch.stop, self._batch.stop + batch_size)
        self._pending: dict[str, Factors] = {}

    def add(
        self,
        gradients: Iterator[tuple[str, Contribution]],
        classes: slice,
        weights: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Add the gradients of some outputs of the batch.

        Args:
            gradients:
                Contributions to each parameter's gradient.
            classes:
                Which outputs.
            weights:
                The parameters ``w``.

        Returns:
            What they contribute to ``J diag(c) w``, of shape ``(B, classes)``.
        """
        gathered: dict[str, Factors] = {}
        shape = (self._batch.stop - self._batch.start, classes.stop - classes.start)
        inner = torch.zeros(shape, dtype=torch.float64)
        for name, contribution in gradients:
            parameter = self._parameters[name]
            root = parameter.multiplier**0.5
            if isinstance(contribution, Factors):
                if parameter.method != "rows":
                    part = contribution.inner(weights[name].detach())
                    inner += parameter.multiplier * part.to(inner)
                scaled = contribution.scaled(root)
                known = gathered.get(name)
                if known is None or known.fits(scaled):
                    gathered[name] = scaled if known is None else known.merged(scaled)
                    continue
                # The same weight laid out in two ways, such as a table that is also a projection.
                contribution, root = scaled.rows(), 1.0
            self._add_rows(name, contribution, classes, root)
        for name, factors in gathered.items():
            self._put(name, factors, classes)
        return inner

    def end(self, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """Finish the batch.

        Args:
            weights:
                The parameters ``w``.

        Returns:
            What the rows contribute to ``J diag(c) w``, of shape ``(B, C)``.

        Raises:
            JacobianMismatchError:
                If a layer did not run for it.
        """
        missing = self._parts.keys() - self._pending.keys()
        if missing:
            raise UnclaimedError(missing, "run for some samples but not for others")
        for name in list(self._pending):
            factors = self._pending.pop(name)
            if name in self._parts:
                self._parts[name].append(replace(factors, caches=()))
            else:
                # All outputs in one product, which is faster than one after the other.
                self._add_rows(name, factors.rows(), slice(None))
        # Rows are scaled by the root of the multiplier, and so is w.
        flat = [
            p.multiplier**0.5 * weights[p.name].detach().flatten()
            for p in self._layout.parameters
            if p.method == "rows"
        ]
        rows = self._rows[self._batch]
        return _times(rows, torch.cat(flat) if flat else rows.new_zeros(0))

    def finish(self) -> BlockState:
        """Return the state of all samples."""
        factors = {}
        for name in list(self._parts):
            factors[name] = Factors.concatenate(self._parts.pop(name))
        return BlockState(self._n_samples, self._rows.flatten(0, 1), factors)

    def _add_rows(
        self, name: str, rows: torch.Tensor, classes: slice, factor: float = 1.0
    ) -> None:
        offset = self._layout.offsets[name]
        columns = slice(offset, offset + self._parameters[name].size)
        self._rows[self._batch, classes, columns].add_(rows, alpha=factor)

    def _put(self, name: str, factors: Factors, classes: slice) -> None:
        """Add cotangents of some outputs to those of the others."""
        if name not in self._pending:
            whole = tuple(
                d.new_empty((*d.shape[:2], self._n_outputs, *d.shape[3:]))
                for d in factors.cotangents
            )
            self._pending[name] = replace(factors, cotangents=whole)
        for whole_part, part in zip(
            self._pending[name].cotangents, factors.cotangents, strict=True
        ):
            whole_part[:, :, classes] = part


def _times(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``rows weights`` of shape ``(B, C)``, sums in double precision chunk by chunk."""
    total: Any = torch.zeros(rows.shape[:-1])
    for start in range(0, len(weights), CHUNK):
        part = rows[..., start : start + CHUNK] @ weights[start : start + CHUNK]
        total = total + part.cpu().double()
    return total  # type: ignore[no-any-return]


def multiply(
    layout: Layout, left: BlockState, right: BlockState
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``J_left diag(c) J_right^T``, in double precision.

    Args:
        layout:
            Of both.
        left:
            Rows of the product.
        right:
            Columns. The same object as ``left`` for a block of the diagonal, of which only the
            lower half is multiplied.

    Returns:
        The products, and ``J_left diag(c)^2 J_right^T`` where the multipliers are not all one.
    """
    n_outputs = len(left.rows) // left.n_samples
    device = sums_device(left.rows.device)
    shape = (left.n_samples * n_outputs, right.n_samples * n_outputs)
    total = torch.zeros(shape, dtype=torch.float64, device=device)
    stretched = torch.zeros_like(total) if layout.has_multipliers else None
    symmetric = left is right
    sums = _Sums(total, stretched, symmetric)
    for start, stop, multiplier in layout.sections:
        for first in range(start, stop, CHUNK):
            columns = slice(first, min(first + CHUNK, stop))
            sums.add(left.rows[:, columns], right.rows[:, columns], multiplier)
    for parameter in layout.parameters:
        if parameter.method == "rows":
            continue
        one, other = left.factors[parameter.name], right.factors[parameter.name]
        if parameter.method == "ghost":
            product = ghost_gram(one, other, symmetric=symmetric)
            sums.add_product(product, parameter.multiplier)
            continue
        panels = one.panels(CHUNK)
        others = panels if symmetric else other.panels(CHUNK)
        if symmetric:
            for panel in panels:
                sums.add(panel, panel, parameter.multiplier)
        else:
            for panel, across in zip(panels, others, strict=True):
                sums.add(panel, across, parameter.multiplier)
    if symmetric:
        for matrix in (total, stretched):
            if matrix is not None:
                matrix.copy_(matrix.tril() + matrix.tril(-1).T)
    return total, stretched


class _Sums:
    """Adds products of rows to the kernel, only the block-lower triangle where it is symmetric."""

    def __init__(
        self, total: torch.Tensor, stretched: torch.Tensor | None, symmetric: bool
    ) -> None:
        self._matrices = (total, stretched)
        self._symmetric = symmetric

    def add(self, left: torch.Tensor, right: torch.Tensor, multiplier: float) -> None:
        for column in range(0, left.shape[1], CHUNK):
            self._add_chunk(
                left[:, column : column + CHUNK], right[:, column : column + CHUNK], multiplier
            )

    def add_product(self, product: torch.Tensor, multiplier: float) -> None:
        total, stretched = self._matrices
        assert total is not None
        total += product
        if stretched is not None:
            stretched.add_(product, alpha=multiplier)

    def _add_chunk(self, left: torch.Tensor, right: torch.Tensor, multiplier: float) -> None:
        total, stretched = self._matrices
        assert total is not None
        for start in range(0, len(left), _TILE):
            rows = slice(start, start + _TILE)
            columns = slice(0, start + _TILE if self._symmetric else len(right))
            part = (left[rows] @ right[columns].T).to(total.device)
            total[rows, columns] += part
            if stretched is not None:
                stretched[rows, columns].add_(part, alpha=multiplier)
