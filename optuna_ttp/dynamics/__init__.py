"""Simulated training curves, computed from a spectrum and hyperparameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna_ttp._util.lazy import lazy_names


if TYPE_CHECKING:
    from optuna_ttp.dynamics._adam import Adam
    from optuna_ttp.dynamics._adam_configurations import AdamConfigurations
    from optuna_ttp.dynamics._adam_surface import AdamSurface
    from optuna_ttp.dynamics._adamw import AdamW
    from optuna_ttp.dynamics._from_torch import optimizer_from_torch
    from optuna_ttp.dynamics._growth import KernelGrowth
    from optuna_ttp.dynamics._heavy_ball import first_passage_time
    from optuna_ttp.dynamics._linearised_model import LinearisedModel
    from optuna_ttp.dynamics._natural_rate import natural_rate
    from optuna_ttp.dynamics._optimizer import Optimizer
    from optuna_ttp.dynamics._parameter_group import check_coverage
    from optuna_ttp.dynamics._parameter_group import ParameterGroup
    from optuna_ttp.dynamics._preconditioned_limit import PreconditionedLimit
    from optuna_ttp.dynamics._residual_path import PathFollower
    from optuna_ttp.dynamics._residual_path import ResidualPath
    from optuna_ttp.dynamics._residual_path import times_to
    from optuna_ttp.dynamics._sampling import Sampling
    from optuna_ttp.dynamics._saturation import Saturation
    from optuna_ttp.dynamics._schedule import Schedule
    from optuna_ttp.dynamics._scheduled_surface import ScheduledSurface
    from optuna_ttp.dynamics._sde import simulate_equation
    from optuna_ttp.dynamics._sgd import SGD
    from optuna_ttp.dynamics._sgd_configurations import SGDConfigurations
    from optuna_ttp.dynamics._sgd_surface import SGDSurface
    from optuna_ttp.dynamics._simulation import simulate
    from optuna_ttp.dynamics._smoothing import Smoothing
    from optuna_ttp.dynamics._stability import StabilityLimit
    from optuna_ttp.dynamics._subset import SampleConvergence
    from optuna_ttp.dynamics._surface import ResponseSurface
    from optuna_ttp.dynamics._target import Target
    from optuna_ttp.dynamics._trajectories import Trajectories


__all__ = [
    "SGD",
    "Adam",
    "AdamConfigurations",
    "AdamSurface",
    "AdamW",
    "KernelGrowth",
    "LinearisedModel",
    "Optimizer",
    "ParameterGroup",
    "PathFollower",
    "PreconditionedLimit",
    "ResidualPath",
    "ResponseSurface",
    "SGDConfigurations",
    "SGDSurface",
    "SampleConvergence",
    "Sampling",
    "Saturation",
    "Schedule",
    "ScheduledSurface",
    "Smoothing",
    "StabilityLimit",
    "Target",
    "Trajectories",
    "check_coverage",
    "first_passage_time",
    "natural_rate",
    "optimizer_from_torch",
    "simulate",
    "simulate_equation",
    "times_to",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_adam": ("Adam",),
        "_adam_configurations": ("AdamConfigurations",),
        "_adam_surface": ("AdamSurface",),
        "_adamw": ("AdamW",),
        "_from_torch": ("optimizer_from_torch",),
        "_growth": ("KernelGrowth",),
        "_heavy_ball": ("first_passage_time",),
        "_linearised_model": ("LinearisedModel",),
        "_natural_rate": ("natural_rate",),
        "_optimizer": ("Optimizer",),
        "_parameter_group": (
            "check_coverage",
            "ParameterGroup",
        ),
        "_preconditioned_limit": ("PreconditionedLimit",),
        "_residual_path": (
            "PathFollower",
            "ResidualPath",
            "times_to",
        ),
        "_schedule": ("Schedule",),
        "_scheduled_surface": ("ScheduledSurface",),
        "_sde": ("simulate_equation",),
        "_sgd": ("SGD",),
        "_sgd_configurations": ("SGDConfigurations",),
        "_sgd_surface": ("SGDSurface",),
        "_saturation": ("Saturation",),
        "_sampling": ("Sampling",),
        "_simulation": ("simulate",),
        "_smoothing": ("Smoothing",),
        "_stability": ("StabilityLimit",),
        "_subset": ("SampleConvergence",),
        "_surface": ("ResponseSurface",),
        "_target": ("Target",),
        "_trajectories": ("Trajectories",),
    },
)
