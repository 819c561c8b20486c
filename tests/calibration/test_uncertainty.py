from __future__ import annotations

from dataclasses import replace
import math
from typing import Any

from hypothesis import assume
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
from scipy.stats import norm

from optuna_ttp.calibration import linearisation_sd
from optuna_ttp.calibration import prior_scale
from optuna_ttp.calibration import PriorScale
from optuna_ttp.calibration import probability_below
from optuna_ttp.calibration import stability_sd
from optuna_ttp.dynamics import Schedule
from optuna_ttp.dynamics import Smoothing
from optuna_ttp.prediction import Prediction
from optuna_ttp.prediction import PredictorSettings
from optuna_ttp.prediction import TrainingTimePredictor
from optuna_ttp.spectrum import Probe
from optuna_ttp.spectrum import Spectrum
from tests.cases import spectrum
from tests.observations import slower
from tests.predictors import predictor_with


def _linear(displacement: float | None = None) -> Spectrum:
    """Of a linear model, without a probe or with weights that have to go so far."""
    if displacement is None:
        return replace(spectrum(), probe=None)
    probe = Probe(np.array([1.0, 0.7]), np.array([0.0, displacement]), np.zeros(2), np.ones(2))
    return replace(spectrum(), probe=probe)


def _predictor(displacement: float | None = None, **arguments: Any) -> TrainingTimePredictor:
    if not any(name.startswith("target") for name in arguments):
        arguments["target_fraction"] = 0.6
    return predictor_with(_linear(displacement), kernel_growth="frozen", **arguments)


def _linear_sd() -> float:
    """Of the logarithm of a time, where the weights do not have to go far."""
    return linearisation_sd(_linear(0.0).probe, 0.6)


def _log_width(prediction: Prediction) -> float:
    """Of the interval, upwards from the median."""
    return float(np.log(prediction.steps_high / prediction.steps))


# The interval


@given(
    learning_rate=st.floats(1e-3, 20),
    batch_size=st.integers(1, 12),
    momentum=st.floats(0, 0.97),
    max_steps=st.integers(1, 400),
    n_seeds=st.integers(1, 3),
)
@settings(max_examples=40)
def test_interval_holds_the_steps_and_probabilities_are_probabilities(
    learning_rate: float, batch_size: int, momentum: float, max_steps: int, n_seeds: int
) -> None:
    predictor = _predictor(max_steps=max_steps, n_seeds=n_seeds)
    prediction = predictor.predict(learning_rate, batch_size, momentum)
    assert 0.0 <= prediction.p_converges <= 1.0
    assert 0.0 <= prediction.p_diverges <= 1.0
    assert prediction.p_converges + prediction.p_diverges <= 1.0 + 1e-12
    assert 0.0 <= prediction.steps_low <= prediction.steps_high
    if prediction.outcome == "converges":
        assert prediction.steps_low <= prediction.steps <= prediction.steps_high
        assert np.isfinite(prediction.steps_high)
        assert prediction.steps_low < prediction.steps_high
    if prediction.outcome == "diverges":
        assert prediction.p_diverges >= 0.5
        assert prediction.p_converges <= 0.5


def test_interval_is_the_one_that_holds_eight_out_of_ten() -> None:
    prediction = _predictor(0.0, exact=True).predict(0.001, 12)
    assert prediction.stability < 0.5
    # Only linearisation leaves an uncertainty.
    factor = math.exp(norm.ppf(0.9) * _linear_sd())
    assert prediction.steps > 500
    assert prediction.steps_high.item() == pytest.approx(prediction.steps * factor, rel=0.003)
    assert prediction.steps_low.item() == pytest.approx(prediction.steps / factor, rel=0.003)


def test_interval_grows_with_the_displacement_of_the_weights() -> None:
    near, further, unknown = (
        _log_width(_predictor(far).predict(0.005, 12)) for far in (0.0, 0.4, None)
    )
    assert near < further < unknown


def test_interval_grows_towards_the_stability_limit() -> None:
    predictor = _predictor(0.0, max_steps=1000)
    limit = float(predictor.max_learning_rate(12))
    prediction = predictor.predict(np.array([0.1, 0.4, 0.6, 0.9]) * limit, 12)
    widths = np.log(prediction.steps_high / prediction.steps_low)
    sds = stability_sd(prediction.stability)
    np.testing.assert_allclose(sds, [0.0, 0.0, 0.05, 0.2], atol=1e-6)
    # Few steps are rounded to whole ones.
    expected = 2 * norm.ppf(0.9) * np.hypot(_linear_sd(), sds)
    assert (np.abs(widths - expected) <= 3.0 / prediction.steps_low).all()


