from __future__ import annotations

import warnings

import pytest
import torch

from optuna_ttp import compute_spectrum
from optuna_ttp import FineTuningTask
from optuna_ttp import FingerprintMismatchError
from optuna_ttp import TrainingTimePredictor
from optuna_ttp import UnreliablePredictionWarning
from tests.models import mlp
from tests.models import separated


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


def test_a_short_run_of_another_task_is_refused() -> None:
    _, _, predictor = _growing()
    with pytest.raises(FingerprintMismatchError, match="must be that of the spectrum"):
        predictor.short_run(FineTuningTask(mlp(seed=3), separated(24)))
