"""Warnings and uncertainty that the probe makes predictions have."""

from __future__ import annotations

from dataclasses import replace
import math
from typing import Any
import warnings

import numpy as np
import pytest
import torch

from optuna_ttp import UnreliablePredictionWarning
from optuna_ttp.calibration import displacement
from optuna_ttp.calibration import is_reliable
from optuna_ttp.calibration import linearisation_sd
from optuna_ttp.dynamics import KernelGrowth
from optuna_ttp.dynamics import Smoothing
from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.ntk import probe_linearisation
from optuna_ttp.prediction import PredictorSettings
from optuna_ttp.prediction import TrainingTimePredictor
from optuna_ttp.spectrum import Probe
from optuna_ttp.task import FineTuningTask
from tests.cases import linear_task
from tests.cases import spectrum
from tests.predictors import predictor_with
from tests.probes import made_up_probe
from tests.probes import probe_of
from tests.probes import probed_spectrum
from tests.probes import quiet_predictor


def test_predictor_takes_growth_from_the_probe_or_from_the_user() -> None:
    one = made_up_probe([0.0, 0.4, 0.8])
    probe = probe_of(one)
    growth = KernelGrowth.from_probe(
        probe.fractions, probe.relative_displacements, probe.kernel_ratios
    )
    configuration = ([0.05, 0.02], [12, 5], 0.5)
    arguments: list[dict[str, Any]] = [
        {},
        {"kernel_growth": "predicted"},
        {"kernel_growth": growth},
        {"kernel_growth": "frozen"},
    ]
    default, predicted, given, frozen = (
        quiet_predictor(one, target_fraction=0.5, **a).predict(*configuration) for a in arguments
    )
    np.testing.assert_array_equal(default.steps, predicted.steps)
    np.testing.assert_array_equal(default.curve_losses, given.curve_losses)
    unprobed = TrainingTimePredictor(replace(one, probe=None), target_fraction=0.5)
    np.testing.assert_array_equal(frozen.steps, unprobed.predict(*configuration).steps)
    # A kernel that grows is quicker.
    assert (default.steps < 0.95 * frozen.steps).all()


@pytest.mark.parametrize("method", ["sde", "ode"])
def test_papers_equation_knows_no_growth(method: Any) -> None:
    growth = KernelGrowth(np.array([1.0, 0.5]), np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match=r'kernel_growth belongs? to method="linear"'):
        TrainingTimePredictor(
            spectrum(),
            target_fraction=0.6,
            settings=PredictorSettings(method=method, kernel_growth=growth),
        )
    grown, frozen = (
        quiet_predictor(one, target_fraction=0.6, method=method).predict(0.05, 12)
        for one in (made_up_probe([0.0, 0.4, 0.8]), replace(spectrum(), probe=None))
    )
    assert grown.steps == frozen.steps


@pytest.mark.parametrize("growth", ["faster", None, 2.0], ids=str)
def test_bad_growth_is_refused(growth: Any) -> None:
    with pytest.raises(ValueError, match="kernel_growth must be one of predicted, frozen but"):
        TrainingTimePredictor(
            spectrum(), target_fraction=0.6, settings=PredictorSettings(kernel_growth=growth)
        )


@pytest.mark.parametrize(
    ("displacements", "target_fraction", "warned"),
    [
        ([0.0, 0.05, 0.1], 0.6, False),
        ([0.0, 0.05, 3.0], 0.6, True),
        ([0.0, 0.05, 3.0], 0.8, False),
        ([0.0, 0.0, 0.0, 5.0], 0.6, False),
        ([0.0, 0.0, 0.0, 5.0], 0.5, True),
        # Beyond the deepest point.
        ([0.0, 0.1], 0.3, False),
        ([0.0, 3.0], 0.3, True),
        ([0.0, math.inf, math.inf], 0.9, True),
    ],
    ids=str,
)
def test_warning_where_the_weights_have_to_go_far(
    displacements: list[float], target_fraction: float, warned: bool
) -> None:
    one = made_up_probe(displacements)
    arguments: dict[str, Any] = {"target_fraction": target_fraction}
    if warned:
        with pytest.warns(UnreliablePredictionWarning, match=f"^At {target_fraction:.0%} of the"):
            predictor = predictor_with(one, **arguments)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            predictor = predictor_with(one, **arguments)
    assert predictor.reliable != warned
    prediction = predictor.predict([0.05, 0.1], 12)
    assert prediction.reliable.tolist() == [not warned] * 2
    single = predictor.predict(0.1, 12)
    assert single.outcome == "converges"
    assert str(single).endswith("steps; unreliable") == warned


def test_warning_tells_depth_and_displacement() -> None:
    with pytest.warns(UnreliablePredictionWarning, match=r"At 40% of .* changes by 2\.9 times"):
        TrainingTimePredictor(made_up_probe([0.0, 0.1, 0.2, 2.9]), target_fraction=0.4)


@pytest.mark.parametrize("quantity", ["target_loss", "target_accuracy", "smoothed"])
@pytest.mark.parametrize("far", [0.0, 3.0])
def test_every_target_has_a_depth(quantity: str, far: float) -> None:
    arguments: dict[str, Any] = {quantity: 0.7}
    if quantity == "smoothed":
        arguments = {"target_loss": 0.7, "smoothing": Smoothing.exponential(0.9)}
    one = made_up_probe([0.0, far], [1.0, 0.95])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        predictor = predictor_with(one, **arguments)
    assert len(caught) == (far > 1.0)
    assert 0.3 < predictor.depth < 0.95
    if quantity != "target_accuracy":
        assert predictor.depth == pytest.approx(0.7 / predictor.initial_loss, rel=1e-6)


