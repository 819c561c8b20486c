from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from optuna_ttp.calibration import calibrate
from optuna_ttp.calibration import Calibration
from optuna_ttp.calibration import smooth


TIMES = st.floats(1e-2, 1e6)
ANY_TIMES = TIMES | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -1.0])


def test_without_observations_nothing_is_corrected() -> None:
    for calibration in (Calibration(), calibrate([], [])):
        assert calibration.factor == 1.0
        assert calibration.n_observed == 0
        assert math.isnan(calibration.rank_agreement)
        assert calibration.trusted


@given(pairs=st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=8))
def test_offset_is_the_posterior_mean_of_a_normal_model(
    pairs: list[tuple[float, float]],
) -> None:
    predicted, observed = zip(*pairs, strict=True)
    d = np.log(np.array(observed) / np.array(predicted))
    # Independently: minus log posterior is quadratic; solve its normal equations.
    precision = 1 / 0.7**2 + len(d) / 0.25**2
    expected = (d / 0.25**2).sum() / precision
    calibration = calibrate(predicted, observed)
    assert calibration.log_offset == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert calibration.n_observed == len(pairs)


def test_offset_moves_from_the_prior_to_the_data() -> None:
    offsets = [calibrate([10.0] * n, [30.0] * n).log_offset for n in (1, 2, 5, 100)]
    assert offsets == sorted(offsets)
    assert 0.8 * math.log(3) < offsets[0]
    assert offsets[-1] == pytest.approx(math.log(3), rel=0.01)


@given(scale=st.floats(0.1, 10), predicted=st.lists(TIMES, min_size=2, max_size=8, unique=True))
def test_scaled_predictions_agree_in_rank(scale: float, predicted: list[float]) -> None:
    assert calibrate(predicted, [scale * p for p in predicted]).rank_agreement == pytest.approx(1)
    reversed_order = [1.0 / p for p in predicted]
    assert calibrate(predicted, reversed_order).rank_agreement == pytest.approx(-1)


@given(pairs=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=2, max_size=8))
def test_rank_agreement_is_kendalls_tau_b(pairs: list[tuple[int, int]]) -> None:
    p, o = np.array(pairs, dtype=float).T
    first, second = np.sign(p[:, None] - p), np.sign(o[:, None] - o)
    ties = math.sqrt((first**2).sum() * (second**2).sum())
    expected = (first * second).sum() / ties if ties else 0.0
    assert calibrate(list(p), list(o)).rank_agreement == pytest.approx(expected, abs=1e-12)


def test_target_predicted_out_of_reach_counts_for_the_ranking_only() -> None:
    calibration = calibrate([10.0, 20.0, math.inf], [10.0, 20.0, 30.0])
    assert calibration.log_offset == 0.0
    assert calibration.n_observed == 3
    assert calibration.rank_agreement == pytest.approx(1.0)
    # An infinite prediction for the fastest trial is the worst ranking there is.
    assert calibrate([math.inf, 10.0], [1.0, 2.0]).rank_agreement == pytest.approx(-1.0)


@given(pairs=st.lists(st.tuples(ANY_TIMES, ANY_TIMES), max_size=8))
def test_unusable_pairs_are_left_out(pairs: list[tuple[float, float]]) -> None:
    usable = [(p, o) for p, o in pairs if p > 0 and 0 < o < math.inf]
    calibration = calibrate([p for p, _ in pairs], [o for _, o in pairs])
    expected = calibrate([p for p, _ in usable], [o for _, o in usable])
    assert calibration.n_observed == len(usable)
    assert calibration.log_offset == expected.log_offset
    assert math.isfinite(calibration.factor)
    assert repr(calibration) == repr(expected)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="same length but got 2 and 1"):
        calibrate([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("n", "order", "trusted"),
    [(4, -1, True), (5, -1, False), (5, 1, True), (50, 1, True), (5, 0, False)],
)
def test_trust_needs_agreement_once_five_trials_are_seen(
    n: int, order: int, trusted: bool
) -> None:
    observed = np.arange(1.0, n + 1)
    predicted = {1: observed, -1: observed[::-1], 0: np.ones(n)}[order]
    assert calibrate(list(predicted), list(observed)).trusted == trusted


def test_close_predictions_are_trusted_also_where_noise_decides_the_order() -> None:
    predicted = [10.0, 11.0, 12.0, 13.0, 14.0, 15.0]
    calibration = calibrate(predicted, predicted[::-1])
    assert calibration.rank_agreement == pytest.approx(-1.0)
    assert calibration.trusted


def test_the_error_is_what_the_offset_leaves() -> None:
    factors = np.array([0.5, 1.0, 2.0, 4.0])
    calibration = calibrate([10.0] * 4, list(10.0 * factors))
    left = np.log(factors) - calibration.log_offset
    assert calibration.log_error == pytest.approx(float(np.sqrt((left**2).mean())))
    # A target that was reached although predicted to be out of reach is a large error.
    assert calibrate([10.0, math.inf], [10.0, 20.0]).log_error > 1.0
    assert math.isnan(calibrate([], []).log_error)


def test_the_typical_factor_is_two_until_trials_have_told() -> None:
    assert calibrate([10.0] * 4, [100.0, 1.0, 100.0, 1.0]).typical_factor == 2.0
    assert calibrate([10.0] * 6, [10.0] * 6).typical_factor == 1.5
    told = calibrate([10.0] * 6, [100.0, 1.0] * 3)
    assert told.typical_factor == pytest.approx(10.0)


# Smoothing


@given(
    losses=st.lists(st.floats(0, 10) | st.sampled_from([1e20, math.inf, math.nan]), max_size=60)
)
def test_smooth_is_a_centred_mean_of_a_tenth_of_the_step(losses: list[float]) -> None:
    smoothed = smooth(losses)
    assert smoothed.shape == (len(losses),)
    for t, value in enumerate(smoothed):
        half = max(2, t // 10)
        window = losses[max(0, t - half) : t + half + 1]
        if t + half < len(losses):
            with np.errstate(invalid="ignore"):
                np.testing.assert_allclose(value, np.mean(window), rtol=1e-12)
        elif np.isfinite(window).all():
            assert value >= min(window)


def test_smooth_does_not_lag_behind_at_the_end() -> None:
    t = np.arange(401)
    falling = np.exp(-t / 100.0)
    np.testing.assert_allclose(smooth(falling)[-1], falling[-1], rtol=0.03)
    line = 5.0 - 0.01 * t
    np.testing.assert_allclose(smooth(line)[-30:], line[-30:], rtol=1e-9)


def test_smooth_at_some_points_is_smooth_at_all_of_them() -> None:
    losses = np.random.default_rng(0).exponential(size=300)
    points = [0, 7, 150, 299]
    np.testing.assert_array_equal(smooth(losses, points), smooth(losses)[points])


def test_smooth_follows_a_power_law() -> None:
    t = np.arange(1, 5001)
    smoothed = smooth(t**-0.5)
    np.testing.assert_allclose(smoothed[20:], t[20:] ** -0.5, rtol=0.01)
    noisy = smooth(1.0 + np.random.default_rng(0).normal(0, 0.3, 5000))
    assert np.abs(noisy[1000:] - 1.0).max() < 0.08


def test_spike_does_not_drown_what_follows() -> None:
    losses = np.ones(200)
    losses[10] = 1e30
    np.testing.assert_allclose(smooth(losses)[13:], np.ones(187), rtol=1e-12)
