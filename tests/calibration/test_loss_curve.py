from __future__ import annotations

import math

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
from numpy.typing import NDArray
import pytest

from optuna_ttp.calibration import LossCurve


DEPTHS = np.array([0.1, 0.3, 0.5, 1.0, 2.0, 3.0])


def _exponential(tau: float, steps: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(2.0 * np.exp(-steps / tau))


# Exact curves


@pytest.mark.parametrize(
    ("tau", "n_steps"), [(20, 100), (50, 200), (100, 400), (1000, 5000), (30_000, 100_000)]
)
def test_an_exponential_is_recovered_also_at_its_end(tau: float, n_steps: int) -> None:
    curve = LossCurve.of(_exponential(tau, np.arange(n_steps, dtype=float)))
    expected = _exponential(tau, curve.steps)
    np.testing.assert_allclose(curve.losses, expected, rtol=2e-3)
    assert curve.losses[-1] == pytest.approx(expected[-1], rel=2e-3)
    assert curve.steps[-1] == n_steps - 1
    assert curve.n_steps == n_steps
    assert not curve.diverged


@given(tau=st.floats(10, 1e4), length=st.floats(1, 8), scale=st.floats(1e-6, 1e6))
@settings(max_examples=30)
def test_an_exponential_passes_depths_when_it_does(
    tau: float, length: float, scale: float
) -> None:
    t = np.arange(math.ceil(min(tau * length, 20_000)) + 3, dtype=float)
    depths = DEPTHS[(DEPTHS * tau > 3) & (DEPTHS * tau < t[-1] - 1)]
    times, errors = LossCurve.of(scale * np.exp(-t / tau)).log_first_passage_times(
        scale * np.exp(-depths)
    )
    np.testing.assert_allclose(np.exp(times), depths * tau, rtol=0.01)
    assert (errors > 0).all()
    # As sure as half a step, give or take.
    assert (errors < 0.03 + 1.0 / (depths * tau)).all()


@pytest.mark.parametrize("power", [0.3, 1.0])
def test_a_power_law_is_recovered(power: float) -> None:
    t = np.arange(5000, dtype=float)
    curve = LossCurve.of((1.0 + t / 10.0) ** -power)
    np.testing.assert_allclose(curve.losses, (1.0 + curve.steps / 10.0) ** -power, rtol=0.02)


def test_steps_with_gaps_are_as_good() -> None:
    t = np.arange(0.0, 4000.0, 50.0)
    curve = LossCurve.of(_exponential(800, t), t)
    np.testing.assert_allclose(curve.losses, _exponential(800, curve.steps), rtol=5e-3)
    assert curve.n_steps == 3951
    times, _ = curve.log_first_passage_times(2.0 * np.exp(-DEPTHS))
    np.testing.assert_allclose(np.exp(times), 800 * DEPTHS, rtol=0.01)


@given(
    gaps=st.lists(st.integers(1, 30), min_size=20, max_size=60),
    tau=st.floats(100, 1000),
    start=st.integers(0, 3),
)
@settings(max_examples=30)
def test_steps_may_be_irregular(gaps: list[int], tau: float, start: int) -> None:
    t = start + np.cumsum([0, *gaps]).astype(float)
    curve = LossCurve.of(_exponential(tau, t), t)
    np.testing.assert_allclose(curve.losses, _exponential(tau, curve.steps), rtol=0.05)
    assert set(curve.steps) <= set(t)
    assert curve.n_steps == t[-1] + 1


def test_a_plateau_is_passed_at_its_end() -> None:
    # A warmed-up learning rate does nothing at first.
    t = np.arange(600.0)
    losses = np.where(t < 100, 1.0, np.exp(-(t - 100) / 100))
    depths = np.array([0.05, 0.1, 0.5, 1.0, 2.0])
    times, _ = LossCurve.of(losses).log_first_passage_times(np.exp(-depths))
    np.testing.assert_allclose(np.exp(times), 100 + 100 * depths, rtol=0.015)


def test_a_noisy_plateau_is_passed_at_its_end() -> None:
    rng = np.random.default_rng(0)
    t = np.arange(600.0)
    losses = np.where(t < 100, 1.0, np.exp(-(t - 100) / 100))
    depths = np.array([0.1, 0.5, 1.0, 2.0])
    for _ in range(20):
        noisy = losses * np.exp(rng.normal(0, 0.1, len(t)))
        times, _ = LossCurve.of(noisy).log_first_passage_times(np.exp(-depths))
        np.testing.assert_allclose(np.exp(times), 100 + 100 * depths, rtol=0.12)


# Spikes


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_spike_does_not_undo_what_was_passed_before(noise: float) -> None:
    rng = np.random.default_rng(0)
    t = np.arange(600.0)
    # Down to exp(-1), thrown up, and down again from there 300 steps later.
    losses = np.where(t < 100, np.exp(-t / 100), np.where(t < 400, 3.0, np.exp(-(t - 300) / 100)))
    losses *= np.exp(rng.normal(0.0, noise, len(t)))
    curve = LossCurve.of(losses)
    times, errors = curve.log_first_passage_times(np.exp(-np.array([0.3, 0.6, 1.5])))
    np.testing.assert_allclose(np.exp(times), [30, 60, 450], rtol=0.1)
    # Two thirds of the last time were lost in the spike.
    assert errors[:2].max() < 0.2
    assert errors[2] == pytest.approx(math.log(450 / 150), rel=0.15)
    assert curve.lost == pytest.approx(300, rel=0.1)


def test_noise_is_hardly_taken_for_spikes() -> None:
    rng = np.random.default_rng(0)
    t = np.arange(2000.0)
    lost = [
        LossCurve.of(_exponential(500, t) * np.exp(rng.normal(0.0, 0.3, len(t)))).lost
        for _ in range(20)
    ]
    assert np.mean(lost) < 0.02 * len(t)


# Noise


@pytest.mark.parametrize(
    ("tau", "n_steps", "noise"), [(200, 900, 0.1), (200, 900, 0.3), (1000, 4000, 0.3)]
)
def test_standard_errors_cover_four_fifths(tau: float, n_steps: int, noise: float) -> None:
    rng = np.random.default_rng(0)
    t = np.arange(n_steps, dtype=float)
    inside, away = [], []
    for _ in range(60):
        factors = np.exp(rng.normal(0.0, noise, n_steps) - 0.5 * noise**2)
        times, errors = LossCurve.of(_exponential(tau, t) * factors).log_first_passage_times(
            2.0 * np.exp(-DEPTHS)
        )
        # What is less sure hardly counts where it is used.
        known = np.isfinite(times) & (errors < 0.3)
        off = (times - np.log(tau * DEPTHS))[known]
        inside.append(np.abs(off) < 1.2816 * errors[known])
        away.append(off / errors[known])
    assert 0.7 < np.concatenate(inside).mean() < 0.9
    # Neither early nor late on the whole.
    assert abs(np.concatenate(away).mean()) < 0.3


@pytest.mark.parametrize("depth", [0.1, 0.3])
def test_noise_does_not_make_first_passages_of_shallow_levels_early(depth: float) -> None:
    rng = np.random.default_rng(0)
    t = np.arange(4000.0)
    away = []
    for _ in range(40):
        factors = rng.gamma(4.0, 0.25, len(t))
        times, errors = LossCurve.of(_exponential(1000, t) * factors).log_first_passage_times(
            2.0 * np.exp(-np.array([depth]))
        )
        if np.isfinite(times[0]):
            away.append((times[0] - np.log(1000 * depth)) / errors[0])
    assert len(away) > 20
    assert np.mean(np.abs(away) < 1.2816) > 0.65
    assert abs(np.mean(away)) < 0.5


def test_errors_shrink_with_the_noise_and_grow_without_slope() -> None:
    rng = np.random.default_rng(0)
    t = np.arange(2000.0)
    noise = rng.normal(0.0, 1.0, len(t))
    levels = 2.0 * np.exp(-np.array([0.5, 1.0]))
    errors = [
        LossCurve.of(_exponential(500, t) * np.exp(s * noise)).log_first_passage_times(levels)[1]
        for s in (0.02, 0.1, 0.4)
    ]
    assert (errors[0] < errors[1]).all() and (errors[1] < errors[2]).all()
    flat = LossCurve.of(np.exp(-0.7 * np.log1p(t / 100) + 0.1 * noise))
    steep = LossCurve.of(np.exp(-t / 300 + 0.1 * noise))
    level = np.array([math.exp(-1.0)])
    assert flat.log_first_passage_times(level)[1] > steep.log_first_passage_times(level)[1]


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_the_errors_of_the_losses_are_those_of_the_window(noise: float) -> None:
    rng = np.random.default_rng(1)
    t = np.arange(1000.0)
    away = []
    for _ in range(40):
        factors = np.exp(rng.normal(0.0, noise, len(t)) - 0.5 * noise**2)
        curve = LossCurve.of(_exponential(500, t) * factors)
        late = curve.steps > 50
        off = np.log(curve.losses / _exponential(500, curve.steps)) / curve.errors
        away.append(off[late])
    assert 0.85 < np.concatenate(away).std() < 1.15
    assert abs(np.concatenate(away).mean()) < 0.15


# What is not finite, and what is refused


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e305])
def test_a_curve_ends_where_the_loss_is_no_number_any_more(bad: float) -> None:
    losses = _exponential(50, np.arange(100.0))
    losses[60:] = bad
    curve = LossCurve.of(losses)
    assert curve.diverged
    assert curve.steps[-1] == 59
    assert curve.n_steps == 100
    assert np.isfinite(curve.losses).all() and np.isfinite(curve.errors).all()
    times, _ = curve.log_first_passage_times(2.0 * np.exp(-np.array([0.5, 1.0, 1.5])))
    np.testing.assert_allclose(np.exp(times[:2]), [25, 50], rtol=0.03)
    assert math.isnan(times[2])
    assert curve.n_gaps == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e305])
