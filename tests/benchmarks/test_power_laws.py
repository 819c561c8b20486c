from __future__ import annotations

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
from numpy.typing import NDArray
import pytest

from benchmarks.accuracy.power_laws import power_law_modes


def _modes(rank: int, slope: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    k = np.arange(1, rank + 1, dtype=np.float64)
    return 7.0 * k**-slope, k**-1.5


@given(
    rank=st.integers(4, 300),
    slope=st.floats(0.3, 3),
    n_samples=st.integers(1, 500),
    multiple=st.integers(1, 5),
)
@settings(max_examples=50)
def test_power_law_of_eigenvalues_is_continued(
    rank: int, slope: float, n_samples: int, multiple: int
) -> None:
    values, projections = _modes(rank, slope)
    total = multiple * n_samples
    more, shares = power_law_modes(
        values * n_samples,
        projections,
        float(projections.sum()) * 1.2,
        n_samples,
        total,
        alpha=0.0,
    )
    k = np.arange(1, rank * multiple + 1)
    assert len(more) == len(shares) == rank * multiple
    np.testing.assert_allclose(more, 7.0 * k**-slope * total, rtol=1e-6)
    # All of the residual, the part that the subset's modes do not hold included.
    assert shares.sum() == pytest.approx(projections.sum() * 1.2 * multiple, rel=1e-6) or (
        # Nothing follows that could hold it.
        rank <= 100 and multiple == 1
    )


def test_modes_of_the_same_samples_are_themselves() -> None:
    values, projections = _modes(60, 1.3)
    more, shares = power_law_modes(values, projections, float(projections.sum()), 20, 20)
    np.testing.assert_allclose(more, values, rtol=1e-9)
    np.testing.assert_allclose(shares, projections, rtol=1e-9)


def test_eigenvalues_of_more_samples_fall_more_steeply() -> None:
    values, projections = _modes(60, 1.3)
    more, _ = power_law_modes(values, projections, 10.0, 20, 80, alpha=0.2)
    k = np.arange(1, 241)
    # s + alpha (1 - N_0 / N), of eigenvalues over the number of samples.
    np.testing.assert_allclose(more / 80, values[0] / 20 * k ** -(1.3 + 0.2 * 0.75), rtol=1e-9)


def test_projections_are_kept_and_continued_without_a_jump() -> None:
    values, projections = _modes(150, 1.3)
    squared_norm = float(np.sum(np.arange(1, 601.0) ** -1.5))
    more, shares = power_law_modes(values, projections, squared_norm, 20, 80, n_measured=100)
    assert len(more) == len(shares) == 600
    np.testing.assert_allclose(shares[:100], 4 * projections[:100])
    assert shares.sum() == pytest.approx(4 * squared_norm)
    assert (np.diff(shares[100:]) <= 0).all()
    assert shares[100] == pytest.approx(shares[99], rel=0.25)
    assert (np.diff(more) <= 0).all()


def test_modes_that_hold_everything_have_nothing_to_continue() -> None:
    values, projections = _modes(20, 1.3)
    more, shares = power_law_modes(values, projections, float(projections.sum()), 20, 80)
    assert len(more) == len(shares) == 80
    assert shares.sum() == pytest.approx(4 * projections.sum())
