"""The one face of the science: from hyperparameters to training time."""

from __future__ import annotations

from functools import cached_property
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray

from optuna_ttp.calibration import Calibration
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import max_learning_rate
from optuna_ttp.dynamics import ResponseSurface
from optuna_ttp.dynamics import simulate_heavy_ball
from optuna_ttp.dynamics import Target
from optuna_ttp.dynamics import Trajectories
from optuna_ttp.prediction import CONVERGES
from optuna_ttp.prediction import DIVERGES
from optuna_ttp.prediction import NOT_REACHED
from optuna_ttp.prediction import Prediction
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.throughput import Throughput


# Above the stability limit a network first goes through a loss spike, and most recover from it up
# to several times the limit, where their curvature has dropped (the catapult of Lewkowycz et al.,
# 2020, arXiv 2003.02218). Chosen after the fact: at eight times the limit four of six runs of the
# demo's network still got to 15 % of their initial loss (benchmarks/accuracy/results/digits.csv).
_HOPELESS_STABILITY = 8.0
# What the response surface is built from; it ranks candidates, it does not promise times.
_SURFACE_TRACE = 0.98


class TrainingTimePredictor:
    """Predicts how long training takes until the training loss is at a target. It trains nothing.

    The network is linearised at its pretrained weights, and mini-batch SGD with heavy-ball
    momentum is simulated on the linearised model with the user's own learning rate, batch size
    and momentum. The training time is the first step at which the training loss is at or below
    the target (Zancato et al., NeurIPS 2020, section 5).

    Example:
        >>> predictor = TrainingTimePredictor(spectrum, target_fraction=0.3)
        >>> print(predictor.predict(learning_rate=0.01, batch_size=32, momentum=0.9))
        converges: 121 steps (9.68 epochs, 0.71 s)

    Args:
        spectrum:
            The Jacobian eigenspectrum of the task.
        target_loss:
            The training loss to reach. Exactly one of the three targets must be given.
        target_fraction:
            The same as a fraction of the initial training loss.
        target_accuracy:
            The training accuracy to reach.
        max_steps:
            The horizon: a target that takes more steps is ``"not_reached"``. 10,000 by default.
        throughput:
            Seconds per step. What was measured with the spectrum by default.
        seed:
            For the order of the samples in the simulation.
        device:
            Where to simulate. The CPU by default, which is faster for small spectra.
        exact:
            Simulate every single step, also of very slow configurations. Off by default: there,
            several steps are simulated as one (:attr:`Prediction.strides` says how many).
        calibration:
            What was learned from observed trials, see :meth:`calibrated`. Nothing by default.

    Raises:
        ValueError:
            If not exactly one target is given, or it is out of its range.
    """

    def __init__(
        self,
        spectrum: Spectrum,
        *,
        target_loss: float | None = None,
        target_fraction: float | None = None,
        target_accuracy: float | None = None,
        max_steps: int = 10_000,
        throughput: Throughput | None = None,
        seed: int = 0,
        device: str = "cpu",
        exact: bool = False,
        calibration: Calibration | None = None,
    ) -> None:
        if not isinstance(spectrum, Spectrum):
            raise TypeError(f"spectrum must be a Spectrum but got {type(spectrum).__name__}.")
        self.spectrum = spectrum
        self.max_steps = _check_max_steps(max_steps)
        self.throughput = spectrum.throughput if throughput is None else throughput
        self.seed = seed
        self.exact = exact
        self.calibration = Calibration() if calibration is None else calibration
        self._device = device
        self.target = self._resolve_target(target_loss, target_fraction, target_accuracy)

    def __repr__(self) -> str:
        return (
            f"TrainingTimePredictor({self.spectrum!r}, target {self.target.quantity} "
            f"{self.target.value:.4g})"
        )

    def __getstate__(self) -> dict[str, Any]:
        # The linearised model is derived from the spectrum, and larger.
        return {k: v for k, v in self.__dict__.items() if k not in ("_model", "_surface")}

    @property
    def initial_loss(self) -> float:
        """The training loss at the pretrained weights."""
        return float(self._model.loss(self._model.initial_outputs[None]))

    def calibrated(self, calibration: Calibration) -> TrainingTimePredictor:
        """Return a predictor that corrects its times by what was learned from observed trials.

        Args:
            calibration:
                See :func:`optuna_ttp.calibration.calibrate`.

        Returns:
            A new predictor that shares everything else with this one.
        """
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.calibration = calibration
        return twin

    def predict(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike = 0.0,
        *,
        max_steps: ArrayLike | None = None,
        full_curve: bool = False,
    ) -> Prediction:
        """Predict the training time of one configuration, or of many that are broadcast together.

        Args:
            learning_rate:
                Positive.
            batch_size:
                Whole numbers from 1 to N.
            momentum:
                In [0, 1), as in :class:`torch.optim.SGD` without dampening. Zero by default.
            max_steps:
                The horizon in steps, if another one than the predictor's.
            full_curve:
                Simulate the loss curves up to the horizon. By default they end at the target.
                There is no curve of a configuration that is predicted to diverge.

        Returns:
            Steps, epochs, seconds, outcome and loss curve.

        Raises:
            ValueError:
                If a hyperparameter is out of its range.
        """
        rate, size, mass, horizon = self._check_configuration(
            learning_rate, batch_size, momentum, self.max_steps if max_steps is None else max_steps
        )
        shape = rate.shape
        stability = rate / self.max_learning_rate(size, mass)
        hopeless = stability > _HOPELESS_STABILITY
        # Nobody needs the curve of a configuration that blows up, so it is not simulated.
        kept = np.flatnonzero(~hopeless.ravel())
        curves = self._simulate(
            rate.ravel()[kept],
            size.ravel()[kept],
            mass.ravel()[kept],
            horizon.ravel()[kept],
            full_curve=full_curve,
        )
        reached = np.full(rate.size, np.inf)
        reached[kept] = np.ceil(self.calibration.factor * curves.first_passages(self.target))
        reached[reached > horizon.ravel()] = np.inf
        blown_up = hopeless.ravel().copy()
        blown_up[kept] |= curves.blown_up
        steps = reached.reshape(shape)
        outcomes = np.where(np.isfinite(steps), CONVERGES, NOT_REACHED)
        outcomes = np.where(blown_up.reshape(shape), DIVERGES, outcomes)
        strides = np.ones(rate.size, dtype=np.int64)
        strides[kept] = curves.strides
        curve = np.full((2, rate.size, curves.steps.shape[1]), np.nan)
        curve[:, kept] = curves.steps * self.calibration.factor, curves.losses
        return Prediction(
            learning_rate=rate,
            batch_size=size,
            momentum=mass,
            steps=steps,
            epochs=steps / np.ceil(self.spectrum.n_samples / size),
            seconds=steps * self.seconds_per_step(size),
            outcomes=outcomes,
            stability=stability,
            max_steps=horizon,
            strides=strides.reshape(shape),
            curve_steps=curve[0].reshape(*shape, -1),
            curve_losses=curve[1].reshape(*shape, -1),
        )

    def score(
        self, learning_rate: ArrayLike, batch_size: ArrayLike, momentum: ArrayLike = 0.0
    ) -> NDArray[np.float64]:
        """Return approximate seconds to the target for many configurations, in microseconds each.

        For ranking candidates: interpolated in a response surface, which is built by simulation
        when it is first needed (seconds), from the eigenpairs that hold 98 % of the trace.

        Args:
            learning_rate:
                Positive.
            batch_size:
                Whole numbers from 1 to N.
            momentum:
                In [0, 1). Zero by default.

        Returns:
            Seconds (steps where the time of a step is not known) of the common shape; infinite
            where the target is out of reach or training is predicted to diverge.

        Raises:
            ValueError:
                If a hyperparameter is out of its range.
        """
        rate, size, mass, _ = self._check_configuration(
            learning_rate, batch_size, momentum, self.max_steps
        )
        steps = self._surface.steps(
            rate.ravel(), size.ravel().astype(np.float64), mass.ravel()
        ).reshape(rate.shape)
        steps = steps * self.calibration.factor
        hopeless = rate > _HOPELESS_STABILITY * self.max_learning_rate(size, mass)
        steps = np.where(hopeless | (steps > self.max_steps), np.inf, steps)
        per_step = self.seconds_per_step(size)
        return np.asarray(steps * np.where(np.isnan(per_step), 1.0, per_step))

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
        self, batch_size: ArrayLike, momentum: ArrayLike = 0.0
    ) -> NDArray[np.float64]:
        """Return the largest stable learning rate at the pretrained weights.

        Args:
            batch_size:
                Whole numbers from 1 to N.
            momentum:
                In [0, 1). Zero by default.

        Returns:
            Learning rates of the common shape; see :func:`optuna_ttp.dynamics.max_learning_rate`.
        """
        _, size, mass, _ = self._check_configuration(1.0, batch_size, momentum, self.max_steps)
        flat = max_learning_rate(
            self._model.curvatures, self.spectrum.n_samples, size.ravel(), mass.ravel()
        )
        return flat.reshape(size.shape)

    @cached_property
    def _model(self) -> LinearisedModel:
        return LinearisedModel.from_spectrum(self.spectrum, device=self._device)

    @cached_property
    def _surface(self) -> ResponseSurface:
        share = min(_SURFACE_TRACE, self.spectrum.explained_trace)
        model = LinearisedModel.from_spectrum(
            self.spectrum.truncate(explained_trace=share), device=self._device
        )
        return ResponseSurface.build(model, self.target, max_steps=self.max_steps, seed=self.seed)

    def _simulate(
        self,
        rate: NDArray[np.float64],
        size: NDArray[np.int64],
        mass: NDArray[np.float64],
        horizon: NDArray[np.int64],
        *,
        full_curve: bool,
    ) -> Trajectories:
        return simulate_heavy_ball(
            self._model,
            rate,
            size,
            mass,
            # The horizon counts real steps; the simulation's own clock runs differently.
            max_steps=np.ceil(horizon / self.calibration.factor).astype(np.int64),
            target=self.target,
            full_curves=full_curve,
            exact=self.exact,
            seed=self.seed,
        )

    def _resolve_target(
        self, loss: float | None, fraction: float | None, accuracy: float | None
    ) -> Target:
        given = [v for v in (loss, fraction, accuracy) if v is not None]
        if len(given) != 1:
            raise ValueError(
                "Exactly one of target_loss, target_fraction and target_accuracy must be given "
                f"but got {len(given)}."
            )
        initial = self.initial_loss
        if accuracy is not None:
            return self._accuracy_target(accuracy)
        if fraction is not None:
            if not 0.0 < fraction < 1.0:
                raise ValueError(f"target_fraction must be in (0, 1) but got {fraction}.")
            return self._loss_target(fraction * initial)
        assert loss is not None
        if not (math.isfinite(loss) and loss > 0.0):
            raise ValueError(f"target_loss must be positive and finite but got {loss}.")
        if loss >= initial:
            raise ValueError(
                f"target_loss must be below the initial training loss {initial:.4g} but got "
                f"{loss}: no step would be needed."
            )
        return self._loss_target(float(loss))

    def _loss_target(self, loss: float) -> Target:
        floor = self._model.loss_floor
        if loss <= floor * (1 + 1e-6):
            raise ValueError(
                f"The target loss must be above {floor:.4g}, the lowest that label smoothing and "
                f"class weights leave possible, but got {loss:.4g}."
            )
        return Target("loss", loss)

    def _accuracy_target(self, accuracy: float) -> Target:
        if not 0.0 < accuracy <= 1.0:
            raise ValueError(f"target_accuracy must be in (0, 1] but got {accuracy}.")
        if self._model.labels is None:
            raise ValueError("target_accuracy needs classes but the model has one real output.")
        initial = float(self._model.accuracy(self._model.initial_outputs[None]))
        if accuracy <= initial:
            raise ValueError(
                f"target_accuracy must be above the initial training accuracy {initial:.4g} but "
                f"got {accuracy}: no step would be needed."
            )
        return Target("accuracy", float(accuracy))

    def _check_configuration(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike,
        max_steps: ArrayLike,
    ) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
        rate, size, mass, horizon = np.broadcast_arrays(
            np.asarray(learning_rate, dtype=np.float64),
            np.asarray(batch_size, dtype=np.float64),
            np.asarray(momentum, dtype=np.float64),
            np.asarray(max_steps, dtype=np.float64),
        )
        if rate.size == 0:
            raise ValueError("At least one configuration must be given but got none.")
        _refuse(rate, (rate > 0) & np.isfinite(rate), "learning_rate must be positive and finite")
        n = self.spectrum.n_samples
        _refuse(
            size,
            (size >= 1) & (size <= n) & (size == np.floor(size)),
            f"batch_size must be a whole number from 1 to the number of samples, {n},",
        )
        _refuse(mass, (mass >= 0) & (mass < 1), "momentum must be in [0, 1)")
        _refuse(
            horizon,
            (horizon >= 1) & (horizon <= 2**53),
            "max_steps must be a positive integer",
        )
        return rate, size.astype(np.int64), mass, np.floor(horizon).astype(np.int64)


def _refuse(values: NDArray[np.float64], good: NDArray[np.bool_], message: str) -> None:
    if not good.all():
        raise ValueError(f"{message} but got {values[~good].flat[0]}.")


def _check_max_steps(max_steps: int) -> int:
    if isinstance(max_steps, bool) or not 1 <= max_steps <= 2**53 or max_steps != int(max_steps):
        raise ValueError(f"max_steps must be a positive integer but got {max_steps!r}.")
    return int(max_steps)
