"""Hyperparameters of many configurations, checked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from optuna_ttp._util.arrays import Booleans
from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers


@dataclass(frozen=True, eq=False)
class Configurations:
    """Checked hyperparameters and horizons, in steps, of K configurations, arrays ``(K,)``.

    ``shape`` is the common shape of the arrays that the user gave; predictions have it, too.
    """

    learning_rate: Floats
    batch_size: Integers
    momentum: Floats
    max_steps: Integers
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
        """Return the configurations of arguments that are broadcast to one common shape.

        Batch sizes are at most ``n_samples``. ValueError if a value is out of its range, the
        shapes do not go together or there is no configuration; TypeError if a value is no number.
        """
        rates, batch_sizes, momenta, horizons = _broadcast(
            learning_rate=learning_rate,
            batch_size=batch_size,
            momentum=momentum,
            max_steps=max_steps,
        )
        if rates.size == 0:
            raise ValueError("At least one configuration must be given but got none.")
        _check_all(
            rates, (rates > 0) & np.isfinite(rates), "learning_rate must be positive and finite"
        )
        _check_all(
            batch_sizes,
            (batch_sizes >= 1)
            & (batch_sizes <= n_samples)
            & (batch_sizes == np.floor(batch_sizes)),
            f"batch_size must be a whole number from 1 to the number of samples, {n_samples},",
        )
        _check_all(momenta, (momenta >= 0) & (momenta < 1), "momentum must be in [0, 1)")
        _check_all(
            horizons,
            (horizons >= 1) & (horizons <= 2**53) & (horizons == np.floor(horizons)),
            "max_steps must be a positive integer",
        )
        return cls(
            rates.ravel(),
            batch_sizes.astype(np.int64).ravel(),
            momenta.ravel(),
            horizons.astype(np.int64).ravel(),
            rates.shape,
        )

    def rows(self, chosen: Integers) -> Configurations:
        """Return the configurations at the given indices ``(n,)``; their shape is ``(n,)``."""
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
    def lag(self) -> Floats:
        """Steps by which momentum delays a gradient: ``m / (1 - m)``, shape ``(K,)``."""
        return self.momentum / (1.0 - self.momentum)


def _broadcast(**arguments: ArrayLike) -> tuple[Floats, ...]:
    """Return the arguments as float arrays of one common shape; ValueError if there is none."""
    arrays = {name: _numbers(name, value) for name, value in arguments.items()}
    try:
        return np.broadcast_arrays(*arrays.values())
    except ValueError as error:
        shapes = ", ".join(f"{name} {a.shape}" for name, a in arrays.items() if a.ndim)
        raise ValueError(
            f"{', '.join(arrays)} must have shapes that go together, one value per "
            f"configuration, but got {shapes}."
        ) from error


def _numbers(name: str, value: ArrayLike) -> Floats:
    """Return a value as a float array; raise TypeError if it does not hold numbers."""
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "bUS":
            return array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        # The error of a tensor that requires gradients says how to convert it.
        raise TypeError(f"{name} must be numbers but got {value!r}: {error}") from error
    raise TypeError(f"{name} must be numbers but got {value!r}.")


def _check_all(values: Floats, good: Booleans, message: str) -> None:
    """Raise ValueError with the message and the first value whose ``good`` is false."""
    if not good.all():
        raise ValueError(f"{message} but got {values[~good].flat[0]}.")
