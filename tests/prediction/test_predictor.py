from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
import math
import pickle
from typing import Any

from hypothesis import assume
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from optuna_ttp import compute_spectrum
from optuna_ttp import FineTuningTask
from optuna_ttp.calibration import calibrate
from optuna_ttp.calibration import Calibration
from optuna_ttp.calibration import DEPTHS
from optuna_ttp.calibration import KNOTS
from optuna_ttp.calibration import Observation
from optuna_ttp.prediction import Prediction
from optuna_ttp.prediction import PredictorSettings
from optuna_ttp.prediction import TrainingTimePredictor
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.spectrum import Throughput
from tests.cases import linear_task
from tests.cases import spectrum
from tests.models import small_predictor
from tests.models import small_spectrum
from tests.observations import of_prediction
from tests.observations import slower
from tests.predictors import predictor_with


def _timed() -> Spectrum:
    throughput = Throughput(np.array([1, 12]), np.array([0.001, 0.012]), device="cpu")
    return replace(spectrum(), throughput=throughput)


def _predictor(**arguments: Any) -> TrainingTimePredictor:
    if not any(k.startswith("target") for k in arguments):
        arguments["target_fraction"] = 0.6
    return predictor_with(_timed(), **arguments)


# Against real training


@pytest.mark.parametrize(
    ("learning_rate", "batch_size", "momentum"),
    [(0.3, 12, 0.0), (0.05, 12, 0.9), (0.02, 5, 0.0), (0.01, 5, 0.9), (0.003, 1, 0.5)],
)
@pytest.mark.parametrize("exact", [True, False])
def test_predicted_steps_are_those_of_real_training_of_a_linear_model(
    learning_rate: float, batch_size: int, momentum: float, exact: bool
) -> None:
    predictor = _predictor(exact=exact)
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


# One and many configurations


def test_scalars_and_arrays_give_the_same() -> None:
    predictor = _predictor(max_steps=300)
    rates, sizes, masses = [0.01, 0.1, 5.0], [[4], [12]], 0.5
    together = predictor.predict(rates, sizes, masses)
    assert together.steps.shape == (2, 3)
    assert len(together) == 6
    for i, size in enumerate((4, 12)):
        for j, rate in enumerate(rates):
            alone = predictor.predict(rate, size, masses)
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
    predictor = _predictor(max_steps=200)
    rates, sizes, masses = (np.array(column) for column in zip(*configurations, strict=True))
    prediction = predictor.predict(rates, sizes, masses)
    reached = np.isfinite(prediction.steps)
    np.testing.assert_array_equal(prediction.outcomes == "converges", reached)
    assert set(prediction.outcomes) <= {"converges", "diverges", "not_reached"}
    assert (prediction.steps[reached] <= 200).all()
    assert (prediction.steps[reached] == np.floor(prediction.steps[reached])).all()
    assert (prediction.steps >= 1).all()
    np.testing.assert_array_equal(
        prediction.seconds, prediction.steps * predictor.seconds_per_step(sizes)
    )
    np.testing.assert_array_equal(prediction.epochs, prediction.steps / np.ceil(12 / sizes))
    np.testing.assert_allclose(
        prediction.stability, rates / predictor.max_learning_rate(sizes, masses)
    )
    assert (prediction.outcomes[prediction.stability > 10] == "diverges").all()


def test_outcome_is_for_one_configuration() -> None:
    predictor = _predictor()
    assert predictor.predict([0.1], [4]).outcome == "converges"
    with pytest.raises(ValueError, match=r"single configuration but got 2. Use outcomes"):
        _ = predictor.predict([0.1, 0.2], 4).outcome


def test_prediction_in_words() -> None:
    predictor = _predictor()
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


def test_shapes_that_do_not_go_together_are_named() -> None:
    predictor = _predictor()
    with pytest.raises(ValueError, match=r"but got learning_rate \(2,\), batch_size \(3,\)\."):
        predictor.predict([0.1, 0.2], [4, 5, 6])
    with pytest.raises(ValueError, match=r"but got batch_size \(2,\), momentum \(3,\)\."):
        predictor.max_learning_rate([4, 5], [0.0, 0.5, 0.9])


