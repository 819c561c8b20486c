from __future__ import annotations

from dataclasses import replace
from functools import cache
import math
import pickle

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
from optuna_ttp.prediction import TrainingTimePredictor
from optuna_ttp.spectrum import Spectrum
from tests.cases import spectrum
from tests.models import small_predictor
from tests.models import small_spectrum
from tests.observations import of_prediction
from tests.observations import slower
from tests.predictors import assert_same
from tests.predictors import linear_predictor


@given(log_factor=st.floats(-1, 2), learning_rate=st.floats(0.02, 0.2), momentum=st.floats(0, 0.9))
@settings(max_examples=8)
def test_a_kernel_that_is_smaller_everywhere_is_a_smaller_learning_rate(
    log_factor: float, learning_rate: float, momentum: float
) -> None:
    plain = linear_predictor(max_steps=10**5, exact=True)
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
    plain = linear_predictor(max_steps=10**6)
    before = plain.predict(learning_rate, 12)
    after = plain.calibrated(slower(factor)).predict(learning_rate, 12)
    assert after.steps.item() == pytest.approx(before.steps.item() * factor, rel=0.03, abs=1)


def test_horizon_counts_calibrated_steps() -> None:
    plain = linear_predictor(exact=True)
    steps = plain.predict(0.02, 12).steps.item()
    for factor in (0.5, 1.0, 3.0):
        predictor = plain.calibrated(slower(factor))
        expected = int(predictor.predict(0.02, 12).steps)
        assert expected == pytest.approx(factor * steps, abs=2)
        assert predictor.predict(0.02, 12, max_steps=expected).outcome == "converges"
        assert predictor.predict(0.02, 12, max_steps=expected - 1).outcome == "not_reached"


def test_calibrated_leaves_the_predictor_alone() -> None:
    predictor = linear_predictor()
    before = predictor.predict(0.05, 4)
    twin = predictor.calibrated(slower(2.5))
    assert twin.predict(0.05, 4).steps > before.steps
    assert_same(predictor.predict(0.05, 4), before)
    assert twin.target == predictor.target
    assert twin.spectrum is predictor.spectrum


RATES = (0.003, 0.005, 0.008, 0.012, 0.02, 0.03)


@cache
def _predicted(rate: float) -> Prediction:
    return small_predictor().predict(rate, 8, 0.0)


def _learned(factor: float) -> TrainingTimePredictor:
    """From trials that took so many times as long as predicted, at every depth."""
    seen = [of_prediction(_predicted(rate), math.log(factor)) for rate in RATES]
    return small_predictor().calibrated(calibrate(seen))


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 4.0])
def test_a_slowdown_that_trials_showed_is_predicted(factor: float) -> None:
    after = _learned(factor)
    for rate in RATES[1::2]:
        expected = factor * float(_predicted(rate).steps)
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
        before = plain.calibrated(calibrate(seen)).predict(rate, 8, 0.0)
        truth = of_prediction(_predicted(rate), math.log(2.0))
        seen.append(
            replace(
                truth,
                predicted=before.log_first_passage_times,
                expected=before.expected_log_first_passage_times,
                growth=before.log_growth,
            )
        )
    calibration = calibrate(seen)
    corrected = plain.calibrated(calibration).predict(0.01, 8, 0.0)
    expected = 2.0 * float(plain.predict(0.01, 8, 0.0).steps)
    assert float(corrected.steps) == pytest.approx(expected, rel=0.05)
    # Held out: the first trial was off by a factor of two, the others hardly.
    assert 0.25 < calibration.log_error < 0.45
    assert calibration.compared_error < 0.1


def test_curves_pass_their_loss_levels_when_the_prediction_says() -> None:
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
    rates, batch_sizes, momenta = np.meshgrid([0.003, 0.01, 0.03], [8, 24], [0.0, 0.8])
    predicted = predictor.predict(rates, batch_sizes, momenta).seconds
    scored = predictor.score(rates, batch_sizes, momenta)
    assert np.isfinite(predicted).all()
    # The surface holds 98 % of the trace and few knots.
    np.testing.assert_allclose(scored, predicted, rtol=0.3)
    assert np.corrcoef(np.log(scored).ravel(), np.log(predicted).ravel())[0, 1] > 0.99


def test_a_pickled_correction_is_the_same() -> None:
    original = _learned(2.0)
    predictor = pickle.loads(pickle.dumps(original))
    np.testing.assert_array_equal(predictor.calibration.weights, original.calibration.weights)
    np.testing.assert_array_equal(
        predictor.calibration.covariance, original.calibration.covariance
    )
    assert_same(predictor.predict([0.01, 0.02], 8), original.predict([0.01, 0.02], 8))
    np.testing.assert_array_equal(
        predictor.score([0.01, 0.02], 8), original.score([0.01, 0.02], 8)
    )


def test_what_the_prior_knows_changes_nothing() -> None:
    plain = linear_predictor()
    for calibration in (Calibration.none(), calibrate([])):
        twin = plain.calibrated(calibration)
        assert_same(twin.predict([0.05, 0.1], 4, 0.5), plain.predict([0.05, 0.1], 4, 0.5))
        prediction = twin.predict(0.05, 4)
        np.testing.assert_array_equal(prediction.log_growth, np.zeros(len(KNOTS)))
        np.testing.assert_array_equal(
            prediction.log_first_passage_times, prediction.expected_log_first_passage_times
        )


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
def test_slow_training_with_momentum_is_estimated_as_it_is_predicted(momentum: float) -> None:
    """Below the lowest knots, where momentum lags behind by as many steps as there."""
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
    batch_sizes = np.array([4, 8, 16])
    rates = np.multiply.outer([0.65, 0.75, 0.85, 0.92], predictor.max_learning_rate(batch_sizes))
    given_up = np.isinf(predictor.score(rates, batch_sizes, simulate_outside=False))
    assert given_up.sum() >= 3
    estimated = predictor.estimate(rates, batch_sizes)
    predicted = predictor.predict(rates, batch_sizes)
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
