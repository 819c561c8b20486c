from __future__ import annotations

import copy
from dataclasses import replace
import math
from typing import Any

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
from numpy.typing import NDArray
import pytest
import torch

from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import SGDConfigurations
from optuna_ttp.dynamics import simulate
from optuna_ttp.dynamics import Smoothing
from optuna_ttp.prediction import PredictorSettings
from optuna_ttp.prediction import TrainingTimePredictor
from optuna_ttp.spectrum import Spectrum
from tests.cases import linear_task
from tests.cases import spectrum
from tests.predictors import predictor_with


_FILTERS = [
    Smoothing.moving_average(1),
    Smoothing.moving_average(3),
    Smoothing.moving_average(25),
    Smoothing.exponential(0.0),
    Smoothing.exponential(0.9),
]


def _linear(loss: str = "cross_entropy") -> Spectrum:
    """Of a linear model, without a probe: nothing is guessed of how its kernel grows."""
    return replace(spectrum(loss), probe=None)


def _smoothed(smoothing: Smoothing, losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """The definition, one value after the other."""
    smoothed: list[float] = []
    for t, loss in enumerate(losses):
        if smoothing.kind == "moving_average":
            smoothed.append(float(np.mean(losses[max(0, t + 1 - int(smoothing.width)) : t + 1])))
        else:
            before = smoothed[-1] if smoothed else loss
            smoothed.append(smoothing.width * before + (1.0 - smoothing.width) * loss)
    return np.array(smoothed)


def _batch_losses(
    batch_size: int,
    learning_rate: float,
    momentum: float,
    n_steps: int,
    seed: int,
    sampling: str = "shuffle",
) -> NDArray[np.float64]:
    """Loss of each mini-batch just before the step, as a training loop logs it."""
    task = linear_task()
    model, (x, y) = copy.deepcopy(task.model), task._dataset.tensors
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    batches: list[torch.Tensor] = []
    for _ in range(n_steps + 1):
        if not batches:
            if sampling == "shuffle":
                order = torch.randperm(len(x), generator=generator)
            else:
                order = torch.randint(len(x), (len(x),), generator=generator)
            batches = list(order.split(batch_size))
        batch = batches.pop(0)
        loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
        losses.append(loss.item())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return np.array(losses)


# The filter


@given(
    losses=st.lists(st.floats(0, 1e4), min_size=1, max_size=40),
    smoothing=st.one_of(
        st.integers(1, 50).map(Smoothing.moving_average),
        st.floats(0, 0.999).map(Smoothing.exponential),
    ),
)
def test_filter_equals_its_definition(losses: list[float], smoothing: Smoothing) -> None:
    values = np.array(losses)
    actual = smoothing.apply(values)
    np.testing.assert_allclose(actual, _smoothed(smoothing, values), rtol=1e-9, atol=1e-8)
    assert actual[0] == pytest.approx(values[0])


@pytest.mark.parametrize("smoothing", _FILTERS, ids=str)
def test_filter_works_along_the_last_axis(smoothing: Smoothing) -> None:
    values = np.random.default_rng(0).random((2, 3, 30))
    actual = smoothing.apply(values)
    assert actual.shape == values.shape
    for i in range(2):
        for j in range(3):
            np.testing.assert_allclose(actual[i, j], _smoothed(smoothing, values[i, j]))
    np.testing.assert_array_equal(smoothing.apply(values[0, 0].tolist()), actual[0, 0])


@pytest.mark.parametrize("smoothing", _FILTERS, ids=str)
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4])
def test_filter_of_short_curves(smoothing: Smoothing, length: int) -> None:
    values = np.arange(length, dtype=np.float64)
    np.testing.assert_allclose(smoothing.apply(values), _smoothed(smoothing, values))


@pytest.mark.parametrize("smoothing", _FILTERS, ids=str)
def test_filter_leaves_constants_alone(smoothing: Smoothing) -> None:
    np.testing.assert_allclose(smoothing.apply(np.full(60, 2.5)), 2.5, rtol=1e-12)


def test_widths_that_do_nothing() -> None:
    values = np.random.default_rng(1).random(20)
    for smoothing in (Smoothing.moving_average(1), Smoothing.exponential(0.0)):
        np.testing.assert_allclose(smoothing.apply(values), values, rtol=1e-12)


