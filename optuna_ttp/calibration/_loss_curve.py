"""A trial's smoothed training-loss curve, and its first passage times of loss levels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from optuna_ttp._util.arrays import Booleans
from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers


# Sums of losses above this would overflow; such a loss counts as infinite.
_BLOWN_UP = 1e300


@dataclass(frozen=True)
class LossCurveRules:
    """The smoothing of mini-batch losses, ablated in ``benchmarks/search/results/ablation.md``."""

    spacing: float = 1.05
    """Ratio of successive recorded steps after the first ones, which are all recorded."""
    window: float = 0.1
    """Share of the step that the smoothing window covers on each side: wide enough for mini-batch
    noise, narrow on the logarithmic scale on which training times differ."""
    min_half: int = 2
    """Least number of losses in the window on each side."""
    slope_factor: float = 1.25
    """The slope of a curve at a step is measured between the step over and times this factor."""
    sure_errors: float = 4.0
    """Standard errors by which a loss above an earlier loss is a spike, not noise: the spike does
    not undo that a level was passed."""
    probable_errors: float = 2.0
    """Standard errors by which it is probably a spike, so that later times are less certain."""
    excess_noise: float = 4.0
    """Errors are multiplied by one plus this times the noise, because the slope is noise too if
    the noise is as large as the fall. Measured: with noise of half the loss, first passage times
    of shallow levels otherwise have larger errors than estimated; on the recorded runs predictions
    do not depend on it."""
    most_error: float = 1.5
    """Largest standard error of a logarithmic time; such a time has hardly any weight. Without it
    no recorded search or error changes. It stays because a flat curve would give errors of up to
    a billion, which covariances are inverted with, and stored curves are checked against it."""
    unknown_error: float = 0.5
    """Standard error of the loss's logarithm if too few losses are known to estimate it. Half and
    twice of it change no recorded search, and no error or interval of benchmarks/accuracy."""
    n_neighbours: int = 3
    """Number of windows to each side whose variance is averaged: five losses give a poor one."""


RULES = LossCurveRules()


@dataclass(frozen=True, eq=False)
class LossCurve:
    """A smoothed training-loss curve with its standard errors."""

    steps: Floats
    """Optimiser steps done before each loss, ascending, shape ``(P,)``."""
    losses: Floats
    """Smoothed training loss at these steps, positive, shape ``(P,)``."""
    errors: Floats
    """Standard error of the logarithm of the smoothed loss, shape ``(P,)``."""
    n_steps: int
    """Optimiser steps of the trial so far."""
    diverged: bool = False
    """True if the loss became infinite or NaN, and stayed so."""
    n_gaps: int = 0
    """The number of infinite or NaN losses that are left out, if training went on after them."""
    rules: LossCurveRules = RULES

    @classmethod
    def of(
        cls, losses: ArrayLike, steps: ArrayLike | None = None, rules: LossCurveRules = RULES
    ) -> LossCurve:
        """Return the smoothed curve of mini-batch losses at steps, both of shape ``(T,)``.

        By default the steps are 0, 1, 2, .... Infinite and NaN losses are left out. If the last
        losses are, training has diverged, unless only the last one is and the loss had fallen.
        The window covers 10 % of the step on each side, at least two losses. An exponential is
        fitted to it, because a plain mean of a falling curve is delayed: most of all at the end
        of the curve, so that a trial that stops at its target would never seem to reach it. The
        scatter of the losses within the window gives the standard error. The curve has every step
        at first and then steps 5 % apart. A :class:`ValueError` is raised if there are no losses,
        a loss is negative, or the steps do not ascend.
        """
        values = np.asarray(losses, dtype=np.float64)
        places = np.asarray(range(len(values)) if steps is None else steps, dtype=np.float64)
        _check(values, places)
        n_steps = int(places[-1]) + 1
        good = np.abs(values) < _BLOWN_UP
        # A single bad loss at the end of a curve that has fallen may be one batch's overflow.
        by_chance = len(good) > 2 and good[-2] and values[good][-1] < values[good][0]
        diverged = not good[-1] and not by_chance
        # NaN weights stay NaN. If the loss is finite again, a single batch caused the gap.
        n_gaps = int(np.flatnonzero(good)[-1] + 1 - good.sum()) if good.any() else 0
        n_gaps += int(by_chance and not good[-1])
        # In single precision a tiny loss becomes zero, which has no logarithm.
        values, places = np.maximum(values[good], 1e-30), places[good]
        chosen = _recorded(len(values), rules.spacing)
        smoothed, errors = _smoothed(values, places, chosen, rules)
        return cls(places[chosen], smoothed, errors, n_steps, diverged, n_gaps, rules)

    def log_first_passage_times(self, levels: Floats) -> tuple[Floats, Floats]:
        """Return logarithms of the steps at which the loss first fell below L levels, ``(L,)``.

        The curve is made monotone first (isotonic regression of the logarithm of the loss), since
        noise would otherwise make every first passage early. The second array has their standard
        errors: the error of the loss over the slope of the curve, and a third of a step. Both
        arrays are NaN at levels that the loss did not reach. Levels are losses.
        """
        rules = self.rules
        times = np.full(len(levels), np.nan)
        errors = np.full(len(levels), np.nan)
        if len(self.steps) < 2:
            return times, errors
        from scipy.optimize import isotonic_regression

        logs = np.log(self.losses)
        spiked = self._spiked(rules.sure_errors)
        logs = np.where(spiked, self._lowest_before(rules.sure_errors), logs)
        weights = 1.0 / np.maximum(self.errors, 1e-3) ** 2
        falling = isotonic_regression(logs, weights=weights, increasing=False).x
        wanted = np.log(levels)
        inside = (wanted < falling[0]) & (wanted >= falling[-1])
        # A level is reached at the first of equal values.
        first = np.concatenate([[True], np.diff(falling) < 0])
        steps, falling, errors_there = self.steps[first], falling[first], self.errors[first]
        crossing = np.interp(-wanted[inside], -falling, steps)
        crossing = np.maximum(crossing, 0.1)
        ends = steps[0], steps[-1]
        low = np.maximum(crossing / rules.slope_factor, max(ends[0], 0.1))
        high = np.minimum(crossing * rules.slope_factor, ends[1])
        fall = np.interp(low, steps, falling) - np.interp(high, steps, falling)
        slope = fall / np.maximum(np.log(high / low), 1e-9)
        scatter = np.interp(crossing, steps, errors_there)
        noise = scatter * (1.0 + rules.excess_noise * scatter) / np.maximum(slope, 1e-9)
        times[inside] = np.log(crossing)
        lost = np.minimum(np.interp(crossing, self.steps, self._lost()), 0.99 * crossing)
        delay = -np.log1p(-lost / crossing)
        noise = np.hypot(noise, 0.3 / crossing)
        errors[inside] = np.minimum(np.hypot(noise, delay), rules.most_error)
        return times, errors

    @property
    def lost(self) -> float:
        """The number of steps that the loss probably spent in spikes, above an earlier loss."""
        return float(self._lost()[-1]) if len(self.steps) else 0.0

    @property
    def has_risen(self) -> bool:
        """True if the loss at the last step is probably above an earlier loss."""
        return bool(len(self.steps) and self._spiked(self.rules.probable_errors)[-1])

    def _lowest_before(self, margin: float) -> Floats:
        """Return the lowest log loss plus ``margin`` standard errors up to each step, ``(P,)``."""
        return np.minimum.accumulate(np.log(self.losses) + margin * self.errors)

    def _spiked(self, margin: float) -> Booleans:
        """Return a mask ``(P,)``: the loss exceeds an earlier one by ``margin`` errors of both."""
        return np.asarray(np.log(self.losses) - margin * self.errors > self._lowest_before(margin))

    def _lost(self) -> Floats:
        """Return the number of steps that spikes probably took up to each step, ``(P,)``."""
        lost = np.where(
            self._spiked(self.rules.probable_errors), np.diff(self.steps, prepend=0.0), 0.0
        )
        return np.cumsum(lost)


def _check(values: Floats, places: Floats) -> None:
    """Raise ValueError if losses ``values`` and steps ``places`` are no loss curve."""
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
    values: Floats, places: Floats, chosen: Integers, rules: LossCurveRules
) -> tuple[Floats, Floats]:
    """Return smoothed losses at the ``chosen`` indices, and standard errors of their logarithms.

    Both have the shape of ``chosen``; losses ``values`` and steps ``places`` have one shape.
    """
    smoothed, variances, leverages = (np.full(len(chosen), np.nan) for _ in range(3))
    for row, t in enumerate(chosen):
        half = max(rules.min_half, int(t * rules.window))
        window = slice(max(0, t - half), t + half + 1)
        part, x = values[window], places[window] - places[t]
        mean = float(part.mean())
        smoothed[row] = mean
        if len(part) < 3:
            continue
        relative = part / max(mean, 1e-300) - 1.0
        centred = x - x.mean()
        spread = float(centred @ centred)
        slope = float(centred @ relative) / spread
        scatter = relative - slope * centred
        variances[row] = float(scatter @ scatter) / (len(part) - 2)
        # The mean of an exponential over the window is above its value at the step.
        rate = np.clip(slope, -1.0, 1.0)
        smoothed[row] = mean / float(np.exp(rate * x).mean())
        leverages[row] = 1.0 / len(part) + float(x.mean() ** 2) / spread
    errors = np.sqrt(_pooled(variances, rules.n_neighbours) * leverages)
    errors = np.nan_to_num(errors, nan=rules.unknown_error)
    return smoothed, np.minimum(errors, rules.most_error)


def _pooled(variances: Floats, n_neighbours: int) -> Floats:
    """Return the mean variance of each window and its ``n_neighbours`` on both sides.

    NaN, which is a variance that is not known, stays NaN and does not count in the means.
    """
    known = np.isfinite(variances)
    if not known.any():
        return variances
    width = np.ones(2 * n_neighbours + 1)
    total = np.convolve(np.where(known, variances, 0.0), width, mode="same")[: len(variances)]
    count = np.convolve(known.astype(np.float64), width, mode="same")[: len(variances)]
    return np.asarray(np.where(known, total / np.maximum(count, 1.0), np.nan))


def _recorded(n_losses: int, spacing: float) -> Integers:
    """Return indices to record, ascending to the last: each ``spacing`` times the one before."""
    points = [0]
    while points[-1] < n_losses - 1:
        points.append(max(points[-1] + 1, int(points[-1] * spacing)))
    points[-1] = max(0, n_losses - 1)
    return np.unique(points) if n_losses else np.zeros(0, dtype=np.int64)