def test_configurations_that_all_diverge() -> None:
    prediction = _predictor().predict([1e3, 1e6], [[4], [12]], 0.9)
    assert (prediction.outcomes == "diverges").all()
    assert prediction.outcomes.shape == (2, 2)
    assert np.isinf(prediction.steps).all()
    assert np.isinf(prediction.seconds).all()


# Targets


@given(fractions=st.tuples(st.floats(0.3, 0.99), st.floats(0.3, 0.99)))
@settings(max_examples=5)
def test_deeper_target_takes_longer(fractions: tuple[float, float]) -> None:
    deep, shallow = (
        _predictor(target_fraction=f, exact=True).predict([0.2, 0.1], [12, 4], [0.5, 0.0]).steps
        for f in sorted(fractions)
    )
    assert (shallow <= deep).all()


def test_target_fraction_is_that_of_the_initial_loss() -> None:
    by_fraction = _predictor(target_fraction=0.5)
    by_loss = _predictor(target_loss=0.5 * by_fraction.initial_loss)
    assert by_loss.target == by_fraction.target
    outputs = torch.tensor(spectrum().initial_outputs)
    expected = torch.nn.functional.cross_entropy(outputs, torch.tensor(spectrum().targets))
    assert by_fraction.initial_loss == pytest.approx(expected.item(), rel=1e-5)


