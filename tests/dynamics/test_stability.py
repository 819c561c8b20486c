from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
from numpy.typing import NDArray
import pytest
import torch

from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import StabilityLimit
from tests.dynamics.simulations import simulate_all


def _max_learning_rate(
    model: LinearisedModel,
    batch_size: Any,
    momentum: Any,
    n_samples: int | None = None,
    **settings: Any,
) -> NDArray[np.float64]:
    limit = StabilityLimit.of(model, n_samples)
    return limit.max_learning_rate(np.asarray(batch_size), np.asarray(momentum), **settings)


def one_sample_a_direction(curvatures: Any, n_samples: int) -> LinearisedModel:
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
        curves = simulate_all(
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
    limit = _max_learning_rate(one_sample_a_direction(h, 50), [50], [momentum])[0]
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
    model = one_sample_a_direction([2.0, 1.0], 50)
    limit = _max_learning_rate(model, [50], [momentum], **settings).item()
    curvatures = torch.tensor([2.0, 1.0], dtype=torch.float64)
    below, above = (torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    groups = [
        {"params": [below], "lr": 0.95 * limit},
        {"params": [above], "lr": 1.05 * limit},
    ]
    sgd = torch.optim.SGD(groups, momentum=momentum, **settings)
    for _ in range(200):
        for weights in (below, above):
            weights.grad = curvatures * weights.detach()
        sgd.step()
    assert float(below.detach().abs().max()) < 0.1
    assert float(above.detach().abs().max()) > 10.0


def test_dampened_mini_batches_bear_a_larger_learning_rate() -> None:
    model = _least_squares(128, 32)
    plain, dampened = (
        _max_learning_rate(model, [8, 8], [0.0, 0.9], dampening=d) for d in (0.0, 0.9)
    )
    # PyTorch ignores the dampening where there is no momentum.
    np.testing.assert_allclose(dampened / plain, [1.0, 10.0])


def test_limit_rises_with_the_batch_size_to_that_of_the_full_batch() -> None:
    model = one_sample_a_direction([3.0, 1.0, 0.5], 100)
    limits = _max_learning_rate(model, np.arange(1, 101), np.full(100, 0.9))
    assert (np.diff(limits) > 0).all()
    assert limits[-1] == pytest.approx(2 * 1.9 / 3.0)
    # Small batches: S = 1 for eta h_1 << 2 (1 + m), at eta = 2 (1 - m) B / tr(H).
    many = one_sample_a_direction(np.full(1000, 1.0), 1000)
    tiny = _max_learning_rate(many, [1], [0.0], n_samples=10**9)[0]
    assert tiny == pytest.approx(2.0 / 1000, rel=0.01)


def test_flat_loss_has_no_limit() -> None:
    assert _max_learning_rate(one_sample_a_direction(np.zeros(3), 5), [2], [0.0]) == [np.inf]
    limit = _max_learning_rate(one_sample_a_direction([2.0, 0.0], 5), [5], [0.0])
    assert limit[0] == pytest.approx(1.0)


def test_single_sample_has_no_noise() -> None:
    limit = _max_learning_rate(one_sample_a_direction([2.0], 1), [1], [0.0])[0]
    assert limit == pytest.approx(1.0)
