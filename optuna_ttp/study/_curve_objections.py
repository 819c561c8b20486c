"""Checks of whether training-loss curves can belong to the task, each alone and all together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
import math
from typing import TYPE_CHECKING

import numpy as np

from optuna_ttp.study._curve_record import CurveRecord
from optuna_ttp.study._unusable_curve import CurveFault
from optuna_ttp.study._unusable_curve import UnusableCurve


if TYPE_CHECKING:
    from optuna_ttp.prediction import SearchPredictor
    from optuna_ttp.study._prediction_record import PredictionRecord


@dataclass(frozen=True)
class CurveRules:
    """The numbers that decide which curves cannot belong to the task.

    All but ``low_errors`` change nothing on the recorded tasks, but guard other losses and steps.

    Attributes:
        too_high: A first loss above this factor of the initial loss is of another loss function.
        too_low: A first loss below this share of the initial loss is of another loss function.
        low_errors: A first loss is too low only by at least this many standard deviations of a
            mini-batch's loss, because small mini-batches vary.
        high_errors: A first loss is too high only by at least this many standard deviations.
        risen: The factor that replaces ``too_high`` if a curve begins after the first step,
            because the loss may have risen before.
        mild: With ``risen`` a loss is too high only if the learning rate is below this share of
            the largest stable one, because larger ones let a loss rise.
        like_a_sum: A loss that is too high is a sum over the batch if the logarithm of its factor
            differs by less than this from the logarithm of the batch size.
        late: A curve that begins at this step or later, still at the initial loss, and soon falls
            has its steps counted from another start.
        still: The first loss is still at the initial loss if it differs by less than this share.
        half: The curve soon falls if within twice its first step its loss is below this share of
            its first loss.
        jump: A gap in the steps of more than this factor of both gaps beside it shows that they
            are no numbers of optimiser steps.
        least_noise: Lower bound of the standard deviation of a first loss over the initial loss.
    """

    too_high: float = 1.8
    too_low: float = 0.6
    low_errors: float = 4.0
    high_errors: float = 6.0
    risen: float = 5.0
    mild: float = 0.5
    like_a_sum: float = 0.4
    late: int = 10
    still: float = 0.1
    half: float = 0.5
    jump: float = 1000.0
    least_noise: float = 0.01


RULES = CurveRules()


@dataclass(frozen=True)
class InitialLoss:
    """The task's training loss at the pretrained weights, before the first step.

    Attributes:
        mean: The mean over all samples.
        sd: Standard deviation of the losses of single samples.
    """

    mean: float
    sd: float

    @classmethod
    def of(cls, predictor: SearchPredictor) -> InitialLoss:
        """Return the initial loss of a predictor's task."""
        return cls(predictor.initial_loss, predictor.initial_loss_sd)

    def noise(self, batch_size: int) -> float:
        """Return the standard deviation of a mini-batch's loss, as a share of the mean."""
        return self.sd / (self.mean * math.sqrt(batch_size))

    def objection(
        self, record: CurveRecord, batch_size: int, stability: float = math.nan
    ) -> UnusableCurve | None:
        """Return why a curve cannot be of the task's training loss, or None if it can be.

        ``stability`` is the learning rate over the largest stable one, NaN if unknown. The curve
        has at least one loss.
        """
        ratio, noise = record.first_loss / self.mean, self.noise(batch_size)
        loss = f"its first loss, {record.first_loss:.4g}, is"
        initial = f"the initial training loss {self.mean:.4g}"
        begin = record.curve.steps[0]
        if begin > 0:
            high = stability < RULES.mild and ratio > RULES.risen + RULES.high_errors * noise
            if not high and self._is_counted_from_elsewhere(record, noise):
                return UnusableCurve(
                    CurveFault.LATE,
                    f"it begins after {begin:,.15g} steps, but still at {initial}, and halves "
                    "soon after: steps must be those of this trial, from 0 on",
                )
        else:
            high = ratio > RULES.too_high and ratio - 1.0 > RULES.high_errors * noise
            if ratio < RULES.too_low and 1.0 - ratio > RULES.low_errors * noise:
                return UnusableCurve(
                    CurveFault.LOW,
                    f"{loss} {ratio:.2g} times {initial}: it must be another loss, or another "
                    "model, or one that was divided, as for the accumulation of gradients",
                )
        if not high:
            return None
        if abs(math.log(ratio / batch_size)) < RULES.like_a_sum:
            return UnusableCurve(
                CurveFault.SUM,
                f"{loss} about {batch_size} times {initial}: it looks like a sum over the batch "
                f"of {batch_size} instead of a mean",
            )
        return UnusableCurve(
            CurveFault.HIGH,
            f"{loss} {ratio:.3g} times {initial}: it must be another loss, or another model, or "
            f"a sum over {ratio:.0f} samples instead of a mean",
        )

    def _is_counted_from_elsewhere(self, record: CurveRecord, noise: float) -> bool:
        """Return True if the steps of a curve probably do not begin with the trial's first step.

        It begins late then, but with the initial loss, and falls as a curve does at first.
        """
        steps, losses = record.curve.steps, record.curve.losses
        soon = losses[steps <= 2 * steps[0]]
        is_still = noise < RULES.still and abs(losses[0] / self.mean - 1.0) < RULES.still
        return bool(steps[0] >= RULES.late and is_still and soon.min() < RULES.half * losses[0])


