"""What is learned before a study: from the trials of earlier studies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from optuna_ttp import BestMetric
from optuna_ttp import Memory
from optuna_ttp import SpectrumStore
from optuna_ttp import TTPPruner
from optuna_ttp.spectrum import learned_throughput
from optuna_ttp.spectrum import Throughput
from optuna_ttp.study._learner import informed_by
from tests.models import small_spectrum
from tests.studies import add_observed
from tests.studies import quick_predictor


# Made-up curves that are late or early by the same factor from the first step on.
pytestmark = pytest.mark.filterwarnings("ignore:Training begins")


def _store(folder: Path) -> SpectrumStore:
    return SpectrumStore(f"sqlite:///{folder / 'ttp.db'}")


def _observed_study(memory: Memory, factor: float) -> optuna.Study:
    study = optuna.create_study(
        study_name="first", pruner=TTPPruner(quick_predictor(), BestMetric())
    )
    add_observed(study, lambda steps: factor * steps)
    for trial in study.trials:
        memory(study, trial)
    return study


def test_the_next_study_begins_with_what_the_first_one_learned(tmp_path: Path) -> None:
    predictor = quick_predictor()
    memory = Memory(_store(tmp_path))
    assert memory.recall(predictor) is predictor
    study = _observed_study(memory, 2.0)
    learned = informed_by(study, predictor)
    again = Memory(_store(tmp_path)).recall(predictor)
    assert again.calibration.n_observed == learned.calibration.n_observed == len(study.trials)
    before, first, second = (p.predict(0.1, 8).steps for p in (predictor, learned, again))
    assert 1.6 < float(first / before) < 2.4
    np.testing.assert_allclose(second, first, atol=1)


def test_a_study_that_goes_on_counts_its_trials_once(tmp_path: Path) -> None:
    predictor = quick_predictor()
    memory = Memory(_store(tmp_path))
    memory.recall(predictor)
    study = _observed_study(memory, 1.5)
    recalled = Memory(_store(tmp_path)).recall(predictor)
    assert informed_by(study, recalled).calibration.n_observed == len(study.trials)


def test_a_memory_that_recalled_nothing_cannot_be_a_callback(tmp_path: Path) -> None:
    study = optuna.create_study()
    study.add_trial(optuna.create_trial(value=1.0))
    with pytest.raises(RuntimeError, match="must recall"):
        Memory(_store(tmp_path))(study, study.trials[0])


@pytest.mark.parametrize("bad", [None, "sqlite:///x.db", 3])
def test_a_memory_without_a_store_is_named(bad: Any) -> None:
    with pytest.raises(TypeError, match="store must be a SpectrumStore but got"):
        Memory(bad)


def test_a_memory_of_no_predictor_is_named(tmp_path: Path) -> None:
    memory = Memory(_store(tmp_path))
    with pytest.raises(TypeError, match="predictor must be a TrainingTimePredictor but got"):
        memory.recall(small_spectrum())  # type: ignore[type-var]
    assert repr(memory).startswith("Memory(SpectrumStore(")


def test_seconds_are_learned_from_trials_whatever_one_slow_machine_says() -> None:
    prior = Throughput(np.array([8, 32]), np.array([0.01, 0.02]), "cpu")
    batch_sizes = np.array([8, 32, 16, 8, 32, 16, 8])
    seconds = 3.0 * prior.seconds_per_step(batch_sizes)
    seconds[-1] *= 50.0
    learned = learned_throughput(prior, batch_sizes, seconds)
    assert learned is not None
    np.testing.assert_allclose(learned.seconds_per_step([8, 16, 32]), [0.03, 0.04, 0.06], rtol=0.2)
    assert learned_throughput(prior, batch_sizes[:0], seconds[:0]) is prior
    alone = learned_throughput(None, batch_sizes[:-1], seconds[:-1])
    assert alone is not None
    np.testing.assert_allclose(alone.seconds_per_step([8, 32]), [0.03, 0.06], rtol=0.35)
