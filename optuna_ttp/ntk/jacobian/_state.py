"""The stored Jacobian of some samples, and the products of two of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import torch

from optuna_ttp.ntk.jacobian._claims import UnclaimedError
from optuna_ttp.ntk.jacobian._layout import Layout
from optuna_ttp.ntk.jacobian._separable import gathered_terms
from optuna_ttp.ntk.jacobian._separable import separate
from optuna_ttp.ntk.jacobian._separable import Separated
from optuna_ttp.ntk.jacobian._separable import separated_gram
from optuna_ttp.ntk.layers._factors import Factors
from optuna_ttp.ntk.layers._factors import ghost_gram
from optuna_ttp.ntk.layers._factors import sums_device
from optuna_ttp.ntk.layers._rule import Contribution
from optuna_ttp.ntk.layers._rules import PRODUCTS


@dataclass(frozen=True, eq=False)
class BlockState:
    """The Jacobian of ``n`` samples: rows for some parameters, factors or terms for the others.

    ``rows``, of shape ``(n C, columns of the layout)``, holds the rows of all small parameters;
    ``matrices`` holds those of large parameters by name, each of shape ``(n C, p)``.
    """

    n_samples: int
    rows: torch.Tensor
    factors: dict[str, Factors]
    matrices: dict[str, torch.Tensor]
    separated: dict[str, Separated]

    def check_finite(self, first: int, n_outputs: int) -> None:
        """Raise ValueError if a gradient is not finite; ``first`` is the first sample's index."""
        finite = torch.isfinite(self.rows).all(1).reshape(self.n_samples, n_outputs)
        for matrix in self.matrices.values():
            finite &= torch.isfinite(matrix).all(1).reshape(finite.shape)
        for separated in self.separated.values():
            finite &= torch.isfinite(separated.weights).all(-1).all(-1)
            finite &= torch.isfinite(separated.rows).flatten(1).all(1, keepdim=True)
        for factors in self.factors.values():
            for d in factors.cotangents:
                finite &= torch.isfinite(d).all(-1).all(-1).all(1)
        bad = (~finite).nonzero()
        if len(bad):
            sample, output = bad[0].tolist()
            raise ValueError(
                f"The gradient of output {output} of sample {first + sample} must be finite but "
                "got NaN or infinity."
            )


