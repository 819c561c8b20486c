from __future__ import annotations

import copy
import itertools
import math
from typing import Any

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
from numpy.typing import NDArray
import pytest
import torch

from optuna_ttp.dynamics import KernelGrowth
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import SGDConfigurations
from optuna_ttp.dynamics import simulate
from optuna_ttp.dynamics import StabilityLimit
from optuna_ttp.dynamics import Target
from optuna_ttp.dynamics import Trajectories
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.task import Loss
from tests.cases import linear_task
from tests.cases import spectrum
from tests.closed_forms import mse_gradient_descent
from tests.closed_forms import mse_gradient_flow


def _simulate(
    model: LinearisedModel,
    learning_rate: float | list[float],
    batch_size: int | list[int],
    momentum: float | list[float] = 0.0,
    max_steps: int | list[int] = 50,
    **settings: Any,
) -> Trajectories:
    rate, size, mass, steps = np.broadcast_arrays(
        *map(np.atleast_1d, (learning_rate, batch_size, momentum, max_steps))
    )
    return simulate(
        model,
        SGDConfigurations.of(rate, mass),
        size.astype(np.int64),
        max_steps=steps.astype(np.int64),
        **settings,
    )


def _max_learning_rate(
    model: LinearisedModel,
    batch_size: Any,
    momentum: Any,
    n_samples: int | None = None,
    **settings: Any,
) -> NDArray[np.float64]:
    limit = StabilityLimit.of(model, n_samples)
    return limit.max_learning_rate(np.asarray(batch_size), np.asarray(momentum), **settings)


def _one_sample_a_direction(curvatures: Any, n_samples: int) -> LinearisedModel:
    """Least squares with a diagonal Hessian; samples beyond the curvatures have no features."""
    roots = torch.as_tensor(np.array(curvatures)).mul(n_samples / 2).sqrt()
    features = torch.zeros(n_samples, 1, len(roots), dtype=torch.float64)
    features[torch.arange(len(roots)), 0, torch.arange(len(roots))] = roots
    zeros = torch.zeros(n_samples, 1, dtype=torch.float64)
    return LinearisedModel(
        features=features,
        initial_outputs=zeros,
        soft_targets=zeros,
        normalisers=torch.ones(n_samples, dtype=torch.float64),
        labels=None,
        kind="mse",
    )


def _double(one: Spectrum) -> LinearisedModel:
    return LinearisedModel.from_spectrum(one, dtype=torch.float64)


# Closed forms


