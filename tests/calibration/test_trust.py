from __future__ import annotations

from dataclasses import replace
import math

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
from scipy.stats import kendalltau

from optuna_ttp.calibration import calibrate
from optuna_ttp.calibration import DEPTHS
from optuna_ttp.calibration import Observation
from tests.observations import observation
from tests.observations import trials_of
from tests.observations import unchanged


@given(order=st.permutations(range(6)), error=st.floats(-2, 2))
@settings(max_examples=20)
def test_rank_agreement_is_kendalls_tau(order: list[int], error: float) -> None:
    rates = 0.01 * 1.5 ** np.array(order)
    trials = []
    for k, rate in enumerate(rates):
        predicted = observation(learning_rate=0.01 * 1.5**k).predicted
        trials.append(observation(learning_rate=rate, error=error, expected=predicted))
    expected = kendalltau(range(6), order).statistic
    assert calibrate(trials).rank_agreement == pytest.approx(expected)


def test_equal_predictions_rank_nothing() -> None:
    predicted = observation().predicted
    trials = [observation(learning_rate=0.01 * 1.5**k, expected=predicted) for k in range(5)]
    assert calibrate(trials).rank_agreement == 0.0


def test_a_depth_predicted_out_of_reach_is_a_large_error_and_the_last_in_rank() -> None:
    never = np.full(len(DEPTHS), np.nan)
    good = [observation(learning_rate=0.01 * 1.5**k) for k in range(4)]
    slowest = observation(learning_rate=0.001, expected=never)
    fastest = observation(learning_rate=1.0, expected=never)
    assert calibrate([*good, slowest]).rank_agreement == pytest.approx(1.0)
    assert calibrate([*good, fastest]).rank_agreement < 1.0
    assert calibrate([*good, slowest]).log_error > 1.0
    assert calibrate(good).log_error == pytest.approx(0.0, abs=1e-9)


def test_the_error_is_of_what_was_predicted_before_each_trial() -> None:
    errors = np.log([0.5, 1.0, 2.0, 4.0])
    trials = [observation(error=e) for e in errors]
    expected = math.sqrt(float(np.square(errors).mean()))
    assert calibrate(trials).log_error == pytest.approx(expected)
    # With better predictions it is smaller, whatever was simulated.
    predicted = [replace(t, expected=t.observed + 0.1) for t in trials]
    assert calibrate(predicted).log_error == pytest.approx(0.1)


def _varied(count: int, seed: int) -> list[Observation]:
    """Trials whose time is not only that of their learning rate: the rules of thumb miss it."""
    rng = np.random.default_rng(seed)
    return [
        observation(
            learning_rate=10.0 ** rng.uniform(-3, -1),
            momentum=float(rng.choice([0.0, 0.9])),
            log_pace=float(rng.normal(0, 0.7)),
            rng=rng,
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [5, 8])
def test_good_predictions_gain_trust(seed: int, count: int) -> None:
    calibration = calibrate(_varied(count, seed))
    assert calibration.trust > 0.2
    assert calibration.trusted
    assert calibration.log_error < calibration.baseline_error


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [5, 8])
def test_shuffled_predictions_lose_trust(seed: int, count: int) -> None:
    trials = trials_of(unchanged, count, seed=seed)
    predicted = [trials[(k + 1) % count].predicted for k in range(count)]
    shuffled = [
        replace(t, predicted=p, expected=p) for t, p in zip(trials, predicted, strict=True)
    ]
    calibration = calibrate(shuffled)
    assert calibration.trust < 0.0
    assert not calibration.trusted
    assert calibration.baseline_error < calibration.log_error


@pytest.mark.parametrize("count", [1, 2])
def test_two_trials_prove_nothing(count: int) -> None:
    wrong = [observation(error=e) for e in (3.0, -3.0)[:count]]
    calibration = calibrate(wrong)
    assert math.isnan(calibration.trust)
    assert calibration.trusted


@pytest.mark.parametrize("error", [0.05, 0.1])
def test_close_predictions_are_trusted_also_where_a_rule_of_thumb_is_perfect(
    error: float,
) -> None:
    # All trials are scaled copies of one another: c / eta_e is exact.
    trials = [observation(learning_rate=0.01 * 1.5**k, error=0.0) for k in range(8)]
    predicted = [
        replace(t, expected=t.predicted + error * (-1) ** k) for k, t in enumerate(trials)
    ]
    calibration = calibrate(predicted)
    assert calibration.baseline_error < 1e-6
    assert calibration.log_error == pytest.approx(error)
    assert calibration.trusted


def test_three_trials_are_enough_where_predictions_are_grossly_wrong() -> None:
    """Off by a factor of a hundred, in turns, while `c / eta_e` is exact."""
    right = [observation(learning_rate=0.01 * 1.5**k) for k in range(3)]
    wrong = [replace(t, expected=t.predicted + 4.6 * (-1) ** k) for k, t in enumerate(right)]
    assert calibrate(right).trusted
    assert calibrate(wrong[:2]).trusted
    assert not calibrate(wrong).trusted


def test_off_by_more_than_a_factor_e_predictions_must_do_much_better_than_a_rule() -> None:
    trials = _varied(12, 0)
    off = []
    for error in (0.2, 2.0):
        predicted = [
            replace(t, expected=t.observed + error * (-1) ** k) for k, t in enumerate(trials)
        ]
        off.append(calibrate(predicted))
    assert off[0].trusted
    assert not off[1].trusted
    assert off[1].trust < 0.5


def test_a_trial_near_the_edge_of_stability_says_less_about_the_predictions() -> None:
    calm = _varied(6, 0)
    errors = []
    for stability in (0.05, 1.5):
        late = observation(learning_rate=0.02, stability=stability)
        trials = [*calm, replace(late, expected=late.observed - 1.5)]
        errors.append(calibrate(trials).log_error)
    assert errors[0] == pytest.approx(1.5 / math.sqrt(7), rel=0.05)
    assert errors[1] < 0.6 * errors[0]


def test_one_trial_that_is_far_off_does_not_condemn_the_others() -> None:
    right = [observation(learning_rate=0.01 * 1.5**k) for k in range(6)]
    one = [*right[:5], replace(right[5], expected=right[5].predicted + 4.0)]
    every = [replace(t, expected=t.predicted + 4.0 * (-1) ** k) for k, t in enumerate(right)]
    assert calibrate(one).trust < -1.0
    assert calibrate(one).trusted
    assert not calibrate(every).trusted


def test_trials_near_the_edge_of_stability_alone_condemn_no_predictions() -> None:
    trusted = []
    for stability in (0.05, 1.5):
        trials = [observation(learning_rate=0.01 * 1.5**k, stability=stability) for k in range(6)]
        wrong = [replace(t, expected=t.observed + 2.0 * (-1) ** k) for k, t in enumerate(trials)]
        trusted.append(calibrate(wrong).trusted)
    assert trusted == [False, True]


def test_predictions_that_rank_nothing_are_distrusted_also_where_the_rule_does_no_better() -> None:
    trials = [observation(learning_rate=0.01 * 2.5**k) for k in range(8)]
    # What was seen of each is that of another one, whatever the learning rate.
    others = [trials[k] for k in (5, 2, 7, 0, 6, 3, 1, 4)]
    mixed = [
        replace(trial, observed=other.observed, errors=other.errors)
        for trial, other in zip(trials, others, strict=True)
    ]
    calibration = calibrate(mixed)
    assert -0.75 < calibration.rank_agreement < 0.2
    assert calibration.log_error > 1.0
    assert calibration.superiority < 1.05
    assert not calibration.trusted
    assert calibration.fault == "far off and in no order"
