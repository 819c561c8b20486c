"""How the cost grows with the number of outputs and of weights, at 32 samples.

On the residual network, with 2 to 20 classes, and with half to thrice its channels. How it grows
with the number of samples is in what :mod:`benchmarks.engine.record` measures. Writes
``growth.json``.

Run with ``python -m benchmarks.engine.growth``.
"""

from __future__ import annotations

from pathlib import Path
import tempfile
from typing import Any

import torch

from benchmarks.engine.command import add_peers
from benchmarks.engine.command import parser
from benchmarks.engine.command import write
from benchmarks.engine.networks import residual_network
from benchmarks.engine.record import Cell
from benchmarks.engine.record import measure
from benchmarks.environment import environment


METHODS = ("ours_exact", "ours_columns", "torch_func")
N_CLASSES = (2, 5, 10, 20)
WIDTHS = (0.5, 1.0, 2.0, 3.0)
# What the other varies around.
_STANDARD = (10, 1.0)


def main() -> None:
    """Run the benchmark."""
    command = parser(__doc__)
    add_peers(command)
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    classes_and_widths = [(c, _STANDARD[1]) for c in N_CLASSES] + [
        (_STANDARD[0], w) for w in WIDTHS
    ]
    if options.smoke:
        classes_and_widths = classes_and_widths[:2]
    n_samples = 4 if options.smoke else 32
    cells: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gram.npy"
        for n_classes, width in dict.fromkeys(classes_and_widths):
            cell = Cell("residual", n_samples, METHODS, n_classes=n_classes)
            network = residual_network(n_classes, width)
            cells.append(
                {
                    "n_samples": n_samples,
                    "n_classes": n_classes,
                    "width": width,
                    "n_parameters": sum(p.numel() for p in network.parameters()),
                    "results": [measure(m, cell, options, path, width=width) for m in METHODS],
                }
            )
            document = {"environment": environment(), "threads": options.threads}
            write(options.output / "growth.json", {**document, "cells": cells})


if __name__ == "__main__":
    main()
