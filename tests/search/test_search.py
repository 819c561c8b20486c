"""Goals, budgets, audits and pruning under way: what sampler and pruner decide together."""

from __future__ import annotations

from dataclasses import replace
import math
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import CmaEsSampler
from optuna.samplers import RandomSampler
from optuna.samplers import TPESampler
from optuna.trial import TrialState
import pytest

from optuna_ttp import BestMetric
from optuna_ttp import Decision
from optuna_ttp import FastestToTarget
from optuna_ttp import report
from optuna_ttp import SamplerRules
from optuna_ttp import StudyBudget
from optuna_ttp import TrainingLog
from optuna_ttp import TTPSampler
from optuna_ttp.calibration import RULES
from optuna_ttp.calibration._divergence import DivergenceLimit
from optuna_ttp.search import ForecastRules
from optuna_ttp.search._candidates import Candidates
from optuna_ttp.search._forecast import Forecast
from optuna_ttp.study import Configuration
from optuna_ttp.study import decision_of
from optuna_ttp.study import DecisionRecord
from tests.models import small_predictor
from tests.studies import add_observed
from tests.studies import asked
from tests.studies import DIVERGING
from tests.studies import FAST
from tests.studies import HOPELESS
from tests.studies import losses
from tests.studies import make_pruner
from tests.studies import make_sampler
from tests.studies import predicted_seconds
from tests.studies import predicted_steps
from tests.studies import proposals
from tests.studies import quick_predictor
from tests.studies import QuickGPSampler
from tests.studies import SLOW
from tests.studies import SPACE


GRID: dict[str, BaseDistribution] = {
    "learning_rate": CategoricalDistribution([float(r) for r in np.logspace(-4, 0, 9)]),
    "batch_size": CategoricalDistribution([4, 8, 16]),
    "momentum": CategoricalDistribution([0.0, 0.9]),
}


def _study(**arguments: Any) -> optuna.Study:
    return optuna.create_study(sampler=RandomSampler(seed=0), pruner=make_pruner(**arguments))


def _sampler(base: BaseSampler | None = None, **arguments: Any) -> TTPSampler:
    options = {"search_space": GRID, "exploration": 0.0, "seed": 0}
    return make_sampler(base, **{**options, **arguments})


def _on_grid(sampler: BaseSampler, n_trials: int, value: Any = None) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=sampler)
    for _ in range(n_trials):
        trial = study.ask(GRID)
        study.tell(trial, 0.0 if value is None else value(trial.params))
    return [trial.params for trial in study.trials]


def _decision(study: optuna.Study, number: int = -1) -> DecisionRecord:
    decision = decision_of(study.trials[number])
    assert decision is not None
    return decision


# The sampler.


def _bases() -> list[BaseSampler]:
    return [
        RandomSampler(seed=1),
        TPESampler(seed=1),
        QuickGPSampler(seed=1),
        CmaEsSampler(seed=1, warn_independent_sampling=False),
    ]


@pytest.mark.parametrize("k", range(4), ids=["random", "tpe", "gp", "cmaes"])
def test_the_design_starts_with_what_is_fast_and_spreads_out(k: int) -> None:
    params = _on_grid(_sampler(_bases()[k]), 5)
    every = predicted_seconds(_whole_grid())
    seconds = predicted_seconds(params)
    assert seconds[0] <= np.quantile(every, 0.1)
    assert (seconds <= np.quantile(every, 0.5)).all()
    assert len({p["batch_size"] for p in params}) > 1


def _whole_grid() -> list[dict[str, Any]]:
    rates, sizes, momenta = (
        d.choices for d in GRID.values() if isinstance(d, CategoricalDistribution)
    )
    return [
        {"learning_rate": r, "batch_size": b, "momentum": m}
        for r in rates
        for b in sizes
        for m in momenta
    ]


@pytest.mark.parametrize("base", [RandomSampler, TPESampler], ids=["random", "tpe"])
def test_nothing_is_proposed_twice_until_all_was(base: Any) -> None:
    # A random base draws among a few, which may all have been tried.
    sampler = _sampler(base(seed=0), n_design_trials=60)
    params = _on_grid(sampler, 54)
    assert len({tuple(sorted(p.items())) for p in params}) == 54
    assert len(_on_grid(_sampler(base(seed=0), n_design_trials=60), 56)) == 56


