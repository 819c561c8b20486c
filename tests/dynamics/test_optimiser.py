from __future__ import annotations

from dataclasses import replace
import math
from typing import Any

import numpy as np
import pytest
import torch

from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import Schedule
from optuna_ttp.dynamics import SGDConfigurations
from optuna_ttp.dynamics import simulate
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.task import Loss
from tests.cases import linear_task
from tests.cases import spectrum
from tests.dynamics.simulations import assert_follows
from tests.dynamics.simulations import double
from tests.dynamics.simulations import LOSSES
from tests.dynamics.simulations import OPTIMISERS
from tests.dynamics.simulations import simulated
from tests.dynamics.simulations import Torch
from tests.dynamics.simulations import train
from tests.predictors import predictor_with


# Ours, PyTorch's, and whether PyTorch's advances once an epoch.
SCHEDULES: dict[str, tuple[Schedule, Torch, bool]] = {
    "cosine": (
        Schedule.cosine(41),
        lambda sgd: torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 41),
        False,
    ),
    "an epoch": (
        Schedule.step(3, 0.5, every="epoch"),
        lambda sgd: torch.optim.lr_scheduler.StepLR(sgd, 3, 0.5),
        True,
    ),
    "one cycle": (
        Schedule.one_cycle(41),
        lambda sgd: torch.optim.lr_scheduler.OneCycleLR(sgd, 0.02, total_steps=41),
        False,
    ),
    "function": (
        Schedule.of(lambda t: 1.0 / (1.0 + 0.1 * t)),
        lambda sgd: torch.optim.lr_scheduler.LambdaLR(sgd, lambda t: 1.0 / (1.0 + 0.1 * t)),
        False,
    ),
}


def _linear(loss: str = "cross_entropy") -> Spectrum:
    """Of a linear model, without a probe: nothing is guessed of how its kernel grows."""
    return replace(spectrum(loss), probe=None)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize(
    ("batch_size", "sampling"), [(5, "shuffle"), (5, "replacement"), (12, "shuffle")]
)
def test_simulation_follows_every_step_of_torch_sgd(
    batch_size: int, sampling: str, optimiser: str, loss: str
) -> None:
    task = linear_task(LOSSES[loss])
    assert all(bool((p != 0).all()) for p in task.model.parameters())
    options = OPTIMISERS[optimiser]
    losses = train(task, LOSSES[loss], batch_size, sampling=sampling, **options)
    curves = simulated(double(spectrum(LOSSES[loss])), batch_size, sampling=sampling, **options)
    assert_follows(curves, losses, 1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimiser", ["dampening", "nesterov and weight decay"])
@pytest.mark.parametrize("batch_size", [5, 12])
def test_simulation_with_a_schedule_follows_every_step_of_torch_sgd(
    batch_size: int, optimiser: str, schedule: str
) -> None:
    ours, theirs, every_epoch = SCHEDULES[schedule]
    options = OPTIMISERS[optimiser]
    loss = LOSSES["weighted and smoothed"]
    losses = train(
        linear_task(loss), loss, batch_size, scheduler=theirs, every_epoch=every_epoch, **options
    )
    constant = train(linear_task(loss), loss, batch_size, **options)
    assert not np.allclose(losses, constant, rtol=1e-3)
    curves = simulated(double(spectrum(loss)), batch_size, schedule=ours, **options)
    assert_follows(curves, losses, 1e-8)


def test_dampening_counts_where_only_the_schedule_brings_momentum() -> None:
    ours, theirs, _ = SCHEDULES["one cycle"]
    loss = LOSSES["cross-entropy"]
    options: dict[str, Any] = {"momentum": 0.0, "dampening": 0.5}
    losses = train(linear_task(loss), loss, 5, scheduler=theirs, **options)
    assert_follows(simulated(double(spectrum()), 5, schedule=ours, **options), losses, 1e-8)


def test_batches_with_replacement_may_be_as_large_as_the_data() -> None:
    loss = LOSSES["cross-entropy"]
    losses = train(linear_task(loss), loss, 12, sampling="replacement")
    assert_follows(simulated(double(spectrum()), 12, sampling="replacement"), losses, 1e-8)
    assert not np.allclose(losses, train(linear_task(loss), loss, 12), rtol=1e-3)


def test_optimisers_simulated_together_equal_each_alone() -> None:
    model = double(spectrum())
    settings: dict[str, Any] = {
        "learning_rate": [0.02, 0.05, 0.03, 0.04],
        "momentum": [0.9, 0.5, 0.0, 0.9],
        "dampening": [0.3, 0.0, 0.3, 0.0],
        "nesterov": [False, True, False, True],
        "weight_decay": [0.0, 0.2, 0.1, 0.0],
    }
    batch_sizes, steps = np.array([5, 5, 5, 12]), np.array([30, 60, 20, 45])
    together = simulate(model, SGDConfigurations.of(**settings), batch_sizes, max_steps=steps)
    for k in range(4):
        alone = simulate(
            model,
            SGDConfigurations.of(**{name: values[k] for name, values in settings.items()}),
            batch_sizes[k : k + 1],
            max_steps=steps[k : k + 1],
        )
        n = alone.steps.shape[1]
        np.testing.assert_allclose(
            together.curves["loss"][k, :n], alone.curves["loss"][0], rtol=1e-12
        )


def test_weight_decay_needs_to_know_where_it_pulls_from() -> None:
    model = double(spectrum())
    unknown = LinearisedModel(
        model.features,
        model.initial_outputs,
        model.soft_targets,
        model.normalisers,
        model.labels,
        model.kind,
    )
    with pytest.raises(ValueError, match="Weight decay needs a model that knows its pull"):
        simulated(unknown, 5, weight_decay=0.1)
    simulated(unknown, 5, weight_decay=0.0)


@pytest.mark.parametrize("optimiser", ["dampening", "nesterov", "momentum and weight decay"])
def test_predicted_steps_are_those_of_real_training(optimiser: str) -> None:
    options = dict(OPTIMISERS[optimiser])
    losses = train(linear_task(), LOSSES["cross-entropy"], 12, 200, **options)
    settings = {k: v for k, v in options.items() if k != "momentum"}
    predictor = predictor_with(_linear(), target_fraction=0.7, exact=True, **settings)
    expected = int(np.argmax(losses <= 0.7 * losses[0]))
    assert expected > 5
    assert predictor.predict(0.02, 12, options["momentum"]).steps == expected


def test_loss_of_the_reference_is_that_of_the_task() -> None:
    for loss in LOSSES.values():
        kind = Loss.from_user(loss)
        assert linear_task(loss).loss == kind
        losses = train(linear_task(loss), loss, 12, 0)
        model = double(spectrum(loss))
        assert losses[0] == pytest.approx(float(model.loss(model.initial_outputs[None])))


# Bad settings of the predictor


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dampening": -0.1}, r"dampening must be in \[0, 1\) but got -0.1"),
        ({"dampening": 1.0}, r"dampening must be in \[0, 1\) but got 1.0"),
        ({"dampening": math.nan}, r"dampening must be in \[0, 1\) but got nan"),
        ({"dampening": 0.1, "nesterov": True}, "Nesterov momentum needs zero dampening"),
        ({"weight_decay": -1e-3}, "weight_decay must be finite and not negative but got -0.001"),
        ({"weight_decay": math.nan}, "weight_decay must be finite and not negative but got nan"),
        ({"weight_decay": math.inf}, "weight_decay must be finite and not negative but got inf"),
        ({"sampling": "bootstrap"}, "sampling must be one of shuffle, replacement but got"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictor_with(_linear(), target_fraction=0.5, **arguments)
