from __future__ import annotations

from collections.abc import Callable
import copy
from dataclasses import replace
from functools import cache
import math
from typing import Any

from hypothesis import assume
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
from numpy.typing import NDArray
import pytest
import torch

from optuna_ttp.dynamics import KernelGrowth
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import Schedule
from optuna_ttp.dynamics import SGDConfigurations
from optuna_ttp.dynamics import simulate
from optuna_ttp.dynamics import Target
from optuna_ttp.dynamics import Trajectories
from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.task import FineTuningTask
from optuna_ttp.task import Loss
from tests.cases import linear_task
from tests.cases import spectrum
from tests.closed_forms import mse_gradient_descent
from tests.models import mlp
from tests.models import vectors
from tests.predictors import predictor_with


Torch = Callable[[torch.optim.Optimizer], Any]

_LOSSES = {
    "cross-entropy": torch.nn.CrossEntropyLoss(),
    "weighted and smoothed": torch.nn.CrossEntropyLoss(
        torch.tensor([0.3, 2.0, 1.0], dtype=torch.float64), label_smoothing=0.1
    ),
    "mse": torch.nn.MSELoss(),
}
_OPTIMISERS: dict[str, dict[str, Any]] = {
    "dampening": {"momentum": 0.9, "dampening": 0.4},
    "dampening without momentum": {"momentum": 0.0, "dampening": 0.4},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "weight decay": {"momentum": 0.0, "weight_decay": 0.3},
    "momentum and weight decay": {"momentum": 0.8, "weight_decay": 0.3},
    "dampening and weight decay": {"momentum": 0.8, "dampening": 0.7, "weight_decay": 0.3},
    "nesterov and weight decay": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.3},
}
# Ours, PyTorch's, and whether PyTorch's advances once an epoch.
_SCHEDULES: dict[str, tuple[Schedule, Torch, bool]] = {
    "cosine": (
        Schedule.cosine(41),
        lambda sgd: torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 41),
        False,
    ),
    "an epoch": (
        Schedule.step(3, 0.5, every="epoch"),
        lambda sgd: torch.optim.lr_scheduler.StepLR(sgd, 3, 0.5),
        True,
    ),
    "one cycle": (
        Schedule.one_cycle(41),
        lambda sgd: torch.optim.lr_scheduler.OneCycleLR(sgd, 0.02, total_steps=41),
        False,
    ),
    "function": (
        Schedule.of(lambda t: 1.0 / (1.0 + 0.1 * t)),
        lambda sgd: torch.optim.lr_scheduler.LambdaLR(sgd, lambda t: 1.0 / (1.0 + 0.1 * t)),
        False,
    ),
}


def _train(
    task: FineTuningTask,
    loss: torch.nn.Module,
    batch_size: int,
    n_steps: int = 40,
    *,
    groups: dict[str, float] | None = None,
    scheduler: Torch | None = None,
    every_epoch: bool = False,
    sampling: str = "shuffle",
    seed: int = 3,
    learning_rate: float = 0.02,
    **settings: Any,
) -> NDArray[np.float64]:
    """Losses over all samples before every step of a real training by torch.optim.SGD."""
    model, (x, y) = copy.deepcopy(task.model), task._dataset.tensors
    factors = {name: (groups or {}).get(name, 1.0) for name, _ in model.named_parameters()}
    optimizer = torch.optim.SGD(
        [{"params": [p], "lr": factors[n] * learning_rate} for n, p in model.named_parameters()],
        learning_rate,
        **settings,
    )
    advance = None if scheduler is None else scheduler(optimizer)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    batches: list[torch.Tensor] = []
    for step in range(n_steps + 1):
        with torch.no_grad():
            losses.append(loss(model(x), y).item())
        if not batches:
            if advance is not None and every_epoch and step:
                advance.step()
            if batch_size == len(x) and sampling == "shuffle":
                order = torch.arange(len(x))
            elif sampling == "shuffle":
                order = torch.randperm(len(x), generator=generator)
            else:
                order = torch.randint(len(x), (len(x),), generator=generator)
            batches = list(order.split(batch_size))
        batch = batches.pop(0)
        optimizer.zero_grad()
        torch.autograd.backward(loss(model(x[batch]), y[batch]))
        optimizer.step()
        if advance is not None and not every_epoch:
            advance.step()
    return np.array(losses)