class StateBuilder:
    """Collects gradients of ``n_samples`` samples, batch by batch, in the form of the layout."""

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
        self._dtype, self._held = dtype, layout.held or dtype
        self._rows = torch.zeros(
            (n_samples, n_outputs, layout.n_columns), dtype=self._held, device=device
        )
        self._matrices = {
            p.name: torch.empty(
                (n_samples, n_outputs, p.n_weights), dtype=self._held, device=device
            )
            for p in layout.parameters
            if p.method == "rows" and p.name not in layout.offsets
        }
        self._parts: dict[str, list[Factors]] = {
            p.name: [] for p in layout.parameters if p.method in ("ghost", "panels")
        }
        # This is memory for the factors of all samples, None if batches differ in positions.
        self._whole: dict[str, Factors | None] = {}
        # This is memory for the cotangents of a batch, used by one batch after the other.
        self._scratch: dict[str, tuple[torch.Tensor, ...]] = {}
        self._separable = {p.name for p in layout.parameters if p.method == "separable"}
        self._separated: dict[str, Separated] = {}
        self._parameters = {p.name: p for p in layout.parameters}
        self._batch = slice(0, 0)

    def begin(self, batch_size: int) -> None:
        """Start the next batch, of ``batch_size`` samples."""
        self._batch = slice(self._batch.stop, self._batch.stop + batch_size)
        self._pending: dict[str, Factors] = {}
        self._written: set[str] = set()

    def add(
        self,
        gradients: Iterator[tuple[str, Contribution]],
        classes: slice,
    ) -> None:
        """Add contributions to parameters' gradients, for the outputs ``classes`` of the batch."""
        gathered: dict[str, Factors] = {}
        for name, contribution in gradients:
            parameter = self._parameters[name]
            root = parameter.multiplier**0.5
            if isinstance(contribution, Factors):
                scaled = contribution.scaled(root)
                known = gathered.get(name)
                if known is None or known.fits(scaled):
                    gathered[name] = scaled if known is None else known.merged(scaled)
                    continue
                # Two layers use the weight in two layouts, such as a table and a projection.
                contribution, root = scaled.rows(), 1.0
            self._add_rows(name, contribution, classes, root)
        for name, factors in gathered.items():
            self._put(name, factors, classes)

    def end(self, weights: dict[str, torch.Tensor] | None) -> torch.Tensor:
        """Finish the batch; return ``J diag(c) w``, ``(B, C)``, for parameters ``w`` by name.

        Without ``weights`` that is zero. UnclaimedError is raised if a layer did not run.
        """
        missing = (self._parts.keys() | self._separable) - self._pending.keys()
        if missing:
            raise UnclaimedError(missing, "run for some samples but not for others")
        inner = torch.zeros((self._batch.stop - self._batch.start, self._n_outputs)).double()
        for name in list(self._pending):
            factors = self._pending.pop(name)
            # Caches are dropped, so that they do not outlive the batch.
            factors = replace(factors, caches=())
            if name in self._parts:
                if weights is not None:
                    inner += self._inner(name, factors.to(self._dtype), weights)
                self._keep(name, factors)
            elif name in self._separable:
                separated = separate(factors)
                if weights is not None:
                    inner += self._inner(name, separated, weights)
                known = self._separated.get(name)
                self._separated[name] = gathered_terms(
                    known, separated.to(self._held), self._batch, self._n_samples
                )
            elif name in self._matrices and name not in self._written:
                # One product for all outputs is faster than one product per output.
                target = self._matrices[name][self._batch]
                if self._held == self._dtype:
                    factors.write_rows(target)
                else:
                    target.copy_(factors.rows())
                self._written.add(name)
            else:
                self._add_rows(name, factors.rows(), slice(None))
        return inner if weights is None else inner + self._weight_outputs(weights)

    def _inner(
        self, name: str, gradient: Factors | Separated, weights: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return one parameter's contribution to ``J diag(c) w``, ``(B, C)``."""
        # The gradient is scaled by the root of the multiplier, and so is w.
        root = self._parameters[name].multiplier ** 0.5
        inner: torch.Tensor = root * gradient.inner(weights[name].detach()).double().cpu()
        return inner

    def _weight_outputs(self, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the contribution of parameters held as rows to ``J diag(c) w``, ``(B, C)``."""
        together: list[torch.Tensor] = []
        total = torch.zeros((self._batch.stop - self._batch.start, self._n_outputs))
        for p in self._layout.parameters:
            if p.method != "rows":
                continue
            # Rows are scaled by the root of the multiplier, and so is w.
            flat = p.multiplier**0.5 * weights[p.name].detach().flatten()
            if p.name in self._matrices:
                total = total + row_products(self._target(p.name)[self._batch], flat)
            else:
                together.append(flat)
        if together:
            total = total + row_products(self._rows[self._batch], torch.cat(together))
        return total

    def finish(self) -> BlockState:
        """Return the state of all samples, once, after the last batch."""
        self._scratch.clear()
        factors = {}
        for name in list(self._parts):
            parts, whole = self._parts.pop(name), self._whole.pop(name)
            factors[name] = Factors.concatenate(parts) if whole is None else whole
        return BlockState(
            self._n_samples,
            self._rows.flatten(0, 1),
            factors,
            {n: m.flatten(0, 1) for n, m in self._matrices.items()},
            self._separated,
        )

    def _add_rows(
        self, name: str, rows: torch.Tensor, classes: slice, factor: float = 1.0
    ) -> None:
        """Add ``factor`` times rows ``(B, c, p)`` to those of the outputs ``classes``."""
        self._target(name)[self._batch, classes].add_(rows, alpha=factor)

    def _target(self, name: str) -> torch.Tensor:
        """Return a view ``(n, C, p)`` of a parameter's rows, zeroed for the batch at first use."""
        if name not in self._matrices:
            offset = self._layout.offsets[name]
            return self._rows[..., offset : offset + self._parameters[name].n_weights]
        if name not in self._written:
            self._matrices[name][self._batch] = 0.0
            self._written.add(name)
        return self._matrices[name]

    def _put(self, name: str, factors: Factors, classes: slice) -> None:
        """Write the cotangents of the outputs ``classes`` beside those of the other outputs."""
        if name not in self._pending:
            memory = self._memory(name, factors)
            self._pending[name] = replace(factors, cotangents=memory)
        for whole_part, part in zip(
            self._pending[name].cotangents, factors.cotangents, strict=True
        ):
            whole_part[:, :, classes] = part

    def _memory(self, name: str, factors: Factors) -> tuple[torch.Tensor, ...]:
        """Return memory for the cotangents of all outputs of a batch, one tensor per call."""
        several = len(factors.cotangents[0]) < self._n_samples or self._held != self._dtype
        if name in self._parts and several:
            if name not in self._whole:
                self._whole[name] = _empty_like(
                    factors, self._n_samples, self._n_outputs, self._held
                )
            whole = self._whole[name]
            if whole is not None and _same_shapes(whole, factors):
                return tuple(d[self._batch] for d in whole.cotangents)
            n = len(factors.cotangents[0])
            return _empty_like(factors, n, self._n_outputs, self._held).cotangents
        shapes = [d.shape for d in factors.cotangents]
        held = self._scratch.get(name)
        if held is None or any(
            len(h) < shape[0] or h.shape[1] != shape[1] or h.shape[3:] != shape[3:]
            for h, shape in zip(held, shapes, strict=True)
        ):
            held = tuple(_for_all(d, self._n_outputs) for d in factors.cotangents)
            self._scratch[name] = held
        return tuple(h[: shape[0]] for h, shape in zip(held, shapes, strict=True))

    def _keep(self, name: str, factors: Factors) -> None:
        """Store the factors of a batch beside those of earlier batches."""
        whole, parts = self._whole.get(name), self._parts[name]
        if whole is not None and _same_shapes(whole, factors):
            for all_, some in zip(whole.sources, factors.sources, strict=True):
                all_[self._batch] = some
            # These views are used if a later batch has another number of positions.
            sources = tuple(t[self._batch] for t in whole.sources)
            parts.append(replace(factors, sources=sources))
            return
        self._whole[name] = None
        parts.append(factors.to(self._held))


def _empty_like(factors: Factors, n_samples: int, n_outputs: int, dtype: torch.dtype) -> Factors:
    """Return uninitialised factors of ``n_samples`` samples and all outputs, without caches."""

    def memory(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        return torch.empty((n_samples, *shape), dtype=kind, device=tensor.device)

    sources = tuple(memory(t, *t.shape[1:]) for t in factors.sources)
    cotangents = tuple(memory(d, d.shape[1], n_outputs, *d.shape[3:]) for d in factors.cotangents)
    return replace(factors, sources=sources, cotangents=cotangents, caches=())


def _same_shapes(whole: Factors, part: Factors) -> bool:
    """Return whether both have as many calls, with the same numbers of positions."""
    if len(whole.sources) != len(part.sources):
        return False
    sources = zip(whole.sources, part.sources, strict=True)
    cotangents = zip(whole.cotangents, part.cotangents, strict=True)
    return all(a.shape[1:] == b.shape[1:] for a, b in sources) and all(
        a.shape[3:] == b.shape[3:] for a, b in cotangents
    )


def _for_all(cotangent: torch.Tensor, n_outputs: int) -> torch.Tensor:
    """Return memory ``(B, G, n_outputs, o, S)`` with the strides of a cotangent of one output."""
    batch, groups, _, width, positions = cotangent.shape
    if cotangent.stride(3) != 1 or positions == 1:
        return cotangent.new_empty((batch, groups, n_outputs, width, positions))
    memory = cotangent.new_empty((batch, positions, groups, n_outputs, width))
    return memory.permute(0, 2, 3, 4, 1)


def row_products(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return ``rows weights``, ``(B, C)``, for rows ``(B, C, p)``, in double precision."""
    total: Any = torch.zeros(rows.shape[:-1])
    for start in range(0, len(weights), PRODUCTS.chunk):
        part = (
            rows[..., start : start + PRODUCTS.chunk].to(weights.dtype)
            @ weights[start : start + PRODUCTS.chunk]
        )
        total = total + part.cpu().double()
    return total  # type: ignore[no-any-return]


def multiply(
    layout: Layout, left: BlockState, right: BlockState
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return ``J_left diag(c) J_right^T`` and ``J_left diag(c)^2 J_right^T``, in double precision.

    The second is :obj:`None` if all multipliers are one. If ``left`` and ``right`` are the same
    object, only the lower triangle is multiplied, and then mirrored.
    """
    n_outputs = len(left.rows) // left.n_samples
    device = sums_device(left.rows.device)
    shape = (left.n_samples * n_outputs, right.n_samples * n_outputs)
    total = torch.zeros(shape, dtype=torch.float64, device=device)
    stretched = torch.zeros_like(total) if layout.has_multipliers else None
    symmetric = left is right
    # Numbers that are held in half precision are multiplied in single precision.
    dtype = left.rows.dtype if layout.held is None else torch.float32
    sums = _Sums(total, stretched, symmetric, dtype)
    for start, stop, multiplier in layout.sections:
        sums.add(left.rows[:, start:stop], right.rows[:, start:stop], multiplier)
    for parameter in layout.parameters:
        name = parameter.name
        if parameter.method == "rows":
            if name in left.matrices:
                sums.add(left.matrices[name], right.matrices[name], parameter.multiplier)
            continue
        if parameter.method == "separable":
            terms = left.separated[name].to(dtype)
            across_terms = terms if symmetric else right.separated[name].to(dtype)
            product = separated_gram(terms, across_terms, symmetric=symmetric)
            sums.add_product(product, parameter.multiplier)
            continue
        one = left.factors[name].to(dtype)
        other = one if symmetric else right.factors[name].to(dtype)
        if parameter.method == "ghost":
            product = ghost_gram(one, other, symmetric=symmetric)
            sums.add_product(product, parameter.multiplier)
            continue
        panels = one.panels(PRODUCTS.panel)
        others = panels if symmetric else other.panels(PRODUCTS.panel)
        if symmetric:
            for panel in panels:
                sums.add(panel, panel, parameter.multiplier)
                # The memory is released before the next panel is made.
                del panel
        else:
            for panel, across in zip(panels, others, strict=True):
                sums.add(panel, across, parameter.multiplier)
                del panel, across
    if symmetric:
        for matrix in (total, stretched):
            if matrix is not None:
                _mirror(matrix)
    return total, stretched


def _mirror(matrix: torch.Tensor) -> None:
    """Copy the lower triangle of a square matrix to the upper one, in place."""
    for start in range(0, len(matrix), PRODUCTS.max_tile):
        stop = min(start + PRODUCTS.max_tile, len(matrix))
        block = matrix[start:stop, start:stop]
        block.copy_(block.tril() + block.tril(-1).T)
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T


class _Sums:
    """Adds products to ``J c J^T`` and ``J c^2 J^T``; if ``symmetric``, to lower blocks only."""

    def __init__(
        self,
        total: torch.Tensor,
        stretched: torch.Tensor | None,
        symmetric: bool,
        dtype: torch.dtype,
    ) -> None:
        self._matrices = (total, stretched)
        self._symmetric = symmetric
        self._dtype = dtype

    def add(self, left: torch.Tensor, right: torch.Tensor, multiplier: float) -> None:
        """Add ``left right^T``, in pieces that fit the processor's cache."""
        for column in range(0, left.shape[1], PRODUCTS.columns):
            columns = slice(column, column + PRODUCTS.columns)
            one, other = (t[:, columns].to(self._dtype) for t in (left, right))
            self._add_chunk(one, other, multiplier)

    def add_product(self, product: torch.Tensor, multiplier: float) -> None:
        """Add a matrix of products; ``multiplier`` times it goes to ``J c^2 J^T``."""
        total, stretched = self._matrices
        assert total is not None
        total += product
        if stretched is not None:
            stretched.add_(product, alpha=multiplier)

    def _add_chunk(self, left: torch.Tensor, right: torch.Tensor, multiplier: float) -> None:
        """Add ``left right^T`` in tiles of rows."""
        total, stretched = self._matrices
        assert total is not None
        tile = min(PRODUCTS.max_tile, max(PRODUCTS.min_tile, len(left) // PRODUCTS.n_tiles))
        for start in range(0, len(left), tile):
            rows = slice(start, start + tile)
            columns = slice(0, start + tile if self._symmetric else len(right))
            part = (left[rows] @ right[columns].T).to(total.device)
            total[rows, columns] += part
            if stretched is not None:
                stretched[rows, columns].add_(part, alpha=multiplier)
