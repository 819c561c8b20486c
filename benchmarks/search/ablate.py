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


_PACKAGES = ("search", "study", "calibration", "prediction", "dynamics")
_TASKS = ("digits-1", "minilm-1", "residual-0", "rotation-0")
_SHUFFLED_TASKS = ("digits-1", "minilm-1")
_N_TRIALS = 12
_BUDGET_TRIALS = 100
# Sampler and pruner are given these, so that their fields can be changed like those of the rules
# that modules share.
_SAMPLER_RULES = SamplerRules()
_PRUNER_RULES = PrunerRules()
_INF = math.inf
_MANY = 10**9
# Off by default, so that there is nothing to neutralise.
_OFF = ("PrunerRules.max_cost_ratio", "PrunerRules.audit")
# What switches a field's effect off. All others are doubled and halved.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # The sampler: no design, no exploration, no decay of the trust, none of the nats.
    "SamplerRules.n_design_trials": (0,),
    "SamplerRules.n_candidates": (1,),
    "SamplerRules.exploration": (0.0,),
    "SamplerRules.prior_trials": (_INF,),
    "SamplerRules.least_trust": (0.0,),
    "SamplerRules.n_newest_values": (_MANY,),
    "SamplerRules.largest_grid": (_MANY,),
    "PreferenceRules.same": (0.0,),
    "PreferenceRules.time_spread_nats": (0.0,),
    "PreferenceRules.metric_spread_nats": (0.0,),
    "PreferenceRules.saturated_depth": (_INF,),
    "PreferenceRules.unsteady": (_INF,),
    "PreferenceRules.lag_nats": (0.0,),
    "PreferenceRules.fewest_values": (_MANY,),
    "ForecastRules.least_sd": (0.0,),
    "ForecastRules.least_probability": (1e-300,),
    # The pruner: nothing is skipped, nothing is stopped, no run in between, no reason refuted.
    "PrunerRules.tolerance": (1.0, 3.0),
    "PrunerRules.min_probability": (0.0,),
    "PrunerRules.min_probability_at_first": (1.0,),
    "PrunerRules.min_chance": (0.0,),
    "PrunerRules.max_consecutive": (_MANY,),
    "PrunerRules.sooner": (1,),
    "PrunerRules.n_refuting": (_MANY,),
    "PrunerRules.most_refuting": (_MANY,),
    "PrunerRules.nearly_reached": (1.0,),
    "PrunerRules.half_way": (_INF,),
    "PrunerRules.n_skipped_to_warn": (_MANY,),
    "RunningTrialRules.earliest": (0.0,),
    "RunningTrialRules.nearly_done": (0.0,),
    "RunningTrialRules.n_not_finite": (_MANY,),
    # Broken training: none counts as broken; a spike, ample steps and errors are not asked for.
    "BrokenTrainingRules.not_learned": (_INF,),
    "BrokenTrainingRules.spike": (0.0,),
    "BrokenTrainingRules.ample_for_whole_trial": (1e-9,),
    "BrokenTrainingRules.ample_for_running_trial": (0.0,),
    "BrokenTrainingRules.errors": (0.0,),
    # Objections to curves: none is raised, or no allowance is made.
    "CurveRules.too_high": (_INF,),
    "CurveRules.too_low": (0.0,),
    "CurveRules.low_errors": (0.0,),
    "CurveRules.high_errors": (0.0,),
    "CurveRules.risen": (_INF,),
    "CurveRules.mild": (0.0,),
    "CurveRules.like_a_sum": (0.0,),
    "CurveRules.late": (_MANY,),
    "CurveRules.still": (0.0,),
    "CurveRules.half": (0.0,),
    "CurveRules.jump": (_INF,),
    "CurveRules.least_noise": (0.0,),
    # What is written, learned and counted as best: without limits.
    "TrainingLogRules.most_steps": (_INF,),
    "BestTrialsRules.share": (1.0,),
    "BestTrialsRules.most": (_MANY,),
    "LearnerRules.n_every": (_MANY,),
    "LearnerRules.most_awaited": (_MANY,),
    "LearnerRules.most_predicted_late": (_MANY,),
    "LearnerRules.most_predictors": (_MANY,),
    # The calibration: parts of the model without effect, limits that are never reached.
    "ErrorRules.instability_sd": (0.0,),
    "ErrorRules.catapult_sd": (0.0,),
    "ErrorRules.unexplained_sds": (_INF,),
    "GrowthPriorRules.slope_sd": (0.0,),
    "GrowthPriorRules.start_sd": (0.0,),
    "GrowthPriorRules.effects": ((0.0, 0.0, 0.0),),
    "GrowthPriorRules.effect_sds": ((1e-6, 1e-6, 1e-6),),
    "GrowthPriorRules.edge": (_INF,),
    "GrowthPriorRules.most_log_speed": (_INF,),
    "FitRules.robustness": (1e9,),
    "FitRules.most_trials": (_MANY,),
    "FitRules.late_factor": (_INF,),
    "FirstStepRules.level_sd": (0.0,),
    "FirstStepRules.calm_sd": (1e9,),
    "FirstStepRules.least_weight": (0.0,),
    "FirstStepRules.deviation": (_INF,),
    "FirstStepRules.deviation_sds": (0.0,),
    "FirstStepRules.least_error": (0.0,),
    "FirstStepRules.calm_deviation": (0.0,),
    "FirstStepRules.gross_deviation": (_INF,),
    "TrustRules.min_observations": (1,),
    "TrustRules.min_distrust": (1,),
    "TrustRules.gross_error": (_INF,),
    "TrustRules.gross_trust": (0.0, -_INF),
    "TrustRules.harmless_error": (0.0, _INF),
    "TrustRules.added_error": (0.0,),
    "TrustRules.clear_trust": (0.0,),
    "TrustRules.min_agreement": (-2.0,),
    "TrustRules.backwards": (-2.0,),
    "TrustRules.least_superiority": (-_INF,),
    "TrustRules.least_compared": (0.0,),
    "TrustRules.n_recent": (_MANY,),
    "TrustRules.most_compared": (_MANY,),
    "TrustRules.calm_sd": (1e9,),
    "LossCurveRules.spacing": (1.02, 1.1),
    "LossCurveRules.window": (0.0,),
    "LossCurveRules.slope_factor": (1.1, 1.5),
    "LossCurveRules.sure_errors": (_INF,),
    "LossCurveRules.probable_errors": (_INF,),
    "LossCurveRules.excess_noise": (0.0,),
    "LossCurveRules.most_error": (_INF,),
    "LossCurveRules.n_neighbours": (0,),
    "UncertaintyRules.depth_sd": (0.0,),
    "UncertaintyRules.mismatch_sd": (0.0,),
    "UncertaintyRules.most_sd": (_INF,),
    "UncertaintyRules.growth_mismatch": (0.0,),
    "UncertaintyRules.most_deviation": (_INF,),
    "UncertaintyRules.unreliable_displacement": (_INF,),
    "UncertaintyRules.unreliable_deviation": (_INF,),
    "UncertaintyRules.unreliable_mismatch": (_INF,),
    # Predictions and simulations: nothing is given up, no slack, all of the trace.
    "PredictionRules.hopeless_stability": (_INF,),
    "PredictionRules.unreliable_sd": (_INF,),
    "PredictionRules.margin": (1.0,),
    "PredictionRules.most_log_slack": (0.0,),
    "PredictionRules.few_steps": (1,),
    "PredictionRules.surface_trace": (1.0,),
    "PredictionRules.settled_subset_sd": (0.0,),
    "GrowthRules.most_disagreement": (_INF,),
    "SimulationRules.blow_up": (_INF,),
    "SimulationRules.edge": (1.0,),
    "SimulationRules.spacing": (1.02, 1.08),
    "StabilityRules.trace_share": (0.9, 1.0),
    "SurfaceRules.furthest": (0.0,),
}


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
        if key in _NEUTRAL:
            return _NEUTRAL[key]
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
        elif isinstance(value, int | float) or f"{type(rules).__name__}.{field.name}" in _NEUTRAL:
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
        endless.__dict__["best"] = _INF if table.direction == "maximize" else -_INF
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
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