def _linear(loss: str = "cross_entropy") -> Spectrum:
    """Of a linear model, without a probe: nothing is guessed of how its kernel grows."""
    return replace(spectrum(loss), probe=None)


def _double(one: Spectrum) -> LinearisedModel:
    return LinearisedModel.from_spectrum(one, dtype=torch.float64)


def _simulated(
    model: LinearisedModel,
    batch_size: int,
    n_steps: int = 40,
    *,
    learning_rate: float = 0.02,
    schedule: Schedule | None = None,
    target: Target | None = None,
    exact: bool = True,
    sampling: Any = "shuffle",
    growth: KernelGrowth | None = None,
    **sgd: Any,
) -> Trajectories:
    return simulate(
        model,
        SGDConfigurations.of(learning_rate, schedule=schedule, **sgd),
        np.array([batch_size]),
        max_steps=np.array([n_steps]),
        target=target,
        exact=exact,
        sampling=sampling,
        growth=growth,
        seed=3,
    )


def _assert_follows(curves: Trajectories, losses: NDArray[np.float64], rtol: float) -> None:
    steps = curves.steps[0].astype(int)
    assert steps[-1] == len(losses) - 1
    assert curves.strides[0] == 1
    np.testing.assert_allclose(curves.curves["loss"][0], losses[steps], rtol=rtol)


# Real training of a linear model


@pytest.mark.parametrize("loss", _LOSSES)
@pytest.mark.parametrize("optimiser", _OPTIMISERS)
@pytest.mark.parametrize(
    ("batch_size", "sampling"), [(5, "shuffle"), (5, "replacement"), (12, "shuffle")]
)
def test_simulation_follows_every_step_of_torch_sgd(
    batch_size: int, sampling: str, optimiser: str, loss: str
) -> None:
    task = linear_task(_LOSSES[loss])
    assert all(bool((p != 0).all()) for p in task.model.parameters())
    own = _OPTIMISERS[optimiser]
    losses = _train(task, _LOSSES[loss], batch_size, sampling=sampling, **own)
    curves = _simulated(_double(spectrum(_LOSSES[loss])), batch_size, sampling=sampling, **own)
    _assert_follows(curves, losses, 1e-8)


@pytest.mark.parametrize("schedule", _SCHEDULES)
@pytest.mark.parametrize("optimiser", ["dampening", "nesterov and weight decay"])
@pytest.mark.parametrize("batch_size", [5, 12])
def test_simulation_with_a_schedule_follows_every_step_of_torch_sgd(
    batch_size: int, optimiser: str, schedule: str
) -> None:
    ours, theirs, every_epoch = _SCHEDULES[schedule]
    own = _OPTIMISERS[optimiser]
    loss = _LOSSES["weighted and smoothed"]
    losses = _train(
        linear_task(loss), loss, batch_size, scheduler=theirs, every_epoch=every_epoch, **own
    )
    constant = _train(linear_task(loss), loss, batch_size, **own)
    assert not np.allclose(losses, constant, rtol=1e-3)
    curves = _simulated(_double(spectrum(loss)), batch_size, schedule=ours, **own)
    _assert_follows(curves, losses, 1e-8)


def test_dampening_counts_where_only_the_schedule_brings_momentum() -> None:
    ours, theirs, _ = _SCHEDULES["one cycle"]
    loss = _LOSSES["cross-entropy"]
    own: dict[str, Any] = {"momentum": 0.0, "dampening": 0.5}
    losses = _train(linear_task(loss), loss, 5, scheduler=theirs, **own)
    _assert_follows(_simulated(_double(spectrum()), 5, schedule=ours, **own), losses, 1e-8)


def test_batches_with_replacement_may_be_as_large_as_the_data() -> None:
    loss = _LOSSES["cross-entropy"]
    losses = _train(linear_task(loss), loss, 12, sampling="replacement")
    _assert_follows(_simulated(_double(spectrum()), 12, sampling="replacement"), losses, 1e-8)
    assert not np.allclose(losses, _train(linear_task(loss), loss, 12), rtol=1e-3)


