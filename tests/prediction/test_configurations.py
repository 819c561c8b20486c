from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
import torch

from optuna_ttp.prediction import TrainingTimePredictor
from tests.cases import spectrum
from tests.predictors import linear_predictor


def test_shapes_that_do_not_go_together_are_named() -> None:
    predictor = linear_predictor()
    with pytest.raises(ValueError, match=r"but got learning_rate \(2,\), batch_size \(3,\)\."):
        predictor.predict([0.1, 0.2], [4, 5, 6])
    with pytest.raises(ValueError, match=r"but got batch_size \(2,\), momentum \(3,\)\."):
        predictor.max_learning_rate([4, 5], [0.0, 0.5, 0.9])


@pytest.mark.parametrize("max_steps", [0, -1, 1.5, math.inf, math.nan, True], ids=str)
def test_horizon_that_is_no_positive_integer_is_refused(max_steps: Any) -> None:
    with pytest.raises(ValueError, match="max_steps must be a positive integer but got"):
        linear_predictor(max_steps=max_steps)


@pytest.mark.parametrize("max_steps", [0, -1, math.inf, math.nan, [5, 0]], ids=str)
def test_horizon_of_a_prediction_out_of_range_is_refused(max_steps: Any) -> None:
    with pytest.raises(ValueError, match="max_steps must be a positive integer but got"):
        linear_predictor().predict(0.1, 4, max_steps=max_steps)


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ((0.0, 4, 0.0), r"learning_rate must be positive and finite but got 0\.0\."),
        ((-0.1, 4, 0.0), "learning_rate must be positive and finite but got -0.1"),
        ((math.nan, 4, 0.0), "learning_rate must be positive and finite but got nan"),
        ((math.inf, 4, 0.0), "learning_rate must be positive and finite but got inf"),
        ((0.1, 0, 0.0), "batch_size must be a whole number from 1 to .* 12, but got 0"),
        ((0.1, -3, 0.0), "batch_size must be a whole number from 1 to .* 12, but got -3"),
        ((0.1, 13, 0.0), "batch_size must be a whole number from 1 to .* 12, but got 13"),
        ((0.1, 2.5, 0.0), "batch_size must be a whole number from 1 to .* 12, but got 2.5"),
        ((0.1, math.nan, 0.0), "batch_size must be a whole number .* but got nan"),
        ((0.1, 4, 1.0), r"momentum must be in \[0, 1\) but got 1.0"),
        ((0.1, 4, -0.1), r"momentum must be in \[0, 1\) but got -0.1"),
        ((0.1, 4, math.nan), r"momentum must be in \[0, 1\) but got nan"),
        (([0.1, -1.0], 4, 0.0), "learning_rate must be positive and finite but got -1.0"),
        (([], 4, 0.0), "At least one configuration"),
        (([0.1, 0.2], [4, 5, 6], 0.0), "shapes that go together"),
    ],
    ids=str,
)
def test_bad_hyperparameters_are_refused(configuration: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_predictor().predict(*configuration)


@given(
    learning_rate=st.floats(allow_nan=True, allow_infinity=True),
    batch_size=st.floats(-3, 20) | st.integers(-3, 20),
    momentum=st.floats(-0.5, 1.5) | st.just(math.nan),
)
@settings(max_examples=60)
def test_any_numbers_give_a_prediction_or_a_value_error(
    learning_rate: float, batch_size: float, momentum: float
) -> None:
    predictor = linear_predictor(max_steps=20)
    good = (
        0 < learning_rate < math.inf
        and 1 <= batch_size <= 12
        and batch_size == int(batch_size)
        and 0 <= momentum < 1
    )
    if good:
        prediction = predictor.predict(learning_rate, batch_size, momentum)
        assert prediction.outcome in ("converges", "diverges", "not_reached")
    else:
        with pytest.raises(ValueError, match="must be"):
            predictor.predict(learning_rate, batch_size, momentum)


def test_whole_batch_sizes_may_be_floats() -> None:
    predictor = linear_predictor()
    assert predictor.predict(0.1, 4.0).steps == predictor.predict(0.1, 4).steps
    assert predictor.predict(0.1, 4.0).batch_size.dtype == np.int64


def test_horizon_that_is_not_whole_is_refused() -> None:
    predictor = linear_predictor()
    for ask in (predictor.predict, predictor.estimate):
        with pytest.raises(ValueError, match=r"positive integer but got 2\.5"):
            ask(0.1, 4, max_steps=[10, 2.5])


@pytest.mark.parametrize(
    "rate", [True, "fast", "0.05", torch.tensor(0.1, requires_grad=True), [0.1, [0.2]], {}]
)
def test_learning_rates_that_are_no_numbers_are_refused(rate: Any) -> None:
    predictor = TrainingTimePredictor(spectrum(), target_fraction=0.5)
    with pytest.raises(TypeError, match="learning_rate must be numbers but got"):
        predictor.predict(rate, 4)
