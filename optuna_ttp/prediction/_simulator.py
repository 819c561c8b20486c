"""Simulated training of one task as its user set it, before trials tell anything."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optuna_ttp.calibration import covariates
from optuna_ttp.dynamics import KernelGrowth
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import Schedule
from optuna_ttp.dynamics import SGD
from optuna_ttp.dynamics import simulate
from optuna_ttp.dynamics import simulate_equation
from optuna_ttp.dynamics import StabilityLimit
from optuna_ttp.dynamics import Target
from optuna_ttp.dynamics import Trajectories
from optuna_ttp.prediction._configurations import Configurations
from optuna_ttp.prediction._settings import PredictorSettings
from optuna_ttp.spectrum import Spectrum


@dataclass(frozen=True, eq=False)
class Simulator:
    """Simulates training on the linearised model.

    Attributes:
        spectrum:
            The Jacobian eigenspectrum of the task.
        n_samples:
            See :class:`~optuna_ttp.TrainingTimePredictor`, like the others.
        optimizer:
            The optimiser that trains.
        schedule:
            Of the learning rate.
        settings:
            See :class:`~optuna_ttp.PredictorSettings`.
    """

    spectrum: Spectrum
    n_samples: int
    optimizer: SGD
    schedule: Schedule
    settings: PredictorSettings

    def __getstate__(self) -> dict[str, Any]:
        # The linearised model is derived from the spectrum, and larger.
        derived = ("model", "stability_limit", "kernel_growth")
        return {k: v for k, v in self.__dict__.items() if k not in derived}

    @cached_property
    def model(self) -> LinearisedModel:
        """The linearised model."""
        return LinearisedModel.from_spectrum(self.spectrum, device=self.settings.device)

    @cached_property
    def kernel_growth(self) -> KernelGrowth | None:
        """What the kernel is predicted to be multiplied by, or None where it is frozen."""
        growth, probe = self.settings.kernel_growth, self.spectrum.probe
        if isinstance(growth, KernelGrowth):
            return growth
        if growth == "frozen" or probe is None or self.settings.method != "linear":
            return None
        return KernelGrowth.from_probe(
            probe.fractions, probe.relative_displacements, probe.kernel_ratios
        )

    @cached_property
    def stability_limit(self) -> StabilityLimit:
        """At the pretrained weights."""
        return StabilityLimit.of(self.model, self.n_samples)

    @property
    def own_stability_limit(self) -> StabilityLimit:
        """The same for batches of the spectrum's samples."""
        return replace(self.stability_limit, n_samples=self.spectrum.n_samples)

    @cached_property
    def initial_loss(self) -> float:
        """The training loss at the pretrained weights."""
        return float(self.model.loss(self.model.initial_outputs[None]))

    @cached_property
    def initial_loss_sd(self) -> float:
        """Standard deviation of the losses of single samples at the pretrained weights."""
        model = self.model
        losses = model.sample_losses(model.initial_outputs[None], model.soft_targets)[0].double()
        # The mean over a batch divides by the mean of its normalisers.
        away = losses - self.initial_loss * model.normalisers
        return float(away.square().mean().sqrt() / model.normalisers.double().mean())

    @property
    def slow_rate(self) -> float:
        """A learning rate at which full-batch training is slow and sure."""
        return 0.5 / max(float(self.model.curvatures[0]), 1e-30)

    def largest(
        self, size: NDArray[np.int64] | NDArray[np.float64], mass: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return the largest stable learning rate.

        Args:
            size:
                Batch sizes, shape ``(K,)``.
            mass:
                Momenta, shape ``(K,)``.

        Returns:
            Shape ``(K,)``.
        """
        return self.stability_limit.max_learning_rate(
            size,
            mass,
            dampening=self.optimizer.dampening,
            nesterov=self.optimizer.nesterov,
            weight_decay=self.optimizer.weight_decay,
            replacement=self.settings.sampling == "replacement",
        )

    def covariates(self, configurations: Configurations) -> NDArray[np.float64]:
        """Return what the errors of predicted times depend on.

        Args:
            configurations:
                Which ones.

        Returns:
            See :func:`optuna_ttp.calibration.covariates`.
        """
        n, size = self.n_samples, configurations.batch_size
        step = configurations.learning_rate / (1.0 - configurations.momentum)
        noise = (n - size) / (max(n - 1, 1) * size)
        return covariates(step * float(self.model.curvatures[0]), noise)

    def instability(
        self, depths: NDArray[np.float64], stability: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return the learning rate over the largest stable one, times the predicted growth.

        Args:
            depths:
                Loss levels, shape ``(K, P)`` or ``(1, P)``.
            stability:
                Learning rate over the largest stable one, shape ``(K,)``.

        Returns:
            Shape ``(K, P)``.
        """
        if self.kernel_growth is None:
            return np.broadcast_to(stability[:, None], (len(stability), depths.shape[1]))
        return np.asarray(stability[:, None] * self.kernel_growth.at(np.exp(-depths)))

    def simulated_size(self, size: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the batch size that makes as much noise among the spectrum's samples.

        ``gamma = (N - B) / ((N - 1) B)`` on all ``N`` samples is that of
        ``N_0 / (1 + gamma (N_0 - 1))`` among the ``N_0`` samples of the spectrum.

        Args:
            size:
                Shape ``(K,)``.

        Returns:
            Shape ``(K,)``.
        """
        n, own = self.n_samples, self.spectrum.n_samples
        if n == own:
            return size
        gamma = (n - size) / ((n - 1) * size)
        return np.maximum(1, np.rint(own / (1.0 + gamma * (own - 1)))).astype(np.int64)

    def run(
        self,
        configurations: Configurations,
        target: Target,
        *,
        growth: KernelGrowth | None,
        margin: float = 1.0,
        full_curve: bool = False,
        n_seeds: int | None = None,
    ) -> list[Trajectories]:
        """Simulate.

        Args:
            configurations:
                Which ones.
            target:
                Where curves end.
            growth:
                What the kernel is multiplied by.
            margin:
                How many horizons are simulated. One by default.
            full_curve:
                Go on to the horizon. Off by default.
            n_seeds:
                That of the settings by default.

        Returns:
            One simulation a seed.
        """
        size, horizon = configurations.batch_size, configurations.max_steps
        sgd = self.optimizer.configurations(
            configurations.learning_rate, configurations.momentum, self.schedule
        )
        # The horizon counts real steps; the simulation's own clock runs a little differently.
        steps = np.maximum(1, np.ceil(margin * horizon)).astype(np.int64)
        sizes = self.simulated_size(size)
        per_epoch = -(-self.n_samples // size)
        full_curve = full_curve or target.settled
        wanted = self.settings.n_seeds if n_seeds is None else n_seeds
        if self.settings.method != "linear":
            return [
                simulate_equation(
                    self.model,
                    sgd,
                    sizes,
                    max_steps=steps,
                    method=self.settings.method,
                    target=target,
                    full_curves=full_curve,
                    seed=self.settings.seed + k,
                    steps_per_epoch=per_epoch,
                )
                for k in range(wanted)
            ]
        noisy = self.settings.sampling == "replacement" or (sizes < self.spectrum.n_samples).any()
        return [
            simulate(
                self.model,
                sgd,
                sizes,
                max_steps=steps,
                target=target,
                full_curves=full_curve,
                exact=self.settings.exact or target.settled,
                sampling=self.settings.sampling,
                smoothing=self.settings.smoothing,
                growth=growth,
                limit=self.own_stability_limit,
                seed=self.settings.seed + k,
                steps_per_epoch=per_epoch,
            )
            for k in range(wanted if noisy else 1)
        ]
