"""What is learned before a study: by a probe, and from earlier studies."""

from __future__ import annotations

from pathlib import Path
from typing import Any
import warnings

import numpy as np
import optuna
import pytest
import torch

from optuna_ttp import BestMetric
from optuna_ttp import compute_spectrum
from optuna_ttp import FineTuningTask
from optuna_ttp import FingerprintMismatchError
from optuna_ttp import Memory
from optuna_ttp import SpectrumStore
from optuna_ttp import TrainingTimePredictor
from optuna_ttp import TTPPruner
from optuna_ttp import UnreliablePredictionWarning
from optuna_ttp.spectrum import learned_throughput
from optuna_ttp.spectrum import Throughput
from optuna_ttp.study._learner import informed_by
from tests.models import mlp
from tests.models import separated
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


def _growing() -> tuple[torch.nn.Module, FineTuningTask, TrainingTimePredictor]:
    network = mlp()
    task = FineTuningTask(network, separated(24))
    spectrum = compute_spectrum(task, measure_speed=False, show_progress_bar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return network, task, TrainingTimePredictor(spectrum, target_fraction=0.2)


def test_a_short_run_learns_from_real_steps_and_leaves_the_network_alone() -> None:
    network, task, predictor = _growing()
    weights = {k: v.clone() for k, v in network.state_dict().items()}
    state = torch.get_rng_state()
    informed = predictor.short_run(task, 30)
    assert all(torch.equal(v, weights[k]) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert informed.calibration.n_observed == 1
    assert informed.short_run_seconds > 0.0
    # Full-batch training of the real network, which the short run has seen the beginning of.
    optimiser = torch.optim.SGD(network.parameters(), lr=0.3)
    x, y = separated(24)
    goal = predictor.target.value
    steps = 0
    while True:
        loss = torch.nn.functional.cross_entropy(network(x), y)
        if loss <= goal:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        steps += 1
    errors = [abs(float(p.predict(0.3, 24).steps) / steps - 1.0) for p in (predictor, informed)]
    assert errors[1] < max(0.1, errors[0])


@pytest.mark.parametrize(
    ("rate", "message"),
    [(1e-6, "fell by less than 5 %, .* more than 3 steps"), (1e6, "rose without bound")],
)
def test_a_short_run_without_progress_says_so(rate: float, message: str) -> None:
    _, task, predictor = _growing()
    with pytest.warns(
        UnreliablePredictionWarning, match=f"Nothing is learned from the short .*{message}"
    ):
        informed = predictor.short_run(task, 3, learning_rate=rate)
    assert informed.calibration.n_observed == 0
    assert informed.short_run_seconds > 0.0


@pytest.mark.parametrize("bad", [None, "sqlite:///x.db", 3])
def test_a_memory_without_a_store_is_named(bad: Any) -> None:
    with pytest.raises(TypeError, match="store must be a SpectrumStore but got"):
        Memory(bad)


def test_a_memory_of_no_predictor_is_named(tmp_path: Path) -> None:
    memory = Memory(_store(tmp_path))
    with pytest.raises(TypeError, match="predictor must be a TrainingTimePredictor but got"):
        memory.recall(_growing()[2].spectrum)  # type: ignore[type-var]
    assert repr(memory).startswith("Memory(SpectrumStore(")


def test_a_short_run_of_another_task_is_refused() -> None:
    _, _, predictor = _growing()
    with pytest.raises(FingerprintMismatchError, match="must be that of the spectrum"):
        predictor.short_run(FineTuningTask(mlp(seed=3), separated(24)))


def test_seconds_are_learned_from_trials_whatever_one_slow_machine_says() -> None:
    prior = Throughput(np.array([8, 32]), np.array([0.01, 0.02]), "cpu")
    sizes = np.array([8, 32, 16, 8, 32, 16, 8])
    seconds = 3.0 * prior.seconds_per_step(sizes)
    seconds[-1] *= 50.0
    learned = learned_throughput(prior, sizes, seconds)
    assert learned is not None
    np.testing.assert_allclose(learned.seconds_per_step([8, 16, 32]), [0.03, 0.04, 0.06], rtol=0.2)
    assert learned_throughput(prior, sizes[:0], seconds[:0]) is prior
    alone = learned_throughput(None, sizes[:-1], seconds[:-1])
    assert alone is not None
    np.testing.assert_allclose(alone.seconds_per_step([8, 32]), [0.03, 0.06], rtol=0.35)