def test_optimisers_simulated_together_equal_each_alone() -> None:
    model = _double(spectrum())
    settings: dict[str, Any] = {
        "learning_rate": [0.02, 0.05, 0.03, 0.04],
        "momentum": [0.9, 0.5, 0.0, 0.9],
        "dampening": [0.3, 0.0, 0.3, 0.0],
        "nesterov": [False, True, False, True],
        "weight_decay": [0.0, 0.2, 0.1, 0.0],
    }
    sizes, steps = np.array([5, 5, 5, 12]), np.array([30, 60, 20, 45])
    together = simulate(model, SGDConfigurations.of(**settings), sizes, max_steps=steps)
    for k in range(4):
        alone = simulate(
            model,
            SGDConfigurations.of(**{name: values[k] for name, values in settings.items()}),
            sizes[k : k + 1],
            max_steps=steps[k : k + 1],
        )
        n = alone.steps.shape[1]
        np.testing.assert_allclose(
            together.curves["loss"][k, :n], alone.curves["loss"][0], rtol=1e-12
        )


def test_weight_decay_needs_to_know_where_it_pulls_from() -> None:
    model = _double(spectrum())
    unknown = LinearisedModel(
        model.features,
        model.initial_outputs,
        model.soft_targets,
        model.normalisers,
        model.labels,
        model.kind,
    )
    with pytest.raises(ValueError, match="Weight decay needs a model that knows its pull"):
        _simulated(unknown, 5, weight_decay=0.1)
    _simulated(unknown, 5, weight_decay=0.0)


@pytest.mark.parametrize("optimiser", ["dampening", "nesterov", "momentum and weight decay"])
def test_predicted_steps_are_those_of_real_training(optimiser: str) -> None:
    own = dict(_OPTIMISERS[optimiser])
    losses = _train(linear_task(), _LOSSES["cross-entropy"], 12, 200, **own)
    settings = {k: v for k, v in own.items() if k != "momentum"}
    predictor = predictor_with(_linear(), target_fraction=0.7, exact=True, **settings)
    expected = int(np.argmax(losses <= 0.7 * losses[0]))
    assert expected > 5
    assert predictor.predict(0.02, 12, own["momentum"]).steps == expected


# Closed form


@pytest.mark.parametrize(
    "optimiser", [k for k, v in _OPTIMISERS.items() if "weight_decay" not in v]
)
def test_closed_form_is_full_batch_sgd(optimiser: str) -> None:
    own = _OPTIMISERS[optimiser]
    losses = _train(linear_task("mse"), _LOSSES["mse"], 12, 100, **own)
    closed = mse_gradient_descent(spectrum("mse"), 0.02, np.arange(101), **own)
    np.testing.assert_allclose(closed, losses, rtol=1e-9)


@given(
    relative_rate=st.floats(1e-3, 0.99),
    momentum=st.floats(0.0, 0.98),
    dampening=st.sampled_from([0.0, 0.1, 0.6]),
    nesterov=st.booleans(),
)
@settings(max_examples=80)
def test_closed_form_is_the_sum_over_the_roots_of_each_recursion(
    relative_rate: float, momentum: float, dampening: float, nesterov: bool
) -> None:
    assume(not (nesterov and dampening))
    one = spectrum("mse")
    residual = (one.targets - one.initial_outputs).ravel()
    projections = one.eigenvectors.T @ residual
    curvatures = 2.0 * one.eigenvalues / residual.size
    rate = relative_rate * 2.0 * (1.0 + momentum) / curvatures[0]
    rate /= 1.0 + 2.0 * momentum if nesterov else 1.0
    steps = np.arange(40)
    total = np.full(40, residual @ residual - projections @ projections)
    for curvature, projection in zip(curvatures, projections, strict=True):
        a = rate * curvature
        if nesterov:
            polynomial = [1.0, -(1.0 + momentum) * (1.0 - a), momentum * (1.0 - a)]
            first = 1.0 - (1.0 + momentum) * a
        else:
            damped = a * (1.0 - dampening if momentum else 1.0)
            polynomial = [1.0, -(1.0 + momentum - damped), momentum]
            first = 1.0 - a
        z1, z2 = np.roots(polynomial).astype(complex)
        assume(abs(z1 - z2) > 1e-3)
        share = (first - z2) / (z1 - z2)
        x = share * z1**steps + (1.0 - share) * z2**steps
        total += projection**2 * x.real**2
    closed = mse_gradient_descent(
        one, rate, steps, momentum=momentum, dampening=dampening, nesterov=nesterov
    )
    np.testing.assert_allclose(closed, total / residual.size, rtol=1e-7)


