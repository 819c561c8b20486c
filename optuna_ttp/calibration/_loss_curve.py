"""A trial's training loss: from noisy mini-batch losses to the times of passing a depth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray


# Recorded steps are so far apart, relatively.
_SPACING = 1.05
# Smoothing covers this share of the step on each side, and at least so many points.
_WINDOW = 0.1
_MIN_HALF = 2
# The slope of a curve is taken over this factor of the step to each side.
_SLOPE_FACTOR = 1.25
# Standard errors by which a loss was lower before, surely and probably. A spike that is no noise
# does not undo that a level was passed; what is probably one makes later times less sure.
_SURELY, _PROBABLY = 4.0, 2.0
# A time whose logarithm is less sure than this tells nothing.
_MOST_ERROR = 1.5
# Standard error where there are too few points to tell, and windows that are pooled to each side.
_UNKNOWN_ERROR = 0.5
_NEIGHBOURS = 3
# A loss so large means that sums of losses overflow; the curve ends there.
_BLOWN_UP = 1e300


@dataclass(frozen=True, eq=False)
class LossCurve:
    """A smoothed training-loss curve, with how sure it is.

    Attributes:
        steps:
            Optimiser steps done, ascending, shape ``(P,)``.
        losses:
            Smoothed training loss at these steps, positive, shape ``(P,)``.
        errors:
            Standard error of the logarithm of the smoothed loss, shape ``(P,)``.
        n_steps:
            Optimiser steps of the trial so far.
        diverged:
            Whether the loss became infinite or NaN, and stayed it.
        n_gaps:
            How many losses were infinite or NaN while training went on, and are left out.
    """

    steps: NDArray[np.float64]
    losses: NDArray[np.float64]
    errors: NDArray[np.float64]
    n_steps: int
    diverged: bool = False
    n_gaps: int = 0

    @classmethod
    def of(cls, losses: ArrayLike, steps: ArrayLike | None = None) -> LossCurve:
        """Smooth the losses of mini-batches.

        Losses that are infinite or NaN are left out. Where they are the last ones, but for a
        single one after a loss below the first, the curve is that of a training that diverged.
        The window covers 10 % of the step on each side, at least two points: wide enough for
        mini-batch noise, narrow on the logarithmic scale on which training times differ. An
        exponential is laid through it, because a plain mean of a falling curve is late: most of
        all at the end of the curve, where a trial that stops at its target would never seem to
        reach it. The scatter of the losses within the window tells the standard error.

        Example:
            >>> curve = LossCurve.of([2.0, 1.6, 1.3, 1.1, 0.9, 0.8])
            >>> curve.n_steps
            6

        Args:
            losses:
                Loss of a mini-batch before each step that was recorded, shape ``(T,)``.
            steps:
                Steps done before each, ascending, shape ``(T,)``. 0, 1, 2, ... by default.

        Returns:
            The curve at every step at first and then at steps 5 % apart.

        Raises:
            ValueError:
                If there are no losses, or they are not positive, or the steps do not ascend.
        """
        values = np.asarray(losses, dtype=np.float64)
        places = np.asarray(range(len(values)) if steps is None else steps, dtype=np.float64)
        _check(values, places)
        n_steps = int(places[-1]) + 1
        good = np.abs(values) < _BLOWN_UP
        # A single one at the end of a curve that has come down may be a batch that overflowed.
        by_chance = len(good) > 2 and good[-2] and values[good][-1] < values[good][0]
        diverged = not good[-1] and not by_chance
        # Weights that are NaN stay it. Where the loss is a number again, a batch was to blame.
        n_gaps = int(np.flatnonzero(good)[-1] + 1 - good.sum()) if good.any() else 0
        n_gaps += int(by_chance and not good[-1])
        # A loss of exactly zero is all that single precision can say about a tiny one.
        values, places = np.maximum(values[good], 1e-30), places[good]
        chosen = _recorded(len(values))
        smoothed, errors = _smoothed(values, places, chosen)
        return cls(places[chosen], smoothed, errors, n_steps, diverged, n_gaps)

    def log_first_passage_times(
        self, levels: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return when the loss first fell below levels, as logarithms of steps.

        The curve is made monotone first (isotonic regression of the logarithm of the loss): noise
        would make every passage early otherwise.

        Args:
            levels:
                Losses, shape ``(L,)``.

        Returns:
            Logarithm of the step, and its standard error: that of the loss over the slope of the
            curve, and half a step. Both of shape ``(L,)``; NaN where the loss did not get there.
        """
        times = np.full(len(levels), np.nan)
        errors = np.full(len(levels), np.nan)
        if len(self.steps) < 2:
            return times, errors
        from scipy.optimize import isotonic_regression

        logs = np.where(self._spiked(_SURELY), self._surely(_SURELY), np.log(self.losses))
        weights = 1.0 / np.maximum(self.errors, 1e-3) ** 2
        falling = isotonic_regression(logs, weights=weights, increasing=False).x
        wanted = np.log(levels)
        inside = (wanted < falling[0]) & (wanted >= falling[-1])
        # The first of equal values is where the level is reached.
        first = np.concatenate([[True], np.diff(falling) < 0])
        steps, falling, own = self.steps[first], falling[first], self.errors[first]
        crossing = np.interp(-wanted[inside], -falling, steps)
        crossing = np.maximum(crossing, 0.1)
        ends = steps[0], steps[-1]
        low = np.maximum(crossing / _SLOPE_FACTOR, max(ends[0], 0.1))
        high = np.minimum(crossing * _SLOPE_FACTOR, ends[1])
        fall = np.interp(low, steps, falling) - np.interp(high, steps, falling)
        slope = fall / np.maximum(np.log(high / low), 1e-9)
        # More than in proportion: where noise is as large as the fall, the slope is noise too.
        # Measured, not derived: with noise of half the loss, shallow passages are otherwise
        # further off than their errors say; on the recorded runs predictions do not depend on it.
        own = np.interp(crossing, steps, own)
        noise = own * (1.0 + 4.0 * own) / np.maximum(slope, 1e-9)
        times[inside] = np.log(crossing)
        lost = np.minimum(np.interp(crossing, self.steps, self._lost()), 0.99 * crossing)
        delay = -np.log1p(-lost / crossing)
        noise = np.hypot(noise, 0.3 / crossing)
        errors[inside] = np.minimum(np.hypot(noise, delay), _MOST_ERROR)
        return times, errors

    @property
    def lost(self) -> float:
        """Steps that the loss probably spent above where it had been before: in spikes."""
        return float(self._lost()[-1]) if len(self.steps) else 0.0

    @property
    def has_risen(self) -> bool:
        """Whether the loss is probably above where it had been before."""
        return bool(len(self.steps) and self._spiked(_PROBABLY)[-1])

    def _surely(self, margin: float) -> NDArray[np.float64]:
        """What the logarithm of the loss was at or below by each step, ``(P,)``."""
        return np.minimum.accumulate(np.log(self.losses) + margin * self.errors)

    def _spiked(self, margin: float) -> NDArray[np.bool_]:
        """Where the loss was above what it had been before, by so many errors each, ``(P,)``."""
        return np.asarray(np.log(self.losses) - margin * self.errors > self._surely(margin))

    def _lost(self) -> NDArray[np.float64]:
        """Steps that were probably lost in spikes by each step, ``(P,)``."""
        lost = np.where(self._spiked(_PROBABLY), np.diff(self.steps, prepend=0.0), 0.0)
        return np.cumsum(lost)


