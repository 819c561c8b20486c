"""The read-only properties of a predictor."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from optuna_ttp.calibration import Calibration
    from optuna_ttp.dynamics import KernelGrowth
    from optuna_ttp.dynamics import Schedule
    from optuna_ttp.dynamics import SGD
    from optuna_ttp.dynamics import Target
    from optuna_ttp.prediction._estimator import Estimator
    from optuna_ttp.prediction._settings import PredictorSettings
    from optuna_ttp.spectrum import Spectrum
    from optuna_ttp.spectrum import Throughput


class PredictorProperties:
    """The read-only properties of :class:`~optuna_ttp.TrainingTimePredictor`."""

    short_run_seconds: float
    _estimator: Estimator

    @property
    def spectrum(self) -> Spectrum:
        """The Jacobian eigenspectrum of the task."""
        return self._estimator.simulator.spectrum

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the task."""
        return self.spectrum.metadata.fingerprint

    @property
    def setup_seconds(self) -> float:
        """The seconds that computing the spectrum and the short training runs took together."""
        return self.spectrum.metadata.compute_seconds + self.short_run_seconds

    @property
    def optimizer(self) -> SGD:
        """The optimiser that training uses."""
        return self._estimator.simulator.optimizer

    @property
    def default_momentum(self) -> float | None:
        """The momentum of configurations without one, or None if every trial must give one."""
        return self.optimizer.momentum

    @property
    def schedule(self) -> Schedule:
        """The schedule of the learning rate."""
        return self._estimator.simulator.schedule

    @property
    def settings(self) -> PredictorSettings:
        """The settings for experts, as given."""
        return self._estimator.simulator.settings

    @property
    def kernel_growth(self) -> KernelGrowth | None:
        """The predicted growth of the kernel, or None if the kernel is frozen."""
        return self._estimator.simulator.kernel_growth

    @property
    def n_samples(self) -> int:
        """The number of samples that will be trained on."""
        return self._estimator.simulator.n_samples

    @property
    def max_steps(self) -> int:
        """The horizon in optimiser steps."""
        return self._estimator.simulator.max_steps

    @property
    def target(self) -> Target:
        """The quantity that training is to bring to a value, and this value."""
        return self._estimator.simulator.target

    @property
    def depth(self) -> float:
        """The training loss at the target over the initial one, on the linearised path.

        Both are losses above the lowest loss that label smoothing makes possible. It is NaN if
        the target depends on the end of the curve.
        """
        return self._estimator.simulator.excess_fraction

    @property
    def target_depth(self) -> float:
        """The logarithm of the initial training loss over the training loss at the target.

        If the target is not a training loss, the loss is that of the linearised model at the
        target. It is NaN if the target depends on the end of the curve.
        """
        return -math.log(max(self._estimator.simulator.loss_fraction, 1e-300))

    @property
    def best_depth(self) -> float:
        """The logarithm of initial over training loss when the validation loss is lowest.

        It is predicted for slow full-batch training of the linearised network; infinite without
        validation data, or if the validation loss still falls after 20,000 steps.
        """
        return self._estimator.simulator.best_depth

    @property
    def initial_loss(self) -> float:
        """The training loss at the pretrained weights."""
        return self._estimator.simulator.initial_loss

    @property
    def initial_loss_sd(self) -> float:
        """The standard deviation of the losses of single samples at the pretrained weights."""
        return self._estimator.simulator.initial_loss_sd

    @property
    def throughput(self) -> Throughput | None:
        """The seconds per training step by batch size, or None if they were not measured."""
        return self._estimator.throughput

    @property
    def calibration(self) -> Calibration:
        """The corrections that were learned from observed trials, and their uncertainty."""
        return self._estimator.calibration

    @property
    def has_surface(self) -> bool:
        """True if times depend on learning rate, batch size and momentum alone."""
        return self._estimator.simulator.has_surface

    @property
    def reliable(self) -> bool:
        """True if the network stays close to its linearisation on the way to the target.

        See :func:`~optuna_ttp.calibration.is_reliable`. Once trials were observed, it is true if
        predictions are trusted and the growth of the kernel is known well enough.
        :attr:`Prediction.reliable` says this of single configurations.
        """
        return self._estimator.reliable
