"""How the curves of trials begin, and what only several of them together give away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
import math
from typing import TYPE_CHECKING

import numpy as np

from optuna_ttp.study._recorded_curve import recorded
from optuna_ttp.study._unusable_curve import UnusableCurve


if TYPE_CHECKING:
    from typing import Any

    from optuna.trial import FrozenTrial

    from optuna_ttp.study._observed_trial import InitialLoss


# First losses whose mean is so small a part of the initial loss are those of something else, as
# far as that is not luck: by so many of its standard deviations.
_TOO_LOW, _LUCKY = 0.6, 4.0
# No mean of losses is surer than this.
_LEAST_NOISE = 0.01


@dataclass(frozen=True)
class CurveStart:
    """How the curve of a trial begins.

    Attributes:
        batch_size:
            The trial's.
        spacing:
            Steps between the first losses; NaN for fewer than two.
        ratio:
            The first loss over the initial training loss; NaN where the curve begins later.
        noise:
            The standard deviation of that, by the luck of the mini-batch.
    """

    batch_size: int
    spacing: float
    ratio: float
    noise: float

    @classmethod
    def of(
        cls, trial: FrozenTrial, prediction: dict[str, Any], initial: InitialLoss
    ) -> CurveStart | None:
        """Look at a trial.

        Args:
            trial:
                Any trial.
            prediction:
                What was predicted for it.
            initial:
                The task's initial training loss.

        Returns:
            How its curve begins; :obj:`None` where it has none.
        """
        value = recorded(trial)
        if not isinstance(value, dict):
            return None
        steps, size = value["steps"], int(prediction["batch_size"])
        at_once = steps[0] == 0 and value["first"] is not None
        return cls(
            size,
            float(np.diff(steps).min()) if len(steps) > 1 else math.nan,
            value["first"] / initial.mean if at_once else math.nan,
            max(initial.sd / (initial.mean * math.sqrt(size)), _LEAST_NOISE),
        )


def joint_objections(starts: Mapping[int, CurveStart]) -> dict[int, UnusableCurve]:
    """Return which curves cannot be used, by what several of them have in common.

    Args:
        starts:
            How curves begin that can be used as far as each one tells, by the number of the trial.

    Returns:
        Why, by the number of the trial.
    """
    return _in_samples(starts) or _too_low(starts)


def _in_samples(starts: Mapping[int, CurveStart]) -> dict[int, UnusableCurve]:
    """Losses that are as many steps apart as the batch has samples, whatever its size."""
    several = {n: start for n, start in starts.items() if start.batch_size > 1}
    alike = {n: s.batch_size for n, s in several.items() if s.spacing == s.batch_size}
    if len(set(alike.values())) < 2 or 2 * len(alike) <= len(several):
        return {}
    reason = "in several trials losses are as many steps apart as the batch has samples"
    return dict.fromkeys(alike, UnusableCurve("samples", reason))


def _too_low(starts: Mapping[int, CurveStart]) -> dict[int, UnusableCurve]:
    """First losses of small batches, of which a single one may be luck."""
    known = {n: start for n, start in starts.items() if math.isfinite(start.ratio)}
    if len(known) < 2:
        return {}
    weights = np.array([start.noise**-2 for start in known.values()])
    ratio = float(weights @ [start.ratio for start in known.values()] / weights.sum())
    if not (ratio < _TOO_LOW and 1.0 - ratio > _LUCKY / math.sqrt(float(weights.sum()))):
        return {}
    reason = (
        f"the first losses of {len(known)} trials are {ratio:.2g} times the initial training loss "
        "on average: it must be another loss, or another model, or one that was divided, as for "
        "the accumulation of gradients"
    )
    low = UnusableCurve("low", reason)
    return {n: low for n, start in known.items() if start.ratio < _TOO_LOW}
