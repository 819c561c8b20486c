"""The predictor: from hyperparameters to training time."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import copy
from dataclasses import replace
from typing import TYPE_CHECKING
import warnings

import numpy as np

from optuna_ttp._util.checks import check_count
from optuna_ttp._util.checks import check_kind
from optuna_ttp._util.exceptions import FingerprintMismatchError
from optuna_ttp._util.exceptions import UnreliablePredictionWarning
from optuna_ttp.calibration import calibrate
from optuna_ttp.calibration import Calibration
from optuna_ttp.calibration import Observation
from optuna_ttp.calibration import prior_scale
from optuna_ttp.dynamics import Optimizer
from optuna_ttp.dynamics import SampleConvergence
from optuna_ttp.dynamics import Schedule
from optuna_ttp.dynamics import SGD
from optuna_ttp.prediction._configuration_predictor import ConfigurationPredictor
from optuna_ttp.prediction._estimator import Estimator
from optuna_ttp.prediction._estimator import unreliability
from optuna_ttp.prediction._settings import PredictorSettings
from optuna_ttp.prediction._simulator import Simulator
from optuna_ttp.spectrum import learned_throughput
from optuna_ttp.spectrum import Spectrum


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


class TrainingTimePredictor(ConfigurationPredictor):
    """Predicts the training time until a loss or an accuracy reaches a target, without training.

    The network is linearised at its pretrained weights, and training by mini-batches is simulated
    on the linearised model with the user's optimiser, learning rate, batch size and momentum,
    which is ``beta_1`` of Adam. The training time is
    the first step at which the chosen quantity reaches the target (Zancato et al., NeurIPS
    2020, section 5). Exactly one of the ``target_`` arguments must be given.

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
            The training loss to reach, as a fraction of the initial one.
        target_accuracy:
            The training accuracy to reach.
        target_validation_loss:
            The validation loss to reach; the task must have validation data.
        target_validation_accuracy:
            The validation accuracy to reach; the task must have validation data.
        target_epsilon:
            The paper's ``T_eps``: the first step at which the training loss differs from its
            value at the horizon by at most this share of its whole change. See
            :class:`~optuna_ttp.dynamics.Target`.
        optimizer:
            The optimiser that trains: an :class:`~optuna_ttp.SGD`, :class:`~optuna_ttp.Adam` or
            :class:`~optuna_ttp.AdamW`. The last two, and parameter groups, need a spectrum with
            columns of the Jacobian. ``SGD()`` by default, without momentum, dampening and weight
            decay.
        schedule:
            A :class:`~optuna_ttp.Schedule`, or a function from the number of steps done to the
            multiplier of the learning rate. Constant by default.
        max_steps:
            The horizon: a target that takes more steps is ``"not_reached"``. 10,000 by default.
        n_samples:
            The number of samples that will be trained on, if the spectrum is that of a random
            subset. The number of samples of the spectrum by default.
        settings:
            Settings for experts: smoothing, sampling, seeds, device and more. See
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
        optimizer: Optimizer | None = None,
        schedule: Schedule | Callable[[int], float] | None = None,
        max_steps: int = 10_000,
        n_samples: int | None = None,
        settings: PredictorSettings | None = None,
    ) -> None:
        settings = PredictorSettings() if settings is None else settings
        simulator = Simulator.of(
            spectrum,
            {
                "target_loss": target_loss,
                "target_fraction": target_fraction,
                "target_accuracy": target_accuracy,
                "target_validation_loss": target_validation_loss,
                "target_validation_accuracy": target_validation_accuracy,
                "target_epsilon": target_epsilon,
            },
            optimizer=SGD() if optimizer is None else optimizer,
            schedule=Schedule.of(schedule),
            max_steps=max_steps,
            n_samples=n_samples,
            settings=settings,
        )
        calibration = settings.calibration
        self._estimator = Estimator(
            simulator,
            Calibration.none(prior_scale(spectrum.probe)) if calibration is None else calibration,
            spectrum.throughput if settings.throughput is None else settings.throughput,
        )
        self.observations: tuple[Observation, ...] = ()
        self.short_run_seconds = 0.0
        if not self.reliable:
            text = unreliability(simulator)
            warnings.warn(text, UnreliablePredictionWarning, stacklevel=2)

    def __repr__(self) -> str:
        return (
            f"TrainingTimePredictor({self.spectrum!r}, target {self.target.quantity} "
            f"{self.target.value:.4g})"
        )

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
    def settings(self) -> PredictorSettings:
        """The settings for experts, as given."""
        return self._estimator.simulator.settings

    def sample_convergence(self) -> SampleConvergence:
        """Return the predicted time as a function of the number of samples of the spectrum.

        Its :meth:`~optuna_ttp.dynamics.SampleConvergence.recommended` says how many samples a
        spectrum should have.

        Returns:
            Predicted times of random subsets of the spectrum's samples.
        """
        return self._estimator.simulator.sample_convergence

    def informed(self, observations: Sequence[Observation]) -> TrainingTimePredictor:
        """Return a predictor that has learned steps and seconds per step from more trials.

        Args:
            observations:
                Observed trials, oldest first. Trials that this predictor has already learned from
                are not counted twice.

        Returns:
            A new predictor that shares everything else with this one, or this one itself if no
            trial is new.
        """
        # A trial that was remembered and is in the study again counts once.
        if self.observations:
            known = {_identity(o) for o in self.observations}
            observations = [o for o in observations if _identity(o) not in known]
        if not observations:
            return self
        every = (*self.observations, *observations)
        timed = [o for o in every if o.batch_size > 0 and o.seconds_per_step > 0.0]
        throughput = learned_throughput(
            self.throughput,
            np.array([o.batch_size for o in timed], dtype=np.int64),
            np.array([o.seconds_per_step for o in timed]) / self.optimizer.accumulation_steps,
        )
        scale = prior_scale(self.spectrum.probe)
        twin = self.calibrated(calibrate(every, scale, rules=self.calibration.rules))
        twin._estimator = replace(twin._estimator, throughput=throughput)
        twin.observations = every
        return twin

    def calibrated(self, calibration: Calibration) -> TrainingTimePredictor:
        """Return a predictor that corrects its times by another calibration.

        Args:
            calibration:
                The corrections, see :func:`optuna_ttp.calibration.calibrate`.

        Returns:
            A new predictor that shares everything else with this one.
        """
        twin = copy.copy(self)
        twin._estimator = replace(self._estimator, calibration=calibration)
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
        """Train a few full-batch steps of one configuration, and learn from their losses.

        This helps if predictions are not :attr:`reliable`: the losses show how the kernel really
        grows. Afterwards the weights of the network are restored.

        Example:
            >>> if not predictor.reliable:
            ...     predictor = predictor.short_run(task)

        Args:
            task:
                The task that the spectrum was computed for.
            steps:
                The number of steps. Twenty by default.
            learning_rate:
                The learning rate. By default the one that, with the momentum, is predicted to
                give the lowest loss without coming near the stability limit.
            momentum:
                The momentum. By default zero or 0.9, whichever gives the lower predicted loss;
                zero if a learning rate is given.
            device:
                The device that trains. By default that of :func:`~optuna_ttp.compute_spectrum`.

        Returns:
            A predictor that has learned from the steps. Their seconds are added to its
            :attr:`short_run_seconds`; the report counts them as it counts the spectrum's.

        Raises:
            FingerprintMismatchError:
                If the spectrum belongs to another task.
            ValueError:
                If an argument is out of its range.

        Warns:
            UnreliablePredictionWarning:
                If the loss fell by too little to learn from, or rose without bound.
        """
        from optuna_ttp.prediction._short_run import observe_short_run
        from optuna_ttp.task import FineTuningTask

        check_kind("task", task, FineTuningTask)
        if task.fingerprint != self.fingerprint:
            raise FingerprintMismatchError(
                f"The task must be that of the spectrum, {self.fingerprint[:12]}..., but got "
                f"{task.fingerprint[:12]}..."
            )
        observation, seconds, problem = observe_short_run(
            self._estimator, task, check_count("steps", steps), learning_rate, momentum, device
        )
        if problem:
            warnings.warn(problem, UnreliablePredictionWarning, stacklevel=2)
        twin = self.informed([observation])
        twin.short_run_seconds = self.short_run_seconds + seconds
        return twin


def _identity(observation: Observation) -> tuple[float, ...]:
    """Return numbers that identify an observation, also after it was stored as JSON."""
    seen = np.nansum(observation.observed), np.nansum(observation.predicted)
    return (*(round(float(s), 2) for s in seen), observation.n_steps, observation.lag)
