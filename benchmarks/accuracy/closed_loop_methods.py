"""Recorded trials of ``closed_loop``, and predictions of their times after some of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
import warnings

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy.evaluation import full_curve
from benchmarks.accuracy.record import read
from optuna_ttp import Spectrum
from optuna_ttp import TrainingTimePredictor
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
from optuna_ttp.study import broke_down


TARGETS = (0.7, 0.5, 0.35, 0.25, 0.15, 0.1)
LEVELS = [int(np.argmin(np.abs(FRACTIONS - f))) for f in TARGETS]
# Logarithms of factors have this prior variance over that of a trial.
_SHRINKAGE = 0.1
# A prediction is cut off where it is so many times later than the run was observed.
_PATIENCE = 3


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


def our_times(
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
    return logs[:, LEVELS], sd[:, LEVELS]


def other_times(
    task: Task, seen: NDArray[np.int64], chosen: NDArray[np.int64], *, gp: bool
) -> dict[str, NDArray[np.float64]]:
    """Logarithmic times of the other methods, each (K, targets)."""
    base = _stacked(task, chosen, "predicted")[:, LEVELS]
    result = {"none": base}
    if not len(seen):
        return result
    known = _stacked(task, seen, "predicted")[:, LEVELS]
    observed = _stacked(task, seen, "observed")[:, LEVELS]
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


def relative_errors(logs: NDArray[np.float64], real: NDArray[np.float64]) -> NDArray[np.float64]:
    """Relative errors in whole steps."""
    steps = np.maximum(1.0, np.ceil(np.exp(logs) - 1e-9))
    return np.asarray(np.abs(steps / np.maximum(1.0, np.ceil(real - 1e-9)) - 1.0))
