"""Real searches, not replayed: ours against TPE with Hyperband, for the same seconds.

Every trial trains the network. Seconds are processor time of one thread, that of the spectrum, of
samplers and of pruners included. Writes ``trials.csv`` (a line a trial), ``real.json`` and
``real.md`` to ``results/real``.

Run with ``python -m benchmarks.search.real``.
"""

from __future__ import annotations

import argparse
import copy
import csv
from dataclasses import dataclass
import json
import math
from pathlib import Path
import time
from typing import Any
from unittest import mock
import warnings

import numpy as np
import optuna
import torch

from benchmarks.environment import environment
from benchmarks.search.record import epoch
from benchmarks.search.record import evaluate
from benchmarks.search.record import EXPLAINED_TRACE
from benchmarks.search.record import spectrum_samples
from benchmarks.search.table import TARGET_FRACTION
from benchmarks.search.tasks import load
from benchmarks.search.tasks import SearchTask
from optuna_ttp import BestMetric
from optuna_ttp import compute_spectrum
from optuna_ttp import OptunaTTPWarning
from optuna_ttp import TrainingLog
from optuna_ttp import TrainingTimePredictor
from optuna_ttp import TTPPruner
from optuna_ttp import TTPSampler


OURS = "ours (tpe)"
THEIRS = "tpe + hyperband"
_BUDGETS = {"digits-0": 60.0, "residual-0": 120.0}


@dataclass(frozen=True)
class Line:
    """One trial.

    Attributes:
        task:
            Name of the task.
        contestant:
            Who searched.
        seed:
            Of the sampler.
        number:
            Of the trial.
        ended:
            Seconds of the search when it ended.
        state:
            Of the trial.
        epochs:
            That were trained.
        value:
            Validation accuracy in the end; NaN where the trial did not get there.
        learning_rate:
            Of SGD.
        batch_size:
            Of SGD.
        momentum:
            Of SGD.
    """

    task: str
    contestant: str
    seed: int
    number: int
    ended: float
    state: str
    epochs: int
    value: float
    learning_rate: float
    batch_size: int
    momentum: float