def test_target_accuracy() -> None:
    predictor = _predictor(target_accuracy=0.75)
    prediction = predictor.predict(0.05, 12)
    assert prediction.outcome == "converges"
    assert (
        prediction.steps.item() <= _predictor(target_accuracy=0.9).predict(0.05, 12).steps.item()
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
    initial = _predictor().initial_loss
    with pytest.raises(ValueError, match="must be below the initial training loss"):
        _predictor(target_loss=initial)


def test_accuracy_of_a_single_real_output_is_refused() -> None:
    with pytest.raises(ValueError, match="needs classes but the model has one real output"):
        TrainingTimePredictor(spectrum("mse", n_outputs=1), target_accuracy=0.9)


def test_what_is_no_spectrum_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a Spectrum but got FineTuningTask"):
        TrainingTimePredictor(linear_task(), target_loss=0.1)  # type: ignore[arg-type]


# The horizon


def test_target_beyond_the_horizon_is_not_reached() -> None:
    predictor = _predictor()
    steps = int(predictor.predict(0.05, 12).steps)
    at, before = (predictor.predict(0.05, 12, max_steps=n) for n in (steps, steps - 1))
    assert (at.outcome, at.steps.item()) == ("converges", steps)
    assert (before.outcome, before.steps.item()) == ("not_reached", math.inf)
    assert before.max_steps.item() == steps - 1
    both = predictor.predict(0.05, 12, max_steps=[steps, steps - 1])
    assert both.outcomes.tolist() == ["converges", "not_reached"]
    assert _predictor(max_steps=steps - 1).predict(0.05, 12).outcome == "not_reached"


def test_target_below_the_least_possible_loss_is_not_reached() -> None:
    cut = TrainingTimePredictor(spectrum().truncate(rank=1), target_fraction=0.1)
    assert cut.predict(0.1, 12).outcome == "not_reached"


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("learning_rate", [0.05, 0.004])
@pytest.mark.parametrize("target", [{"target_fraction": 0.6}, {"target_accuracy": 0.75}], ids=str)
def test_curve_ends_at_the_target_or_at_the_horizon(
    target: dict[str, float], learning_rate: float, exact: bool
) -> None:
    predictor = _predictor(max_steps=1500, exact=exact, **target)
    ended = predictor.predict(learning_rate, 12)
    whole = predictor.predict(learning_rate, 12, full_curve=True)
    assert ended.outcome == whole.outcome == "converges"
    assert ended.steps.item() == whole.steps.item()
    assert whole.curve_steps[-1] >= 1500
    assert ended.curve_steps[-2] < ended.steps.item() <= ended.curve_steps[-1]
    n = len(ended.curve_steps)
    np.testing.assert_array_equal(whole.curve_losses[:n], ended.curve_losses)
    assert ended.curve_losses[0] == pytest.approx(predictor.initial_loss)


@pytest.mark.parametrize("max_steps", [0, -1, 1.5, math.inf, math.nan, True], ids=str)
def test_horizon_that_is_no_positive_integer_is_refused(max_steps: Any) -> None:
    with pytest.raises(ValueError, match="max_steps must be a positive integer but got"):
        _predictor(max_steps=max_steps)


@pytest.mark.parametrize("max_steps", [0, -1, math.inf, math.nan, [5, 0]], ids=str)
def test_horizon_of_a_prediction_out_of_range_is_refused(max_steps: Any) -> None:
    with pytest.raises(ValueError, match="max_steps must be a positive integer but got"):
        _predictor().predict(0.1, 4, max_steps=max_steps)


# Hyperparameters


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
        _predictor().predict(*configuration)


@given(
    learning_rate=st.floats(allow_nan=True, allow_infinity=True),
    batch_size=st.floats(-3, 20) | st.integers(-3, 20),
    momentum=st.floats(-0.5, 1.5) | st.just(math.nan),
)
@settings(max_examples=60)
def test_any_numbers_give_a_prediction_or_a_value_error(
    learning_rate: float, batch_size: float, momentum: float
) -> None:
    predictor = _predictor(max_steps=20)
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
    predictor = _predictor()
    assert predictor.predict(0.1, 4.0).steps == predictor.predict(0.1, 4).steps
    assert predictor.predict(0.1, 4.0).batch_size.dtype == np.int64


# Seconds


def test_seconds_are_steps_times_seconds_per_step() -> None:
    prediction = _predictor().predict(0.1, [1, 4, 12])
    np.testing.assert_allclose(prediction.seconds, prediction.steps * [0.001, 0.004, 0.012])


def test_seconds_are_not_known_without_throughput() -> None:
    predictor = TrainingTimePredictor(spectrum(), target_fraction=0.6)
    assert np.isnan(predictor.predict(0.1, [4, 12]).seconds).all()
    assert np.isnan(predictor.seconds_per_step(4))
    own = Throughput(np.array([1]), np.array([2.0]), device="somewhere")
    predictor = TrainingTimePredictor(
        spectrum(), target_fraction=0.6, settings=PredictorSettings(throughput=own)
    )
    prediction = predictor.predict(0.1, 4)
    assert prediction.seconds == 2.0 * prediction.steps


# Seeds, copies, devices


def _assert_same(first: Prediction, second: Prediction) -> None:
    np.testing.assert_array_equal(first.steps, second.steps)
    np.testing.assert_array_equal(first.curve_losses, second.curve_losses)
    np.testing.assert_array_equal(first.outcomes, second.outcomes)


def test_same_seed_gives_the_same_and_another_seed_another_curve() -> None:
    configuration = ([0.1, 0.02], [3, 5], 0.5)
    first, same, other = (_predictor(seed=s).predict(*configuration) for s in (7, 7, 8))
    _assert_same(first, same)
    n = min(first.curve_losses.shape[1], other.curve_losses.shape[1])
    assert not np.allclose(first.curve_losses[:, :n], other.curve_losses[:, :n], equal_nan=True)


def test_prediction_changes_no_random_state() -> None:
    before = torch.get_rng_state()
    _predictor().predict(0.1, 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_pickled_predictor_predicts_the_same() -> None:
    predictor = _predictor(max_steps=500, seed=3).calibrated(slower(1.3))
    expected = predictor.predict([0.1, 0.01], 5, 0.5)
    predictor.score(0.1, 5)
    data = pickle.dumps(predictor)
    # What is derived from the spectrum does not travel.
    parts = pickle.dumps(predictor.spectrum), pickle.dumps(predictor.calibration)
    assert len(data) < 1.5 * sum(map(len, parts))
    _assert_same(pickle.loads(data).predict([0.1, 0.01], 5, 0.5), expected)


def test_prediction_on_every_device_is_the_same(device: torch.device) -> None:
    expected = _predictor().predict([0.05, 0.1], 12, 0.5)
    actual = _predictor(device=str(device)).predict([0.05, 0.1], 12, 0.5)
    np.testing.assert_array_equal(actual.steps, expected.steps)


# Calibration


@given(log_factor=st.floats(-1, 2), learning_rate=st.floats(0.02, 0.2), momentum=st.floats(0, 0.9))
@settings(max_examples=8)
def test_a_kernel_that_is_smaller_everywhere_is_a_smaller_learning_rate(
    log_factor: float, learning_rate: float, momentum: float
) -> None:
    plain = _predictor(max_steps=10**5, exact=True)
    factor = math.exp(log_factor)
    calibrated = plain.calibrated(slower(factor))
    expected = plain.predict(learning_rate / factor, 12, momentum)
    after = calibrated.predict(learning_rate, 12, momentum)
    assert after.steps.item() == pytest.approx(expected.steps.item(), abs=1)
    np.testing.assert_allclose(after.curve_steps, expected.curve_steps, rtol=1e-4)
    np.testing.assert_allclose(after.curve_losses, expected.curve_losses, rtol=1e-6)
    assert after.seconds.item() == pytest.approx(after.steps.item() * 0.012)


@given(factor=st.floats(0.3, 5), learning_rate=st.floats(0.001, 0.01))
@settings(max_examples=8)
def test_where_steps_are_small_calibration_multiplies_their_number(
    factor: float, learning_rate: float
) -> None:
    plain = _predictor(max_steps=10**6)
    before = plain.predict(learning_rate, 12)
    after = plain.calibrated(slower(factor)).predict(learning_rate, 12)
    assert after.steps.item() == pytest.approx(before.steps.item() * factor, rel=0.03, abs=1)


def test_horizon_counts_calibrated_steps() -> None:
    plain = _predictor(exact=True)
    steps = plain.predict(0.02, 12).steps.item()
    for factor in (0.5, 1.0, 3.0):
        predictor = plain.calibrated(slower(factor))
        expected = int(predictor.predict(0.02, 12).steps)
        assert expected == pytest.approx(factor * steps, abs=2)
        assert predictor.predict(0.02, 12, max_steps=expected).outcome == "converges"
        assert predictor.predict(0.02, 12, max_steps=expected - 1).outcome == "not_reached"


def test_calibrated_leaves_the_predictor_alone() -> None:
    predictor = _predictor()
    before = predictor.predict(0.05, 4)
    twin = predictor.calibrated(slower(2.5))
    assert twin.predict(0.05, 4).steps > before.steps
    _assert_same(predictor.predict(0.05, 4), before)
    assert twin.target == predictor.target
    assert twin.spectrum is predictor.spectrum


RATES = (0.003, 0.005, 0.008, 0.012, 0.02, 0.03)


@cache
def _told(rate: float) -> Prediction:
    return small_predictor().predict(rate, 8, 0.0)


def _learned(factor: float) -> TrainingTimePredictor:
    """From trials that took so many times as long as predicted, at every depth."""
    seen = [of_prediction(_told(rate), math.log(factor)) for rate in RATES]
    return small_predictor().calibrated(calibrate(seen))


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 4.0])
def test_a_slowdown_that_trials_showed_is_predicted(factor: float) -> None:
    after = _learned(factor)
    for rate in RATES[1::2]:
        expected = factor * float(_told(rate).steps)
        corrected = after.predict(rate, 8, 0.0)
        assert float(corrected.steps) == pytest.approx(expected, rel=0.05, abs=1)
        assert corrected.steps_low - 1 <= expected <= corrected.steps_high + 1
        # Six trials that agree to a percent leave little uncertainty.
        assert _log_width(corrected) < 0.25
    # The clock was off; the ranking was not.
    assert after.calibration.rank_agreement == pytest.approx(1.0)


