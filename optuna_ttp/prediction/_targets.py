"""The target of a predictor from the user's argument."""

from __future__ import annotations

import math
from typing import Literal
from typing import TYPE_CHECKING

from optuna_ttp._util.checks import check_number
from optuna_ttp.dynamics import Target


if TYPE_CHECKING:
    from optuna_ttp.dynamics import LinearisedModel
    from optuna_ttp.prediction._settings import PredictorSettings


_TrainingLoss = Literal["loss", "smoothed_loss"]


def resolve_target(
    arguments: dict[str, float | None], model: LinearisedModel, settings: PredictorSettings
) -> Target:
    """Return the target for the one argument, by name, that is not None.

    Raise TypeError if it is not a number, and ValueError if not exactly one argument is given or
    it is out of its range for this model and these settings.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"Exactly one of {', '.join(arguments)} must be given but got {len(given)}."
        )
    name, value = next(iter(given.items()))
    check_number(name, value)
    initial = float(model.loss(model.initial_outputs[None]))
    if not initial > 0.0:
        raise ValueError(
            "The initial training loss must be positive but got 0: nothing is left to train. "
            "Do data and loss fit the model?"
        )
    quantity: _TrainingLoss = "loss" if settings.smoothing is None else "smoothed_loss"
    if name == "target_epsilon":
        if not 0.0 < value < 1.0:
            raise ValueError(f"target_epsilon must be in (0, 1) but got {value}.")
        return Target(quantity, value, True)
    if "validation" in name and settings.method != "linear":
        raise ValueError(f'{name} belongs to method="linear" but got {settings.method!r}.')
    if "validation" in name and model.validation is None:
        raise ValueError(
            f"{name} needs validation data: FineTuningTask(..., validation_data=...) before "
            "the spectrum is computed, but got a spectrum without."
        )
    if name.endswith("accuracy"):
        return _accuracy_target(name, value, model)
    if name == "target_fraction":
        if not 0.0 < value < 1.0:
            raise ValueError(f"target_fraction must be in (0, 1) but got {value}.")
        value *= initial
    return _loss_target(name, float(value), model, quantity)


def _loss_target(
    name: str, loss: float, model: LinearisedModel, quantity: _TrainingLoss
) -> Target:
    """Return a loss target; ValueError if not below the initial and above the lowest loss."""
    kind, watched = _watched(name, model)
    initial = float(watched.loss(watched.initial_outputs[None]))
    if not (math.isfinite(loss) and loss > 0.0):
        raise ValueError(f"{name} must be positive and finite but got {loss}.")
    if loss >= initial:
        raise ValueError(
            f"{name} must be below the initial {kind} loss {initial:.4g} but got "
            f"{loss}: no step would be needed."
        )
    if loss <= watched.loss_floor * (1 + 1e-6):
        raise ValueError(
            f"The target loss must be above {watched.loss_floor:.4g}, the lowest that label "
            f"smoothing and class weights leave possible, but got {loss:.4g}."
        )
    if kind == "validation":
        return Target("validation_loss", loss)
    return Target(quantity, loss)


def _accuracy_target(name: str, accuracy: float, model: LinearisedModel) -> Target:
    """Return an accuracy target; ValueError if it is not above the initial accuracy, at most 1."""
    kind, watched = _watched(name, model)
    if not 0.0 < accuracy <= 1.0:
        raise ValueError(f"{name} must be in (0, 1] but got {accuracy}.")
    if watched.labels is None:
        raise ValueError(f"{name} needs classes but the model has one real output.")
    initial = float(watched.accuracy(watched.initial_outputs[None]))
    if accuracy <= initial:
        raise ValueError(
            f"{name} must be above the initial {kind} accuracy {initial:.4g} but "
            f"got {accuracy}: no step would be needed."
        )
    return Target("accuracy" if kind == "training" else "validation_accuracy", float(accuracy))


def _watched(name: str, model: LinearisedModel) -> tuple[str, LinearisedModel]:
    """Return "training" or "validation", which the target's name refers to, and its model."""
    kind = "validation" if "validation" in name else "training"
    watched = model.validation if kind == "validation" else model
    assert watched is not None
    return kind, watched
