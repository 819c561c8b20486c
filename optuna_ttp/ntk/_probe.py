"""Comparison of the network with its linearisation, without a training step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace
import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.ntk._autocast import without_autocast
from optuna_ttp.spectrum import Probe
from optuna_ttp.spectrum import Spectrum


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask
    from optuna_ttp.task import FrozenModel


@dataclass(frozen=True)
class ProbeRules:
    """Tuned numbers of the comparison of the network with its linearisation.

    Attributes:
        fractions:
            Loss levels of the comparison, as shares of the reducible loss; each takes one and two
            thirds of a pass of training over the data. On a sub-sample of 40 or 80 of 200 samples
            kernels grow less than on all (1.3 and 1.5 instead of 2.9 on EfficientNet-Lite0), and
            an estimate from products of two halves of it is too noisy.
        max_steps:
            Largest number of gradient steps on the linearised path; loss levels that are not
            reached by then are left out.
        linear:
            Largest relative deviation of outputs and kernel from a network that counts as linear.
        max_unseen:
            The largest share of a squared gradient that may be estimated from the trace because
            the eigenvectors do not contain it; if it is larger, the gradients are computed.
    """

    fractions: tuple[float, ...] = (0.6, 0.25, 0.05)
    max_steps: int = 5_000
    linear: float = 1e-3
    max_unseen: float = 1e-3


RULES = ProbeRules()


@without_autocast
def probe_linearisation(
    task: FineTuningTask,
    spectrum: Spectrum,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 64,
    rules: ProbeRules = RULES,
) -> Spectrum:
    """Compare network and linearisation at three loss levels; return the spectrum with its probe.

    Gradient flow takes the linearised network to ``theta`` in the coordinates of the spectrum's
    eigenpairs, which is a displacement ``J^T V Lambda^(-1/2) theta`` of the weights. At each
    displacement the :class:`~optuna_ttp.spectrum.Probe` has the size relative to the weights, the
    deviation of the network's outputs from the linearised ones, and the ratio of the kernels at
    displaced and pretrained weights along the gradient of the loss. A linearisation is accurate
    while weights change little relative to their norm (Chizat, Oyallon and Bach, NeurIPS 2019,
    arXiv 1812.07956);
    :meth:`optuna_ttp.dynamics.KernelGrowth.from_probe` uses the measurements.

    ``batch_size`` samples go through the network together, once for all displacements and
    once at each. If the initial loss is zero, the spectrum is returned without a probe.
    """
    model = LinearisedModel.from_spectrum(spectrum, dtype=torch.float64)
    initial = float(model.loss(model.initial_outputs[None]))
    if not initial > 0.0:
        return spectrum
    vectors = spectrum.eigenvectors.astype(np.float64) / np.sqrt(spectrum.eigenvalues)
    path = _path(model, rules)
    with task.frozen(device, dtype) as frozen:
        rows = _Rows(task, frozen, device, dtype, batch_size)
        pulls = [
            torch.as_tensor((vectors @ theta.numpy()).reshape(-1, task.n_outputs))
            for theta in path
        ]
        _, changes = rows.pulled(pulls)
        expected = [model.outputs(theta[None]) for theta in path]
        residuals = [
            model.residuals(outputs, model.soft_targets, model.normalisers)[0]
            for outputs in expected
        ]
        known = [_squared_gradient(spectrum, r.numpy().ravel()) for r in residuals]
        if any(unseen > rules.max_unseen for _, unseen in known):
            known = [(_squared(task, g), 0.0) for g in rows.pulled(residuals)[1]]
        sampling = spectrum.metadata.time_error or 0.0
        points = []
        for k, (change, (before, unseen)) in enumerate(zip(changes, known, strict=True)):
            with _displaced(frozen, change):
                outputs, (after,) = rows.pulled(residuals[k : k + 1])
            ratio = _squared(task, after) / before if before > 0.0 else 1.0
            linear = expected[k][0]
            away = float((outputs - linear).norm())
            moved = float((linear - model.initial_outputs).norm())
            uncertain = rules.linear + unseen + sampling
            points.append(
                _Point(
                    float(model.loss(expected[k])) / initial,
                    _largest(frozen, change),
                    away / moved if math.isfinite(away) else math.inf,
                    ratio,
                    # With a head of zeros the outputs are linear on the path, the kernel is not.
                    away <= rules.linear * moved and abs(ratio - 1.0) <= uncertain,
                )
            )
    if all(point.is_linear for point in points):
        # The kernel of a linear network does not depend on its weights.
        points = [replace(point, displacement=0.0, ratio=1.0) for point in points]
    probe = Probe(
        np.array([1.0, *(point.fraction for point in points)]),
        np.array([0.0, *(point.displacement for point in points)]),
        np.array([0.0, *(point.deviation for point in points)]),
        np.array([1.0, *(point.ratio for point in points)]),
    )
    return replace(spectrum, probe=probe)


@dataclass(frozen=True)
class _Point:
    """Measurements at one point of the path; :class:`Probe` explains the first four."""

    fraction: float
    displacement: float
    deviation: float
    ratio: float
    is_linear: bool


@torch.inference_mode()
def _path(model: LinearisedModel, rules: ProbeRules) -> list[torch.Tensor]:
    """Return the first states ``theta``, ``(r,)``, at or below each loss level that is reached."""
    theta = model.features.new_zeros((1, model.rank))
    points: list[torch.Tensor] = []
    initial, floor = float(model.loss(model.initial_outputs[None])), model.loss_floor
    goals = [floor + f * (initial - floor) for f in rules.fractions]
    rate = 0.5 / max(float(model.curvatures[0]), 1e-30)
    flat = model.features.reshape(-1, model.rank)
    outputs = model.initial_outputs[None]
    for _ in range(rules.max_steps):
        if not goals:
            break
        # Outputs take the most time, so that they are computed once for gradient and loss.
        residuals = model.residuals(outputs, model.soft_targets, model.normalisers)
        theta = theta - rate * (residuals.reshape(1, -1) @ flat)
        outputs = model.outputs(theta)
        loss = float(model.loss(outputs))
        if loss <= goals[0]:
            points.append(theta[0])
            goals = [g for g in goals if g < loss]
    return points


@contextmanager
def _displaced(frozen: FrozenModel, change: list[torch.Tensor]) -> Iterator[None]:
    """Add ``change`` to the weights of the network meanwhile."""
    start = dict(frozen.parameters)
    frozen.replace_parameters(
        {
            n: (w.detach() + d).requires_grad_()
            for (n, w), d in zip(start.items(), change, strict=True)
        }
    )
    try:
        yield
    finally:
        frozen.replace_parameters(start)


def _squared(task: FineTuningTask, scaled: list[torch.Tensor]) -> float:
    """Return ``u^T J c J^T u`` from ``c J^T u``, a list by parameter; infinity on overflow."""
    factors = task.multipliers.values()
    total = sum(float(g.double().square().sum()) / c for g, c in zip(scaled, factors, strict=True))
    return total if math.isfinite(total) else math.inf


def _squared_gradient(spectrum: Spectrum, residuals: NDArray[np.float64]) -> tuple[float, float]:
    """Return ``u^T J c J^T u`` at the pretrained weights, and the share of it that is estimated.

    ``residuals`` are ``u``, ``(N C,)``. All dropped eigenvalues are taken to equal their mean.
    """
    seen = residuals @ spectrum.eigenvectors
    known = float(np.square(seen) @ spectrum.eigenvalues)
    n_dropped = len(residuals) - spectrum.rank
    if n_dropped == 0:
        return known, 0.0
    mean = max(spectrum.trace - float(spectrum.eigenvalues.sum()), 0.0) / n_dropped
    rest = mean * max(float(residuals @ residuals - seen @ seen), 0.0)
    return known + rest, rest / (known + rest) if rest else 0.0


def _largest(frozen: FrozenModel, change: list[torch.Tensor]) -> float:
    """Return the largest ``|d| / |w|`` of tensors ``w`` of two or more axes and changes ``d``."""
    changes = [0.0]
    for w, d in zip(frozen.parameters.values(), change, strict=True):
        # Biases and scales are moved by few gradients and often start at zero.
        if w.ndim < 2:
            continue
        moved, norm = float(d.norm()), float(w.detach().norm())
        if moved > 0.0:
            changes.append(moved / norm if norm > 0.0 else math.inf)
    return max(changes)


@dataclass(frozen=True)
class _Rows:
    """Products with rows of the Jacobian of a task, ``batch_size`` samples at a time."""

    task: FineTuningTask
    frozen: FrozenModel
    device: torch.device
    dtype: torch.dtype
    batch_size: int

    def pulled(
        self, output_weights: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
        """Return the outputs, ``(N, C)``, and ``c J^T u`` by parameter for each of some weights.

        The weights ``u`` of the outputs have the shape ``(N, C)``. The samples go through the
        network once, and back for each ``u``.
        """
        parameters = list(self.frozen.parameters.values())
        totals = [[torch.zeros_like(p) for p in parameters] for _ in output_weights]
        outputs_so_far: list[torch.Tensor] = []
        batches = self.task.batches(self.batch_size, self.device, self.dtype)
        for first, (inputs, _) in enumerate(batches):
            outputs = self.frozen(inputs)
            rows = slice(first * self.batch_size, first * self.batch_size + len(outputs))
            outputs_so_far.append(outputs.detach().double().cpu())
            for k, (total, weights) in enumerate(zip(totals, output_weights, strict=True)):
                parts = torch.autograd.grad(
                    outputs,
                    parameters,
                    grad_outputs=weights[rows].to(outputs),
                    retain_graph=k + 1 < len(totals),
                    allow_unused=True,
                    materialize_grads=True,
                )
                for whole, part in zip(total, parts, strict=True):
                    whole += part if part.layout == torch.strided else part.to_dense()
        factors = self.task.multipliers.values()
        scaled = [[c * d for c, d in zip(factors, total, strict=True)] for total in totals]
        return torch.cat(outputs_so_far), scaled