@pytest.mark.parametrize("places", [[0], [60], [97, 98], [0, 1, 30, 31], [99]])
def test_a_batch_that_overflows_is_left_out(bad: float, places: list[int]) -> None:
    whole = _exponential(50, np.arange(100.0))
    losses = whole.copy()
    losses[places] = bad
    curve, expected = LossCurve.of(losses), LossCurve.of(whole)
    assert not curve.diverged
    assert curve.n_gaps == len(places) and curve.n_steps == 100
    assert curve.steps[-1] >= 98 and not set(places) & set(curve.steps)
    levels = 2.0 * np.exp(-np.array([0.2, 0.5, 1.0, 1.9]))
    np.testing.assert_allclose(
        curve.log_first_passage_times(levels)[0],
        expected.log_first_passage_times(levels)[0],
        atol=0.02,
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_curve_may_end_before_it_begins(bad: float) -> None:
    curve = LossCurve.of([bad, bad, bad])
    assert curve.diverged and len(curve.steps) == 0 and curve.n_steps == 3
    times, errors = curve.log_first_passage_times(np.array([0.9, 0.7]))
    assert np.isnan(times).all() and np.isnan(errors).all()


def test_one_loss_is_no_first_passage() -> None:
    curve = LossCurve.of([1.0])
    assert curve.steps.tolist() == [0.0] and curve.losses.tolist() == [1.0]
    times, errors = curve.log_first_passage_times(np.array([0.9, 0.5]))
    assert np.isnan(times).all() and np.isnan(errors).all()


def test_a_loss_of_zero_is_as_small_as_it_gets() -> None:
    curve = LossCurve.of([1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert (curve.losses > 0).all()
    assert np.isfinite(curve.log_first_passage_times(np.array([0.2]))[0]).all()


def test_a_curve_that_does_not_fall_passes_nothing() -> None:
    for losses in ([1.0] * 50, np.linspace(1.0, 2.0, 50)):
        assert np.isnan(
            LossCurve.of(losses).log_first_passage_times(np.array([0.95, 0.5]))[0]
        ).all()


@pytest.mark.parametrize(
    ("losses", "steps", "message"),
    [
        ([], None, "must have at least one loss but got none"),
        ([1.0, -0.5], None, "must not be negative but got -0.5"),
        ([1.0, -math.inf], None, "must not be negative but got -inf"),
        ([1.0, 0.5], [0], r"same length but got shapes \(2,\) and \(1,\)"),
        ([[1.0, 0.5]], None, "same length"),
        ([1.0, 0.5], [1, 1], "must ascend"),
        ([1.0, 0.5], [2, 1], "must ascend"),
        ([1.0, 0.5], [-1, 1], "must ascend"),
        ([1.0, 0.5], [0.0, math.nan], "must ascend"),
        ([1.0, 0.5], [0.0, math.inf], "must ascend"),
    ],
)
def test_what_is_no_curve_is_refused(
    losses: list[float], steps: list[float] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LossCurve.of(losses, steps)


# Properties


ANY_LOSSES = st.lists(
    st.floats(0, 10) | st.sampled_from([0.0, 1e-320, 1e20, 1e299, 1e308, math.inf, math.nan]),
    min_size=1,
    max_size=80,
)


@given(losses=ANY_LOSSES, gap=st.integers(1, 1000))
def test_whatever_is_logged_gives_a_curve_of_numbers(losses: list[float], gap: int) -> None:
    steps = gap * np.arange(len(losses))
    curve = LossCurve.of(losses, steps)
    good = np.abs(losses) < 1e300
    places = np.flatnonzero(good)
    down = len(places) > 1 and losses[places[-1]] < losses[places[0]]
    by_chance = not good[-1] and len(losses) > 2 and bool(good[-2]) and down
    assert curve.diverged == (not good[-1] and not by_chance)
    assert curve.n_gaps == (places[-1] + 1 - len(places) if len(places) else 0) + by_chance
    assert curve.n_steps == steps[-1] + 1
    assert (np.diff(curve.steps) > 0).all()
    assert curve.steps.shape == curve.losses.shape == curve.errors.shape
    assert np.isfinite(curve.losses).all() and (curve.losses > 0).all()
    assert np.isfinite(curve.errors).all() and (curve.errors >= 0).all()
    if len(places):
        assert curve.steps[0] == steps[places[0]] and curve.steps[-1] == steps[places[-1]]
    levels = np.array([9.0, 1.0, 0.1, 1e-3])
    times, errors = curve.log_first_passage_times(levels)
    known = np.isfinite(times)
    np.testing.assert_array_equal(known, np.isfinite(errors))
    # Deeper is never sooner.
    assert (np.diff(times[known]) >= 0).all()
    assert (errors[known] > 0).all()
    if known.any():
        assert np.exp(times[known]).max() <= max(curve.steps[-1], 0.1) * (1 + 1e-9)


@given(
    losses=st.lists(st.floats(0.5, 1.5), min_size=5, max_size=60),
    scale=st.floats(1e-3, 1e3),
    gap=st.integers(1, 100),
)
@settings(max_examples=40)
def test_units_do_not_matter(losses: list[float], scale: float, gap: int) -> None:
    plain = LossCurve.of(losses)
    other = LossCurve.of(scale * np.array(losses), gap * np.arange(len(losses)))
    np.testing.assert_allclose(other.losses, scale * plain.losses, rtol=1e-6)
    np.testing.assert_allclose(other.steps, gap * plain.steps)
    np.testing.assert_allclose(other.errors, plain.errors, rtol=1e-5, atol=1e-9)


def test_points_are_few_and_every_one_at_first() -> None:
    curve = LossCurve.of(_exponential(30_000, np.arange(100_000.0)))
    assert curve.steps[:20].tolist() == list(range(20))
    assert len(curve.steps) < 250
    assert (np.diff(curve.steps)[25:-1] / curve.steps[25:-2] < 0.0501).all()
