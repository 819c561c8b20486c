"""Record real training runs, to measure predictions against.

Each task has a fixed list of configurations, drawn by a seed: learning rates spread over two
decades up to a simple estimate of the largest stable one (:func:`scale`), momentum 0, 0.9 and
0.95, batch sizes 8, 16, 50 and N. Mini-batch runs are repeated with another order of the
samples. The small networks also have a grid for the closed loop: 48 more configurations over two
and a half decades, batch sizes 8 to 128, momentum 0 to 0.95. After every run
``results/curves/TASK.npz`` is written anew, so that an interrupted recording goes on where it
stopped.

Run with ``python -m benchmarks.accuracy.record efficientnet-fashion-0 ...``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import copy
from dataclasses import dataclass
from dataclasses import replace
import math
from pathlib import Path
import time

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
import torch

from benchmarks.accuracy.tasks import load
from benchmarks.accuracy.tasks import Tuning
from benchmarks.accuracy.training import accumulate_gradient
from benchmarks.accuracy.training import evaluate
from benchmarks.accuracy.training import mini_batches
from benchmarks.accuracy.training import read_archive
from benchmarks.accuracy.training import write_archive
from benchmarks.environment import environment
from optuna_ttp import SpectrumStore
from optuna_ttp.dynamics import LinearisedModel


RESULTS = Path(__file__).parent / "results"
HORIZON = 150
_MOMENTA = (0.0, 0.9, 0.95)
_SIZES = (8, 16, 50)
# The grid of the closed loop.
_GRID_SIZE = 48
_GRID_DECADES = 2.5
_GRID_MOMENTA = (0.0, 0.5, 0.9, 0.95)
_GRID_SIZES = (8, 16, 32, 64, 128)
_GRID_STEPS = {"digits": 3000, "residual": 1500}
# Runs end where the full training loss is at this share of the initial one.
_DEEPEST = 0.08


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        learning_rate:
            Of SGD.
        batch_size:
            N is full-batch gradient descent.
        momentum:
            Of SGD.
        seed:
            Of the order of the samples.
        max_steps:
            Where it ends at the latest. It goes on to the horizon T in any case.
        learning_rate_share:
            Of :func:`scale`.
    """

    learning_rate: float
    batch_size: int
    momentum: float
    seed: int
    max_steps: int
    learning_rate_share: float


@dataclass(frozen=True, eq=False)
class Recording:
    """R recorded runs.

    Attributes:
        runs:
            The configurations.
        batch_losses:
            Mini-batch loss at every step, before the step; shape ``(R, T)``, NaN behind the end.
        full_steps:
            Steps at which the training loss over all samples was taken, shape ``(R, F)``.
        full_losses:
            That loss.
        full_accuracies:
            Training accuracy at the same steps.
        seconds:
            Of training alone, shape ``(R,)``.
    """

    runs: list[Run]
    batch_losses: NDArray[np.float64]
    full_steps: NDArray[np.float64]
    full_losses: NDArray[np.float64]
    full_accuracies: NDArray[np.float64]
    seconds: NDArray[np.float64]


