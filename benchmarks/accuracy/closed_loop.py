"""How fast the predictor learns from trials, over the recorded runs of ``absolute_targets``.

Trials are observed as a user's are: their mini-batch losses, through
:class:`~optuna_ttp.calibration.LossCurve`. In random order, 0, 1, 2, 3, 5 and 10 of them are
learned from, and the times of all others to 70, 50, 35, 25, 15 and 10 % of the initial loss are
predicted; configurations that were learned from with another order of the samples are left out.
Beside ours: no correction, one factor, one factor a target, ``c / eta_e`` and
``c / eta_e + m / (1 - m)``, a Gaussian process on (log learning rate, log batch size,
log(1 - momentum)) for each target, and the same configuration with another order of the samples.
"Mild" are the runs below half the stability limit.

Partial curves: five trials are learned from, and of every other one the first fifth of its steps
to the target is shown too; what is predicted is the rest. Wrong spectra, on the first draws: trust
after five trials, predicted one after the other, where the rows of the eigenvectors are shuffled,
and where the spectrum is another task's: that of the last one of the same network.

The first draw of each network chose the constants of the model, the others test them. Writes
``closed_loop.csv``, ``.json``, ``.md`` and ``.png``, and its figures into ``summary.json``.

Run with ``python -m benchmarks.accuracy.closed_loop``.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from dataclasses import replace
import json
from pathlib import Path
from typing import Any
import warnings

import numpy as np
from numpy.typing import NDArray
import torch

from benchmarks.accuracy.evaluation import full_curve
from benchmarks.accuracy.evaluation import spectrum_of
from benchmarks.accuracy.evaluation import update_summary
from benchmarks.accuracy.record import read
from benchmarks.accuracy.record import RESULTS
from benchmarks.environment import environment
from optuna_ttp import Spectrum
from optuna_ttp import TrainingTimePredictor
from optuna_ttp.calibration import calibrate
from optuna_ttp.calibration import Calibration
from optuna_ttp.calibration import DEPTHS
from optuna_ttp.calibration import FRACTIONS
from optuna_ttp.calibration import KNOTS
from optuna_ttp.calibration import LossCurve
from optuna_ttp.calibration import Observation
from optuna_ttp.calibration import prior_scale
from optuna_ttp.calibration import PriorScale
from optuna_ttp.calibration import SimulatedFirstPassages
from optuna_ttp.dynamics import Target
from optuna_ttp.study._observed_trial import broke_down


TARGETS = (0.7, 0.5, 0.35, 0.25, 0.15, 0.1)
COUNTS = (0, 1, 2, 3, 5, 10)
GROUPS = {
    "ImageNet": ("efficientnet",),
    "small networks": ("digits", "residual"),
    "transformer": ("minilm",),
}
METHODS = {
    "ours": "ours",
    "none": "no correction",
    "factor": "one factor",
    "offset": "one factor a target",
    "c/eta_e": "`c / eta_e`",
    "c/eta_e+lag": "`c / eta_e + m / (1 - m)`",
    "gp": "Gaussian process",
}
_STYLES: dict[str, dict[str, Any]] = {
    "ours": {"linewidth": 2.5, "color": "tab:blue"},
    "none": {"color": "0.5"},
    "factor": {"color": "tab:orange"},
    "offset": {"color": "tab:green"},
    "c/eta_e": {"color": "tab:red"},
    "c/eta_e+lag": {"color": "tab:purple"},
    "gp": {"color": "tab:brown"},
}
_RUNGS = [int(np.argmin(np.abs(FRACTIONS - f))) for f in TARGETS]
# Logarithms of factors have this prior variance over that of a trial.
_SHRINKAGE = 0.1
_MILD = 0.5
_SHOWN = 0.2
_N_PARTIAL = 5
# A prediction is cut off where it is so many times later than the run was observed.
_PATIENCE = 3
_MOST_WRONG = 16


@dataclass(frozen=True, eq=False)
class Task:
    """The recorded runs of a task and what is predicted for them without any training.

    Attributes:
        name:
            Of the task.
        observations:
            One a run: prediction and observed curve.
        losses:
            Mini-batch losses of each run.
        initial_loss:
            The training loss at the start.
        real:
            Real times to the targets, continuous, shape (K, targets); NaN where not reached.
        configurations:
            Learning rate, batch size and momentum, shape (K, 3).
        stability:
            Shape (K,).
        prior_scale:
            What the spectrum's probe says about the errors.
    """

    name: str
    observations: list[Observation]
    losses: list[NDArray[np.float64]]
    initial_loss: float
    real: NDArray[np.float64]
    configurations: NDArray[np.float64]
    stability: NDArray[np.float64]
    prior_scale: PriorScale

    @property
    def effective(self) -> NDArray[np.float64]:
        """Effective learning rates."""
        return self.configurations[:, 0] / (1.0 - self.configurations[:, 2])

    @property
    def lag(self) -> NDArray[np.float64]:
        """Steps by which momentum lags behind."""
        return self.configurations[:, 2] / (1.0 - self.configurations[:, 2])

    def same(self, k: int) -> NDArray[np.bool_]:
        """Which runs have the configuration of a run."""
        return np.asarray(np.isclose(self.configurations, self.configurations[k]).all(axis=1))


def load_task(path: Path, spectrum: Spectrum, *, most: int | None = None) -> Task:
    """Predict the runs of a recording.

    Args:
        path:
            Of the recording.
        spectrum:
            Of its task, or a wrong one.
        most:
            Take only so many of the runs, evenly. All by default.

    Returns:
        The task.
    """
    recording = read(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        predictor = TrainingTimePredictor(spectrum, target_fraction=float(FRACTIONS[-4]))
    initial = predictor.initial_loss
    chosen = np.arange(len(recording.runs))[
        :: 1 if most is None else -(-len(recording.runs) // most)
    ]
    runs = [recording.runs[k] for k in chosen]
    configurations = np.array([[r.learning_rate, r.batch_size, r.momentum] for r in runs])
    curves = [full_curve(recording, int(k)) for k in chosen]
    ends = np.array([max(60.0, steps[-1]) for steps, _ in curves])
    p = predictor.predict(
        configurations[:, 0],
        np.minimum(configurations[:, 1], spectrum.n_samples),
        configurations[:, 2],
        max_steps=_PATIENCE * ends,
    )
    losses = [row[~np.isnan(row)] for row in recording.batch_losses[chosen]]
    observations = []
    for k in range(len(runs)):
        curve = LossCurve.of(losses[k])
        observed, errors = curve.log_first_passage_times(initial * FRACTIONS)
        momentum = configurations[k, 2]
        observations.append(
            Observation(
                predicted=p.log_first_passage_times[k],
                expected=p.expected_log_first_passage_times[k],
                growth=p.log_growth,
                covariates=p.covariates[k],
                instability=p.instability[k],
                effective_learning_rate=configurations[k, 0] / (1.0 - momentum),
                lag=momentum / (1.0 - momentum),
                observed=observed,
                errors=errors,
                n_steps=curve.n_steps,
                diverged=curve.diverged or broke_down(curve, p.log_first_passage_times[k]),
                lost=curve.lost,
            )
        )
    real = np.array(
        [[Target("loss", f * curve[1][0]).crossing(*curve) for f in TARGETS] for curve in curves]
    )
    real = np.where(np.isfinite(real), np.maximum(real, 0.1), np.nan)
    return Task(
        path.stem,
        observations,
        losses,
        initial,
        real,
        configurations,
        np.asarray(p.stability),
        prior_scale(spectrum.probe),
    )


def _stacked(task: Task, chosen: NDArray[np.int64], name: str) -> NDArray[np.float64]:
    return np.array([getattr(task.observations[k], name) for k in chosen])


def _ours(
    calibration: Calibration, task: Task, chosen: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logarithmic times to the targets and their deviation, both (K, targets)."""
    logs, sd = calibration.correct(
        SimulatedFirstPassages(
            DEPTHS[None, :],
            _stacked(task, chosen, "predicted"),
            np.zeros((1, len(KNOTS))),
            _stacked(task, chosen, "covariates"),
            _stacked(task, chosen, "instability"),
            task.lag[chosen],
        )
    )
    return logs[:, _RUNGS], sd[:, _RUNGS]


