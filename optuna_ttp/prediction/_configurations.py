"""Hyperparameters of many configurations, checked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Configurations:
    """K configurations, and the shape that they were given in.

    Attributes:
        learning_rate:
            Shape ``(K,)``.
        batch_size:
            Shape ``(K,)``.
        momentum:
            Shape ``(K,)``.
        max_steps:
            The horizon of each, shape ``(K,)``.
        shape:
            Of the arrays that answers are given in.
    """

    learning_rate: NDArray[np.float64]
    batch_size: NDArray[np.int64]
    momentum: NDArray[np.float64]
    max_steps: NDArray[np.int64]
    shape: tuple[int, ...]

    @classmethod
    def of(
        cls,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike,
        max_steps: ArrayLike,
        n_samples: int,
    ) -> Configurations:
        """Broadcast and check.

        Args:
            learning_rate:
                Positive.
            batch_size:
                Whole numbers from 1 to N.
            momentum:
                In [0, 1).
            max_steps:
                Positive.
            n_samples:
                N.

        Returns:
            The configurations.

        Raises:
            ValueError:
                If one is out of its range, or there is none.
        """
        rate, size, mass, horizon = _broadcast(
            learning_rate=learning_rate,
            batch_size=batch_size,
            momentum=momentum,
            max_steps=max_steps,
        )
        if rate.size == 0:
            raise ValueError("At least one configuration must be given but got none.")
        _refuse(rate, (rate > 0) & np.isfinite(rate), "learning_rate must be positive and finite")
        _refuse(
            size,
            (size >= 1) & (size <= n_samples) & (size == np.floor(size)),
            f"batch_size must be a whole number from 1 to the number of samples, {n_samples},",
        )
        _refuse(mass, (mass >= 0) & (mass < 1), "momentum must be in [0, 1)")
        _refuse(
            horizon,
            (horizon >= 1) & (horizon <= 2**53) & (horizon == np.floor(horizon)),
            "max_steps must be a positive integer",
        )
        return cls(
            rate.ravel(),
            size.astype(np.int64).ravel(),
            mass.ravel(),
            horizon.astype(np.int64).ravel(),
            rate.shape,
        )

    def rows(self, chosen: NDArray[np.int64]) -> Configurations:
        """Return some of them.

        Args:
            chosen:
                Their places.

        Returns:
            The configurations, in one dimension.
        """
        return Configurations(
            self.learning_rate[chosen],
            self.batch_size[chosen],
            self.momentum[chosen],
            self.max_steps[chosen],
            chosen.shape,
        )

    def __len__(self) -> int:
        return len(self.learning_rate)

    @property
    def lag(self) -> NDArray[np.float64]:
        """Steps by which momentum lags behind, shape ``(K,)``."""
        return self.momentum / (1.0 - self.momentum)


def _broadcast(**arguments: ArrayLike) -> tuple[NDArray[np.float64], ...]:
    arrays = {name: _numbers(name, value) for name, value in arguments.items()}
    try:
        return np.broadcast_arrays(*arrays.values())
    except ValueError as error:
        shapes = ", ".join(f"{name} {a.shape}" for name, a in arrays.items() if a.ndim)
        raise ValueError(
            f"{', '.join(arrays)} must have shapes that go together, one value a configuration, "
            f"but got {shapes}."
        ) from error


def _numbers(name: str, value: ArrayLike) -> NDArray[np.float64]:
    try:
        found = np.asarray(value)
        if found.dtype.kind not in "bUS":
            return found.astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        # A tensor that wants gradients says what to do itself.
        raise TypeError(f"{name} must be numbers but got {value!r}: {error}") from error
    raise TypeError(f"{name} must be numbers but got {value!r}.")


def _refuse(values: NDArray[np.float64], good: NDArray[np.bool_], message: str) -> None:
    if not good.all():
        raise ValueError(f"{message} but got {values[~good].flat[0]}.")
