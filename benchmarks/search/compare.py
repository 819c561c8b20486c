"""Samplers and pruners on the recorded tasks: seconds until a search is close to the grid's best.

Writes ``searches.csv`` (a line a search) and ``regrets.npz`` (regret against seconds), and from
these tables, pictures and ``summary.json`` with :mod:`benchmarks.search.summary`; the newest
``summary.json`` also lies beside the modes' folders.

Run with ``python -m benchmarks.search.compare`` for everything (hours), with ``--reduced`` for
fewer seeds and the samplers that are cheap to run (under half an hour on two cores), with
``--smoke`` for a look (under a minute).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from collections.abc import Sequence
import csv
from dataclasses import dataclass
from dataclasses import replace
from functools import lru_cache
import importlib
import json
import multiprocessing
from pathlib import Path
import shutil
import time
from typing import Any
import warnings

import numpy as np
from numpy.typing import NDArray
import optuna

from benchmarks.environment import environment
from benchmarks.search import contestants
from benchmarks.search.replay import replay
from benchmarks.search.replay import Search
from benchmarks.search.searches import read
from benchmarks.search.summary import summarise
from benchmarks.search.table import Goal
from benchmarks.search.table import recorded
from benchmarks.search.table import Table
from benchmarks.search.table import TARGET_FRACTION
from optuna_ttp import OptunaTTPWarning
from optuna_ttp import Spectrum
from optuna_ttp import TrainingTimePredictor


RESULTS = Path(__file__).parent / "results"
# Searches end when they would have trained so many average configurations to the end.
_BUDGET_TRIALS = 100
# Where regrets are kept: seconds over those of an average configuration, for all workers together.
TIMES = np.geomspace(0.5, _BUDGET_TRIALS, 40)
_GP_SEEDS = 10


@dataclass(frozen=True)
class Job:
    """Searches that differ in the seed only.

    Attributes:
        task:
            Name of the recorded task.
        goal:
            What is searched for.
        contestant:
            Who searches.
        n_workers:
            Simulated ones.
        seeds:
            Of the samplers.
    """

    task: str
    goal: Goal
    contestant: str
    n_workers: int
    seeds: tuple[int, ...]

    def without(self, done: set[tuple[Any, ...]]) -> Job:
        """Return what is left of it.

        Args:
            done:
                Goal, number of workers, task, contestant and seed of the searches that were made.
        """
        of = (self.goal, self.n_workers, self.task, self.contestant)
        return replace(self, seeds=tuple(s for s in self.seeds if (*of, s) not in done))


@dataclass(frozen=True)
class Plan:
    """Which searches are made.

    Attributes:
        tasks:
            Recorded ones.
        standard:
            The pairs of a standard sampler and pruner.
        others:
            The other contestants.
        n_seeds:
            Of each.
        n_workers:
            Numbers of simulated workers.
        goals:
            What is searched for.
    """

    tasks: tuple[str, ...]
    standard: tuple[str, ...]
    others: tuple[str, ...]
    n_seeds: int
    n_workers: tuple[int, ...] = (1, 4)
    goals: tuple[Goal, ...] = ("metric", "time")

    def jobs(self) -> list[Job]:
        """Return the searches, the slowest ones first."""
        jobs = []
        for goal in self.goals:
            # Whoever searches for a time is compared with TPE alone, by one worker.
            standard = self.standard if goal == "metric" else ("tpe + none", "random + none")
            for n_workers in self.n_workers if goal == "metric" else (1,):
                for name in (*standard, *self.others):
                    slow = "gp" in name or name == contestants.COST
                    count = min(self.n_seeds, _GP_SEEDS) if slow else self.n_seeds
                    jobs += [
                        Job(task, goal, name, n_workers, tuple(range(count)))
                        for task in self.tasks
                    ]
        return sorted(jobs, key=lambda job: "gp" not in job.contestant)


def plan(mode: str, tasks: tuple[str, ...]) -> Plan:
    """Return what a mode searches.

    Args:
        mode:
            ``"smoke"``, ``"reduced"`` or ``"whole"``.
        tasks:
            All recorded tasks.

    Returns:
        The plan.
    """
    others = (*contestants.OURS, *contestants.SHUFFLED, contestants.COST)
    whole = Plan(
        tasks,
        contestants.STANDARD,
        (*others, contestants.RULE, contestants.KNOWN),
        n_seeds=30,
    )
    if mode == "whole":
        return whole
    cheap = tuple(name for name in whole.others if "(gp)" not in name and name != contestants.COST)
    if mode == "reduced":
        standard = tuple(name for name in contestants.STANDARD if not name.startswith("gp"))
        return replace(whole, standard=standard, others=cheap, n_seeds=5)
    standard = ("random + none", "tpe + none", "tpe + median", "tpe + hyperband")
    few = ("ours (tpe)", "ours (tpe), shuffled")
    return Plan(tasks[:1], standard, few, n_seeds=2, n_workers=(1, 4))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--smoke", action="store_const", dest="mode", const="smoke")
    modes.add_argument("--reduced", action="store_const", dest="mode", const="reduced")
    parser.set_defaults(mode="whole")
    parser.add_argument("--tasks", nargs="+", help="all that are recorded by default")
    parser.add_argument("--contestants", nargs="+", help="those of the mode by default")
    parser.add_argument("--seeds", type=int, help="as many as the mode has by default")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--resume", action="store_true", help="keep the searches that are there")
    parser.add_argument("--recordings", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, help="results/MODE by default")
    options = parser.parse_args()
    names = options.tasks or complete_tasks(options.recordings)
    chosen = plan(options.mode, tuple(names))
    if options.seeds is not None:
        chosen = replace(chosen, n_seeds=options.seeds)
    jobs = chosen.jobs()
    if options.contestants:
        jobs = [job for job in jobs if job.contestant in options.contestants]
    output = options.output or RESULTS / options.mode
    output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    regrets: list[NDArray[np.float64]] = []
    if options.resume and (output / "searches.csv").exists():
        rows, regrets = read(output)
        done = {_identity(row) for row in rows}
        jobs = [rest for job in jobs if (rest := job.without(done)).seeds]
    started = time.perf_counter()
    for some_rows, some_regrets in run(jobs, options.recordings, options.jobs):
        rows += some_rows
        regrets += some_regrets
        # After every job, so that a run that is stopped goes on with --resume.
        _write(output, rows, regrets)
    about = {"environment": environment(), "seconds": round(time.perf_counter() - started)}
    (output / "run.json").write_text(json.dumps(about, indent=2) + "\n")
    summarise(output)
    if options.output is None and options.mode != "smoke":
        # The newest figures, whichever run they are from.
        shutil.copy(output / "summary.json", RESULTS)


def complete_tasks(folder: Path) -> list[str]:
    """Return the tasks whose recordings hold every run of their grid.

    Args:
        folder:
            Of the results.

    Returns:
        Names, sorted.
    """
    names = []
    for path in sorted((folder / "recordings").glob("*.npz")):
        try:
            recorded(path.stem, path.parent, "metric")
        except ValueError as error:
            print(f"Left out: {error}", flush=True)
            continue
        if (folder / "spectra" / f"{path.stem}.ttp").exists():
            names.append(path.stem)
    return names


def run(
    jobs: Sequence[Job], recordings: Path, n_processes: int
) -> Iterator[tuple[list[dict[str, Any]], list[NDArray[np.float64]]]]:
    """Make searches.

    Args:
        jobs:
            Which.
        recordings:
            The folder of the results.
        n_processes:
            How many at once.

    Yields:
        A row a search, and their regrets at :data:`TIMES`, of one job after the other.
    """
    work = [(job, recordings) for job in jobs]
    context = multiprocessing.get_context("spawn")
    with context.Pool(n_processes, initializer=_quiet) as pool:
        for count, (rows, regrets) in enumerate(pool.imap_unordered(_searched, work)):
            seconds = np.median([row["seconds_to_close"] for row in rows])
            first = rows[0]
            print(
                f"{count + 1}/{len(work)} {first['task']}, {first['goal']}, "
                f"{first['workers']} workers, {first['contestant']}: {seconds:.1f} s "
                f"(oracle {first['oracle_seconds']:.1f} s)",
                flush=True,
            )
            yield rows, regrets


def _write(output: Path, rows: list[dict[str, Any]], regrets: list[NDArray[np.float64]]) -> None:
    order = sorted(range(len(rows)), key=lambda k: _identity(rows[k]))
    with (output / "searches.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows[k] for k in order)
    compressed = np.array([regrets[k] for k in order]).astype(np.float16)
    np.savez_compressed(output / "regrets.npz", times=TIMES, regrets=compressed)


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("goal", "workers", "task", "contestant", "seed"))


def _quiet() -> None:
    # What is imported when it is first needed must not be charged to whoever comes first.
    for name in ("scipy.stats", "sklearn.gaussian_process"):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", OptunaTTPWarning)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)


def _searched(
    work: tuple[Job, Path],
) -> tuple[list[dict[str, Any]], list[NDArray[np.float64]]]:
    job, recordings = work
    rows, regrets = [], []
    for seed in job.seeds:
        row, regret = search(job, seed, recordings)
        rows.append(row)
        regrets.append(regret)
    return rows, regrets


def search(job: Job, seed: int, recordings: Path) -> tuple[dict[str, Any], NDArray[np.float64]]:
    """Make one search.

    Args:
        job:
            Who searches for what.
        seed:
            Of the sampler.
        recordings:
            The folder of the results.

    Returns:
        Its row, and its regrets at :data:`TIMES`.
    """
    table = _table(job.task, job.goal, recordings)
    players = contestants.players(
        job.contestant,
        table,
        seed,
        lambda: predictor_of(job.task, recordings, job.n_workers)[0],
    )
    setup = predictor_of(job.task, recordings, job.n_workers)[1] if players.predicts else 0.0
    unit = table.mean_seconds / job.n_workers
    finished = replay(
        table,
        players.sampler,
        players.pruner,
        budget_seconds=_BUDGET_TRIALS * unit,
        n_workers=job.n_workers,
        setup_seconds=setup,
        logged=players.predicts,
    )
    return _row(job, seed, finished, _BUDGET_TRIALS * unit), finished.regret_at(TIMES * unit)


def _row(job: Job, seed: int, finished: Search, budget: float) -> dict[str, Any]:
    winners, pruned = finished.winners()
    figures = {
        "oracle_seconds": finished.table.oracle_seconds,
        "budget_seconds": budget,
        "seconds_to_close": finished.seconds_to_close,
        "seconds_to_best": finished.seconds_to_best,
        "setup_seconds": finished.setup_seconds,
        "overhead_seconds": finished.overhead_seconds,
    }
    return {
        "task": job.task,
        "goal": job.goal,
        "workers": job.n_workers,
        "contestant": job.contestant,
        "seed": seed,
        **{key: float(f"{value:.6g}") for key, value in figures.items()},
        "trials": len(finished.trials),
        "pruned": sum(trial.pruned for trial in finished.trials),
        "pruned_before_training": sum(t.pruned and t.epochs == 0 for t in finished.trials),
        "winners": winners,
        "wrongly_pruned": pruned,
    }


@lru_cache(maxsize=4)
def _table(task: str, goal: Goal, recordings: Path) -> Table:
    return recorded(task, recordings / "recordings", goal)


@lru_cache(maxsize=4)
def predictor_of(
    task: str, recordings: Path, n_workers: int = 1
) -> tuple[TrainingTimePredictor, float]:
    """Return our predictor, and what spectrum and response surface took.

    It is built once and charged to every search. Several workers compute the spectrum together,
    or wait for one of them where that takes less; each builds a response surface.

    Args:
        task:
            Name of the recorded task.
        recordings:
            The folder of the results.
        n_workers:
            One, or as many as the spectrum was computed by. One by default.

    Raises:
        ValueError:
            If the spectrum was computed by another number of processes.
    """
    path = recordings / "spectra" / f"{task}.ttp"
    spectrum = Spectrum.load(path)
    about = json.loads(path.with_suffix(".json").read_text())
    if n_workers not in (1, about["n_processes"]):
        raise ValueError(
            f"The spectrum of {task} was computed by one and by {about['n_processes']} processes "
            f"but got n_workers={n_workers}."
        )
    started = time.process_time()
    predictor = TrainingTimePredictor(
        spectrum, target_fraction=TARGET_FRACTION, n_samples=about["n_samples"]
    )
    # Builds the surface, and what else is derived once.
    predictor.estimate(0.01, min(8, predictor.n_samples), 0.9)
    _ = predictor.best_depth
    seconds = time.process_time() - started
    spent = float(about["seconds"])
    if n_workers > 1:
        spent = min(spent, float(about["seconds_together"]))
    return predictor, seconds + spent


if __name__ == "__main__":
    main()