def _others(
    task: Task, seen: NDArray[np.int64], chosen: NDArray[np.int64], *, gp: bool
) -> dict[str, NDArray[np.float64]]:
    """Logarithmic times of the other methods, each (K, targets)."""
    base = _stacked(task, chosen, "predicted")[:, _RUNGS]
    result = {"none": base}
    if not len(seen):
        return result
    known = _stacked(task, seen, "predicted")[:, _RUNGS]
    observed = _stacked(task, seen, "observed")[:, _RUNGS]
    away = observed - known
    result["factor"] = base + np.nansum(away) / (np.isfinite(away).sum() + _SHRINKAGE)
    result["offset"] = base + np.nansum(away, axis=0) / (
        np.isfinite(away).sum(axis=0) + _SHRINKAGE
    )
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        plain = np.nanmean(observed + np.log(task.effective[seen])[:, None], axis=0)
        shifted = np.log(np.maximum(np.exp(observed) - task.lag[seen][:, None], 1.0))
        intrinsic = np.nanmean(shifted + np.log(task.effective[seen])[:, None], axis=0)
    rates = np.log(task.effective[chosen])[:, None]
    result["c/eta_e"] = plain - rates
    result["c/eta_e+lag"] = np.log(np.exp(intrinsic - rates) + task.lag[chosen][:, None])
    if gp:
        result["gp"] = _gaussian_process(task, seen, chosen, observed)
    return result


