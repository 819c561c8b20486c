"""Spectra with a probe that was measured, or is made up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
import warnings

import numpy as np

from optuna_ttp import UnreliablePredictionWarning
from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.prediction import TrainingTimePredictor
from optuna_ttp.spectrum import Probe
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.task import FineTuningTask
from tests.cases import spectrum
from tests.predictors import predictor_with


def probed_spectrum(task: FineTuningTask, **settings: Any) -> Spectrum:
    return compute_spectrum(task, dtype="float64", measure_speed=False, device="cpu", **settings)


def probe_of(one: Spectrum) -> Probe:
    assert one.probe is not None
    return one.probe


def quiet_predictor(one: Spectrum, **arguments: Any) -> TrainingTimePredictor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliablePredictionWarning)
        return predictor_with(one, **arguments)


def made_up_probe(
    displacements: list[float],
    fractions: list[float] | None = None,
    one: Spectrum | None = None,
    ratios: list[float] | None = None,
    deviations: list[float] | None = None,
) -> Spectrum:
    """A spectrum whose weights have to go so far to some depths."""
    depths = np.array(fractions or [1.0, 0.8, 0.6, 0.4, 0.2][: len(displacements)])
    far = np.array(displacements)
    kernel = (1 + far**2) ** 2 if ratios is None else np.array(ratios)
    away = np.zeros(len(far)) if deviations is None else np.array(deviations)
    return replace(one or spectrum(), probe=Probe(depths, far, away, kernel))
