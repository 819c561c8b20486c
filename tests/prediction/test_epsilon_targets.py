"""Targets within a share of where the loss ends."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
from numpy.typing import NDArray
import pytest

from optuna_ttp.dynamics import Smoothing
from optuna_ttp.dynamics import Target
from optuna_ttp.prediction import PredictorSettings
from optuna_ttp.prediction import TrainingTimePredictor
from tests.cases import linear_task
from tests.validated import linear_spectrum
from tests.validated import LOSSES
from tests.validated import train


def _settling(losses: NDArray[np.float64], share: float) -> int:
    """The paper's T_eps, by definition."""
    epsilon = share * abs(losses[0] - losses[-1])
    return next(t for t, loss in enumerate(losses) if abs(loss - losses[-1]) <= epsilon)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
@pytest.mark.parametrize(("batch_size", "momentum"), [(12, 0.0), (12, 0.9), (5, 0.5)])
def test_epsilon_is_reached_when_real_training_reaches_it(
    batch_size: int, momentum: float, share: float
) -> None:
    rate = 0.05 * (1.0 - momentum)
    losses = train(linear_task(), LOSSES["cross-entropy"], batch_size, 400, rate, momentum)["loss"]
    predictor = TrainingTimePredictor(
        linear_spectrum(),
        target_epsilon=share,
        max_steps=400,
        settings=PredictorSettings(n_seeds=1),
    )
    prediction = predictor.predict(rate, batch_size, momentum)
    assert prediction.strides.item() == 1
    # The curve is recorded every 4 %, which smooths the noise of mini-batches.
    tolerance = 0.02 if batch_size == 12 else 0.15
    assert prediction.steps.item() == pytest.approx(_settling(losses, share), rel=tolerance, abs=1)


def test_epsilon_of_the_simulated_curve() -> None:
    predictor = TrainingTimePredictor(
        linear_spectrum(), target_epsilon=0.1, max_steps=500, settings=PredictorSettings(n_seeds=1)
    )
    prediction = predictor.predict([0.05, 0.02], [12, 3], max_steps=[500, 150])
    for k, horizon in enumerate((500, 150)):
        known = np.isfinite(prediction.curve_steps[k])
        steps = prediction.curve_steps[k][known]
        assert steps[-1] == horizon
        whole = np.interp(np.arange(horizon + 1), steps, prediction.curve_losses[k][known])
        assert prediction.steps[k] == _settling(whole, 0.1)
    assert (prediction.outcomes == "converges").all()


def test_epsilon_of_a_smoothed_curve() -> None:
    smoothing = Smoothing.moving_average(8)
    predictor = TrainingTimePredictor(
        linear_spectrum(),
        target_epsilon=0.1,
        max_steps=300,
        settings=PredictorSettings(smoothing=smoothing, n_seeds=1),
    )
    assert predictor.target == Target("smoothed_loss", 0.1, settled=True)
    prediction = predictor.predict(0.05, 12)
    whole = np.interp(np.arange(301), prediction.curve_steps, prediction.curves["smoothed_loss"])
    assert prediction.steps.item() == _settling(whole, 0.1)


def test_smaller_epsilon_takes_longer_and_so_does_a_longer_horizon() -> None:
    times = [
        TrainingTimePredictor(linear_spectrum(), target_epsilon=share, max_steps=horizon)
        .predict(0.02, 12)
        .steps.item()
        for horizon in (100, 400)
        for share in (0.3, 0.1, 0.03)
    ]
    assert times[:3] == sorted(times[:3])
    assert times[3:] == sorted(times[3:])
    assert all(longer > shorter for shorter, longer in zip(times[:3], times[3:], strict=True))


@given(
    values=st.lists(st.floats(1e-3, 10), min_size=2, max_size=20),
    gaps=st.lists(st.integers(1, 9), min_size=20, max_size=20),
    share=st.floats(0.01, 0.99),
)
@settings(max_examples=60)
def test_settling_is_its_definition_on_every_curve(
    values: list[float], gaps: list[int], share: float
) -> None:
    steps = np.concatenate([[0], np.cumsum(gaps)])[: len(values)].astype(float)
    whole = np.interp(np.arange(steps[-1] + 1), steps, values)
    target = Target("loss", share, settled=True)
    padded_steps = np.concatenate([steps, [math.nan] * 3])
    padded = np.concatenate([values, [math.nan] * 3])
    assert target.first_passage(padded_steps, padded) == _settling(whole, share)
    assert not target.reached(np.array(values)).any()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, math.nan, 5.0])
def test_bad_epsilon_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"target_epsilon must be in \(0, 1\) but got"):
        TrainingTimePredictor(linear_spectrum(), target_epsilon=share)
