"""Predictions of configurations from one spectrum, target and state of knowledge."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike

from optuna_ttp._util.arrays import Booleans
from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers
from optuna_ttp.calibration import Observation
from optuna_ttp.prediction._configurations import Configurations
from optuna_ttp.prediction._prediction import Prediction


if TYPE_CHECKING:
    from optuna_ttp.calibration import Calibration
    from optuna_ttp.dynamics import KernelGrowth
    from optuna_ttp.dynamics import Optimizer
    from optuna_ttp.dynamics import Schedule
    from optuna_ttp.dynamics import Target
    from optuna_ttp.prediction._estimator import Estimator
    from optuna_ttp.spectrum import Throughput


class ConfigurationPredictor:
    """Predicts configurations by an estimator: steps, seconds, losses and stability.

    Its subclass :class:`~optuna_ttp.TrainingTimePredictor` makes the estimator of a spectrum, and
    another one as trials are observed.
    """

    _estimator: Estimator

    @property
    def optimizer(self) -> Optimizer:
        """The optimiser that training uses."""
        return self._estimator.simulator.optimizer

    @property
    def default_momentum(self) -> float | None:
        """The momentum of configurations without one, or None if every trial must give one."""
        return self.optimizer.default_momentum

    @property
    def schedule(self) -> Schedule:
        """The schedule of the learning rate."""
        return self._estimator.simulator.schedule

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

    def predict(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike | None = None,
        *,
        max_steps: ArrayLike | None = None,
        full_curve: bool = False,
    ) -> Prediction:
        """Predict the training time of one configuration, or of many that are broadcast together.

        Args:
            learning_rate:
                Learning rates, positive.
            batch_size:
                Batch sizes: whole numbers from 1 to N, the number of samples.
            momentum:
                Momenta in [0, 1), as in :class:`torch.optim.SGD`. The optimiser's by default.
            max_steps:
                The horizon in steps. The predictor's by default.
            full_curve:
                True for curves up to the horizon, which also adds the curves of the validation
                samples. By default curves end at the target. A configuration whose learning rate
                is more than eight times the largest stable one has no curve.

        Returns:
            The predicted steps, epochs, seconds, interval, outcomes and curves.

        Raises:
            ValueError:
                If a hyperparameter is out of its range.
        """
        configurations = self._configurations(learning_rate, batch_size, momentum, max_steps)
        return self._estimator.predict(configurations, full_curve=full_curve)

    def estimate(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike | None = None,
        *,
        max_steps: ArrayLike | None = None,
    ) -> Prediction:
        """Predict as :meth:`predict` does, but from the response surface, and without curves.

        A prediction takes milliseconds once the surface is built, see :meth:`score`.
        Configurations that the surface would have to extrapolate are simulated. The sampler and
        the pruner use this method.

        Args:
            learning_rate:
                Learning rates, positive.
            batch_size:
                Batch sizes: whole numbers from 1 to N, the number of samples.
            momentum:
                Momenta in [0, 1). The optimiser's by default.
            max_steps:
                The horizon in steps. The predictor's by default.

        Returns:
            The predicted steps, epochs, seconds, interval and outcomes, without curves.

        Raises:
            ValueError:
                If a hyperparameter is out of its range.
        """
        configurations = self._configurations(learning_rate, batch_size, momentum, max_steps)
        return self._estimator.estimate(configurations)

    def score(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike | None = None,
        *,
        simulate_outside: bool = True,
    ) -> Floats:
        """Return approximate seconds to the target, to rank many configurations by.

        They are interpolated in a response surface, which is built by simulation when it is first
        needed (this takes seconds), from the eigenpairs that hold 95 % of the trace; then a score
        takes microseconds. Configurations that the surface would have to extrapolate (see
        :meth:`is_extrapolated`) are simulated instead.

        Args:
            learning_rate:
                Learning rates, positive.
            batch_size:
                Batch sizes: whole numbers from 1 to N, the number of samples.
            momentum:
                Momenta in [0, 1). The optimiser's by default.
            simulate_outside:
                False to extrapolate instead of simulating, if speed matters more. True by
                default.

        Returns:
            Seconds (steps if the seconds per step are not known), of the common shape. They are
            infinite if the target is not reached or training is predicted to diverge.

        Raises:
            ValueError:
                If a hyperparameter is out of its range.
        """
        configurations = self._configurations(learning_rate, batch_size, momentum)
        seconds = self._estimator.score(configurations, simulate_outside=simulate_outside)
        return seconds.reshape(configurations.shape)

    def is_extrapolated(
        self, learning_rate: ArrayLike, batch_size: ArrayLike, momentum: ArrayLike | None = None
    ) -> Booleans:
        """Return which configurations the response surface would have to extrapolate.

        Args:
            learning_rate:
                Learning rates, positive.
            batch_size:
                Batch sizes: whole numbers from 1 to N, the number of samples.
            momentum:
                Momenta in [0, 1). The optimiser's by default.

        Returns:
            Booleans of the common shape. True for momentum above 0.995, for batches of fewer than
            four samples, if only some of the simulated configurations nearby reach the target,
            and always if the target depends on the end of the curve, or the learning rate follows
            a schedule (under Adam: one of PyTorch). Under Adam they are those outside of the
            simulated momenta, up to 0.95, batch sizes, down to four samples, and learning rates.
        """
        configurations = self._configurations(learning_rate, batch_size, momentum)
        return self._estimator.is_extrapolated(configurations).reshape(configurations.shape)

    def depth_after(
        self, learning_rate: Floats, batch_size: Integers, momentum: Floats, steps: Floats
    ) -> Floats:
        """Return the depth after some steps: the logarithm of initial over present training loss.

        Args:
            learning_rate:
                Learning rates, shape ``(K,)``.
            batch_size:
                Batch sizes, shape ``(K,)``.
            momentum:
                Momenta, shape ``(K,)``.
            steps:
                The steps of each configuration, shape ``(K,)``.

        Returns:
            Depths by the response surface, shape ``(K,)``. Beyond the target the loss is taken to
            fall at the same rate in the logarithm of the steps; a loss that does not reach a loss
            level is taken to stay at the level above. Depths are zero if training is predicted to
            diverge, or the surface has no times for the configuration.
        """
        configurations = self._configurations(learning_rate, batch_size, momentum)
        return self._estimator.depth_after(configurations, steps)

    def remaining_steps(
        self,
        running: Observation,
        configuration: tuple[float, int, float],
        depth: float | None = None,
    ) -> tuple[float, float] | None:
        """Return the steps that a running trial still needs, given its observed loss curve.

        See :meth:`~optuna_ttp.Calibration.remaining`.

        Args:
            running:
                The trial's prediction by :meth:`estimate`, and its observed curve so far.
            configuration:
                The trial's learning rate, batch size and momentum.
            depth:
                The depth to reach: the logarithm of the initial training loss over a training
                loss on the way to the target. The target's by default.

        Returns:
            The steps after the last observed step, and the standard deviation of their logarithm;
            :obj:`None` if the response surface does not cover the configuration and depth.
        """
        one = self._configurations(*([value] for value in configuration))
        return self._estimator.remaining_steps(running, one, depth)

    def seconds_per_step(self, batch_size: ArrayLike) -> Floats:
        """Return the seconds per training step; NaN if they were not measured.

        Args:
            batch_size:
                Batch sizes, of any shape.

        Returns:
            Seconds, of the same shape.
        """
        return self._estimator.seconds_per_step(batch_size)

    def max_learning_rate(
        self, batch_size: ArrayLike, momentum: ArrayLike | None = None
    ) -> Floats:
        """Return the largest stable learning rate at the pretrained weights.

        Args:
            batch_size:
                Batch sizes: whole numbers from 1 to N, the number of samples.
            momentum:
                Momenta in [0, 1). The optimiser's by default.

        Returns:
            Learning rates of the common shape; see
            :class:`optuna_ttp.dynamics.StabilityLimit`.
        """
        c = self._configurations(1.0, batch_size, momentum)
        largest = self._estimator.simulator.max_learning_rate(c.batch_size, c.momentum)
        return largest.reshape(c.shape)

    def _configurations(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike | None = None,
        max_steps: ArrayLike | None = None,
    ) -> Configurations:
        """Return checked configurations of one shape, with defaults for momentum and horizon."""
        return Configurations.of(
            learning_rate,
            batch_size,
            (self.default_momentum or 0.0) if momentum is None else momentum,
            self.max_steps if max_steps is None else max_steps,
            self.n_samples,
        )
