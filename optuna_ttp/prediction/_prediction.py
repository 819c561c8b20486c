"""The predicted training times of one configuration, or of many at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optuna_ttp._util.arrays import Booleans
from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers
from optuna_ttp._util.words import counted
from optuna_ttp.prediction._outcome import Outcome


_IN_WORDS = {
    Outcome.CONVERGES: "reach the target",
    Outcome.NOT_REACHED: "do not",
    Outcome.DIVERGES: "diverge",
}


@dataclass(frozen=True, eq=False)
class Prediction:
    """The predicted training time of one configuration or of an array of them.

    If :meth:`~optuna_ttp.TrainingTimePredictor.predict` is given scalars, the arrays have the
    shape ``()``, and ``float(prediction.steps)`` and :attr:`outcome` are plain values.

    Attributes:
        learning_rate:
            The configurations' learning rates. All attributes have the common shape of the
            hyperparameters, unless another shape is given here.
        batch_size:
            The configurations' batch sizes.
        momentum:
            The configurations' momenta.
        steps:
            Optimiser steps to the target; infinity if it is not reached.
        steps_low:
            Lower end of the interval that holds the real steps in eight of ten cases.
        steps_high:
            Upper end of this interval.
        epochs:
            Passes over the data to the target.
        seconds:
            Seconds of training to the target; NaN if the seconds per step are not known.
        outcomes:
            ``"converges"``, ``"diverges"`` or ``"not_reached"`` (within the horizon).
        p_converges:
            Probability that the target is reached within the horizon.
        p_diverges:
            Probability that training diverges. The probability of ``"not_reached"`` is one minus
            both probabilities.
        reliable:
            True if the network stays close to its linearisation on the way to the target. Once
            trials were observed, true if the predicted error is small: close to the edge of
            stability it may be large, although the predictor is reliable.
        stability:
            Learning rate over the largest stable one. Above one, training may go through a loss
            spike, or never recover from it.
        max_steps:
            The horizon, in steps.
        strides:
            Optimiser steps that were simulated as one. One means that every step was simulated.
        curve_steps:
            Steps of the predicted curves, along an additional last axis; NaN after their end.
        curves:
            Simulated quantities at these steps, for the first of the seeds: ``"loss"``,
            ``"accuracy"`` (of classifiers), ``"validation_loss"`` and ``"validation_accuracy"``
            (if the task has validation data and full curves were asked for, or the target is
            one of them), and ``"smoothed_loss"`` (if the predictor has a smoothing).
        log_first_passage_times:
            Logarithm of the simulated step at which each of the loss levels
            :data:`optuna_ttp.calibration.DEPTHS` is passed, along an additional last axis. It is
            NaN for levels below the target, and if a level is not reached. A calibration uses
            this attribute and those below once the trial has run.
        expected_log_first_passage_times:
            The same logarithms, corrected by observed trials.
        covariates:
            The variables that the errors of predicted times depend on, along an additional last
            axis. See :func:`optuna_ttp.calibration.covariates`.
        instability:
            Learning rate over the largest stable one, times the predicted growth of the kernel,
            at the same loss levels. See :class:`optuna_ttp.calibration.Observation`.
        log_growth:
            Logarithm of the factor on the kernel's predicted growth in the simulation, at
            :data:`optuna_ttp.calibration.KNOTS`.
    """

    learning_rate: Floats
    batch_size: Integers
    momentum: Floats
    steps: Floats
    steps_low: Floats
    steps_high: Floats
    epochs: Floats
    seconds: Floats
    outcomes: NDArray[np.str_]
    p_converges: Floats
    p_diverges: Floats
    reliable: Booleans
    stability: Floats
    max_steps: Integers
    strides: Integers
    curve_steps: Floats
    curves: dict[str, Floats]
    log_first_passage_times: Floats
    expected_log_first_passage_times: Floats
    covariates: Floats
    instability: Floats
    log_growth: Floats

    @property
    def curve_losses(self) -> Floats:
        """The training loss over all samples at :attr:`curve_steps`, of the same shape."""
        return self.curves["loss"]

    @property
    def outcome(self) -> Outcome:
        """The outcome of a single configuration.

        Raises:
            ValueError:
                If there are several configurations; use :attr:`outcomes` for them.
        """
        if self.outcomes.size != 1:
            raise ValueError(
                f"outcome is for a single configuration but got {self.outcomes.size}. "
                "Use outcomes."
            )
        return Outcome(str(self.outcomes.item()))

    @property
    def summary(self) -> str:
        """A single configuration's prediction in a few words, as in ``13 steps (11 to 14)``.

        Raises:
            ValueError:
                If there are several configurations.
        """
        unreliable = "" if self.reliable.item() else ", unreliable"
        if self.outcome == Outcome.DIVERGES:
            return f"training diverges (probability {self.p_diverges.item():.0%})"
        if self.outcome == Outcome.NOT_REACHED:
            return f"more than {counted(self.max_steps.item(), 'step')}{unreliable}"
        interval = f"{_in_steps(self.steps_low)} to {_in_steps(self.steps_high)}"
        return f"{counted(self.steps.item(), 'step')} ({interval}){unreliable}"

    def __len__(self) -> int:
        return int(self.steps.size)

    def __str__(self) -> str:
        if self.steps.size != 1:
            kinds, counts = np.unique(self.outcomes, return_counts=True)
            by_kind = dict(zip(kinds, counts, strict=True))
            named = [f"{by_kind[k]} {text}" for k, text in _IN_WORDS.items() if k in by_kind]
            return f"{self.steps.size} configurations: {', '.join(named)}"
        unreliable = "" if self.reliable.item() else "; unreliable"
        outcome = self.outcome
        if outcome == Outcome.CONVERGES:
            epochs = counted(self.epochs.item(), "epoch", ".3g")
            text = f"{counted(self.steps.item(), 'step')} ({epochs}"
            if np.isfinite(self.seconds.item()):
                text += f", {self.seconds.item():.3g} s"
            high = _in_steps(self.steps_high)
            interval = f"{_in_steps(self.steps_low)} to {high} step{'' if high == '1' else 's'}"
            return f"converges: {text}), 80 % interval {interval}{unreliable}"
        if outcome == Outcome.DIVERGES:
            return (
                f"diverges: the learning rate is {self.stability.item():.3g} times the largest "
                f"stable one (probability {self.p_diverges.item():.0%})"
            )
        return f"not reached within {counted(self.max_steps.item(), 'step')}{unreliable}"


def _in_steps(steps: Floats) -> str:
    """Return a number of steps as text: ``12,345``, or ``2e+07`` from ten million steps on."""
    return f"{steps.item():,.0f}" if steps.item() < 1e7 else f"{steps.item():.0e}"