def test_tpe_does_not_propose_twice_behind_the_design() -> None:
    def value(params: dict[str, Any]) -> float:
        return abs(math.log10(params["learning_rate"]) + 1) + float(params["momentum"])

    params = _on_grid(_sampler(TPESampler(seed=0)), 40, value)
    assert len({tuple(sorted(p.items())) for p in params}) == 40


def test_duplicates_can_be_allowed() -> None:
    params = _on_grid(_sampler(allow_duplicates=True, n_design_trials=40), 40)
    assert len({tuple(sorted(p.items())) for p in params}) < 40


def test_parallel_trials_of_the_design_differ() -> None:
    study = optuna.create_study(sampler=_sampler())
    trials = [study.ask() for _ in range(4)]
    # None has suggested anything when the last one is asked for its parameters.
    for trial in trials:
        for name, distribution in GRID.items():
            trial._suggest(name, distribution)
    assert len({tuple(sorted(t.params.items())) for t in trials}) == 4


def test_a_metric_is_sought_where_training_gets_deep_within_the_budget() -> None:
    predictor = small_predictor()
    sampler = TTPSampler(
        predictor,
        BestMetric(max_epochs=20),
        search_space=GRID,
        seed=0,
        rules=SamplerRules(exploration=0.0),
    )
    params = _on_grid(sampler, 3)
    rates, sizes, momenta = (np.array([p[n] for p in params]) for n in GRID)
    epochs = predictor.predict(rates, sizes, momenta).epochs
    assert (epochs <= 20).all()


def test_values_teach_where_the_metric_is_good() -> None:
    # Good is what is neither deepest nor fastest: the largest momentum at a middling rate.
    def value(params: dict[str, Any]) -> float:
        return abs(math.log10(params["learning_rate"]) + 2) - float(params["momentum"])

    def best_after(sampler: BaseSampler, n_trials: int) -> float:
        return min(value(p) for p in _on_grid(sampler, n_trials, value))

    found = [best_after(_sampler(goal=BestMetric, max_epochs=20, seed=s), 15) for s in range(4)]
    assert np.median(found) < 0.2


def test_maximising_a_metric_mirrors_minimising_it() -> None:
    def run(direction: Any, sign: float) -> list[dict[str, Any]]:
        sampler = _sampler(TPESampler(seed=0), goal=BestMetric, max_epochs=20)
        study = optuna.create_study(sampler=sampler, direction=direction)
        for _ in range(12):
            trial = study.ask(GRID)
            study.tell(trial, sign * trial.params["learning_rate"])
        return [t.params for t in study.trials]

    assert run("minimize", 1.0) == run("maximize", -1.0)


