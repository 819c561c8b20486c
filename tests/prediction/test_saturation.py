"""Predictions where large steps were measured to move the outputs less far."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from optuna_ttp.dynamics import AdamW
from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.prediction import PredictorSettings
from optuna_ttp.prediction import TrainingTimePredictor
from optuna_ttp.spectrum import Saturation
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.task import FineTuningTask
from tests.cases import spectrum
from tests.columns import with_columns
from tests.models import mlp
from tests.models import separated
from tests.probes import quiet_predictor


def _saturated(ratio: float) -> Spectrum:
    """A spectrum of a linear network, as if steps of SGD with rates above 0.1 saturated."""
    none = np.zeros((0, 1))
    sizes, rates = np.array([12]), np.array([0.01, 0.1])
    ratios = np.array([[1.0, ratio]])
    saturation = Saturation(
        sizes, rates, ratios, np.ones((1, 2)), sizes[:0], np.array([1e-3]), none, none
    )
    return replace(spectrum(), saturation=saturation)


def _predictors(**settings: Any) -> list[TrainingTimePredictor]:
    """A predictor of a spectrum without saturation, and one with it."""
    return [
        quiet_predictor(_saturated(ratio), target_fraction=0.5, saturation=True, **settings)
        for ratio in (1.0, 0.4)
    ]


@pytest.mark.parametrize("exact", [False, True])
def test_large_steps_are_predicted_to_take_longer(exact: bool) -> None:
    plain, slowed = _predictors(exact=exact)
    for batch_size in (12, 4):
        before, after = (p.predict(0.1, batch_size).steps for p in (plain, slowed))
        assert after > 1.3 * before
    assert slowed.predict(1e-4, 12).steps == plain.predict(1e-4, 12).steps


def test_the_surface_is_slowed_too() -> None:
    rates = np.full(50, 0.1)
    before, after = (p.score(rates, np.full(50, 12), np.zeros(50)) for p in _predictors())
    assert (after > 1.3 * before).all()


def test_steps_of_sgd_are_slowed_if_asked_for() -> None:
    plain, _ = _predictors()
    usual = quiet_predictor(_saturated(0.4), target_fraction=0.5)
    assert usual.predict(0.1, 12).steps == plain.predict(0.1, 12).steps
    with pytest.raises(TypeError, match="saturation must be a bool but got"):
        quiet_predictor(spectrum(), target_fraction=0.5, saturation=1)
    with pytest.raises(ValueError, match='saturation belongs to method="linear"'):
        PredictorSettings(saturation=True, method="sde")
    without = replace(spectrum(), saturation=None)
    with pytest.raises(ValueError, match="needs a spectrum with its saturation"):
        quiet_predictor(without, target_fraction=0.5, saturation=True)


@pytest.mark.parametrize("wanted", [True, False])
def test_steps_of_adam_are_slowed_if_asked_for(wanted: bool) -> None:
    """The ratio of the learning rate is that of the steps."""
    x, y = separated(24)
    task = FineTuningTask(mlp().double(), (x.double(), y))
    columns = with_columns(compute_spectrum(task, dtype="float64", measure_speed=False), task)
    rates = np.array([1e-4, 1e-2])
    none = np.zeros((0, 2))
    no_size = np.zeros(0, dtype=np.int64)
    ratios = np.array([[1.0, 0.4]])
    saturation = Saturation(
        no_size, rates, none, none, np.array([12]), rates, ratios, np.ones((1, 2))
    )
    before, after = (
        quiet_predictor(
            replace(columns, saturation=one),
            target_fraction=0.5,
            optimizer=AdamW(),
            saturation=wanted,
        ).predict(1e-2, 12)
        for one in (replace(saturation, adam_ratios=np.ones((1, 2))), saturation)
    )
    if wanted:
        assert after.steps > 1.5 * before.steps
    else:
        assert after.steps == before.steps