def _gaussian_process(
    task: Task,
    seen: NDArray[np.int64],
    chosen: NDArray[np.int64],
    observed: NDArray[np.float64],
) -> NDArray[np.float64]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel
    from sklearn.gaussian_process.kernels import RBF
    from sklearn.gaussian_process.kernels import WhiteKernel

    x = task.configurations.copy()
    x[:, 2] = 1.0 - x[:, 2]
    x = np.log(x)
    logs = np.full((len(chosen), len(TARGETS)), np.nan)
    for column in range(len(TARGETS)):
        good = np.isfinite(observed[:, column])
        if not good.any():
            continue
        y = observed[good, column]
        kernel = ConstantKernel(1.0) * RBF([2.0, 2.0, 2.0], (0.1, 100.0)) + WhiteKernel(
            0.05, (1e-4, 1.0)
        )
        # Without two trials there is nothing to fit its scales to.
        optimiser = "fmin_l_bfgs_b" if good.sum() > 1 else None
        model = GaussianProcessRegressor(kernel, optimizer=optimiser)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(x[seen[good]], y - y.mean())
        logs[:, column] = y.mean() + model.predict(x[chosen])
    return logs


def _errors(logs: NDArray[np.float64], real: NDArray[np.float64]) -> NDArray[np.float64]:
    """Relative errors in whole steps."""
    steps = np.maximum(1.0, np.ceil(np.exp(logs) - 1e-9))
    return np.asarray(np.abs(steps / np.maximum(1.0, np.ceil(real - 1e-9)) - 1.0))


def errors_of(calibration: Calibration, task: Task) -> NDArray[np.float64]:
    """Return relative errors of all runs and targets, NaN where a run did not get there.

    Args:
        calibration:
            What was learned.
        task:
            The recorded runs.

    Returns:
        Shape (K, targets).
    """
    logs, _ = _ours(calibration, task, np.arange(len(task.observations)))
    return _errors(logs, task.real)