# Several steps as one


@cache
def _wide() -> LinearisedModel:
    """Eigenvalues that fall as a power law over three decades."""
    return _double(spectrum("cross_entropy", n_samples=40, seed=2))


_SLOW: dict[str, dict[str, Any]] = {
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "weight decay": {"momentum": 0.5, "weight_decay": 0.02},
    "cosine": {"momentum": 0.9, "schedule": Schedule.cosine(4000)},
    "warm-up": {"momentum": 0.0, "schedule": Schedule.cosine(4000, warmup_steps=400)},
    "epochs": {"momentum": 0.8, "schedule": Schedule.step(70, 0.7, every="epoch")},
    "replacement": {"momentum": 0.0, "sampling": "replacement"},
}


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [
        *((name, 8) for name in _SLOW if name != "replacement"),
        *((name, 40) for name in ("nesterov", "cosine", "replacement")),
    ],
)
def test_time_with_strides_is_close_to_the_exact_one(name: str, batch_size: int) -> None:
    own = _SLOW[name]
    dampening = own.get("dampening", 0.0)
    # Nothing is coarse where the steepest direction moves by more than an eighth in a step.
    effective = 0.01 / float(_wide().curvatures[0])
    rate = effective * (1.0 - own["momentum"]) / (1.0 - dampening)
    exact = _simulated(_wide(), batch_size, 4000, learning_rate=rate, **own)
    losses = exact.curves["loss"][0]
    least = losses.min()
    for share in (0.5, 0.25, 0.1):
        target = Target("loss", least + share * (losses[0] - least))
        coarse = _simulated(
            _wide(), batch_size, 4000, learning_rate=rate, target=target, exact=False, **own
        )
        expected = target.first_passage(exact.steps[0], losses)
        assert coarse.first_passage_times(target)[0] == pytest.approx(expected, rel=0.03)
    assert coarse.strides[0] >= 4


# A kernel that grows


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("factor", [4.0, 50.0])
def test_strides_of_a_growing_kernel_stay_stable(factor: float, loss: str) -> None:
    model = _double(spectrum(loss, n_samples=40, seed=2))
    growth = KernelGrowth(np.array([1.0, 0.9, 0.8]), np.array([1.0, 2.0, factor]))
    rate = 0.01 / float(model.curvatures[0])
    exact = _simulated(model, 40, 2000, learning_rate=rate, growth=growth)
    losses = exact.curves["loss"][0]
    target = Target("loss", losses.min() + 0.04 * (losses[0] - losses.min()))
    coarse = _simulated(
        model, 40, 2000, learning_rate=rate, target=target, exact=False, growth=growth
    )
    assert not exact.blown_up.any()
    expected = target.first_passage(exact.steps[0], losses)
    assert coarse.first_passage_times(target)[0] == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("optimiser", ["none", "dampening", "nesterov and weight decay"])
def test_growing_kernel_multiplies_every_step(optimiser: str) -> None:
    own = _OPTIMISERS.get(optimiser, {})
    momentum, dampening = own.get("momentum", 0.0), own.get("dampening", 0.0)
    model = _double(spectrum())
    assert model.pull is not None
    growth = KernelGrowth(np.array([1.0, 0.8, 0.5]), np.array([1.0, 2.0, 3.0]))
    # Every step is recorded, and so looked at, up to the 25th.
    curves = _simulated(model, 12, 24, growth=growth, learning_rate=0.05, **own)
    theta = torch.zeros(1, model.rank, dtype=torch.float64)
    velocity = torch.zeros_like(theta)
    losses, factors = [], []
    for step in range(25):
        losses.append(float(model.loss(model.outputs(theta))))
        # What has grown stays so while the loss swings.
        depth = -math.log(min(losses) / losses[0])
        logs = np.interp(depth, -np.log([1.0, 0.8, 0.5]), np.log([1.0, 2.0, 3.0]))
        factors.append(math.exp(logs))
        gradient = model.gradient(theta) + own.get("weight_decay", 0.0) * (model.pull + theta)
        # The Jacobian has grown by the root: once where the gradient is taken, once where it acts.
        gradient = math.sqrt(factors[-1]) * gradient
        velocity = momentum * velocity + (1.0 - dampening if step else 1.0) * gradient
        ahead = gradient + momentum * velocity if own.get("nesterov") else velocity
        theta = theta - math.sqrt(factors[-1]) * 0.05 * ahead
    np.testing.assert_allclose(curves.curves["loss"][0], losses, rtol=1e-9)
    assert max(factors) > 1.2


