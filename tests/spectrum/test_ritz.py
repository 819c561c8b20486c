"""Ritz pairs that stand for many eigenpairs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np

from optuna_ttp.spectrum._ritz import ritz_pairs


@given(
    n=st.integers(1, 30),
    n_pairs=st.integers(1, 5),
    seed=st.integers(0, 10**6),
    span=st.floats(0, 4),
)
@settings(max_examples=100)
def test_ritz_pairs_share_the_moments_of_the_residual(
    n: int, n_pairs: int, seed: int, span: float
) -> None:
    rng = np.random.default_rng(seed)
    eigenvalues = np.sort(10.0 ** rng.uniform(-span, 0, n))[::-1]
    residual = rng.normal(size=n)
    values, mixing = ritz_pairs(eigenvalues, residual, n_pairs)
    assert 1 <= len(values) <= min(n, n_pairs)
    assert (np.diff(values) <= 0).all()
    assert eigenvalues[-1] * (1 - 1e-9) <= values[-1]
    assert values[0] <= eigenvalues[0] * (1 + 1e-9)
    np.testing.assert_allclose(mixing.T @ mixing, np.eye(len(values)), atol=1e-9)
    # Gauss' quadrature with k abscissae is exact up to the power 2 k - 1.
    weights = np.square(residual @ mixing)
    for power in range(2 * len(values)):
        expected = residual**2 @ eigenvalues**power
        np.testing.assert_allclose(weights @ values**power, expected, rtol=1e-6)


def test_as_many_ritz_pairs_as_there_are_eigenvalues_lose_nothing() -> None:
    eigenvalues = np.repeat([4.0, 2.0, 0.5], [3, 5, 7])
    residual = np.random.default_rng(0).normal(size=15)
    values, mixing = ritz_pairs(eigenvalues, residual)
    np.testing.assert_allclose(values, [4.0, 2.0, 0.5])
    for time in (0.1, 1.0, 10.0):
        expected = residual**2 @ np.exp(-2 * eigenvalues * time)
        actual = np.square(residual @ mixing) @ np.exp(-2 * values * time)
        np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_what_the_residual_does_not_see_needs_no_pair() -> None:
    values, mixing = ritz_pairs(np.array([3.0, 1.0]), np.zeros(2))
    assert values.shape == (0,)
    assert mixing.shape == (2, 0)
    values, _ = ritz_pairs(np.array([3.0, 2.0, 1.0]), np.array([0.0, 1.0, 0.0]))
    np.testing.assert_allclose(values, [2.0])
