"""The reasons for which a trial runs in spite of an objection."""

from __future__ import annotations

from collections.abc import Sequence
import math
from typing import TYPE_CHECKING

import numpy as np

from optuna_ttp.study import decision_of
from optuna_ttp.study import FINISHED
from optuna_ttp.study import n_skipped_in_a_row
from optuna_ttp.study import Objection
from optuna_ttp.study import Override
from optuna_ttp.study import progress_to_target
from optuna_ttp.study import warn_that_nothing_ran
from optuna_ttp.study import warn_that_skipping_is_wrong


if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from optuna_ttp.search._planned_trial import PlannedTrial
    from optuna_ttp.search._planned_trial import Verdict
    from optuna_ttp.search._pruner_rules import PrunerRules


def override_of(
    trial: PlannedTrial, verdict: Verdict, rules: PrunerRules, *, shadow: bool, seed: int
) -> tuple[Override, str] | None:
    """Return why a trial runs in spite of an objection, as a kind and in words, or None.

    None means that it is skipped. The study is warned once if trials with the same objection
    reached the target, or if none of its trials ran.
    """
    objection, reason = verdict
    if not trial.predictor.calibration.trusted:
        return Override.UNTRUSTED, f"predictions are {trial.predictor.calibration.fault}"
    progress = _progress_of_similar_trials(trial.others, objection, rules.most_refuting)
    refuting = _refuting_trials(progress, rules)
    if refuting is not None:
        warn_that_skipping_is_wrong(trial.study, refuting)
        text = f"{refuting} trials that this was predicted for reached the target"
        return Override.REFUTED, text
    if shadow:
        return Override.SHADOW, "runs in shadow mode"
    n_skipped = n_skipped_in_a_row(trial.others)
    if n_skipped >= _most_in_a_row(progress, rules):
        _warn_where_nothing_ran(trial, n_skipped, reason, rules)
        return Override.TURN, f"runs after {n_skipped} skipped trials in a row"
    # The draw is the same in every process that asks.
    if np.random.default_rng((seed, trial.number)).random() < rules.audit:
        return Override.AUDIT, "runs to see whether skipping would have been right"
    return None


def _progress_of_similar_trials(
    trials: Sequence[FrozenTrial], objection: Objection, most: int
) -> list[float]:
    """Return the progress of finished trials that ran in spite of the same objection.

    Progress is zero at the initial loss and one at the target. The result has the newest ``most``
    trials with a loss curve, oldest first; it is empty if the objection is about cost.
    """
    if objection not in (Objection.DIVERGES, Objection.BUDGET):
        return []
    newest_first: list[float] = []
    for trial in sorted(trials, key=lambda t: t.number, reverse=True):
        decision = decision_of(trial) if trial.state in FINISHED else None
        if decision is not None and decision.override and decision.objection == objection:
            progress = progress_to_target(trial)
            newest_first += [] if math.isnan(progress) else [progress]
        if len(newest_first) == most:
            break
    return newest_first[::-1]


def _refuting_trials(progress: Sequence[float], rules: PrunerRules) -> str | None:
    """Return the number of trials that refute an objection as text, as ``3 of 5``; None if few do.

    ``progress`` holds the progress of trials that ran in spite of it, one at the target. At least
    ``rules.n_refuting``, and more than half, must have reached the target.
    """
    n_reached = sum(share >= 1.0 for share in progress)
    if n_reached < rules.n_refuting or 2 * n_reached <= len(progress):
        return None
    return f"{n_reached} of {len(progress)}"


def _most_in_a_row(progress: Sequence[float], rules: PrunerRules) -> int:
    """Return the number of skipped trials in a row after which one runs; fewer after progress."""
    did_well = bool(progress) and progress[-1] >= rules.half_way
    return max(1, rules.max_consecutive // (rules.sooner if did_well else 1))


def _warn_where_nothing_ran(
    trial: PlannedTrial, n_skipped: int, reason: str, rules: PrunerRules
) -> None:
    """Warn once if at least ``rules.n_skipped_to_warn`` trials, and no others, were skipped."""
    all_skipped = rules.n_skipped_to_warn <= n_skipped == len(trial.others)
    if all_skipped and not trial.predictor.observations:
        warn_that_nothing_ran(trial.study, n_skipped, reason)
