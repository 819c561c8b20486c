"""Training-loss curves of trials, into and out of Optuna's storage."""

from __future__ import annotations

from types import TracebackType
from typing import Any
from typing import SupportsFloat
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from optuna_ttp._optuna_compat import trials_of
from optuna_ttp.calibration import calibrate
from optuna_ttp.calibration import Calibration
from optuna_ttp.calibration import smooth
from optuna_ttp.ledger import entry
from optuna_ttp.ledger import PREDICTION


if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from optuna_ttp.predictor import TrainingTimePredictor


CURVE = "ttp:curve"
# A curve ends where the loss is NaN, or so large that sums of losses would overflow.
_BLOWN_UP = 1e300
# How far above the target a curve may end and count as having reached it.
_AT_TARGET = 1.05


class TrainingLog:
    """Records a trial's training loss, so that predictions can be checked and corrected.

    Example:
        >>> with TrainingLog(trial) as log:
        ...     for x, y in loader:
        ...         loss = train_step(x, y)
        ...         log.step(loss)

    Args:
        trial:
            The trial of the objective.
    """

    def __init__(self, trial: optuna.trial.Trial) -> None:
        self._trial = trial
        self._losses: list[float] = []
        self._next_write = 32

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A pruned or failed trial's curve is an observation like any other.
        self.close()

    def step(self, loss: SupportsFloat) -> None:
        """Record the mini-batch loss of one optimiser step, as a mean over the batch.

        Args:
            loss:
                The loss. A tensor of one element will do.
        """
        # A tensor that requires gradients warns about being converted, but not about its item.
        item = getattr(loss, "item", None)
        self._losses.append(float(loss if item is None else item()))
        # What is written as training goes on survives a killed process.
        if len(self._losses) == self._next_write:
            self._next_write *= 2
            self.close()

    def close(self) -> None:
        """Write the smoothed curve to the trial. Leaving the ``with`` block does this."""
        if not self._losses:
            return
        losses = np.array(self._losses)
        finite = np.abs(losses) < _BLOWN_UP
        n_finite = len(losses) if finite.all() else int(np.argmin(finite))
        # Loss i is that of the weights after i steps.
        points = _recorded_steps(n_finite)
        smoothed = smooth(losses[:n_finite], points)
        self._trial.set_user_attr(
            CURVE,
            {
                "trial": self._trial.number,
                "n_steps": len(losses),
                "steps": points.tolist(),
                "losses": [float(f"{loss:.6g}") for loss in smoothed],
            },
        )


def observed_curve(
    trial: FrozenTrial,
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return the smoothed training-loss curve of a trial.

    Args:
        trial:
            Any trial.

    Returns:
        Steps and losses, or :obj:`None` where none was recorded.
    """
    curve: dict[str, Any] | None = entry(trial, CURVE)
    if curve is None:
        return None
    return np.array(curve["steps"], dtype=np.float64), np.array(curve["losses"], dtype=np.float64)


def observed_steps(trial: FrozenTrial, predictor: TrainingTimePredictor) -> float:
    """Return the step at which a trial's smoothed training loss was at the predictor's target.

    Args:
        trial:
            Any trial.
        predictor:
            Knows the target.

    Returns:
        The step; infinity where the target was not reached, NaN where nothing was recorded.
    """
    curve = observed_curve(trial)
    if curve is None or predictor.target.quantity != "loss" or not len(curve[0]):
        return float("nan")
    steps, losses = curve
    passage = predictor.target.first_passage(steps, losses)
    # A trial that stops at its target ends on it, give or take the noise of the last batches.
    if not np.isfinite(passage) and losses[-1] <= _AT_TARGET * predictor.target.value:
        return float(steps[-1])
    return passage


def calibration_of(study: optuna.Study, predictor: TrainingTimePredictor) -> Calibration:
    """Learn from a study's finished trials how predicted times relate to observed ones.

    Args:
        study:
            The study.
        predictor:
            Knows task and target. Predictions for another task or target are left out.

    Returns:
        What was learned; nothing where no trial recorded its training loss.
    """
    predicted, observed = [], []
    for trial in trials_of(study):
        prediction = entry(trial, PREDICTION)
        if (
            prediction is None
            or prediction["fingerprint"] != predictor.spectrum.metadata.fingerprint
        ):
            continue
        if prediction["target"] != predictor.target.value:
            continue
        steps = prediction["uncalibrated_steps"]
        predicted.append(float("inf") if steps is None else steps)
        observed.append(observed_steps(trial, predictor))
    return calibrate(predicted, observed)


def _recorded_steps(n_steps: int) -> NDArray[np.int64]:
    """Every step at first, then steps 5 % apart, and the last one."""
    points = [0]
    while points[-1] < n_steps - 1:
        points.append(max(points[-1] + 1, int(points[-1] * 1.05)))
    points[-1] = max(0, n_steps - 1)
    return np.unique(points) if n_steps else np.zeros(0, dtype=np.int64)
