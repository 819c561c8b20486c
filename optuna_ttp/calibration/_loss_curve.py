"""A trial's training loss: from noisy mini-batch losses to first passage times."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from optuna_ttp._util.arrays import Booleans
from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers


# A loss so large means that sums of losses overflow; the curve ends there.
_BLOWN_UP = 1e300


@dataclass(frozen=True)
class LossCurveRules:
    """How mini-batch losses are smoothed. Not ablated where no reason is given."""

    spacing: float = 1.05
    """The next recorded step over the last one."""
    window: float = 0.1
    """Share of the step that the smoothing window covers on each side: wide enough for mini-batch
    noise, narrow on the logarithmic scale on which training times differ."""
    min_half: int = 2
    """Least number of points of the window on each side."""
    slope_factor: float = 1.25
    """The slope of a curve is taken over this factor of the step to each side."""
    sure_errors: float = 4.0
    """Standard errors by which a loss was surely lower before: a spike that is no noise does not
    undo that a level was passed."""
    probable_errors: float = 2.0
    """Standard errors by which it probably was, so that later times are less sure."""
    excess_noise: float = 4.0
    """Errors grow by this many times the noise, because where noise is as large as the fall, the
    slope is noise too. Measured: with noise of half the loss, first passage times of shallow
    levels are otherwise further off than their errors say; on the recorded runs predictions do
    not depend on it."""
    most_error: float = 1.5
    """Largest error of a logarithmic time: a less sure one tells nothing."""
    unknown_error: float = 0.5
    """Standard error of the loss where there are too few points to tell."""
    n_neighbours: int = 3
    """Windows to each side whose scatter is pooled: five points tell little about their own."""


RULES = LossCurveRules()


@dataclass(frozen=True, eq=False)
class LossCurve:
    """A smoothed training-loss curve, with how sure it is."""

    steps: Floats
    """Optimiser steps done, ascending, shape ``(P,)``."""
    losses: Floats
    """Smoothed training loss at these steps, positive, shape ``(P,)``."""
    errors: Floats
    """Standard error of the logarithm of the smoothed loss, shape ``(P,)``."""
    n_steps: int
    """Optimiser steps of the trial so far."""
    diverged: bool = False
    """Whether the loss became infinite or NaN, and stayed so."""
    n_gaps: int = 0
    """How many losses were infinite or NaN while training went on, and are left out."""
    rules: LossCurveRules = RULES

    @classmethod
    def of(
        cls, losses: ArrayLike, steps: ArrayLike | None = None, rules: LossCurveRules = RULES
    ) -> LossCurve:
        """Smooth the losses of mini-batches before the steps, by default 0, 1, 2, ..., ``(T,)``.

        Losses that are infinite or NaN are left out. Where they are the last ones, but for a
        single one after a loss below the first, the curve is that of a training that diverged.
        The window covers 10 % of the step on each side, at least two points. An exponential is
        laid through it, because a plain mean of a falling curve is late: most of all at the end of
        the curve, where a trial that stops at its target would never seem to reach it. The scatter
        of the losses within the window gives the standard error. The curve has every step at first
        and then steps 5 % apart. A :class:`ValueError` is raised where there are no losses, they
        are negative, or the steps do not ascend.
        """
        values = np.asarray(losses, dtype=np.float64)
        places = np.asarray(range(len(values)) if steps is None else steps, dtype=np.float64)
        _check(values, places)
        n_steps = int(places[-1]) + 1
        good = np.abs(values) < _BLOWN_UP
        # A single one at the end of a curve that has come down may be a batch that overflowed.
        by_chance = len(good) > 2 and good[-2] and values[good][-1] < values[good][0]
        diverged = not good[-1] and not by_chance
        # Weights that are NaN stay NaN. Where the loss is a number again, a batch caused the gap.
        n_gaps = int(np.flatnonzero(good)[-1] + 1 - good.sum()) if good.any() else 0
        n_gaps += int(by_chance and not good[-1])
        # Single precision rounds a tiny loss to zero.
        values, places = np.maximum(values[good], 1e-30), places[good]
        chosen = _recorded(len(values), rules.spacing)
        smoothed, errors = _smoothed(values, places, chosen, rules)
        return cls(places[chosen], smoothed, errors, n_steps, diverged, n_gaps, rules)

    def log_first_passage_times(self, levels: Floats) -> tuple[Floats, Floats]:
        """Return logarithms of the steps at which the loss first fell below L levels, ``(L,)``.

        The curve is made monotone first (isotonic regression of the logarithm of the loss): noise
        would make every first passage early otherwise. Also returns their standard errors: that of
        the loss over the slope of the curve, and a third of a step. Both are NaN where the loss
        did not fall that far.
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
        # The first of equal values is where the level is reached.
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
        """Steps that the loss probably spent above where it had been before: in spikes."""
        return float(self._lost()[-1]) if len(self.steps) else 0.0

    @property
    def has_risen(self) -> bool:
        """Whether the loss is probably above where it had been before."""
        return bool(len(self.steps) and self._spiked(self.rules.probable_errors)[-1])

    def _lowest_before(self, margin: float) -> Floats:
        """Return what the logarithm of the loss had surely fallen to by each step, ``(P,)``."""
        return np.minimum.accumulate(np.log(self.losses) + margin * self.errors)

    def _spiked(self, margin: float) -> Booleans:
        """Return where the loss was above what it had been before, by so many errors, ``(P,)``."""
        return np.asarray(np.log(self.losses) - margin * self.errors > self._lowest_before(margin))

    def _lost(self) -> Floats:
        """Return how many steps were probably lost in spikes by each step, ``(P,)``."""
        lost = np.where(
            self._spiked(self.rules.probable_errors), np.diff(self.steps, prepend=0.0), 0.0
        )
        return np.cumsum(lost)


def _check(values: Floats, places: Floats) -> None:
    """Raise an error that says what is wrong with losses and steps."""
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
    """Return smoothed losses at the chosen points and standard errors of their logarithms."""
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
        # An exponential through the window: its mean is above its middle, and far above its end.
        rate = np.clip(slope, -1.0, 1.0)
        smoothed[row] = mean / float(np.exp(rate * x).mean())
        leverages[row] = 1.0 / len(part) + float(x.mean() ** 2) / spread
    errors = np.sqrt(_pooled(variances, rules.n_neighbours) * leverages)
    errors = np.nan_to_num(errors, nan=rules.unknown_error)
    return smoothed, np.minimum(errors, rules.most_error)


def _pooled(variances: Floats, n_neighbours: int) -> Floats:
    """Return means of variances over neighbouring windows; NaN where the variance is unknown."""
    known = np.isfinite(variances)
    if not known.any():
        return variances
    width = np.ones(2 * n_neighbours + 1)
    total = np.convolve(np.where(known, variances, 0.0), width, mode="same")[: len(variances)]
    count = np.convolve(known.astype(np.float64), width, mode="same")[: len(variances)]
    return np.asarray(np.where(known, total / np.maximum(count, 1.0), np.nan))


def _recorded(n_losses: int, spacing: float) -> Integers:
    """Return the places of every loss at first, then some percent apart, and of the last one."""
    points = [0]
    while points[-1] < n_losses - 1:
        points.append(max(points[-1] + 1, int(points[-1] * spacing)))
    points[-1] = max(0, n_losses - 1)
    return np.unique(points) if n_losses else np.zeros(0, dtype=np.int64)