def main() -> None:
    """Run the searches."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=list(_BUDGETS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, help="60 for digits and 120 otherwise by default")
    parser.add_argument("--smoke", action="store_true", help="one task, one seed, few seconds")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "real")
    options = parser.parse_args()
    if options.smoke:
        options.tasks, options.seeds, options.seconds = ["digits-0"], 1, 20.0
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", OptunaTTPWarning)
    lines: list[Line] = []
    for name in options.tasks:
        task = load(name)
        budget = options.seconds or _BUDGETS.get(name, 120.0)
        for seed in range(options.seeds):
            for contestant in (THEIRS, OURS):
                lines += search(task, contestant, seed, budget)
                print(f"{name}, seed {seed}, {contestant}: {len(lines)} trials", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "trials.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, vars(lines[0]).keys())
        writer.writeheader()
        writer.writerows(vars(line) for line in lines)
    figures = summary(lines)
    text = json.dumps({**figures, "environment": environment()}, indent=2)
    (options.output / "real.json").write_text(text + "\n")
    table = _table(figures)
    (options.output / "real.md").write_text(table)
    print(table)


def search(task: SearchTask, contestant: str, seed: int, budget: float) -> list[Line]:
    """Search for so many seconds.

    Args:
        task:
            Network, data and the range of the hyperparameters.
        contestant:
            :data:`OURS` or :data:`THEIRS`.
        seed:
            Of the sampler.
        budget:
            In seconds of processor time. A trial that still runs then is not counted.

    Returns:
        A line a trial.
    """
    started = time.process_time()
    sampler: optuna.samplers.BaseSampler = optuna.samplers.TPESampler(seed=seed)
    n_epochs = task.grid.n_epochs
    pruner: optuna.pruners.BasePruner = optuna.pruners.HyperbandPruner(max_resource=n_epochs)
    if contestant == OURS:
        with mock.patch.object(time, "perf_counter", time.process_time):
            whole = task.tuning.task()
            subset = whole.subset(spectrum_samples(task.tuning.name, whole.n_samples))
            spectrum = compute_spectrum(subset, explained_trace=EXPLAINED_TRACE)
        n_samples = len(task.tuning.labels)
        predictor = TrainingTimePredictor(
            spectrum, target_fraction=TARGET_FRACTION, n_samples=n_samples
        )
        goal = BestMetric(max_epochs=n_epochs)
        sampler = TTPSampler(predictor, goal, sampler, search_space=_search_space(task), seed=seed)
        pruner = TTPPruner(predictor, goal)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    lines: list[Line] = []
    while time.process_time() - started < budget:
        trial = study.ask()
        epochs, value = _train(task, trial, logged=contestant == OURS)
        if math.isnan(value):
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, value)
        ended = time.process_time() - started
        if ended <= budget:
            state = study.trials[-1].state.name
            about = (task.tuning.name, contestant, seed, trial.number, round(ended, 3), state)
            lines.append(Line(*about, epochs, value, **trial.params))
    return lines


def _search_space(task: SearchTask) -> dict[str, optuna.distributions.BaseDistribution]:
    rates = task.grid.learning_rates
    return {
        "learning_rate": optuna.distributions.FloatDistribution(rates[0], rates[-1], log=True),
        "batch_size": optuna.distributions.CategoricalDistribution(task.grid.batch_sizes),
        "momentum": optuna.distributions.FloatDistribution(0.0, 0.99),
    }


def _train(task: SearchTask, trial: optuna.Trial, *, logged: bool) -> tuple[int, float]:
    """The objective as a user writes it: epochs trained, and the last validation accuracy."""
    rates = task.grid.learning_rates
    rate = trial.suggest_float("learning_rate", rates[0], rates[-1], log=True)
    batch_size = trial.suggest_categorical("batch_size", task.grid.batch_sizes)
    momentum = trial.suggest_float("momentum", 0.0, 0.99)
    if trial.should_prune():
        return 0, math.nan
    model = copy.deepcopy(task.tuning.model)
    optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    generator = torch.Generator().manual_seed(trial.number)
    log = TrainingLog(trial) if logged else None
    accuracy = math.nan
    for k in range(task.grid.n_epochs):
        for loss in epoch(model, task, optimiser, batch_size, generator):
            if log is not None:
                log.step(loss)
            if not math.isfinite(loss):
                _close(log)
                return k + 1, math.nan
        _, accuracy = evaluate(model, task, held_out=True)
        trial.report(accuracy, k + 1)
        if trial.should_prune():
            _close(log)
            return k + 1, math.nan
    _close(log)
    return task.grid.n_epochs, accuracy


def _close(log: TrainingLog | None) -> None:
    if log is not None:
        log.close()


def summary(lines: list[Line]) -> dict[str, Any]:
    """Return what each contestant found, task by task and seed by seed.

    Args:
        lines:
            All trials.

    Returns:
        By task and contestant: the best accuracy, and the seconds until a search was within 1 %
        of the best accuracy that any search of the task has found; infinity is ``None``.
    """
    figures: dict[str, Any] = {}
    for task in sorted({line.task for line in lines}):
        mine = [line for line in lines if line.task == task]
        goal = 0.99 * max(line.value for line in mine if not math.isnan(line.value))
        figures[task] = {"close": goal}
        for contestant in (THEIRS, OURS):
            seeds = sorted({line.seed for line in mine})
            runs = [[k for k in mine if (k.contestant, k.seed) == (contestant, s)] for s in seeds]
            best = [max((k.value for k in run if k.value == k.value), default=0.0) for run in runs]
            reached = [min((k.ended for k in r if k.value >= goal), default=None) for r in runs]
            figures[task][contestant] = {
                "best": best,
                "seconds_to_close": reached,
                "trials": [len(run) for run in runs],
                "skipped": [sum(k.epochs == 0 for k in run) for run in runs],
            }
    return figures


def _table(figures: dict[str, Any]) -> str:
    lines = ["| | best accuracy | seconds to within 1 % of the best of all | trials (skipped) |"]
    lines.append("| --- | --- | --- | --- |")
    for task, of_task in figures.items():
        for contestant in (THEIRS, OURS):
            mine = of_task[contestant]
            seconds = [math.inf if s is None else s for s in mine["seconds_to_close"]]
            lines.append(
                f"| {task}, {contestant} | {np.median(mine['best']):.3f} "
                f"({min(mine['best']):.3f}..{max(mine['best']):.3f}) | {np.median(seconds):.1f} "
                f"({min(seconds):.1f}..{max(seconds):.1f}) | {np.median(mine['trials']):.0f} "
                f"({np.median(mine['skipped']):.0f}) |"
            )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
