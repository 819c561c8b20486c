"""What every tuned number of predictions, calibration, decisions and searches is good for.

The numbers are the fields of the frozen ``Rules`` dataclasses of the packages ``dynamics``,
``calibration``, ``prediction``, ``study`` and ``search``. The rules of other packages are about
cost and precision. One field at a time is neutralised: it gets a value that switches its effect
off where there is one (0, infinity, 1), else twice and half its value. With each value the same
searches are replayed on recorded tasks by "ours (tpe)": a metric on the whole grid and a time on a
part of it. Every computation is charged one simulated millisecond, so that the same rules always
give the same trials. Two more searches have shuffled predictions, which rules that guard against a
wrong spectrum are for.

A search is run again only if it reads the field at all, which is exact: what is not read changes
nothing. Counted are the searches whose trials change (configuration, trained epochs, whether it
was pruned), and the change of the average trials until a trial is close to the grid's best (the
measure of ``parts.py``, over the searches that are not shuffled; a search that ends before counts
with all that it took).

Writes a line for every field and value to ``results/ablation.csv``, as soon as it is known, and
the table ``results/ablation.md``. A second call goes on where the first one was stopped.

Run with ``python -m benchmarks.search.ablate`` (35 minutes on one core).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
import csv
from dataclasses import dataclass
from dataclasses import fields
from dataclasses import is_dataclass
from itertools import count
import math
from pathlib import Path
import sys
import time
from typing import Any
import warnings

import numpy as np
import optuna
import torch

from benchmarks.search import contestants
from benchmarks.search.ablation_values import NEUTRAL
from benchmarks.search.compare import predictor_of
from benchmarks.search.compare import RESULTS
from benchmarks.search.parts import part_of
from benchmarks.search.predictors import ShuffledPredictor
from benchmarks.search.replay import replay
from benchmarks.search.table import Goal
from benchmarks.search.table import recorded
from optuna_ttp import PrunerRules
from optuna_ttp import SamplerRules
from optuna_ttp import TrainingTimePredictor
from optuna_ttp.prediction import SearchPredictor


_HEADER = """\
Replayed searches of 12 trials with one tuned number changed at a time. Below 1.2 a ratio only says
that something changes: one search in eight makes most of it. Fields that changed no search were
measured again on the recorded runs, see `benchmarks/accuracy/results/ablation.md`. They are
deleted, or say in their docstring what they are for: most are limits of cost, guards of longer
studies and of users' mistakes, and the accuracy of simulations. Deleted are `nearly_reached`,
`nearly_done`, four that nothing read, `gross_trust`, `backwards` and all of
`first_steps` but its `deviation`, which is `trust.first_steps` now; their rows show what they were
measured with.

