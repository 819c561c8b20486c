"""The probabilities with which the columns of the Jacobian are picked.

The column of a weight matters as much for gradient descent as its squared entries, and for Adam,
which moves every weight by about the learning rate, as the absolute values of its entries. Both
are estimated from a few rows; what these say about a single weight is mixed with what they say
about its row and its column of the weight matrix, because a weight that does not act on a few
samples may act on others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
import math

import torch

from optuna_ttp.ntk.engines._rules import COLUMNS


@dataclass(frozen=True, eq=False)
class Importance:
    """Estimates for one parameter, each of shape ``(p,)``, in single precision at least.

    ``squares`` are mean squares and ``moduli`` mean absolute values of the columns' entries.
    """

    squares: torch.Tensor
    moduli: torch.Tensor

    @classmethod
    def of_rows(cls, rows: torch.Tensor, width: int) -> Importance:
        """Return the estimates from some rows ``(n, p)`` of a parameter.

        ``width`` is the length of the weight's first axis, or one for a vector.
        """
        # Norms are computed in one pass over the rows, without copies of them.
        squares = torch.linalg.vector_norm(rows, dim=0).square_() / len(rows)
        moduli = torch.linalg.vector_norm(rows, 1, dim=0) / len(rows)
        return cls(_smoothed(squares, width), _smoothed(moduli, width))

    def scores(self, total_square: float, total_modulus: float) -> torch.Tensor:
        """Return scores ``(p,)``, to which probabilities are proportional.

        They are the mean of the column's norm and its mean absolute value, each divided by the
        total over all parameters.
        """
        share = COLUMNS.modulus_share
        norms = (1.0 - share) / max(total_square, 1e-300) * self.squares.sqrt()
        return norms + share / max(total_modulus, 1e-300) * self.moduli


def _smoothed(values: torch.Tensor, width: int) -> torch.Tensor:
    """Return values ``(p,)`` of a weight, mixed with the products of their means by axis."""
    matrix = values.reshape(width, -1)
    mean = matrix.mean()
    if not mean > 0:
        return values
    separable = matrix.mean(1, keepdim=True) * matrix.mean(0) / mean
    return torch.lerp(matrix, separable, COLUMNS.smoothing).flatten()


def inclusion_factor(scores: Iterable[torch.Tensor], n_columns: float) -> float:
    """Return ``t`` for which the probabilities ``min(1, t s_j)`` sum to a number of columns.

    ``scores`` has a tensor of scores ``s``, not negative, for each parameter. ``t`` is infinite if
    no more scores than ``n_columns`` are positive.
    """
    parts = list(scores)
    if sum(int((s > 0).sum()) for s in parts) <= n_columns:
        return math.inf
    factor = n_columns / sum(float(s.double().sum()) for s in parts)
    while True:
        # Certain columns leave the others less than their share, which makes others certain.
        certain = [s * factor >= 1.0 for s in parts]
        n_certain = sum(int(c.sum()) for c in certain)
        rest = sum(
            float(s.double().sum() - s[c].double().sum())
            for s, c in zip(parts, certain, strict=True)
        )
        better = (n_columns - n_certain) / max(rest, 1e-300)
        if better <= factor * (1.0 + 1e-9):
            return factor
        factor = better


def probabilities(scores: torch.Tensor, factor: float) -> torch.Tensor:
    """Return ``min(1, t s)`` for scores ``s`` and a factor ``t``, zero for scores of zero."""
    if math.isinf(factor):
        return (scores > 0).to(scores.dtype)
    return (scores * factor).clamp(max=1.0)


def systematic_sample(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pick each index with its probability, by one draw; return the indices, ascending.

    Index ``j`` is picked if an integer lies between the cumulative sums before and after it,
    shifted by a uniform number (Madow, 1949): as many as the probabilities sum to, plus or minus
    one, and spread evenly.
    """
    shift = float(torch.rand((), dtype=torch.float64, generator=generator))
    ends = torch.cumsum(probabilities.double(), 0) + shift
    # A certain index is picked also if its sums are rounded.
    certain = probabilities >= 1.0
    crossed = torch.floor(ends) > torch.floor(ends - probabilities.double())
    return (crossed | certain).nonzero().flatten()
