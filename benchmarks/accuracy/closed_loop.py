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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch

from benchmarks.accuracy.closed_loop_methods import LEVELS
from benchmarks.accuracy.closed_loop_methods import load_task
from benchmarks.accuracy.closed_loop_methods import other_times
from benchmarks.accuracy.closed_loop_methods import our_times
from benchmarks.accuracy.closed_loop_methods import relative_errors
from benchmarks.accuracy.closed_loop_methods import Task
from benchmarks.accuracy.closed_loop_tables import COUNTS
from benchmarks.accuracy.closed_loop_tables import write
from benchmarks.accuracy.evaluation import spectrum_of
from benchmarks.accuracy.record import RESULTS
from optuna_ttp import Spectrum
from optuna_ttp.calibration import calibrate
from optuna_ttp.calibration import Calibration
from optuna_ttp.calibration import DEPTHS
from optuna_ttp.calibration import FRACTIONS
from optuna_ttp.calibration import KNOTS
from optuna_ttp.calibration import LossCurve
from optuna_ttp.calibration import Observation
from optuna_ttp.calibration import SimulatedFirstPassages


_MILD = 0.5
_SHOWN = 0.2
_N_PARTIAL = 5
_MOST_WRONG = 16


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
    logs, _ = our_times(calibration, task, np.arange(len(task.observations)))
    return relative_errors(logs, task.real)


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
            ours, sd = our_times(calibration, task, left)
            logs = {"ours": ours, **other_times(task, seen, left, gp=count > 0 and repeat < most)}
            real = task.real[left]
            held = inside(ours, sd, calibration, real)
            for group, members in (("all", left >= 0), ("mild", task.stability[left] < _MILD)):
                counted = np.isfinite(real) & np.isfinite(ours) & members[:, None]
                for method, predicted in logs.items():
                    error = relative_errors(predicted, real)[counted]
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
                            "coverage": float(held[counted].mean())
                            if method == "ours"
                            else np.nan,
                            "width": float(np.exp(1.2816 * sd[counted]).mean())
                            if method == "ours"
                            else np.nan,
                        }
                    )
    return rows


def inside(
    logs: NDArray[np.float64],
    sd: NDArray[np.float64],
    calibration: Calibration,
    real: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Return which real times are in the 80 % intervals of predictions, all of one shape."""
    from scipy.stats import t

    half = t.ppf(0.9, calibration.degrees_of_freedom) * sd
    whole = np.ceil(real - 1e-9)
    low, high = (np.ceil(np.exp(logs + s * half) - 1e-9) for s in (-1, 1))
    return np.asarray((whole >= low) & (whole <= high))


def seed_error(task: Task) -> float:
    """Return the mean difference of runs that differ in the order of the samples only."""
    errors = [
        relative_errors(np.log(task.real[j]), task.real[k])
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
            for column, level in enumerate(LEVELS):
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


def predicted_before(task: Task, chosen: NDArray[np.int64]) -> list[Observation]:
    """Return chosen trials in their order, each predicted after learning from those before."""
    trials: list[Observation] = []
    for k in chosen:
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
    return trials


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
        chosen = rng.permutation(len(task.observations))[:5]
        learned.append(calibrate(predicted_before(task, chosen), task.prior_scale))
    return {
        "trust": [c.trust for c in learned],
        "trusted": [c.trusted for c in learned],
        "named": [not c.starts_as_predicted for c in learned],
    }


def shuffled(spectrum: Spectrum, seed: int = 0) -> Spectrum:
    """Return a spectrum with its eigenvectors' rows in another order: right eigenvalues only."""
    order = np.random.default_rng(seed).permutation(len(spectrum.eigenvectors))
    return replace(spectrum, eigenvectors=spectrum.eigenvectors[order])


def other_tasks(spectrum: Spectrum, other: Spectrum) -> Spectrum:
    """Return the outputs and targets of one with eigenpairs and probe from the other."""
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
            wrong = {"shuffled": shuffled(spectrum)} if k == 0 else {}
            if k == 0 and len(spectra) > 1:
                wrong["another task's"] = other_tasks(spectrum, spectra[-1])
            for kind, replacement in wrong.items():
                mistaken = load_task(path, replacement, most=_MOST_WRONG)
                extra["trust"][task.name][kind] = trust_after_five(mistaken, n_repeats)
            print(f"{task.name} done", flush=True)
    write(rows, extra, options.output)


if __name__ == "__main__":
    main()