def _check(values: NDArray[np.float64], places: NDArray[np.float64]) -> None:
    if values.ndim != 1 or values.shape != places.shape:
        raise ValueError(
            "losses and steps must be lists of the same length but got shapes "
            f"{values.shape} and {places.shape}."
        )
    if not len(values):
        raise ValueError("A loss curve must have at least one loss but got none.")
    if (values < 0.0).any():
        raise ValueError(f"A loss must not be negative but got {values[values < 0.0][0]}.")
    if not (np.isfinite(places).all() and places[0] >= 0 and (np.diff(places) > 0).all()):
        raise ValueError("The steps of a loss curve must ascend from 0 or more but do not.")


def _smoothed(
    values: NDArray[np.float64], places: NDArray[np.float64], chosen: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    smoothed, variances, leverages = (np.full(len(chosen), np.nan) for _ in range(3))
    for row, t in enumerate(chosen):
        half = max(_MIN_HALF, int(t * _WINDOW))
        window = slice(max(0, t - half), t + half + 1)
        own, x = values[window], places[window] - places[t]
        mean = float(own.mean())
        smoothed[row] = mean
        if len(own) < 3:
            continue
        relative = own / max(mean, 1e-300) - 1.0
        centred = x - x.mean()
        spread = float(centred @ centred)
        slope = float(centred @ relative) / spread
        scatter = relative - slope * centred
        variances[row] = float(scatter @ scatter) / (len(own) - 2)
        # An exponential through the window: its mean is above its middle, and far above its end.
        rate = np.clip(slope, -1.0, 1.0)
        smoothed[row] = mean / float(np.exp(rate * x).mean())
        leverages[row] = 1.0 / len(own) + float(x.mean() ** 2) / spread
    errors = np.sqrt(_pooled(variances) * leverages)
    return smoothed, np.minimum(np.nan_to_num(errors, nan=_UNKNOWN_ERROR), _MOST_ERROR)


def _pooled(variances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over neighbouring windows: five points tell little about their own scatter."""
    known = np.isfinite(variances)
    if not known.any():
        return variances
    width = np.ones(2 * _NEIGHBOURS + 1)
    total = np.convolve(np.where(known, variances, 0.0), width, mode="same")[: len(variances)]
    count = np.convolve(known.astype(np.float64), width, mode="same")[: len(variances)]
    return np.asarray(np.where(known, total / np.maximum(count, 1.0), np.nan))


def _recorded(n_losses: int) -> NDArray[np.int64]:
    """Every loss at first, then 5 % apart, and the last one."""
    points = [0]
    while points[-1] < n_losses - 1:
        points.append(max(points[-1] + 1, int(points[-1] * _SPACING)))
    points[-1] = max(0, n_losses - 1)
    return np.unique(points) if n_losses else np.zeros(0, dtype=np.int64)
