"""Simulated training of one task towards a target, without corrections by trials."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace
from functools import cached_property
import math
from typing import Any

import numpy as np

from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers
from optuna_ttp._util.checks import check_count
from optuna_ttp._util.checks import check_kind
from optuna_ttp.calibration import covariates
from optuna_ttp.calibration import DEPTHS
from optuna_ttp.dynamics import Adam
from optuna_ttp.dynamics import AdamConfigurations
from optuna_ttp.dynamics import KernelGrowth
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import Optimizer
from optuna_ttp.dynamics import ResponseSurface
from optuna_ttp.dynamics import SampleConvergence
from optuna_ttp.dynamics import Schedule
from optuna_ttp.dynamics import ScheduledSurface
from optuna_ttp.dynamics import SGD
from optuna_ttp.dynamics import SGDConfigurations
from optuna_ttp.dynamics import simulate
from optuna_ttp.dynamics import simulate_equation
from optuna_ttp.dynamics import Target
from optuna_ttp.dynamics import Trajectories
from optuna_ttp.prediction._adam_training import AdamTraining
from optuna_ttp.prediction._configurations import Configurations
from optuna_ttp.prediction._optimizer_checks import check_optimizer
from optuna_ttp.prediction._rules import RULES
from optuna_ttp.prediction._settings import PredictorSettings
from optuna_ttp.prediction._sgd_training import SGDTraining
from optuna_ttp.prediction._targets import resolve_target
from optuna_ttp.prediction._training import Training
from optuna_ttp.spectrum import Spectrum


@dataclass(frozen=True, eq=False)
class Simulator:
    """Simulates the training of one task on its linearised model, up to a target.

    ``model`` is the linearised model of ``spectrum``, ``n_samples`` the number of samples that are
    trained on (the spectrum may have a subset of them), ``max_steps`` the horizon in steps.
    """

    spectrum: Spectrum
    model: LinearisedModel
    n_samples: int
    optimizer: Optimizer
    schedule: Schedule
    settings: PredictorSettings
    target: Target
    max_steps: int

    @classmethod
    def of(
        cls,
        spectrum: Spectrum,
        targets: dict[str, float | None],
        *,
        optimizer: Optimizer,
        schedule: Schedule,
        max_steps: int,
        n_samples: int | None,
        settings: PredictorSettings,
    ) -> Simulator:
        """Return the simulator for the predictor's arguments; ValueError or TypeError if invalid.

        ``targets`` has the target arguments by name, exactly one of which must not be None;
        without ``n_samples`` it is that of the spectrum.
        """
        if not isinstance(spectrum, Spectrum):
            raise TypeError(f"spectrum must be a Spectrum but got {type(spectrum).__name__}.")
        check_kind("settings", settings, PredictorSettings)
        check_optimizer(optimizer, spectrum, settings.method)
        if settings.saturation and spectrum.saturation is None:
            raise ValueError(
                "saturation=True needs a spectrum with its saturation but got one that was "
                "computed with probe=False or by an older version. Compute it again."
            )
        max_steps = check_count("max_steps", max_steps)
        count = spectrum.n_samples if n_samples is None else check_count("n_samples", n_samples)
        if count < spectrum.n_samples:
            raise ValueError(
                f"n_samples must be at least {spectrum.n_samples}, the samples of the spectrum, "
                f"but got {n_samples}. Use task.subset() for fewer."
            )
        model = LinearisedModel.from_spectrum(spectrum, device=settings.device)
        target = resolve_target(targets, model, settings)
        return cls(spectrum, model, count, optimizer, schedule, settings, target, max_steps)

    def __getstate__(self) -> dict[str, Any]:
        # These are derived from the spectrum again; the model is larger than the spectrum.
        derived = ("model", "training", "kernel_growth", "surface")
        return {k: v for k, v in self.__dict__.items() if k not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__["model"] = LinearisedModel.from_spectrum(
            self.spectrum, device=self.settings.device
        )

    @cached_property
    def kernel_growth(self) -> KernelGrowth | None:
        """The kernel's factor by loss; None if frozen, not linear, or unprobed and not given."""
        growth, probe = self.settings.kernel_growth, self.spectrum.probe
        if isinstance(growth, KernelGrowth):
            return growth
        if growth == "frozen" or probe is None or self.settings.method != "linear":
            return None
        return KernelGrowth.from_probe(
            probe.fractions, probe.relative_displacements, probe.kernel_ratios
        )

    @cached_property
    def training(self) -> Training:
        """What is particular to training by this optimiser."""
        if isinstance(self.optimizer, SGD):
            return SGDTraining(
                self.spectrum, self.model, self.optimizer, self.n_samples, self.settings
            )
        assert isinstance(self.optimizer, Adam)
        return AdamTraining(self.spectrum, self.optimizer, self.n_samples, self.settings)

    @cached_property
    def initial_loss(self) -> float:
        """The training loss at the pretrained weights."""
        return float(self.model.loss(self.model.initial_outputs[None]))

    @cached_property
    def initial_loss_sd(self) -> float:
        """The standard deviation of the losses of single samples at the pretrained weights."""
        model = self.model
        losses = model.sample_losses(model.initial_outputs[None], model.soft_targets)[0].double()
        # The mean over a batch divides by the mean of its normalisers.
        away = losses - self.initial_loss * model.normalisers
        return float(away.square().mean().sqrt() / model.normalisers.double().mean())

    @cached_property
    def excess_fraction(self) -> float:
        """The training loss at the target over the initial one, above the lowest possible loss.

        Label smoothing makes the lowest possible loss positive. If the target is not a training
        loss, the loss is that of slow training at the target; it is NaN if the target depends on
        the end of the curve.
        """
        floor, initial = self.model.loss_floor, self.initial_loss
        if self.target.settled:
            return math.nan
        if self.target.quantity in ("loss", "smoothed_loss"):
            return (self.target.value - floor) / (initial - floor)
        curves = self.training.slow_run(self.target).curves
        return (float(np.nanmin(curves["loss"])) - floor) / (initial - floor)

    @cached_property
    def loss_fraction(self) -> float:
        """The training loss at the target over the initial one, NaN like the excess fraction."""
        floor, initial = self.model.loss_floor, self.initial_loss
        return (self.excess_fraction * (initial - floor) + floor) / initial

    @cached_property
    def best_depth(self) -> float:
        """The depth, log(initial / training loss), at the lowest validation loss of a slow run.

        It is infinite without validation data, or if that loss still falls after 20,000 steps.
        """
        if self.model.validation is None:
            return math.inf
        aim = Target("validation_loss", 1e-12)
        run = self.training.slow_run(aim, max_steps=20_000, full_curves=True)
        losses = run.curves["validation_loss"][0]
        known = np.flatnonzero(np.isfinite(losses) & np.isfinite(run.steps[0]))
        best = known[int(np.argmin(losses[known]))]
        if best == known[-1]:
            return math.inf
        return math.log(self.initial_loss / max(float(run.curves["loss"][0, best]), 1e-300))

    @property
    def has_surface(self) -> bool:
        """True if times depend on learning rate, batch size and momentum alone."""
        if self.settings.method != "linear" or self.target.settled:
            return False
        if isinstance(self.optimizer, SGD):
            return self.schedule.is_constant and self.optimizer.groups is None
        return self.schedule.factory is None

    @cached_property
    def surface(self) -> ResponseSurface | ScheduledSurface | None:
        """The response surface of simulated times, for many configurations at once.

        None if times depend on more than the three hyperparameters, see :attr:`has_surface`.
        """
        if not self.has_surface:
            return None
        surface = self.training.surface(self.target, DEPTHS, self.kernel_growth, self.max_steps)
        if surface is None or self.schedule.is_constant:
            return surface
        return ScheduledSurface(surface, self.schedule, self.n_samples, self.max_steps)

    @cached_property
    def sample_convergence(self) -> SampleConvergence:
        """Predicted times as a function of the number of samples in the spectrum."""
        return self.training.sample_convergence(
            self.target, self.kernel_growth, self.settings.seed
        )

    @cached_property
    def subset_sd(self) -> float:
        """The standard deviation of a log time due to samples that the spectrum lacks."""
        if self.n_samples == self.spectrum.n_samples:
            return 0.0
        if self.target.settled:
            return RULES.settled_subset_sd
        return self.sample_convergence.error(self.n_samples)

    @cached_property
    def approximation_log_error(self) -> float:
        """The absolute error of a log time due to eigenpairs or columns that are not there."""
        return self.training.approximation_log_error(self.target)

    def samples_per_step(self, batch_size: Integers | Floats) -> Integers | Floats:
        """Return the samples of one step of the optimiser for batch sizes ``(K,)``, at most N."""
        return np.minimum(batch_size * self.optimizer.accumulation_steps, self.n_samples)

    def steps_per_epoch(self, batch_size: Integers) -> Integers:
        """Return the steps of the optimiser in a pass over the data for batch sizes ``(K,)``."""
        n_batches = -(-self.n_samples // batch_size)
        return -(-n_batches // self.optimizer.accumulation_steps)

    def max_learning_rate(self, batch_size: Integers, momentum: Floats) -> Floats:
        """Return the largest stable learning rates of K configurations, shape ``(K,)``."""
        return self.training.max_learning_rate(self.samples_per_step(batch_size), momentum)

    def covariates(self, configurations: Configurations) -> Floats:
        """Return :func:`optuna_ttp.calibration.covariates` of K configurations, ``(K, 2)``."""
        n, samples = self.n_samples, self.samples_per_step(configurations.batch_size)
        step = self.training.relative_step(
            configurations.learning_rate, samples, configurations.momentum
        )
        noise = (n - samples) / (max(n - 1, 1) * samples)
        return covariates(step, noise)

    def instability(self, depths: Floats, stability: Floats) -> Floats:
        """Return the learning rate over the largest stable one, times the growth at depths.

        ``depths`` have the shape ``(K, P)`` or ``(1, P)``, ``stability``, the learning rates over
        the largest stable ones, ``(K,)``, and the result ``(K, P)``.
        """
        if self.kernel_growth is None:
            return np.broadcast_to(stability[:, None], (len(stability), depths.shape[1]))
        growth = self.kernel_growth.at(np.exp(-depths))
        return np.asarray(stability[:, None] * growth**self.training.growth_exponent)

    def simulated_batch_size(self, batch_size: Integers) -> Integers:
        """Return samples per step ``(K,)`` with the same noise if drawn from the spectrum's.

        ``gamma = (N - B) / ((N - 1) B)`` on all ``N`` samples is that of
        ``N_0 / (1 + gamma (N_0 - 1))`` among the ``N_0`` samples of the spectrum.
        """
        n, n_spectrum = self.n_samples, self.spectrum.n_samples
        samples = self.samples_per_step(batch_size).astype(np.int64)
        if n == n_spectrum:
            return samples
        gamma = (n - samples) / ((n - 1) * samples)
        equivalent = n_spectrum / (1.0 + gamma * (n_spectrum - 1))
        return np.maximum(1, np.rint(equivalent)).astype(np.int64)

    def run(
        self,
        configurations: Configurations,
        *,
        growth: KernelGrowth | None,
        margin: float = 1.0,
        full_curve: bool = False,
        n_seeds: int | None = None,
    ) -> list[Trajectories]:
        """Return simulations up to the target, one per seed; by default seeds are the settings'.

        The kernel is multiplied by the given growth. Simulations end after ``margin`` horizons;
        with ``full_curve`` they go on past the target. One seed does if nothing is random.
        """
        optimizer, batch_size = self.optimizer, configurations.batch_size
        if self.n_samples > self.spectrum.n_samples:
            batch_size = self.simulated_batch_size(batch_size)
            optimizer = replace(optimizer, accumulation_steps=1)
        trained = optimizer.configurations(
            configurations.learning_rate, configurations.momentum, self.schedule
        )
        # The horizon counts real steps, of which the corrected simulation may need more or fewer.
        max_steps = np.maximum(1, np.ceil(margin * configurations.max_steps)).astype(np.int64)
        common = {
            "max_steps": max_steps,
            "target": self.target,
            "full_curves": full_curve or self.target.settled,
            "steps_per_epoch": self.steps_per_epoch(configurations.batch_size),
        }
        n_runs = self.settings.n_seeds if n_seeds is None else n_seeds
        if self.settings.method == "linear":
            samples = batch_size * optimizer.accumulation_steps
            noisy = (samples < self.spectrum.n_samples).any()
            if not noisy and self.settings.sampling != "replacement":
                n_runs = 1
            common["growth"] = growth
        seeds = range(self.settings.seed, self.settings.seed + n_runs)
        return [self._run(trained, batch_size, seed, common) for seed in seeds]

    def _run(
        self,
        trained: SGDConfigurations | AdamConfigurations,
        batch_size: Integers,
        seed: int,
        common: dict[str, Any],
    ) -> Trajectories:
        """Return simulated curves of K configurations for the sample order of one seed."""
        if self.settings.method != "linear":
            assert isinstance(trained, SGDConfigurations)
            return simulate_equation(
                self.model, trained, batch_size, method=self.settings.method, seed=seed, **common
            )
        return simulate(
            self.training.model,
            trained,
            batch_size,
            exact=self.settings.exact or self.target.settled,
            sampling=self.settings.sampling,
            smoothing=self.settings.smoothing,
            limit=self.training.growth_limit,
            saturation=self.training.saturation,
            seed=seed,
            **common,
        )
