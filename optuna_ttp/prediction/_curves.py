"""The curves of a simulation, among configurations that were not simulated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optuna_ttp.dynamics import Trajectories


@dataclass(frozen=True, eq=False)
class Curves:
    """Simulated curves of K configurations.

    Attributes:
        strides:
            Steps that were simulated as one, shape ``(K,)``.
        steps:
            Of the curves, shape ``(K, T)``; NaN after a curve's end.
        values:
            What was simulated at these steps, by name, each ``(K, T)``.
    """

    strides: NDArray[np.int64]
    steps: NDArray[np.float64]
    values: dict[str, NDArray[np.float64]]

    @classmethod
    def none(cls, count: int) -> Curves:
        """Return no curves.

        Args:
            count:
                K.

        Returns:
            Curves without any steps.
        """
        return cls(np.ones(count, dtype=np.int64), np.empty((count, 0)), {})

    @classmethod
    def of(cls, run: Trajectories, count: int, kept: NDArray[np.int64]) -> Curves:
        """Spread a simulation.

        Args:
            run:
                The simulation.
            count:
                K.
            kept:
                Which configurations were simulated. The others have no curves.

        Returns:
            The curves.
        """
        strides = np.ones(count, dtype=np.int64)
        strides[kept] = run.strides
        steps = np.full((count, run.steps.shape[1]), np.nan)
        steps[kept] = run.steps
        values = {}
        for name, one in run.curves.items():
            values[name] = np.full(steps.shape, np.nan)
            values[name][kept] = one
        return cls(strides, steps, values)
