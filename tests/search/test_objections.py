"""What speaks against a trial before its first step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import optuna
from optuna.distributions import IntDistribution
from optuna.trial import TrialState
import pytest

from optuna_ttp import BestMetric
from optuna_ttp import TrainingTimePredictor
from optuna_ttp import TTPPruner
from optuna_ttp import TTPSampler
from optuna_ttp.study import prediction_of
from tests.models import small_spectrum
from tests.studies import add_observed
from tests.studies import decision_on
from tests.studies import DIVERGING
from tests.studies import FAST
from tests.studies import HOPELESS
from tests.studies import is_skipped
from tests.studies import objective
from tests.studies import predicted_seconds
from tests.studies import predicted_steps
from tests.studies import pruned_study
from tests.studies import SLOW
from tests.studies import SPACE


@pytest.mark.parametrize(
    ("params", "skipped"), [(FAST, False), (SLOW, False), (HOPELESS, True), (DIVERGING, True)]
)
def test_hopeless_trials_are_skipped_and_others_run(params: dict[str, Any], skipped: bool) -> None:
    study = pruned_study()
    assert is_skipped(study, params) is skipped
    assert decision_on(study)[0] == ("skip" if skipped else "run")


@pytest.mark.parametrize("params", [HOPELESS, DIVERGING])
def test_a_skipped_trial_is_pruned_and_has_not_begun(params: dict[str, Any]) -> None:
    study = pruned_study()
    study.enqueue_trial(params)
    study.optimize(objective, n_trials=1)
    [trial] = study.trials
    assert trial.state == TrialState.PRUNED
    assert trial.intermediate_values == {}
    assert "ttp:curve" not in trial.user_attrs


def test_without_a_budget_the_horizon_of_the_predictor_counts() -> None:
    study = pruned_study()
    assert is_skipped(study, HOPELESS)
    assert decision_on(study) == ("skip", "predicted not to reach the target in 60 steps")
    far = TrainingTimePredictor(small_spectrum(), target_fraction=0.5, max_steps=200_000)
    assert not is_skipped(pruned_study(TTPPruner(far, BestMetric())), HOPELESS)


def test_a_budget_beyond_the_horizon_counts_instead_of_it() -> None:
    assert is_skipped(pruned_study(), HOPELESS)
    assert not is_skipped(pruned_study(max_steps=200_000), HOPELESS)


BUDGETS = ["max_steps", "max_epochs", "max_seconds"]


def _budget(name: str, share: float) -> dict[str, Any]:
    """A share of what SLOW takes; an epoch has 24 samples, three batches of eight."""
    steps = predicted_steps(SLOW)
    seconds = float(predicted_seconds([SLOW])[0])
    needed = {"max_steps": steps, "max_epochs": steps / 3, "max_seconds": seconds}
    return {name: share * needed[name]}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("share", "skipped"), [(1.1, False), (0.75, False), (0.6, True)])
def test_a_trial_may_take_its_budget_and_half_as_much_again(
    budget: str, share: float, skipped: bool
) -> None:
    assert is_skipped(pruned_study(**_budget(budget, share)), SLOW) is skipped


@pytest.mark.parametrize("tight", BUDGETS)
def test_the_tightest_of_several_budgets_counts(tight: str) -> None:
    budgets: dict[str, Any] = {}
    for name in BUDGETS:
        budgets |= _budget(name, 0.6 if name == tight else 1.1)
    assert is_skipped(pruned_study(**budgets), SLOW)


@pytest.mark.parametrize(("tolerance", "skipped"), [(1.0, True), (1.8, True), (2.2, False)])
def test_the_tolerance_can_be_chosen(tolerance: float, skipped: bool) -> None:
    half = _budget("max_steps", 0.5)
    assert is_skipped(pruned_study(**half, tolerance=tolerance), SLOW) is skipped


@pytest.mark.filterwarnings("ignore:Training begins")
def test_what_was_observed_moves_the_limit() -> None:
    study = pruned_study(**_budget("max_steps", 1.0))
    assert not is_skipped(study, SLOW)
    add_observed(study, lambda steps: 2.0 * steps)
    # Now it takes twice its budget, where half as much again is tolerated.
    assert is_skipped(study, SLOW)


def test_a_budget_in_seconds_needs_the_time_of_a_step() -> None:
    spectrum = replace(small_spectrum(), throughput=None)
    predictor = TrainingTimePredictor(spectrum, target_fraction=0.5, max_steps=60)
    with pytest.raises(ValueError, match=r"measure_speed=False\. Give max_steps or max_epochs"):
        TTPPruner(predictor, BestMetric(max_seconds=10.0))
    study = pruned_study(TTPPruner(predictor, BestMetric(max_epochs=6)))
    assert [is_skipped(study, SLOW), is_skipped(study, FAST)] == [True, False]


@pytest.mark.parametrize(("batch_size", "counts_as"), [(20, 20), (40, 40), (100, 48)])
def test_a_batch_has_no_more_samples_than_are_trained_on(batch_size: int, counts_as: int) -> None:
    """Not than the spectrum has, which may be that of a subset."""
    predictor = TrainingTimePredictor(small_spectrum(), target_fraction=0.5, n_samples=48)
    assert predictor.spectrum.n_samples == 24
    study = optuna.create_study(
        sampler=TTPSampler(predictor, BestMetric(), seed=0), pruner=TTPPruner(predictor)
    )
    study.enqueue_trial({**FAST, "batch_size": batch_size})
    trial = study.ask({**SPACE, "batch_size": IntDistribution(1, 100)})
    trial.should_prune()
    prediction = prediction_of(study.trials[0])
    assert prediction is not None and prediction.batch_size == counts_as
