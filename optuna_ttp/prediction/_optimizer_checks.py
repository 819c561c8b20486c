"""Checks of an optimiser against a spectrum, before anything is simulated."""

from __future__ import annotations

import numpy as np

from optuna_ttp.dynamics import Adam
from optuna_ttp.dynamics import check_coverage
from optuna_ttp.dynamics import Optimizer
from optuna_ttp.dynamics import SGD
from optuna_ttp.spectrum import Spectrum


def check_optimizer(optimizer: object, spectrum: Spectrum, method: str) -> None:
    """Raise TypeError or ValueError if training by this optimiser cannot be predicted."""
    if not isinstance(optimizer, SGD | Adam):
        raise TypeError(
            f"optimizer must be an optuna_ttp.SGD, Adam or AdamW but got {optimizer!r}. "
            "optuna_ttp.optimizer_from_torch(optimizer, model) reads one of PyTorch."
        )
    decays = [optimizer.weight_decay, *(g.weight_decay or 0.0 for g in optimizer.groups or ())]
    if any(decays) and spectrum.weight_outputs is None:
        raise ValueError(
            "weight_decay needs a spectrum that stores the weights' contribution to the "
            "outputs but got one that was computed by an older version. Compute it again."
        )
    if method != "linear":
        _check_equation(optimizer, method)
    if spectrum.decay_factors is not None and optimizer.max_grad_norm is not None:
        raise ValueError(
            "max_grad_norm needs the norm of the gradient, which a spectrum of a task with "
            "learning_rate_multipliers does not know. Leave the multipliers out of the task, and "
            "give the optimiser groups instead."
        )
    if optimizer.acts_on_single_weights:
        _check_columns(optimizer, spectrum)


def _check_equation(optimizer: Optimizer, method: str) -> None:
    """Raise ValueError if the paper's equation does not know what the optimiser does."""
    if not isinstance(optimizer, SGD):
        raise ValueError(
            f"The paper's equation is that of SGD: {type(optimizer).__name__} needs "
            f'method="linear" but got {method!r}.'
        )
    if optimizer.groups is not None or optimizer.max_grad_norm is not None:
        raise ValueError(
            "The paper's equation knows neither groups nor max_grad_norm: they need "
            f'method="linear" but got {method!r}.'
        )


def _check_columns(optimizer: Optimizer, spectrum: Spectrum) -> None:
    """Raise ValueError if the columns of a spectrum do not do for an optimiser."""
    what = "groups" if isinstance(optimizer, SGD) else type(optimizer).__name__
    jacobian = spectrum.jacobian
    if jacobian is None:
        raise ValueError(
            f"{what} acts on single weights and needs a spectrum with a sample of the Jacobian's "
            'columns but got one without. Compute it again with engine="columns".'
        )
    if spectrum.decay_factors is not None:
        raise ValueError(
            f"{what} does not go with learning_rate_multipliers of the task. Leave them out of "
            "the task, and give the optimiser groups instead."
        )
    if jacobian.n_columns < spectrum.n_outputs:
        raise ValueError(
            f"{what} needs at least as many columns as outputs, {spectrum.n_outputs}, but got "
            f"{jacobian.n_columns}. Compute the spectrum again with more columns."
        )
    check_coverage(optimizer.groups, jacobian.names)
    residual = spectrum.loss.residuals(spectrum.initial_outputs, spectrum.targets)
    if not np.any(residual.ravel() @ jacobian.codes.astype(np.float64, copy=False)):
        raise ValueError(
            "All gradients are zero at the pretrained weights, so that no step can be simulated. "
            "Is the last layer zero, or is every sample fitted already?"
        )
