"""The slow-down of large steps, which move the outputs less far than linearisation says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from optuna_ttp._util.arrays import Floats


@dataclass(frozen=True, eq=False)
class Saturation:
    """The real over the linear change of the outputs in one step, by learning rate and batch size.

    A large step of many weights moves the outputs less far than the linearised network says. The
    ratio is measured along the first step of the optimiser, and every simulated step moves the
    outputs by the step of the linearised model times the ratio.
    """

    rates: Floats
    """Learning rates, ascending, shape ``(R,)``: those of Adam, and effective ones of SGD (over
    one minus the momentum)."""
    ratios: Floats
    """The ratio at these, positive, of shape ``(R,)`` or, by batch size, ``(S, R)``. Its logarithm
    is linear in the logarithms of both in between, and it stays constant beyond the ends."""
    batch_sizes: Floats | None = None
    """Batch sizes, ascending, shape ``(S,)``; None if the ratio does not depend on them."""

    def __post_init__(self) -> None:
        n_sizes = 1 if self.batch_sizes is None else len(self.batch_sizes)
        expected = (n_sizes, len(self.rates))
        if self._table.shape != expected:
            raise ValueError(f"ratios must have shape {expected} but got {self.ratios.shape}.")
        if not (np.isfinite(self.ratios).all() and (self.ratios > 0.0).all()):
            raise ValueError("ratios must be positive and finite.")
        for name in ("rates", "batch_sizes"):
            values = getattr(self, name)
            if values is not None and not (
                len(values) and (values > 0.0).all() and (np.diff(values) > 0.0).all()
            ):
                raise ValueError(f"{name} must be positive and ascending but got {values}.")

    def at(self, rate: Floats, batch_size: ArrayLike) -> Floats:
        """Return the ratios at learning rates and batch sizes that are broadcast together."""
        rate, of_batch = np.broadcast_arrays(rate, np.asarray(batch_size, dtype=np.float64))
        with np.errstate(divide="ignore"):
            at, logs = np.log(rate), np.log(self._table)
        by_size = np.stack([np.interp(at, np.log(self.rates), row) for row in logs])
        if self.batch_sizes is None:
            return np.asarray(np.exp(by_size[0]))
        knots = np.log(self.batch_sizes)
        place = np.interp(np.log(of_batch), knots, np.arange(len(knots)))
        low = np.floor(place).astype(np.int64)
        high = np.minimum(low + 1, len(knots) - 1)
        first, then = (np.take_along_axis(by_size, k[None], axis=0)[0] for k in (low, high))
        return np.asarray(np.exp(first + (place - low) * (then - first)))

    @property
    def _table(self) -> Floats:
        """The ratios by batch size and learning rate, ``(S, R)``."""
        return np.atleast_2d(self.ratios)
