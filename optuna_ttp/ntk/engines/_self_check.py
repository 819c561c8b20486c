"""Checks of the kernel against plain automatic differentiation, in every computation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from optuna_ttp._util.exceptions import JacobianMismatchError
from optuna_ttp.ntk._settings import EngineSettings
from optuna_ttp.ntk.engines._kernel import Kernel
from optuna_ttp.ntk.jacobian._claims import Claims
from optuna_ttp.ntk.jacobian._rules import CHECKS


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask
    from optuna_ttp.task import FrozenModel


def check_rows(
    task: FineTuningTask,
    frozen: FrozenModel,
    claims: Claims,
    kernel: Kernel,
    settings: EngineSettings,
) -> None:
    """Raise JacobianMismatchError if entries of the kernel differ from plain reverse mode.

    Two random rows are computed by one backward pass each through a batch of one, and their three
    products compared with the entries of the kernel. The error names the parameter whose gradients
    differ most.
    """
    rng = np.random.default_rng(settings.seed)
    chosen = [
        (int(rng.integers(task.n_samples)), int(rng.integers(task.n_outputs))) for _ in range(2)
    ]
    rows = [plain_row(task, frozen, n, c, settings) for n, c in chosen]
    multipliers = dict(zip(frozen.parameters, task.multipliers.values(), strict=True))
    indices = [n * task.n_outputs + c for n, c in chosen]
    norms = [_product(r, r, multipliers) ** 0.5 for r in rows]
    for a, b in ((0, 0), (0, 1), (1, 1)):
        expected = _product(rows[a], rows[b], multipliers)
        actual = float(kernel.gram[indices[a], indices[b]])
        # An overflow is reported elsewhere, with a better message.
        if not np.isfinite(actual):
            continue
        if (
            abs(actual - expected)
            > CHECKS.kernel_tolerances[settings.held or frozen.precision] * norms[a] * norms[b]
        ):
            raise JacobianMismatchError(
                f"The kernel of sample {chosen[a][0]}, output {chosen[a][1]} and sample "
                f"{chosen[b][0]}, output {chosen[b][1]} must be {expected:.6g}, the value of "
                f"plain automatic differentiation, but got {actual:.6g}. "
                + _culprit(task, frozen, claims, chosen[a], rows[a], settings)
            )


def plain_row(
    task: FineTuningTask,
    frozen: FrozenModel,
    n: int,
    c: int,
    settings: EngineSettings,
) -> dict[str, torch.Tensor]:
    """Return the gradient of output ``c`` of sample ``n`` by parameter, by plain reverse mode."""
    inputs, _ = next(task.batches(1, settings.device, settings.dtype, start=n))
    gradients = torch.autograd.grad(
        frozen(inputs)[0, c],
        list(frozen.parameters.values()),
        allow_unused=True,
        materialize_grads=True,
    )
    return {
        name: g if g.layout == torch.strided else g.to_dense()
        for name, g in zip(frozen.parameters, gradients, strict=True)
    }


def _product(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], multipliers: dict[str, float]
) -> float:
    """Return the inner product of two rows, weighted by multipliers, in double precision."""
    total = 0.0
    for name, g in one.items():
        # A dot product of millions of numbers in single precision loses digits.
        left, right = g.flatten().cpu(), other[name].flatten().cpu()
        for start in range(0, len(left), 2**20):
            part = left[start : start + 2**20].double() @ right[start : start + 2**20].double()
            total += multipliers[name] * float(part)
    return total


def _culprit(
    task: FineTuningTask,
    frozen: FrozenModel,
    claims: Claims,
    row: tuple[int, int],
    plain: dict[str, torch.Tensor],
    settings: EngineSettings,
) -> str:
    """Return a sentence with the parameter whose gradient differs most from ``plain``."""
    from optuna_ttp.ntk.layers._factors import Factors

    n, c = row
    batch_size = min(4, task.n_samples - n)
    inputs, _ = next(task.batches(batch_size, settings.device, settings.dtype, start=n))
    by_layer: dict[str, torch.Tensor] = {}
    with claims.tape(frozen).attached() as tape:
        recording = tape.record(inputs, batch_size)
        direction = torch.zeros_like(recording.outputs)
        direction[:, c] = 1.0
        cotangents = recording.cotangents([direction])
        for name, part in claims.gradients(recording, cotangents):
            rows = part.rows() if isinstance(part, Factors) else part
            by_layer[name] = by_layer[name] + rows[0, 0] if name in by_layer else rows[0, 0]
    away = {
        name: float((by_layer[name] - g.flatten()).norm() if name in by_layer else g.norm())
        for name, g in plain.items()
    }
    worst = max(away, key=lambda name: away[name])
    if away[worst] <= CHECKS.kernel_tolerances[frozen.precision] * max(
        float(g.norm()) for g in plain.values()
    ):
        return "The gradients of all layers are right; their products are not."
    return f"The gradient of {worst.removeprefix('model.')!r} differs most."