def jump_in(record: CurveRecord) -> UnusableCurve | None:
    """Return a reason if a curve's steps jump once and then go on as before, else None."""
    gaps = np.diff(record.curve.steps)
    if len(gaps) < 3:
        return None
    beside = np.maximum(gaps[:-2], gaps[2:])
    places = np.flatnonzero(gaps[1:-1] > RULES.jump * beside)
    if not len(places):
        return None
    before, after = record.curve.steps[places[0] + 1 : places[0] + 3]
    return UnusableCurve(
        CurveFault.JUMP,
        f"its steps jump from {before:,.15g} to {after:,.15g}, and go on as before",
    )


@dataclass(frozen=True)
class CurveStart:
    """The beginning of a trial's curve.

    Attributes:
        batch_size: The trial's batch size.
        spacing: The smallest difference of recorded steps; NaN for fewer than two losses.
        ratio: The first loss over the initial training loss; NaN if its step is not zero.
        noise: The standard deviation of ``ratio`` over random mini-batches.
    """

    batch_size: int
    spacing: float
    ratio: float
    noise: float

    @classmethod
    def of(
        cls, record: CurveRecord, prediction: PredictionRecord, initial: InitialLoss
    ) -> CurveStart:
        """Return how a trial's curve begins, and its batch size, which the prediction has."""
        steps = record.curve.steps
        return cls(
            prediction.batch_size,
            float(np.diff(steps).min()) if len(steps) > 1 else math.nan,
            record.first_loss / initial.mean if steps[0] == 0 else math.nan,
            max(initial.noise(prediction.batch_size), RULES.least_noise),
        )


def joint_objections(starts: Mapping[int, CurveStart]) -> dict[int, UnusableCurve]:
    """Return the reasons against curves that only several of them together show, by trial number.

    ``starts`` has the beginnings of the curves that passed the checks of single curves, by the
    number of the trial.
    """
    return _counted_in_samples(starts) or _too_low(starts)


def _counted_in_samples(starts: Mapping[int, CurveStart]) -> dict[int, UnusableCurve]:
    """Return the curves whose steps are their batch size apart, if most are, at two batch sizes.

    Their trials counted samples instead of optimiser steps. The result is by trial number.
    """
    several = {n: start for n, start in starts.items() if start.batch_size > 1}
    alike = {n: s.batch_size for n, s in several.items() if s.spacing == s.batch_size}
    if len(set(alike.values())) < 2 or 2 * len(alike) <= len(several):
        return {}
    reason = "in several trials losses are as many steps apart as the batch has samples"
    return dict.fromkeys(alike, UnusableCurve(CurveFault.SAMPLES, reason))


def _too_low(starts: Mapping[int, CurveStart]) -> dict[int, UnusableCurve]:
    """Return the curves with too low a first loss, if the mean over at least two is too low."""
    known = {n: start for n, start in starts.items() if math.isfinite(start.ratio)}
    if len(known) < 2:
        return {}
    weights = np.array([start.noise**-2 for start in known.values()])
    ratio = float(weights @ [start.ratio for start in known.values()] / weights.sum())
    errors = (1.0 - ratio) * math.sqrt(float(weights.sum()))
    if not (ratio < RULES.too_low and errors > RULES.low_errors):
        return {}
    reason = (
        f"the first losses of {len(known)} trials are {ratio:.2g} times the initial training loss "
        "on average: it must be another loss, or another model, or one that was divided, as for "
        "the accumulation of gradients"
    )
    low = UnusableCurve(CurveFault.LOW, reason)
    return {n: low for n, start in known.items() if start.ratio < RULES.too_low}
