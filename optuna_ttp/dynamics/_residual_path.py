"""Where the residual goes while a linearised network learns, on a subspace of its outputs."""

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
    """How a path is followed.

    Attributes:
        growth:
            A step as a share of the time that has passed.
        max_steps:
            Steps at most: so many span seven decades of time.
        fractions:
            Shares of the reducible loss where the residual is recorded.
    """

    growth: float = 0.1
    max_steps: int = 170
    fractions: tuple[float, ...] = (0.5, 0.25, 0.1)


RULES = PathRules()


@dataclass(frozen=True, eq=False)
class ResidualPath:
    """How far training gets, and where the residual points on the way.

    Attributes:
        times:
            From zero, in units of the fastest mode's.
        left:
            The share of the reducible loss that is left then, from 1 downwards.
        residuals:
            Unit vectors of shape ``(N C, s)``: the gradient of the loss by the outputs at the
            start, where half, a quarter and a tenth of the reducible loss is left, or at the end
            where it does not get there. None where there is nothing to learn.
    """

    times: NDArray[np.float64]
    left: NDArray[np.float64]
    residuals: torch.Tensor

    def time_difference(self, other: ResidualPath) -> float:
        """Return the largest relative difference of the times of two paths of one follower."""
        times = times_to([self, other])
        return float((np.abs(times[0] - times[1]) / times.min(axis=0)).max(initial=0.0))


class PathFollower:
    """Follows the training of a task's linearised network on approximations of its kernel.

    Training starts at the outputs of the pretrained model, of shape ``(N, C)``.
    """

    def __init__(self, task: FineTuningTask, initial_outputs: NDArray[np.float64]) -> None:
        q, n = task.loss.soft_targets(task.targets, task.n_outputs)
        self._kind = task.loss.kind
        self._outputs = torch.as_tensor(initial_outputs, dtype=torch.float64)
        self._targets, self._normalisers = torch.as_tensor(q), torch.as_tensor(n)
        self._unit: float | None = None
        # At the largest the Hessian of a sample's loss by its outputs has.
        largest = 2.0 / task.n_outputs if self._kind == "mse" else 0.5 * float(q.sum(axis=1).max())
        self._curvature = largest / max(float(n.sum()), 1e-30)
        entropy = -torch.xlogy(
            self._targets,
            self._targets / self._targets.sum(dim=1, keepdim=True).clamp(min=1e-300),
        ).sum()
        self._floor = 0.0 if self._kind == "mse" else float(entropy)

    @property
    def residual(self) -> torch.Tensor:
        """Return the gradient of the loss by the initial outputs, of shape ``(N C, 1)``."""
        return self._gradient(self._outputs.flatten())[:, None]

    def follow(
        self, basis: torch.Tensor, mixing: torch.Tensor, values: torch.Tensor
    ) -> ResidualPath:
        """Train on the kernel ``Q M diag(values) M^T Q^T`` with ``Q`` of shape ``(N C, m)``.

        The values descend; what is negative by rounding counts as zero. Returns the path of
        gradient flow, by exponential Euler steps (Hochbruck and Ostermann, Acta Numerica 2010,
        section 2): exact for the mean squared error, and for the cross-entropy slower than the
        flow where its curvature is below the largest. All paths of one follower take the same
        steps.
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
        """Return the sum of the samples' losses."""
        shaped = outputs.reshape(self._targets.shape)
        if self._kind == "mse":
            return float((shaped - self._targets).square().mean(dim=1).sum())
        return float(-(self._targets * shaped.log_softmax(dim=1)).sum())

    def _gradient(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the loss by the outputs, of shape ``(N C,)``."""
        shaped = outputs.reshape(1, *self._targets.shape)
        return output_gradients(self._kind, shaped, self._targets, self._normalisers).flatten()


def times_to(paths: Sequence[ResidualPath]) -> NDArray[np.float64]:
    """Return when P paths by the same follower reach the same levels, of shape ``(P, 3)``.

    The levels are half, a quarter and a tenth of the reducible loss where all get there; else 50,
    75 and 90 % of what all get to. The shape is ``(P, 0)`` where one does not get anywhere.
    """
    lowest = max(float(path.left.min()) for path in paths)
    if not lowest < 1.0:
        return np.empty((len(paths), 0))
    levels = np.array(RULES.fractions)
    if lowest > levels[-1]:
        # The same shares of what is reached.
        levels = 1.0 - (1.0 - lowest) * (1.0 - levels)
    return np.stack([_times(path, levels) for path in paths])


def _times(path: ResidualPath, levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return when some levels are reached, nearly exponentially between two steps."""
    lowest = np.minimum.accumulate(path.left)
    falling = np.flatnonzero(np.diff(lowest, prepend=np.inf) < 0.0)
    return np.asarray(np.interp(-np.log(levels), -np.log(lowest[falling]), path.times[falling]))