def main() -> None:
    """Record the tasks that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--store", help="URL of the spectrum store; the default one by default")
    parser.add_argument("--output", type=Path, default=RESULTS / "curves")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-runs", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.tasks:
        tuning = load(name)
        store = SpectrumStore() if options.store is None else SpectrumStore(options.store)
        started = time.perf_counter()
        spectrum = store.get_or_compute(tuning.task(), measure_speed=False)
        print(f"{name}: spectrum in {time.perf_counter() - started:.0f} s", flush=True)
        curvatures = LinearisedModel.from_spectrum(spectrum).curvatures
        runs = configurations(name, len(tuning.labels), curvatures)
        path = options.output / f"{name}.npz"
        done = read(path).runs if path.exists() else []
        missing = [r for r in runs[: options.max_runs] if not any(_alike(r, d) for d in done)]
        for run in missing:
            append(path, run, *train(tuning, run))
            print(f"{name}: {run} done", flush=True)


def _alike(one: Run, other: Run) -> bool:
    """Whether two runs are the same but for the last digits of the learning rate."""
    close = math.isclose(one.learning_rate, other.learning_rate, rel_tol=1e-3)
    return close and replace(one, learning_rate=0.0) == replace(other, learning_rate=0.0)


def scale(
    curvatures: NDArray[np.float64], n_samples: int, batch_size: int, momentum: float
) -> float:
    """Return an estimate of the largest stable learning rate that never changes.

    The learning rate with
    ``gamma sum_k eta h_k (1 + m) / ((1 - m) (2 (1 + m) - eta h_k)) = 1`` and
    ``gamma = (N - B) / ((N - 1) B)`` (Velikanov et al., 2022, arXiv 2206.11124, spectrally
    expressible noise); too small for small batches.

    Args:
        curvatures:
            Of the loss, descending.
        n_samples:
            N.
        batch_size:
            B.
        momentum:
            m.

    Returns:
        The learning rate.
    """
    shares = curvatures / curvatures[0]
    gamma = (n_samples - batch_size) / ((n_samples - 1) * batch_size)
    amplified = gamma * (1.0 + momentum) / (1.0 - momentum)
    share = 1.0
    if gamma > 0:
        share = brentq(
            lambda u: float(amplified * (u * shares / (1.0 - u * shares)).sum() - 1.0),
            1e-12,
            1.0 - 1e-12,
            rtol=1e-12,
        )
    return float(share * 2.0 * (1.0 + momentum) / curvatures[0])


def configurations(name: str, n_samples: int, curvatures: NDArray[np.float64]) -> list[Run]:
    """Return the task's runs.

    Args:
        name:
            Of the task.
        n_samples:
            N.
        curvatures:
            Of the loss at the pretrained weights, descending.

    Returns:
        Full-batch runs first for the networks of the paper's protocol, mini-batch runs, these
        again with another order of the samples, and the grid of the closed loop.
    """
    rng = np.random.default_rng(int(name.rpartition("-")[2]) + 100 * len(name))
    paper = name.startswith("efficientnet")
    transformer = name.startswith("minilm")
    longest = 450 if paper else 300 if transformer else 1500
    # Full-batch runs of the transformer would take longer than all others together.
    n_full = 0 if transformer else 5
    runs: list[Run] = []
    for share, momentum in zip(_shares(n_full, rng), _momenta(n_full, rng), strict=True):
        rate = share * scale(curvatures, n_samples, n_samples, momentum)
        horizon = HORIZON if paper else longest
        runs.append(Run(rate, n_samples, momentum, 0, horizon, share))
    n_minibatch = 6 if paper else 12
    batch_sizes = np.tile(rng.permutation(_SIZES), n_minibatch // 3)
    for share, momentum, a_batch_size in zip(
        _shares(n_minibatch, rng), _momenta(n_minibatch, rng), batch_sizes, strict=True
    ):
        rate = share * scale(curvatures, n_samples, int(a_batch_size), momentum)
        runs.append(
            Run(rate, int(a_batch_size), momentum, 0, longest if share > 0.05 else HORIZON, share)
        )
    again = [
        Run(r.learning_rate, r.batch_size, r.momentum, 1, r.max_steps, r.learning_rate_share)
        for r in runs
        if r.batch_size < n_samples
    ]
    if paper:
        again = [
            Run(r.learning_rate, r.batch_size, r.momentum, 1, HORIZON, r.learning_rate_share)
            for r in again
        ]
    if paper or transformer:
        return runs + again
    return runs + again + _grid(n_samples, curvatures, rng, _GRID_STEPS[name.partition("-")[0]])


def _grid(
    n_samples: int, curvatures: NDArray[np.float64], rng: np.random.Generator, max_steps: int
) -> list[Run]:
    momenta = np.resize(rng.permutation(_GRID_MOMENTA), _GRID_SIZE)
    # Every momentum meets every batch size.
    batch_sizes = np.resize(
        np.repeat(rng.permutation(_GRID_SIZES), len(_GRID_MOMENTA)), _GRID_SIZE
    )
    runs = []
    for share, momentum, a_batch_size in zip(
        _shares(_GRID_SIZE, rng, _GRID_DECADES), momenta, batch_sizes, strict=True
    ):
        rate = share * scale(curvatures, n_samples, int(a_batch_size), momentum)
        runs.append(Run(rate, int(a_batch_size), momentum, 0, max_steps, share))
    return runs


def train(
    tuning: Tuning, run: Run, *, clock: Callable[[], float] = time.perf_counter
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Train a copy of the network.

    Args:
        tuning:
            Network and data.
        run:
            The configuration.
        clock:
            What seconds are told by. Real time by default.

    Returns:
        Mini-batch losses of shape ``(T,)``; steps, training losses over all samples and training
        accuracies, of shape ``(3, F)``; seconds of training.
    """
    model = copy.deepcopy(tuning.model)
    optimiser = torch.optim.SGD(model.parameters(), lr=run.learning_rate, momentum=run.momentum)
    n_samples = len(tuning.labels)
    batches = mini_batches(n_samples, run.batch_size, run.seed)
    losses: list[float] = []
    full: list[tuple[float, float, float]] = []
    seconds = 0.0
    initial = math.nan
    for step in range(run.max_steps + 1):
        if run.batch_size < n_samples and _is_recorded(step):
            full.append((step, *evaluate(model, tuning)))
            initial = full[0][1]
            if step >= HORIZON and full[-1][1] < _DEEPEST * initial:
                break
        started = clock()
        optimiser.zero_grad()
        loss, hits = accumulate_gradient(model, tuning, next(batches))
        optimiser.step()
        seconds += clock() - started
        losses.append(loss)
        if run.batch_size == n_samples:
            full.append((step, loss, hits / n_samples))
            initial = losses[0]
            if step >= HORIZON and loss < _DEEPEST * initial:
                break
        if not math.isfinite(loss) or loss > 1e4 * max(initial, 1.0):
            break
    return np.array(losses), np.array(full).T, seconds


