from __future__ import annotations

from dataclasses import replace
import math

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
from numpy.typing import NDArray
import pytest
from scipy.stats import t as student

from optuna_ttp.calibration import calibrate
from optuna_ttp.calibration import Calibration
from optuna_ttp.calibration import DEPTHS
from optuna_ttp.calibration import KNOTS
from optuna_ttp.calibration import Observation
from optuna_ttp.calibration import PriorScale
from optuna_ttp.calibration import RULES
from optuna_ttp.calibration import SimulatedFirstPassages
from tests.observations import DEEP
from tests.observations import first_passages
from tests.observations import Growth
from tests.observations import observation
from tests.observations import trials_of
from tests.observations import unchanged


SEEN = KNOTS <= DEEP - 0.5


def _slower(depth: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.full_like(depth, -math.log(1.5))


def _grows(depth: NDArray[np.float64]) -> NDArray[np.float64]:
    """Twentyfold, most of it early."""
    return np.asarray(math.log(20.0) * depth / (depth + 1.0))


def _shrinks_and_grows(depth: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(0.5 * (1.0 - np.cos(1.2 * depth)) - 0.4 * depth)


GROWTHS = [unchanged, _grows, _shrinks_and_grows]


def _corrected(calibration: Calibration, trial: Observation) -> tuple[NDArray[np.float64], ...]:
    logs, sds = calibration.correct(
        SimulatedFirstPassages(
            DEPTHS[None],
            trial.predicted[None],
            trial.growth[None],
            trial.covariates[None],
            trial.instability[None],
            np.array([trial.lag]),
        )
    )
    return logs[0], sds[0]


# Nothing seen


def test_without_observations_nothing_is_corrected() -> None:
    trial = observation()
    for calibration in (Calibration.none(), calibrate([])):
        assert calibration.n_observed == 0
        assert not calibration.weights.any()
        assert math.isnan(calibration.rank_agreement)
        assert math.isnan(calibration.log_error)
        assert math.isnan(calibration.trust)
        assert calibration.trusted
        logs, sds = _corrected(calibration, trial)
        np.testing.assert_allclose(logs, trial.predicted, rtol=1e-12)
        # The deeper, the less is known.
        assert (np.diff(sds) > 0).all()
        assert np.isfinite(calibration.log_growth_sd).all()


def test_unusable_trials_are_left_out() -> None:
    good = trials_of(_grows, 3)
    nothing = np.full(len(DEPTHS), np.nan)
    unusable = [
        replace(good[0], observed=nothing),
        replace(good[0], predicted=nothing),
        replace(good[0], n_steps=0.0),
        replace(good[0], observed=nothing, n_steps=1.0, diverged=True),
    ]
    expected = calibrate(good)
    calibration = calibrate([*unusable[:2], *good, *unusable[2:]])
    assert calibration.n_observed == 3
    # Whether they diverged tells something nevertheless.
    alike = replace(calibration, divergence=expected.divergence, failure=expected.failure)
    assert repr(alike) == repr(expected)


# The kernel's growth


@pytest.mark.parametrize("log_growth", GROWTHS)
@pytest.mark.parametrize("count", [1, 3, 10])
def test_a_known_growth_is_recovered_within_its_band(log_growth: Growth, count: int) -> None:
    calibration = calibrate(trials_of(log_growth, count))
    truth = log_growth(KNOTS)
    away = (calibration.log_growth - truth)[SEEN] / calibration.log_growth_sd[SEEN]
    assert np.abs(away).max() < 3.0
    assert math.sqrt(float(np.square(away).mean())) < 1.7
    assert calibration.log_growth_sd[SEEN].max() < 0.35
    assert calibration.n_observed == count


@pytest.mark.parametrize("log_growth", [*GROWTHS, _slower])
def test_what_was_learned_predicts_the_next_trial(log_growth: Growth) -> None:
    calibration = calibrate(trials_of(log_growth, 6))
    # More momentum than in any trial is expected to be slower than predicted.
    for momentum, error in ((0.0, 0.08), (0.5, 0.08), (0.9, 0.25)):
        trial = observation(log_growth, momentum=momentum, learning_rate=1e-4, batch_size=8)
        logs, _ = _corrected(calibration, trial)
        seen = np.isfinite(trial.observed)
        # Far less than the times were off by: up to log(20).
        np.testing.assert_allclose(logs[seen], trial.observed[seen], atol=error)


@pytest.mark.parametrize("factor", [0.1, 0.3, 3.0, 10.0])
def test_a_constant_factor_is_learned_from_trials_that_agree(factor: float) -> None:
    trials = [
        replace(trial, observed=trial.predicted + math.log(factor), n_steps=1e9, diverged=True)
        for trial in trials_of(unchanged, 6)
    ]
    logs, sds = _corrected(calibrate(trials), trials[0])
    one = np.searchsorted(DEPTHS, 1.0)
    np.testing.assert_allclose(logs[one:], trials[0].predicted[one:] + math.log(factor), atol=0.05)
    # Nothing contradicts it.
    assert sds[one] < 0.2


def test_a_correction_moves_from_the_prior_to_the_data() -> None:
    at_one = []
    for n in (1, 2, 5, 50):
        logs, _ = _corrected(calibrate([observation(_grows)] * n), observation())
        at_one.append(float(np.interp(1.0, DEPTHS, logs)))
    predicted = float(np.interp(1.0, DEPTHS, observation().predicted))
    truth = float(np.interp(1.0, DEPTHS, observation(_grows).observed))
    away = np.abs(np.array(at_one) - truth)
    assert away[0] < 0.2 * abs(predicted - truth)
    assert away[-1] < 0.02
    assert (np.diff(away) <= 0.01).all()


def test_unseen_depths_are_less_sure() -> None:
    shallow = calibrate(trials_of(_grows, 6, deepest=1.0))
    sds = shallow.log_growth_sd
    assert sds[KNOTS <= 0.75].max() < 0.15
    assert (np.diff(sds[KNOTS >= 1.0]) > 0).all()
    assert sds[-1] > 10 * sds[KNOTS <= 0.75].max()
    # Not wild: the correction goes on about as it was.
    assert np.abs(shallow.log_growth).max() < 2 * math.log(20.0)
    assert sds[-1] <= calibrate([]).log_growth_sd[-1]
    _, seen_sds = _corrected(shallow, observation())
    _, known_sds = _corrected(calibrate(trials_of(_grows, 6)), observation())
    deep = np.searchsorted(DEPTHS, 2.5)
    assert seen_sds[deep] > 2 * known_sds[deep]


@given(order=st.permutations(range(7)))
@settings(max_examples=15)
def test_the_order_of_trials_does_not_change_what_is_learned(order: list[int]) -> None:
    trials = trials_of(_shrinks_and_grows, 7)
    trials[3] = replace(trials[3], n_steps=1e3 * trials[3].n_steps)
    first, other = calibrate(trials), calibrate([trials[i] for i in order])
    np.testing.assert_allclose(other.weights, first.weights, atol=1e-6)
    np.testing.assert_allclose(other.covariance, first.covariance, atol=1e-6)
    assert other.scale == pytest.approx(first.scale, rel=1e-6)
    assert other.rank_agreement == pytest.approx(first.rank_agreement)
    assert other.log_error == pytest.approx(first.log_error)


@given(shift=st.floats(-5, 5))
@settings(max_examples=15)
def test_the_unit_of_time_does_not_matter(shift: float) -> None:
    trials = trials_of(_grows, 4)
    shifted = [
        replace(
            t,
            predicted=t.predicted + shift,
            expected=t.expected + shift,
            observed=t.observed + shift,
            n_steps=max(1.0, t.n_steps * math.exp(shift)),
            effective_learning_rate=t.effective_learning_rate * math.exp(-shift),
            lag=t.lag * math.exp(shift),
            diverged=True,
        )
        for t in trials
    ]
    plain = calibrate([replace(t, diverged=True) for t in trials])
    np.testing.assert_allclose(calibrate(shifted).weights, plain.weights, atol=1e-5)


def test_a_correction_that_was_simulated_with_counts_from_there() -> None:
    plain = trials_of(_grows, 5)
    half = 0.5 * _grows(KNOTS)
    # Simulated with half of the growth: what is predicted is between.
    partly = [
        replace(
            trial,
            predicted=first_passages(
                1.0 / trial.effective_learning_rate,
                lambda depth: np.interp(depth, KNOTS, half),
            ),
            growth=half,
        )
        for trial in plain
    ]
    first, other = calibrate(plain), calibrate(partly)
    np.testing.assert_allclose(other.log_growth[SEEN], first.log_growth[SEEN], atol=0.08)


# Covariates and instability


def test_what_momentum_costs_is_learned_apart_from_the_growth() -> None:
    trials = []
    for k in range(12):
        momentum = 0.9 * (k % 2)
        trials.append(
            observation(_grows, learning_rate=1e-4, momentum=momentum, error=0.25 * momentum / 0.9)
        )
    calibration = calibrate(trials)
    one = np.searchsorted(DEPTHS, 1.0)
    for trial in trials[:2]:
        logs, _ = _corrected(calibration, trial)
        np.testing.assert_allclose(logs[one:12], trial.observed[one:12], atol=0.1)


def test_instability_alone_makes_slow_what_is_near_the_limit() -> None:
    trials = [
        observation(stability=s, error=0.3 * s) for s in (0.9, 0.8, 0.05, 0.9, 0.05, 0.8, 0.9)
    ]
    calibration = calibrate(trials)
    one = np.searchsorted(DEPTHS, 1.0)
    near, far = (observation(stability=s) for s in (0.9, 0.05))
    late = _corrected(calibration, near)[0] - near.predicted
    calm = _corrected(calibration, far)[0] - far.predicted
    assert 0.1 < late[one] < 0.4
    assert abs(calm[one]) < 0.06
    # Times near the limit scatter.
    assert _corrected(calibration, near)[1][one] > 1.5 * _corrected(calibration, far)[1][one]


# Trials that were cut off


@pytest.mark.parametrize(("patience", "later"), [(3.0, 0.03), (20.0, 0.1)])
def test_a_trial_that_never_reached_its_next_level_makes_predictions_later(
    patience: float, later: float
) -> None:
    trials = trials_of(unchanged, 2, deepest=1.0)
    short = observation(deepest=1.0)
    stuck = replace(short, n_steps=patience * short.n_steps)
    deep = np.searchsorted(DEPTHS, 1.5)
    before = _corrected(calibrate([*trials, short]), short)[0]
    after, _ = _corrected(calibrate([*trials, stuck]), short)
    assert after[deep] > before[deep] + later
    # It says nothing about what came before.
    one = np.searchsorted(DEPTHS, 0.8)
    assert after[one] == pytest.approx(before[one], abs=0.1)


def test_a_trial_that_stopped_before_its_next_level_was_due_says_nothing_about_it() -> None:
    short = observation(deepest=1.0)
    trials = trials_of(unchanged, 3, deepest=1.0)
    first = calibrate([*trials, short])
    longer = calibrate([*trials, replace(short, n_steps=1.02 * short.n_steps)])
    np.testing.assert_allclose(longer.weights, first.weights, atol=1e-9)


def test_a_trial_that_diverged_does_not_make_predictions_later() -> None:
    trials = trials_of(unchanged, 2, deepest=1.0)
    short = observation(deepest=1.0)
    diverged = replace(short, n_steps=20.0 * short.n_steps, diverged=True)
    np.testing.assert_allclose(
        calibrate([*trials, diverged]).weights, calibrate([*trials, short]).weights, atol=1e-9
    )


@pytest.mark.parametrize("stability", [0.05, 0.5])
def test_what_was_lost_in_a_spike_does_not_make_predictions_later(stability: float) -> None:
    trials = trials_of(unchanged, 2, deepest=1.0)
    short = observation(deepest=1.0, stability=stability)
    stuck = replace(short, n_steps=50.0 * short.n_steps, lost=49.0 * short.n_steps)
    deep = np.searchsorted(DEPTHS, 1.5)
    before = _corrected(calibrate([*trials, short]), short)[0]
    after, _ = _corrected(calibrate([*trials, stuck]), short)
    assert after[deep] == pytest.approx(before[deep], abs=0.02)


def test_a_trial_near_the_limit_that_got_stuck_tells_less_than_a_calm_one() -> None:
    trials = trials_of(unchanged, 2, deepest=1.0)
    calm = observation(deepest=1.0)
    later = []
    for stability in (0.05, 0.6):
        short = observation(deepest=1.0, stability=stability)
        stuck = replace(short, n_steps=100.0 * short.n_steps)
        deep = np.searchsorted(DEPTHS, 1.5)
        before, _ = _corrected(calibrate([*trials, short]), calm)
        after, _ = _corrected(calibrate([*trials, stuck]), calm)
        later.append(after[deep] - before[deep])
    assert later[1] < 0.2 * later[0]


# Rules of another kind, for an ablation


def test_rules_are_handed_down_to_whatever_is_learned() -> None:
    trials = trials_of(_grows, 6)
    stiff = replace(RULES, growth_prior=replace(RULES.growth_prior, slope_sd=1e-3, start_sd=1e-3))
    usual, hardly = calibrate(trials), calibrate(trials, rules=stiff)
    assert np.abs(usual.log_growth).max() > 1.0
    assert np.abs(hardly.log_growth).max() < 0.1
    wide = replace(RULES, errors=replace(RULES.errors, level_sd=1.0))
    assert (_corrected(calibrate(trials, rules=wide), trials[0])[1] > 0.5).all()
    early = replace(RULES, divergence=replace(RULES.divergence, half=0.5))
    assert calibrate([], rules=early).divergence.probability(1.0) > 0.6
    few = replace(RULES, fit=replace(RULES.fit, most_trials=1))
    assert calibrate(trials, rules=few).degrees_of_freedom == 3.0


def test_a_calibration_keeps_its_rules() -> None:
    trials = [observation(learning_rate=0.01 * 1.5**k) for k in range(6)]
    wrong = [replace(t, expected=t.predicted + 4.0 * (-1) ** k) for k, t in enumerate(trials)]
    patient = replace(RULES, trust=replace(RULES.trust, min_observations=9, min_distrust=9))
    assert not calibrate(wrong).trusted
    assert calibrate(wrong, rules=patient).trusted
    assert calibrate([], rules=patient).rules is Calibration.none(rules=patient).rules is patient


# The prior scale


def test_what_a_probe_finds_uncertain_is_learned_faster_and_less_sure() -> None:
    trial = observation(_grows, deepest=2.0)
    deep = np.searchsorted(DEPTHS, 1.5)
    sure = calibrate([trial], PriorScale(growth=0.3))
    unsure = calibrate([trial], PriorScale(growth=3.0))
    assert np.interp(1.0, KNOTS, unsure.log_growth) > np.interp(1.0, KNOTS, sure.log_growth)
    wide, narrow = (
        _corrected(calibrate([trial], PriorScale(scatter=s)), trial)[1][deep] for s in (4.0, 0.6)
    )
    assert wide > 2.0 * narrow


# How long a running trial still takes


@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_what_a_trial_scatters_by_at_first_is_not_the_pace_of_the_rest(factor: float) -> None:
    calibration = calibrate(trials_of(unchanged, 6))
    whole = observation(stability=0.05)
    early = np.searchsorted(DEPTHS, 0.2)
    observed = np.where(np.arange(len(DEPTHS)) < early, whole.predicted + math.log(factor), np.nan)
    running = replace(
        whole,
        observed=observed,
        errors=np.full(len(DEPTHS), 0.3),
        n_steps=math.exp(observed[early - 1]),
    )
    goal = int(np.searchsorted(DEPTHS, 2.0))
    depths = np.minimum(DEPTHS, DEPTHS[goal])
    logs = np.minimum(whole.predicted, whole.predicted[goal])
    rest, _ = calibration.remaining(running, depths, logs)
    assert rest == pytest.approx(math.exp(logs[-1]) - running.n_steps, rel=0.15)


def test_a_spike_at_the_start_does_not_slow_the_rest() -> None:
    calibration = calibrate(trials_of(unchanged, 6))
    # Its first level was due after six steps, and nothing was passed by step two hundred.
    trial = observation()
    stuck = replace(trial, observed=np.full(len(DEPTHS), np.nan), n_steps=200.0)
    goal = int(np.searchsorted(DEPTHS, 2.0))
    depths = np.minimum(DEPTHS, DEPTHS[goal])
    logs = np.minimum(trial.predicted, trial.predicted[goal])
    plain = math.exp(logs[-1])
    rest, _ = calibration.remaining(stuck, depths, logs)
    assert plain < rest < plain + 250.0


# Outliers and many trials


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_one_trial_that_does_not_fit_hardly_moves_six_that_do(factor: float) -> None:
    good = trials_of(_grows, 6)
    wrong = observation(_grows, error=math.log(factor), diverged=True)
    logs, sds = _corrected(calibrate(good), good[0])
    moved, _ = _corrected(calibrate([*good, wrong]), good[0])
    one = np.searchsorted(DEPTHS, 1.0)
    np.testing.assert_allclose(moved[one:14], logs[one:14], atol=0.1)
    assert (sds > 0).all()


def test_a_thousand_trials_are_learned_from() -> None:
    trials = trials_of(_grows, 250) * 4
    calibration = calibrate(trials)
    assert calibration.n_observed == 1000
    assert np.isfinite(calibration.weights).all() and np.isfinite(calibration.covariance).all()
    np.testing.assert_allclose(calibration.log_growth[SEEN], _grows(KNOTS)[SEEN], atol=0.15)


@given(seed=st.integers(0, 10**6), count=st.integers(1, 12))
@settings(max_examples=25)
def test_whatever_trials_show_the_correction_is_finite(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    trials = []
    for _ in range(count):
        trial = observation(
            learning_rate=10.0 ** rng.uniform(-6, 2),
            momentum=float(rng.choice([0.0, 0.99])),
            stability=10.0 ** rng.uniform(-3, 1),
            deepest=float(rng.choice(DEPTHS)),
            error=float(rng.normal(0, 4)),
            diverged=bool(rng.integers(2)),
        )
        end = rng.choice(DEPTHS)
        predicted = np.where(end >= DEPTHS, trial.predicted, np.nan)
        predicted[0] = trial.predicted[0]
        observed = np.where(rng.random(len(DEPTHS)) < 0.7, trial.observed, np.nan)
        n_steps = 10.0 ** rng.uniform(0, 6)
        trials.append(
            replace(
                trial, predicted=predicted, expected=predicted, observed=observed, n_steps=n_steps
            )
        )
    calibration = calibrate(trials)
    assert np.isfinite(calibration.weights).all()
    assert np.isfinite(calibration.log_growth_sd).all()
    np.linalg.cholesky(calibration.covariance)
    assert 0 < calibration.scale < math.inf
    assert 0 < calibration.instability_scale < math.inf
    logs, sds = _corrected(calibration, observation())
    assert np.isfinite(logs).all() and (np.diff(logs) >= 0).all()
    assert np.isfinite(sds).all() and (sds > 0).all()


# Intervals


@pytest.mark.parametrize(
    ("count", "scatter", "most"),
    [(1, 0.06, 0.95), (3, 0.06, 0.95), (8, 0.06, 0.95), (3, 0.0, 0.97), (8, 0.0, 0.95)],
)
def test_intervals_cover_four_fifths_of_the_next_trials(
    count: int, scatter: float, most: float
) -> None:
    inside = []
    for seed in range(40):
        calibration = calibrate(trials_of(_grows, count, seed=seed, scatter=scatter))
        wide = float(student.ppf(0.9, calibration.degrees_of_freedom))
        for trial in trials_of(_grows, 3, seed=1000 + seed, scatter=scatter):
            logs, sds = _corrected(calibration, trial)
            seen = np.isfinite(trial.observed) & (DEPTHS > 0.2)
            inside.append((np.abs(trial.observed - logs) < wide * sds)[seen])
    # Trials at a tenth of the stability limit are expected to scatter by six percent. It takes a
    # few that do not to learn that they do not.
    assert 0.7 < np.concatenate(inside).mean() < most
