"""Sixteen workers on one PostgreSQL: a study of 500 short trials with and without this package.

A trial sleeps for some seconds, as one does that trains elsewhere, and reports five values. Both
studies use TPE and the median pruner; one of them wraps both, reads its spectrum from a store in
the study's own database, and records training curves. No trial stops early, so that both do the
same work: what differs is what this package costs. The clock starts when all workers are ready
(imports, spectrum, the predictor's response surface, one trial each), which is told on its own.
Writes ``study.json`` and ``study.md``.

Run with ``python -m benchmarks.store.study``.
"""

from __future__ import annotations

import argparse
from collections import Counter
import json
import math
import multiprocessing
from multiprocessing.synchronize import Barrier
from pathlib import Path
import statistics
import time
from typing import Any

import optuna
import torch

from benchmarks.environment import environment
from optuna_ttp import BestMetric
from optuna_ttp import SpectrumStore
from optuna_ttp import TrainingLog
from optuna_ttp import TrainingTimePredictor
from optuna_ttp import TTPPruner
from optuna_ttp import TTPSampler
from tests import faults
from tests.servers import PostgreSQL


_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["tests.faults", "optuna_ttp.prediction._predictor", "optuna_ttp.search._sampler"]
)
_REPORTS = 5


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="8 trials of 4 workers, once")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a trial (default: 5)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    n_trials, n_workers = (8, 4) if options.smoke else (500, 16)
    seconds = 0.1 if options.smoke else options.seconds
    results: list[dict[str, Any]] = []
    server = PostgreSQL(durable=True)
    try:
        for i in range(1 if options.smoke else options.rounds):
            # The order alternates: the machine may have other work.
            for wrapped in (False, True) if i % 2 == 0 else (True, False):
                result = _study(server.new_database(), wrapped, n_trials, n_workers, seconds)
                print(json.dumps(result), flush=True)
                results.append(result)
    finally:
        server.close()
    summary = {"environment": environment(), "trial_seconds": seconds, "studies": results}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "study.json").write_text(json.dumps(summary, indent=2) + "\n")
    text = _table(results)
    (options.output / "study.md").write_text(text)
    print(text)


def _study(
    url: str, wrapped: bool, n_trials: int, n_workers: int, seconds: float
) -> dict[str, Any]:
    optuna.create_study(storage=url, study_name="study")
    ready = _processes.Barrier(n_workers + 1)
    shares = [n_trials // n_workers + (i < n_trials % n_workers) for i in range(n_workers)]
    workers = [
        _processes.Process(target=_work, args=(url, wrapped, share, seconds, i, ready))
        for i, share in enumerate(shares)
    ]
    begun = time.perf_counter()
    for worker in workers:
        worker.start()
    ready.wait()
    started = time.perf_counter()
    for worker in workers:
        worker.join()
    elapsed = time.perf_counter() - started
    n_done = n_trials + n_workers
    trials = optuna.load_study(storage=url, study_name="study").trials
    states = Counter(trial.state.name for trial in trials)
    store = SpectrumStore(url) if wrapped else None
    return {
        "wrapped": wrapped,
        "seconds_until_ready": round(started - begun, 2),
        "seconds": round(elapsed, 2),
        "trials_per_second": round(n_trials / elapsed, 3),
        "states": dict(states),
        "numbers_complete": sorted(t.number for t in trials) == list(range(n_done)),
        "failed_workers": sum(worker.exitcode != 0 for worker in workers),
        "spectra": None if store is None else len(store.list()),
        "store_clean": None if store is None else store.verify().is_clean,
    }


def _work(
    url: str, wrapped: bool, n_trials: int, seconds: float, seed: int, ready: Barrier
) -> None:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler: optuna.samplers.BaseSampler = optuna.samplers.TPESampler(seed=seed)
    pruner: optuna.pruners.BasePruner = optuna.pruners.MedianPruner()
    if wrapped:
        spectrum = SpectrumStore(url).get_or_compute(
            faults.task(0, 60),
            explained_trace=0.95,
            measure_speed=False,
            show_progress_bar=False,
        )
        predictor = TrainingTimePredictor(spectrum, target_fraction=0.5)
        goal = BestMetric()
        sampler = TTPSampler(predictor, goal, sampler)
        pruner = TTPPruner(predictor, goal, pruner)
    study = optuna.load_study(storage=url, study_name="study", sampler=sampler, pruner=pruner)

    def objective(trial: optuna.Trial) -> float:
        rate = trial.suggest_float("learning_rate", 1e-4, 1.0, log=True)
        trial.suggest_categorical("batch_size", [8, 16, 32, 64])
        momentum = trial.suggest_float("momentum", 0.0, 0.95)
        trial.should_prune()
        decay = math.exp(-rate / (1 - momentum) / 10)
        if wrapped:
            with TrainingLog(trial) as log:
                for step in range(50):
                    log.step(2.3 * decay**step)
        for step in range(_REPORTS):
            time.sleep(seconds / _REPORTS)
            trial.report(decay**step, step)
            trial.should_prune()
        return decay

    study.optimize(objective, n_trials=1)
    ready.wait()
    study.optimize(objective, n_trials=n_trials)


def _table(results: list[dict[str, Any]]) -> str:
    rates = {
        wrapped: [r["trials_per_second"] for r in results if r["wrapped"] == wrapped]
        for wrapped in (False, True)
    }
    lines = [
        "| sampler and pruner | seconds until ready | trials a second | finished | lost, failed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for wrapped, name in ((False, "TPE, median"), (True, "the same, wrapped")):
        runs = [r for r in results if r["wrapped"] == wrapped]
        finished = sum(r["states"].get("COMPLETE", 0) for r in runs)
        total = sum(sum(r["states"].values()) for r in runs)
        shown = ", ".join(f"{rate:.2f}" for rate in rates[wrapped])
        begun = ", ".join(f"{r['seconds_until_ready']:.0f}" for r in runs)
        lines.append(f"| {name} | {begun} | {shown} | {finished} | {total - finished} |")
    ratio = statistics.median(rates[True]) / statistics.median(rates[False])
    return "\n".join(lines) + f"\n\nThroughput with over without, by medians: {ratio:.2f}.\n"


if __name__ == "__main__":
    main()