def _heavy_ball_by_its_roots(
    one: Spectrum, learning_rate: float, momentum: float, steps: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Loss of full-batch heavy ball on the MSE: per mode, the recursion's two roots."""
    residual = (one.targets - one.initial_outputs).ravel()
    projections = one.eigenvectors.T @ residual
    outside = residual @ residual - projections @ projections
    total = np.full(len(steps), outside)
    for value, projection in zip(one.eigenvalues, projections, strict=True):
        a = learning_rate * 2.0 * value / residual.size
        z1, z2 = np.roots([1.0, -(1.0 + momentum - a), momentum]).astype(complex)
        share = (1.0 - a - z2) / (z1 - z2)
        x = share * z1**steps + (1.0 - share) * z2**steps
        total += projection**2 * x.real**2
    return total / residual.size


def _stable_rate(one: Spectrum, momentum: float = 0.0) -> float:
    return 2.0 * (1.0 + momentum) / float(_double(one).curvatures[0])


def test_mse_closed_form_equals_gradient_descent_on_the_weights() -> None:
    task = linear_task("mse")
    rate = 0.7 * _stable_rate(spectrum("mse"))
    model, (x, y) = copy.deepcopy(task.model), task._dataset.tensors
    optimizer = torch.optim.SGD(model.parameters(), rate)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.mse_loss(model(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    closed = mse_gradient_descent(spectrum("mse"), rate, np.arange(60))
    np.testing.assert_allclose(closed, losses, rtol=1e-9)


@pytest.mark.parametrize("relative_rate", [1e-3, 0.1, 0.5, 0.95])
@pytest.mark.parametrize("rank", [None, 5])
def test_simulated_mse_equals_the_closed_form(relative_rate: float, rank: int | None) -> None:
    one = spectrum("mse").truncate(rank=rank)
    rate = relative_rate * _stable_rate(one)
    curves = _simulate(LinearisedModel.from_spectrum(one), rate, 12, max_steps=500, exact=True)
    closed = mse_gradient_descent(one, rate, curves.steps[0])
    np.testing.assert_allclose(curves.curves["loss"][0], closed, rtol=1e-4)


def test_gradient_flow_is_the_limit_of_small_steps() -> None:
    one = spectrum("mse")
    rate = 0.2 * _stable_rate(one)
    flow = mse_gradient_flow(one, rate, [10, 40])
    errors = [
        np.abs(mse_gradient_descent(one, rate / n, [10 * n, 40 * n]) - flow).max()
        for n in (10, 100, 1000)
    ]
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)


def test_gradient_flow_equals_equation_5_of_zancato_et_al() -> None:
    """There the loss is half the sum of squares, `L_t = sum_k exp(-2 eta lambda_k t) p_k`."""
    one = spectrum("mse").truncate(rank=6)
    dy = (one.targets - one.initial_outputs).ravel()
    p = (dy @ one.eigenvectors) ** 2
    t, eta = 7.0, 0.05
    ours = mse_gradient_flow(one, eta * dy.size / 2.0, [t])[0] * dy.size
    theirs = (np.exp(-2.0 * eta * one.eigenvalues * t) * p).sum()
    assert ours == pytest.approx(theirs + dy @ dy - p.sum(), rel=1e-12)


def test_closed_form_is_that_of_the_mse() -> None:
    with pytest.raises(ValueError, match="mean squared error but got 'cross_entropy'"):
        mse_gradient_descent(spectrum(), 0.1, [1])


@given(
    relative_rate=st.floats(1e-3, 0.99),
    momentum=st.floats(0.0, 0.98),
    rank=st.integers(1, 21),
)
@settings(max_examples=40)
def test_simulated_heavy_ball_equals_the_closed_form_of_its_roots(
    relative_rate: float, momentum: float, rank: int
) -> None:
    one = spectrum("mse").truncate(rank=rank)
    rate = relative_rate * _stable_rate(one, momentum)
    curves = _simulate(_double(one), rate, 12, momentum, 80, exact=True)
    expected = _heavy_ball_by_its_roots(one, rate, momentum, curves.steps[0])
    if curves.blown_up[0]:
        # A stable heavy ball may overshoot at first.
        assert expected.max() > 99 * expected[0]
        return
    np.testing.assert_allclose(curves.curves["loss"][0], expected, rtol=1e-6)


# Real training


_LOSSES = {
    "cross-entropy": torch.nn.CrossEntropyLoss(),
    "weighted and smoothed": torch.nn.CrossEntropyLoss(
        torch.tensor([0.3, 2.0, 1.0], dtype=torch.float64), label_smoothing=0.1
    ),
    "mse": torch.nn.MSELoss(),
}


def _train(
    loss: torch.nn.Module,
    learning_rate: float,
    batch_size: int,
    momentum: float,
    n_steps: int,
    seed: int,
) -> tuple[list[float], list[float]]:
    """Losses and accuracies over all samples of a linear layer, trained by torch.optim.SGD."""
    task = linear_task(loss)
    model, (x, y) = copy.deepcopy(task.model), task._dataset.tensors
    labels = y.argmax(dim=1) if y.ndim == 2 else y
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum)
    generator = torch.Generator().manual_seed(seed)
    losses, accuracies = [], []
    batches: list[torch.Tensor] = []
    for _ in range(n_steps + 1):
        with torch.no_grad():
            losses.append(loss(model(x), y).item())
            accuracies.append((model(x).argmax(dim=1) == labels).double().mean().item())
        if not batches:
            batches = list(torch.randperm(len(x), generator=generator).split(batch_size))
        batch = batches.pop(0)
        optimizer.zero_grad()
        torch.autograd.backward(loss(model(x[batch]), y[batch]))
        optimizer.step()
    return losses, accuracies


@pytest.mark.parametrize("loss", _LOSSES)
@pytest.mark.parametrize(("batch_size", "momentum"), [(1, 0.0), (5, 0.0), (5, 0.9), (12, 0.9)])
def test_simulation_equals_real_training_of_a_linear_model_step_by_step(
    loss: str, batch_size: int, momentum: float
) -> None:
    model = _double(spectrum(_LOSSES[loss]))
    curves = _simulate(
        model,
        0.02,
        batch_size,
        momentum,
        60,
        exact=True,
        seed=3,
        target=Target("accuracy", 2.0),
    )
    losses, accuracies = _train(_LOSSES[loss], 0.02, batch_size, momentum, 60, seed=3)
    steps = curves.steps[0].astype(int)
    np.testing.assert_allclose(curves.curves["loss"][0], np.array(losses)[steps], rtol=1e-8)
    np.testing.assert_allclose(curves.curves["accuracy"][0], np.array(accuracies)[steps])


def test_configurations_simulated_together_equal_each_alone() -> None:
    model = _double(spectrum())
    rates, sizes = [0.01, 0.2, 0.1, 0.05, 0.3], [12, 4, 5, 4, 12]
    masses, steps = [0.0, 0.9, 0.5, 0.0, 0.9], [30, 90, 60, 7, 1]
    together = _simulate(model, rates, sizes, masses, steps)
    assert together.curves["loss"].shape == together.steps.shape
    for k, configuration in enumerate(zip(rates, sizes, masses, steps, strict=True)):
        alone = _simulate(model, *configuration)
        n = alone.curves["loss"].shape[1]
        np.testing.assert_allclose(
            together.curves["loss"][k, :n], alone.curves["loss"][0], rtol=1e-12
        )
        np.testing.assert_array_equal(together.steps[k, :n], alone.steps[0])
        assert np.isnan(together.curves["loss"][k, n:]).all()
        assert np.isnan(together.steps[k, n:]).all()


def test_seed_decides_the_order_of_mini_batches_only() -> None:
    model = _double(spectrum())
    first, same, other = (_simulate(model, 0.1, 5, seed=s).curves["loss"] for s in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert not np.allclose(first, other)
    np.testing.assert_array_equal(
        _simulate(model, 0.1, 12, seed=1).curves["loss"],
        _simulate(model, 0.1, 12, seed=2).curves["loss"],
    )


def test_simulation_draws_no_global_random_number() -> None:
    before = torch.get_rng_state()
    _simulate(_double(spectrum()), 0.1, 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_simulation_on_every_device_is_the_same(device: torch.device) -> None:
    expected = _simulate(_double(spectrum()), [0.1, 0.2], 5, 0.5)
    model = LinearisedModel.from_spectrum(spectrum(), device=device)
    actual = _simulate(model, [0.1, 0.2], 5, 0.5)
    np.testing.assert_allclose(actual.curves["loss"], expected.curves["loss"], rtol=1e-4)


# What is recorded


@given(max_steps=st.integers(1, 2000), batch_size=st.integers(1, 12))
@settings(max_examples=20)
def test_curves_start_at_zero_end_at_the_horizon_and_leave_no_gap(
    max_steps: int, batch_size: int
) -> None:
    model = _double(spectrum())
    curves = _simulate(model, 1e-3, batch_size, max_steps=max_steps, exact=True)
    steps = curves.steps[0]
    assert (steps[0], steps[-1]) == (0, max_steps)
    assert (np.diff(steps) >= 1).all()
    assert (np.diff(steps) <= np.maximum(1, 0.04 * steps[:-1])).all()
    assert curves.curves["loss"][0, 0] == pytest.approx(
        float(model.loss(model.initial_outputs[None]))
    )


def test_curve_ends_where_the_target_is_reached() -> None:
    model = _double(spectrum())
    target = Target("loss", 0.8 * float(model.loss(model.initial_outputs[None])))
    ended = _simulate(model, 0.1, 12, max_steps=500, target=target, exact=True)
    whole = _simulate(model, 0.1, 12, max_steps=500, exact=True)
    n = ended.curves["loss"].shape[1]
    assert n < whole.curves["loss"].shape[1]
    np.testing.assert_array_equal(ended.curves["loss"][0], whole.curves["loss"][0, :n])
    assert ended.curves["loss"][0, -1] <= target.value < ended.curves["loss"][0, -2]


def test_accuracy_target_ends_a_curve() -> None:
    model = _double(spectrum())
    ended = _simulate(model, 0.1, 12, max_steps=2000, target=Target("accuracy", 0.75))
    assert ended.curves["accuracy"][0, -1] >= 0.75 > ended.curves["accuracy"][0, :-1].max()


def test_single_real_output_has_no_accuracy() -> None:
    model = _double(spectrum("mse", n_outputs=1))
    with pytest.raises(ValueError, match="no accuracy"):
        model.accuracy(model.initial_outputs[None])


@pytest.mark.parametrize("relative_rate", [1.05, 3.0, 1e3, 1e30, 1e300])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_unstable_training_blows_up(relative_rate: float, momentum: float) -> None:
    one = spectrum("mse")
    rate = relative_rate * _stable_rate(one, momentum)
    curves = _simulate(
        LinearisedModel.from_spectrum(one), [rate, 1e-3], 12, momentum, max_steps=1000
    )
    assert curves.blown_up.tolist() == [True, False]
    assert np.nanmax(curves.steps[0]) < 1000


def test_training_just_below_the_limit_does_not_blow_up() -> None:
    one = spectrum("mse")
    rate = 0.99 * _stable_rate(one)
    curves = _simulate(LinearisedModel.from_spectrum(one), rate, 12, max_steps=1000)
    assert not curves.blown_up[0]
    assert curves.curves["loss"][0, -1] < curves.curves["loss"][0, 0]


# A kernel that grows


def _grown(rate: float, momentum: float = 0.0, *, limited: bool = True) -> Any:
    """Simulate a kernel that grows tenfold, a learning rate in units of the stability limit."""
    model = LinearisedModel.from_spectrum(spectrum("mse"))
    limit = StabilityLimit.of(model)
    largest = float(limit.max_learning_rate(np.array([12]), np.array([momentum]))[0])
    growth = KernelGrowth(np.array([1.0, 0.7, 0.1]), np.array([1.0, 3.0, 10.0]))
    return simulate(
        model,
        SGDConfigurations.of([rate * largest], momentum),
        np.array([12]),
        max_steps=np.array([2000]),
        growth=growth,
        limit=limit if limited else None,
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.95])
def test_a_kernel_grows_up_to_the_edge_of_stability_only(rate: float, momentum: float) -> None:
    assert _grown(rate, momentum, limited=False).blown_up[0]
    held = _grown(rate, momentum)
    assert not held.blown_up[0]
    losses = held.curves["loss"][0]
    assert losses[-1] < 0.5 * losses[0]


def test_far_from_the_edge_a_kernel_grows_as_it_is_told() -> None:
    free, held = _grown(0.05, limited=False), _grown(0.05)
    np.testing.assert_array_equal(free.curves["loss"], held.curves["loss"])


def test_a_learning_rate_above_the_limit_blows_up_as_with_a_frozen_kernel() -> None:
    assert _grown(1.5).blown_up[0]


# Several steps as one


def _wide_spectrum(loss: str) -> Spectrum:
    """Eigenvalues that fall as a power law over three decades."""
    return spectrum(loss, n_samples=40, seed=2)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize(("batch_size", "momentum"), [(40, 0.0), (8, 0.0), (8, 0.9), (40, 0.98)])
def test_time_with_strides_is_within_two_per_cent_of_the_exact_one(
    loss: str, batch_size: int, momentum: float
) -> None:
    model = _double(_wide_spectrum(loss))
    initial = float(model.loss(model.initial_outputs[None]))
    rate = 0.01 * (1.0 - momentum) / float(model.curvatures[0])
    least = (
        _simulate(model, 1.0 / float(model.curvatures[0]), 40, max_steps=2000).curves["loss"].min()
    )
    strides = []
    for share in (0.9, 0.6, 0.4, 0.2):
        target = Target("loss", least + share * (initial - least))
        times = []
        for exact in (True, False):
            curves = _simulate(
                model, rate, batch_size, momentum, 20_000, target=target, exact=exact
            )
            times.append(target.first_passage(curves.steps[0], curves.curves["loss"][0]))
        assert math.isfinite(times[0])
        assert times[1] == pytest.approx(times[0], rel=0.02)
        strides.append(int(curves.strides[0]))
    assert strides == sorted(strides)
    assert strides[-1] >= 4


@pytest.mark.parametrize("momentum", [0.8, 0.9])
def test_coarse_steps_keep_the_rate_of_the_heavy_ball_to_second_order(momentum: float) -> None:
    one = spectrum("mse").truncate(rank=1)
    h = float(_double(one).curvatures[0])
    rate = 0.02 * (1.0 - momentum) / h
    curves = _simulate(_double(one), rate, 12, momentum, 1000)
    assert curves.strides[0] == 8
    least = mse_gradient_descent(one, 1.0 / h, [10_000])[0]
    late = (curves.steps[0] > 100) & (curves.curves["loss"][0] > least * (1 + 1e-9))
    slope = np.polyfit(curves.steps[0][late], np.log(curves.curves["loss"][0][late] - least), 1)[0]
    slow_root = np.roots([1.0, -(1.0 + momentum - rate * h), momentum]).max()
    assert slope == pytest.approx(2 * np.log(slow_root), rel=0.03)


@given(
    log_rate=st.floats(-8, 2),
    momentum=st.floats(0, 0.999),
    max_steps=st.integers(1, 100),
)
@settings(max_examples=60)
def test_strides_are_powers_of_two_within_their_bounds(
    log_rate: float, momentum: float, max_steps: int
) -> None:
    model = _double(spectrum())
    rate = 10.0**log_rate
    curves = _simulate(model, rate, 12, momentum, max_steps)
    stride = int(curves.strides[0])
    assert stride & (stride - 1) == 0
    if stride > 1:
        assert stride * rate / (1 - momentum) * model.curvatures[0] <= 0.25 * (1 + 1e-9)
        assert stride <= max_steps / 64


# The first passage


def test_first_passage_interpolates_the_logarithm_of_a_loss() -> None:
    steps = np.array([0.0, 10.0, 20.0, 40.0])
    values = np.exp(-steps / 7)
    for passage in (1, 9, 10, 11, 35, 40):
        target = Target("loss", math.exp(-passage / 7))
        assert target.first_passage(steps, values) == passage


def test_first_passage_interpolates_an_accuracy_linearly() -> None:
    target = Target("accuracy", 0.65)
    assert target.first_passage(np.array([0.0, 10.0]), np.array([0.5, 0.8])) == 5
    assert target.first_passage(np.array([0.0, 7.0]), np.array([0.5, 0.8])) == 4


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.0, 1.5, 1.2], math.inf),
        ([2.0, 1.5, 1.0], 2),
        ([0.5, 1.5, 1.0], 0),
        ([2.0, 0.5, 3.0], 1),
        ([2.0, 0.0, 0.0], 1),
        ([2.0, 1.5, math.nan], math.inf),
        ([2.0, math.nan, 0.5], 2),
        ([math.nan] * 3, math.inf),
        ([2.0, math.inf, 0.5], 2),
    ],
    ids=str,
)
def test_first_passage_of_special_curves(values: list[float], expected: float) -> None:
    passage = Target("loss", 1.0).first_passage(np.arange(3.0), np.array(values))
    assert passage == expected


