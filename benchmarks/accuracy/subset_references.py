"""Times to the targets of the linearised and of the real network on all samples."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
import copy
from dataclasses import dataclass
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch
from torch.func import functional_call
from torch.func import jacrev
from torch.func import vmap
import torch.nn.functional as functional

from benchmarks.accuracy.tasks import Tuning
from optuna_ttp.dynamics import Target


FRACTIONS = (0.7, 0.5, 0.35, 0.25, 0.15)
MAX_STEPS = 40_000
# Of real training, on all samples and on mini-batches.
_MAX_REAL_STEPS = (100, 600)
# Later losses are taken at steps so much further apart.
_SPACING = 1.08


@dataclass(frozen=True)
class Configuration:
    """One configuration of SGD.

    Attributes:
        learning_rate:
            Of SGD.
        batch_size:
            N is full-batch gradient descent.
        momentum:
            Of SGD.
        share:
            Of the largest stable learning rate.
    """

    learning_rate: float
    batch_size: int
    momentum: float
    share: float


class References:
    """Times of the linearised and of the real network, stored in a file."""

    def __init__(self, path: Path, smoke: bool) -> None:
        self._path = path
        self._smoke = smoke
        # Network and samples, and so the kernel, are the same for both losses.
        self._kernel: torch.Tensor | None = None
        self._known: dict[str, list[float]] = {}
        if path.exists() and not smoke:
            self._known = json.loads(path.read_text())

    def of(
        self, tuning: Tuning, configurations: list[Configuration]
    ) -> tuple[list[list[float]], list[list[float]]]:
        """Train what is not known."""
        keys = [
            f"{tuning.name} learning rate {c.learning_rate:.5g} batch size {c.batch_size} "
            f"momentum {c.momentum:g}"
            for c in configurations
        ]
        missing = [k for k, key in enumerate(keys) if f"linearised {key}" not in self._known]
        if missing:
            kernel = self._kernel = whole_kernel(tuning) if self._kernel is None else self._kernel
            computed = linear_times(tuning, kernel, [configurations[k] for k in missing], 0)
            self._write(
                {f"linearised {keys[k]}": t for k, t in zip(missing, computed, strict=True)}
            )
        for key, configuration in zip(keys, configurations, strict=True):
            if f"real {key}" not in self._known:
                times = [math.nan] * len(FRACTIONS)
                if not self._smoke:
                    times = _real_times(tuning, configuration)
                self._write({f"real {key}": times})
        linear = [self._known[f"linearised {key}"] for key in keys]
        return linear, [self._known[f"real {key}"] for key in keys]

    def _write(self, times: dict[str, list[float]]) -> None:
        self._known.update(times)
        if not self._smoke:
            self._path.write_text(json.dumps(self._known, indent=2) + "\n")
        for key in times:
            print(f"{key}: {times[key]}", flush=True)


def whole_kernel(tuning: Tuning, chunk: int = 50) -> torch.Tensor:
    """Return the kernel of all samples, of shape ``(N C, N C)``, by way of the whole Jacobian.

    Args:
        tuning:
            Network and data.
        chunk:
            Samples at a time.

    Returns:
        ``J J^T`` in single precision.
    """
    weights = {name: p.detach() for name, p in tuning.model.named_parameters()}

    def outputs(weights: dict[str, torch.Tensor], x: torch.Tensor) -> Any:
        return functional_call(tuning.model, weights, (x[None],))[0]

    jacobian_of = vmap(jacrev(outputs), in_dims=(None, 0))
    rows = []
    for inputs in tuning.inputs.split(chunk):
        parts = jacobian_of(weights, inputs)
        rows.append(torch.cat([part.flatten(2).flatten(0, 1) for part in parts.values()], dim=1))
    jacobian = torch.cat(rows)
    return jacobian @ jacobian.T


def linear_times(
    tuning: Tuning,
    kernel: torch.Tensor,
    configurations: Sequence[Configuration],
    seed: int,
) -> list[list[float]]:
    """Train the linearised network on all samples.

    A step moves all outputs by the kernel's columns of the batch times the gradient of the batch's
    loss with respect to its outputs.

    Args:
        tuning:
            Network and data.
        kernel:
            Of all samples.
        configurations:
            Of SGD.
        seed:
            Of the order of the samples.

    Returns:
        For each configuration the step at which each target is reached; infinity if it is not.
    """
    times: dict[int, list[float]] = {}
    for batch_size in {c.batch_size for c in configurations}:
        members = [k for k, c in enumerate(configurations) if c.batch_size == batch_size]
        curves = _linear_curves(
            tuning, kernel, [configurations[k] for k in members], batch_size, seed
        )
        for k, curve in zip(members, curves, strict=True):
            times[k] = _first_passage_times(np.arange(len(curve), dtype=float), curve)
    return [times[k] for k in range(len(configurations))]


def _linear_curves(
    tuning: Tuning, kernel: torch.Tensor, members: list[Configuration], batch_size: int, seed: int
) -> list[NDArray[np.float64]]:
    """Losses over all samples at every step, until the deepest target."""
    with torch.no_grad():
        initial = torch.cat([tuning.model(x) for x in tuning.inputs.split(250)])
    n, c = initial.shape
    rates = torch.tensor([m.learning_rate for m in members])[:, None]
    momenta = torch.tensor([m.momentum for m in members])[:, None]
    outputs = initial.repeat(len(members), 1, 1)
    velocity = torch.zeros(len(members), n * c)
    curves: list[list[float]] = [[] for _ in members]
    active = list(range(len(members)))
    batches = _orders(n, batch_size, seed)
    for _ in range(MAX_STEPS + 1):
        losses = [_loss(tuning, o).item() for o in outputs]
        for k, loss in zip(active, losses, strict=True):
            curves[k].append(loss)
        on = [j for j, k in enumerate(active) if losses[j] > 0.999 * min(FRACTIONS) * curves[k][0]]
        if not on:
            break
        if len(on) < len(active):
            outputs, velocity = outputs[on], velocity[on]
            rates, momenta = rates[on], momenta[on]
            active = [active[j] for j in on]
        batch = next(batches)
        of_batch = outputs[:, batch]
        target = tuning.labels[batch]
        if tuning.labels.is_floating_point():
            gradient = (of_batch - target) * (2.0 / (c * len(batch)))
        else:
            gradient = (of_batch.softmax(dim=2) - functional.one_hot(target, c)) / len(batch)
        index = (batch[:, None] * c + torch.arange(c)).flatten()
        columns = kernel if len(batch) == n else kernel[index]
        velocity = momenta * velocity + gradient.flatten(1) @ columns
        outputs = outputs - (rates * velocity).view_as(outputs)
    return [np.array(curve) for curve in curves]


def _orders(n_samples: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        if batch_size == n_samples:
            yield torch.arange(n_samples)
        else:
            yield from torch.randperm(n_samples, generator=generator).split(batch_size)


def real_curve(
    tuning: Tuning, configuration: Configuration, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Train the network.

    Args:
        tuning:
            Network and data.
        configuration:
            Of SGD.
        seed:
            Of the order of the samples.

    Returns:
        Steps, and losses over all samples.
    """
    model = copy.deepcopy(tuning.model)
    optimiser = torch.optim.SGD(
        model.parameters(), lr=configuration.learning_rate, momentum=configuration.momentum
    )
    n = len(tuning.labels)
    batches = _orders(n, configuration.batch_size, seed)
    steps: list[float] = []
    losses: list[float] = []
    wanted = 0
    whole = configuration.batch_size == n
    for step in range(_MAX_REAL_STEPS[0 if whole else 1] + 1):
        if step == wanted and not whole:
            with torch.no_grad():
                outputs = torch.cat([model(x) for x in tuning.inputs.split(250)])
            steps.append(step)
            losses.append(_loss(tuning, outputs).item())
            wanted = max(step + 1, int(step * _SPACING))
        optimiser.zero_grad()
        total = 0.0
        batch = next(batches)
        for part in batch.split(250):
            loss = tuning.loss(model(tuning.inputs[part]), tuning.labels[part])
            loss = loss * (len(part) / len(batch))
            loss.backward()
            total += loss.item()
        if whole:
            steps.append(step)
            losses.append(total)
        if not math.isfinite(losses[-1]) or losses[-1] <= 0.999 * min(FRACTIONS) * losses[0]:
            break
        optimiser.step()
    return np.array(steps), np.array(losses)


def _real_times(tuning: Tuning, configuration: Configuration) -> list[float]:
    n_orders = 1 if configuration.batch_size == len(tuning.labels) else 2
    runs = [
        _first_passage_times(*real_curve(tuning, configuration, seed)) for seed in range(n_orders)
    ]
    return [_geometric_mean(column) for column in zip(*runs, strict=True)]


def _first_passage_times(steps: NDArray[np.float64], curve: NDArray[np.float64]) -> list[float]:
    return [Target("loss", f * curve[0]).first_passage(steps, curve) for f in FRACTIONS]


def _loss(tuning: Tuning, outputs: torch.Tensor) -> torch.Tensor:
    return tuning.loss(outputs, tuning.labels)


def _geometric_mean(times: Sequence[float]) -> float:
    return round(float(np.exp(np.mean(np.log(np.maximum(times, 1e-9))))), 2)
