"""Mini-batch SGD with heavy-ball momentum on the linearised model, simulated step by step.

Nothing about the optimiser is approximated where the stride is one: PyTorch's update
``v <- m v + g``, ``theta <- theta - eta v``, batches as a shuffling data loader draws them (a
permutation an epoch, the last batch possibly smaller). Only linearisation and truncation remain
as errors. Configurations with the same batch size advance together and see the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_ttp.dynamics._linearised_model import LinearisedModel
from optuna_ttp.dynamics._target import Target


# The largest change of the steepest direction, relative, in one coarse step (see `strides`).
_COARSE_STEP = 0.25
# A time to the target that was found in fewer coarse steps than this is found again in finer ones.
_MIN_COARSE_STEPS = 64
# A loss so many times the initial one is given up.
_BLOW_UP = 100.0


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Simulated training curves of K configurations at up to T recorded steps each.

    Attributes:
        steps:
            Recorded steps, starting with 0, of shape ``(K, T)``; NaN after a curve's end.
        losses:
            Training loss over all samples, of shape ``(K, T)``; NaN after a curve's end.
        accuracies:
            Training accuracy, likewise, or :obj:`None` where it was not asked for.
        blown_up:
            Whether the loss became infinite, NaN or a hundred times the initial one, ``(K,)``.
        strides:
            Optimiser steps simulated as one, of shape ``(K,)``. One means exactly.
    """

    steps: NDArray[np.float64]
    losses: NDArray[np.float64]
    accuracies: NDArray[np.float64] | None
    blown_up: NDArray[np.bool_]
    strides: NDArray[np.int64]

    def first_passages(self, target: Target) -> NDArray[np.float64]:
        """Return the step at which each curve is at the target.

        Args:
            target:
                The target that the curves were simulated for.

        Returns:
            Shape ``(K,)``; infinite where the target is not reached or the loss blew up.
        """
        watched = self.losses if self.accuracies is None else self.accuracies
        steps = [target.first_passage(s, w) for s, w in zip(self.steps, watched, strict=True)]
        return np.where(self.blown_up, np.inf, np.array(steps, dtype=np.float64))


def simulate_heavy_ball(
    model: LinearisedModel,
    learning_rate: NDArray[np.float64],
    batch_size: NDArray[np.int64],
    momentum: NDArray[np.float64],
    *,
    max_steps: NDArray[np.int64],
    target: Target | None = None,
    full_curves: bool = False,
    exact: bool = False,
    seed: int = 0,
) -> Trajectories:
    """Simulate K configurations.

    Args:
        model:
            The linearised model.
        learning_rate:
            Positive, of shape ``(K,)``.
        batch_size:
            From 1 to N, of shape ``(K,)``.
        momentum:
            In [0, 1), of shape ``(K,)``.
        max_steps:
            Optimiser steps after which a curve ends, of shape ``(K,)``.
        target:
            A curve ends where it reaches this. By default all run to their last step.
        full_curves:
            Go on behind the target. Off by default.
        exact:
            Never take several slow steps as one, see :func:`strides`. Off by default.
        seed:
            For the order of the samples.

    Returns:
        The curves, recorded at every step at first and then at steps 4 % apart.
    """
    n_configurations = len(learning_rate)
    stride = np.ones(n_configurations, dtype=np.int64)
    if not exact:
        stride = strides(model, learning_rate, momentum, max_steps)
    curves: list[list[tuple[float, float, float]]] = [[] for _ in range(n_configurations)]
    blown_up = np.zeros(n_configurations, dtype=bool)
    todo = np.arange(n_configurations)
    while len(todo):
        coarse_batch = np.minimum(batch_size[todo] * stride[todo], model.n_samples)
        coarse = stride[todo] > 1
        for size, is_coarse in sorted(set(zip(coarse_batch, coarse, strict=True))):
            members = todo[(coarse_batch == size) & (coarse == is_coarse)]
            rate, mass = _coarse_optimiser(
                learning_rate[members], momentum[members], stride[members].astype(np.float64)
            )
            blown_up[members] = _simulate_group(
                model,
                torch.as_tensor(rate),
                torch.as_tensor(mass),
                _batches(model, int(size), seed, across_epochs=bool(is_coarse)),
                stride[members],
                np.ceil(max_steps[members] / stride[members]).astype(np.int64),
                target,
                full_curves,
                [curves[k] for k in members],
            )
        refined = _refined_strides(curves, stride, target)
        todo = np.flatnonzero(refined < stride)
        for early in todo:
            curves[early].clear()
        stride = refined
    length = max(map(len, curves), default=0)
    padded = np.full((3, n_configurations, length), np.nan)
    for k, curve in enumerate(curves):
        padded[:, k, : len(curve)] = np.array(curve).T
    with_accuracy = target is not None and target.quantity == "accuracy"
    return Trajectories(
        steps=padded[0],
        losses=padded[1],
        accuracies=padded[2] if with_accuracy else None,
        blown_up=blown_up,
        strides=stride,
    )


