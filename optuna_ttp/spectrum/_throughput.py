"""Seconds per training step by batch size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray


@dataclass(frozen=True)
class ThroughputRules:
    """The settings of the learning of seconds per step from trials.

    Attributes:
        prior_sd:
            Prior standard deviations of ``a`` and ``b`` in :func:`learned_throughput`. Chosen
            without a measurement.
        trial_sd:
            Standard deviation of the logarithm of a trial's seconds per step. Chosen without
            a measurement.
        n_reweightings:
            Number of iterations of reweighted least squares: a choice of cost.
    """

    prior_sd: tuple[float, float] = (2.0, 0.3)
    trial_sd: float = 0.1
    n_reweightings: int = 10


RULES = ThroughputRules()


@dataclass(frozen=True, eq=False)
class Throughput:
    """Measured seconds per step at a few batch sizes, interpolated between them.

    Example:
        >>> throughput = Throughput(np.array([8, 32]), np.array([0.01, 0.02]), device="cpu")
        >>> throughput.seconds_per_step(20)
        array(0.015)

    Attributes:
        batch_sizes:
            Batch sizes, shape ``(k,)``, ascending.
        seconds:
            Seconds per step at each batch size, shape ``(k,)``, not descending.
        device:
            The name of the device on which the steps were timed.
        log_sd:
            Standard deviation of the logarithm of a trial's seconds per step around these, if it
            was learned from trials. Zero, the default, if it is unknown.
    """

    batch_sizes: NDArray[np.int64]
    seconds: NDArray[np.float64]
    device: str
    log_sd: float = 0.0

    def __post_init__(self) -> None:
        if len(self.batch_sizes) == 0 or len(self.batch_sizes) != len(self.seconds):
            raise ValueError(
                "batch_sizes and seconds must have the same length of at least one but got "
                f"{len(self.batch_sizes)} and {len(self.seconds)}."
            )
        if self.batch_sizes[0] < 1:
            raise ValueError(f"batch_sizes must be positive but got {self.batch_sizes}.")
        if np.any(np.diff(self.batch_sizes) <= 0) or np.any(np.diff(self.seconds) < 0):
            raise ValueError(
                "batch_sizes must ascend and seconds must not descend but got "
                f"{self.batch_sizes} and {self.seconds}."
            )
        if not (np.isfinite(self.seconds).all() and self.seconds[0] > 0):
            raise ValueError(f"seconds must be finite and positive but got {self.seconds}.")

    def seconds_per_step(self, batch_size: ArrayLike) -> NDArray[np.float64]:
        """Interpolate the seconds per step linearly between the measured batch sizes.

        Args:
            batch_size:
                One or more batch sizes, in any shape.

        Returns:
            Seconds per step, of the same shape. Above the largest measured batch size the last
            slope continues, below the smallest one its seconds apply.
        """
        batch_size = np.asarray(batch_size, dtype=np.float64)
        inside = np.interp(batch_size, self.batch_sizes, self.seconds)
        if len(self.seconds) == 1:
            return np.asarray(inside)
        slope = (self.seconds[-1] - self.seconds[-2]) / (
            self.batch_sizes[-1] - self.batch_sizes[-2]
        )
        return np.asarray(inside + slope * np.maximum(0, batch_size - self.batch_sizes[-1]))


def learned_throughput(
    prior: Throughput | None, batch_sizes: NDArray[np.int64], seconds: NDArray[np.float64]
) -> Throughput | None:
    """Correct measured seconds per step by the seconds per step of trials.

    ``log s = log s_0(B) + a + b log(B / B_m) + e`` with the prior time ``s_0``, a logarithmic
    factor ``a`` of the trials' machine, a slope ``b`` in the batch size ``B`` about the trials'
    geometric mean ``B_m``, and Student's t errors ``e``, so that a few trials on a busy machine
    weigh little. ``a`` and ``b`` have normal priors; the fit is by reweighted least squares.
    Without a prior throughput, half of a step's time at ``B_m`` is in proportion to ``B``.

    Takes batch size and median seconds per step of each of n trials, shape ``(n,)`` both; returns
    the throughput at all batch sizes that occur, or the prior if there are no trials.
    """
    if not len(seconds):
        return prior
    trial_sizes = np.asarray(batch_sizes, dtype=np.float64)
    middle = float(np.exp(np.log(trial_sizes).mean()))
    if prior is None:
        known = np.unique(trial_sizes).astype(np.int64)
        expected = np.log(0.5 + 0.5 * known / middle) + float(np.median(np.log(seconds)))
        prior = Throughput(known, np.exp(expected), "unknown")
    x = np.stack([np.ones(len(trial_sizes)), np.log(trial_sizes / middle)], axis=1)
    y = np.log(seconds) - np.log(prior.seconds_per_step(trial_sizes))
    precision = np.diag(1.0 / np.square(RULES.prior_sd))
    weights = np.ones(len(y))
    for _ in range(RULES.n_reweightings):
        scaled = x.T * (weights / RULES.trial_sd**2)
        effect = np.linalg.solve(precision + scaled @ x, scaled @ y)
        away = y - x @ effect
        weights = 4.0 / (3.0 + (away / RULES.trial_sd) ** 2)
    every = np.union1d(prior.batch_sizes, np.unique(trial_sizes).astype(np.int64))
    logs = np.log(prior.seconds_per_step(every)) + effect[0]
    logs = logs + effect[1] * np.log(np.clip(every, trial_sizes.min(), trial_sizes.max()) / middle)
    spread = float(np.sqrt((weights * away**2).sum() / weights.sum()))
    # A larger batch cannot be faster.
    return Throughput(every, np.maximum.accumulate(np.exp(logs)), prior.device, spread)
