"""How far the network is from its linearisation, without a step of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.spectrum import Probe
from optuna_ttp.spectrum import Spectrum


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask
    from optuna_ttp.task import FrozenModel


OutputGradient = Callable[[torch.Tensor, slice], torch.Tensor]
_FRACTIONS = (0.85, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1)
# Steps of the linearised path after which what is not reached is not looked at.
_MAX_STEPS = 20_000


def probe_linearisation(
    task: FineTuningTask,
    spectrum: Spectrum,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 64,
) -> Spectrum:
    """Compare the network with its linearisation along the linearised path.

    Gradient flow takes the linearised network to ``theta`` in the coordinates of the kept
    eigenpairs; that is a displacement ``J^T V Lambda^(-1/2) theta`` of the weights, one backward
    pass over the data. At the displaced weights, one more backward pass gives the network's own
    loss and gradient. Where the frozen kernel is right, both agree with the linearised ones; where
    the kernel grows, the gradient is larger; where the path leaves what linearisation describes,
    the loss is higher.

    Args:
        task:
            What is fine-tuned.
        spectrum:
            Its spectrum.
        device:
            Where to differentiate.
        dtype:
            Precision of the network. Single precision by default.
        batch_size:
            Samples that go through the network together. 64 by default.

    Returns:
        The same spectrum with :attr:`~optuna_ttp.Spectrum.probe`.
    """
    model = LinearisedModel.from_spectrum(spectrum, dtype=torch.float64)
    points = _path(model)
    initial = float(model.loss(model.initial_outputs[None]))
    vectors = spectrum.eigenvectors.astype(np.float64) / np.sqrt(spectrum.eigenvalues)
    shares, real_shares, ratios = [], [], []
    with task.frozen(device, dtype) as frozen:
        start = dict(frozen.parameters)
        for theta in points:
            weights = torch.as_tensor((vectors @ theta.numpy()).reshape(-1, task.n_outputs))
            displaced = _displaced(task, frozen, start, weights, device, dtype, batch_size)
            frozen.replace_parameters(displaced)
            loss, squared = _loss_and_gradient(task, frozen, model, device, dtype, batch_size)
            frozen.replace_parameters(start)
            gradient = float(model.gradient(theta[None]).square().sum())
            shares.append(float(model.loss(model.outputs(theta[None]))) / initial)
            real_shares.append(loss / initial)
            ratios.append(squared / gradient if gradient > 0 else np.inf)
    return replace(
        spectrum, probe=Probe(np.array(shares), np.array(real_shares), np.array(ratios))
    )


def _path(model: LinearisedModel) -> list[torch.Tensor]:
    """States of gradient flow at the start and at the fractions of the initial loss."""
    theta = model.features.new_zeros((1, model.rank))
    points = [theta[0]]
    initial, floor = float(model.loss(model.initial_outputs[None])), model.loss_floor
    goals = [floor + f * (initial - floor) for f in _FRACTIONS]
    rate = 0.5 / max(float(model.curvatures[0]), 1e-30)
    for _ in range(_MAX_STEPS):
        if not goals:
            break
        theta = theta - rate * model.gradient(theta)
        loss = float(model.loss(model.outputs(theta)))
        while goals and loss <= goals[0]:
            goals.pop(0)
            if not goals or loss > goals[0]:
                points.append(theta[0])
    return points


def _displaced(
    task: FineTuningTask,
    frozen: FrozenModel,
    start: dict[str, torch.Tensor],
    output_weights: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
) -> dict[str, torch.Tensor]:
    """``w_0 + c J^T u`` for weights ``u`` of the outputs, of shape ``(N, C)``."""
    change = _backward(
        task, frozen, lambda _, rows: output_weights[rows], device, dtype, batch_size
    )
    factors = task.multipliers.values()
    return {
        name: (w.detach() + factor * d).requires_grad_()
        for (name, w), d, factor in zip(start.items(), change, factors, strict=True)
    }


def _loss_and_gradient(
    task: FineTuningTask,
    frozen: FrozenModel,
    model: LinearisedModel,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
) -> tuple[float, float]:
    """The network's training loss and the squared norm of its gradient."""
    outputs = torch.zeros_like(model.initial_outputs)

    def residuals(part: torch.Tensor, rows: slice) -> torch.Tensor:
        outputs[rows] = part.detach().double().cpu()
        own = model.residuals(
            outputs[None, rows], model.soft_targets[rows], model.normalisers[rows]
        )[0]
        return own * (model.normalisers[rows].sum() / model.normalisers.sum())

    gradient = _backward(task, frozen, residuals, device, dtype, batch_size)
    squared = sum(
        factor * float(g.double().square().sum())
        for g, factor in zip(gradient, task.multipliers.values(), strict=True)
    )
    return float(model.loss(outputs[None])), squared


def _backward(
    task: FineTuningTask,
    frozen: FrozenModel,
    output_gradient: OutputGradient,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
) -> list[torch.Tensor]:
    """``J^T u`` summed over all samples, where ``u`` may depend on the outputs."""
    parameters = list(frozen.parameters.values())
    total = [torch.zeros_like(p) for p in parameters]
    for first, (inputs, _) in enumerate(task.batches(batch_size, device, dtype)):
        outputs = frozen(inputs)
        rows = slice(first * batch_size, first * batch_size + len(outputs))
        parts = torch.autograd.grad(
            outputs,
            parameters,
            grad_outputs=output_gradient(outputs, rows).to(outputs),
            allow_unused=True,
            materialize_grads=True,
        )
        for whole, part in zip(total, parts, strict=True):
            whole += part if part.layout == torch.strided else part.to_dense()
    return total
