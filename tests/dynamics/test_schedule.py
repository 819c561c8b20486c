from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
import math
from typing import Any
import warnings

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
from numpy.typing import NDArray
import pytest
import torch
from torch.optim import lr_scheduler

from optuna_ttp.dynamics import Schedule
from optuna_ttp.prediction import PredictorSettings
from optuna_ttp.prediction import TrainingTimePredictor
from optuna_ttp.spectrum import Spectrum
from tests.cases import spectrum


Torch = Callable[[torch.optim.Optimizer], Any]


def _linear(loss: str = "cross_entropy") -> Spectrum:
    """Of a linear model, without a probe: nothing is guessed of how its kernel grows."""
    return replace(spectrum(loss), probe=None)


def _torch_values(
    factory: Torch, learning_rate: float, momentum: float, n_steps: int, every: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Learning rate and momentum of each step of a training loop of PyTorch."""
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], learning_rate, momentum)
    scheduler = factory(optimizer)
    values = np.empty((2, n_steps))
    for step in range(n_steps):
        group = optimizer.param_groups[0]
        values[:, step] = group["lr"], group["momentum"]
        weight.grad = torch.ones(1)
        optimizer.step()
        if (step + 1) % every == 0:
            scheduler.step()
    return values[0], values[1]


def _values(
    schedule: Schedule,
    n_steps: int,
    steps_per_epoch: int = 7,
    learning_rate: float = 0.3,
    momentum: float = 0.9,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rates, momenta = schedule.values(
        np.array([learning_rate]), np.array([momentum]), steps_per_epoch, n_steps
    )
    assert rates.shape == momenta.shape == (1, n_steps)
    return rates[0], momenta[0]


def _sequential(sgd: torch.optim.Optimizer) -> lr_scheduler.SequentialLR:
    warm = lr_scheduler.LinearLR(sgd, 1 / 6, total_iters=5)
    return lr_scheduler.SequentialLR(sgd, [warm, lr_scheduler.CosineAnnealingLR(sgd, 25)], [5])


# For arguments that a type checker would refuse too.
_UNTYPED: Any = Schedule
_PAIRS: dict[str, tuple[Schedule, Torch, int]] = {
    "step": (Schedule.step(4, 0.3), lambda s: lr_scheduler.StepLR(s, 4, 0.3), 40),
    "rising step": (Schedule.step(4, 1.3), lambda s: lr_scheduler.StepLR(s, 4, 1.3), 40),
    "warm-up": (Schedule.warmup(5), lambda s: lr_scheduler.LinearLR(s, 1 / 6, total_iters=5), 40),
    "cosine": (Schedule.cosine(30), lambda s: lr_scheduler.CosineAnnealingLR(s, 30), 31),
    "cosine to a tenth": (
        Schedule.cosine(30, final=0.1),
        lambda s: lr_scheduler.CosineAnnealingLR(s, 30, eta_min=0.03),
        31,
    ),
    "cosine after a warm-up": (Schedule.cosine(30, warmup_steps=5), _sequential, 31),
    "one cycle": (
        Schedule.one_cycle(30),
        lambda s: lr_scheduler.OneCycleLR(s, 0.3, total_steps=30),
        30,
    ),
    "linear one cycle": (
        Schedule.one_cycle(30, anneal_strategy="linear", pct_start=0.5, cycle_momentum=False),
        lambda s: lr_scheduler.OneCycleLR(
            s, 0.3, total_steps=30, anneal_strategy="linear", pct_start=0.5, cycle_momentum=False
        ),
        30,
    ),
    "function": (
        Schedule.of(lambda t: 1.0 / (1.0 + t)),
        lambda s: lr_scheduler.LambdaLR(s, lambda t: 1.0 / (1.0 + t)),
        40,
    ),
    "constant": (Schedule(), lambda s: lr_scheduler.ConstantLR(s, 1.0), 40),
}
_FACTORIES: dict[str, Torch] = {
    "step": lambda s: lr_scheduler.StepLR(s, 3, 0.5),
    "several steps": lambda s: lr_scheduler.MultiStepLR(s, [2, 3, 5], 0.5),
    "cosine": lambda s: lr_scheduler.CosineAnnealingLR(s, 9),
    "restarts": lambda s: lr_scheduler.CosineAnnealingWarmRestarts(s, 4),
    "exponential": lambda s: lr_scheduler.ExponentialLR(s, 0.9),
    "one cycle": lambda s: lr_scheduler.OneCycleLR(s, 0.7, total_steps=60),
    "function": lambda s: lr_scheduler.LambdaLR(s, lambda t: 0.95**t),
    "cyclic": lambda s: lr_scheduler.CyclicLR(s, 0.01, 0.1, 5),
}


# Against PyTorch


@pytest.mark.parametrize("name", _PAIRS)
def test_schedule_is_that_of_pytorch_step_by_step(name: str) -> None:
    ours, theirs, n_steps = _PAIRS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = _torch_values(theirs, 0.3, 0.9, n_steps)
    for values, wanted in zip(_values(ours, n_steps), expected, strict=True):
        np.testing.assert_allclose(values, wanted, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", [k for k in _PAIRS if "one cycle" not in k])
@pytest.mark.parametrize("every", ["step", "epoch"])
def test_schedule_in_epochs_is_that_of_pytorch(name: str, every: Any) -> None:
    schedule, theirs, n_changes = _PAIRS[name]
    n_steps = n_changes if every == "step" else 7 * n_changes - 3
    ours = Schedule(schedule.function, every=every)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = _torch_values(theirs, 0.3, 0.9, n_steps, 1 if every == "step" else 7)
    np.testing.assert_allclose(_values(ours, n_steps)[0], expected[0], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", _FACTORIES)
@pytest.mark.parametrize("every", ["step", "epoch"])
def test_scheduler_of_pytorch_runs_as_in_training(name: str, every: Any) -> None:
    schedule = Schedule.from_torch(_FACTORIES[name], every=every)
    expected = _torch_values(_FACTORIES[name], 0.3, 0.9, 58, 1 if every == "step" else 7)
    for values, wanted in zip(_values(schedule, 58), expected, strict=True):
        np.testing.assert_array_equal(values, wanted)
    assert not schedule.is_constant


def test_class_methods_take_epochs() -> None:
    for by_epoch, by_step in (
        (Schedule.step(2, 0.5, every="epoch"), Schedule.step(14, 0.5)),
        (Schedule.warmup(3, every="epoch"), None),
        (Schedule.cosine(5, every="epoch", warmup_steps=2), None),
    ):
        rates, _ = _values(by_epoch, 50)
        if by_step is not None:
            np.testing.assert_array_equal(rates, _values(by_step, 50)[0])
        by_change = _values(Schedule(by_epoch.function), 8)[0]
        np.testing.assert_array_equal(rates, np.repeat(by_change, 7)[:50])


def test_warmup_goes_on_with_another_schedule() -> None:
    schedule = Schedule.warmup(4, then=Schedule.step(2, 0.5))
    expected = [0.2, 0.4, 0.6, 0.8, 1, 1, 0.5, 0.5, 0.25, 0.25]
    np.testing.assert_allclose(_values(schedule, 10, learning_rate=1.0)[0], expected)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [{}, {"warmup_steps": 4}, {"warmup_ratio": 0.15}], ids=str)
@pytest.mark.parametrize("steps_per_epoch", [1, 7])
def test_schedules_of_the_trainer_are_those_of_transformers(
    kind: Any, warmup: dict[str, Any], steps_per_epoch: int
) -> None:
    transformers = pytest.importorskip("transformers")
    length = math.ceil(2.5 * steps_per_epoch)
    warm = warmup.get("warmup_steps", math.ceil(warmup.get("warmup_ratio", 0.0) * length))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.3, 0.9)
    scheduler = transformers.get_scheduler(kind, optimizer, warm, length)
    expected = []
    for _ in range(length):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    by_epochs = Schedule.trainer(kind, n_epochs=2.5, **warmup)
    rates, _ = _values(by_epochs, length, steps_per_epoch)
    np.testing.assert_allclose(rates, expected, atol=1e-15)
    by_steps = Schedule.trainer(kind, length, **warmup)
    np.testing.assert_allclose(_values(by_steps, length)[0], expected, atol=1e-15)
    assert not by_epochs.is_constant
    beyond = _values(by_steps, length + 9)[0]
    last = 0.3 if kind == "constant_with_warmup" else 0.0
    assert (beyond[max(length, warm) + 1 :] == last).all()


def test_linear_is_the_default_of_the_trainer() -> None:
    linear = Schedule.linear(n_epochs=2, warmup_steps=3)
    same = Schedule.trainer("linear", n_epochs=2, warmup_steps=3)
    np.testing.assert_array_equal(_values(linear, 14), _values(same, 14))


def test_cosine_keeps_its_final_value() -> None:
    rates, _ = _values(Schedule.cosine(10, final=0.2, warmup_steps=3), 30, learning_rate=1.0)
    np.testing.assert_allclose(rates[10:], 0.2)
    assert rates[3] == 1.0
    assert (np.diff(rates[3:11]) < 0).all()


@pytest.mark.parametrize("strategy", ["cos", "linear"])
def test_training_beyond_one_cycle_keeps_its_last_learning_rate(strategy: str) -> None:
    schedule = Schedule.one_cycle(20, anneal_strategy=strategy)
    within, momenta = _values(schedule, 20)
    rates, momenta = _values(schedule, 33)
    np.testing.assert_array_equal(rates[:20], within)
    np.testing.assert_allclose(rates[20:], within[-1])
    np.testing.assert_allclose(momenta[20:], momenta[-1])


def test_every_configuration_has_other_values() -> None:
    rates, momenta = np.array([0.1, 0.5]), np.array([0.0, 0.8])
    for schedule in (
        Schedule.cosine(9),
        Schedule.one_cycle(9, cycle_momentum=False),
        Schedule.from_torch(lambda s: lr_scheduler.ExponentialLR(s, 0.9)),
    ):
        together = schedule.values(rates, momenta, 4, 9)
        for k in range(2):
            alone = _values(schedule, 9, 4, rates[k], momenta[k])
            for values, wanted in zip(together, alone, strict=True):
                np.testing.assert_array_equal(values[k], wanted)
        np.testing.assert_array_equal(together[1], np.repeat(momenta[:, None], 9, axis=1))


def test_values_draw_no_random_number_and_warn_of_nothing() -> None:
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for factory in _FACTORIES.values():
            _values(Schedule.from_torch(factory), 20)
    assert torch.equal(torch.get_rng_state(), before)


@given(
    total_steps=st.integers(2, 60),
    share=st.floats(0, 0.99),
    final=st.floats(0, 1),
    learning_rate=st.floats(1e-6, 1e3),
    every=st.sampled_from(["step", "epoch"]),
    steps_per_epoch=st.integers(1, 9),
)
@settings(max_examples=60)
def test_cosine_stays_between_its_ends(
    total_steps: int,
    share: float,
    final: float,
    learning_rate: float,
    every: Any,
    steps_per_epoch: int,
) -> None:
    warmup_steps = int(share * total_steps)
    schedule = Schedule.cosine(total_steps, final=final, warmup_steps=warmup_steps, every=every)
    rates, _ = _values(schedule, 100, steps_per_epoch, learning_rate)
    relative = rates / learning_rate
    assert (relative <= 1 + 1e-12).all()
    assert (relative >= min(final, 1 / (warmup_steps + 1)) - 1e-12).all()
    unit = 1 if every == "step" else steps_per_epoch
    top = warmup_steps * unit
    assert (np.diff(relative[: top + 1]) >= 0).all()
    assert (np.diff(relative[top:]) <= 0).all()


# Steep and long schedules


@pytest.mark.parametrize("gamma", [2.0, 0.5])
def test_schedule_far_beyond_the_range_of_floats(gamma: float) -> None:
    schedule = Schedule.step(1, gamma)
    if gamma < 1:
        assert _values(schedule, 3000)[0][-1] == 0.0
        return
    with pytest.raises(ValueError, match="learning rate of a schedule must be"):
        _values(schedule, 3000)


# Of what a user gives


def test_what_may_be_a_schedule() -> None:
    assert Schedule.of(None).is_constant
    schedule = Schedule.cosine(5)
    assert Schedule.of(schedule) is schedule
    assert not Schedule.of(lambda t: 0.5).is_constant
    np.testing.assert_allclose(_values(Schedule.of(lambda t: 0.5), 3)[0], 0.15)


def test_predictor_takes_a_function() -> None:
    def halved(steps: int) -> float:
        return 0.5

    plain = TrainingTimePredictor(
        _linear(), target_fraction=0.6, settings=PredictorSettings(exact=True)
    )
    slowed = TrainingTimePredictor(
        _linear(), target_fraction=0.6, schedule=halved, settings=PredictorSettings(exact=True)
    )
    expected = plain.predict(0.05, [5, 12], 0.5)
    actual = slowed.predict(0.1, [5, 12], 0.5)
    np.testing.assert_array_equal(actual.steps, expected.steps)
    np.testing.assert_array_equal(actual.curve_losses, expected.curve_losses)


def test_learning_rate_that_falls_to_zero_may_never_get_there() -> None:
    def predicted(total_steps: int) -> str:
        schedule = Schedule.cosine(total_steps)
        predictor = TrainingTimePredictor(
            _linear(), target_fraction=0.6, schedule=schedule, max_steps=1000
        )
        return predictor.predict(0.05, 12).outcome

    plain = TrainingTimePredictor(_linear(), target_fraction=0.6).predict(0.05, 12)
    needed = plain.steps.item()
    # The mean of half a cosine is one half.
    assert predicted(int(1.5 * needed)) == "not_reached"
    assert predicted(int(2.2 * needed)) == "converges"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: _UNTYPED.of(0.1), TypeError, "schedule must be a Schedule or a function"),
        (lambda: _UNTYPED.of("cosine"), TypeError, "schedule must be a Schedule or a function"),
        (lambda: _UNTYPED(function=3), TypeError, "must be callable but got 3"),
        (lambda: _UNTYPED.from_torch(0.1), TypeError, "must be callable but got 0.1"),
        (lambda: _UNTYPED.from_torch(None), TypeError, "must be callable but got None"),
        (lambda: _UNTYPED(lambda t: 1.0, lambda s: s), ValueError, "or a factory but got both"),
        (lambda: _UNTYPED(every="batch"), ValueError, 'every must be "step" or "epoch" but got'),
        (lambda: _UNTYPED.step(3, every="day"), ValueError, 'must be "step" or "epoch"'),
        (lambda: _UNTYPED.step(0), ValueError, "step_size must be a positive integer but got 0"),
        (lambda: _UNTYPED.step(2.5), ValueError, "step_size must be a positive integer"),
        (lambda: _UNTYPED.step(True), ValueError, "step_size must be a positive integer"),
        (lambda: _UNTYPED.step(math.inf), ValueError, "step_size must be a positive integer"),
        (lambda: _UNTYPED.step(math.nan), ValueError, "step_size must be a positive integer"),
        (lambda: _UNTYPED.step(3, 0.0), ValueError, "gamma must be positive but got 0.0"),
        (lambda: _UNTYPED.step(3, -0.1), ValueError, "gamma must be positive but got -0.1"),
        (lambda: _UNTYPED.step(3, math.nan), ValueError, "gamma must be positive but got nan"),
        (lambda: _UNTYPED.warmup(0), ValueError, "warmup_steps must be a positive integer"),
        (
            lambda: _UNTYPED.warmup(3, then=Schedule.one_cycle(9)),
            ValueError,
            "then must be a multiplying schedule in the same unit",
        ),
        (
            lambda: _UNTYPED.warmup(3, then=Schedule.step(9), every="epoch"),
            ValueError,
            "then must be a multiplying schedule in the same unit",
        ),
        (lambda: _UNTYPED.cosine(0), ValueError, "total_steps must be a positive integer"),
        (lambda: _UNTYPED.cosine(9, final=-0.1), ValueError, r"final must be in \[0, 1\]"),
        (lambda: _UNTYPED.cosine(9, final=1.1), ValueError, r"final must be in \[0, 1\]"),
        (lambda: _UNTYPED.cosine(9, final=math.nan), ValueError, r"final must be in \[0, 1\]"),
        (lambda: _UNTYPED.cosine(9, warmup_steps=9), ValueError, "from 0 to below total_steps"),
        (lambda: _UNTYPED.cosine(9, warmup_steps=-1), ValueError, "from 0 to below total_steps"),
        (lambda: _UNTYPED.one_cycle(0), ValueError, "total_steps must be a positive integer"),
        (lambda: _UNTYPED.linear(), ValueError, "Exactly one of total_steps and n_epochs"),
        (lambda: _UNTYPED.linear(9, n_epochs=2), ValueError, "Exactly one of total_steps and"),
        (lambda: _UNTYPED.linear(0), ValueError, "total_steps must be a positive integer"),
        (lambda: _UNTYPED.linear(n_epochs=0), ValueError, "n_epochs must be positive but got 0"),
        (lambda: _UNTYPED.linear(n_epochs=math.inf), ValueError, "n_epochs must be positive"),
        (lambda: _UNTYPED.linear(9, warmup_ratio=2), ValueError, r"must be in \[0, 1\] but got 2"),
        (lambda: _UNTYPED.linear(9, warmup_steps=0.5), ValueError, "warmup_steps must be a pos"),
        (lambda: _UNTYPED.trainer("sine", 9), ValueError, "kind must be one of linear, cosine"),
        (lambda: _UNTYPED(n_epochs=3), ValueError, "by_length and n_epochs belong together"),
    ],
)
def test_bad_schedules_are_refused(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Schedule(lambda t: 1.0 - 0.1 * t), "must be not negative but got -0.03 at step 11"),
        (Schedule(lambda t: math.nan if t == 4 else 1.0), "must be not negative but got nan at"),
        (Schedule(lambda t: math.inf), "must be not negative but got inf at step 0"),
        (
            Schedule.from_torch(
                lambda s: lr_scheduler.LambdaLR(s, lambda t: -1.0 if t == 2 else 1.0)
            ),
            "must be not negative but got -0.3 at step 2",
        ),
        (
            Schedule.one_cycle(30, max_momentum=1.0),
            r"momentum of a schedule must be in \[0, 1\) but got 1 at step 0",
        ),
        (
            Schedule.from_torch(lambda s: lr_scheduler.ReduceLROnPlateau(s)),
            "needs no metric but got ReduceLROnPlateau",
        ),
        (Schedule.from_torch(lambda s: None), "must give a torch scheduler .* got NoneType"),
        (Schedule.from_torch(lambda s: 0.1), "must give a torch scheduler .* but got float"),
    ],
    ids=lambda value: value if isinstance(value, str) else "schedule",
)
def test_bad_values_of_a_schedule_are_refused(schedule: Schedule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _values(schedule, 20)
    predictor = TrainingTimePredictor(
        _linear(), target_fraction=0.01, schedule=schedule, max_steps=20
    )
    with pytest.raises(ValueError, match=message.split(" but got ")[0]):
        predictor.predict(0.3, 12, 0.9)


def test_torch_scheduler_itself_is_no_schedule() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    scheduler: Any = lr_scheduler.StepLR(optimizer, 3)
    with pytest.raises(TypeError, match=r"Wrap a torch scheduler: Schedule.from_torch"):
        TrainingTimePredictor(_linear(), target_fraction=0.5, schedule=scheduler)


def test_error_of_a_users_function_is_passed_on() -> None:
    def broken(steps: int) -> float:
        if steps == 3:
            raise ValueError("no table for step 3")
        return 1.0

    with pytest.raises(ValueError, match="no table for step 3"):
        _values(Schedule.of(broken), 10)
    with pytest.raises(ValueError, match="no table for step 3"):
        _values(Schedule.from_torch(lambda s: lr_scheduler.LambdaLR(s, broken)), 10)
