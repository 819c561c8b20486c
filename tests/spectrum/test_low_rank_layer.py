"""Layers with low-rank adapters in a spectrum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
import pytest

from optuna_ttp import Spectrum
from optuna_ttp.spectrum import LowRankLayer
from optuna_ttp.spectrum import SampledJacobian
from tests.models import small_spectrum


def _layer(n_samples: int, n_outputs: int, *, validated: bool = False) -> LowRankLayer:
    rng = np.random.default_rng(0)

    def half(*shape: int) -> NDArray[np.float16]:
        return rng.uniform(-1.0, 1.0, shape).astype(np.float16)

    return LowRankLayer(
        inputs=half(n_samples, 4, 6),
        cotangents=half(n_samples, n_outputs, 4, 5),
        scales=np.array([2.0, 0.1]),
        first=rng.standard_normal((2, 6)).astype(np.float32),
        second=np.zeros((5, 2), dtype=np.float32),
        parameters=np.array([1, 2]),
        validation_inputs=half(3, 7, 6) if validated else None,
        validation_cotangents=half(3, n_outputs, 7, 5) if validated else None,
    )


def _sampled(n_rows: int) -> SampledJacobian:
    return SampledJacobian(
        codes=np.ones((n_rows, 1)),
        scales=np.ones(1, np.float32),
        inflation=np.ones(1),
        weights=np.ones(1),
        parameters=np.zeros(1, dtype=np.int64),
        positions=np.zeros(1, dtype=np.int64),
        names=("head.bias", "lora_A", "lora_B"),
        n_weights=np.array([1, 12, 10]),
    )


@pytest.mark.parametrize("n_layers", [0, 1, 12])
def test_layers_are_read_back_as_they_were_written(n_layers: int) -> None:
    one = small_spectrum()
    shape = one.n_samples, one.n_outputs
    layers = [
        replace(_layer(*shape, validated=k % 2 == 0), scales=np.array([k + 1.0, 1.0]))
        for k in range(n_layers)
    ]
    whole = replace(one, jacobian=_sampled(shape[0] * shape[1]), low_rank=tuple(layers))
    again = Spectrum.from_bytes(whole.truncate(rank=3).to_bytes())
    assert len(again.low_rank) == n_layers
    for layer, other in zip(layers, again.low_rank, strict=True):
        for name, value in vars(layer).items():
            np.testing.assert_array_equal(getattr(other, name), value)
            if value is not None:
                assert getattr(other, name).dtype == value.dtype


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("inputs", np.ones((9, 24)), r"shapes \(r, k\), \(o, r\) and \(N, S, k\) but got"),
        ("inputs", np.ones((9, 4, 7)), r"inputs must have shape \(9, 4, 6\) but got \(9, 4, 7\)"),
        ("cotangents", np.ones((9, 3, 5, 5)), r"cotangents must have shape \(9, 3, 4, 5\)"),
        ("second", np.ones((5, 3)), r"second must have shape \(5, 2\)"),
        ("scales", np.array([1.0, 0.0]), r"scales must be positive but got \[1.0, 0.0\]"),
        ("parameters", np.array([1]), r"parameters must have shape \(2,\)"),
        ("first", np.full((2, 6), np.nan), "first must be finite"),
        ("validation_inputs", np.ones((3, 7, 6)), "must be given together"),
    ],
    ids=str,
)
def test_arrays_that_do_not_fit_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(_layer(9, 3), **{field: value})


def test_validation_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"validation_cotangents must have shape \(3, 3, 7, 5\)"):
        replace(_layer(9, 3, validated=True), validation_cotangents=np.ones((3, 3, 6, 5)))


def test_layers_of_other_samples_or_parameters_are_refused() -> None:
    one = small_spectrum()
    n, c = one.n_samples, one.n_outputs
    one = replace(one, jacobian=_sampled(n * c))
    with pytest.raises(
        ValueError, match=rf"shape \({n}, {c}, S, o\) but got \({n + 1}, {c}, 4, 5"
    ):
        replace(one, low_rank=(_layer(n + 1, c),))
    with pytest.raises(ValueError, match=r"indices of the 3 names but got \[1, 3\]"):
        replace(one, low_rank=(replace(_layer(n, c), parameters=np.array([1, 3])),))
    with pytest.raises(ValueError, match="need columns of the other weights"):
        replace(one, jacobian=None, low_rank=(_layer(n, c),))
