"""What sampler and pruner ask: many configurations at once, from the response surface."""

from __future__ import annotations

from dataclasses import replace
import math

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray

from optuna_ttp.calibration import Calibration
from optuna_ttp.calibration import DEPTHS
from optuna_ttp.calibration import KNOTS
from optuna_ttp.calibration import Observation
from optuna_ttp.dynamics import ResponseSurface
from optuna_ttp.dynamics import Target
from optuna_ttp.prediction._configurations import Configurations
from optuna_ttp.prediction._corrected_path import CorrectedPath
from optuna_ttp.prediction._curves import Curves
from optuna_ttp.prediction._first_passage_times import FirstPassageTimes
from optuna_ttp.prediction._prediction import Prediction
from optuna_ttp.spectrum import Throughput


# Simulations without corrections go on for up to so many times the horizon, as a logarithm.
_MOST_SLACK = 3.0
# What the surface gave up is simulated for so many times as long.
_PATIENT = 20.0


class Estimator:
    """The part of :class:`~optuna_ttp.TrainingTimePredictor` that a search uses.

    Args:
        path:
            What is predicted, as trials have corrected it.
        throughput:
            Seconds per step; :obj:`None` where they were not measured.
    """

    def __init__(self, path: CorrectedPath, throughput: Throughput | None) -> None:
        self._corrected = path
        self.throughput = throughput

    @property
    def calibration(self) -> Calibration:
        """What was learned from observed trials."""
        return self._corrected.calibration

    @property
    def target(self) -> Target:
        """What is to be reached."""
        return self._corrected.path.target

    @property
    def target_depth(self) -> float:
        """Logarithm of the initial training loss over that at the target.

        Of the linearised path where the target is not a training loss; NaN where it depends on the
        end of the curve.
        """
        return -math.log(max(self._corrected.path.fraction, 1e-300))

    @property
    def max_steps(self) -> int:
        """The horizon."""
        return self._corrected.path.max_steps

    @property
    def n_samples(self) -> int:
        """The number of samples that will be trained on."""
        return self._corrected.path.simulator.n_samples

    @property
    def initial_loss(self) -> float:
        """The training loss at the pretrained weights."""
        return self._corrected.path.simulator.initial_loss

    @property
    def initial_loss_sd(self) -> float:
        """Standard deviation of the losses of single samples at the pretrained weights."""
        return self._corrected.path.simulator.initial_loss_sd

    @property
    def has_surface(self) -> bool:
        """Whether times are a function of learning rate, batch size and momentum alone."""
        return self._corrected.path.has_surface

    def estimate(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike | None = None,
        *,
        max_steps: ArrayLike | None = None,
    ) -> Prediction:
        """Predict as :meth:`predict` does, but from the response surface, and without curves.

        A prediction takes milliseconds once the surface is built, see :meth:`score`. What the
        surface would have to extrapolate is simulated. This is what sampler and pruner use.

        Args:
            learning_rate:
                Positive.
            batch_size:
                Whole numbers from 1 to N.
            momentum:
                In [0, 1). That of the optimiser by default.
            max_steps:
                The horizon in steps, if another one than the predictor's.

        Returns:
            Steps, epochs, seconds, interval and outcome; the curves are empty.

        Raises:
            ValueError:
                If a hyperparameter is out of its range.
        """
        configurations = self._check_configuration(
            learning_rate, batch_size, momentum, self.max_steps if max_steps is None else max_steps
        )
        hopeless = self._corrected.is_hopeless(configurations)
        surface = self._corrected.path.surface if self.has_surface else None
        places = self._places(configurations)
        steps, outside = _scored(surface, *places)
        # The surface ends at the predictor's horizon, and where it gave up.
        longest = configurations.max_steps
        if surface is not None:
            patience = surface.patience(places[0], places[2])
            outside |= ~np.isfinite(steps) & (longest > np.minimum(patience, self.max_steps))
            longest = np.minimum(longest, np.ceil(_PATIENT * patience).astype(np.int64))
        simulated = np.flatnonzero(outside & ~hopeless)
        depths, logs = (
            (DEPTHS[-1:], np.full((len(configurations), 1), np.nan))
            if surface is None
            else (surface.depths, surface.log_first_passage_times(*places))
        )
        first_passages = FirstPassageTimes.interpolated(depths, logs, hopeless)
        if len(simulated):
            # As the surface is: without what trials have corrected, which comes afterwards.
            plain = replace(self._corrected, calibration=Calibration.none())
            slack = math.exp(float(np.clip(self._corrected.log_growth.max(), 0.0, _MOST_SLACK)))
            chosen = configurations.rows(simulated)
            further = np.ceil(slack * longest[simulated]).astype(np.int64)
            runs = plain.simulated(replace(chosen, max_steps=further), n_seeds=1)
            own = FirstPassageTimes.of(
                runs, self.target, self.initial_loss, len(configurations), simulated
            )
            first_passages = first_passages.updated(own, simulated)
        return self._corrected.predicted(
            configurations,
            first_passages,
            Curves.none(len(configurations)),
            self.seconds_per_step(configurations.batch_size),
            np.zeros(len(KNOTS)),
        )

    def remaining_steps(
        self,
        running: Observation,
        configuration: tuple[float, int, float],
        depth: float | None = None,
    ) -> tuple[float, float] | None:
        """Return how long a running trial still takes, given its own curve.

        See :meth:`~optuna_ttp.Calibration.remaining`.

        Args:
            running:
                What was predicted for it by :meth:`estimate`, and seen of it so far.
            configuration:
                Its learning rate, batch size and momentum.
            depth:
                Where to: the logarithm of the initial training loss over another one on the way to
                the target. The target by default.

        Returns:
            Steps from the last one that was seen, and the standard deviation of their logarithm;
            :obj:`None` where the response surface does not know.
        """
        one_rate, one_size, one_mass = ([value] for value in configuration)
        one = self._check_configuration(one_rate, one_size, one_mass, self.max_steps)
        if not self.has_surface:
            return None
        surface = self._corrected.path.surface
        if surface.steps(*self._places(one))[1].any():
            return None
        first_passages = surface.log_first_passage_times(*self._places(one))[0]
        aim = surface.depths[-1] if depth is None else min(depth, surface.depths[-1])
        passed = np.isfinite(first_passages)
        goal = (
            np.interp(aim, surface.depths[passed], first_passages[passed])
            if passed.any()
            else np.nan
        )
        if not np.isfinite(goal) or surface.depths[passed][-1] < aim - 1e-9:
            return None
        if not np.isfinite(running.predicted).any():
            return None
        depths = np.append(DEPTHS, np.inf).clip(max=aim)
        steps = np.interp(depths, surface.depths[passed], first_passages[passed])
        return self.calibration.remaining(running, depths, steps)

    def score(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike | None = None,
        *,
        simulate_outside: bool = True,
    ) -> NDArray[np.float64]:
        """Return approximate seconds to the target for many configurations, in microseconds each.

        For ranking candidates: interpolated in a response surface, which is built by simulation
        when it is first needed (seconds), from the eigenpairs that hold 95 % of the trace. What
        the surface would have to extrapolate (see :meth:`is_extrapolated`) is simulated instead.

        Args:
            learning_rate:
                Positive.
            batch_size:
                Whole numbers from 1 to N.
            momentum:
                In [0, 1). That of the optimiser by default.
            simulate_outside:
                Turn off where speed matters more. On by default.

        Returns:
            Seconds (steps where the time of a step is not known) of the common shape; infinite
            where the target is out of reach or training is predicted to diverge.

        Raises:
            ValueError:
                If a hyperparameter is out of its range.
        """
        configurations = self._check_configuration(
            learning_rate, batch_size, momentum, self.max_steps
        )
        hopeless = self._corrected.is_hopeless(configurations)
        surface = self._corrected.surface if self.has_surface else None
        steps, outside = _scored(surface, *self._places(configurations))
        outside &= ~hopeless
        if simulate_outside and outside.any():
            chosen = configurations.rows(np.flatnonzero(outside))
            runs = self._corrected.simulated(chosen, n_seeds=1)
            first_passages = FirstPassageTimes.of(
                runs, self.target, self.initial_loss, len(chosen), np.arange(len(chosen))
            )
            logs = first_passages.log_steps
            if self.calibration.n_observed:
                logs, _ = self._corrected.corrected(
                    chosen, first_passages, self._corrected.log_growth
                )
            steps[outside] = np.ceil(np.exp(np.nan_to_num(logs[:, -1], nan=np.inf)) - 1e-9)
        steps = np.where(hopeless | (steps > configurations.max_steps), np.inf, steps)
        per_step = self.seconds_per_step(configurations.batch_size)
        seconds = steps * np.where(np.isnan(per_step), 1.0, per_step)
        return np.asarray(seconds).reshape(configurations.shape)

    def is_extrapolated(
        self, learning_rate: ArrayLike, batch_size: ArrayLike, momentum: ArrayLike | None = None
    ) -> NDArray[np.bool_]:
        """Tell where the response surface would have to extrapolate.

        Args:
            learning_rate:
                Positive.
            batch_size:
                Whole numbers from 1 to N.
            momentum:
                In [0, 1). That of the optimiser by default.

        Returns:
            The common shape: momentum above 0.995, batches of fewer than four samples, the border
            of what reaches the target, and everything where the learning rate follows a schedule
            or the target depends on the end of the curve.
        """
        configurations = self._check_configuration(
            learning_rate, batch_size, momentum, self.max_steps
        )
        surface = self._corrected.path.surface if self.has_surface else None
        return _scored(surface, *self._places(configurations))[1].reshape(configurations.shape)

    def depth_after(
        self,
        learning_rate: NDArray[np.float64],
        batch_size: NDArray[np.int64],
        momentum: NDArray[np.float64],
        steps: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Return how deep the training loss is after some steps, from the response surface.

        Args:
            learning_rate:
                Shape ``(K,)``.
            batch_size:
                Shape ``(K,)``.
            momentum:
                Shape ``(K,)``.
            steps:
                Shape ``(K,)``.

        Returns:
            Logarithms of the initial loss over the loss, shape ``(K,)``. Behind the target the
            loss is taken to go on falling as fast in the logarithm of the steps; where it stays
            above a level it is taken to be at the last one that was passed. Zero where training is
            predicted to diverge, or nothing is known.
        """
        if not self.has_surface:
            return np.zeros(len(learning_rate))
        configurations = self._check_configuration(
            learning_rate, batch_size, momentum, self.max_steps
        )
        return self._corrected.surface.depth_after(*self._places(configurations), steps)

    @property
    def best_depth(self) -> float:
        """Depth at which the validation loss is predicted to be lowest.

        That of slow full-batch training of the linearised network; infinite without validation
        data, or where more training always helps within 20,000 steps.
        """
        return self._corrected.path.best_depth

    def seconds_per_step(self, batch_size: ArrayLike) -> NDArray[np.float64]:
        """Return the seconds of a training step; NaN where they were not measured.

        Args:
            batch_size:
                Any shape.

        Returns:
            The same shape.
        """
        if self.throughput is None:
            return np.full(np.shape(batch_size), np.nan)
        return self.throughput.seconds_per_step(batch_size)

    def max_learning_rate(
        self, batch_size: ArrayLike, momentum: ArrayLike | None = None
    ) -> NDArray[np.float64]:
        """Return the largest stable learning rate at the pretrained weights.

        Args:
            batch_size:
                Whole numbers from 1 to N.
            momentum:
                In [0, 1). That of the optimiser by default.

        Returns:
            Learning rates of the common shape; see
            :class:`optuna_ttp.dynamics.StabilityLimit`.
        """
        configurations = self._check_configuration(1.0, batch_size, momentum, self.max_steps)
        largest = self._corrected.path.simulator.largest(
            configurations.batch_size, configurations.momentum
        )
        return largest.reshape(configurations.shape)

    def _places(
        self, configurations: Configurations
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Where configurations are on the response surface, of the spectrum's samples."""
        sizes = self._corrected.path.simulator.simulated_size(configurations.batch_size)
        return configurations.learning_rate, sizes.astype(np.float64), configurations.momentum

    def _check_configuration(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike | None,
        max_steps: ArrayLike,
    ) -> Configurations:
        if momentum is None:
            momentum = self._corrected.path.simulator.optimizer.momentum or 0.0
        return Configurations.of(learning_rate, batch_size, momentum, max_steps, self.n_samples)


def _scored(
    surface: ResponseSurface | None,
    rate: NDArray[np.float64],
    size: NDArray[np.float64],
    mass: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Steps from a response surface, and where they are extrapolated: all where there is none."""
    if surface is None:
        return np.full(len(rate), np.inf), np.ones(len(rate), dtype=bool)
    return surface.steps(rate, size, mass)
