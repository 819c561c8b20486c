"""What tuned numbers of predictions and stability limits do that change no search.

Three measures on recorded runs of benchmarks/accuracy: the largest change of a stability limit
with other numbers of power iterations; outcomes and probabilities after five trials, for 10 % of
the initial loss within 200 steps, with other lengths of simulations; and the mean error of times
after a short training run with other choices of its learning rate. Writes
``prediction_rules.md``.

Run with ``python -m benchmarks.accuracy.prediction_rules``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any
import warnings

import numpy as np
import torch

from benchmarks.accuracy.closed_loop import errors_of
from benchmarks.accuracy.closed_loop_methods import load_task
from benchmarks.accuracy.closed_loop_methods import Task
from benchmarks.accuracy.evaluation import spectrum_of
from benchmarks.accuracy.record import RESULTS
from benchmarks.accuracy.tasks import load
from benchmarks.search.ablate import changed
from optuna_ttp import Prediction
from optuna_ttp import Spectrum
from optuna_ttp import TrainingTimePredictor
from optuna_ttp.calibration import Calibration
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import StabilityLimit
from optuna_ttp.dynamics._stability import RULES as STABILITY
from optuna_ttp.prediction._rules import RULES


_ITERATED = ("digits-0", "digits-1", "residual-0", "residual-1", "minilm-1")
_SIMULATED = ("digits-1", "residual-0", "minilm-1")
_TRAINED = ("digits-0", "digits-1", "residual-0", "residual-1")
_LENGTHS: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("margin", (1.0, 3.0)),
    ("most_log_slack", (0.0,)),
    ("patience", (10.0, 40.0)),
    ("hopeless_stability", (1e9,)),
)
_RUNS: tuple[tuple[str, Any], ...] = (
    ("patience", RULES.patience),
    ("short_run_instability", 0.15),
    ("short_run_instability", 0.6),
    ("short_run_shares", (0.1,)),
    ("short_run_shares", (0.01, 0.1, 0.3)),
)


def iterations(name: str, spectrum: Spectrum) -> Iterator[str]:
    """Yield the largest change of the logarithm of a limit by the number of iterations."""
    model = LinearisedModel.from_spectrum(spectrum)
    batch_sizes, momenta = np.array([1.0, 4.0, 16.0, 64.0] * 2), np.repeat([0.0, 0.9], 4)
    limits = {}
    for count in (STABILITY.most_iterations, 10, 25, 100):
        with changed(STABILITY, "most_iterations", count):
            limits[count] = np.log(
                StabilityLimit.of(model).max_learning_rate(batch_sizes, momenta)
            )
    by_default = limits.pop(STABILITY.most_iterations)
    for count, values in limits.items():
        yield f"| {name} | most_iterations {count} | {np.abs(values - by_default).max():.2g} |"


def lengths(name: str, spectrum: Spectrum, task: Task, n_repeats: int) -> Iterator[str]:
    """Yield how many outcomes, and by how much probabilities, change with other lengths."""
    rng = np.random.default_rng(0)
    rates, sizes, momenta = task.configurations.T

    def asked(trials: list[Any], method: str) -> Prediction:
        predictor = TrainingTimePredictor(spectrum, target_fraction=0.1, max_steps=200)
        ask = getattr(predictor.informed(trials), method)
        answer: Prediction = ask(rates, np.minimum(sizes, spectrum.n_samples), momenta)
        return answer

    for _ in range(n_repeats):
        order = rng.permutation(len(task.observations))[:5]
        trials = [task.observations[k] for k in order]
        for field, values in _LENGTHS:
            method = "predict" if field == "margin" else "estimate"
            before = asked(trials, method)
            for value in values:
                with changed(RULES, field, value):
                    after = asked(trials, method)
                n_outcomes = int((before.outcomes != after.outcomes).sum())
                away = np.abs(before.p_converges - after.p_converges).max()
                text = f"{n_outcomes} of {len(before)} outcomes, probabilities by {away:.2g}"
                yield f"| {name} | {field} {value:g} | {text} |"


def short_runs(name: str, spectrum: Spectrum, task: Task) -> Iterator[str]:
    """Yield mean errors of times without a short training run, and after runs by other rules."""
    without = errors_of(Calibration.none(task.prior_scale), task)
    yield f"| {name} | no short run | {np.nanmean(without):.1%} |"
    for field, value in _RUNS:
        with changed(RULES, field, value):
            predictor = TrainingTimePredictor(spectrum, target_fraction=0.1)
            calibration = predictor.short_run(load(name).task()).calibration
        label = "short run by default" if field == "patience" else f"{field} {value}"
        yield f"| {name} | {label} | {np.nanmean(errors_of(calibration, task)):.1%} |"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--store", help="URL of the spectrum store; the default one by default")
    parser.add_argument("--tasks", nargs="+", help="only these; all by default")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = options.tasks or list(dict.fromkeys([*_ITERATED, *_SIMULATED, *_TRAINED]))
    lines = ["| task | rule | measured |", "| --- | --- | --- |"]
    for name in names:
        spectrum = spectrum_of(name, options.store)
        task = load_task(RESULTS / "curves" / f"{name}.npz", spectrum)
        if name in _ITERATED:
            lines += iterations(name, spectrum)
        if name in _SIMULATED:
            lines += lengths(name, spectrum, task, 2)
        if name in _TRAINED:
            lines += short_runs(name, spectrum, task)
        print(f"{name} done", flush=True)
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "prediction_rules.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
