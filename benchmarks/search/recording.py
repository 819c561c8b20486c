"""Recorded training runs: whole learning curves of every configuration of a grid, in one file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.environment import environment


# Losses are kept to three and a half digits.
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True, eq=False)
class Run:
    """One training run; its curves end where training was given up because of a loss of NaN.

    Attributes:
        learning_rate:
            Of SGD.
        batch_size:
            Of SGD.
        momentum:
            Of SGD.
        batch_losses:
            The mini-batch loss of every step, before the step; shape ``(T,)``.
        training_loss:
            Over all samples after 0, 1, ... epochs; shape ``(E + 1,)``.
        training_accuracy:
            Likewise; NaN in a regression.
        validation_loss:
            Of the held-out samples, likewise.
        validation_accuracy:
            Likewise.
        training_seconds:
            Of the training steps of each epoch, shape ``(E,)``.
        validation_seconds:
            Of one evaluation of the validation samples, on average.
    """

    learning_rate: float
    batch_size: int
    momentum: float
    batch_losses: NDArray[np.float64]
    training_loss: NDArray[np.float64]
    training_accuracy: NDArray[np.float64]
    validation_loss: NDArray[np.float64]
    validation_accuracy: NDArray[np.float64]
    training_seconds: NDArray[np.float64]
    validation_seconds: float

    @property
    def n_epochs(self) -> int:
        """Epochs that were trained."""
        return len(self.training_seconds)

    @property
    def configuration(self) -> tuple[float, int, float]:
        """Learning rate, batch size and momentum."""
        return self.learning_rate, self.batch_size, self.momentum


_CURVES = (
    "training_loss",
    "training_accuracy",
    "validation_loss",
    "validation_accuracy",
    "training_seconds",
)
_NUMBERS = ("learning_rate", "batch_size", "momentum", "validation_seconds")


def read(path: Path) -> list[Run]:
    """Read a recording.

    Args:
        path:
            Of its file.

    Returns:
        The runs in the order in which they were made.
    """
    with np.load(path, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files if key != "header"}
    runs = []
    for k in range(len(arrays["learning_rate"])):
        fields: dict[str, Any] = {key: float(arrays[key][k]) for key in _NUMBERS}
        fields["batch_size"] = int(fields["batch_size"])
        for key in (*_CURVES, "batch_losses"):
            fields[key] = _piece(arrays[key], arrays[f"{key}_lengths"], k)
        runs.append(Run(**fields))
    return runs


def write(path: Path, runs: Sequence[Run]) -> None:
    """Write a recording.

    Args:
        path:
            Of its file.
        runs:
            All of its runs.
    """
    arrays: dict[str, NDArray[Any]] = {
        key: np.array([getattr(run, key) for run in runs], dtype=np.float64) for key in _NUMBERS
    }
    for key in (*_CURVES, "batch_losses"):
        pieces = [getattr(run, key) for run in runs]
        arrays[f"{key}_lengths"] = np.array([len(piece) for piece in pieces], dtype=np.int32)
        arrays[key] = np.concatenate(pieces).astype(np.float32)
    # Rounded where the type cannot hold it; what is not finite stays so.
    losses = arrays["batch_losses"]
    clipped = np.clip(losses, -_LARGEST, _LARGEST)
    arrays["batch_losses"] = np.where(np.isfinite(losses), clipped, losses).astype(np.float16)
    header = json.dumps({"environment": environment()})
    arrays["header"] = np.frombuffer(header.encode(), dtype=np.uint8)
    partial = path.with_suffix(".partial.npz")
    # The stubs take the arrays for the other arguments of the function.
    np.savez_compressed(partial, **arrays)  # type: ignore[arg-type, unused-ignore]
    partial.replace(path)


def header(path: Path) -> dict[str, Any]:
    """Return where, when and how a recording was made.

    Args:
        path:
            Of its file.

    Returns:
        The file's header.
    """
    with np.load(path, allow_pickle=False) as archive:
        loaded: dict[str, Any] = json.loads(archive["header"].tobytes())
    return loaded


def _piece(values: NDArray[Any], lengths: NDArray[np.int32], k: int) -> NDArray[np.float64]:
    start = int(lengths[:k].sum())
    return np.asarray(values[start : start + int(lengths[k])], dtype=np.float64)