@pytest.mark.filterwarnings("ignore:Predicted training times were further")
def test_with_trust_at_zero_it_is_its_base_sampler() -> None:
    def run(sampler: BaseSampler) -> list[dict[str, Any]]:
        study = optuna.create_study(sampler=make_sampler(seed=0))
        add_observed(study, lambda steps: 200.0 / steps)
        study.sampler = sampler
        for number in range(14):
            study.tell(study.ask(SPACE), float(number % 3))
        return [t.params for t in study.trials]

    base = TPESampler(seed=3)
    ours = _sampler(base, goal=BestMetric, max_epochs=20, search_space=None)
    assert run(ours) == run(TPESampler(seed=3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_design_trials": -1}, "n_design_trials must not be negative but got -1"),
        ({"max_epochs": 0}, "max_epochs must be positive but got 0"),
    ],
)
def test_the_sampler_refuses_what_makes_no_sense(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sampler(**arguments)


def test_success_is_unlikely_where_trials_did_not_do_as_predicted() -> None:
    predictor = quick_predictor()
    rate = 0.9 * predictor.max_learning_rate(8, 0.0)

    def likely(failed: bool) -> float:
        limit = DivergenceLimit.of([0.9] * 3, [failed] * 3, RULES.failure)
        informed = predictor.calibrated(replace(predictor.calibration, failure=limit))
        one = Candidates.resolved([Configuration(float(rate), 8, 0.0)])
        forecast = Forecast.of(informed, one, FastestToTarget(max_steps=60), ForecastRules())
        return float(np.exp(forecast.log_success[0]))

    assert likely(True) < 0.2
    assert likely(False) > 0.7


# The pruner before the first step.


def test_what_costs_several_times_the_best_trial_is_skipped() -> None:
    study = _study(max_cost_ratio=2.0)
    first = asked(study, FAST)
    assert not first.should_prune()
    study.tell(first, 1.0)
    slow = asked(study, SLOW)
    assert slow.should_prune()
    assert _decision(study).objection == "cost"
    assert "times what the best trial, number 0, was predicted" in _decision(study).reason
    study.tell(slow, state=TrialState.PRUNED)
    assert not asked(study, {**FAST, "learning_rate": 0.08}).should_prune()


def test_a_smaller_probability_may_be_enough() -> None:
    needed = predicted_steps(SLOW)
    budget = {"max_steps": round(0.9 * needed), "tolerance": 1.0}
    assert asked(_study(**budget), SLOW).should_prune()
    assert not asked(_study(**budget, min_probability=0.2), SLOW).should_prune()
    generous = {"max_steps": round(1.2 * needed), "tolerance": 1.0}
    study = _study(**generous, min_probability=0.95)
    assert asked(study, SLOW).should_prune()
    assert "with a probability of" in _decision(study).reason


def test_what_has_a_fair_chance_runs_until_a_trial_has_completed() -> None:
    """It may be the only one that gets to the target."""
    needed = predicted_steps(SLOW)
    budget = {"max_steps": round(0.9 * needed), "tolerance": 1.0}
    study = _study(**budget, goal=FastestToTarget)
    assert not asked(study, SLOW).should_prune()
    assert asked(study, HOPELESS).should_prune()
    # Where a metric is searched for, misses are no end of the search.
    assert asked(_study(**budget, goal=BestMetric), SLOW).should_prune()
    study.tell(asked(study, FAST), predicted_steps(FAST))
    assert asked(study, {**SLOW, "learning_rate": 0.0301}).should_prune()


def test_shadow_writes_down_and_stops_nothing() -> None:
    study = _study(shadow=True)
    for params in (DIVERGING, HOPELESS, FAST):
        trial = asked(study, params)
        assert not trial.should_prune()
        study.tell(trial, 1.0)
    overrides = [_decision(study, k).override for k in range(3)]
    assert overrides == ["shadow", "shadow", None]
    assert "although predicted to diverge" in _decision(study, 0).reason


def test_an_audit_runs_a_share_of_what_was_to_be_skipped() -> None:
    study = _study(audit=0.3, max_consecutive=1000, seed=1)
    study.tell(asked(study, FAST), 10.0)
    skipped = []
    for _ in range(60):
        trial = asked(study, DIVERGING)
        skipped.append(trial.should_prune())
        study.tell(trial, None if skipped[-1] else 9.0, TrialState.PRUNED if skipped[-1] else None)
    assert 0.55 < np.mean(skipped) < 0.85
    ledger = report(study)
    assert ledger.n_audited == 60 - sum(skipped)
    # The first one that ran is the best of those that did.
    assert ledger.n_wrong == 1
    share, low, high = ledger.wrong_share()
    assert low < share < high
    assert "ran despite their prediction; skipping 1 of them would have been wrong" in str(ledger)


def test_an_audit_tells_skipping_that_is_wrong() -> None:
    study = _study(audit=1.0, max_steps=20, tolerance=1.0)
    study.tell(study.ask(), 0.0)
    for steps in (100.0, 10.0):
        trial = asked(study, SLOW)
        assert not trial.should_prune()
        with TrainingLog(trial) as log:
            for loss in losses(steps, 30):
                log.step(loss)
        study.tell(trial, 1.0)
    assert [r.was_wrong for r in report(study).records] == [None, False, True]


@pytest.mark.skipif(
    not hasattr(optuna.trial.Trial, "set_constraint"), reason="needs Optuna's constraints"
)
def test_a_constraint_says_by_how_much_a_budget_is_exceeded() -> None:
    study = _study(constraint=True, max_steps=20, tolerance=1.0)
    for params in (FAST, SLOW, HOPELESS):
        asked(study, params).should_prune()
    fast, slow, hopeless = (t.constraints["ttp_budget"] for t in study.trials)
    assert fast == pytest.approx(math.log(predicted_steps(FAST) / 20))
    assert fast < 0 < slow < hopeless < math.inf


def test_several_objectives_are_decided_by_asking() -> None:
    pruner = make_pruner(optuna.pruners.MedianPruner())
    study = optuna.create_study(directions=["minimize", "maximize"])
    decisions = [pruner.decide(asked(study, params)) for params in (FAST, DIVERGING)]
    assert [d.prune for d in decisions] == [False, True]
    assert decisions[1].reason.startswith("predicted to diverge")
    assert not decisions[0] and isinstance(decisions[0], Decision)


def test_asking_asks_the_wrapped_pruner_too() -> None:
    pruner = make_pruner(optuna.pruners.ThresholdPruner(upper=5.0))
    study = optuna.create_study(pruner=pruner)
    trial = asked(study, FAST)
    assert not pruner.decide(trial)
    trial.report(9.0, 0)
    assert pruner.decide(trial) == Decision(True, "stopped by ThresholdPruner")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_chance": 1.5}, r"min_chance must be in \[0, 1\] but got 1.5"),
        ({"audit": -0.1}, r"audit must be in \[0, 1\] but got -0.1"),
        ({"min_probability": math.nan}, r"min_probability must be in \[0, 1\] but got nan"),
        ({"max_cost_ratio": 0.5}, "max_cost_ratio must be finite and at least 1 but got 0.5"),
    ],
)
def test_the_pruner_refuses_what_makes_no_sense(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_pruner(**arguments)


# Budgets.


def _paying(seconds: float) -> Any:
    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0.0, 1.0)
        trial.set_user_attr("ttp:paid", {"trial": trial.number, "seconds": seconds})
        return 1.0

    return objective


