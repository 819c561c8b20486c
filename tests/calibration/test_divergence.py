"""What trials tell about the learning rate from which training does not recover."""

from __future__ import annotations

from dataclasses import replace
import math
import warnings

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from optuna_ttp.calibration import calibrate
from optuna_ttp.calibration._divergence import DivergenceLimit
from optuna_ttp.calibration._observation import failed
from tests.observations import observation


RATIOS = st.floats(1e-4, 1e4)


@given(
    stability=st.lists(st.floats(0, 1e6), min_size=2, max_size=6),
    trials=st.lists(st.tuples(RATIOS, st.booleans()), max_size=5),
)
def test_the_probability_rises_with_the_learning_rate(
    stability: list[float], trials: list[tuple[float, bool]]
) -> None:
    limit = DivergenceLimit.of([s for s, _ in trials], [d for _, d in trials])
    p = limit.probability(np.sort(stability))
    assert (np.diff(p) >= -1e-12).all()
    assert ((p >= 0) & (p <= 1 + 1e-12)).all()


def test_the_prior_at_known_points() -> None:
    p = DivergenceLimit.of().probability([0.0, 0.25, 4.2, 1e9])
    assert p[0] == 0.0
    assert p[1] < 0.01
    assert p[2] == pytest.approx(0.5)
    assert p[3] == pytest.approx(1.0)


@given(stability=RATIOS, at=RATIOS)
def test_a_trial_that_diverged_makes_divergence_likelier_everywhere(
    stability: float, at: float
) -> None:
    before = DivergenceLimit.of().probability(at)
    assert DivergenceLimit.of([stability], [True]).probability(at) >= before - 1e-12
    assert DivergenceLimit.of([stability], [False]).probability(at) <= before + 1e-12


def test_many_trials_find_the_limit() -> None:
    """Brute force: the network's limit is 0.7, and trials are drawn by the model itself."""
    rng = np.random.default_rng(0)
    stability = np.exp(rng.uniform(-2.0, 2.0, 400))
    diverged = rng.random(400) < 1.0 / (1.0 + (stability / 0.7) ** (-1.0 / 0.25))
    limit = DivergenceLimit.of(stability, diverged)
    assert limit.probability(0.7) == pytest.approx(0.5, abs=0.1)
    assert limit.probability(0.35) < 0.1
    assert limit.probability(1.4) > 0.9


def test_a_calibration_learns_from_trials_that_diverged_without_any_progress() -> None:
    fine = observation(stability=2.0)
    gone = replace(fine, observed=np.full_like(fine.observed, math.nan), diverged=True)
    prior = calibrate([]).divergence.probability(2.0)
    assert calibrate([gone, gone]).divergence.probability(2.0) > prior + 0.2
    assert calibrate([fine, fine]).divergence.probability(2.0) < prior
    # Stopped before it passed anything: that tells nothing.
    stopped = replace(gone, diverged=False)
    assert calibrate([stopped]).divergence.probability(2.0) == pytest.approx(prior)


def test_a_trial_that_takes_twice_as_long_as_expected_or_more_has_failed() -> None:
    fine = observation(stability=1.5, deepest=1.0)
    slow = replace(fine, n_steps=3.0 * fine.n_steps)
    slower = replace(fine, n_steps=1.2 * fine.n_steps)
    gone = replace(fine, diverged=True)
    assert failed([fine, slow, slower, gone]).tolist() == [False, True, False, True]
    # What a spike has cost does not count, and whoever passed the last level has arrived.
    spiked = replace(slow, lost=1.9 * fine.n_steps)
    arrived = replace(observation(deepest=7.0), n_steps=1e9)
    assert not failed([spiked, arrived]).any()
    assert not len(failed([]))


def test_where_trials_do_not_do_as_predicted_none_are_expected_to() -> None:
    fine = observation(stability=1.5, deepest=1.0)
    slow = replace(fine, n_steps=5.0 * fine.n_steps)
    prior = calibrate([]).failure.probability([0.5, 1.5])
    assert 0.15 < prior[0] < 0.4 < prior[1] < 0.75
    assert (calibrate([slow, slow]).failure.probability([0.5, 1.5]) > prior + 0.1).all()
    assert (calibrate([fine, fine]).failure.probability([0.5, 1.5]) < prior - 0.1).all()
    # It is no divergence.
    assert calibrate([slow]).divergence.probability(1.5) < calibrate([]).divergence.probability(
        1.5
    )


def test_a_network_without_curvature_tells_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        limit = DivergenceLimit.of([0.0, 1.0], [False, False])
    assert float(limit.probability(1.0)) < float(DivergenceLimit.of().probability(1.0))
