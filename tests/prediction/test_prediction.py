from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from optuna_ttp import Outcome
from optuna_ttp.prediction import TrainingTimePredictor
from tests.cases import spectrum
from tests.models import small_spectrum
from tests.predictors import linear_predictor


def test_scalars_and_arrays_give_the_same() -> None:
    predictor = linear_predictor(max_steps=300)
    rates, batch_sizes, momenta = [0.01, 0.1, 5.0], [[4], [12]], 0.5
    together = predictor.predict(rates, batch_sizes, momenta)
    assert together.steps.shape == (2, 3)
    assert len(together) == 6
    for i, batch_size in enumerate((4, 12)):
        for j, rate in enumerate(rates):
            alone = predictor.predict(rate, batch_size, momenta)
            assert alone.steps.shape == ()
            for name in ("steps", "epochs", "seconds", "stability", "max_steps", "strides"):
                assert getattr(alone, name).item() == getattr(together, name)[i, j], name
            assert alone.outcome == together.outcomes[i, j]
            n = alone.curve_losses.shape[0]
            np.testing.assert_allclose(
                alone.curve_losses, together.curve_losses[i, j, :n], rtol=1e-3
            )
            np.testing.assert_array_equal(alone.curve_steps, together.curve_steps[i, j, :n])


@given(
    configurations=st.lists(
        st.tuples(st.floats(1e-3, 10), st.integers(1, 12), st.floats(0, 0.97)),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=25)
def test_every_prediction_is_consistent(
    configurations: list[tuple[float, int, float]],
) -> None:
    predictor = linear_predictor(max_steps=200)
    rates, batch_sizes, momenta = (
        np.array(column) for column in zip(*configurations, strict=True)
    )
    prediction = predictor.predict(rates, batch_sizes, momenta)
    reached = np.isfinite(prediction.steps)
    np.testing.assert_array_equal(prediction.outcomes == "converges", reached)
    assert set(prediction.outcomes) <= {"converges", "diverges", "not_reached"}
    assert (prediction.steps[reached] <= 200).all()
    assert (prediction.steps[reached] == np.floor(prediction.steps[reached])).all()
    assert (prediction.steps >= 1).all()
    np.testing.assert_array_equal(
        prediction.seconds, prediction.steps * predictor.seconds_per_step(batch_sizes)
    )
    np.testing.assert_array_equal(prediction.epochs, prediction.steps / np.ceil(12 / batch_sizes))
    np.testing.assert_allclose(
        prediction.stability, rates / predictor.max_learning_rate(batch_sizes, momenta)
    )
    assert (prediction.outcomes[prediction.stability > 10] == "diverges").all()


def test_outcome_is_for_one_configuration() -> None:
    predictor = linear_predictor()
    outcome = predictor.predict([0.1], [4]).outcome
    assert outcome is Outcome.CONVERGES
    assert (outcome, f"{outcome}", json.dumps(outcome)) == (
        "converges",
        "converges",
        '"converges"',
    )
    with pytest.raises(ValueError, match=r"single configuration but got 2. Use outcomes"):
        _ = predictor.predict([0.1, 0.2], 4).outcome


def test_prediction_in_words() -> None:
    predictor = linear_predictor()
    one = predictor.predict(0.1, 4)
    assert str(one) == (
        f"converges: {one.steps.item():,.0f} steps ({one.epochs.item():.3g} epochs, "
        f"{one.seconds.item():.3g} s), 80 % interval {one.steps_low.item():,.0f} to "
        f"{one.steps_high.item():,.0f} steps"
    )
    assert " s)" not in str(TrainingTimePredictor(spectrum(), target_fraction=0.6).predict(0.1, 4))
    low, high = one.steps_low.item(), one.steps_high.item()
    assert one.summary == f"{one.steps.item():,.0f} steps ({low:,.0f} to {high:,.0f})"
    assert str(predictor.predict(1e-6, 4)) == "not reached within 10,000 steps"
    limit = predictor.max_learning_rate(4).item()
    assert str(predictor.predict(12 * limit, 4)) == (
        "diverges: the learning rate is 12 times the largest stable one (probability 83%)"
    )
    assert predictor.predict(1e-6, 4).summary == "more than 10,000 steps"
    assert predictor.predict(12 * limit, 4).summary == "training diverges (probability 83%)"
    assert str(predictor.predict([0.1, 1e-6, 0.1], 4)) == (
        "3 configurations: 2 reach the target, 1 do not"
    )


def test_configurations_that_all_diverge() -> None:
    prediction = linear_predictor().predict([1e3, 1e6], [[4], [12]], 0.9)
    assert (prediction.outcomes == "diverges").all()
    assert prediction.outcomes.shape == (2, 2)
    assert np.isinf(prediction.steps).all()
    assert np.isinf(prediction.seconds).all()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("learning_rate", [0.05, 0.004])
@pytest.mark.parametrize("target", [{"target_fraction": 0.6}, {"target_accuracy": 0.75}], ids=str)
def test_curve_ends_at_the_target_or_at_the_horizon(
    target: dict[str, float], learning_rate: float, exact: bool
) -> None:
    predictor = linear_predictor(max_steps=1500, exact=exact, **target)
    ended = predictor.predict(learning_rate, 12)
    whole = predictor.predict(learning_rate, 12, full_curve=True)
    assert ended.outcome == whole.outcome == "converges"
    assert ended.steps.item() == whole.steps.item()
    assert whole.curve_steps[-1] >= 1500
    assert ended.curve_steps[-2] < ended.steps.item() <= ended.curve_steps[-1]
    n = len(ended.curve_steps)
    np.testing.assert_array_equal(whole.curve_losses[:n], ended.curve_losses)
    assert ended.curve_losses[0] == pytest.approx(predictor.initial_loss)


def test_target_beyond_the_horizon_is_not_reached() -> None:
    predictor = linear_predictor()
    steps = int(predictor.predict(0.05, 12).steps)
    at, before = (predictor.predict(0.05, 12, max_steps=n) for n in (steps, steps - 1))
    assert (at.outcome, at.steps.item()) == ("converges", steps)
    assert (before.outcome, before.steps.item()) == ("not_reached", math.inf)
    assert before.max_steps.item() == steps - 1
    both = predictor.predict(0.05, 12, max_steps=[steps, steps - 1])
    assert both.outcomes.tolist() == ["converges", "not_reached"]
    assert linear_predictor(max_steps=steps - 1).predict(0.05, 12).outcome == "not_reached"


def test_one_step_and_one_epoch_are_in_the_singular() -> None:
    predictor = TrainingTimePredictor(small_spectrum(), target_fraction=0.98)
    prediction = predictor.predict(0.1, 24)
    assert str(prediction).startswith("converges: 1 step (1 epoch, ")
    assert prediction.summary.startswith("1 step (1 to ")
    none = predictor.predict(1e-5, 24, max_steps=1)
    assert str(none) == "not reached within 1 step"
    assert none.summary == "more than 1 step"
