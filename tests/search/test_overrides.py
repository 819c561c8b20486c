"""Why a trial runs although something speaks against it."""

from __future__ import annotations

import math
from typing import Any
import warnings

import optuna
from optuna.trial import TrialState
import pytest

from optuna_ttp import report
from optuna_ttp import TrainingLog
from optuna_ttp import UnreliablePredictionWarning
from tests.studies import add_observed
from tests.studies import asked
from tests.studies import decision_on
from tests.studies import DIVERGING
from tests.studies import FAST
from tests.studies import HOPELESS
from tests.studies import is_skipped
from tests.studies import losses
from tests.studies import pruned_study


def test_after_so_many_skipped_trials_one_runs() -> None:
    study = pruned_study(max_consecutive=3)
    assert [is_skipped(study, DIVERGING) for _ in range(8)] == [
        *[True, True, True, False],
        *[True, True, True, False],
    ]
    decision, reason = decision_on(study)
    assert decision == "run"
    assert reason.startswith("runs after 3 skipped trials in a row, although predicted to diverge")


def test_while_that_one_runs_no_other_has_to() -> None:
    study = pruned_study(max_consecutive=2)
    assert [is_skipped(study, DIVERGING) for _ in range(2)] == [True, True]
    running = asked(study, DIVERGING)
    assert not running.should_prune()
    assert [is_skipped(study, DIVERGING) for _ in range(2)] == [True, True]


def test_a_trial_that_runs_starts_the_count_again() -> None:
    study = pruned_study(max_consecutive=2)
    skipped = [is_skipped(study, p) for p in (HOPELESS, FAST, HOPELESS, HOPELESS, HOPELESS)]
    assert skipped == [True, False, True, True, False]


def test_predictions_that_rank_the_trials_wrongly_skip_nothing() -> None:
    study = pruned_study()
    with pytest.warns(
        UnreliablePredictionWarning,
        match=r"a factor [\d.]+\) than those of `c / effective learning rate`.*, 5 trials",
    ):
        add_observed(study, lambda steps: 200.0 / steps)
    assert not is_skipped(study, DIVERGING)
    decision, reason = decision_on(study)
    assert decision == "run"
    assert reason.startswith("predictions are worse than a rule of thumb, although predicted to")
    # Once is enough.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not is_skipped(study, HOPELESS)


def test_a_search_that_skips_everything_says_that_nothing_was_seen_yet() -> None:
    study = pruned_study()
    for _ in range(10):
        assert is_skipped(study, DIVERGING)
    with pytest.warns(
        UnreliablePredictionWarning,
        match="All 10 trials so far were skipped, .* runs, although predicted",
    ) as caught:
        assert not is_skipped(study, DIVERGING)
    assert len(caught) == 1
    # Once is enough.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            assert is_skipped(study, DIVERGING)
        assert not is_skipped(study, DIVERGING)


def test_a_search_that_has_seen_a_curve_skips_in_silence() -> None:
    study = pruned_study()
    add_observed(study, lambda steps: steps, rates=(0.1,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            assert is_skipped(study, DIVERGING)
        assert not is_skipped(study, DIVERGING)


@pytest.mark.filterwarnings("ignore:Training begins")
def test_predictions_in_no_order_are_named_as_such() -> None:
    study = pruned_study()
    steps = iter((2.0, 400.0, 3.0, 300.0, 2.0, 500.0, 3.0))
    with pytest.warns(
        UnreliablePredictionWarning, match=r"typically off by a factor [\d.]+ and do not rank"
    ):
        add_observed(study, lambda _: next(steps), (0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25))
        assert not is_skipped(study, DIVERGING)
    assert decision_on(study)[1].startswith("predictions are far off and in no order, although")


def _runs(study: optuna.Study, params: dict[str, Any], steps: float) -> bool:
    """Run a trial, if it may, whose curve is at the target after so many steps."""
    trial = asked(study, params)
    if trial.should_prune():
        study.tell(trial, state=TrialState.PRUNED)
        return False
    with TrainingLog(trial) as log:
        for loss in losses(steps, min(math.ceil(1.2 * steps), 60) + 3):
            log.step(loss)
    study.tell(trial, 1.0)
    return True


@pytest.mark.filterwarnings("ignore:All 9 trials")
def test_what_was_to_be_skipped_and_reaches_the_target_is_skipped_no_more() -> None:
    study = pruned_study(max_consecutive=9)
    with pytest.warns(UnreliablePredictionWarning, match="2 of 2 trials that ran") as caught:
        ran = [_runs(study, DIVERGING, 30.0) for _ in range(20)]
    # The first one after nine, the second one after three, then all.
    assert ran == [*[False] * 9, True, *[False] * 3, True, *[True] * 6]
    assert len([w for w in caught if "2 of 2" in str(w.message)]) == 1
    reason = decision_on(study)[1]
    assert reason.startswith("7 of 7 trials that this was predicted for reached the target, ")
    # For another reason it is skipped as ever.
    assert is_skipped(study, HOPELESS)
    assert report(study).n_wrong == 8


def test_what_was_to_be_skipped_and_misses_the_target_is_skipped_on() -> None:
    study = pruned_study(max_consecutive=4)
    ran = [_runs(study, DIVERGING, 1e5) for _ in range(20)]
    assert ran == [*[False] * 4, True] * 4
    assert report(study).n_wrong == 0


def test_predictions_that_rank_the_trials_keep_skipping_also_when_far_off() -> None:
    study = pruned_study()
    add_observed(study, lambda steps: 1.5 * steps**0.7)
    assert is_skipped(study, DIVERGING)


@pytest.mark.filterwarnings("ignore:Training begins")
def test_trust_returns_with_agreement() -> None:
    study = pruned_study(max_steps=10_000)
    add_observed(study, lambda steps: 200.0 / steps, rates=(0.1, 0.12, 0.15, 0.2, 0.3))
    with pytest.warns(UnreliablePredictionWarning):
        assert not is_skipped(study, DIVERGING)
    add_observed(study, lambda steps: 2.0 * steps, rates=(0.1, 0.12, 0.15, 0.2, 0.3) * 3)
    assert is_skipped(study, DIVERGING)
