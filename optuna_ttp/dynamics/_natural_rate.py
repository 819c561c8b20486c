"""The learning rate at which one step of Adam would use up the loss at its first speed."""

from __future__ import annotations

from optuna_ttp.dynamics._linearised_model import LinearisedModel


def natural_rate(model: LinearisedModel) -> float:
    """Return the reducible loss over the sum of the absolute gradients, on a model of columns.

    The first full-batch step of Adam moves every weight by the learning rate against the sign of
    its gradient, so that the loss falls by the learning rate times ``sum_j |g_j|`` to first order.
    In units of this rate the times of different tasks are alike.
    """
    assert model.weights is not None
    gradient = model.gradient(model.features.new_zeros((1, model.rank)))
    fall = float(model.weights.without_rest(gradient).abs().sum())
    loss = float(model.loss(model.initial_outputs[None])) - model.loss_floor
    return loss / max(fall, 1e-30)