"""
_PACKAGES = ("search", "study", "calibration", "prediction", "dynamics")
_TASKS = ("digits-1", "minilm-1", "residual-0", "rotation-0")
_SHUFFLED_TASKS = ("digits-1", "minilm-1")
_N_TRIALS = 12
_BUDGET_TRIALS = 100
# Sampler and pruner are given these, so that their fields can be changed like those of the rules
# that modules share.
_SAMPLER_RULES = SamplerRules()
_PRUNER_RULES = PrunerRules()
# Off by default, so that there is nothing to neutralise.
_OFF = ("PrunerRules.max_cost_ratio", "PrunerRules.audit")


@dataclass(frozen=True)
class Field:
    """A field of an instance of rules, by the instance's package and the names of both."""

    rules: Any
    package: str
    path: str

    @property
    def name(self) -> str:
        """The field's name."""
        return self.path.rpartition(".")[2]

    @property
    def label(self) -> str:
        """Package and path, as results name it."""
        return f"{self.package}.{self.path}"

    @property
    def default(self) -> Any:
        """The value that it has when nothing is changed."""
        return getattr(self.rules, self.name)

    def values(self) -> tuple[Any, ...]:
        """Return the values that it is compared with."""
        key = f"{type(self.rules).__name__}.{self.name}"
        if key in NEUTRAL:
            return NEUTRAL[key]
        if isinstance(self.default, int):
            return tuple({max(1, self.default // 2): 0, 2 * self.default: 0})
        return 0.5 * self.default, 2.0 * self.default


@dataclass(frozen=True)
class Setting:
    """A search that is replayed; predictions of a shuffled one belong to other configurations."""

    task: str
    goal: Goal
    part: int
    shuffled: bool = False


@dataclass(frozen=True)
class Result:
    """The trials of a search in their order, and the average trials that it took."""

    trials: tuple[tuple[Any, ...], ...]
    average_trials: float


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="one task, four fields, four trials")
    parser.add_argument("--fields", nargs="+", help="only those whose labels contain one of these")
    parser.add_argument("--trials", type=int, default=_N_TRIALS, help="of each search")
    parser.add_argument("--recordings", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    warnings.simplefilter("ignore")
    settings, n_trials = settings_of(_TASKS, _SHUFFLED_TASKS), options.trials
    wanted = options.fields
    if options.smoke:
        settings, n_trials = settings_of(("minilm-1",), ()), 4
        wanted = ["lag_nats", "fit.n_rounds", "n_not_finite", "min_coarse_steps"]
    chosen = [f for f in every_field() if not wanted or any(w in f.label for w in wanted)]
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "ablation.csv"
    known = _read(path)
    ablation = Ablation.prepared(settings, n_trials, options.recordings, chosen)
    for field in chosen:
        for value in field.values():
            if (field.label, f"{value}") not in {(row["field"], row["value"]) for row in known}:
                started = time.process_time()
                row = ablation.row(field, value)
                known.append({name: f"{v}" for name, v in row.items()})
                _append(path, known[-1])
                print(f"{time.process_time() - started:6.1f} s {row}", flush=True)
    (options.output / "ablation.md").write_text(_table(known))


def settings_of(tasks: tuple[str, ...], shuffled_tasks: tuple[str, ...]) -> list[Setting]:
    """Return the searches: a metric on whole grids, a time on parts, and shuffled ones."""
    return [
        *(Setting(task, "metric", 0) for task in tasks),
        *(Setting(task, "time", 1) for task in tasks),
        *(Setting(task, "metric", 0, shuffled=True) for task in shuffled_tasks),
    ]


def every_field() -> list[Field]:
    """Return all fields of all rules, those of sampler and pruner first, that of spectra never."""
    roots: dict[int, tuple[Any, str]] = {
        id(rules): (rules, "search") for rules in (_SAMPLER_RULES, _PRUNER_RULES)
    }
    for package in _PACKAGES:
        for name, module in sorted(sys.modules.items()):
            rules = getattr(module, "RULES", None)
            if name.startswith(f"optuna_ttp.{package}.") and is_dataclass(rules):
                defined_in = type(rules).__module__.split(".")[1]
                if defined_in == package:
                    roots.setdefault(id(rules), (rules, package))
    chosen = []
    for rules, package in roots.values():
        chosen += _fields_of(rules, package, type(rules).__name__)
    return [field for field in chosen if field.path not in _OFF]


def _fields_of(rules: Any, package: str, prefix: str) -> list[Field]:
    chosen = []
    for field in fields(rules):
        value, path = getattr(rules, field.name), f"{prefix}.{field.name}"
        if is_dataclass(value):
            chosen += _fields_of(value, package, path)
        elif isinstance(value, int | float) or f"{type(rules).__name__}.{field.name}" in NEUTRAL:
            chosen.append(Field(rules, package, path))
    return chosen


@contextmanager
def changed(rules: Any, name: str, value: Any) -> Iterator[None]:
    """Give a field of frozen rules another value, for all who share the instance."""
    before = getattr(rules, name)
    object.__setattr__(rules, name, value)
    try:
        yield
    finally:
        object.__setattr__(rules, name, before)


@contextmanager
def watched(chosen: list[Field]) -> Iterator[set[tuple[int, str]]]:
    """Collect which fields are read, as identities of rules and names."""
    reads: set[tuple[int, str]] = set()
    kinds = {type(field.rules) for field in chosen}

    def read(rules: Any, name: str) -> Any:
        reads.add((id(rules), name))
        return object.__getattribute__(rules, name)

    for kind in kinds:
        kind.__getattribute__ = read  # type: ignore[assignment]
    try:
        yield reads
    finally:
        for kind in kinds:
            del kind.__getattribute__


@dataclass(frozen=True)
class Ablation:
    """The searches with default rules, and which fields each of them reads.

    Attributes:
        settings:
            The searches.
        n_trials:
            Of each search.
        recordings:
            The folder of recordings and spectra.
        predictors:
            Those of the tasks with default rules.
        defaults:
            What the searches give with default rules.
        reads:
            The fields that each search reads.
        built_with:
            The fields that are read while the predictor of a task is built.
    """

    settings: list[Setting]
    n_trials: int
    recordings: Path
    predictors: dict[str, TrainingTimePredictor]
    defaults: dict[Setting, Result]
    reads: dict[Setting, set[tuple[int, str]]]
    built_with: dict[str, set[tuple[int, str]]]

    @classmethod
    def prepared(
        cls, settings: list[Setting], n_trials: int, recordings: Path, chosen: list[Field]
    ) -> Ablation:
        """Run all searches with default rules."""
        ablation = cls(settings, n_trials, recordings, {}, {}, {}, {})
        for task in dict.fromkeys(setting.task for setting in settings):
            with watched(chosen) as reads:
                ablation.predictors[task] = ablation.built(task)
            ablation.built_with[task] = reads
        for setting in settings:
            with watched(chosen) as reads:
                result = ablation.searched(setting, ablation.predictors[setting.task])
            ablation.defaults[setting], ablation.reads[setting] = result, reads
            print(f"{setting}: {len(result.trials)} trials, {result.average_trials:.3g}")
        return ablation

    def built(self, task: str) -> TrainingTimePredictor:
        """Build a task's predictor with the rules as they are now."""
        predictor_of.cache_clear()
        return predictor_of(task, self.recordings)[0]

    def searched(self, setting: Setting, predictor: TrainingTimePredictor) -> Result:
        """Replay a search with the rules as they are now."""
        table, endless = (
            part_of(
                recorded(setting.task, self.recordings / "recordings", setting.goal), setting.part
            )
            for _ in range(2)
        )
        # A cached property: the search does not end with the best configuration.
        endless.__dict__["best"] = math.inf if table.direction == "maximize" else -math.inf
        searching: SearchPredictor = predictor
        if setting.shuffled:
            searching = ShuffledPredictor.of(predictor, table, seed=0)
        base = contestants.SAMPLERS["tpe"](0)
        ours = contestants.wrapped(searching, base, table, 0, _SAMPLER_RULES, _PRUNER_RULES)
        ticks = count()
        search = replay(
            endless,
            ours.sampler,
            ours.pruner,
            budget_seconds=_BUDGET_TRIALS * table.mean_seconds,
            logged=True,
            max_trials=self.n_trials,
            overhead=lambda: 1e-3 * next(ticks),
        )
        ended = max((trial.ended for trial in search.trials), default=0.0)
        seconds = min((t.ended for t in search.trials if table.is_close(t.value)), default=ended)
        trials = tuple((t.places, t.epochs, t.pruned) for t in search.trials)
        return Result(trials, seconds / table.mean_seconds)

    def row(self, field: Field, value: Any) -> dict[str, Any]:
        """Replay the searches that read a field with another value of it."""
        key = (id(field.rules), field.name)
        simulates = field.package in ("dynamics", "prediction") or "Uncertainty" in field.path
        results = dict(self.defaults)
        predictors = dict(self.predictors)
        read_by = {s for s in self.settings if key in self.reads[s]}
        # A predictor computes many things once, for all searches of its task.
        rebuilt = {t for t, reads in self.built_with.items() if key in reads}
        if simulates:
            rebuilt |= {s.task for s in read_by}
        read_by |= {s for s in self.settings if s.task in rebuilt}
        failure = ""
        default = field.default
        with changed(field.rules, field.name, value):
            try:
                predictors |= {task: self.built(task) for task in rebuilt}
                for setting in self.settings:
                    if setting in read_by:
                        results[setting] = self.searched(setting, predictors[setting.task])
            except (ArithmeticError, ValueError, TypeError, RuntimeError) as error:
                failure = f"{type(error).__name__}: {error}"
        return self._compared(field, default, value, results, len(read_by)) | {"error": failure}

    def _compared(
        self, field: Field, default: Any, value: Any, results: dict[Setting, Result], n_read: int
    ) -> dict[str, Any]:
        differ = [s for s in self.settings if results[s].trials != self.defaults[s].trials]
        straight = [s for s in self.settings if not s.shuffled]
        before = np.log([self.defaults[s].average_trials for s in straight])
        ratios = np.log([results[s].average_trials for s in straight]) - before
        return {
            "field": field.label,
            "default": default,
            "value": value,
            "searches": len(straight),
            "reading": n_read,
            "changed": sum(not s.shuffled for s in differ),
            "changed_shuffled": sum(s.shuffled for s in differ),
            "average_trials": f"{np.exp(np.mean(before + ratios)):.4g}",
            "ratio": f"{np.exp(np.mean(ratios)):.4g}",
            "least_ratio": f"{np.exp(ratios.min()):.4g}",
            "largest_ratio": f"{np.exp(ratios.max()):.4g}",
        }


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _append(path: Path, row: dict[str, str]) -> None:
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def _table(rows: list[dict[str, str]]) -> str:
    """Return the table of all fields, those that change the search most first."""

    def effect(row: dict[str, str]) -> tuple[float, int, int]:
        away = abs(math.log(float(row["ratio"])))
        return -away, -int(row["changed"]), -int(row["changed_shuffled"])

    lines = [
        "| field | default | value | read by | changed | shuffled ones changed | average trials, "
        "over those by default |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=effect):
        ratio = f"{row['ratio']} ({row['least_ratio']} to {row['largest_ratio']})"
        lines.append(
            f"| {row['field']} | {row['default']} | {row['value']} | {row['reading']} | "
            f"{row['changed']} of {row['searches']} | {row['changed_shuffled']} | "
            f"{row['error'] or ratio} |"
        )
    return _HEADER + "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