def test_interval_grows_where_eigenpairs_are_missing() -> None:
    whole = _spread_evenly(_linear(0.0))
    widths = []
    for rank in (21, 9, 7):
        cut = whole.truncate(rank=rank)
        assert (cut.explained_trace < 1.0 - 1e-6) == (rank < 21)
        predictor = TrainingTimePredictor(
            cut, target_fraction=0.85, settings=PredictorSettings(kernel_growth="frozen")
        )
        widths.append(_log_width(predictor.predict(0.0001, 12)))
    # Times are whole steps.
    assert widths[0] + 0.05 < widths[1] < widths[2] - 0.05


def _spread_evenly(linear: Spectrum) -> Spectrum:
    """Turn the eigenvectors of each triple of equal eigenvalues until all see as much to learn.

    How they are turned is arbitrary, and differs from one processor to another.
    """
    outputs = np.exp(linear.initial_outputs)
    residual = outputs / outputs.sum(axis=1, keepdims=True)
    residual[np.arange(len(residual)), linear.targets] -= 1.0
    vectors = np.array(linear.eigenvectors)
    for k in range(0, linear.rank, 3):
        seen = vectors[:, k : k + 3].T @ residual.ravel()
        away = seen / np.linalg.norm(seen) - np.full(3, 1.0 / np.sqrt(3.0))
        mirror = np.eye(3) - 2.0 * np.outer(away, away) / (away @ away)
        vectors[:, k : k + 3] = vectors[:, k : k + 3] @ mirror
    return replace(linear, eigenvectors=vectors)


def test_interval_of_what_is_not_reached_is_beyond_the_horizon() -> None:
    predictor = _predictor(0.0, exact=True)
    reached = predictor.predict(0.02, 12)
    late = predictor.predict(0.02, 12, max_steps=int(reached.steps) - 3)
    assert late.outcome == "not_reached"
    # The simulation ends at the horizon: that the target comes soon after is not known.
    assert late.steps_high == math.inf or late.steps_high >= reached.steps
    assert late.p_converges < 0.5


def test_calibration_moves_the_interval_with_the_steps() -> None:
    plain = _predictor(0.0)
    before = plain.predict(0.005, 12)
    after = plain.calibrated(slower(3.0)).predict(0.005, 12)
    assert after.steps == pytest.approx(3 * before.steps, rel=0.03)
    # Symmetric about the median, and as wide as what trials scatter by.
    assert after.steps_low < after.steps < after.steps_high
    assert after.steps**2 == pytest.approx(after.steps_low * after.steps_high, rel=0.03)
    assert 0.0 < _log_width(after) < 0.1


# Probabilities


@given(
    steps=st.floats(1, 1e8) | st.just(math.inf),
    sd=st.floats(0, 5),
    horizons=st.tuples(st.integers(1, 10**8), st.integers(1, 10**8)),
)
def test_probability_to_arrive_in_time_is_that_of_a_log_normal_time(
    steps: float, sd: float, horizons: tuple[int, int]
) -> None:
    early, late = (
        float(probability_below(np.array(steps), np.array(sd), np.array(h)))
        for h in sorted(horizons)
    )
    assert 0.0 <= early <= late <= 1.0
    if math.isinf(steps):
        assert late == 0.0
    elif sd > 1e-3:
        assert early == pytest.approx(
            norm.cdf(math.log(min(horizons) / steps) / sd), rel=1e-6, abs=1e-12
        )


