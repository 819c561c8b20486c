"""Closed forms, against which the simulations are tested."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray

from optuna_ttp.spectrum import Spectrum


def mse_gradient_descent(
    spectrum: Spectrum, learning_rate: float, steps: ArrayLike, *, continuous: bool = False
) -> NDArray[np.float64]:
    """Return the mean squared error of the linearised model under full-batch gradient descent.

    With ``dy = y - f_0`` and eigenpairs ``(lambda_k, v_k)`` of ``Theta``, each mode contracts by
    ``1 - 2 eta lambda_k / (N C)`` a step, because the loss is the mean over ``N C`` squares:
    ``L_t = (|dy|^2 - sum_k (dy . v_k)^2 (1 - (1 - 2 eta lambda_k / (N C))^(2 t))) / (N C)``. In
    continuous time ``exp(-4 eta lambda_k t / (N C))`` takes the power's place: equation 5 of
    Zancato et al., NeurIPS 2020, whose loss is half the sum of squares instead of the mean.

    Args:
        spectrum:
            A spectrum with the loss ``"mse"``.
        learning_rate:
            The learning rate.
        steps:
            Steps, of shape ``(T,)``.
        continuous:
            Gradient flow instead of gradient descent. Off by default.

    Returns:
        Losses, of shape ``(T,)``.

    Raises:
        ValueError:
            If the loss is another one.
    """
    if spectrum.loss.kind != "mse":
        raise ValueError(
            f"The closed form is that of the mean squared error but got {spectrum.loss.kind!r}."
        )
    residual = (spectrum.targets - spectrum.initial_outputs).ravel()
    projections = (residual @ spectrum.eigenvectors.astype(np.float64)) ** 2
    change = 2.0 * learning_rate * spectrum.eigenvalues / residual.size
    t = np.asarray(steps, dtype=np.float64)[:, None]
    left = np.exp(-2.0 * change * t) if continuous else ((1.0 - change) ** 2) ** t
    return np.asarray(
        (residual @ residual - (projections * (1.0 - left)).sum(axis=1)) / residual.size
    )
