"""The best trials of a study so far, and how far their training got."""

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
    """Which completed trials count as the best ones.

    Attributes:
        share: This share of the completed trials. Not ablated yet.
        most: At most so many, because their curves are read for every decision.
    """

    share: float = 0.25
    most: int = 16


RULES = BestTrialsRules()


def incumbent(study: Study, trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """Return the best completed trial, if one has completed and there is a single objective."""
    best = _ranked(study, trials)
    return best[0] if best else None


def best_depth(study: Study, trials: Sequence[FrozenTrial], predictor: SearchPredictor) -> float:
    """Return how far training has to get at least for a value among the best ones.

    That is the logarithm of the initial training loss over the last one of that trial among the
    best that got least far; infinity if none of them has a curve. The predictor knows the initial
    training loss.
    """
    ranked = _ranked(study, trials)
    best = ranked[: min(RULES.most, math.ceil(RULES.share * len(ranked)))]
    initial = InitialLoss.of(predictor)
    losses = [loss for t in best if not math.isnan(loss := final_loss(t, initial))]
    if not losses:
        return math.inf
    return math.log(predictor.initial_loss / max(*losses, 1e-300))


def _ranked(study: Study, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the completed trials, best first."""
    if is_multi_objective(study):
        return []
    sign = -1.0 if study.directions[0] == StudyDirection.MAXIMIZE else 1.0
    done = [t for t in trials if t.state == TrialState.COMPLETE and t.values]
    return sorted(done, key=lambda t: sign * t.values[0])
