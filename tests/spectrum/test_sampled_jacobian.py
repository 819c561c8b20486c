"""Tests of the sample of columns that a spectrum may hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from optuna_ttp import Spectrum
from optuna_ttp.spectrum import SampledJacobian
from tests.models import small_spectrum


def _sampled(n_rows: int, width: int = 5, n_validation: int = 0) -> SampledJacobian:
    rng = np.random.default_rng(0)
    columns = rng.standard_normal((n_rows + n_validation, width))
    scales = np.abs(columns[:n_rows]).max(axis=0).astype(np.float32)
    codes = (columns / scales).astype(np.float16)
    return SampledJacobian(
        codes=codes[:n_rows],
        scales=scales,
        inflation=1.0 + rng.random(width),
        weights=rng.standard_normal(width),
        parameters=np.array([0, 0, 1, 1, 1])[:width],
        positions=np.arange(width),
        names=("a", "b"),
        n_weights=np.array([10, 20]),
        validation=codes[n_rows:] if n_validation else None,
    )


def test_columns_are_codes_times_scales() -> None:
    sampled = _sampled(6, n_validation=4)
    assert sampled.columns.dtype == np.float32
    expected = sampled.codes.astype(np.float64) * sampled.scales
    np.testing.assert_allclose(sampled.columns, expected, rtol=1e-6)
    assert sampled.validation_columns is not None
    assert sampled.validation_columns.shape == (4, 5)


def test_spectrum_with_columns_is_read_back_as_it_was_written() -> None:
    spectrum = small_spectrum()
    n_rows = spectrum.n_samples * spectrum.n_outputs
    spectrum = replace(spectrum, jacobian=_sampled(n_rows, n_validation=3))
    again = Spectrum.from_bytes(spectrum.to_bytes())
    assert again.jacobian is not None
    assert spectrum.jacobian is not None
    for name, value in vars(spectrum.jacobian).items():
        np.testing.assert_array_equal(getattr(again.jacobian, name), value)
    assert again.jacobian.codes.dtype == np.float16
    without = replace(spectrum, jacobian=None)
    assert Spectrum.from_bytes(without.to_bytes()).jacobian is None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("scales", np.ones(4, np.float32), r"scales must have shape \(5,\)"),
        ("inflation", np.full(5, 0.5), "inflation must be at least one but got 0.5"),
        ("weights", np.array([1.0, np.nan, 1.0, 1.0, 1.0]), "weights must be finite"),
        ("parameters", np.array([0, 0, 0, 0, 2]), "indices of the 2 names"),
        ("n_weights", np.array([10]), r"n_weights must have shape \(2,\)"),
        ("validation", np.ones((3, 4)), "validation must have shape"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(_sampled(6), **{field: value})


def test_spectrum_refuses_columns_of_other_samples() -> None:
    with pytest.raises(ValueError, match=r"jacobian\.codes"):
        replace(small_spectrum(), jacobian=_sampled(3))


def test_a_thinned_sample_is_unbiased_and_picks_large_columns() -> None:
    sampled = _sampled(6, width=5, n_validation=4)
    wanted = (sampled.columns * sampled.inflation).sum(axis=1)
    sums, counts = [], []
    for seed in range(600):
        thin = sampled.thinned(3, np.random.default_rng(seed))
        assert (thin.inflation >= 1.0).all()
        assert thin.validation is not None
        assert thin.validation.shape == (4, thin.n_columns)
        sums.append((thin.columns * thin.inflation).sum(axis=1))
        counts.append(thin.n_columns)
    error = np.std(sums, axis=0) / np.sqrt(600.0)
    assert (np.abs(np.mean(sums, axis=0) - wanted) < 4.5 * error).all()
    assert np.mean(counts) == pytest.approx(3.0, abs=0.2)
    assert sampled.thinned(5, np.random.default_rng(0)) is sampled


def test_columns_that_are_certain_are_all_picked() -> None:
    sampled = _sampled(6, width=5)
    large = replace(sampled, scales=sampled.scales * np.array([1e6, 1, 1, 1, 1], np.float32))
    for seed in range(20):
        thin = large.thinned(3, np.random.default_rng(seed))
        assert thin.weights[0] == large.weights[0]
        assert thin.inflation[0] == large.inflation[0]