def test_moving_average_forgets_a_spike() -> None:
    values = np.ones(30)
    values[5] = math.inf
    smoothed = Smoothing.moving_average(4).apply(values)
    np.testing.assert_array_equal(smoothed[:5], 1.0)
    assert np.isinf(smoothed[5:9]).all()
    np.testing.assert_array_equal(smoothed[9:], 1.0)


@pytest.mark.parametrize("window", [0, -1, 2.5, math.nan, math.inf], ids=str)
def test_bad_windows_are_refused(window: Any) -> None:
    with pytest.raises(ValueError, match="window must be a positive integer but got"):
        Smoothing.moving_average(window)


@pytest.mark.parametrize("weight", [-0.1, 1.0, 1.5, math.nan, math.inf], ids=str)
def test_bad_weights_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"weight of the past must be in \[0, 1\) but got"):
        Smoothing.exponential(weight)


def test_unknown_kind_is_refused() -> None:
    kind: Any = "median"
    with pytest.raises(ValueError, match="'median'"):
        Smoothing(kind, 3)


# In a simulation


@pytest.mark.parametrize("smoothing", _FILTERS, ids=str)
@pytest.mark.parametrize("sampling", ["shuffle", "replacement"])
@pytest.mark.parametrize(("batch_size", "momentum"), [(5, 0.0), (1, 0.5), (4, 0.9)])
def test_smoothed_curve_is_that_of_real_mini_batch_losses(
    batch_size: int, momentum: float, sampling: Any, smoothing: Smoothing
) -> None:
    model = LinearisedModel.from_spectrum(spectrum(), dtype=torch.float64)
    curves = simulate(
        model,
        SGDConfigurations.of(0.02, momentum),
        np.array([batch_size]),
        max_steps=np.array([60]),
        smoothing=smoothing,
        sampling=sampling,
        seed=4,
    )
    losses = _batch_losses(batch_size, 0.02, momentum, 60, 4, sampling)
    steps = curves.steps[0].astype(int)
    expected = _smoothed(smoothing, losses)[steps]
    np.testing.assert_allclose(curves.curves["smoothed_loss"][0], expected, rtol=1e-8)


def test_smoothing_of_slow_training_takes_no_coarse_steps() -> None:
    model = LinearisedModel.from_spectrum(spectrum(), dtype=torch.float64)
    settings: dict[str, Any] = {"max_steps": np.array([500])}
    sgd = SGDConfigurations.of(1e-5)
    assert simulate(model, sgd, np.array([4]), **settings).strides[0] > 1
    smoothed = simulate(
        model, sgd, np.array([4]), smoothing=Smoothing.exponential(0.5), **settings
    )
    assert smoothed.strides[0] == 1


def test_curves_smoothed_together_equal_each_alone() -> None:
    model = LinearisedModel.from_spectrum(spectrum(), dtype=torch.float64)
    smoothing = Smoothing.moving_average(6)
    rates, steps = np.array([0.05, 1e30, 0.02]), np.array([40, 80, 60])
    together = simulate(
        model, SGDConfigurations.of(rates), np.full(3, 4), max_steps=steps, smoothing=smoothing
    ).curves["smoothed_loss"]
    for k in range(3):
        alone = simulate(
            model,
            SGDConfigurations.of(rates[k]),
            np.array([4]),
            max_steps=steps[k : k + 1],
            smoothing=smoothing,
        ).curves["smoothed_loss"][0]
        np.testing.assert_allclose(together[k, : len(alone)], alone, rtol=1e-12)
        assert np.isnan(together[k, len(alone) :]).all()


# In a prediction


@pytest.mark.parametrize("smoothing", _FILTERS[1:], ids=str)
@pytest.mark.parametrize(("batch_size", "momentum"), [(5, 0.0), (4, 0.9), (12, 0.5)])
def test_predicted_curve_and_steps_are_those_of_a_smoothed_training_log(
    batch_size: int, momentum: float, smoothing: Smoothing
) -> None:
    rate = 0.01 * (1.0 - momentum)
    predictor = TrainingTimePredictor(
        _linear(),
        target_fraction=0.6,
        settings=PredictorSettings(smoothing=smoothing, n_seeds=1, seed=7),
    )
    prediction = predictor.predict(rate, batch_size, momentum, max_steps=600, full_curve=True)
    logged = smoothing.apply(_batch_losses(batch_size, rate, momentum, 600, 7))
    steps = prediction.curve_steps.astype(int)
    np.testing.assert_allclose(prediction.curves["smoothed_loss"], logged[steps], rtol=1e-3)
    value = predictor.target.value
    assert value == pytest.approx(0.6 * predictor.initial_loss)
    # The curve is looked at every 4 %.
    first = steps[np.argmax(logged[steps] <= value)]
    before = steps[np.argmax(logged[steps] <= value) - 1]
    assert before < prediction.steps.item() <= first
    assert np.argmax(logged <= value) <= first