def _log_width(prediction: Prediction) -> float:
    return float(np.log(prediction.steps_high / prediction.steps_low))


def test_trials_predicted_with_a_correction_are_not_corrected_twice() -> None:
    plain = small_predictor()
    seen: list[Observation] = []
    for rate in RATES:
        told = plain.calibrated(calibrate(seen)).predict(rate, 8, 0.0)
        truth = of_prediction(_told(rate), math.log(2.0))
        seen.append(
            replace(
                truth,
                predicted=told.log_first_passage_times,
                expected=told.expected_log_first_passage_times,
                growth=told.log_growth,
            )
        )
    calibration = calibrate(seen)
    corrected = plain.calibrated(calibration).predict(0.01, 8, 0.0)
    expected = 2.0 * float(plain.predict(0.01, 8, 0.0).steps)
    assert float(corrected.steps) == pytest.approx(expected, rel=0.05)
    # Held out: the first trial was off by a factor of two, the others hardly.
    assert 0.25 < calibration.log_error < 0.45
    assert calibration.compared_error < 0.1


def test_curves_pass_their_rungs_when_the_prediction_says() -> None:
    predictor = _learned(2.0)
    prediction = predictor.predict([0.004, 0.02], [8, 24], [0.0, 0.5])
    for k in range(2):
        good = np.isfinite(prediction.curve_steps[k])
        steps, losses = prediction.curve_steps[k][good], prediction.curve_losses[k][good]
        assert steps[0] == 0 and (np.diff(steps) > 0).all()
        fall = np.minimum.accumulate(np.log(losses))
        at = np.interp(-math.log(predictor.target.value), -fall, steps)
        assert at == pytest.approx(float(prediction.steps[k]), rel=0.05, abs=1.5)
        levels = prediction.expected_log_first_passage_times[k]
        known = np.isfinite(levels)
        assert known.sum() >= 4
        passed = np.interp(DEPTHS[known] - math.log(predictor.initial_loss), -fall, steps)
        np.testing.assert_allclose(passed, np.exp(levels[known]), rtol=0.1, atol=1.5)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_score_agrees_with_predict_where_trials_corrected_it(factor: float) -> None:
    predictor = _learned(factor)
    rates, sizes, masses = np.meshgrid([0.003, 0.01, 0.03], [8, 24], [0.0, 0.8])
    predicted = predictor.predict(rates, sizes, masses).seconds
    scored = predictor.score(rates, sizes, masses)
    assert np.isfinite(predicted).all()
    # The surface holds 98 % of the trace and few nodes.
    np.testing.assert_allclose(scored, predicted, rtol=0.3)
    assert np.corrcoef(np.log(scored).ravel(), np.log(predicted).ravel())[0, 1] > 0.99


