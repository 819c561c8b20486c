"""What tuned numbers do on the recorded runs, where they change no search of ``search.ablate``.

One field at a time gets the values of :mod:`benchmarks.search.ablation_values`, else half and
twice its value, and what it can change is measured again:

- Trust, of ``TrustRules``: after 3, 5 and 10 trials in random orders, each predicted before it
  was learned from, the share of orders in which predictions are distrusted, and in which a
  warning says that training does not begin as predicted. With the right spectra, with shuffled
  rows of eigenvectors and with the spectra of other tasks.
- Intervals, of ``UncertaintyRules`` and the rules of simulations: mean error, share of times in
  the 80 % interval before any trial, and the score of the intervals of logarithmic times (Gneiting
  and Raftery, 2007, equation 43; smaller is better), for 50 and 10 % of the initial loss. Also the
  largest change of a predicted logarithmic time, and the CPU seconds.
- Learning, of ``LossCurveRules``: mean error and coverage after 1, 3 and 10 trials.

Writes ``ablation.csv`` and ``ablation.md``. Run with ``python -m benchmarks.accuracy.ablate``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from collections.abc import Iterator
import csv
from dataclasses import dataclass
from dataclasses import replace
import math
from pathlib import Path
import time
from typing import Any
import warnings

import numpy as np
import torch

from benchmarks.accuracy.closed_loop import errors_of
from benchmarks.accuracy.closed_loop import inside
from benchmarks.accuracy.closed_loop import other_tasks
from benchmarks.accuracy.closed_loop import predicted_before
from benchmarks.accuracy.closed_loop import shuffled
from benchmarks.accuracy.closed_loop_methods import load_task
from benchmarks.accuracy.closed_loop_methods import our_times
from benchmarks.accuracy.closed_loop_methods import TARGETS
from benchmarks.accuracy.closed_loop_methods import Task
from benchmarks.accuracy.evaluation import spectrum_of
from benchmarks.accuracy.record import RESULTS
from benchmarks.search.ablate import changed
from benchmarks.search.ablate import every_field
from benchmarks.search.ablate import Field
from optuna_ttp import Spectrum
from optuna_ttp import TrainingTimePredictor
from optuna_ttp.calibration import calibrate
from optuna_ttp.calibration import Calibration
from optuna_ttp.calibration import FRACTIONS
from optuna_ttp.calibration import LossCurve
from optuna_ttp.calibration import Observation


_NAMES: tuple[str, ...] = (
    *("digits-0", "digits-1", "residual-0", "residual-1", "minilm-0", "minilm-1"),
    *("efficientnet-digits-0", "efficientnet-digits-1"),
    *("efficientnet-fashion-0", "efficientnet-fashion-1"),
)
_MOST_WRONG = 16
_COUNTS = (3, 5, 10)
_LEARNED = (1, 3, 10)
_FRACTIONS = (0.5, 0.1)
# Fields that are read while trials are learned from, not when the result is asked.
_READ_BEFORE = (*("n_recent", "most_compared", "unreached_error", "stable_sd"),)
_HEADER = """\
Shares are percentages. "Distrusted" are orders of trials after which predictions are ignored,
"named" those with a warning that training does not begin as predicted, "either" both together.
The first row of a measure has the default rules.
"""
Figures = dict[str, float]


@dataclass(frozen=True, eq=False)
class Order:
    """Ten trials in a random order, each with what was predicted for it before it ran."""

    kind: str
    trials: list[Observation]
    task: Task


@dataclass(frozen=True, eq=False)
class Recorded:
    """The recorded runs, with their spectra and the orders of their trials."""

    tasks: list[Task]
    spectra: list[Spectrum]
    orders: list[Order]

    @classmethod
    def of(cls, names: tuple[str, ...], store: str | None, curves: Path, n: int) -> Recorded:
        """Load the runs, and predict ``n`` orders of every task with right and wrong spectra."""
        spectra = [spectrum_of(name, store) for name in names]
        tasks: list[Task] = []
        orders: list[Order] = []
        for name, spectrum in zip(names, spectra, strict=True):
            path = curves / f"{name}.npz"
            tasks.append(load_task(path, spectrum))
            others = [s for o, s in zip(names, spectra, strict=True) if _alike(name, o)]
            wrong = {"shuffled": shuffled(spectrum)}
            if others:
                wrong["other"] = other_tasks(spectrum, others[-1])
            orders += _orders("right", tasks[-1], n)
            for kind, replacement in wrong.items():
                orders += _orders(kind, load_task(path, replacement, most=_MOST_WRONG), n)
            print(f"{name} loaded", flush=True)
        return cls(tasks, spectra, orders)

    def learned(self) -> list[tuple[Order, int, Calibration]]:
        """Return the calibrations after some trials of every order."""
        return [
            (order, count, calibrate(order.trials[:count], order.task.prior_scale))
            for order in self.orders
            for count in _COUNTS
        ]


def _alike(name: str, other: str) -> bool:
    start = name.partition("-")[0]
    return other != name and other.partition("-")[0] == start


def _orders(kind: str, task: Task, n: int) -> Iterator[Order]:
    rng = np.random.default_rng(2)
    for _ in range(n):
        chosen = rng.permutation(len(task.observations))[: max(_COUNTS)]
        yield Order(kind, predicted_before(task, chosen), task)


def trust(learned: list[tuple[Order, int, Calibration]]) -> Figures:
    """Return shares of orders that are distrusted, and whose first steps are named, in percent."""
    figures = {}
    for kind in ("right", "shuffled", "other"):
        for count in _COUNTS:
            chosen = [c for order, n, c in learned if order.kind == kind and n == count]
            if not chosen:
                continue
            named = [not c.starts_as_predicted for c in chosen]
            either = [n or not c.trusted for n, c in zip(named, chosen, strict=True)]
            figures[f"{kind} {count} distrusted"] = 100 * np.mean([not c.trusted for c in chosen])
            figures[f"{kind} {count} named"] = 100 * np.mean(named)
            figures[f"{kind} {count} either"] = 100 * np.mean(either)
    return {name: float(value) for name, value in figures.items()}


def intervals(recorded: Recorded, before: dict[str, Any]) -> Figures:
    """Return error, coverage, score and speed of predictions before any trial.

    ``before`` holds the logarithms of times with default rules; it is filled by the first call.
    """
    errors, covered, scores, changes = [], [], [], [0.0]
    started = time.process_time()
    for task, spectrum in zip(recorded.tasks, recorded.spectra, strict=True):
        for fraction in _FRACTIONS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                predictor = TrainingTimePredictor(spectrum, target_fraction=fraction)
            rates, sizes, momenta = task.configurations.T
            p = predictor.predict(rates, np.minimum(sizes, spectrum.n_samples), momenta)
            real = np.ceil(task.real[:, TARGETS.index(fraction)] - 1e-9)
            seen = np.isfinite(real) & np.isfinite(p.steps)
            low, high = np.log(p.steps_low[seen]), np.log(p.steps_high[seen])
            logs = np.log(np.maximum(real[seen], 1.0))
            errors += list(np.abs(p.steps[seen] / np.maximum(real[seen], 1.0) - 1.0))
            covered += list((logs >= low) & (logs <= high))
            missed = np.maximum(low - logs, 0.0) + np.maximum(logs - high, 0.0)
            scores += list(high - low + 10.0 * missed)
            known = before.setdefault(f"{task.name} {fraction}", np.log(p.steps))
            both = np.isfinite(known) & np.isfinite(p.steps)
            changes += list(np.abs(np.log(p.steps[both]) - known[both]))
            changes += [math.inf] * int((np.isfinite(known) != np.isfinite(p.steps)).sum())
    return {
        "error": 100 * float(np.mean(errors)),
        "coverage": 100 * float(np.mean(covered)),
        "score": float(np.mean(scores)),
        "largest change": max(changes),
        "median change": float(np.median(changes)),
        "CPU seconds": time.process_time() - started,
    }


def learning(recorded: Recorded, n_repeats: int) -> Figures:
    """Return mean errors and coverage after some trials, whose curves are smoothed again."""
    figures: dict[str, list[float]] = {}
    for task in recorded.tasks:
        curves = [LossCurve.of(losses) for losses in task.losses]
        levels = task.initial_loss * FRACTIONS
        passed = [curve.log_first_passage_times(levels) for curve in curves]
        observations = [
            replace(o, observed=seen, errors=errors, lost=curve.lost)
            for o, curve, (seen, errors) in zip(task.observations, curves, passed, strict=True)
        ]
        rng = np.random.default_rng(0)
        for _ in range(n_repeats):
            order = rng.permutation(len(observations))
            for count in _LEARNED:
                seen = [observations[k] for k in order[:count]]
                calibration = calibrate(seen, task.prior_scale)
                left = order[count:]
                errors = errors_of(calibration, task)[left]
                logs, sd = our_times(calibration, task, left)
                known = np.isfinite(errors)
                figures.setdefault(f"{count} error", []).append(100 * float(errors[known].mean()))
                held = inside(logs, sd, calibration, task.real[left])[known]
                figures.setdefault(f"{count} coverage", []).append(100 * float(held.mean()))
    return {name: float(np.mean(values)) for name, values in figures.items()}


def rows(recorded: Recorded, chosen: list[Field], n_repeats: int) -> Iterator[dict[str, Any]]:
    """Measure every field with its values; the first row of a measure has default rules."""
    learned: list[Any] = []
    before: dict[str, Any] = {}

    def trusted(field: Field | None) -> Figures:
        if field is not None and any(field.label.endswith(name) for name in _READ_BEFORE):
            return trust(recorded.learned())
        if not learned:
            learned.extend(recorded.learned())
        return trust(learned)

    measures: dict[str, Callable[[Field | None], Figures]] = {
        "trust": trusted,
        "intervals": lambda _: intervals(recorded, before),
        "learning": lambda _: learning(recorded, n_repeats),
    }
    by_default: dict[str, Figures] = {}
    for field in chosen:
        measure = measure_of(field)
        if measure is None:
            continue
        if measure not in by_default:
            by_default[measure] = measures[measure](None)
            yield {"field": measure, "default": "", "value": "", **by_default[measure]}
        for value in field.values():
            default = field.default
            with changed(field.rules, field.name, value):
                figures = measures[measure](field)
            row = {"field": field.label, "default": default, "value": value}
            yield {**row, **figures}


def measure_of(field: Field) -> str | None:
    """Return the name of the measure that a field can change, or None."""
    kind = type(field.rules).__name__
    if kind == "TrustRules":
        return "trust"
    if kind in ("UncertaintyRules", "SimulationRules", "StabilityRules"):
        return "intervals"
    return "learning" if kind == "LossCurveRules" else None


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--store", help="URL of the spectrum store; the default one by default")
    parser.add_argument("--curves", type=Path, default=RESULTS / "curves")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--fields", nargs="+", help="only those whose labels contain one of these")
    parser.add_argument("--repeats", type=int, default=50, help="random orders of the trials")
    parser.add_argument("--smoke", action="store_true", help="one task, two orders, four fields")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names, n_repeats, wanted = _NAMES, options.repeats, options.fields
    if options.smoke:
        names, n_repeats = _NAMES[:1], 2
        wanted = ["clear_trust", "stable_sd", "mismatch_sd", "unknown_error"]
    chosen = [f for f in every_field() if not wanted or any(w in f.label for w in wanted)]
    recorded = Recorded.of(names, options.store, options.curves, n_repeats)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "ablation.csv"
    lines = ["field,default,value,figure,measured"]
    table = [_HEADER, "| field | default | value | measured |", "| --- | --- | --- | --- |"]
    for row in rows(recorded, chosen, max(1, n_repeats // 5)):
        print(row, flush=True)
        label = [f"{row.pop(name)}" for name in ("field", "default", "value")]
        with path.open("w", newline="") as file:
            lines += [_line([*label, name, f"{value:.4g}"]) for name, value in row.items()]
            file.write("\n".join([*lines, ""]))
        figures = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
        table.append(f"| {' | '.join(label)} | {figures} |")
        (options.output / "ablation.md").write_text("\n".join([*table, ""]))


def _line(values: list[str]) -> str:
    from io import StringIO

    text = StringIO()
    csv.writer(text, lineterminator="").writerow(values)
    return text.getvalue()


if __name__ == "__main__":
    main()
