"""Gradients of weight matrices as products of a layer's inputs and its output cotangents."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace

import torch

from optuna_ttp.ntk.layers._rules import PRODUCTS


@dataclass(frozen=True, eq=False)
class Factors:
    """The gradient of a weight matrix, ``G[n, g, c] = D[n, g, c] A[n, g]^T``, not multiplied out.

    For a linear layer ``A`` are its inputs and ``D`` the derivatives of the network's output ``c``
    with respect to the layer's outputs, at the ``S`` positions (tokens) where the layer is
    applied: the gradient is ``sum_s D[:, s] A[:, s]^T``. A convolution is a linear layer on
    unfolded inputs with groups ``g`` (Rochette, Manoel and Tramel, 2019, arXiv 1912.06015).

    ``sources``, ``cotangents`` and ``caches`` have one entry per call of the layer. ``expand``
    computes ``A`` of shape ``(B, G, k, S)`` from a source ``(B, ...)``, and the cache keeps it. If
    ``expand`` is None, sources ``(B, S)`` index the rows of a table, and ``A`` is one-hot.
    Cotangents are ``D``, of shape ``(B, G, C, o, S)``, and ``n_rows`` is ``k``. With
    ``transposed`` the weight is laid out as ``(G, k, o)``, not ``(G, o, k)``.
    """

    sources: tuple[torch.Tensor, ...]
    expand: Callable[[torch.Tensor], torch.Tensor] | None
    cotangents: tuple[torch.Tensor, ...]
    n_rows: int
    transposed: bool = False
    caches: tuple[dict[str, torch.Tensor], ...] = ()

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Return ``(G, C, o, S, k)``, where ``S`` counts the positions of all calls."""
        _, groups, classes, width, _ = self.cotangents[0].shape
        positions = sum(d.shape[-1] for d in self.cotangents)
        return groups, classes, width, positions, self.n_rows

    def scaled(self, factor: float) -> Factors:
        """Return the factors of ``factor`` times the gradient."""
        if factor == 1.0:
            return self
        return replace(self, cotangents=tuple(factor * d for d in self.cotangents))

    def merged(self, other: Factors) -> Factors:
        """Return the factors of the sum of two gradients of the same weight."""
        return replace(
            self,
            sources=self.sources + other.sources,
            cotangents=self.cotangents + other.cotangents,
            caches=self.caches + other.caches,
        )

    def fits(self, other: Factors) -> bool:
        """Return whether both have the same shapes and layout, so that they can be merged."""
        return (self.n_rows, self.transposed, self.expand is None) == (
            other.n_rows,
            other.transposed,
            other.expand is None,
        ) and self.cotangents[0].shape[:4] == other.cotangents[0].shape[:4]

    def to(self, dtype: torch.dtype) -> Factors:
        """Return the factors in another precision, without caches; indices are not converted."""
        sources = tuple(s.to(dtype) if s.is_floating_point() else s for s in self.sources)
        cotangents = tuple(d.to(dtype) for d in self.cotangents)
        return replace(self, sources=sources, cotangents=cotangents, caches=())

    def of(self, samples: slice) -> Factors:
        """Return the factors of a range of samples, without caches."""
        return replace(
            self,
            sources=tuple(s[samples] for s in self.sources),
            cotangents=tuple(d[samples] for d in self.cotangents),
            caches=(),
        )

    @staticmethod
    def concatenate(parts: list[Factors]) -> Factors:
        """Join batches along the axis of samples, padded if their numbers of positions differ."""
        if len(parts) == 1:
            return parts[0]
        if len({tuple(s.shape[1:] for s in p.sources) for p in parts}) > 1:
            parts = _padded(parts)
        return replace(
            parts[0],
            sources=tuple(map(torch.cat, zip(*(p.sources for p in parts), strict=True))),
            cotangents=tuple(map(torch.cat, zip(*(p.cotangents for p in parts), strict=True))),
        )

    def inputs(self) -> list[torch.Tensor]:
        """Return ``A``, of shape ``(B, G, k, S)``, for each call; caches are filled."""
        assert self.expand is not None
        if not self.caches:
            return [self.expand(source) for source in self.sources]
        made = []
        for source, cache in zip(self.sources, self.caches, strict=True):
            if "inputs" not in cache:
                cache["inputs"] = self.expand(source)
            made.append(cache["inputs"])
        return made

    def rows(self) -> torch.Tensor:
        """Return the gradient, flattened like the weight: ``(B, C, G o k)``."""
        if self.expand is None:
            return self._table_rows()
        total: torch.Tensor | None = None
        for inputs, cotangent in zip(self.inputs(), self.cotangents, strict=True):
            part = outer(cotangent, inputs)
            total = part if total is None else total.add_(part)
        assert total is not None
        # (B, G, C, o, k)
        order = (0, 2, 1, 4, 3) if self.transposed else (0, 2, 1, 3, 4)
        return total.permute(order).flatten(2)

    def write_rows(self, target: torch.Tensor) -> None:
        """Write the gradient to a contiguous tensor of the shape of :meth:`rows`.

        For one group and one call, the product is computed in place.
        """
        plain = self.expand is not None and not self.transposed
        if plain and len(self.sources) == 1 and self.shape[0] == 1:
            out = target.view(len(target), -1, self.n_rows)
            outer(self.cotangents[0], self.inputs()[0], out)
        else:
            target.copy_(self.rows())

    def panels(self, n_columns: int) -> Iterator[torch.Tensor]:
        """Yield slices ``(B C, columns)`` of the gradient, each of about ``n_columns`` columns."""
        assert self.expand is not None
        inputs = self.inputs()
        groups, classes, width, _, n_rows = self.shape
        step = max(1, n_columns // (groups * n_rows))
        for start in range(0, width, step):
            total: torch.Tensor | None = None
            for a, d in zip(inputs, self.cotangents, strict=True):
                part = outer(d[:, :, :, start : start + step], a)
                total = part if total is None else total.add_(part)
            assert total is not None
            yield total.transpose(1, 2).reshape(len(total) * classes, -1)

    def inner(self, weight: torch.Tensor) -> torch.Tensor:
        """Return inner products ``(B, C)`` of gradient and tensor, laid out as the weight."""
        outputs = [self._outputs(k, weight) for k in range(len(self.sources))]
        parts = [
            (d.flatten(3) @ y.flatten(2)[..., None]).squeeze(3)
            for d, y in zip(self.cotangents, outputs, strict=True)
        ]
        # (B, G, C) each
        return torch.stack(parts).sum((0, 2))

    def _outputs(self, k: int, weight: torch.Tensor) -> torch.Tensor:
        """Return call ``k``'s outputs ``(B, G, o, S)`` if the layer had this weight, no bias."""
        groups, _, width, _, n_rows = self.shape
        if self.expand is None:
            looked_up = torch.nn.functional.embedding(self.sources[k], weight)
            return looked_up.transpose(1, 2)[:, None]
        shape = (groups, n_rows, width) if self.transposed else (groups, width, n_rows)
        matrix = weight.reshape(shape)
        matrix = matrix.transpose(1, 2) if self.transposed else matrix
        return matrix @ self.expand(self.sources[k])

    def _table_rows(self) -> torch.Tensor:
        """Return the gradient with respect to a table that integers index, ``(B, C, k o)``."""
        first = self.cotangents[0]
        _, classes, width, _, _ = self.shape
        rows = first.new_zeros((len(first), classes, self.n_rows, width))
        for ids, cotangent in zip(self.sources, self.cotangents, strict=True):
            for sample, index, values in zip(rows, ids, cotangent[:, 0], strict=True):
                sample.index_add_(1, index, values.transpose(1, 2))
        return rows.flatten(2)


def ghost_gram(left: Factors, right: Factors, *, symmetric: bool) -> torch.Tensor:
    """Return inner products of gradients, ``(B C, B' C)``, without making the gradients.

    ``Theta[n c, m c'] = sum_{s t} (A_n^T A_m)[s, t] (D_nc^T D_mc')[s, t]``, in double precision,
    is the "ghost" form (Goodfellow, 2015, arXiv 1510.01799, for norms; Novak, Sohl-Dickstein and
    Schoenholz, 2022, arXiv 2206.08720, for kernels). It is fast for few positions and wide layers.
    With ``symmetric`` both sides must be the same, and only entries with ``m <= n`` are filled.
    """
    groups, classes, _, positions, _ = left.shape
    other_positions = right.shape[3]
    n_left, n_right = len(left.cotangents[0]), len(right.cotangents[0])
    device = sums_device(left.cotangents[0].device)
    total = torch.zeros((n_left, classes, n_right, classes), dtype=torch.float64, device=device)
    d_left, d_right = joined(left.cotangents), joined(right.cotangents)
    a_right = input_side(right)
    # If both sides are the same, their inputs are held once.
    a_left = a_right if symmetric else input_side(left)
    for group in range(groups):
        dl, dr = d_left[:, group], d_right[:, group]
        if left.expand is not None:
            al, ar = a_left[:, group].transpose(1, 2), a_right[:, group].transpose(1, 2)
        else:
            al, ar = a_left, a_right
        if positions == other_positions == 1 and left.expand is not None:
            # Both products are plain matrices.
            outputs = chunked_product(dl.flatten(0, 1)[..., 0], dr.flatten(0, 1)[..., 0])
            inputs = chunked_product(al[:, 0], ar[:, 0])
            whole = outputs.reshape(n_left, classes, n_right, classes)
            total += (whole * inputs[:, None, :, None]).to(device)
            continue
        ar = ar.contiguous()
        al = ar if symmetric else al.contiguous()
        step = max(1, PRODUCTS.scratch // (dl[0].numel() // positions * other_positions))
        for n in range(n_left):
            seen = n + 1 if symmetric else n_right
            for first in range(0, seen, step):
                others = slice(first, min(first + step, seen))
                inputs = _input_products(left, al[n], ar[others])
                total[n, :, others] += _contract(dl[n], inputs, dr[others]).to(device)
    return total.reshape(n_left * classes, n_right * classes)


def _input_products(left: Factors, one: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return ``A_n^T A_m``, ``(m, S, S')``, of inputs ``(S, k)``, ``(m, S', k)``, or indices."""
    dtype = left.cotangents[0].dtype
    if left.expand is None:
        return (one[:, None] == others[:, None]).to(dtype)
    product: torch.Tensor = chunked_product(one, others.flatten(0, 1)).to(dtype)
    return product.reshape(len(one), len(others), -1).transpose(0, 1)


def _contract(left: torch.Tensor, inputs: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return ``sum_{o s t} left[c o s] inputs[m s t] right[m c' o t]``, as ``(C, m, C')``."""
    classes, width, positions = left.shape
    n_right, other_positions = len(right), right.shape[-1]
    step = max(1, PRODUCTS.chunk // other_positions)
    total: torch.Tensor | None = None
    for start in range(0, width, step):
        some = left[:, start : start + step].reshape(1, -1, positions)
        part = torch.bmm(some.expand(n_right, -1, -1), inputs)
        part = part.reshape(n_right, classes, -1)
        product = part @ right[:, :, start : start + step].flatten(2).transpose(1, 2)
        total = product if total is None else total + product
    assert total is not None
    return total.transpose(0, 1)


def input_side(factors: Factors) -> torch.Tensor:
    """Join the inputs ``(B, G, k, S)`` of all calls, or the indices ``(B, S)`` of a table."""
    if factors.expand is None:
        return torch.cat(factors.sources, 1)
    return joined(tuple(factors.inputs()))


def _padded(parts: list[Factors]) -> list[Factors]:
    """Pad batches to the same number of positions; cotangents of added positions are zero."""
    joined = [(input_side(p), joined(p.cotangents)) for p in parts]
    longest = max(d.shape[-1] for _, d in joined)
    pad = torch.nn.functional.pad
    return [
        replace(
            part,
            sources=(pad(a, (0, longest - d.shape[-1])),),
            cotangents=(pad(d, (0, longest - d.shape[-1])),),
            expand=None if part.expand is None else _unchanged,
        )
        for part, (a, d) in zip(parts, joined, strict=True)
    ]


def _unchanged(inputs: torch.Tensor) -> torch.Tensor:
    """Return the argument, as ``expand`` of factors whose sources are the inputs themselves."""
    return inputs


def joined(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Join tensors ``(..., S)``, one per call, along their last axis."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def outer(
    cotangent: torch.Tensor, inputs: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``D A^T`` summed over positions, of shape ``(B, G, C, o, k)``.

    ``cotangent`` is ``D`` of shape ``(B, G, C, o, S)``, ``inputs`` is ``A`` of shape ``(B, G, k,
    S)``. With one group the product can be written to ``out`` of shape ``(B, C o, k)``.
    """
    batch, groups, classes, width, positions = cotangent.shape
    merged = cotangent.reshape(batch, groups, classes * width, positions)
    if out is None:
        product = merged @ inputs.transpose(2, 3)
    else:
        product = torch.bmm(merged[:, 0], inputs[:, 0].transpose(1, 2), out=out)
    return product.reshape(batch, groups, classes, width, -1)


def sums_device(device: torch.device) -> torch.device:
    """Return the device for sums in double precision, which is the CPU for Apple's."""
    return torch.device("cpu") if device.type == "mps" else device


def chunked_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return ``left right^T``, ``(a, b)``, of matrices ``(a, K)`` and ``(b, K)``.

    For ``K`` above 2^14 the result is in double precision, a sum of products of chunks.
    """
    if left.shape[1] <= PRODUCTS.chunk:
        return left @ right.T
    device = sums_device(left.device)
    total = torch.zeros((len(left), len(right)), dtype=torch.float64, device=device)
    for start in range(0, left.shape[1], PRODUCTS.chunk):
        part = left[:, start : start + PRODUCTS.chunk] @ right[:, start : start + PRODUCTS.chunk].T
        total += part.to(device)
    return total