def _is_recorded(step: int) -> bool:
    return step < 10 or step % (5 if step <= HORIZON else 10 if step <= 300 else 30) == 0


def _shares(count: int, rng: np.random.Generator, decades: float = 2.0) -> NDArray[np.float64]:
    """Log-uniform over so many decades up to 1, one in each of equal parts, shuffled."""
    parts = (rng.permutation(count) + rng.random(count)) / count
    return np.asarray(10.0 ** (decades * (parts - 1.0)))


def _momenta(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    return np.resize(rng.permutation(_MOMENTA), count)


def read(path: Path) -> Recording:
    """Read a recording.

    Args:
        path:
            Of its file.

    Returns:
        The recording.
    """
    header, arrays = read_archive(path)
    return Recording([Run(**run) for run in header["runs"]], **arrays)


def append(
    path: Path,
    run: Run,
    losses: NDArray[np.float64],
    full: NDArray[np.float64],
    seconds: float,
) -> None:
    """Add a run to a recording's file.

    Args:
        path:
            Of the file; it is made where it is not there.
        run:
            The configuration.
        losses:
            Mini-batch losses, shape ``(T,)``.
        full:
            Steps, losses and accuracies over all samples, shape ``(3, F)``.
        seconds:
            Of training.
    """
    old = read(path) if path.exists() else None
    runs = [run] if old is None else [*old.runs, run]
    rows = {
        key: [row] if old is None else [*getattr(old, key), row]
        for key, row in zip(
            ("batch_losses", "full_steps", "full_losses", "full_accuracies"),
            (losses, *full),
            strict=True,
        )
    }
    header = {"environment": environment(), "runs": [vars(r) for r in runs]}
    write_archive(path, header, rows, [*([] if old is None else old.seconds), seconds])


if __name__ == "__main__":
    main()
