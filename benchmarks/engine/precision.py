"""Where the error of a kernel in single precision comes from.

A rectifier whose input is within rounding errors of zero may be open in single precision and
closed in double precision. Its sample's rows of the kernel are then those of another piece of the
network, whatever differentiates them: no engine can tell which side is right. The error of the
whole kernel is compared with that of the kernel without these samples, for our engine and for
``torch.func`` on the same network and data. Writes ``precision.json``.

Run with ``python -m benchmarks.engine.precision``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch
from torch.nn import functional

from benchmarks.engine.command import parser
from benchmarks.engine.command import write
from benchmarks.engine.networks import problem
from benchmarks.engine.peers import torch_func
from benchmarks.environment import environment
from optuna_ttp import FineTuningTask
from optuna_ttp.ntk import exact_kernel


# Network, N and C.
CELLS = (
    ("residual", 32, 10),
    ("residual", 64, 10),
    ("residual", 128, 10),
    ("resnet18", 12, 10),
    ("efficientnet", 20, 5),
    ("efficientnet", 200, 5),
)
SMOKE = (("residual", 4, 10),)
# Numbers in the whole Jacobian up to which torch.func, which holds it, is measured beside ours.
_MOST_NUMBERS = 10**9
# Relative error of a sample's rows from which on it counts as one that differs.
_DIFFERS = 1e-6


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    cells = [_cell(*cell) for cell in (SMOKE if options.smoke else CELLS)]
    summary = {"environment": environment(), "cells": cells}
    write(options.output / "precision.json", summary)


def _cell(network: str, n_samples: int, n_classes: int) -> dict[str, Any]:
    model, images, labels = problem(network, n_samples, n_classes)
    reference = _ours(model.double(), images.double(), labels)
    flips = _flipped(network, n_samples, n_classes)
    model, images, labels = problem(network, n_samples, n_classes)
    methods: dict[str, Callable[[], NDArray[Any]]] = {
        "ours_exact": lambda: _ours(model, images, labels)
    }
    n_parameters = sum(p.numel() for p in model.parameters())
    if n_samples * n_classes * n_parameters <= _MOST_NUMBERS:
        methods["torch_func"] = lambda: torch_func(model, images)
    return {
        "network": network,
        "n_samples": n_samples,
        "n_classes": n_classes,
        "samples_with_flipped_rectifiers": sorted(flips),
        "flipped_rectifiers": sum(flips.values()),
        **{name: _errors(make(), reference, n_samples) for name, make in methods.items()},
    }


def _ours(
    model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> NDArray[np.floating[Any]]:
    task = FineTuningTask(model, (images, labels))
    kernel = exact_kernel(
        task, device=torch.device("cpu"), dtype=images.dtype, show_progress_bar=False
    )
    return kernel.gram


def _flipped(network: str, n_samples: int, n_classes: int) -> dict[int, int]:
    """Rectifiers that are open in one precision only, by sample, in one plain forward pass."""
    masks = []
    for dtype in (torch.float64, torch.float32):
        model, images, _ = problem(network, n_samples, n_classes)
        with torch.no_grad(), _Rectifiers() as seen:
            model.to(dtype)(images.to(dtype))
        masks.append(seen.masks)
    counts = sum((a != b).sum(1) for a, b in zip(*masks, strict=True))
    return {n: int(k) for n, k in enumerate(counts) if k}


class _Rectifiers(torch.overrides.TorchFunctionMode):
    """Sees which rectifiers are open."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.relu, functional.relu):
            self.masks.append((result > 0).flatten(1))
        elif func in (functional.relu6, functional.hardtanh):
            self.masks.append(((result > 0) & (result < 6)).flatten(1))
        return result


def _errors(gram: NDArray[Any], reference: NDArray[Any], n_samples: int) -> dict[str, Any]:
    away = (gram - reference).reshape(n_samples, -1, n_samples, gram.shape[0] // n_samples)
    known = reference.reshape(away.shape)
    # A sample's block of the diagonal has no other sample's error in it.
    diagonal = np.arange(n_samples)
    within_samples = np.linalg.norm(away[diagonal, :, diagonal], axis=(1, 2))
    within_samples /= np.linalg.norm(known[diagonal, :, diagonal], axis=(1, 2))
    same = within_samples <= _DIFFERS

    def relative(some: NDArray[Any]) -> float:
        chosen = np.ix_(some, np.arange(away.shape[1]), some, np.arange(away.shape[3]))
        return float(np.linalg.norm(away[chosen]) / np.linalg.norm(known[chosen]))

    return {
        "error": relative(np.ones(n_samples, dtype=bool)),
        "samples_that_differ": np.flatnonzero(~same).tolist(),
        "error_without_them": relative(same) if same.any() else None,
    }


if __name__ == "__main__":
    main()
