"""Eigenpairs of kernels, and kernels that have none."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
import torch

from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.ntk import eigenpairs
from optuna_ttp.task import FineTuningTask
from tests.models import mlp
from tests.models import vectors


def test_jacobian_of_zeros_is_refused() -> None:
    task = FineTuningTask(mlp(), vectors(), forward=lambda model, x: 0.0 * model(x))
    with pytest.raises(ValueError, match="Jacobian must not be zero"):
        compute_spectrum(task)


def test_kernel_that_overflows_is_refused() -> None:
    x, y = vectors()
    task = FineTuningTask(torch.nn.Linear(6, 3), (1e25 * x, y))
    with pytest.raises(ValueError, match="kernel must be finite but overflowed in float32"):
        compute_spectrum(task)
    assert compute_spectrum(task, dtype="float64", measure_speed=False).eigenvalues[0] > 1e50


@given(n=st.integers(1, 12), rank=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_eigenpairs_rebuild_the_matrix(n: int, rank: int, seed: int) -> None:
    root = np.random.default_rng(seed).normal(size=(n, min(rank, n)))
    gram = root @ root.T
    pairs = eigenpairs(gram)
    rebuilt = (pairs.eigenvectors * pairs.eigenvalues) @ pairs.eigenvectors.T
    np.testing.assert_allclose(rebuilt, gram, rtol=0, atol=1e-12 * pairs.eigenvalues[0])
    assert len(pairs.eigenvalues) <= min(rank, n)
    assert (np.diff(pairs.eigenvalues) <= 0).all()
    assert (pairs.eigenvalues > 0).all()
    np.testing.assert_allclose(
        pairs.eigenvectors.T @ pairs.eigenvectors, np.eye(len(pairs.eigenvalues)), atol=1e-12
    )
    assert pairs.trace == pytest.approx(np.trace(gram))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [8.0, 4.0, 2.0, 1.0, 1.0]),
        ({"rank": 2}, [8.0, 4.0]),
        ({"rank": 99}, [8.0, 4.0, 2.0, 1.0, 1.0]),
    ],
    ids=str,
)
def test_eigenpairs_are_truncated(settings: dict[str, Any], expected: list[float]) -> None:
    orthogonal = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    gram = (orthogonal * [1.0, 8.0, 2.0, 1.0, 4.0]) @ orthogonal.T
    pairs = eigenpairs(gram, **settings)
    np.testing.assert_allclose(pairs.eigenvalues, expected, rtol=1e-12)
    assert pairs.trace == pytest.approx(16.0)


def test_rounding_errors_of_single_precision_are_no_eigenpairs() -> None:
    root = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    assert len(eigenpairs(root @ root.T).eigenvalues) == 4


def test_iterative_solver_for_large_matrices_finds_the_same_pairs() -> None:
    generator = np.random.default_rng(0)
    root = generator.normal(size=(1600, 12)) * 0.7 ** np.arange(12)
    values, vectors = np.linalg.eigh(root.T @ root)
    pairs = eigenpairs(root @ root.T, rank=5)
    np.testing.assert_allclose(pairs.eigenvalues, values[::-1][:5], rtol=1e-9)
    expected = root @ vectors[:, ::-1][:, :5] / np.sqrt(values[::-1][:5])
    np.testing.assert_allclose(np.abs((expected * pairs.eigenvectors).sum(axis=0)), 1, rtol=1e-9)
    # Fewer pairs than asked for rise above the rounding errors.
    assert len(eigenpairs(root @ root.T, rank=30).eigenvalues) == 12


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_eigenpairs_of_a_matrix_that_is_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="kernel must be finite"):
        eigenpairs(np.diag([1.0, value]))
