from __future__ import annotations

import copy
import pickle

from hypothesis import assume
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
import torch

from optuna_ttp.prediction import PredictorSettings
from optuna_ttp.prediction import TrainingTimePredictor
from optuna_ttp.spectrum import Throughput
from tests.cases import linear_task
from tests.cases import spectrum
from tests.observations import slower
from tests.predictors import assert_same
from tests.predictors import linear_predictor


@pytest.mark.parametrize(
    ("learning_rate", "batch_size", "momentum"),
    [(0.3, 12, 0.0), (0.05, 12, 0.9), (0.02, 5, 0.0), (0.01, 5, 0.9), (0.003, 1, 0.5)],
)
@pytest.mark.parametrize("exact", [True, False])
def test_predicted_steps_are_those_of_real_training_of_a_linear_model(
    learning_rate: float, batch_size: int, momentum: float, exact: bool
) -> None:
    predictor = linear_predictor(exact=exact)
    prediction = predictor.predict(learning_rate, batch_size, momentum)
    task = linear_task()
    model, (x, y) = copy.deepcopy(task.model), task._dataset.tensors
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum)
    generator = torch.Generator().manual_seed(0)
    batches: list[torch.Tensor] = []
    n_steps = 0
    while True:
        with torch.no_grad():
            if torch.nn.functional.cross_entropy(model(x), y) <= predictor.target.value:
                break
        if not batches:
            batches = list(torch.randperm(len(x), generator=generator).split(batch_size))
        batch = batches.pop(0)
        optimizer.zero_grad()
        torch.autograd.backward(torch.nn.functional.cross_entropy(model(x[batch]), y[batch]))
        optimizer.step()
        n_steps += 1
    assert prediction.outcome == "converges"
    # The loss is recorded every 4 %, and oscillates with the mini-batches.
    tolerance = 1 if batch_size == 12 else 0.06 * n_steps
    assert prediction.steps.item() == pytest.approx(n_steps, rel=0.02, abs=tolerance)


def test_what_is_no_spectrum_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a Spectrum but got FineTuningTask"):
        TrainingTimePredictor(linear_task(), target_loss=0.1)  # type: ignore[arg-type]


def test_seconds_are_steps_times_seconds_per_step() -> None:
    prediction = linear_predictor().predict(0.1, [1, 4, 12])
    np.testing.assert_allclose(prediction.seconds, prediction.steps * [0.001, 0.004, 0.012])


def test_seconds_are_not_known_without_throughput() -> None:
    predictor = TrainingTimePredictor(spectrum(), target_fraction=0.6)
    assert np.isnan(predictor.predict(0.1, [4, 12]).seconds).all()
    assert np.isnan(predictor.seconds_per_step(4))
    slow = Throughput(np.array([1]), np.array([2.0]), device="somewhere")
    predictor = TrainingTimePredictor(
        spectrum(), target_fraction=0.6, settings=PredictorSettings(throughput=slow)
    )
    prediction = predictor.predict(0.1, 4)
    assert prediction.seconds == 2.0 * prediction.steps


def test_same_seed_gives_the_same_and_another_seed_another_curve() -> None:
    configuration = ([0.1, 0.02], [3, 5], 0.5)
    first, same, other = (linear_predictor(seed=s).predict(*configuration) for s in (7, 7, 8))
    assert_same(first, same)
    n = min(first.curve_losses.shape[1], other.curve_losses.shape[1])
    assert not np.allclose(first.curve_losses[:, :n], other.curve_losses[:, :n], equal_nan=True)


def test_prediction_changes_no_random_state() -> None:
    before = torch.get_rng_state()
    linear_predictor().predict(0.1, 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_pickled_predictor_predicts_the_same() -> None:
    predictor = linear_predictor(max_steps=500, seed=3).calibrated(slower(1.3))
    expected = predictor.predict([0.1, 0.01], 5, 0.5)
    predictor.score(0.1, 5)
    data = pickle.dumps(predictor)
    # What is derived from the spectrum does not travel.
    parts = pickle.dumps(predictor.spectrum), pickle.dumps(predictor.calibration)
    assert len(data) < 1.5 * sum(map(len, parts))
    assert_same(pickle.loads(data).predict([0.1, 0.01], 5, 0.5), expected)


def test_prediction_on_every_device_is_the_same(device: torch.device) -> None:
    expected = linear_predictor().predict([0.05, 0.1], 12, 0.5)
    actual = linear_predictor(device=str(device)).predict([0.05, 0.1], 12, 0.5)
    np.testing.assert_array_equal(actual.steps, expected.steps)


@given(batch_sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)), momentum=st.floats(0, 0.98))
@settings(max_examples=30)
def test_stability_limit_rises_with_the_batch_size(
    batch_sizes: tuple[int, int], momentum: float
) -> None:
    assume(batch_sizes[0] != batch_sizes[1])
    low, high = linear_predictor().max_learning_rate(sorted(batch_sizes), momentum)
    assert 0 < low <= high


def test_learning_rate_far_above_the_limit_diverges() -> None:
    predictor = linear_predictor(max_steps=2000)
    limit = predictor.max_learning_rate([2, 12], 0.9)
    assert (predictor.predict(10 * limit, [2, 12], 0.9).outcomes == "diverges").all()
    assert (predictor.predict(0.1 * limit, [2, 12], 0.9).outcomes == "converges").all()
    np.testing.assert_allclose(predictor.predict(limit, [2, 12], 0.9).stability, 1.0)


@pytest.mark.parametrize("device", ["xyz", "meta", "cuda:77"])
def test_devices_that_cannot_be_used_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="device must be one that torch can use here but got"):
        TrainingTimePredictor(
            spectrum(), target_fraction=0.5, settings=PredictorSettings(device=device)
        )
