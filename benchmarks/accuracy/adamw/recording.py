"""The file of one task's recorded runs."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
import math
from pathlib import Path
from typing import Any
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy.adamw.run import LoraRun
from benchmarks.accuracy.adamw.run import Run
from benchmarks.accuracy.training import read_archive
from benchmarks.accuracy.training import write_archive
from benchmarks.environment import environment


End = Literal["loss", "steps", "diverged"]
_ROWS = ("batch_losses", "gradient_norms", "full_steps", "full_losses", "full_accuracies")


@dataclass(frozen=True, eq=False)
class Curve:
    """What one run gave, with T steps and F evaluations over all samples.

    Attributes:
        batch_losses:
            Mini-batch loss at every step, before the step; shape ``(T,)``.
        gradient_norms:
            Norm of the mini-batch's gradient before it is clipped; shape ``(T,)``.
        full_steps:
            Numbers of steps taken when the loss over all samples was taken; shape ``(F,)``.
        full_losses:
            That loss.
        full_accuracies:
            Training accuracy at the same steps.
        seconds:
            Seconds of the processor for training alone.
        end:
            "loss" for a run that came to the deepest level, "steps" for one that took all its
            steps, "diverged" for one that was given up.
    """

    batch_losses: NDArray[np.float64]
    gradient_norms: NDArray[np.float64]
    full_steps: NDArray[np.float64]
    full_losses: NDArray[np.float64]
    full_accuracies: NDArray[np.float64]
    seconds: float
    end: End

    def steps_to(self, fraction: float) -> float:
        """Return the steps to a fraction of the initial loss over all samples.

        Between two evaluations the logarithm of the loss is a line in the number of steps.

        Args:
            fraction:
                Of the initial loss.

        Returns:
            Steps to the first time, infinity where the run never came there.
        """
        level = fraction * self.full_losses[0]
        below = np.flatnonzero(self.full_losses <= level)
        if not len(below):
            return float("inf")
        k = int(below[0])
        logs = np.log(self.full_losses[[k - 1, k]])
        share = (np.log(level) - logs[0]) / (logs[1] - logs[0])
        return float(self.full_steps[k - 1] + share * np.diff(self.full_steps)[k - 1])


@dataclass(frozen=True, eq=False)
class Recording:
    """Recorded runs.

    Attributes:
        runs:
            The configurations.
        curves:
            What each gave.
        task:
            What is known of the task, such as its name and the number of its samples.
    """

    runs: list[Run]
    curves: list[Curve]
    task: dict[str, Any]


def read(path: Path) -> Recording:
    """Read a recording.

    Args:
        path:
            Of its file.

    Returns:
        The recording; its configurations are of class :class:`LoraRun` for low-rank adapters.
    """
    header, arrays = read_archive(path)
    curves = []
    for k, end in enumerate(header["ends"]):
        n_steps, n_full = header["lengths"][k]
        rows = {key: arrays[key][k, : n_full if "full" in key else n_steps] for key in _ROWS}
        curves.append(Curve(**rows, seconds=float(arrays["seconds"][k]), end=end))
    runs = [LoraRun(**run) if "rank" in run else Run(**run) for run in header["runs"]]
    return Recording(runs, curves, header["task"])


def append(path: Path, run: Run, curve: Curve, task: Mapping[str, Any]) -> None:
    """Add a run to a recording's file.

    Args:
        path:
            Of the file; it is made where it is not there.
        run:
            The configuration.
        curve:
            What it gave.
        task:
            What is known of the task.
    """
    old = read(path) if path.exists() else Recording([], [], {})
    runs, curves = [*old.runs, run], [*old.curves, curve]
    header = {
        "environment": environment(),
        "task": dict(task),
        "runs": [asdict(a_run) for a_run in runs],
        "ends": [a_curve.end for a_curve in curves],
        # Losses may end with NaN, so the filling does not tell where a row ends.
        "lengths": [(len(c.batch_losses), len(c.full_steps)) for c in curves],
    }
    rows = {key: [getattr(c, key) for c in curves] for key in _ROWS}
    write_archive(path, header, rows, [c.seconds for c in curves])


def record_missing(
    path: Path, runs: Sequence[Run], record: Callable[[Run], Curve], task: Mapping[str, Any]
) -> None:
    """Record the runs that a file does not have yet, and add each to it.

    Args:
        path:
            Of the file; it is made where it is not there.
        runs:
            All that the file is to have.
        record:
            Trains one.
        task:
            What is known of the task.
    """
    done = read(path).runs if path.exists() else []
    for k, run in enumerate(runs):
        if any(_alike(run, other) for other in done):
            continue
        curve = record(run)
        append(path, run, curve, task)
        print(
            f"{path.stem} {k + 1}/{len(runs)}: rate {run.learning_rate:.1e}, "
            f"batch size {run.batch_size}, {len(curve.batch_losses)} steps, {curve.end}, "
            f"{curve.seconds:.0f} s",
            flush=True,
        )


def _alike(one: Run, other: Run) -> bool:
    """Whether two runs are the same but for the last digits of the learning rate."""
    close = math.isclose(one.learning_rate, other.learning_rate, rel_tol=1e-6)
    return close and replace(one, learning_rate=0.0) == replace(other, learning_rate=0.0)
