from __future__ import annotations

import math

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest
import torch

from optuna_ttp.prediction import TrainingTimePredictor
from tests.cases import spectrum
from tests.predictors import linear_predictor
from tests.predictors import predictor_with


@given(fractions=st.tuples(st.floats(0.3, 0.99), st.floats(0.3, 0.99)))
@settings(max_examples=5)
def test_deeper_target_takes_longer(fractions: tuple[float, float]) -> None:
    deep, shallow = (
        linear_predictor(target_fraction=f, exact=True)
        .predict([0.2, 0.1], [12, 4], [0.5, 0.0])
        .steps
        for f in sorted(fractions)
    )
    assert (shallow <= deep).all()


def test_target_fraction_is_that_of_the_initial_loss() -> None:
    by_fraction = linear_predictor(target_fraction=0.5)
    by_loss = linear_predictor(target_loss=0.5 * by_fraction.initial_loss)
    assert by_loss.target == by_fraction.target
    outputs = torch.tensor(spectrum().initial_outputs)
    expected = torch.nn.functional.cross_entropy(outputs, torch.tensor(spectrum().targets))
    assert by_fraction.initial_loss == pytest.approx(expected.item(), rel=1e-5)


def test_target_accuracy() -> None:
    predictor = linear_predictor(target_accuracy=0.75)
    prediction = predictor.predict(0.05, 12)
    assert prediction.outcome == "converges"
    assert (
        prediction.steps.item()
        <= linear_predictor(target_accuracy=0.9).predict(0.05, 12).steps.item()
    )
    assert "accuracy 0.75" in repr(predictor)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({}, "Exactly one of .* must be given but got 0"),
        ({"target_loss": 0.1, "target_fraction": 0.1}, "Exactly one .* but got 2"),
        ({"target_loss": 0.1, "target_accuracy": 0.9}, "Exactly one .* but got 2"),
        ({"target_loss": 0.0}, "target_loss must be positive and finite but got 0.0"),
        ({"target_loss": -1.0}, "target_loss must be positive and finite"),
        ({"target_loss": math.nan}, "target_loss must be positive and finite"),
        ({"target_loss": math.inf}, "target_loss must be positive and finite"),
        ({"target_loss": 50.0}, r"must be below the initial training loss .* no step"),
        ({"target_fraction": 0.0}, r"target_fraction must be in \(0, 1\) but got 0.0"),
        ({"target_fraction": 1.0}, r"target_fraction must be in \(0, 1\)"),
        ({"target_fraction": math.nan}, r"target_fraction must be in \(0, 1\)"),
        ({"target_accuracy": 0.0}, r"target_accuracy must be in \(0, 1\]"),
        ({"target_accuracy": 1.1}, r"target_accuracy must be in \(0, 1\]"),
        ({"target_accuracy": math.nan}, r"target_accuracy must be in \(0, 1\]"),
        ({"target_accuracy": 1e-6}, "must be above the initial training accuracy .* no step"),
    ],
    ids=str,
)
def test_bad_targets_are_refused(target: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictor_with(spectrum(), **target)


def test_target_at_the_initial_loss_is_refused() -> None:
    initial = linear_predictor().initial_loss
    with pytest.raises(ValueError, match="must be below the initial training loss"):
        linear_predictor(target_loss=initial)


def test_accuracy_of_a_single_real_output_is_refused() -> None:
    with pytest.raises(ValueError, match="needs classes but the model has one real output"):
        TrainingTimePredictor(spectrum("mse", n_outputs=1), target_accuracy=0.9)


def test_target_below_the_least_possible_loss_is_not_reached() -> None:
    cut = TrainingTimePredictor(spectrum().truncate(rank=1), target_fraction=0.1)
    assert cut.predict(0.1, 12).outcome == "not_reached"