def test_a_pickled_correction_is_the_same() -> None:
    original = _learned(2.0)
    predictor = pickle.loads(pickle.dumps(original))
    np.testing.assert_array_equal(predictor.calibration.weights, original.calibration.weights)
    np.testing.assert_array_equal(
        predictor.calibration.covariance, original.calibration.covariance
    )
    _assert_same(predictor.predict([0.01, 0.02], 8), original.predict([0.01, 0.02], 8))
    np.testing.assert_array_equal(
        predictor.score([0.01, 0.02], 8), original.score([0.01, 0.02], 8)
    )


def test_what_the_prior_knows_changes_nothing() -> None:
    plain = _predictor()
    for calibration in (Calibration.none(), calibrate([])):
        twin = plain.calibrated(calibration)
        _assert_same(twin.predict([0.05, 0.1], 4, 0.5), plain.predict([0.05, 0.1], 4, 0.5))
        prediction = twin.predict(0.05, 4)
        np.testing.assert_array_equal(prediction.log_growth, np.zeros(len(KNOTS)))
        np.testing.assert_array_equal(
            prediction.log_first_passage_times, prediction.expected_log_first_passage_times
        )


# Stability


@given(batch_sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)), momentum=st.floats(0, 0.98))
@settings(max_examples=30)
def test_stability_limit_rises_with_the_batch_size(
    batch_sizes: tuple[int, int], momentum: float
) -> None:
    assume(batch_sizes[0] != batch_sizes[1])
    low, high = _predictor().max_learning_rate(sorted(batch_sizes), momentum)
    assert 0 < low <= high


def test_learning_rate_far_above_the_limit_diverges() -> None:
    predictor = _predictor(max_steps=2000)
    limit = predictor.max_learning_rate([2, 12], 0.9)
    assert (predictor.predict(10 * limit, [2, 12], 0.9).outcomes == "diverges").all()
    assert (predictor.predict(0.1 * limit, [2, 12], 0.9).outcomes == "converges").all()
    np.testing.assert_allclose(predictor.predict(limit, [2, 12], 0.9).stability, 1.0)


