"""The best trials of a study so far, and the training losses that they reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import TYPE_CHECKING

from optuna.study import StudyDirection
from optuna.trial import TrialState

from optuna_ttp.study._curve_objections import InitialLoss
from optuna_ttp.study._observed_trial import final_loss
from optuna_ttp.study._optuna_compat import is_multi_objective


if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

    from optuna_ttp.prediction import SearchPredictor


@dataclass(frozen=True)
class BestTrialsRules:
    """The number of completed trials that count as the best ones.

    Attributes:
        share: The share of the completed trials, rounded up. All change no time.
        most: The largest number of trials, because their curves are read for every decision.
    """

    share: float = 0.25
    most: int = 16


RULES = BestTrialsRules()


def incumbent(study: Study, trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """Return the best completed trial; None if there is none or there are several objectives."""
    best = _ranked(study, trials)
    return best[0] if best else None


def best_depth(study: Study, trials: Sequence[FrozenTrial], predictor: SearchPredictor) -> float:
    """Return the smallest depth of the training loss at which one of the best trials ended.

    Depth is the logarithm of the predictor's initial training loss over the smoothed loss. It is
    infinite if none of the best trials has a usable loss curve.
    """
    ranked = _ranked(study, trials)
    best = ranked[: min(RULES.most, math.ceil(RULES.share * len(ranked)))]
    initial = InitialLoss.of(predictor)
    losses = [loss for t in best if not math.isnan(loss := final_loss(t, initial))]
    if not losses:
        return math.inf
    return math.log(predictor.initial_loss / max(*losses, 1e-300))


def _ranked(study: Study, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the completed trials, best first; none if the study has several objectives."""
    if is_multi_objective(study):
        return []
    sign = -1.0 if study.directions[0] == StudyDirection.MAXIMIZE else 1.0
    done = [t for t in trials if t.state == TrialState.COMPLETE and t.values]
    return sorted(done, key=lambda t: sign * t.values[0])
