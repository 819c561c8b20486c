"""Our own conformance suite, on our pruner and on those of Optuna."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.pruners import HyperbandPruner
from optuna.pruners import MedianPruner
from optuna.pruners import NopPruner
from optuna.pruners import PatientPruner
from optuna.pruners import PercentilePruner
from optuna.pruners import SuccessiveHalvingPruner
from optuna.pruners import ThresholdPruner
from optuna.pruners import WilcoxonPruner
from optuna.trial import FrozenTrial
import pytest

from optuna_ttp import HyperparameterMap
from optuna_ttp.testing import PrunerTestCase
from tests.studies import make_pruner


pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


# The suite's parameter is called x.
def _rate(params: Mapping[str, Any]) -> float:
    return 0.05 + 0.1 * float(params["x"])


_MAP = HyperparameterMap(learning_rate=_rate, batch_size=8, momentum=0.0)
_FACTORIES: dict[str, Callable[[], BasePruner]] = {
    "ttp": lambda: make_pruner(hyperparameters=_MAP),
    "ttp-passing": lambda: make_pruner(),
    "ttp-median": lambda: make_pruner(MedianPruner(2), hyperparameters=_MAP),
    "ttp-shadow": lambda: make_pruner(
        MedianPruner(2), hyperparameters=_MAP, shadow=True, audit=0.5
    ),
    "nop": NopPruner,
    "median": lambda: MedianPruner(n_startup_trials=2),
    "percentile": lambda: PercentilePruner(25.0, n_startup_trials=2, n_warmup_steps=1),
    "patient": lambda: PatientPruner(MedianPruner(2), patience=1),
    "successive-halving": lambda: SuccessiveHalvingPruner(min_resource=1),
    "hyperband": lambda: HyperbandPruner(min_resource=1, max_resource=8),
}


class TestPruners(PrunerTestCase):
    @pytest.fixture(params=list(_FACTORIES.values()), ids=list(_FACTORIES))
    def pruner(self, request: pytest.FixtureRequest) -> Callable[[], BasePruner]:
        factory: Callable[[], BasePruner] = request.param
        return factory


class TestThreshold(PrunerTestCase):
    """It compares with a fixed number, whatever the direction is, and prunes NaN."""

    @pytest.fixture
    def pruner(self) -> Callable[[], BasePruner]:
        return lambda: ThresholdPruner(lower=-60.0, upper=60.0)


class TestWilcoxon(PrunerTestCase):
    """Its reports are a trial's values on one instance after another."""

    @pytest.fixture
    def pruner(self) -> Callable[[], BasePruner]:
        return lambda: WilcoxonPruner(p_threshold=0.1)


class _Wrong(BasePruner):
    def __init__(self, answer: Callable[[optuna.Study, FrozenTrial], Any]) -> None:
        self.answer = answer

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        answer: bool = self.answer(study, trial)
        return answer


def test_the_suite_finds_a_pruner_that_prunes_everything() -> None:
    with pytest.raises(AssertionError):
        PrunerTestCase().test_the_first_trial_runs(lambda: _Wrong(lambda *_: True), "minimize")


def test_the_suite_finds_answers_that_are_no_bools() -> None:
    with pytest.raises(AssertionError):
        PrunerTestCase().test_the_answer_is_a_bool(lambda: _Wrong(lambda *_: 0))


def test_the_suite_finds_a_pruner_that_ignores_the_direction() -> None:
    def large(study: optuna.Study, trial: FrozenTrial) -> bool:
        return trial.last_step is not None and trial.intermediate_values[trial.last_step] > 2

    with pytest.raises(AssertionError):
        PrunerTestCase().test_directions_mirror_each_other(lambda: _Wrong(large), "minimize")


def test_the_suite_finds_answers_that_change() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(AssertionError):
        PrunerTestCase().test_the_same_reports_get_the_same_answer(
            lambda: _Wrong(lambda *_: bool(rng.random() < 0.5))
        )
