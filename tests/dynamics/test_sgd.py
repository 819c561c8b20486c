from __future__ import annotations

from dataclasses import FrozenInstanceError
import math
from typing import Any

import numpy as np
import pytest

from optuna_ttp import SGD
from optuna_ttp import TrainingTimePredictor
from tests.models import small_spectrum


def _predictor(optimizer: SGD | None = None) -> TrainingTimePredictor:
    return TrainingTimePredictor(
        small_spectrum(), target_fraction=0.5, max_steps=200, optimizer=optimizer
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\) but got 1.0"),
        ({"momentum": -0.1}, r"momentum must be in \[0, 1\) but got -0.1"),
        ({"dampening": -0.1}, r"dampening must be in \[0, 1\) but got -0.1"),
        ({"dampening": 1.0}, r"dampening must be in \[0, 1\) but got 1.0"),
        ({"dampening": math.nan}, r"dampening must be in \[0, 1\) but got nan"),
        ({"dampening": 0.1, "nesterov": True}, "Nesterov momentum needs zero dampening"),
        ({"weight_decay": -1e-3}, "weight_decay must be finite and not negative but got -0.001"),
        ({"weight_decay": math.inf}, "weight_decay must be finite and not negative but got inf"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SGD(**arguments)


@pytest.mark.parametrize("name", ["momentum", "nesterov", "dampening", "weight_decay"])
def test_values_of_another_kind_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a (number|bool) but got 'much'"):
        SGD(**{name: "much"})  # type: ignore[arg-type]


def test_an_optimiser_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        SGD().nesterov = True  # type: ignore[misc]


def test_its_momentum_counts_where_none_is_given() -> None:
    plain, heavy = _predictor(), _predictor(SGD(0.9))
    for name in ("predict", "estimate"):
        without, given = (getattr(p, name)(0.002, 8) for p in (plain, heavy))
        assert (without.momentum, given.momentum) == (0.0, 0.9)
        assert given.steps == getattr(plain, name)(0.002, 8, 0.9).steps < without.steps
        assert getattr(heavy, name)(0.002, 8, 0.0).steps == without.steps
    assert heavy.score(0.002, 8) == plain.score(0.002, 8, 0.9)
    assert heavy.max_learning_rate(8) == plain.max_learning_rate(8, 0.9)
    np.testing.assert_array_equal(
        heavy.is_extrapolated([0.002, 0.1], 8), plain.is_extrapolated([0.002, 0.1], 8, 0.9)
    )


def test_anything_else_is_no_optimiser() -> None:
    with pytest.raises(TypeError, match="SGD, Adam or AdamW but got 'sgd'"):
        _predictor("sgd")  # type: ignore[arg-type]