def test_horizon_that_is_not_whole_is_refused() -> None:
    predictor = _predictor()
    for ask in (predictor.predict, predictor.estimate):
        with pytest.raises(ValueError, match=r"positive integer but got 2\.5"):
            ask(0.1, 4, max_steps=[10, 2.5])


@pytest.mark.parametrize("device", ["xyz", "meta", "cuda:77"])
def test_devices_that_cannot_be_used_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="device must be one that torch can use here but got"):
        TrainingTimePredictor(
            spectrum(), target_fraction=0.5, settings=PredictorSettings(device=device)
        )


@pytest.mark.parametrize(
    "rate", [True, "fast", "0.05", torch.tensor(0.1, requires_grad=True), [0.1, [0.2]], {}]
)
def test_learning_rates_that_are_no_numbers_are_refused(rate: Any) -> None:
    predictor = TrainingTimePredictor(spectrum(), target_fraction=0.5)
    with pytest.raises(TypeError, match="learning_rate must be numbers but got"):
        predictor.predict(rate, 4)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
def test_slow_training_with_momentum_is_estimated_as_it_is_predicted(momentum: float) -> None:
    """Slower than the slowest nodes, where momentum lags behind by as many steps as there."""
    predictor = TrainingTimePredictor(small_spectrum(), target_fraction=0.5, max_steps=100_000)
    largest = float(predictor.max_learning_rate(8, momentum))
    rates = largest * (1.0 - momentum) * np.geomspace(1e-4, 0.02, 12)
    predicted = predictor.predict(rates, 8, momentum)
    estimated = predictor.estimate(rates, 8, momentum)
    away = estimated.log_first_passage_times - predicted.log_first_passage_times
    known = np.isfinite(away)
    assert known.any(axis=1).all()
    assert np.abs(away[known]).max() < 0.3
    assert np.sqrt(np.square(away[known]).mean()) < 0.1
    np.testing.assert_allclose(estimated.steps, predicted.steps, rtol=0.15)


@pytest.mark.filterwarnings("ignore:At 5% of the initial")
def test_what_the_surface_gives_up_is_simulated_before_it_is_called_hopeless() -> None:
    """Near the edge of stability a growing kernel makes training slow, but not endless."""
    predictor = TrainingTimePredictor(_of_new_classes(), target_fraction=0.05)
    sizes = np.array([4, 8, 16])
    rates = np.multiply.outer([0.65, 0.75, 0.85, 0.92], predictor.max_learning_rate(sizes))
    given_up = np.isinf(predictor.score(rates, sizes, simulate_outside=False))
    assert given_up.sum() >= 3
    estimated = predictor.estimate(rates, sizes)
    predicted = predictor.predict(rates, sizes)
    np.testing.assert_allclose(estimated.steps[given_up], predicted.steps[given_up], rtol=0.25)
    assert (estimated.p_converges[given_up] > 0.5).all()


def _of_new_classes() -> Spectrum:
    """Of a network that was pretrained on five classes, with a new head for five others."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(10, 64, generator=generator)
    labels = torch.arange(1000) % 10
    inputs = centres[labels] + 0.3 * torch.randn(1000, 64, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64)]
        model = torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(64, 5))
        head = torch.nn.Linear(64, 5)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(60):
        chosen = torch.randperm(1000, generator=generator)[:256]
        chosen = chosen[labels[chosen] < 5]
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
        optimiser.step()
    model[4] = head
    new = torch.nonzero(labels >= 5)[:48, 0]
    task = FineTuningTask(model, TensorDataset(inputs[new], labels[new] - 5), loss="cross_entropy")
    return compute_spectrum(task, measure_speed=False)


def test_targets_out_of_reach_are_scored_without_a_warning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    predictor = TrainingTimePredictor(
        spectrum().truncate(rank=1), target_fraction=0.01, max_steps=50
    )
    assert np.isinf(predictor.score(0.01, 8, 0.9))
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
