"""Predictors from arguments by name, wherever the predictor takes them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from optuna_ttp.dynamics import SGD
from optuna_ttp.prediction import PredictorSettings
from optuna_ttp.prediction import TrainingTimePredictor
from optuna_ttp.spectrum import Spectrum


def predictor_with(spectrum: Spectrum, **arguments: Any) -> TrainingTimePredictor:
    """A predictor; what its optimiser and its settings take may be among the arguments."""
    for name, kind in (("optimizer", SGD), ("settings", PredictorSettings)):
        names = [f.name for f in fields(kind) if f.name in arguments]
        if names:
            arguments[name] = kind(**{n: arguments.pop(n) for n in names})
    return TrainingTimePredictor(spectrum, **arguments)
