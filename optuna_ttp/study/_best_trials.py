"""The best trials of a study so far, and how far their training got."""

from __future__ import annotations

from collections.abc import Sequence
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


# So large a share of the completed trials count as the best ones, and no more than so many: their
# curves are read for every decision.
_BEST = 0.25
_MOST = 16


def incumbent(study: Study, trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """Return the best completed trial.

    Args:
        study:
            The study.
        trials:
            Its trials.

    Returns:
        The trial, or :obj:`None` where none has completed or there are several objectives.
    """
    best = _ranked(study, trials)
    return best[0] if best else None


def best_depth(study: Study, trials: Sequence[FrozenTrial], predictor: SearchPredictor) -> float:
    """Return how far training has to get at least for a value among the best ones.

    Args:
        study:
            The study.
        trials:
            Its trials.
        predictor:
            Knows the initial training loss.

    Returns:
        The logarithm of the initial training loss over the last one of that trial among the best
        quarter of the completed ones, of 16 at most, that got least far; infinity where no curve
        tells.
    """
    ranked = _ranked(study, trials)
    best = ranked[: min(_MOST, math.ceil(_BEST * len(ranked)))]
    initial = InitialLoss.of(predictor)
    losses = [loss for t in best if not math.isnan(loss := final_loss(t, initial))]
    if not losses:
        return math.inf
    return math.log(predictor.initial_loss / max(*losses, 1e-300))


def _ranked(study: Study, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    if is_multi_objective(study):
        return []
    sign = -1.0 if study.directions[0] == StudyDirection.MAXIMIZE else 1.0
    done = [t for t in trials if t.state == TrialState.COMPLETE and t.values]
    return sorted(done, key=lambda t: sign * t.values[0])