@pytest.mark.parametrize("far", [0.1, 9.0, math.inf])
def test_depth_of_an_epsilon_is_not_known(far: float) -> None:
    predictor = quiet_predictor(
        made_up_probe([0.0, far]), target_epsilon=0.1, kernel_growth="frozen", max_steps=200
    )
    assert math.isnan(predictor.depth)
    unprobed = TrainingTimePredictor(
        replace(spectrum(), probe=None), target_epsilon=0.1, max_steps=200
    )
    actual, expected = (p.predict(0.05, 12) for p in (predictor, unprobed))
    for name in ("steps", "steps_low", "steps_high", "reliable"):
        assert getattr(actual, name) == getattr(expected, name), name


def test_depth_means_the_same_to_the_probe_and_to_the_target_with_label_smoothing() -> None:
    """A target at the loss of the third point is as far as the third point, and no further."""
    one = probed_spectrum(linear_task(torch.nn.CrossEntropyLoss(label_smoothing=0.3)))
    fractions = probe_of(one).fractions
    assert len(fractions) >= 3
    far = np.array([0.0, 0.1, 0.2, *[4.0] * (len(fractions) - 3)])
    changed = replace(one, probe=Probe(fractions, far, 0 * far, (1 + far**2) ** 2))
    predictor = quiet_predictor(changed, target_fraction=float(fractions[2]))
    assert predictor.reliable


def test_displacement_is_interpolated_in_the_logarithm_of_the_depth() -> None:
    probe = probe_of(made_up_probe([0.0, 0.2, 0.1, 2.0]))
    for fraction, expected in ((1.0, 0.0), (2.0, 0.0), (0.8, 0.2), (0.6, 0.1), (0.4, 2.0)):
        assert displacement(probe, fraction) == pytest.approx(expected, abs=1e-12)
    assert displacement(probe, 0.01) == displacement(probe, 0.0) == 2.0
    halfway = math.exp(0.5 * (math.log(0.6) + math.log(0.4)))
    assert displacement(probe, halfway) == pytest.approx(1.05)
    assert math.isnan(displacement(None, 0.5))


def test_uncertainty_grows_with_what_the_predicted_growth_does_not_explain() -> None:
    kernel = (1 + 0.3**2) ** 2
    probes = [
        probe_of(made_up_probe([0.0, 0.3], ratios=[1.0, kernel * r]))
        for r in (1.0, 1 / 1.5, 2.9, 1 / 3.1, 20.0, math.inf)
    ]
    sds = [linearisation_sd(p, 0.8) for p in probes]
    assert sds == sorted(sds)
    assert sds[0] < sds[1]
    assert sds[-1] < 3
    assert [is_reliable(p, 0.8) for p in probes] == [True] * 3 + [False] * 3
    # A tenth of the way to it.
    assert is_reliable(probes[3], 0.98)
    for bad in (0.0, math.inf, math.nan):
        assert not is_reliable(probe_of(made_up_probe([0.0, 0.3], ratios=[1.0, bad])), 0.8)


def test_outputs_that_are_as_far_off_as_they_moved_are_marked() -> None:
    probes = [
        probe_of(made_up_probe([0.0, 0.3], deviations=[0.0, d]))
        for d in (0.0, 0.3, 0.9, 1.1, math.inf)
    ]
    assert [is_reliable(p, 0.8) for p in probes] == [True] * 3 + [False] * 2


def test_warning_names_the_difference_of_the_kernel() -> None:
    one = made_up_probe([0.0, 0.1], ratios=[1.0, 7.0 * 1.01**2])
    with pytest.warns(UnreliablePredictionWarning, match=r"predicted one by a factor of 7\."):
        predictor = TrainingTimePredictor(one, target_fraction=0.5)
    assert not predictor.reliable
    assert not predictor.predict(0.05, 12).reliable


def test_uncertainty_grows_with_the_displacement() -> None:
    sds = [
        linearisation_sd(probe_of(made_up_probe([0.0, d])), 0.5) for d in (0.0, 0.2, 1.0, 3.0, 1e9)
    ]
    assert sds[0] > 0
    assert sds == sorted(sds)
    assert sds[-1] < 3
    assert 3 > linearisation_sd(probe_of(made_up_probe([0.0, math.inf])), 0.5) >= sds[-1]
    assert linearisation_sd(None, 0.5) > sds[0]
    assert is_reliable(None, 0.1)


def test_task_without_loss_is_refused_by_the_predictor() -> None:
    model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
    task = FineTuningTask(model, (x, model(x).detach()), loss="mse")
    one = compute_spectrum(task, measure_speed=False, dtype="float64")
    exact = replace(one, initial_outputs=one.targets.astype(np.float64), probe=None)
    probed = probe_linearisation(task, exact, device=torch.device("cpu"))
    assert probed.probe is None
    targets: list[dict[str, Any]] = [
        {"target_fraction": 0.1},
        {"target_loss": 0.1},
        {"target_epsilon": 0.1},
    ]
    for target in targets:
        with pytest.raises(ValueError, match="nothing is left to train"):
            predictor_with(probed, **target)
