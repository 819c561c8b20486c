"""Record the tasks that searches are replayed on: every configuration of a grid, trained for real.

Keeps a file ``TASK.npz`` of learning curves in ``results/recordings``, and in ``results/spectra``
the spectrum that the predictor gets: that of a random subset, as a search pays for it. Runs that
are there are not made again, so that recording can be stopped at any time. Seconds are processor
time of one thread, which a busy machine does not stretch.

A study of several workers need not wait for one of them: under ``torchrun`` they compute the
spectrum together. What that takes is measured by processes of one thread each, and kept as well.

Run with ``python -m benchmarks.search.record TASK ...``; with ``--seconds`` it stops after a
while, with exit status 75 where runs are missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
import copy
from dataclasses import replace
import json
import math
from pathlib import Path
import sys
import tempfile
import time
from unittest import mock

import numpy as np
import torch

from benchmarks.environment import environment
from benchmarks.processes import group
from benchmarks.processes import run_together
from benchmarks.search.recording import read
from benchmarks.search.recording import Run
from benchmarks.search.recording import write
from benchmarks.search.tasks import load
from benchmarks.search.tasks import SearchTask
from optuna_ttp import compute_spectrum
from optuna_ttp import FineTuningTask
from optuna_ttp.spectrum import measure_throughput


RESULTS = Path(__file__).parent / "results"
# What is kept of the spectrum, as the README recommends it.
EXPLAINED_TRACE = 0.99
# The spectrum of all 200 and of 250 validation samples takes as long as four trials of the digits
# network, and a search with it is no faster: a fair price is part of what is compared. No spectrum
# is to cost more than about one trial: that of the transformer, whose samples are the dearest,
# has fewer.
_SPECTRUM_SAMPLES, _DEAR = 64, {"minilm": 32}
# How this machine compares with that of the recording: so many epochs of each batch size.
_TIMED_EPOCHS = 4
_NEXT_TO_NOTHING = 1e-9
# Workers that compute a spectrum together where there are several.
N_PROCESSES = 4
_UNFINISHED = 75
# Images that go through the network together when it is evaluated.
_CHUNK = 50
# A loss so many times the initial one does not come down again.
_BLOWN_UP = 1e4
_WRITE_EVERY_SECONDS = 30.0


def main() -> None:
    """Record the tasks that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--max-runs", type=int, default=10_000, help="runs a task")
    parser.add_argument("--without-spectrum", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    deadline = time.monotonic() + options.seconds
    for name in options.tasks:
        if not record(
            name,
            options.output,
            deadline=deadline,
            max_runs=options.max_runs,
            with_spectrum=not options.without_spectrum,
        ):
            sys.exit(_UNFINISHED)


def record(
    name: str,
    output: Path,
    *,
    deadline: float = math.inf,
    max_runs: int = 10_000,
    with_spectrum: bool = True,
) -> bool:
    """Record what is missing of a task.

    Args:
        name:
            Of the task.
        output:
            The folder of the results.
        deadline:
            When to stop, as :func:`time.monotonic` tells it. Never by default.
        max_runs:
            The runs to have. All of the grid by default.
        with_spectrum:
            Whether to compute the spectrum, too. It is by default.

    Returns:
        Whether nothing is missing any more.
    """
    path = output / "recordings" / f"{name}.npz"
    spectrum_path = output / "spectra" / f"{name}.ttp"
    for folder in (path.parent, spectrum_path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    runs = read(path) if path.exists() else []
    task = load(name)
    if with_spectrum and not spectrum_path.exists():
        _record_spectrum(task, spectrum_path, runs)
    done = {run.configuration for run in runs}
    configurations = task.grid.configurations()
    # Shuffled, so that the first ones are a fair sample and a busy minute hits all alike.
    order = np.random.default_rng(0).permutation(len(configurations))
    missing = [c for c in (configurations[k] for k in order[:max_runs]) if c not in done]
    written = time.monotonic()
    for count, configuration in enumerate(missing):
        if time.monotonic() > deadline:
            print(f"{name}: {len(missing) - count} runs are missing", flush=True)
            return False
        runs.append(train(task, *configuration))
        if count == len(missing) - 1 or time.monotonic() > min(
            deadline, written + _WRITE_EVERY_SECONDS
        ):
            write(path, runs)
            written = time.monotonic()
    print(f"{name}: {len(runs)} runs", flush=True)
    return True


def spectrum_samples(name: str, n_samples: int) -> int:
    """Return how many samples the spectrum of a task has.

    Args:
        name:
            Of the task.
        n_samples:
            That are trained on.

    Returns:
        A count.
    """
    return min(_DEAR.get(name.partition("-")[0], _SPECTRUM_SAMPLES), n_samples)


def _record_spectrum(task: SearchTask, path: Path, runs: list[Run]) -> None:
    """Keep the spectrum, and beside it what it took and how many samples are trained on."""
    part = _part(path.stem, task.tuning.task())
    slowness = _slowness(task, runs)
    # What it took, and the seconds of a step, in the seconds of the recording.
    with mock.patch.object(time, "perf_counter", time.process_time):
        spectrum = compute_spectrum(part, explained_trace=EXPLAINED_TRACE)
        started = time.perf_counter()
        measure_throughput(part, device=torch.device("cpu"))
        timing = time.perf_counter() - started
    together = _seconds_together(path.stem) + timing
    about = {
        "n_samples": len(task.tuning.labels),
        # An epoch of training takes so many times as long as when the runs were recorded, on
        # another machine maybe. Seconds are those of the recording.
        "slowness": round(slowness, 4),
        "seconds": round(spectrum.metadata.compute_seconds / slowness, 6),
        "n_processes": N_PROCESSES,
        # One of them times training steps alone.
        "seconds_together": round(together / slowness, 6),
        "environment": environment(),
    }
    path.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")
    spectrum.save(path)
    print(f"{path.stem}: {spectrum!r} in {spectrum.metadata.compute_seconds:.1f} s", flush=True)


def _part(name: str, whole: FineTuningTask) -> FineTuningTask:
    return whole.subset(spectrum_samples(name, whole.n_samples))


def _slowness(task: SearchTask, runs: list[Run]) -> float:
    """Processor seconds of an epoch over the recorded ones; one where nothing is recorded."""
    ratios = []
    for a_batch_size in {run.batch_size for run in runs}:
        recorded = np.concatenate(
            [r.training_seconds for r in runs if r.batch_size == a_batch_size]
        )
        untrained = replace(
            task, tuning=replace(task.tuning, model=copy.deepcopy(task.tuning.model))
        )
        optimiser = torch.optim.SGD(untrained.tuning.model.parameters(), lr=_NEXT_TO_NOTHING)
        generator = torch.Generator().manual_seed(0)
        seconds = []
        for _ in range(_TIMED_EPOCHS):
            started = time.process_time()
            for _ in epoch(untrained.tuning.model, untrained, optimiser, a_batch_size, generator):
                pass
            seconds.append(time.process_time() - started)
        ratios.append(float(np.median(seconds) / np.median(recorded)))
    return float(np.median(ratios)) if ratios else 1.0


def _seconds_together(name: str) -> float:
    """Processor seconds of the slowest of the processes that compute a spectrum together."""
    with tempfile.TemporaryDirectory() as folder:
        run_together(_process, N_PROCESSES, name, folder)
        return max(float(Path(folder, str(rank)).read_text()) for rank in range(N_PROCESSES))


def _process(rank: int, name: str, folder: str) -> None:
    torch.set_num_threads(1)
    part = _part(name, load(name).tuning.task())
    with group(rank, N_PROCESSES, folder):
        started = time.process_time()
        compute_spectrum(
            part,
            explained_trace=EXPLAINED_TRACE,
            engine="exact",
            measure_speed=False,
            distributed=True,
        )
        Path(folder, str(rank)).write_text(str(time.process_time() - started))


def train(task: SearchTask, learning_rate: float, batch_size: int, momentum: float) -> Run:
    """Train a copy of the network and look at it after every epoch.

    Args:
        task:
            Network, data and the number of epochs.
        learning_rate:
            Of SGD.
        batch_size:
            Of SGD.
        momentum:
            Of SGD.

    Returns:
        The run.
    """
    tuning = task.tuning
    model = copy.deepcopy(tuning.model)
    optimiser = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum)
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    training = [evaluate(model, task, held_out=False)]
    started = time.process_time()
    validation = [evaluate(model, task, held_out=True)]
    validation_seconds = time.process_time() - started
    epoch_seconds: list[float] = []
    for _ in range(task.grid.n_epochs):
        started = time.process_time()
        finished = True
        for loss in epoch(model, task, optimiser, batch_size, generator):
            losses.append(loss)
            if not math.isfinite(loss) or loss > _BLOWN_UP * max(losses[0], 1.0):
                finished = False
                break
        epoch_seconds.append(time.process_time() - started)
        training.append(evaluate(model, task, held_out=False) if finished else _NOTHING)
        started = time.process_time()
        validation.append(evaluate(model, task, held_out=True) if finished else _NOTHING)
        validation_seconds += time.process_time() - started
        if not finished:
            break
    return Run(
        learning_rate=learning_rate,
        batch_size=batch_size,
        momentum=momentum,
        batch_losses=np.array(losses),
        training_loss=np.array([loss for loss, _ in training]),
        training_accuracy=np.array([accuracy for _, accuracy in training]),
        validation_loss=np.array([loss for loss, _ in validation]),
        validation_accuracy=np.array([accuracy for _, accuracy in validation]),
        training_seconds=np.array(epoch_seconds),
        validation_seconds=validation_seconds / len(validation),
    )


_NOTHING = (math.nan, math.nan)


def epoch(
    model: torch.nn.Module,
    task: SearchTask,
    optimiser: torch.optim.Optimizer,
    batch_size: int,
    generator: torch.Generator,
) -> Iterator[float]:
    """Train through all samples once, in a random order.

    Args:
        model:
            Trained in place.
        task:
            The data and the loss.
        optimiser:
            Of the model's parameters.
        batch_size:
            Samples a step; the last one may have fewer.
        generator:
            Draws the order.

    Yields:
        The mini-batch loss of every step, before the step.
    """
    tuning = task.tuning
    for chosen in torch.randperm(len(tuning.labels), generator=generator).split(batch_size):
        optimiser.zero_grad()
        loss = tuning.loss(model(tuning.inputs[chosen]), tuning.labels[chosen])
        loss.backward()
        optimiser.step()
        yield float(loss.detach())


def evaluate(model: torch.nn.Module, task: SearchTask, *, held_out: bool) -> tuple[float, float]:
    """Return loss and accuracy of a network.

    Args:
        model:
            The network.
        task:
            The data.
        held_out:
            Whether to take the validation samples instead of those that are trained on.

    Returns:
        The mean loss, and the accuracy, which is NaN in a regression.
    """
    if held_out:
        inputs, labels = task.validation_inputs, task.validation_labels
    else:
        inputs, labels = task.tuning.inputs, task.tuning.labels
    total, hits = 0.0, 0
    with torch.no_grad():
        for part in torch.arange(len(labels)).split(_CHUNK):
            outputs = model(inputs[part])
            total += float(task.tuning.loss(outputs, labels[part])) * len(part)
            if not labels.is_floating_point():
                hits += int((outputs.argmax(dim=1) == labels[part]).sum())
    accuracy = math.nan if labels.is_floating_point() else hits / len(labels)
    return total / len(labels), accuracy


if __name__ == "__main__":
    main()
