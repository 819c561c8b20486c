"""How the loss falls: a spectrum and hyperparameters in, trajectories out.

Knows neither Optuna nor databases.
"""

from __future__ import annotations

from optuna_ttp.dynamics._closed_form import mse_gradient_descent
from optuna_ttp.dynamics._heavy_ball import simulate_heavy_ball
from optuna_ttp.dynamics._heavy_ball import Trajectories
from optuna_ttp.dynamics._linearised_model import LinearisedModel
from optuna_ttp.dynamics._stability import max_learning_rate
from optuna_ttp.dynamics._surface import ResponseSurface
from optuna_ttp.dynamics._target import Target


__all__ = [
    "LinearisedModel",
    "ResponseSurface",
    "Target",
    "Trajectories",
    "max_learning_rate",
    "mse_gradient_descent",
    "simulate_heavy_ball",
]