def test_growth_is_interpolated_in_logarithms_and_constant_beyond_its_ends() -> None:
    growth = KernelGrowth(np.array([1.0, 0.5, 0.25]), np.array([1.0, 4.0, 2.0]))
    fractions = np.array([[3.0, 1.0, 2**-0.5], [0.5, 0.25, 1e-9], [0.0, 2**-1.5, math.inf]])
    expected = [[1.0, 1.0, 2.0], [4.0, 2.0, 2.0], [2.0, 8**0.5, 1.0]]
    np.testing.assert_allclose(growth.at(fractions), expected)


# Learning-rate multipliers


class _TwoParts(torch.nn.Module):
    """A linear model of two layers, side by side."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = torch.nn.Linear(4, 3)
        self.head = torch.nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.body(x[:, :4]) + self.head(x[:, 4:])
        return outputs


_MULTIPLIERS = {"body.": 0.5, "head": 4.0, "head.bias": 2.0}
_GROUPS = {"body.weight": 0.5, "body.bias": 0.5, "head.weight": 4.0, "head.bias": 2.0}


def _grouped_task(multipliers: dict[str, float] | None = None) -> FineTuningTask:
    plain = linear_task()
    return FineTuningTask(
        _TwoParts().double(), plain._dataset.tensors, learning_rate_multipliers=multipliers
    )


def _spectrum(task: FineTuningTask) -> Spectrum:
    return compute_spectrum(task, dtype="float64", measure_speed=False, device="cpu", probe=False)


@pytest.mark.parametrize("batch_size", [5, 12])
@pytest.mark.parametrize("optimiser", ["none", "dampening", "nesterov"])
def test_multipliers_are_parameter_groups(optimiser: str, batch_size: int) -> None:
    own = _OPTIMISERS.get(optimiser, {})
    task = _grouped_task(_MULTIPLIERS)
    loss = _LOSSES["cross-entropy"]
    losses = _train(task, loss, batch_size, groups=_GROUPS, **own)
    assert not np.allclose(losses, _train(task, loss, batch_size, **own), rtol=1e-3)
    _assert_follows(_simulated(_double(_spectrum(task)), batch_size, **own), losses, 1e-7)


def test_kernel_with_multipliers_is_the_weighted_sum_of_the_groups_kernels() -> None:
    x, y = vectors(7)
    model = mlp().double()
    task = FineTuningTask(
        model, (x.double(), y), learning_rate_multipliers={"0.": 3.0, "2.weight": 0.25}
    )
    factors = {"0.weight": 3.0, "0.bias": 3.0, "2.weight": 0.25, "2.bias": 1.0}
    kernel = np.zeros((21, 21))
    weights = {n: p.detach() for n, p in model.named_parameters()}
    jacobians = torch.func.jacrev(
        lambda w: torch.func.functional_call(model, w, (x.double(),)).reshape(-1)
    )(weights)
    contributions = np.zeros(21)
    for name, jacobian in jacobians.items():
        rows = jacobian.reshape(21, -1)
        kernel += factors[name] * (rows @ rows.T).numpy()
        contributions += factors[name] * (rows @ weights[name].reshape(-1)).numpy()
    one = _spectrum(task)
    rebuilt = (one.eigenvectors * one.eigenvalues) @ one.eigenvectors.T
    np.testing.assert_allclose(rebuilt, kernel, atol=1e-10 * kernel.max())
    assert one.trace == pytest.approx(np.trace(kernel))
    # Where weight decay pulls from.
    assert one.weight_outputs is not None
    np.testing.assert_allclose(one.weight_outputs.ravel(), contributions, rtol=1e-9)


@pytest.mark.parametrize("optimiser", ["weight decay", "nesterov and weight decay"])
def test_weight_decay_with_one_multiplier_for_all_is_that_of_another_learning_rate(
    optimiser: str,
) -> None:
    own = _OPTIMISERS[optimiser]
    task = _grouped_task({"": 3.0})
    loss = _LOSSES["cross-entropy"]
    losses = _train(task, loss, 5, learning_rate=0.06, **own)
    _assert_follows(_simulated(_double(_spectrum(task)), 5, **own), losses, 1e-7)


def test_weight_decay_with_multipliers_is_nearly_that_of_parameter_groups() -> None:
    task = _grouped_task(_MULTIPLIERS)
    own: dict[str, Any] = {"momentum": 0.8, "weight_decay": 0.05}
    losses = _train(task, _LOSSES["cross-entropy"], 12, groups=_GROUPS, **own)
    without = _train(task, _LOSSES["cross-entropy"], 12, groups=_GROUPS, momentum=0.8)
    curves = _simulated(_double(_spectrum(task)), 12, **own)
    error = np.abs(curves.curves["loss"][0] - losses[curves.steps[0].astype(int)]).max()
    assert error < 0.1 * np.abs(losses - without).max()


def test_multipliers_of_one_change_nothing() -> None:
    plain, same = _grouped_task(), _grouped_task({"body": 1.0, "head": 1.0})
    np.testing.assert_array_equal(_spectrum(plain).eigenvalues, _spectrum(same).eigenvalues)
    assert plain.fingerprint == same.fingerprint


def test_fingerprint_tells_multipliers_apart() -> None:
    prints = [
        _grouped_task(m).fingerprint
        for m in (None, {"body": 2.0}, {"head": 2.0}, {"body": 3.0}, {"": 2.0})
    ]
    assert len(set(prints)) == 5
    # The same multipliers by another name.
    assert _grouped_task({"body": 2.0, "head": 2.0}).fingerprint == prints[-1]
    assert _grouped_task({"body.": 2.0}).fingerprint == prints[1]


def test_fingerprint_tells_validation_data_apart() -> None:
    task = linear_task()
    x, y = task._dataset.tensors
    prints = [
        FineTuningTask(task.model, (x, y), validation_data=data).fingerprint
        for data in (None, (x[:5], y[:5]), (x[:6], y[:6]), (x[:5] + 1.0, y[:5]))
    ]
    assert len(set(prints)) == 4
    assert prints[0] == task.fingerprint


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_multiplier_that_is_not_positive_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match=r"multipliers must be positive but got .* for 'head'"):
        _grouped_task({"head": factor})


@pytest.mark.parametrize("multipliers", [[2.0], {"": "2"}, {"": None}])
def test_multipliers_of_another_kind_are_refused(multipliers: Any) -> None:
    with pytest.raises(TypeError, match="learning_rate_multipliers must be"):
        _grouped_task(multipliers)


@pytest.mark.parametrize("name", ["heads.", "weight", "body.weight.x"])
def test_multiplier_of_no_parameter_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"but got '{name}'. Names are like body.weight"):
        _grouped_task({name: 2.0})


def test_multiplier_of_a_frozen_parameter_is_refused() -> None:
    model = _TwoParts()
    model.head.requires_grad_(False)
    x, y = vectors(5)
    with pytest.raises(ValueError, match="trainable parameter's name but got 'head'"):
        FineTuningTask(model, (x, y), learning_rate_multipliers={"head": 2.0})


# Bad settings of the predictor


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dampening": -0.1}, r"dampening must be in \[0, 1\) but got -0.1"),
        ({"dampening": 1.0}, r"dampening must be in \[0, 1\) but got 1.0"),
        ({"dampening": math.nan}, r"dampening must be in \[0, 1\) but got nan"),
        ({"dampening": 0.1, "nesterov": True}, "Nesterov momentum needs zero dampening"),
        ({"weight_decay": -1e-3}, "weight_decay must not be negative but got -0.001"),
        ({"weight_decay": math.nan}, "weight_decay must not be negative but got nan"),
        ({"weight_decay": math.inf}, "weight_decay must not be negative but got inf"),
        ({"sampling": "bootstrap"}, "sampling must be one of shuffle, replacement but got"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictor_with(_linear(), target_fraction=0.5, **arguments)


def test_loss_of_the_reference_is_that_of_the_task() -> None:
    for loss in _LOSSES.values():
        kind = Loss.from_user(loss)
        assert linear_task(loss).loss == kind
        losses = _train(linear_task(loss), loss, 12, 0)
        model = _double(spectrum(loss))
        assert losses[0] == pytest.approx(float(model.loss(model.initial_outputs[None])))
