"""A sample of the Jacobian's columns, for optimisers that act on single weights."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class SampledJacobian:
    """``d`` columns of the Jacobian, which were picked with known probabilities.

    A column belongs to one weight ``w_j``, which was picked with the probability ``p_j``. With the
    inflation ``u_j = 1 / p_j`` the sums ``sum_j u_j J_nj x_j`` over the picked weights are
    unbiased for the sums over all weights (Horvitz and Thompson, 1952). With all columns, ``p_j =
    1``, nothing is approximated. Arrays are described for N samples, N_v validation samples and C
    outputs.

    Attributes:
        codes:
            The columns divided by their scales, of shape ``(N C, d)``, in half precision if they
            were stored in it; row ``n C + c`` belongs to output c of sample n.
        scales:
            The largest absolute value of each column, shape ``(d,)``, or one for a column of
            zeros.
        inflation:
            ``u``, shape ``(d,)``, at least one.
        weights:
            The pretrained value of each picked weight, shape ``(d,)``.
        parameters:
            The index of each picked weight's parameter in ``names``, shape ``(d,)``.
        positions:
            The index of each picked weight in its flattened parameter, shape ``(d,)``.
        names:
            The names of the trainable parameters.
        n_weights:
            The number of weights of each of these parameters, shape ``(len(names),)``.
        validation:
            The codes of the same columns for the validation samples, ``(N_v C, d)``, or
            :obj:`None`.
    """

    codes: NDArray[np.floating[Any]]
    scales: NDArray[np.float32]
    inflation: NDArray[np.float64]
    weights: NDArray[np.float64]
    parameters: NDArray[np.int64]
    positions: NDArray[np.int64]
    names: tuple[str, ...]
    n_weights: NDArray[np.int64]
    validation: NDArray[np.floating[Any]] | None = None

    def __post_init__(self) -> None:
        width = self.n_columns
        if self.codes.ndim != 2:
            raise ValueError(f"codes must have shape (N C, d) but got {self.codes.shape}.")
        for name in ("scales", "inflation", "weights", "parameters", "positions"):
            shape = getattr(self, name).shape
            if shape != (width,):
                raise ValueError(f"{name} must have shape ({width},) but got {shape}.")
        if self.n_weights.shape != (len(self.names),):
            raise ValueError(
                f"n_weights must have shape ({len(self.names)},) but got {self.n_weights.shape}."
            )
        if self.validation is not None and self.validation.shape[1:] != (width,):
            raise ValueError(
                f"validation must have shape (N_v C, {width}) but got {self.validation.shape}."
            )
        for name in ("codes", "scales", "inflation", "weights"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} must be finite but got NaN or infinity.")
        if width and not (self.inflation >= 1.0).all():
            raise ValueError(
                f"inflation must be at least one but got {float(self.inflation.min())}."
            )
        n_names = len(self.names)
        if width and not (self.parameters.min() >= 0 and self.parameters.max() < n_names):
            raise ValueError(f"parameters must be indices of the {n_names} names.")

    @property
    def n_columns(self) -> int:
        """The number d of columns."""
        return int(self.codes.shape[1])

    @property
    def columns(self) -> NDArray[np.floating[Any]]:
        """The columns, of shape ``(N C, d)``, in single precision at least."""
        return self._decoded(self.codes)

    @property
    def validation_columns(self) -> NDArray[np.floating[Any]] | None:
        """The columns of the validation samples, ``(N_v C, d)``, or :obj:`None`."""
        return None if self.validation is None else self._decoded(self.validation)

    def thinned(self, n_columns: int, rng: np.random.Generator) -> SampledJacobian:
        """Return a sample of about so many of these columns, drawn with known probabilities.

        Column j is picked with a probability proportional to ``u_j`` times its mean absolute
        value, at most one, and its inflation divided by that probability.

        Args:
            n_columns:
                The expected number of columns, positive.
            rng:
                Draws the columns.

        Returns:
            The sample, or this one if it has no more columns.
        """
        if n_columns >= self.n_columns:
            return self
        means = np.abs(self.codes, dtype=np.float32).mean(axis=0, dtype=np.float64) * self.scales
        shares = self.inflation * means
        probability = _probabilities(shares, n_columns)
        picked = np.flatnonzero(rng.random(self.n_columns) < probability)
        held_out = self.validation
        by_column = ("scales", "weights", "parameters", "positions")
        return replace(
            self,
            codes=np.take(self.codes, picked, axis=1),
            inflation=self.inflation[picked] / probability[picked],
            validation=None if held_out is None else np.take(held_out, picked, axis=1),
            **{name: getattr(self, name)[picked] for name in by_column},
        )

    def _decoded(self, codes: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """Return codes times scales, in single precision or, of such codes, in double."""
        precision = np.float64 if codes.dtype == np.float64 else np.float32
        return np.asarray(codes.astype(precision) * self.scales.astype(precision))


def _probabilities(shares: NDArray[np.float64], n_columns: int) -> NDArray[np.float64]:
    """Return probabilities proportional to shares, at most one, whose sum is ``n_columns``."""
    certain = np.zeros(len(shares), dtype=bool)
    while True:
        rest = shares[~certain].sum()
        if not rest > 0.0:
            return np.ones(len(shares))
        probability = np.where(certain, 1.0, (n_columns - certain.sum()) * shares / rest)
        above = probability > 1.0
        if not above.any():
            return probability
        certain |= above
