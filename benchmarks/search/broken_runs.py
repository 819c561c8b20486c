"""What the shortest length of a broken trial is good for, on all recorded runs of finite loss.

Every run is cut at several shares of its steps. Counted are the cut runs that count as broken by
``BrokenTrainingRules``, with its ``ample`` and without, and those of them whose whole run ends
below half of its initial loss after all. Writes ``results/broken_runs.json``.

Run with ``python -m benchmarks.search.broken_runs`` (a minute).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import warnings

import numpy as np
import torch

from benchmarks.environment import environment
from benchmarks.search.ablate import changed
from benchmarks.search.compare import complete_tasks
from benchmarks.search.compare import predictor_of
from benchmarks.search.compare import RESULTS
from benchmarks.search.table import recorded
from optuna_ttp import OptunaTTPWarning
from optuna_ttp.calibration import LossCurve
from optuna_ttp.study import broke_down
from optuna_ttp.study._broken_training import RULES


_SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
_VALUES = {"with it": RULES.ample, "without": 1e-9}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", help="all that are recorded by default")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", OptunaTTPWarning)
    n_runs = 0
    counts = {(name, share): [0, 0] for name in _VALUES for share in _SHARES}
    for name in options.tasks or complete_tasks(RESULTS):
        table = recorded(name, RESULTS / "recordings", "metric")
        predictor, _ = predictor_of(name, RESULTS)
        for places, run in table.trajectories.items():
            losses = np.concatenate(run.batch_losses)
            if not np.isfinite(losses).all():
                continue
            n_runs += 1
            columns = zip(table.values.values(), places, strict=True)
            rate, batch_size, momentum = (values[i] for values, i in columns)
            batch_size = min(int(batch_size), predictor.n_samples)
            logs = predictor.estimate(rate, batch_size, momentum).log_first_passage_times
            recovers = run.training_losses[-1] < 0.5 * run.training_losses[0]
            for share in _SHARES:
                curve = LossCurve.of(losses[: max(3, int(share * len(losses)))])
                for label, value in _VALUES.items():
                    with changed(RULES, "ample", value):
                        if broke_down(curve, logs):
                            counts[label, share][0] += 1
                            counts[label, share][1] += int(recovers)
    figures = {
        label: {f"{share:g}": counts[label, share] for share in _SHARES} for label in _VALUES
    }
    text = {"runs": n_runs, "broken, and of these below half at the end": figures}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "broken_runs.json").write_text(
        json.dumps({**text, "environment": environment()}, indent=2) + "\n"
    )
    print(text)


if __name__ == "__main__":
    main()
