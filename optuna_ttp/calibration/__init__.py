"""Corrections of predicted times, their uncertainty and trust in them, from observed loss curves.

The error of predicted times is mostly one function ``u`` of the depth, the logarithm of the
initial loss over the loss, that all configurations of a task share: the logarithm of a factor on
the kernel, on top of the growth that a prediction was simulated with. The rest depends a little on
the configuration. Both are learned together from the times at which observed trials first passed a
fixed set of loss levels.

Without momentum ``u`` divides the time between two levels by ``exp(u)``. Momentum first has to
build up: along the path of the linearised network, with ``tau`` the intrinsic time, ``l`` the lag
``m / (1 - m)`` and ``K`` the growth, the heavy ball is ``tau' = sqrt(K) v``,
``l v' = sqrt(K) - v``. By this equation simulated first passage times are converted to intrinsic
times with the growth of the simulation, and back to steps with the corrected growth.

The logarithms of the times are linearised about the current estimate (Gauss-Newton); the posterior
of ``u`` and of the configurations' effects is that of a Bayesian linear regression, in closed
form. ``u`` has a Gaussian-process prior whose slope is smooth, so that it is uncertain at depths
without observations. The scale of the errors is learned too (conjugate inverse gamma), which makes
predictive distributions Student's t.
"""

from __future__ import annotations

from optuna_ttp.calibration._calibrate import calibrate
from optuna_ttp.calibration._calibration import Calibration
from optuna_ttp.calibration._first_passages import covariates
from optuna_ttp.calibration._first_passages import SimulatedFirstPassages
from optuna_ttp.calibration._loss_curve import LossCurve
from optuna_ttp.calibration._loss_levels import DEPTHS
from optuna_ttp.calibration._loss_levels import FRACTIONS
from optuna_ttp.calibration._loss_levels import KNOTS
from optuna_ttp.calibration._loss_levels import N_COVARIATES
from optuna_ttp.calibration._observation import Observation
from optuna_ttp.calibration._prior import PriorScale
from optuna_ttp.calibration._rules import CalibrationRules
from optuna_ttp.calibration._rules import RULES
from optuna_ttp.calibration._uncertainty import displacement
from optuna_ttp.calibration._uncertainty import is_reliable
from optuna_ttp.calibration._uncertainty import kernel_mismatch
from optuna_ttp.calibration._uncertainty import linearisation_sd
from optuna_ttp.calibration._uncertainty import prior_scale
from optuna_ttp.calibration._uncertainty import probability_below
from optuna_ttp.calibration._uncertainty import stability_sd
from optuna_ttp.calibration._uncertainty import Z_90


__all__ = [
    "DEPTHS",
    "FRACTIONS",
    "KNOTS",
    "N_COVARIATES",
    "RULES",
    "Z_90",
    "Calibration",
    "CalibrationRules",
    "LossCurve",
    "Observation",
    "PriorScale",
    "SimulatedFirstPassages",
    "calibrate",
    "covariates",
    "displacement",
    "is_reliable",
    "kernel_mismatch",
    "linearisation_sd",
    "prior_scale",
    "probability_below",
    "stability_sd",
]
