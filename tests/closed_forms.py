"""Closed forms, against which the simulations are tested."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray

from optuna_ttp.spectrum import Spectrum


def mse_gradient_flow(
    spectrum: Spectrum, learning_rate: float, steps: ArrayLike
) -> NDArray[np.float64]:
    """Return the mean squared error of the linearised model under gradient flow.

    With ``dy = y - f_0`` and eigenpairs ``(lambda_k, v_k)`` of ``Theta``, of a loss that is the
    mean over ``N C`` squares:
    ``L_t = (|dy|^2 - sum_k (dy . v_k)^2 (1 - exp(-4 eta lambda_k t / (N C)))) / (N C)``. Equation
    5 of Zancato et al., NeurIPS 2020, whose loss is half the sum of squares instead of the mean.

    Args:
        spectrum:
            A spectrum with the loss ``"mse"``.
        learning_rate:
            The learning rate.
        steps:
            Steps, of shape ``(T,)``.

    Returns:
        Losses, of shape ``(T,)``.

    Raises:
        ValueError:
            If the loss is another one.
    """
    residual = _residual(spectrum)
    t = np.asarray(steps, dtype=np.float64)[:, None]
    left = np.exp(-2.0 * learning_rate * _curvatures(spectrum) * t)
    return _loss(spectrum, residual, left)


def mse_gradient_descent(
    spectrum: Spectrum,
    learning_rate: float,
    steps: ArrayLike,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
) -> NDArray[np.float64]:
    """Return the mean squared error of the linearised model under full-batch SGD with momentum.

    Each eigen-direction of curvature ``h = 2 lambda / (N C)`` is a linear recursion of its own in
    its distance ``x`` from the optimum and its velocity ``v``. Heavy ball with momentum ``m`` and
    dampening ``d``: ``v' = m v + (1 - d) h x``, ``x' = x - eta v'``; Nesterov's variant
    ``x' = x - eta (h x + m v')``. So ``x_t`` is the upper left entry of a power of a 2 x 2 matrix
    ``M``, whose eigenvalues for ``d = 0`` are the roots of ``z^2 - (1 + m - eta h) z + m = 0``,
    and ``L_t = (|dy|^2 - sum_k (dy . v_k)^2 (1 - x_t^2)) / (N C)`` with ``x_0 = 1``.

    Args:
        spectrum:
            A spectrum with the loss ``"mse"``.
        learning_rate:
            The learning rate.
        steps:
            Whole numbers, of shape ``(T,)``.
        momentum:
            In [0, 1). Zero by default.
        dampening:
            Zero by default. The first gradient is not dampened, as in PyTorch.
        nesterov:
            Off by default.

    Returns:
        Losses, of shape ``(T,)``.

    Raises:
        ValueError:
            If the loss is another one.
    """
    residual = _residual(spectrum)
    h = _curvatures(spectrum)
    gain = 1.0 - dampening if momentum else 1.0
    move = _transition(h, learning_rate, momentum, gain, nesterov)
    first = _transition(h, learning_rate, momentum, 1.0, nesterov)
    start = np.tile([[1.0], [0.0]], (len(h), 1, 1))
    distances = np.array(
        [
            start[:, 0, 0]
            if t == 0
            else (np.linalg.matrix_power(move, int(t) - 1) @ first @ start)[:, 0, 0]
            for t in np.asarray(steps)
        ]
    )
    return _loss(spectrum, residual, distances**2)


def _transition(
    h: NDArray[np.float64], rate: float, momentum: float, gain: float, nesterov: bool
) -> NDArray[np.float64]:
    """The matrices ``M`` of shape ``(r, 2, 2)`` that take ``(x, v)`` one step on."""
    velocity = np.stack([gain * h, np.full_like(h, momentum)], axis=1)
    ahead = momentum * velocity + np.stack([h, np.zeros_like(h)], axis=1)
    place = np.array([1.0, 0.0]) - rate * (ahead if nesterov else velocity)
    return np.stack([place, velocity], axis=1)


def _residual(spectrum: Spectrum) -> NDArray[np.float64]:
    if spectrum.loss.kind != "mse":
        raise ValueError(
            f"The closed form is that of the mean squared error but got {spectrum.loss.kind!r}."
        )
    return np.asarray((spectrum.targets - spectrum.initial_outputs).ravel(), dtype=np.float64)


def _curvatures(spectrum: Spectrum) -> NDArray[np.float64]:
    return 2.0 * spectrum.eigenvalues / spectrum.initial_outputs.size


def _loss(
    spectrum: Spectrum, residual: NDArray[np.float64], left: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Loss where the square of each projection is multiplied by ``left``, shape ``(T, r)``."""
    projections = (residual @ spectrum.eigenvectors.astype(np.float64)) ** 2
    fallen = (projections * (1.0 - left)).sum(axis=1)
    return np.asarray((residual @ residual - fallen) / residual.size)