@pytest.mark.parametrize(("seconds", "n_trials"), [(3.0, 3), (4.0, 2), (0.5, 20)])
def test_a_study_stops_where_another_trial_is_not_worth_starting(
    seconds: float, n_trials: int
) -> None:
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    study.optimize(_paying(seconds), n_trials=50, callbacks=[StudyBudget(seconds=10.0)])
    # Three of three seconds leave one; two of four leave two.
    assert len(study.trials) == n_trials


def test_a_budget_in_steps_counts_what_was_recorded() -> None:
    study = _study()
    budget = StudyBudget(steps=70)
    for _ in range(2):
        trial = asked(study, FAST)
        with TrainingLog(trial) as log:
            for loss in losses(12.0, 20):
                log.step(loss)
        study.tell(trial, 1.0)
    assert budget.left(study.trials) == 30
    assert budget.share_left(study.trials) == pytest.approx(3 / 7)
    assert repr(budget) == "StudyBudget(steps=70)"


def test_a_trial_that_does_not_fit_into_the_rest_is_skipped() -> None:
    budget = StudyBudget(seconds=1.0)
    study = _study(study_budget=budget)
    study.optimize(_paying(0.97), n_trials=1)
    assert not asked(study, FAST).should_prune()
    assert asked(study, SLOW).should_prune()
    assert _decision(study).objection == "study_budget"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Exactly one of seconds and steps must be given but got None and None"),
        ({"seconds": 1.0, "steps": 1}, "Exactly one of seconds and steps must be given"),
        ({"seconds": 0.0}, "seconds must be positive and finite but got 0.0"),
        ({"steps": math.inf}, "steps must be positive and finite but got inf"),
    ],
)
def test_budgets_out_of_range_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudyBudget(**arguments)


def test_cost_counts_for_less_as_the_budget_is_spent() -> None:
    def cost(spent: float) -> float:
        budget = StudyBudget(seconds=100.0)
        sampler = _sampler(goal=BestMetric, max_epochs=30, study_budget=budget)
        study = optuna.create_study(sampler=sampler)
        study.optimize(_paying(spent), n_trials=1)
        trial = study.ask(GRID)
        size = trial.params["batch_size"]
        return float(math.ceil(24 / size) * quick_predictor().seconds_per_step(size))

    assert cost(0.0) <= cost(99.0)


def test_proposals_of_the_whole_search_are_faster_than_those_of_the_base() -> None:
    ours = predicted_seconds(proposals(_sampler(search_space=SPACE), 20))
    plain = predicted_seconds(proposals(TPESampler(seed=0), 20))
    assert np.median(ours) < 0.3 * np.median(plain)