def learning_curves(
    task: Task, n_repeats: int, *, n_processes: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Return mean errors by method and number of observed trials.

    Args:
        task:
            The recorded runs.
        n_repeats:
            Random orders of the trials.
        n_processes:
            The Gaussian process, which takes most of the time, is fitted in so many of them. All
            by default.
        seed:
            Of the orders.

    Returns:
        A row a method, number of trials, repeat, and set of runs ("all" or "mild").
    """
    rng = np.random.default_rng(seed)
    most = n_repeats if n_processes is None else n_processes
    rows = []
    for repeat in range(n_repeats):
        order = rng.permutation(len(task.observations))
        for count in COUNTS:
            seen = order[:count]
            left = np.array(
                [k for k in order[count:] if not task.same(k)[seen].any()], dtype=np.int64
            )
            calibration = calibrate([task.observations[k] for k in seen], task.prior_scale)
            ours, sd = _ours(calibration, task, left)
            logs = {"ours": ours, **_others(task, seen, left, gp=count > 0 and repeat < most)}
            real = task.real[left]
            inside = _inside(ours, sd, calibration, real)
            for group, members in (("all", left >= 0), ("mild", task.stability[left] < _MILD)):
                counted = np.isfinite(real) & np.isfinite(ours) & members[:, None]
                for method, predicted in logs.items():
                    error = _errors(predicted, real)[counted]
                    known = np.isfinite(error)
                    rows.append(
                        {
                            "task": task.name,
                            "runs": group,
                            "method": method,
                            "trials": count,
                            "repeat": repeat,
                            "error": float(error[known].mean()) if known.any() else np.nan,
                            "median": float(np.median(error[known])) if known.any() else np.nan,
                            "coverage": float(inside[counted].mean())
                            if method == "ours"
                            else np.nan,
                            "width": float(np.exp(1.2816 * sd[counted]).mean())
                            if method == "ours"
                            else np.nan,
                        }
                    )
    return rows


def _inside(
    logs: NDArray[np.float64],
    sd: NDArray[np.float64],
    calibration: Calibration,
    real: NDArray[np.float64],
) -> NDArray[np.bool_]:
    from scipy.stats import t

    half = t.ppf(0.9, calibration.degrees_of_freedom) * sd
    whole = np.ceil(real - 1e-9)
    low, high = (np.ceil(np.exp(logs + s * half) - 1e-9) for s in (-1, 1))
    return np.asarray((whole >= low) & (whole <= high))


def seed_error(task: Task) -> float:
    """Return the mean difference of runs that differ in the order of the samples only."""
    errors = [
        _errors(np.log(task.real[j]), task.real[k])
        for k in range(len(task.observations))
        for j in np.flatnonzero(task.same(k))
        if j != k
    ]
    flat = np.concatenate(errors) if errors else np.array([np.nan])
    return float(np.nanmean(flat))


def partial_errors(task: Task, n_repeats: int, *, seed: int = 1) -> list[float]:
    """Return errors of the remaining time, given a fifth of the steps to each target.

    Args:
        task:
            The recorded runs.
        n_repeats:
            Random choices of five trials to learn from.
        seed:
            Of these.

    Returns:
        One error a held-out run and target.
    """
    rng = np.random.default_rng(seed)
    errors = []
    for _ in range(n_repeats):
        order = rng.permutation(len(task.observations))
        seen = order[:_N_PARTIAL]
        calibration = calibrate([task.observations[k] for k in seen], task.prior_scale)
        for k in order[_N_PARTIAL:]:
            if task.same(k)[seen].any():
                continue
            for column, level in enumerate(_RUNGS):
                real = task.real[k, column]
                shown = int(_SHOWN * real) if np.isfinite(real) else 0
                if shown < 3 or not np.isfinite(task.observations[k].predicted[level]):
                    continue
                curve = LossCurve.of(task.losses[k][: shown + 1])
                observed, error = curve.log_first_passage_times(task.initial_loss * FRACTIONS)
                running = replace(
                    task.observations[k], observed=observed, errors=error, n_steps=shown
                )
                depths = np.minimum(DEPTHS, DEPTHS[level])
                logs = running.predicted.copy()
                logs[level:] = logs[level]
                left, _ = calibration.remaining(running, depths, logs)
                if np.isfinite(left):
                    errors.append(abs(left / max(real - shown, 1.0) - 1.0))
    return errors


def trust_after_five(
    task: Task, n_repeats: int, *, seed: int = 2
) -> dict[str, list[float] | list[bool]]:
    """Return the trust after five trials, each predicted before it was learned from.

    Args:
        task:
            The recorded runs, predicted with whichever spectrum.
        n_repeats:
            Random orders.
        seed:
            Of these.

    Returns:
        For each order the trust, whether predictions may go on to steer a search, and whether a
        warning says that training does not begin as predicted.
    """
    rng = np.random.default_rng(seed)
    learned = []
    for _ in range(n_repeats):
        trials: list[Observation] = []
        for k in rng.permutation(len(task.observations))[:5]:
            one = task.observations[k]
            logs, _ = calibrate(trials, task.prior_scale).correct(
                SimulatedFirstPassages(
                    DEPTHS[None, :],
                    one.predicted[None],
                    np.zeros((1, len(KNOTS))),
                    one.covariates[None],
                    one.instability[None],
                    np.array([one.lag]),
                )
            )
            trials.append(replace(one, expected=logs[0]))
        learned.append(calibrate(trials, task.prior_scale))
    return {
        "trust": [c.trust for c in learned],
        "trusted": [c.trusted for c in learned],
        "named": [not c.starts_as_predicted for c in learned],
    }


def _shuffled(spectrum: Spectrum, seed: int = 0) -> Spectrum:
    """The eigenvectors' rows in another order: the right eigenvalues, the wrong directions."""
    order = np.random.default_rng(seed).permutation(len(spectrum.eigenvectors))
    return replace(spectrum, eigenvectors=spectrum.eigenvectors[order])


def _other(spectrum: Spectrum, other: Spectrum) -> Spectrum:
    """Outputs and targets of the one, eigenpairs and probe of the other."""
    n = min(spectrum.n_samples, other.n_samples)
    return replace(
        other,
        initial_outputs=spectrum.initial_outputs[:n],
        targets=spectrum.targets[:n],
        metadata=spectrum.metadata,
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--store", help="URL of the spectrum store; the default one by default")
    parser.add_argument("--curves", type=Path, default=RESULTS / "curves")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--gp-repeats", type=int, help="for the Gaussian process; all by default")
    parser.add_argument("--smoke", action="store_true", help="the small digits network only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    extra: dict[str, Any] = {"seed": {}, "partial": {}, "trust": {}}
    starts = ("digits",) if options.smoke else ("digits", "residual", "efficientnet", "minilm")
    n_repeats = 2 if options.smoke else options.repeats
    for start in starts:
        paths = sorted(options.curves.glob(f"{start}-*.npz"))[: 1 if options.smoke else None]
        spectra = [spectrum_of(path.stem, options.store) for path in paths]
        for k, (path, spectrum) in enumerate(zip(paths, spectra, strict=True)):
            task = load_task(path, spectrum, most=_MOST_WRONG if options.smoke else None)
            rows += learning_curves(task, n_repeats, n_processes=options.gp_repeats)
            extra["seed"][task.name] = seed_error(task)
            extra["partial"][task.name] = partial_errors(task, max(1, n_repeats // 10))
            extra["trust"][task.name] = {"right": trust_after_five(task, n_repeats)}
            wrong = {"shuffled": _shuffled(spectrum)} if k == 0 else {}
            if k == 0 and len(spectra) > 1:
                wrong["another task's"] = _other(spectrum, spectra[-1])
            for kind, replacement in wrong.items():
                mistaken = load_task(path, replacement, most=_MOST_WRONG)
                extra["trust"][task.name][kind] = trust_after_five(mistaken, n_repeats)
            print(f"{task.name} done", flush=True)
    write(rows, extra, options.output)


def write(rows: list[dict[str, Any]], extra: dict[str, Any], output: Path) -> None:
    """Write tables, figures and the plot.

    Args:
        rows:
            Of :func:`learning_curves`.
        extra:
            Seed noise, errors from partial curves, and trust, by task.
        output:
            A folder.
    """
    output.mkdir(parents=True, exist_ok=True)
    means = _means(rows)
    with (output / "closed_loop.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, means[0].keys())
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in means
        )
    where = environment()
    kept = _summary(means, extra)
    document = {"environment": where, "summary": kept, **extra}
    (output / "closed_loop.json").write_text(json.dumps(document, indent=1) + "\n")
    update_summary(output, kept)
    lines = _tables(means, extra)
    lines += [f"Measured {where['date']} with `{where['command']}`.", ""]
    (output / "closed_loop.md").write_text("\n".join(lines))
    print("\n".join(lines))
    _draw(means, output / "closed_loop.png")


def _means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the repeats."""
    keys = ("task", "runs", "method", "trials")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in keys), []).append(row)
    return [
        dict(zip(keys, key, strict=True))
        | {
            name: _mean([r[name] for r in own])
            for name in ("error", "median", "coverage", "width")
        }
        for key, own in groups.items()
    ]


def _mean(values: list[float]) -> float:
    """Over the repeats in which a method had anything to go by."""
    known = [v for v in values if np.isfinite(v)]
    return float(np.mean(known)) if known else float("nan")


def _value(
    means: list[dict[str, Any]],
    group: str,
    runs: str,
    method: str,
    trials: int,
    name: str = "error",
) -> float:
    """Mean over the tasks of a group; networks of one group count the same."""
    values = []
    for start in GROUPS[group]:
        own = [
            row[name]
            for row in means
            if row["task"].startswith(start)
            and (row["runs"], row["method"], row["trials"]) == (runs, method, trials)
        ]
        if own:
            values.append(np.mean(own))
    return float(np.mean(values)) if values else float("nan")


def _summary(means: list[dict[str, Any]], extra: dict[str, Any]) -> dict[str, float]:
    kept = {
        "absolute_pretrained_mape_1": _value(means, "ImageNet", "mild", "ours", 1),
        "absolute_pretrained_mape_5": _value(means, "ImageNet", "mild", "ours", 5),
        "absolute_pretrained_mape_1_all": _value(means, "ImageNet", "all", "ours", 1),
        "absolute_pretrained_mape_5_all": _value(means, "ImageNet", "all", "ours", 5),
    }
    for group, prefix in (("small networks", "small_nets"), ("transformer", "transformer")):
        for count in (1, 3, 5):
            kept[f"{prefix}_mape_{count}"] = _value(means, group, "all", "ours", count)
    coverages = [
        row["coverage"]
        for row in means
        if row["method"] == "ours" and row["runs"] == "all" and row["trials"] >= 1
    ]
    kept["coverage_80_min"] = float(np.min(coverages))
    kept["coverage_80_max"] = float(np.max(coverages))
    kept["partial_curve_error"] = float(np.mean([np.mean(v) for v in extra["partial"].values()]))
    return {name: value for name, value in kept.items() if np.isfinite(value)}


def _tables(means: list[dict[str, Any]], extra: dict[str, Any]) -> list[str]:
    lines = []
    tasks = list(dict.fromkeys(row["task"] for row in means))
    for group, starts in GROUPS.items():
        names = [name for name in tasks if name.startswith(starts)]
        if not names:
            continue
        noise = ", ".join(
            f"{name} {extra['seed'][name]:.1%}"
            for name in names
            if np.isfinite(extra["seed"][name])
        )
        lines += [
            f"{group} ({', '.join(names)}), mean error by the number of observed trials:",
            "",
            f"| | {' | '.join(map(str, COUNTS))} |",
            f"| --- |{' --- |' * len(COUNTS)}",
        ]
        for method, name in METHODS.items():
            for runs in ("all", "mild") if method in ("ours", "gp") else ("all",):
                cells = [_value(means, group, runs, method, count) for count in COUNTS]
                label = name if runs == "all" else f"{name}, mild configurations"
                shown = " | ".join("-" if np.isnan(c) else f"{c:.1%}" for c in cells)
                lines.append(f"| {label} | {shown} |")
        medians = [_value(means, group, "all", "ours", count, "median") for count in COUNTS]
        lines.append(f"| ours, median error | {' | '.join(f'{c:.1%}' for c in medians)} |")
        lines += ["", f"The same run with another order of the samples: {noise}.", ""]
    lines += [
        "Ours by task: mean error, and share of times in the 80 % interval:",
        "",
        f"| | {' | '.join(map(str, COUNTS))} |",
        f"| --- |{' --- |' * len(COUNTS)}",
    ]
    for name in tasks:
        own = {
            row["trials"]: row
            for row in means
            if (row["task"], row["runs"], row["method"]) == (name, "all", "ours")
        }
        shown = " | ".join(f"{own[c]['error']:.1%} ({own[c]['coverage']:.0%})" for c in COUNTS)
        lines.append(f"| {name} | {shown} |")
    lines += [
        "",
        "| | error of the remaining time, a fifth of the steps shown: mean (median) | "
        "after five trials no longer trusted (or the first steps named as not as predicted): "
        "right spectrum, shuffled, another task's |",
        "| --- | --- | --- |",
    ]
    for name in tasks:
        partial = extra["partial"][name]
        shares = ", ".join(
            f"{1 - np.mean(of['trusted']):.0%} "
            f"({np.mean(np.array(of['named']) | ~np.array(of['trusted'])):.0%})"
            for of in extra["trust"][name].values()
        )
        error = f"{np.mean(partial):.1%} ({np.median(partial):.1%})" if partial else "-"
        lines.append(f"| {name} | {error} | {shares} |")
    return [*lines, ""]


def _draw(means: list[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator
    from matplotlib.ticker import NullFormatter

    present = [g for g in GROUPS if np.isfinite(_value(means, g, "all", "ours", 0))]
    figure, panels = plt.subplots(1, len(present), figsize=(4.5 * len(present), 4), squeeze=False)
    for panel, group in zip(panels[0], present, strict=True):
        for method, name in METHODS.items():
            errors = [100 * _value(means, group, "all", method, count) for count in COUNTS]
            style = _STYLES.get(method, {})
            panel.plot(COUNTS, errors, "o-", markersize=3, label=name.replace("`", ""), **style)
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_title(group)
        panel.set_xlabel("observed trials")
        panel.set_ylabel("mean error of the training time, %")
    panels[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
