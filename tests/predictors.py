"""Predictors from arguments by name, wherever the predictor takes them."""

from __future__ import annotations

from dataclasses import fields
from dataclasses import replace
from typing import Any

import numpy as np

from optuna_ttp.dynamics import SGD
from optuna_ttp.prediction import Prediction
from optuna_ttp.prediction import PredictorSettings
from optuna_ttp.prediction import TrainingTimePredictor
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.spectrum import Throughput
from tests.cases import spectrum


def predictor_with(spectrum: Spectrum, **arguments: Any) -> TrainingTimePredictor:
    """A predictor; what its optimiser and its settings take may be among the arguments."""
    for name, kind in (("optimizer", SGD), ("settings", PredictorSettings)):
        names = [f.name for f in fields(kind) if f.name in arguments]
        if names:
            arguments[name] = kind(**{n: arguments.pop(n) for n in names})
    return TrainingTimePredictor(spectrum, **arguments)


def timed_spectrum() -> Spectrum:
    """The spectrum of a linear model, with a made-up throughput."""
    throughput = Throughput(np.array([1, 12]), np.array([0.001, 0.012]), device="cpu")
    return replace(spectrum(), throughput=throughput)


def linear_predictor(**arguments: Any) -> TrainingTimePredictor:
    """A predictor of a linear model; to 60 % of the initial loss unless a target is given."""
    if not any(k.startswith("target") for k in arguments):
        arguments["target_fraction"] = 0.6
    return predictor_with(timed_spectrum(), **arguments)


def assert_same(first: Prediction, second: Prediction) -> None:
    """Assert that two predictions are the same."""
    np.testing.assert_array_equal(first.steps, second.steps)
    np.testing.assert_array_equal(first.curve_losses, second.curve_losses)
    np.testing.assert_array_equal(first.outcomes, second.outcomes)