@given(
    values=st.lists(st.floats(1e-3, 10), min_size=1, max_size=20),
    gaps=st.lists(st.integers(1, 9), min_size=20, max_size=20),
    goals=st.tuples(st.floats(1e-3, 10), st.floats(1e-3, 10)),
)
def test_first_passage_is_a_whole_step_where_the_curve_crosses(
    values: list[float], gaps: list[int], goals: tuple[float, float]
) -> None:
    steps = np.concatenate([[0], np.cumsum(gaps)])[: len(values)].astype(float)
    curve = np.array(values)
    deep, shallow = (Target("loss", g).first_passage(steps, curve) for g in sorted(goals))
    assert shallow <= deep
    if min(values) > min(goals):
        assert deep == math.inf
        return
    assert deep == math.floor(deep)
    first = int(np.argmax(curve <= min(goals)))
    assert deep <= steps[first]
    assert first == 0 or deep > steps[first - 1]


# Curvature and stability


@pytest.mark.parametrize("loss", _LOSSES)
def test_curvatures_are_eigenvalues_of_the_hessian(loss: str) -> None:
    model = _double(spectrum(_LOSSES[loss]))
    theta = torch.zeros(model.features.shape[2], dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(
        lambda t: model.loss(model.outputs(t[None]))[0], theta
    )
    expected = torch.linalg.eigvalsh(hessian).flip(0).clamp(min=0).numpy()
    np.testing.assert_allclose(model.curvatures, expected, rtol=1e-9, atol=1e-13)


def _least_squares(n_samples: int, rank: int) -> LinearisedModel:
    """A realisable least-squares problem with a power law of curvatures."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n_samples, 1, rank, generator=generator, dtype=torch.float64)
    features = features * torch.arange(1, rank + 1) ** -0.5
    solution = torch.randn(rank, generator=generator, dtype=torch.float64)
    zeros = torch.zeros(n_samples, 1, dtype=torch.float64)
    return LinearisedModel(
        features=features,
        initial_outputs=zeros,
        soft_targets=features @ solution,
        normalisers=torch.ones(n_samples, dtype=torch.float64),
        labels=None,
        kind="mse",
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("batch_size", [2, 8, 32, 128])
def test_stability_limit_agrees_with_simulated_least_squares(
    batch_size: int, momentum: float
) -> None:
    model = _least_squares(128, 32)
    limit = _max_learning_rate(model, [batch_size], [momentum])[0]
    ratios = np.linspace(0.75, 1.35, 13)
    grows = []
    for seed in range(3):
        curves = _simulate(
            model, list(ratios * limit), batch_size, momentum, 1000, exact=True, seed=seed
        )
        grows.append(
            curves.blown_up | (curves.curves["loss"][:, -1] > curves.curves["loss"][:, 0])
        )
    often = np.mean(grows, axis=0) > 0.5
    critical = ratios[np.argmax(often)]
    assert often[-1]
    assert not often[0]
    # The mean square blows up before the typical run does.
    assert 0.85 <= critical <= 1.3


@pytest.mark.parametrize("kind", ["mse", "cross_entropy"])
@pytest.mark.parametrize("momentum", [0.0, 0.7, 0.9])
@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_stability_limit_is_that_of_the_second_moments_over_all_batches(
    batch_size: int, momentum: float, kind: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(6, 2, 4, generator=generator, dtype=torch.float64)
    one_hot = torch.eye(2, dtype=torch.float64)[torch.arange(6) % 2]
    model = LinearisedModel(
        features=features,
        initial_outputs=torch.randn(6, 2, generator=generator, dtype=torch.float64),
        soft_targets=one_hot,
        normalisers=torch.ones(6, dtype=torch.float64),
        labels=None,
        kind=kind,
    )
    rooted = model.rooted_features(model.initial_outputs)
    hessians = torch.einsum("ncr,ncs->nrs", rooted, rooted).numpy()

    def spectral_radius(rate: float) -> float:
        moments = np.zeros((64, 64))
        batches = list(itertools.combinations(range(6), batch_size))
        for batch in batches:
            hessian = hessians[list(batch)].mean(axis=0)
            step = np.block(
                [
                    [(1 + momentum) * np.eye(4) - rate * hessian, -momentum * np.eye(4)],
                    [np.eye(4), np.zeros((4, 4))],
                ]
            )
            moments += np.kron(step, step) / len(batches)
        return float(np.abs(np.linalg.eigvals(moments)).max())

    limit = _max_learning_rate(model, [batch_size], [momentum])[0]
    assert spectral_radius(0.96 * limit) < 1.0
    assert spectral_radius(1.04 * limit) > 1.0


@given(
    momentum=st.floats(0, 0.99),
    curvatures=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6),
)
def test_full_batch_limit_is_that_of_the_heavy_ball(
    momentum: float, curvatures: list[float]
) -> None:
    h = np.sort(curvatures)[::-1]
    limit = _max_learning_rate(_one_sample_a_direction(h, 50), [50], [momentum])[0]
    assert limit == pytest.approx(2 * (1 + momentum) / h[0], rel=1e-9)


@given(
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    weight_decay=st.floats(0, 50),
    dampening=st.floats(0, 0.95),
    nesterov=st.booleans(),
)
def test_full_batch_limit_is_where_torch_sgd_blows_up(
    momentum: float, weight_decay: float, dampening: float, nesterov: bool
) -> None:
    nesterov = nesterov and momentum > 0
    dampening = 0.0 if nesterov else dampening
    settings: dict[str, Any] = {
        "weight_decay": weight_decay,
        "dampening": dampening,
        "nesterov": nesterov,
    }
    model = _one_sample_a_direction([2.0, 1.0], 50)
    limit = _max_learning_rate(model, [50], [momentum], **settings).item()
    curvatures = torch.tensor([2.0, 1.0], dtype=torch.float64)
    grown = []
    for rate in (0.95 * limit, 1.05 * limit):
        weights = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        sgd = torch.optim.SGD([weights], rate, momentum, **settings)
        for _ in range(500):
            weights.grad = curvatures * weights.detach()
            sgd.step()
        grown.append(float(weights.detach().abs().max()))
    assert grown[0] < 0.1
    assert grown[1] > 10.0


def test_dampened_mini_batches_bear_a_larger_learning_rate() -> None:
    model = _least_squares(128, 32)
    plain, dampened = (
        _max_learning_rate(model, [8, 8], [0.0, 0.9], dampening=d) for d in (0.0, 0.9)
    )
    # PyTorch ignores the dampening where there is no momentum.
    np.testing.assert_allclose(dampened / plain, [1.0, 10.0])


def test_limit_rises_with_the_batch_size_to_that_of_the_full_batch() -> None:
    model = _one_sample_a_direction([3.0, 1.0, 0.5], 100)
    limits = _max_learning_rate(model, np.arange(1, 101), np.full(100, 0.9))
    assert (np.diff(limits) > 0).all()
    assert limits[-1] == pytest.approx(2 * 1.9 / 3.0)
    # Small batches: S = 1 for eta h_1 << 2 (1 + m), at eta = 2 (1 - m) B / tr(H).
    many = _one_sample_a_direction(np.full(1000, 1.0), 1000)
    tiny = _max_learning_rate(many, [1], [0.0], n_samples=10**9)[0]
    assert tiny == pytest.approx(2.0 / 1000, rel=0.01)


def test_flat_loss_has_no_limit() -> None:
    assert _max_learning_rate(_one_sample_a_direction(np.zeros(3), 5), [2], [0.0]) == [np.inf]
    limit = _max_learning_rate(_one_sample_a_direction([2.0, 0.0], 5), [5], [0.0])
    assert limit[0] == pytest.approx(1.0)


def test_single_sample_has_no_noise() -> None:
    limit = _max_learning_rate(_one_sample_a_direction([2.0], 1), [1], [0.0])[0]
    assert limit == pytest.approx(1.0)


# The linearised model


def test_features_reproduce_the_kernel_and_the_initial_outputs() -> None:
    one = spectrum()
    model = _double(one)
    features = model.features.reshape(36, -1).numpy()
    kernel = (one.eigenvectors * one.eigenvalues) @ one.eigenvectors.T
    np.testing.assert_allclose(features @ features.T, kernel, atol=1e-12 * one.eigenvalues[0])
    theta = torch.zeros(2, one.rank, dtype=torch.float64)
    for outputs in model.outputs(theta):
        np.testing.assert_array_equal(outputs.numpy(), one.initial_outputs)


def test_normaliser_of_a_weighted_loss_is_that_of_its_samples() -> None:
    one = spectrum(Loss("cross_entropy", 0.0, (1.0, 2.0, 4.0)))
    expected = np.array([1.0, 2.0, 4.0])[one.targets]
    np.testing.assert_array_equal(_double(one).normalisers.numpy(), expected)