def test_smoothed_loss_lags_behind() -> None:
    steps = [
        TrainingTimePredictor(
            _linear(), target_fraction=0.6, settings=PredictorSettings(smoothing=smoothing)
        )
        .predict(0.02, 12)
        .steps.item()
        for smoothing in (None, Smoothing.moving_average(10), Smoothing.moving_average(40))
    ]
    assert steps[0] < steps[1] < steps[2]
    # A mean over a window is as old as half of it.
    assert steps[1] - steps[0] == pytest.approx(4.5, abs=2)


def test_loss_without_smoothing_has_no_smoothed_curve() -> None:
    prediction = TrainingTimePredictor(_linear(), target_fraction=0.6).predict(0.02, 4)
    assert "smoothed_loss" not in prediction.curves
    with_smoothing = TrainingTimePredictor(
        _linear(),
        target_accuracy=0.6,
        settings=PredictorSettings(smoothing=Smoothing.moving_average(3)),
    )
    prediction = with_smoothing.predict(0.02, 4)
    assert "smoothed_loss" in prediction.curves
    assert with_smoothing.target.quantity == "accuracy"


@pytest.mark.parametrize("quantity", ["target_fraction", "target_accuracy", "target_epsilon"])
def test_smoothed_loss_of_a_truncated_spectrum(quantity: str) -> None:
    arguments: dict[str, Any] = {quantity: 0.7, "smoothing": Smoothing.exponential(0.5)}
    cut = _linear().truncate(explained_trace=0.99)
    assert cut.explained_trace < 1.0 - 1e-6
    prediction = predictor_with(cut, max_steps=300, **arguments).predict(0.1, 6)
    assert prediction.outcome == "converges"
    assert prediction.steps_high > prediction.steps


@pytest.mark.parametrize("quantity", ["target_fraction", "target_accuracy"])
def test_smoothed_loss_of_more_samples_than_the_spectrum_has(quantity: str) -> None:
    arguments: dict[str, Any] = {quantity: 0.7, "n_samples": 24}
    smoothed, plain = (
        predictor_with(_linear(), max_steps=2000, smoothing=smoothing, **arguments)
        for smoothing in (Smoothing.exponential(0.5), None)
    )
    assert plain.predict(0.1, 6).outcome == smoothed.predict(0.1, 6).outcome == "converges"
    # A filter of two steps does not change how the time depends on the number of samples.
    expected = plain.sample_convergence()
    actual = smoothed.sample_convergence()
    np.testing.assert_allclose(actual.log_times, expected.log_times, atol=0.7)


def test_what_is_no_smoothing_is_refused() -> None:
    wrong: Any = 0.9
    with pytest.raises(TypeError, match=r"smoothing must be a Smoothing but got 0.9"):
        TrainingTimePredictor(
            _linear(), target_fraction=0.5, settings=PredictorSettings(smoothing=wrong)
        )


@pytest.mark.parametrize("method", ["sde", "ode"])
def test_smoothing_of_the_papers_equation_is_refused(method: Any) -> None:
    with pytest.raises(ValueError, match=r'belongs? to method="linear" but got'):
        TrainingTimePredictor(
            _linear(),
            target_fraction=0.5,
            settings=PredictorSettings(method=method, smoothing=Smoothing.exponential(0.9)),
        )


@given(weight=st.floats(0, 0.99), window=st.integers(1, 60))
@settings(max_examples=15)
def test_every_smoothing_gives_a_prediction(weight: float, window: int) -> None:
    for smoothing in (Smoothing.exponential(weight), Smoothing.moving_average(window)):
        predictor = TrainingTimePredictor(
            _linear(),
            target_fraction=0.6,
            max_steps=400,
            settings=PredictorSettings(smoothing=smoothing, n_seeds=1),
        )
        prediction = predictor.predict(0.05, [4, 12])
        assert (prediction.outcomes == "converges").all()
        assert (prediction.steps_low <= prediction.steps).all()
