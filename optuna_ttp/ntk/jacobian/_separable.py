"""Gradients of weight matrices whose cotangents are products ``u[n, c, o] m[n, o, s]``.

Between the last convolution of most networks and their outputs there are element-wise operations,
a mean over positions and a linear layer. Cotangents are then the weight ``u`` of channel ``o`` for
output ``c`` times a pattern ``m`` over positions, so that one row per channel serves all outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optuna_ttp.ntk.jacobian._rules import CHECKS
from optuna_ttp.ntk.layers._factors import Factors
from optuna_ttp.ntk.layers._factors import input_side
from optuna_ttp.ntk.layers._factors import joined
from optuna_ttp.ntk.layers._factors import outer
from optuna_ttp.ntk.layers._factors import sums_device
from optuna_ttp.ntk.layers._rules import PRODUCTS


@dataclass(frozen=True, eq=False)
class Separated:
    """The gradient ``G[n, c, o, :] = sum_r weights[n, c, o, r] rows[n, o, r, :]`` of R terms.

    If cotangents are ``D[n, c, o, s] = u[n, c, o] m[n, o, s]``, there is one term, and the row is
    ``sum_s m[n, o, s] A[n, :, s]``. ``weights`` have shape ``(B, C, O, R)``, with the channels ``O
    = G o`` of all groups, and ``rows`` have shape ``(B, O, R, k)``.
    """

    weights: torch.Tensor
    rows: torch.Tensor

    def to(self, dtype: torch.dtype) -> Separated:
        """Return the terms in another precision."""
        return Separated(self.weights.to(dtype), self.rows.to(dtype))

    def of(self, samples: slice) -> Separated:
        """Return the gradients of a range of samples."""
        return Separated(self.weights[samples], self.rows[samples])

    def gradient(self) -> torch.Tensor:
        """Return the gradient, of shape ``(B, C, O k)``."""
        parts = [
            self.weights[..., r, None] * self.rows[:, None, :, r]
            for r in range(self.rows.shape[2])
        ]
        return sum(parts[1:], parts[0]).flatten(2)

    def columns(self, picked: torch.Tensor) -> torch.Tensor:
        """Return the columns ``(B, C, m)`` of the flattened weights ``picked``, ``(m,)``."""
        n_rows = self.rows.shape[3]
        channels, inputs = picked // n_rows, picked % n_rows
        # Indices on both sides of a slice put the picked axis first.
        return torch.einsum(
            "bcmr,mbr->bcm", self.weights[:, :, channels], self.rows[:, channels, :, inputs]
        )

    def inner(self, weight: torch.Tensor) -> torch.Tensor:
        """Return ``sum_{o, k} G[n, c, o, k] W[o, k]`` for a weight ``W``, of shape ``(B, C)``."""
        matrix = weight.reshape(self.rows.shape[1], -1)
        terms = (self.rows * matrix[:, None]).sum(-1)
        return (self.weights.flatten(2) @ terms.flatten(1)[..., None]).squeeze(2)

    def product(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return ``G^T V`` of shape ``(O k, n)`` for ``V`` of shape ``(B C, n)``."""
        batch, classes, width, rank = self.weights.shape
        weights = self.weights.permute(0, 2, 3, 1).flatten(1, 2)
        mixed = (weights @ vectors.unflatten(0, (batch, classes))).unflatten(1, (width, rank))
        rows = self.rows.permute(1, 3, 0, 2).flatten(2)
        product: torch.Tensor = rows @ mixed.transpose(0, 1).flatten(1, 2)
        return product.flatten(0, 1)

    def image(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return ``G W`` of shape ``(B C, n)`` for ``W`` of shape ``(O k, n)``."""
        batch, _, width, rank = self.weights.shape
        rows = self.rows.transpose(0, 1).flatten(1, 2)
        mixed = (rows @ matrix.unflatten(0, (width, -1))).unflatten(1, (batch, rank))
        image: torch.Tensor = self.weights.flatten(2) @ mixed.transpose(0, 1).flatten(1, 2)
        return image.flatten(0, 1)


def gathered_terms(
    whole: Separated | None, part: Separated, samples: slice, n_samples: int
) -> Separated:
    """Write the terms of some samples into the memory ``whole`` of all ``n_samples``; return it.

    New memory is allocated, and ``whole`` copied to it, if ``whole`` is :obj:`None` or ``part``
    has more terms.
    """
    n_terms = part.rows.shape[2]
    if whole is None or whole.rows.shape[2] < n_terms:
        known = whole
        whole = Separated(
            part.weights.new_zeros((n_samples, *part.weights.shape[1:])),
            part.rows.new_zeros((n_samples, *part.rows.shape[1:])),
        )
        if known is not None:
            whole.weights[..., : known.weights.shape[3]] = known.weights
            whole.rows[:, :, : known.rows.shape[2]] = known.rows
    whole.weights[samples, ..., :n_terms] = part.weights
    whole.rows[samples, :, :n_terms] = part.rows
    return whole


def is_separable(factors: Factors) -> bool:
    """Return whether all cotangents are products of a channel's weight and a pattern.

    ``factors`` must be of two or more directions of the outputs: one is always a product.
    """
    # In a transposed weight, inputs come first, but in rows of terms channels do.
    plain = factors.expand is not None and not factors.transposed
    return plain and _split(factors) is not None


def separate(factors: Factors) -> Separated:
    """Write a gradient for all outputs as a sum of terms.

    That is one term if all cotangents are products of a weight and a pattern, else C terms.
    """
    inputs = input_side(factors)
    batch, groups, classes, width = joined(factors.cotangents).shape[:4]
    split = _split(factors)
    if split is None:
        rows = outer(joined(factors.cotangents), inputs).permute(0, 1, 3, 2, 4).flatten(1, 2)
        eye = torch.eye(classes, dtype=rows.dtype, device=rows.device)
        weights = eye[None, :, None].expand(batch, -1, groups * width, -1)
        return Separated(weights, rows)
    weights, patterns = split
    # (B, G, C, o) to (B, C, G o)
    weights = weights.transpose(1, 2).flatten(2)[..., None]
    return Separated(weights, (patterns @ inputs.transpose(2, 3)).flatten(1, 2)[:, :, None])


def _split(factors: Factors) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return ``u``, ``(B, G, C, o)``, and ``m``, ``(B, G, o, S)``; None unless ``D = u m``."""
    d = joined(factors.cotangents)
    largest, which = d.square().sum(-1).max(2)
    patterns = torch.take_along_dim(d, which[:, :, None, :, None], 2)
    inner = (d * patterns).sum(-1)
    weights = inner / largest[:, :, None].clamp(min=torch.finfo(d.dtype).tiny)
    away = torch.addcmul(d, weights[..., None], patterns, value=-1.0)
    tolerance = CHECKS.roundings * torch.finfo(d.dtype).eps * d.abs().amax((3, 4))
    same = bool((away.abs_().amax((3, 4)) <= tolerance).all())
    return (weights, patterns[:, :, 0]) if same else None


def separated_gram(left: Separated, right: Separated, *, symmetric: bool) -> torch.Tensor:
    """Return inner products of gradients, of shape ``(B C, B' C)``, in double precision.

    ``Theta[n c, m c'] = sum u[n, c, o, r] u[m, c', o, q] (g[n, o, r] . g[m, o, q])`` over o, r, q
    for the ``weights`` u and ``rows`` g of :class:`Separated` (R terms). With ``symmetric`` both
    sides must be the same, and entries with ``m > n`` may stay zero.
    """
    n_left, classes, width, rank = left.weights.shape
    n_right, _, _, other_rank = right.weights.shape
    device = sums_device(left.rows.device)
    total = torch.zeros((n_left, classes, n_right, classes), dtype=torch.float64, device=device)
    # (O, m r', k) and (O, m, r', C)
    columns = right.rows.transpose(0, 1).flatten(1, 2)
    weights = right.weights.permute(2, 0, 3, 1)
    step = max(1, 4 * PRODUCTS.scratch // (width * rank * n_right * max(classes, other_rank)))
    for first in range(0, n_left, step):
        last = min(first + step, n_left)
        seen = last if symmetric else n_right
        some = left.rows[first:last].transpose(0, 1).flatten(1, 2)
        products = torch.bmm(some, columns[:, : seen * other_rank].transpose(1, 2))
        # (O, n r, m, r')
        products = products.unflatten(2, (seen, other_rank))
        weighted: torch.Tensor | None = None
        for r in range(other_rank):
            part = products[..., r, None] * weights[:, None, :seen, r]
            weighted = part if weighted is None else weighted.add_(part)
        assert weighted is not None
        # (O, n, r, m C) to (n, O r, m C)
        merged = weighted.unflatten(1, (last - first, rank)).permute(1, 0, 2, 3, 4)
        merged = merged.reshape(last - first, width * rank, seen * classes)
        result = left.weights[first:last].flatten(2) @ merged
        total[first:last, :, :seen] += result.unflatten(2, (seen, classes)).to(device)
    return total.reshape(n_left * classes, n_right * classes)