def strides(
    model: LinearisedModel,
    learning_rate: NDArray[np.float64],
    momentum: NDArray[np.float64],
    max_steps: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return how many optimiser steps may be simulated as one, a power of two.

    Where ``eta_e h_1`` is small (effective learning rate ``eta_e = eta / (1 - m)``, largest
    curvature ``h_1``), ``s`` steps of batch size ``B`` move the outputs like one step of batch
    size ``s B`` (the linear scaling rule: drift ``s eta_e`` and noise ``eta_e^2 s / B`` are the
    same). ``s`` is chosen so that ``s eta_e h_1`` is at most 0.25. That is coarse for the steepest
    direction, but the time to a target is mostly set by directions many times flatter; where it
    is not, the target is met after few coarse steps and found again in finer ones. Curves of fewer
    than 64 steps are never shortened.

    Args:
        model:
            The linearised model.
        learning_rate:
            Shape ``(K,)``.
        momentum:
            Shape ``(K,)``.
        max_steps:
            Shape ``(K,)``.

    Returns:
        Integers of shape ``(K,)``.
    """
    change = learning_rate / (1.0 - momentum) * max(float(model.curvatures[0]), 1e-30)
    allowed = np.minimum(_COARSE_STEP / change, max_steps / 64.0)
    powers: NDArray[np.float64] = np.floor(np.log2(np.clip(allowed, 1.0, 2.0**40)))
    return (2.0**powers).astype(np.int64)


def _refined_strides(
    curves: list[list[tuple[float, float, float]]],
    stride: NDArray[np.int64],
    target: Target | None,
) -> NDArray[np.int64]:
    """Finer strides for curves that met their target after few coarse steps.

    A coarse step smears the start of training by up to half its length.
    """
    refined = stride.copy()
    if target is None:
        return refined
    for k, curve in enumerate(curves):
        if stride[k] == 1:
            continue
        points = np.array(curve)
        reached = target.reached(points[:, 2 if target.quantity == "accuracy" else 1])
        step = points[reached.argmax(), 0]
        if reached.any() and step < _MIN_COARSE_STEPS * stride[k]:
            refined[k] = 2 ** int(np.log2(max(1.0, step / _MIN_COARSE_STEPS)))
    return refined


def _coarse_optimiser(
    learning_rate: NDArray[np.float64], momentum: NDArray[np.float64], stride: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Learning rate and momentum of the optimiser whose one step stands for ``s`` steps.

    Heavy ball contracts a direction of curvature ``h`` at the rate
    ``x + (l + 1/2) x^2 + O(x^3)`` a step, with ``x = eta_e h`` and the lag ``l = m / (1 - m)``
    (expand the slow root of ``z^2 - (1 + m - eta h) z + m = 0``). The coarse optimiser has the
    effective learning rate ``s eta_e`` and the lag ``(l - (s - 1) / 2) / s``, which makes ``s``
    times that rate to second order, as long as this lag is not negative.
    """
    lag = np.maximum(0.0, (momentum / (1.0 - momentum) - (stride - 1.0) / 2.0) / stride)
    coarse_momentum = np.where(stride == 1, momentum, lag / (1.0 + lag))
    effective = learning_rate / (1.0 - momentum) * stride
    rate = np.where(stride == 1, learning_rate, effective * (1.0 - coarse_momentum))
    return rate, coarse_momentum


def _simulate_group(
    model: LinearisedModel,
    learning_rate: torch.Tensor,
    momentum: torch.Tensor,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
    stride: NDArray[np.int64],
    max_coarse_steps: NDArray[np.int64],
    target: Target | None,
    full_curves: bool,
    curves: list[list[tuple[float, float, float]]],
) -> NDArray[np.bool_]:
    """Advance configurations that see the same batches together; append to their curves."""
    features = model.features
    rank = features.shape[2]
    rate = learning_rate.to(features)[:, None]
    mass = momentum.to(features)[:, None]
    theta = features.new_zeros((len(curves), rank))
    velocity = torch.zeros_like(theta)
    blown_up = np.zeros(len(curves), dtype=bool)
    active = np.arange(len(curves))
    with_accuracy = target is not None and target.quantity == "accuracy"
    limit = _BLOW_UP * float(model.loss(model.initial_outputs[None]))
    next_record = 0
    step = 0
    while True:
        if step >= next_record or np.any(step == max_coarse_steps[active]):
            outputs = model.outputs(theta)
            losses = model.loss(outputs).double().cpu().numpy()
            shares = np.full(len(active), np.nan)
            if with_accuracy:
                shares = model.accuracy(outputs).cpu().numpy()
            for k, loss, share in zip(active, losses, shares, strict=True):
                curves[k].append((float(step * stride[k]), float(loss), float(share)))
            bad = ~(losses <= limit)
            blown_up[active[bad]] = True
            done = bad | (step >= max_coarse_steps[active])
            if target is not None and not full_curves:
                done |= target.reached(shares if with_accuracy else losses)
            if done.all():
                return blown_up
            if done.any():
                keep = torch.as_tensor(~done, device=theta.device)
                theta, velocity, rate, mass = (t[keep] for t in (theta, velocity, rate, mass))
                active = active[~done]
            next_record = max(step + 1, int(step * 1.04))
        psi, offset, soft_targets, normalisers = next(batches)
        outputs = (offset + theta @ psi.T).reshape(len(theta), len(normalisers), -1)
        residuals = model.residuals(outputs, soft_targets, normalisers)
        velocity = mass * velocity + residuals.reshape(len(theta), -1) @ psi
        theta = theta - rate * velocity
        step += 1


def _batches(
    model: LinearisedModel, batch_size: int, seed: int, *, across_epochs: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield ``Psi_b (B C, r)``, ``f_0 (B C,)``, soft targets and normalisers, without end.

    Each epoch is a permutation that ends with a smaller batch, as in training. The batch of a
    coarse step stands for several of these, and goes on into the next epoch instead.
    """
    n_samples, _, rank = model.features.shape
    whole = [model.features, model.initial_outputs, model.soft_targets, model.normalisers]
    generator = torch.Generator().manual_seed(seed)
    rest = [a[:0] for a in whole]
    while True:
        epoch = whole
        if batch_size < n_samples:
            order = torch.randperm(n_samples, generator=generator).to(model.features.device)
            epoch = [a[order] for a in whole]
            if len(rest[0]):
                epoch = [torch.cat(pair) for pair in zip(rest, epoch, strict=True)]
        n_used = len(epoch[0])
        if across_epochs:
            n_used -= n_used % batch_size
        for start in range(0, n_used, batch_size):
            psi, offset, soft_targets, normalisers = (
                a[start : min(start + batch_size, n_used)] for a in epoch
            )
            yield psi.reshape(-1, rank), offset.reshape(-1), soft_targets, normalisers
        rest = [a[n_used:] for a in epoch]
