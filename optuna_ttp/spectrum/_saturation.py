"""How far the outputs really move in one large step, over what linearisation says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Saturation:
    """Changes of the outputs in the first step of an optimiser, real over linear.

    A first step of SGD goes along the gradient of a mini-batch's loss, one of Adam along its sign.
    Each of S directions of SGD is followed by P learning rates, each of A directions of Adam by Q.
    ``optuna_ttp.ntk.measure_saturation`` measures it, without a training step. With the real
    change of the outputs ``d`` and the linear one ``l``, the ratio is ``<d, l> / <l, l>`` and the
    cosine ``<d, l> / (|d| |l|)``; both are one in a linear network.

    Attributes:
        sgd_batch_sizes:
            The number of samples whose gradient a direction is, shape ``(S,)``.
        sgd_rates:
            Learning rates, positive and ascending, shape ``(P,)``.
        sgd_ratios:
            The real over the linear change, shape ``(S, P)``.
        sgd_cosines:
            The cosine between both, shape ``(S, P)``.
        adam_batch_sizes:
            The same for Adam, shape ``(A,)``.
        adam_rates:
            Shape ``(Q,)``.
        adam_ratios:
            Shape ``(A, Q)``.
        adam_cosines:
            Shape ``(A, Q)``.
        reason:
            Why SGD or Adam has no direction, a sentence; empty if both have one.
    """

    sgd_batch_sizes: NDArray[np.int64]
    sgd_rates: NDArray[np.float64]
    sgd_ratios: NDArray[np.float64]
    sgd_cosines: NDArray[np.float64]
    adam_batch_sizes: NDArray[np.int64]
    adam_rates: NDArray[np.float64]
    adam_ratios: NDArray[np.float64]
    adam_cosines: NDArray[np.float64]
    reason: str = ""

    def __post_init__(self) -> None:
        for kind in ("sgd", "adam"):
            batch_sizes, rates, *tables = (
                getattr(self, f"{kind}_{name}")
                for name in ("batch_sizes", "rates", "ratios", "cosines")
            )
            if batch_sizes.ndim != 1 or (batch_sizes < 1).any():
                raise ValueError(f"{kind}_batch_sizes must be at least one but got {batch_sizes}.")
            if rates.ndim != 1 or not (rates > 0.0).all() or (np.diff(rates) <= 0.0).any():
                raise ValueError(f"{kind}_rates must be positive and ascending but got {rates}.")
            shape = (len(batch_sizes), len(rates))
            for name, table in zip(("ratios", "cosines"), tables, strict=True):
                if table.shape != shape:
                    raise ValueError(
                        f"{kind}_{name} must have shape {shape} but got {table.shape}."
                    )
                if not np.isfinite(table).all():
                    raise ValueError(f"{kind}_{name} must be finite but got NaN or infinity.")
