"""The residual of a linearised network during training, on a subspace of its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_ttp.task import output_gradients


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


@dataclass(frozen=True)
class PathRules:
    """The steps in which gradient flow is integrated, and where its residual is recorded."""

    growth: float = 0.1
    """The length of a step over one plus the time so far."""
    max_steps: int = 170
    """Largest number of steps; 170 of them span seven decades of time."""
    fractions: tuple[float, ...] = (0.5, 0.25, 0.1)
    """Shares of the initial reducible loss at which the residual is recorded."""


RULES = PathRules()


@dataclass(frozen=True, eq=False)
class ResidualPath:
    """The loss and the residual along a path of gradient flow that starts at time zero.

    Attributes:
        times:
            Ascending from zero, in units of the time constant of the fastest mode, ``(T,)``.
        left:
            Share of the reducible loss (that above the lowest possible one) at these times,
            starting at 1, shape ``(T,)``.
        residuals:
            Unit vectors, ``(N C, s)``: the gradient of the loss by the outputs at the start and
            once half, a quarter and a tenth of the reducible loss is left, or else at the end of
            the path. ``s`` is zero if there is nothing to learn.
    """

    times: NDArray[np.float64]
    left: NDArray[np.float64]
    residuals: torch.Tensor

    def time_difference(self, other: ResidualPath) -> float:
        """Return the largest relative difference of the times (:func:`times_to`) of two paths."""
        times = times_to([self, other])
        return float((np.abs(times[0] - times[1]) / times.min(axis=0)).max(initial=0.0))


class PathFollower:
    """Trains a task's linearised network by gradient flow on approximations of its kernel.

    Training starts at the outputs of the pretrained model, of shape ``(N, C)``.
    """

    def __init__(self, task: FineTuningTask, initial_outputs: NDArray[np.float64]) -> None:
        q, n = task.loss.soft_targets(task.targets, task.n_outputs)
        self._kind = task.loss.kind
        self._outputs = torch.as_tensor(initial_outputs, dtype=torch.float64)
        self._targets, self._normalisers = torch.as_tensor(q), torch.as_tensor(n)
        self._unit: float | None = None
        # The largest eigenvalue that the Hessian of a sample's loss by its outputs can have.
        largest = 2.0 / task.n_outputs if self._kind == "mse" else 0.5 * float(q.sum(axis=1).max())
        self._curvature = largest / max(float(n.sum()), 1e-30)
        entropy = -torch.xlogy(
            self._targets,
            self._targets / self._targets.sum(dim=1, keepdim=True).clamp(min=1e-300),
        ).sum()
        self._floor = 0.0 if self._kind == "mse" else float(entropy)

    @property
    def residual(self) -> torch.Tensor:
        """The gradient of the loss by the outputs at the initial outputs, shape ``(N C, 1)``."""
        return self._gradient(self._outputs.flatten())[:, None]

    def follow(
        self, basis: torch.Tensor, mixing: torch.Tensor, values: torch.Tensor
    ) -> ResidualPath:
        """Return the path of gradient flow on the kernel ``Q M diag(values) M^T Q^T``.

        The basis ``Q`` has the shape ``(N C, m)``, ``mixing`` is ``M``, ``(m, k)``, and the
        ``values`` ``(k,)`` descend; negative ones count as zero. Exponential Euler steps
        (Hochbruck and Ostermann, Acta Numerica 2010, section 2) are exact for the mean squared
        error; for the cross-entropy they are slower than the flow where its curvature is below
        the largest. The unit of time is set by the first path of a follower.
        """
        start = self._outputs.flatten()
        values = values.clamp(min=0.0)
        mixed = mixing * values.sqrt()
        if self._unit is None:
            self._unit = 1.0 / max(self._curvature * float(values[0]), 1e-300)
        initial = self._loss(start) - self._floor
        gradient = self._gradient(start)
        if not (initial > 0.0 and float(gradient.norm()) > 0.0):
            return ResidualPath(np.zeros(1), np.ones(1), start.new_zeros((len(start), 0)))
        gradients = [gradient]
        theta = start.new_zeros(mixed.shape[1])
        times, left = [0.0], [1.0]
        waiting = list(RULES.fractions)
        for _ in range(RULES.max_steps):
            step = self._unit * RULES.growth * (1.0 + times[-1])
            decay = step * self._curvature * values
            rates = torch.where(decay > 1e-8, -torch.expm1(-decay) / decay, 1.0) * step
            theta = theta - rates * (mixed.T @ (basis.T @ gradient))
            outputs = start + basis @ (mixed @ theta)
            gradient = self._gradient(outputs)
            times.append(times[-1] + step / self._unit)
            left.append(max((self._loss(outputs) - self._floor) / initial, 1e-300))
            if left[-1] <= waiting[0]:
                gradients.append(gradient)
                waiting = [f for f in waiting if f < left[-1]]
            if not waiting:
                break
        if waiting:
            gradients.append(gradient)
        columns = torch.stack(gradients, 1)
        columns = columns / columns.norm(dim=0).clamp(min=1e-300)
        return ResidualPath(np.array(times), np.array(left), columns)

    def _loss(self, outputs: torch.Tensor) -> float:
        """Return the sum of the samples' losses for outputs ``(N C,)``."""
        shaped = outputs.reshape(self._targets.shape)
        if self._kind == "mse":
            return float((shaped - self._targets).square().mean(dim=1).sum())
        return float(-(self._targets * shaped.log_softmax(dim=1)).sum())

    def _gradient(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the mean loss by the outputs, at outputs; both ``(N C,)``."""
        shaped = outputs.reshape(1, *self._targets.shape)
        return output_gradients(self._kind, shaped, self._targets, self._normalisers).flatten()


def times_to(paths: Sequence[ResidualPath]) -> NDArray[np.float64]:
    """Return the times ``(P, 3)`` at which P paths of one follower reach three loss levels.

    The levels are half, a quarter and a tenth of the reducible loss if all paths reach them; else
    50, 75 and 90 % of the smallest fall among the paths. ``(P, 0)`` if a path does not fall.
    """
    lowest = max(float(path.left.min()) for path in paths)
    if not lowest < 1.0:
        return np.empty((len(paths), 0))
    levels = np.array(RULES.fractions)
    if lowest > levels[-1]:
        # The same shares of the fall that every path achieves.
        levels = 1.0 - (1.0 - lowest) * (1.0 - levels)
    return np.stack([_times(path, levels) for path in paths])


def _times(path: ResidualPath, levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the times ``(L,)`` at which a path reaches levels, linear in the log of the loss."""
    lowest = np.minimum.accumulate(path.left)
    falling = np.flatnonzero(np.diff(lowest, prepend=np.inf) < 0.0)
    return np.asarray(np.interp(-np.log(levels), -np.log(lowest[falling]), path.times[falling]))
