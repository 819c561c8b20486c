"""Which configurations the sampler prefers, by predictions and by values."""

from __future__ import annotations

from dataclasses import fields
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
import pytest

from optuna_ttp import BestMetric
from optuna_ttp import SamplerRules
from optuna_ttp import StudyBudget
from optuna_ttp import TTPSampler
from optuna_ttp.calibration import RULES
from optuna_ttp.calibration._divergence import DivergenceLimit
from optuna_ttp.search import ForecastRules
from optuna_ttp.search._candidates import Candidates
from optuna_ttp.search._forecast import Forecast
from optuna_ttp.study import Configuration
from tests.models import small_predictor
from tests.studies import add_observed
from tests.studies import make_sampler
from tests.studies import predicted_seconds
from tests.studies import proposals
from tests.studies import quick_predictor
from tests.studies import QuickGPSampler
from tests.studies import SPACE


GRID: dict[str, BaseDistribution] = {
    "learning_rate": CategoricalDistribution([float(r) for r in np.logspace(-4, 0, 9)]),
    "batch_size": CategoricalDistribution([4, 8, 16]),
    "momentum": CategoricalDistribution([0.0, 0.9]),
}


def _sampler(base: BaseSampler | None = None, **arguments: Any) -> TTPSampler:
    options = {"search_space": GRID, "exploration": 0.0, "seed": 0}
    return make_sampler(base, **{**options, **arguments})


def _on_grid(sampler: BaseSampler, n_trials: int, value: Any = None) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=sampler)
    for _ in range(n_trials):
        trial = study.ask(GRID)
        study.tell(trial, 0.0 if value is None else value(trial.params))
    return [trial.params for trial in study.trials]


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
    rates, batch_sizes, momenta = (
        d.choices for d in GRID.values() if isinstance(d, CategoricalDistribution)
    )
    return [
        {"learning_rate": r, "batch_size": b, "momentum": m}
        for r in rates
        for b in batch_sizes
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
    rates, batch_sizes, momenta = (np.array([p[n] for p in params]) for n in GRID)
    epochs = predictor.predict(rates, batch_sizes, momenta).epochs
    assert (epochs <= 20).all()


def test_values_teach_where_the_metric_is_good() -> None:
    # Good is what is neither deepest nor fastest: the largest momentum at a middling rate.
    def value(params: dict[str, Any]) -> float:
        return abs(math.log10(params["learning_rate"]) + 2) - float(params["momentum"])

    def best_after(sampler: BaseSampler, n_trials: int) -> float:
        return min(value(p) for p in _on_grid(sampler, n_trials, value))

    best_values = [
        best_after(_sampler(goal=BestMetric, max_epochs=20, seed=s), 15) for s in range(4)
    ]
    assert np.median(best_values) < 0.2


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
        forecast = Forecast.of(
            informed, one, np.array([60.0]), ForecastRules(), ends_at_target=True
        )
        return float(np.exp(forecast.log_success[0]))

    assert likely(True) < 0.2
    assert likely(False) > 0.7


def _paying(seconds: float) -> Any:
    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0.0, 1.0)
        trial.set_user_attr("ttp:paid", {"trial": trial.number, "seconds": seconds})
        return 1.0

    return objective


def test_cost_counts_for_less_as_the_budget_is_spent() -> None:
    def cost(spent: float) -> float:
        budget = StudyBudget(seconds=100.0)
        sampler = _sampler(goal=BestMetric, max_epochs=30, study_budget=budget)
        study = optuna.create_study(sampler=sampler)
        study.optimize(_paying(spent), n_trials=1)
        trial = study.ask(GRID)
        batch_size = trial.params["batch_size"]
        return float(math.ceil(24 / batch_size) * quick_predictor().seconds_per_step(batch_size))

    assert cost(0.0) <= cost(99.0)


def test_proposals_of_the_whole_search_are_faster_than_those_of_the_base() -> None:
    ours = predicted_seconds(proposals(_sampler(search_space=SPACE), 20))
    plain = predicted_seconds(proposals(TPESampler(seed=0), 20))
    assert np.median(ours) < 0.3 * np.median(plain)


@pytest.mark.parametrize("name", [field.name for field in fields(SamplerRules)])
def test_a_rule_of_the_wrong_kind_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a"):
        SamplerRules(**{name: "much"})  # type: ignore[arg-type]
