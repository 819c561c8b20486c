"""Optuna's own conformance suites, around each kind of base sampler."""

from __future__ import annotations

from collections.abc import Callable

from optuna.samplers import BaseSampler
from optuna.samplers import RandomSampler
from optuna.samplers import TPESampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase
from optuna.testing.pytest_samplers import MultiObjectiveSamplerTestCase
from optuna.testing.pytest_samplers import RelativeSamplerTestCase
import pytest

from optuna_ttp import BestMetric
from optuna_ttp import FastestToTarget
from optuna_ttp import HyperparameterMap
from optuna_ttp import SamplerRules
from optuna_ttp import TTPSampler
from tests.models import small_predictor
from tests.studies import QuickGPSampler


# The suites' parameters are called x and y, or param_0 and so on. With a map that reads `x`, our
# own choice between candidates is at work; with the default map, this is the base sampler.
def _choosing(base: BaseSampler) -> TTPSampler:
    mapping = HyperparameterMap(
        learning_rate=lambda p: 0.1 + 0.01 * abs(p["x"]) if _is_number(p.get("x")) else None,
        batch_size=8,
        momentum=0.0,
    )
    # Without exploration, the suites' relative proposals always are our own.
    return TTPSampler(
        small_predictor(),
        FastestToTarget(),
        base,
        hyperparameters=mapping,
        seed=0,
        rules=SamplerRules(n_candidates=3, exploration=0.0),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _passing(base: BaseSampler) -> TTPSampler:
    return TTPSampler(small_predictor(), BestMetric(), base, seed=0)


def _gp() -> BaseSampler:
    return QuickGPSampler(n_startup_trials=0, deterministic_objective=True)


_CHOOSING: dict[str, Callable[[], BaseSampler]] = {
    "random-choosing": lambda: _choosing(RandomSampler()),
    "tpe-choosing": lambda: _choosing(TPESampler(n_startup_trials=0)),
    "gp-choosing": lambda: _choosing(_gp()),
}
_ALL: dict[str, Callable[[], BaseSampler]] = {
    **_CHOOSING,
    "random-passing": lambda: _passing(RandomSampler()),
    "tpe-passing": lambda: _passing(TPESampler(n_startup_trials=0)),
    "gp-passing": lambda: _passing(_gp()),
}


class TestBasic(BasicSamplerTestCase):
    @pytest.fixture(params=list(_ALL.values()), ids=list(_ALL))
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        factory: Callable[[], BaseSampler] = request.param
        return factory


class TestRelative(RelativeSamplerTestCase):
    @pytest.fixture(params=list(_CHOOSING.values()), ids=list(_CHOOSING))
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        factory: Callable[[], BaseSampler] = request.param
        return factory


class TestMultiObjective(MultiObjectiveSamplerTestCase):
    @pytest.fixture(params=list(_CHOOSING.values()), ids=list(_CHOOSING))
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        factory: Callable[[], BaseSampler] = request.param
        return factory
