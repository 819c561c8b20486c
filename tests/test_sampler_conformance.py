"""Optuna's own conformance suites, around each kind of base sampler."""

from __future__ import annotations

from collections.abc import Callable

from optuna.samplers import BaseSampler
from optuna.samplers import GPSampler
from optuna.samplers import RandomSampler
from optuna.samplers import TPESampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase
from optuna.testing.pytest_samplers import MultiObjectiveSamplerTestCase
from optuna.testing.pytest_samplers import RelativeSamplerTestCase
import pytest

from optuna_ttp import HyperparameterMap
from optuna_ttp import TTPSampler
from tests.models import small_predictor


# The suites' parameters are called x and y, or param_0 and so on. With a map that reads `x`, our
# own choice between candidates is at work; with the default map, this is the base sampler.
def _choosing(base: BaseSampler) -> TTPSampler:
    mapping = HyperparameterMap(
        learning_rate=lambda p: 1e-3 * (1.0 + abs(p["x"])) if _is_number(p["x"]) else None,
        batch_size=8,
        momentum=0.0,
    )
    return TTPSampler(small_predictor(), base, hyperparameters=mapping, seed=0)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _passing(base: BaseSampler) -> TTPSampler:
    return TTPSampler(small_predictor(), base, seed=0)


def _relative_bases() -> list[Callable[[], BaseSampler]]:
    return [
        lambda: _passing(TPESampler(n_startup_trials=0)),
        lambda: _choosing(TPESampler(n_startup_trials=0)),
        lambda: _passing(GPSampler(n_startup_trials=0, deterministic_objective=True)),
        lambda: _choosing(GPSampler(n_startup_trials=0)),
    ]


_IDS = ["tpe-passing", "tpe-choosing", "gp-passing", "gp-choosing"]


class TestBasic(BasicSamplerTestCase):
    @pytest.fixture(
        params=[
            lambda: _passing(RandomSampler()),
            lambda: _choosing(RandomSampler()),
            *_relative_bases(),
        ],
        ids=["random-passing", "random-choosing", *_IDS],
    )
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        factory: Callable[[], BaseSampler] = request.param
        return factory


class TestRelative(RelativeSamplerTestCase):
    @pytest.fixture(params=_relative_bases(), ids=_IDS)
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        factory: Callable[[], BaseSampler] = request.param
        return factory


class TestMultiObjective(MultiObjectiveSamplerTestCase):
    @pytest.fixture(
        params=[
            lambda: _passing(RandomSampler()),
            lambda: _choosing(RandomSampler()),
            *_relative_bases(),
        ],
        ids=["random-passing", "random-choosing", *_IDS],
    )
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        factory: Callable[[], BaseSampler] = request.param
        return factory
