"""What one trial may take."""

from __future__ import annotations

from dataclasses import dataclass
import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from optuna_ttp._util.checks import check_number


if TYPE_CHECKING:
    from optuna_ttp.prediction import SearchPredictor


@dataclass(frozen=True)
class TrialBudget:
    """What one trial may take; the tightest of its limits counts.

    Attributes:
        max_steps:
            Optimiser steps.
        max_epochs:
            Passes over the data.
        max_seconds:
            Seconds of training.

    Raises:
        ValueError:
            If a limit is not positive.
    """

    max_steps: float | None = None
    max_epochs: float | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None:
                continue
            check_number(name, value)
            if not value > 0:
                raise ValueError(f"{name} must be positive but got {value}.")

    def check(self, predictor: SearchPredictor) -> None:
        """Refuse seconds where nobody knows how long a step takes.

        Args:
            predictor:
                Knows it, or not.

        Raises:
            ValueError:
                If it does not, and there is a limit in seconds.
        """
        if self.max_seconds is not None and predictor.throughput is None:
            raise ValueError(
                "max_seconds needs to know the time of a step, but the spectrum was computed with "
                "measure_speed=False. Give max_steps or max_epochs instead."
            )

    def steps(
        self, predictor: SearchPredictor, batch_size: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Return the limit in optimiser steps.

        Args:
            predictor:
                Knows the number of samples and the time of a step.
            batch_size:
                Any shape.

        Returns:
            The same shape; infinite where there is no limit.
        """
        size = np.asarray(batch_size, dtype=np.float64)
        limit = np.full(size.shape, math.inf if self.max_steps is None else float(self.max_steps))
        if self.max_epochs is not None:
            per_epoch = np.ceil(predictor.n_samples / size)
            limit = np.minimum(limit, self.max_epochs * per_epoch)
        if self.max_seconds is not None:
            limit = np.minimum(limit, self.max_seconds / predictor.seconds_per_step(size))
        return limit
