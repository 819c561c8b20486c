"""The one face of the science: from hyperparameters to training time."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import replace
import math
from typing import TYPE_CHECKING
import warnings

import numpy as np
from numpy.typing import ArrayLike

from optuna_ttp._util.checks import check_count
from optuna_ttp._util.checks import check_kind
from optuna_ttp._util.checks import check_number
from optuna_ttp._util.exceptions import FingerprintMismatchError
from optuna_ttp._util.exceptions import UnreliablePredictionWarning
from optuna_ttp.calibration import calibrate
from optuna_ttp.calibration import Calibration
from optuna_ttp.calibration import displacement
from optuna_ttp.calibration import kernel_mismatch
from optuna_ttp.calibration import Observation
from optuna_ttp.calibration import prior_scale
from optuna_ttp.dynamics import KernelGrowth
from optuna_ttp.dynamics import SampleConvergence
from optuna_ttp.dynamics import Schedule
from optuna_ttp.dynamics import SGD
from optuna_ttp.prediction._corrected_path import CorrectedPath
from optuna_ttp.prediction._estimator import Estimator
from optuna_ttp.prediction._prediction import Prediction
from optuna_ttp.prediction._settings import PredictorSettings
from optuna_ttp.prediction._simulator import Simulator
from optuna_ttp.prediction._target_path import TargetPath
from optuna_ttp.prediction._targets import resolve_target
from optuna_ttp.spectrum import learned_throughput
from optuna_ttp.spectrum import Spectrum


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


class TrainingTimePredictor(Estimator):
    """Predicts how long training takes until the training loss is at a target. It trains nothing.

    The network is linearised at its pretrained weights, and mini-batch SGD is simulated on the
    linearised model with the user's own learning rate, batch size and momentum. The training time
    is the first step at which the watched quantity is at the target (Zancato et al., NeurIPS 2020,
    section 5). Exactly one of the ``target_`` arguments must be given.

    Example:
        >>> predictor = TrainingTimePredictor(spectrum, target_fraction=0.3)
        >>> print(predictor.predict(learning_rate=0.01, batch_size=32, momentum=0.9))
        converges: 121 steps (9.68 epochs, 0.71 s), 80 % interval 104 to 142 steps

    Args:
        spectrum:
            The Jacobian eigenspectrum of the task.
        target_loss:
            The training loss to reach.
        target_fraction:
            The same as a fraction of the initial training loss.
        target_accuracy:
            The training accuracy to reach.
        target_validation_loss:
            The validation loss to reach; the task must have validation data.
        target_validation_accuracy:
            The validation accuracy to reach, likewise.
        target_epsilon:
            The paper's ``T_eps``: the first step at which the training loss is within this share
            of its whole change of its value at the horizon. See
            :class:`~optuna_ttp.dynamics.Target`.
        optimizer:
            The optimiser that trains. ``SGD()`` by default, without momentum, dampening and
            weight decay.
        schedule:
            A :class:`~optuna_ttp.Schedule`, or a function from the number of steps done to what
            multiplies the learning rate. Constant by default.
        max_steps:
            The horizon: a target that takes more steps is ``"not_reached"``. 10,000 by default.
        n_samples:
            The number of samples that will be trained on, where the spectrum is that of a random
            subset. Those of the spectrum by default.
        settings:
            What experts may change: smoothing, sampling, seeds, device and more. See
            :class:`~optuna_ttp.PredictorSettings`.

    Raises:
        ValueError:
            If not exactly one target is given, or an argument is out of its range.

    Warns:
        UnreliablePredictionWarning:
            If the network leaves its linearisation on the way to the target.
    """

    def __init__(
        self,
        spectrum: Spectrum,
        *,
        target_loss: float | None = None,
        target_fraction: float | None = None,
        target_accuracy: float | None = None,
        target_validation_loss: float | None = None,
        target_validation_accuracy: float | None = None,
        target_epsilon: float | None = None,
        optimizer: SGD | None = None,
        schedule: Schedule | Callable[[int], float] | None = None,
        max_steps: int = 10_000,
        n_samples: int | None = None,
        settings: PredictorSettings | None = None,
    ) -> None:
        if not isinstance(spectrum, Spectrum):
            raise TypeError(f"spectrum must be a Spectrum but got {type(spectrum).__name__}.")
        optimizer = SGD() if optimizer is None else optimizer
        settings = PredictorSettings() if settings is None else settings
        check_kind("optimizer", optimizer, SGD)
        check_kind("settings", settings, PredictorSettings)
        if optimizer.weight_decay and spectrum.weight_outputs is None:
            raise ValueError(
                "weight_decay needs a spectrum that knows what the weights contribute to the "
                "outputs but got one that was computed by an older version. Compute it again."
            )
        max_steps = check_count("max_steps", max_steps)
        count = spectrum.n_samples if n_samples is None else check_count("n_samples", n_samples)
        if count < spectrum.n_samples:
            raise ValueError(
                f"n_samples must be at least {spectrum.n_samples}, the samples of the spectrum, "
                f"but got {n_samples}. Use task.subset() for fewer."
            )
        simulator = Simulator(
            spectrum=spectrum,
            n_samples=count,
            optimizer=optimizer,
            schedule=Schedule.of(schedule),
            settings=settings,
        )
        target = resolve_target(
            {
                "target_loss": target_loss,
                "target_fraction": target_fraction,
                "target_accuracy": target_accuracy,
                "target_validation_loss": target_validation_loss,
                "target_validation_accuracy": target_validation_accuracy,
                "target_epsilon": target_epsilon,
            },
            simulator,
        )
        path = TargetPath(simulator, target, max_steps)
        super().__init__(
            CorrectedPath(
                path,
                Calibration.none(prior_scale(spectrum.probe))
                if settings.calibration is None
                else settings.calibration,
            ),
            spectrum.throughput if settings.throughput is None else settings.throughput,
        )
        self.observations: tuple[Observation, ...] = ()
        self.short_run_seconds = 0.0
        if not self.reliable:
            warnings.warn(
                f"At {self.depth:.0%} of the initial training loss the network is far from its "
                "linearisation: a weight matrix changes by "
                f"{displacement(spectrum.probe, path.fraction):.2g} times what it was, and the "
                "kernel differs from the predicted one by a factor of "
                f"{math.exp(kernel_mismatch(spectrum.probe, path.fraction)):.2g}. The "
                "intervals say so. Twenty real steps, predictor.short_run(task), correct much of "
                "it, and so do trials that are recorded with TrainingLog; or choose a target that "
                "is less deep.",
                UnreliablePredictionWarning,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        return (
            f"TrainingTimePredictor({self.spectrum!r}, target {self.target.quantity} "
            f"{self.target.value:.4g})"
        )

    @property
    def spectrum(self) -> Spectrum:
        """The Jacobian eigenspectrum of the task."""
        return self._corrected.path.simulator.spectrum

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the task."""
        return self.spectrum.metadata.fingerprint

    @property
    def setup_seconds(self) -> float:
        """What the spectrum and the short training runs took together, in seconds."""
        return self.spectrum.metadata.compute_seconds + self.short_run_seconds

    @property
    def default_momentum(self) -> float | None:
        """The momentum of what does not give one, or None where trials must give one."""
        return self.optimizer.momentum

    @property
    def optimizer(self) -> SGD:
        """The optimiser that trains."""
        return self._corrected.path.simulator.optimizer

    @property
    def schedule(self) -> Schedule:
        """The schedule of the learning rate."""
        return self._corrected.path.simulator.schedule

    @property
    def settings(self) -> PredictorSettings:
        """The settings that were given."""
        return self._corrected.path.simulator.settings

    @property
    def kernel_growth(self) -> KernelGrowth | None:
        """The predicted growth of the kernel, or None where it is frozen."""
        return self._corrected.path.simulator.kernel_growth

    @property
    def depth(self) -> float:
        """Training loss over the initial one where the target is, on the linearised path.

        The lowest loss that is possible, with label smoothing, counts as zero. Of a target that
        depends on the end of the curve it is not known: NaN.
        """
        return self._corrected.path.depth

    @property
    def reliable(self) -> bool:
        """Whether the network stays close to its linearisation on the way to the target.

        See :func:`~optuna_ttp.calibration.is_reliable`; once trials were observed, whether they
        tell how the kernel grows. Of single configurations :attr:`Prediction.reliable` tells.
        """
        return self._corrected.reliable

    def sample_convergence(self) -> SampleConvergence:
        """Return how the predicted time depends on the number of samples of the spectrum.

        Its :meth:`~optuna_ttp.dynamics.SampleConvergence.recommended` says how many samples a
        spectrum should have.

        Returns:
            Predicted times of random subsets of the spectrum's samples.
        """
        return self._corrected.path.sample_convergence

    def informed(self, observations: Sequence[Observation]) -> TrainingTimePredictor:
        """Return a predictor that has learned from more trials, steps and seconds per step.

        Args:
            observations:
                Trials, oldest first; they follow those that this one knows already.

        Returns:
            A new predictor that shares everything else with this one.
        """
        # A trial that was remembered and is in the study again counts once.
        if self.observations:
            known = {_name(o) for o in self.observations}
            observations = [o for o in observations if _name(o) not in known]
        if not observations:
            return self
        every = (*self.observations, *observations)
        twin = self.calibrated(calibrate(every, prior_scale(self.spectrum.probe)))
        twin.observations = every
        timed = [o for o in every if o.batch_size > 0 and o.seconds_per_step > 0.0]
        twin.throughput = learned_throughput(
            self.throughput,
            np.array([o.batch_size for o in timed], dtype=np.int64),
            np.array([o.seconds_per_step for o in timed]),
        )
        return twin

    def short_run(
        self,
        task: FineTuningTask,
        steps: int = 20,
        *,
        learning_rate: float | None = None,
        momentum: float | None = None,
        device: str | None = None,
    ) -> TrainingTimePredictor:
        """Train a few full-batch steps of one configuration, and learn from them.

        Worth it where predictions are not :attr:`reliable`: the steps show how the kernel really
        grows. The network is as it was afterwards.

        Example:
            >>> if not predictor.reliable:
            ...     predictor = predictor.short_run(task)

        Args:
            task:
                The task of the spectrum.
            steps:
                How many. Twenty by default.
            learning_rate:
                By default, with the momentum, what is predicted to bring the loss down furthest
                without coming near the stability limit.
            momentum:
                Zero or 0.9 by default.
            device:
                Where to train. As :func:`~optuna_ttp.compute_spectrum` by default.

        Returns:
            A predictor that has learned from it. What it took is its
            :attr:`short_run_seconds`, and is charged by the ledger like the spectrum.

        Raises:
            FingerprintMismatchError:
                If the spectrum belongs to another task.
            ValueError:
                If an argument is out of its range.

        Warns:
            UnreliablePredictionWarning:
                If the loss did not come down enough to learn from, or rose without bound.
        """
        from optuna_ttp.prediction._probing import probed
        from optuna_ttp.prediction._probing import probing_configuration
        from optuna_ttp.task import FineTuningTask

        check_kind("task", task, FineTuningTask)
        if task.fingerprint != self.spectrum.metadata.fingerprint:
            raise FingerprintMismatchError(
                f"The task must be that of the spectrum, {self.spectrum.metadata.fingerprint[:12]}"
                f"..., but got {task.fingerprint[:12]}..."
            )
        steps = check_count("steps", steps)
        given = {"learning_rate": learning_rate, "momentum": momentum}
        for name, value in given.items():
            if value is not None:
                check_number(name, value)
        self._check_configuration(
            1.0 if learning_rate is None else learning_rate,
            1,
            0.0 if momentum is None else momentum,
            steps,
        )
        rate, mass = probing_configuration(self._corrected, steps, learning_rate, momentum)
        observation, seconds = probed(self._corrected, task, steps, rate, mass, device)
        if not np.isfinite(observation.observed).any():
            what = "rose without bound" if observation.diverged else "fell by less than 5 %"
            do = "a smaller" if observation.diverged else f"more than {steps} steps, or a larger"
            warnings.warn(
                f"Nothing is learned from the short training run: its loss {what}, with a "
                f"learning rate of {rate:.3g} and a momentum of {mass:.3g}. Take {do} learning "
                "rate.",
                UnreliablePredictionWarning,
                stacklevel=2,
            )
        twin = self.informed([observation])
        twin.short_run_seconds = self.short_run_seconds + seconds
        return twin

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
        twin._corrected = replace(self._corrected, calibration=calibration)
        return twin

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
                Positive.
            batch_size:
                Whole numbers from 1 to N.
            momentum:
                In [0, 1), as in :class:`torch.optim.SGD`. That of the optimiser by default.
            max_steps:
                The horizon in steps, if another one than the predictor's.
            full_curve:
                Simulate the curves up to the horizon, with those of the validation samples. By
                default they end at the target. There is no curve of a configuration that is
                predicted to diverge.

        Returns:
            Steps, epochs, seconds, interval, outcome and curves.

        Raises:
            ValueError:
                If a hyperparameter is out of its range.
        """
        configurations = self._check_configuration(
            learning_rate, batch_size, momentum, self.max_steps if max_steps is None else max_steps
        )
        per_step = self.seconds_per_step(configurations.batch_size)
        return self._corrected.predict(configurations, per_step, full_curve=full_curve)


def _name(observation: Observation) -> tuple[float, ...]:
    """What tells an observation from others, as far as it survives being stored."""
    seen = np.nansum(observation.observed), np.nansum(observation.predicted)
    return (*(round(float(s), 2) for s in seen), observation.n_steps, observation.lag)
