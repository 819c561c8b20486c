"""Steps of training, the order of the samples, and the files of recorded runs.

The recordings of SGD and of AdamW share this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch

from benchmarks.accuracy.tasks import Tuning


# Samples that go through the network together; with frozen statistics, gradients just add up.
_CHUNK = 50


def mini_batches(n_samples: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield the indices of one mini-batch after the other, without end.

    Every epoch is a new permutation, all drawn from one generator. The last batch of an epoch is
    smaller where the batch size does not divide the number of samples.

    Args:
        n_samples:
            N.
        batch_size:
            B.
        seed:
            Of the order of the samples. PyTorch's generator is seeded with 1000 more.

    Yields:
        Indices of shape ``(B,)`` or fewer.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    while True:
        yield from torch.randperm(n_samples, generator=generator).split(batch_size)


def accumulate_gradient(
    model: torch.nn.Module, tuning: Tuning, chosen: torch.Tensor
) -> tuple[float, int]:
    """Add the gradient of the mean loss over the chosen samples to the weights' gradients.

    Args:
        model:
            Is trained; another copy than that of the task.
        tuning:
            Data and loss.
        chosen:
            Indices of samples, shape ``(B,)``.

    Returns:
        The loss, and the number of samples that are classified rightly.
    """
    total, hits = 0.0, 0
    for part in chosen.split(_CHUNK):
        outputs = model(tuning.inputs[part])
        loss = tuning.loss(outputs, tuning.labels[part]) * (len(part) / len(chosen))
        loss.backward()
        total += float(loss.detach())
        hits += _n_right(outputs, tuning.labels[part])
    return total, hits


def evaluate(model: torch.nn.Module, tuning: Tuning) -> tuple[float, float]:
    """Return loss and accuracy over all samples."""
    total, hits = 0.0, 0
    with torch.no_grad():
        for part in torch.arange(len(tuning.labels)).split(_CHUNK):
            outputs = model(tuning.inputs[part])
            share = len(part) / len(tuning.labels)
            total += float(tuning.loss(outputs, tuning.labels[part])) * share
            hits += _n_right(outputs, tuning.labels[part])
    return total, hits / len(tuning.labels)


def _n_right(outputs: torch.Tensor, labels: torch.Tensor) -> int:
    classes = labels.argmax(dim=1) if labels.ndim == 2 else labels
    return int((outputs.argmax(dim=1) == classes).sum())


def read_archive(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
    """Return the header and the arrays of a file of recorded runs."""
    with np.load(path, allow_pickle=False) as archive:
        arrays = {key: archive[key].astype(np.float64) for key in archive if key != "header"}
        return json.loads(archive["header"].tobytes()), arrays


def write_archive(
    path: Path,
    header: dict[str, Any],
    rows: Mapping[str, Sequence[NDArray[np.float64]]],
    seconds: Sequence[float],
) -> None:
    """Write a file of recorded runs; an interruption leaves the file as it was before.

    Args:
        path:
            Of the file.
        header:
            Is stored as JSON.
        rows:
            One row of any length for each run, stored as float32 with NaN behind the end.
        seconds:
            One for each run.
    """
    arrays: dict[str, Any] = {}
    for key, lines in rows.items():
        padded = np.full((len(lines), max(map(len, lines))), np.nan)
        for target, values in zip(padded, lines, strict=True):
            target[: len(values)] = values
        arrays[key] = padded.astype(np.float32)
    arrays["seconds"] = np.array(seconds)
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(partial, **arrays)
    partial.replace(path)
