"""What arrays of saturation are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from optuna_ttp.spectrum import Saturation


def _saturation(**changes: Any) -> Saturation:
    arrays = {
        "sgd_batch_sizes": np.array([16, 32]),
        "sgd_rates": np.array([0.1, 0.2, 0.4]),
        "sgd_ratios": np.full((2, 3), 0.9),
        "sgd_cosines": np.ones((2, 3)),
        "adam_batch_sizes": np.zeros(0, dtype=np.int64),
        "adam_rates": np.array([1e-4, 1e-3]),
        "adam_ratios": np.zeros((0, 2)),
        "adam_cosines": np.zeros((0, 2)),
    }
    return Saturation(**{**arrays, **changes})


def test_an_optimiser_may_have_no_direction() -> None:
    assert _saturation().adam_ratios.shape == (0, 2)
    assert _saturation().reason == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sgd_batch_sizes": np.array([0, 32])}, "sgd_batch_sizes must be at least one but got"),
        ({"sgd_rates": np.array([0.1, 0.1, 0.4])}, "sgd_rates must be positive and ascending"),
        ({"adam_rates": np.array([0.0, 0.1])}, "adam_rates must be positive and ascending"),
        ({"adam_rates": np.array([np.nan, 0.1])}, "adam_rates must be positive and ascending"),
        ({"sgd_ratios": np.ones((3, 2))}, r"sgd_ratios must have shape \(2, 3\) but got \(3, 2\)"),
        ({"adam_cosines": np.ones(2)}, r"adam_cosines must have shape \(0, 2\) but got \(2,\)"),
        ({"sgd_ratios": np.full((2, 3), np.nan)}, "sgd_ratios must be finite"),
        ({"sgd_cosines": np.full((2, 3), np.inf)}, "sgd_cosines must be finite"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _saturation(**changes)