def test_probability_to_converge_rises_with_the_horizon() -> None:
    predictor = _predictor(0.0)
    steps = int(predictor.predict(0.02, 12).steps)
    horizons = [steps // 2, steps - 1, steps, int(1.1 * steps), 2 * steps, 10 * steps]
    p = predictor.predict(0.02, 12, max_steps=horizons).p_converges
    assert (np.diff(p) >= 0).all()
    assert p[2] == pytest.approx(0.5, abs=0.02)
    assert p[-1] > 0.98


def test_probabilities_of_the_stability_regions() -> None:
    predictor = _predictor(0.0, max_steps=3000)
    limit = predictor.max_learning_rate(12)
    prediction = predictor.predict(np.array([0.02, 0.3, 1.0, 3.0, 7.0, 20.0]) * limit, 12)
    assert (np.diff(prediction.p_diverges) >= 0).all()
    assert prediction.p_diverges[0] < 0.01
    assert prediction.p_converges[0] > 0.98
    assert prediction.outcomes[-1] == "diverges"
    assert prediction.p_diverges[-1] > 0.9
    assert prediction.p_converges[-1] == 0.0


# Orders of the samples


@pytest.mark.parametrize("sampling", ["shuffle", "replacement"])
@pytest.mark.parametrize("n_seeds", [1, 2, 5])
def test_steps_are_the_geometric_mean_over_orders(n_seeds: int, sampling: Any) -> None:
    configuration = (0.2, 3, 0.6)
    logs = np.empty(n_seeds)
    for k in range(n_seeds):
        predictor = _predictor(0.0, n_seeds=1, seed=4 + k, sampling=sampling)
        one = predictor.predict(*configuration)
        logs[k] = math.log(predictor.target.crossing(one.curve_steps, one.curve_losses))
    prediction = _predictor(0.0, n_seeds=n_seeds, seed=4, sampling=sampling).predict(
        *configuration
    )
    assert prediction.steps == math.ceil(math.exp(logs.mean()) - 1e-9)
    spread = logs.std(ddof=1) if n_seeds > 1 else 0.0
    if n_seeds == 5:
        assert spread > 0
    sd = math.sqrt(spread**2 + _linear_sd() ** 2 + float(stability_sd(prediction.stability)) ** 2)
    median = math.exp(logs.mean())
    assert prediction.steps_high == math.ceil(median * math.exp(1.2816 * sd))
    assert prediction.steps_low == math.ceil(median / math.exp(1.2816 * sd))


def test_full_batches_have_one_order() -> None:
    one, many = (_predictor(n_seeds=n).predict(0.05, 12) for n in (1, 6))
    assert (one.steps, one.steps_low, one.steps_high) == (
        many.steps,
        many.steps_low,
        many.steps_high,
    )


def test_most_orders_decide_whether_the_target_is_reached() -> None:
    configuration = (0.2, 3, 0.6)
    times = sorted(
        float(_predictor(n_seeds=1, seed=k).predict(*configuration).steps) for k in range(3)
    )
    assert times[0] < times[-1]
    for horizon in sorted({times[0] - 1, *times}):
        reached = sum(time <= horizon for time in times)
        prediction = _predictor(n_seeds=3, exact=True).predict(
            *configuration, max_steps=int(horizon)
        )
        expected = "converges" if reached >= 2 else "not_reached"
        assert prediction.outcome == expected, (horizon, times)


# Any valid input


_TARGETS = st.sampled_from(
    [
        {"target_fraction": 0.9},
        {"target_fraction": 0.3},
        {"target_loss": 0.5},
        {"target_accuracy": 0.7},
        {"target_epsilon": 0.2},
    ]
)
_SCHEDULES = st.sampled_from(
    [
        None,
        Schedule.cosine(20, warmup_steps=4),
        Schedule.step(2, 0.5, every="epoch"),
        Schedule.one_cycle(30),
        lambda t: 0.0,
        lambda t: 1.0 / (1 + t),
    ]
)


@given(
    target=_TARGETS,
    schedule=_SCHEDULES,
    smoothing=st.sampled_from([None, Smoothing.exponential(0.9), Smoothing.moving_average(7)]),
    sampling=st.sampled_from(["shuffle", "replacement"]),
    dampening=st.sampled_from([0.0, 0.5]),
    nesterov=st.booleans(),
    weight_decay=st.sampled_from([0.0, 1e-3, 10.0]),
    displacement=st.sampled_from([None, 0.3]),
    n_samples=st.sampled_from([None, 40]),
    exact=st.booleans(),
    log_rates=st.lists(st.floats(-300, 300), min_size=1, max_size=3),
    batch_size=st.integers(1, 12),
    momentum=st.floats(0, 1, exclude_max=True),
    max_steps=st.integers(1, 80),
    full_curve=st.booleans(),
)
@settings(max_examples=35)
def test_valid_input_is_predicted(
    target: dict[str, float],
    schedule: Any,
    smoothing: Smoothing | None,
    sampling: Any,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    displacement: float | None,
    n_samples: int | None,
    exact: bool,
    log_rates: list[float],
    batch_size: int,
    momentum: float,
    max_steps: int,
    full_curve: bool,
) -> None:
    assume(not (nesterov and dampening))
    # How many samples are enough is simulated for 100,000 steps where the target is the end.
    assume(n_samples is None or "target_epsilon" not in target)
    arguments: dict[str, Any] = target | {
        "schedule": schedule,
        "smoothing": smoothing,
        "sampling": sampling,
        "dampening": dampening,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "n_samples": n_samples,
        "exact": exact,
        "max_steps": max_steps,
    }
    predictor = predictor_with(_linear(displacement), **arguments)
    rates = 10.0 ** np.array(log_rates)
    prediction = predictor.predict(rates, batch_size, momentum, full_curve=full_curve)
    _assert_consistent(prediction, len(rates), max_steps)


@given(
    target=_TARGETS,
    schedule=_SCHEDULES,
    method=st.sampled_from(["sde", "ode"]),
    dampening=st.sampled_from([0.0, 0.5]),
    log_rates=st.lists(st.floats(-8, 1), min_size=1, max_size=3),
    batch_size=st.integers(1, 12),
    momentum=st.floats(0, 0.99),
    max_steps=st.integers(1, 30),
)
@settings(max_examples=25)
def test_valid_input_is_predicted_by_the_papers_equation(
    target: dict[str, float],
    schedule: Any,
    method: Any,
    dampening: float,
    log_rates: list[float],
    batch_size: int,
    momentum: float,
    max_steps: int,
) -> None:
    arguments: dict[str, Any] = target | {
        "schedule": schedule,
        "method": method,
        "dampening": dampening,
        "max_steps": max_steps,
    }
    predictor = predictor_with(_linear(), **arguments)
    rates = 10.0 ** np.array(log_rates)
    prediction = predictor.predict(rates, batch_size, momentum)
    _assert_consistent(prediction, len(rates), max_steps)


def _assert_consistent(prediction: Prediction, count: int, max_steps: int) -> None:
    assert prediction.steps.shape == (count,)
    assert set(prediction.outcomes) <= {"converges", "diverges", "not_reached"}
    reached = np.isfinite(prediction.steps)
    np.testing.assert_array_equal(reached, prediction.outcomes == "converges")
    assert (prediction.steps[reached] <= max_steps).all()
    assert (prediction.steps_low[reached] <= prediction.steps[reached]).all()
    assert (prediction.steps_high[reached] >= prediction.steps[reached]).all()
    for name in ("steps", "steps_low", "steps_high", "p_converges", "p_diverges", "stability"):
        values = getattr(prediction, name)
        assert not np.isnan(values).any(), name
        assert (values >= 0).all(), name
    assert (prediction.p_converges + prediction.p_diverges <= 1.0 + 1e-12).all()
    assert str(prediction)


@given(
    name=st.sampled_from(["learning_rate", "batch_size", "momentum", "max_steps"]),
    value=st.one_of(
        st.just(math.nan),
        st.just(-math.inf),
        st.floats(max_value=-1e-300, allow_nan=False),
    ),
    several=st.booleans(),
)
@settings(max_examples=40)
def test_invalid_input_is_refused(name: str, value: float, several: bool) -> None:
    arguments: dict[str, Any] = {"learning_rate": 0.1, "batch_size": 4, "momentum": 0.5}
    arguments["max_steps"] = 10
    arguments[name] = [arguments[name], value] if several else value
    with pytest.raises(ValueError, match=f"{name} must be .* but got"):
        _predictor().predict(**arguments)


@pytest.mark.parametrize("n_seeds", [0, -1, 1.5, math.nan, math.inf, True], ids=str)
def test_bad_number_of_seeds_is_refused(n_seeds: Any) -> None:
    with pytest.raises(ValueError, match="n_seeds must be a positive integer but got"):
        _predictor(n_seeds=n_seeds)


def _measured(deviation: float, ratio: float) -> Probe:
    fractions = np.array([1.0, 0.5, 0.25])
    ratios = np.array([1.0, ratio, ratio])
    return Probe(fractions, np.zeros(3), np.array([0.0, deviation, deviation]), ratios)


def test_the_further_from_its_linearisation_the_more_a_network_is_doubted() -> None:
    plain, far = prior_scale(_measured(0.0, 1.0)), prior_scale(_measured(0.8, 1.0))
    assert far.scatter > plain.scatter
    assert prior_scale(_measured(0.8, 6.0)).growth > 2.0 * far.growth
    # Where outputs are further off than they moved, the probe's kernel is not that of the path.
    assert prior_scale(_measured(10.0, 6.0)).growth < 1.1 * far.growth
    assert prior_scale(_measured(math.inf, math.inf)).scatter < 6.0
    assert prior_scale(None) == PriorScale()
