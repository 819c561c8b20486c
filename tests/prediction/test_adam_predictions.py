"""Predictions for Adam, AdamW, parameter groups, clipping and accumulation."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from optuna_ttp import Adam
from optuna_ttp import AdamW
from optuna_ttp import compute_spectrum
from optuna_ttp import FineTuningTask
from optuna_ttp import ParameterGroup
from optuna_ttp import PredictorSettings
from optuna_ttp import Schedule
from optuna_ttp import SGD
from optuna_ttp import Spectrum
from optuna_ttp import Throughput
from optuna_ttp import TrainingTimePredictor
from optuna_ttp.dynamics import AdamSurface
from optuna_ttp.dynamics import Optimizer
from tests.cases import linear_task
from tests.cases import spectrum
from tests.columns import train
from tests.columns import with_columns
from tests.dynamics.simulations import LOSSES
from tests.models import mlp
from tests.models import separated
from tests.models import small_spectrum
from tests.observations import of_prediction


@cache
def _spectrum(n_columns: float = np.inf) -> Spectrum:
    x, y = separated(24)
    task = FineTuningTask(mlp().double(), (x.double(), y))
    one = compute_spectrum(
        task, engine="exact", dtype="float64", measure_speed=False, device="cpu"
    )
    throughput = Throughput(np.array([1, 24]), np.array([0.001, 0.002]), "cpu")
    return replace(with_columns(one, task, n_columns), throughput=throughput, probe=None)


def _predictor(
    optimizer: Optimizer, one: Spectrum | None = None, **settings: Any
) -> TrainingTimePredictor:
    return TrainingTimePredictor(
        _spectrum() if one is None else one,
        target_fraction=0.3,
        optimizer=optimizer,
        max_steps=2000,
        **settings,
    )


@cache
def _adamw() -> TrainingTimePredictor:
    return _predictor(AdamW())


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_a_linear_model_takes_as_many_steps_as_predicted(name: str) -> None:
    loss = LOSSES["cross-entropy"]
    predictor = TrainingTimePredictor(
        replace(with_columns(spectrum(loss), linear_task(loss)), probe=None),
        target_fraction=0.6,
        optimizer={"Adam": Adam, "AdamW": AdamW}[name](weight_decay=0.01, max_grad_norm=0.5),
        schedule=Schedule.linear(n_epochs=200),
    )
    losses = train(
        linear_task(loss),
        loss,
        lambda model: getattr(torch.optim, name)(model.parameters(), 0.02, weight_decay=0.01),
        batch_size=12,
        n_steps=150,
        max_grad_norm=0.5,
        scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, 200),
    )
    expected = int(np.argmax(losses <= 0.6 * losses[0]))
    assert expected > 5
    assert predictor.predict(0.02, 12).steps == expected


def test_the_first_beta_is_the_momentum_of_configurations_without_one() -> None:
    predictor = _adamw()
    assert predictor.default_momentum == 0.9
    plain, given = predictor.predict(0.003, 8), predictor.predict(0.003, 8, 0.9)
    assert plain.momentum == 0.9
    assert plain.steps == given.steps
    assert predictor.predict(0.003, 8, 0.0).steps != plain.steps


def test_the_surface_is_close_to_simulations() -> None:
    predictor = _adamw()
    generator = np.random.default_rng(0)
    surface = predictor._estimator.simulator.surface
    assert isinstance(surface, AdamSurface)
    rates = surface.slow_tau / generator.uniform(12.0, 180.0, 30)
    batch_sizes, momenta = generator.integers(4, 25, 30), generator.uniform(0.5, 0.95, 30)
    exact = predictor.predict(rates, batch_sizes, momenta)
    quick = predictor.estimate(rates, batch_sizes, momenta)
    error = np.abs(np.log(quick.steps / exact.steps))
    assert np.median(error) < 0.06
    assert np.quantile(error, 0.9) < 0.2
    seconds = predictor.score(rates, batch_sizes, momenta)
    np.testing.assert_allclose(seconds, quick.seconds, rtol=1e-9)


def test_slow_learning_rates_take_longer_in_proportion() -> None:
    predictor = _adamw()
    surface = predictor._estimator.simulator.surface
    assert isinstance(surface, AdamSurface)
    slow = surface.slow_tau / surface.rules.longest
    steps = predictor.estimate(slow * np.array([0.25, 0.5]), 16).steps
    assert steps[0] / steps[1] == pytest.approx(2.0, rel=0.02)


def test_what_does_not_reach_the_target_is_said_so_quickly() -> None:
    prediction = _adamw().estimate([1e3, 1e5], [8, 4])
    assert set(prediction.outcomes) <= {"not_reached", "diverges"}
    assert (prediction.p_converges <= 0.5).all()
    assert np.isinf(_adamw().score([1e3, 1e5], [8, 4])).all()


def test_accumulated_full_batches_are_full_batches() -> None:
    plain, accumulated = _adamw(), _predictor(AdamW(accumulation_steps=3))
    whole, parts = plain.predict(0.003, 24), accumulated.predict(0.003, 8)
    assert whole.steps == parts.steps
    assert parts.epochs == whole.epochs
    assert parts.seconds == pytest.approx(3.0 * parts.steps * plain.seconds_per_step(8))
    assert accumulated.max_learning_rate(8) == plain.max_learning_rate(24)
    assert accumulated.score(0.003, 4) == pytest.approx(
        3.0 * plain.seconds_per_step(4) * plain.score(0.003, 12) / plain.seconds_per_step(12)
    )


def test_clipping_slows_sgd_on_the_eigenpairs_down() -> None:
    one = replace(small_spectrum(), probe=None)
    clipped, plain = _predictor(SGD(max_grad_norm=0.1), one), _predictor(SGD(), one)
    assert clipped.predict(0.05, 8).steps > 1.5 * plain.predict(0.05, 8).steps
    loose = _predictor(SGD(max_grad_norm=1e6), one)
    assert loose.predict(0.05, 8).steps == plain.predict(0.05, 8).steps


def test_a_frozen_group_makes_sgd_slower_and_has_no_surface() -> None:
    names = tuple(n for n, _ in mlp().named_parameters())
    groups = ParameterGroup(names[:2], rate=0.0), ParameterGroup(names[2:])
    frozen, plain = _predictor(SGD(groups=groups)), _predictor(SGD())
    assert not frozen.has_surface
    assert frozen.predict(0.02, 8).steps > plain.predict(0.02, 8).steps
    assert frozen.estimate(0.02, 8).steps == pytest.approx(frozen.predict(0.02, 8).steps, rel=0.1)


def test_fewer_columns_widen_the_interval() -> None:
    every = _adamw().predict(0.003, 8)
    few = _predictor(AdamW(), _spectrum(30)).predict(0.003, 8)
    assert few.steps_high / few.steps_low > 1.05 * every.steps_high / every.steps_low


def test_more_samples_than_the_spectrum_has_keep_the_noise() -> None:
    predictor = TrainingTimePredictor(
        _spectrum(), target_fraction=0.3, optimizer=AdamW(accumulation_steps=2), n_samples=96
    )
    prediction = predictor.predict(0.003, 8)
    assert prediction.outcome == "converges"
    assert prediction.epochs == pytest.approx(prediction.steps / 6.0)
    assert prediction.steps_high > prediction.steps


def test_a_predictor_is_pickled_without_its_model() -> None:
    again = pickle.loads(pickle.dumps(_adamw()))
    assert again.optimizer == AdamW()
    assert again.predict(0.003, 8).steps == _adamw().predict(0.003, 8).steps


def test_trials_correct_predictions_of_adam() -> None:
    predictor = _adamw()
    slower = [
        of_prediction(predictor.estimate(rate, 8), np.log(1.5)) for rate in (0.001, 0.002, 0.004)
    ]
    corrected = predictor.informed(slower)
    ratio = corrected.predict(0.003, 8).steps / predictor.predict(0.003, 8).steps
    assert 1.2 < ratio < 1.7
    quick = corrected.estimate(0.003, 8).steps / predictor.estimate(0.003, 8).steps
    assert 1.2 < quick < 1.7


@pytest.mark.parametrize("optimizer", [Adam(), AdamW(), SGD(groups=(ParameterGroup(("a",)),))])
def test_a_spectrum_without_columns_is_refused(optimizer: Optimizer) -> None:
    with pytest.raises(ValueError, match='Compute it again with engine="columns"'):
        _predictor(optimizer, replace(small_spectrum(), jacobian=None))


def _few(one: Spectrum) -> Spectrum:
    assert one.jacobian is not None
    generator = np.random.default_rng(0)
    jacobian = one.jacobian
    while jacobian.n_columns > 2:
        jacobian = jacobian.thinned(jacobian.n_columns - 1, generator)
    return replace(one, jacobian=jacobian)


def _zero(one: Spectrum) -> Spectrum:
    assert one.jacobian is not None
    return replace(one, jacobian=replace(one.jacobian, codes=0.0 * one.jacobian.codes))


@pytest.mark.parametrize(
    ("optimizer", "change", "settings", "message"),
    [
        (AdamW(), _few, {}, "at least as many columns as outputs, 3, but got"),
        (AdamW(), _zero, {}, "All gradients are zero at the pretrained weights"),
        (
            AdamW(groups=(ParameterGroup(("0.weight",)),)),
            None,
            {},
            "must hold all trainable parameters but got none for '0.bias'",
        ),
        (
            AdamW(groups=(ParameterGroup(("0.weight", "0.bias", "2.weight", "2.bias", "x")),)),
            None,
            {},
            "must name trainable parameters of the task's model but got 'x'",
        ),
        (AdamW(), None, {"method": "sde"}, "AdamW needs method=\"linear\" but got 'sde'"),
        (SGD(max_grad_norm=1.0), None, {"method": "ode"}, "knows neither groups nor max_grad"),
        (
            AdamW(),
            lambda s: replace(s, weight_outputs=None),
            {},
            "weight_decay needs a spectrum that stores",
        ),
        (
            AdamW(),
            lambda s: replace(s, decay_factors=np.ones(s.rank)),
            {},
            "does not go with learning_rate_multipliers",
        ),
        (
            SGD(max_grad_norm=1.0),
            lambda s: replace(s, decay_factors=np.ones(s.rank)),
            {},
            "Leave the multipliers out of the task",
        ),
    ],
)
def test_what_cannot_be_predicted_is_refused(
    optimizer: Optimizer, change: Any, settings: dict[str, Any], message: str
) -> None:
    one = _spectrum() if change is None else change(_spectrum())
    with pytest.raises(ValueError, match=message):
        _predictor(optimizer, one, settings=PredictorSettings(**settings))


def test_a_short_training_run_is_for_sgd() -> None:
    x, y = separated(24)
    task = FineTuningTask(mlp().double(), (x.double(), y))
    with pytest.raises(ValueError, match="A short training run trains by SGD without"):
        _adamw().short_run(task)


def test_a_surface_knows_that_a_small_last_batch_is_noisy() -> None:
    # 24 samples are 23 and 1, or 12 and 12.
    predictor = _adamw()
    surface = predictor._estimator.simulator.surface
    assert isinstance(surface, AdamSurface)
    rate = surface.slow_tau / 60.0
    ragged, even = predictor.predict(rate, [23, 12]).steps
    assert ragged > 1.1 * even
    quick = predictor.estimate(rate, [23, 12]).steps
    assert quick[0] > 1.1 * quick[1]


@pytest.mark.parametrize(
    "schedule",
    [Schedule.linear(n_epochs=40), Schedule.trainer("cosine", 120, warmup_ratio=0.1)],
    ids=["linear", "cosine"],
)
def test_the_surface_under_a_schedule_is_close_to_simulations(schedule: Schedule) -> None:
    # Without saturation, which makes the intrinsic time depend more on the learning rate.
    predictor = _predictor(AdamW(), replace(_spectrum(), saturation=None), schedule=schedule)
    constant = _adamw()._estimator.simulator.surface
    assert isinstance(constant, AdamSurface)
    rates = constant.slow_tau / np.array([15.0, 25.0, 40.0, 60.0, 90.0, 140.0])
    batch_sizes = np.array([8, 12, 24, 8, 12, 24])
    exact, quick = (f(rates, batch_sizes) for f in (predictor.predict, predictor.estimate))
    assert (np.isfinite(exact.steps) == np.isfinite(quick.steps)).all()
    reached = np.isfinite(exact.steps)
    assert reached.sum() >= 3
    error = np.abs(np.log(quick.steps[reached] / exact.steps[reached]))
    assert np.median(error) < 0.1
    assert error.max() < 0.25
    depths = predictor.depth_after(rates, batch_sizes, np.full(6, 0.9), exact.steps)
    np.testing.assert_allclose(depths[reached], predictor.target_depth, rtol=0.25)


def test_training_that_ends_before_the_target_does_not_reach_it() -> None:
    predictor = _predictor(AdamW(), schedule=Schedule.linear(n_epochs=2))
    assert predictor.has_surface
    assert np.isinf(predictor.score(1e-4, 8))
    assert predictor.estimate(1e-4, 8).outcome == "not_reached"


def test_a_scheduler_of_torch_is_simulated() -> None:
    schedule = Schedule.from_torch(lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.999))
    predictor = _predictor(AdamW(), schedule=schedule)
    assert not predictor.has_surface
    assert predictor.estimate(0.003, 8).steps > _adamw().predict(0.003, 8).steps - 1
