"""What the search's own work costs: joining a study, learning from a trial, choosing the next.

A study of 1,000 trials on SQLite, with predictions and recorded curves: configurations of the
first digits grid, drawn at random, each with an exponential curve that takes its predicted time
times a random factor. Then, in the processor's seconds,

- joining: a process that knows nothing of the study reads it and learns from all trials, over
  reading the trials alone;
- updating: learning anew when one trial more is there, after 8, 32, 128 and 1,000 trials;
- choosing: ``study.ask`` with ours around TPE, less and over that of TPE alone on the same trials,
  medians over asks.

Writes ``overhead.json`` and ``overhead.md``. Run with ``python -m benchmarks.search.overhead``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
import json
import math
from pathlib import Path
import tempfile
import time
from typing import Any

import numpy as np
import optuna
import torch

from benchmarks.environment import environment
from benchmarks.search.compare import predictor_of
from benchmarks.search.compare import RESULTS
from benchmarks.search.table import recorded
from benchmarks.search.table import Table
from optuna_ttp import BestMetric
from optuna_ttp import SamplerRules
from optuna_ttp import TrainingLog
from optuna_ttp import TrainingTimePredictor
from optuna_ttp import TTPPruner
from optuna_ttp import TTPSampler
from optuna_ttp.study._learner import informed_by


_TASK = "digits-0"
_SIZES = (8, 32, 128, 1000)
_N_ASKED = 20
_N_REPEATS = 5
# Steps of the curves that are logged.
_MOST_STEPS = 200


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recordings", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="a study of 40 trials")
    options = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study_sizes = (8, 40) if options.smoke else _SIZES
    table = recorded(_TASK, options.recordings / "recordings", "metric")
    predictor, _ = predictor_of(_TASK, options.recordings)
    with tempfile.TemporaryDirectory() as folder:
        storage = f"sqlite:///{folder}/study.db"
        study = _studied(storage, table, predictor, study_sizes[-1])
        figures: dict[str, Any] = {
            "n_trials": study_sizes[-1],
            **_joining(study, storage, predictor),
        }
        figures["update_ms"] = {n: _updating(study, predictor, n) for n in study_sizes}
        figures |= _choosing(study, table, predictor)
    document = {"environment": environment(), **figures}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "overhead.json").write_text(json.dumps(document, indent=2) + "\n")
    text = _text(document)
    (options.output / "overhead.md").write_text(text)
    print(text)


def _seconds(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _studied(
    storage: str, table: Table, predictor: TrainingTimePredictor, n_trials: int
) -> optuna.Study:
    """Random configurations, with what was predicted and a curve each."""
    mapping = table.hyperparameters()
    study = optuna.create_study(
        study_name="overhead",
        storage=storage,
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=TTPPruner(
            predictor, BestMetric(max_epochs=table.n_epochs), hyperparameters=mapping
        ),
        direction="minimize",
    )
    rng = np.random.default_rng(0)
    share = predictor.target.value / predictor.initial_loss
    for _ in range(n_trials):
        trial = study.ask(table.search_space)
        trial.should_prune()
        configuration = mapping.resolve(trial.params)
        assert configuration is not None
        steps = float(predictor.estimate(*configuration).steps)
        steps = rng.lognormal(0.0, 0.2) * (steps if math.isfinite(steps) else 10.0 * _MOST_STEPS)
        n_steps = int(np.clip(steps, 3, _MOST_STEPS))
        with TrainingLog(trial, measure_speed=False) as log:
            for step in range(n_steps):
                log.step(predictor.initial_loss * share ** (step / steps))
        study.tell(trial, predictor.initial_loss * share ** (n_steps / steps))
    return study


def _joining(
    study: optuna.Study, storage: str, predictor: TrainingTimePredictor
) -> dict[str, float]:
    reading, joining = [], []
    for _ in range(_N_REPEATS):
        # A fresh connection each time: nothing is known of the trials.
        fresh = optuna.load_study(study_name=study.study_name, storage=storage)
        reading.append(_seconds(partial(fresh.get_trials, deepcopy=False)))
        fresh = optuna.load_study(study_name=study.study_name, storage=storage)
        joining.append(_seconds(partial(informed_by, fresh, predictor)))
    return {
        "joining_seconds": float(np.median(joining)),
        "joining_over_reading": float(np.median(joining) / np.median(reading)),
    }


def _updating(study: optuna.Study, predictor: TrainingTimePredictor, n_trials: int) -> float:
    """Milliseconds, with all but the last trial known already."""
    trials = study.get_trials(deepcopy=False)[:n_trials]
    part = optuna.create_study(study_name="part")
    part.add_trials(trials[:-1])
    informed_by(part, predictor)
    seconds = []
    for _ in range(_N_REPEATS):
        part.add_trial(trials[-1])
        seconds.append(_seconds(partial(informed_by, part, predictor)))
    return 1e3 * float(np.median(seconds))


def _choosing(
    study: optuna.Study, table: Table, predictor: TrainingTimePredictor
) -> dict[str, float]:
    mapping = table.hyperparameters()
    trials = study.get_trials(deepcopy=False)
    plain = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, multivariate=True))
    ours = optuna.create_study(
        sampler=TTPSampler(
            predictor,
            BestMetric(max_epochs=table.n_epochs),
            optuna.samplers.TPESampler(seed=0, multivariate=True),
            hyperparameters=mapping,
            search_space=table.search_space,
            seed=0,
            rules=SamplerRules(exploration=0.0),
        )
    )
    medians = []
    for one in (plain, ours):
        one.add_trials(trials)
        asked = []
        for k in range(_N_ASKED):
            asked.append(_seconds(partial(one.ask, table.search_space)))
            one.tell(one.trials[-1].number, 1.0 + 0.01 * k)
        medians.append(1e3 * float(np.median(asked)))
    return {
        "tpe_ask_ms": medians[0],
        "ours_ask_ms": medians[1],
        "ours_over_tpe_ms": medians[1] - medians[0],
    }


def _text(document: dict[str, Any]) -> str:
    where = document["environment"]
    updates = ", ".join(f"{ms:.0f} ms after {n:,}" for n, ms in document["update_ms"].items())
    return "\n".join(
        [
            "| | asked | measured |",
            "| --- | --- | --- |",
            f"| joining a study of {document['n_trials']:,} trials | < 2 s | "
            f"{document['joining_seconds']:.2f} s, {document['joining_over_reading']:.1f} times "
            "reading it |",
            f"| learning from one trial more | < 50 ms | {updates} |",
            f"| choosing a trial, beside TPE's {document['tpe_ask_ms']:.0f} ms | ≤ 5 ms | "
            f"{document['ours_over_tpe_ms']:.1f} ms |",
            "",
            f"Measured {where['date']} on {where['cores']} cores of {where['processor']} with "
            f"`{where['command']}`; seconds of the processor.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
