"""Predictions, from simulation or the response surface, corrected by observed trials."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace
from functools import cached_property
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray

from optuna_ttp._util.arrays import Booleans
from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers
from optuna_ttp.calibration import Calibration
from optuna_ttp.calibration import covariates
from optuna_ttp.calibration import DEPTHS
from optuna_ttp.calibration import displacement
from optuna_ttp.calibration import is_reliable
from optuna_ttp.calibration import kernel_mismatch
from optuna_ttp.calibration import KNOTS
from optuna_ttp.calibration import linearisation_sd
from optuna_ttp.calibration import Observation
from optuna_ttp.calibration import probability_below
from optuna_ttp.calibration import SimulatedFirstPassages
from optuna_ttp.calibration import stability_sd
from optuna_ttp.calibration import Z_90
from optuna_ttp.dynamics import KernelGrowth
from optuna_ttp.dynamics import ResponseSurface
from optuna_ttp.dynamics import ScheduledSurface
from optuna_ttp.dynamics import SGD
from optuna_ttp.dynamics import Trajectories
from optuna_ttp.prediction._configurations import Configurations
from optuna_ttp.prediction._first_passage_times import FirstPassageTimes
from optuna_ttp.prediction._outcome import Outcome
from optuna_ttp.prediction._prediction import Prediction
from optuna_ttp.prediction._rules import RULES
from optuna_ttp.prediction._simulator import Simulator
from optuna_ttp.spectrum import Throughput


@dataclass(frozen=True, eq=False)
class Estimator:
    """Predicts configurations: simulated times, corrected by the calibration.

    ``throughput`` converts steps to seconds; it is None if no step was timed.
    """

    simulator: Simulator
    calibration: Calibration
    throughput: Throughput | None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "surface"}

    @property
    def reliable(self) -> bool:
        """True if the network stays close to its linearisation on the way to the target.

        Once trials were observed: if the calibration is trusted and sure of the kernel's growth.
        """
        unknown = math.isnan(self.simulator.excess_fraction)
        fraction = self.simulator.loss_fraction
        if not self.calibration.n_observed:
            return unknown or is_reliable(self.simulator.spectrum.probe, fraction)
        depth = -math.log(max(fraction, 1e-12))
        sd = np.interp(depth, KNOTS, self.calibration.log_growth_sd)
        return bool(unknown or (sd < RULES.unreliable_sd and self.calibration.trusted))

    @property
    def log_growth(self) -> Floats:
        """Logarithm of the trials' factor on the predicted growth, at :data:`KNOTS`, ``(M,)``."""
        if self.simulator.settings.method != "linear" or not self.calibration.n_observed:
            return np.zeros(len(KNOTS))
        return self.calibration.log_growth

    @property
    def growth(self) -> KernelGrowth | None:
        """The kernel's growth in simulations: the predicted growth, corrected by trials."""
        predicted = self.simulator.kernel_growth
        if not self.log_growth.any():
            return predicted
        uncorrected = KernelGrowth.none() if predicted is None else predicted
        # The trials' correction is one of the speed, the growth is one of the kernel.
        exponent = self.simulator.training.growth_exponent
        return uncorrected.times(KNOTS, self.log_growth / exponent)

    @cached_property
    def surface(self) -> ResponseSurface | ScheduledSurface | None:
        """The simulator's surface, its times corrected by the calibration; None if it has none."""
        simulator, surface = self.simulator, self.simulator.surface
        if surface is None or not self.calibration.n_observed:
            return surface

        def correct(
            logs: Floats, learning_rate: Floats, noise: Floats, momentum: Floats, depths: Floats
        ) -> Floats:
            """Return ``logs`` ``(K, P)`` of the surface's times, corrected by the calibration."""
            batch_size = simulator.n_samples / (1.0 + noise * (simulator.n_samples - 1))
            training = simulator.training
            step = training.relative_step(learning_rate, batch_size, momentum)
            stability = learning_rate / training.max_learning_rate(batch_size, momentum)
            return self.calibration.expected(
                SimulatedFirstPassages(
                    depths,
                    logs,
                    np.zeros((1, len(KNOTS))),
                    covariates(step, noise),
                    simulator.instability(depths, stability),
                    momentum / (1.0 - momentum),
                )
            )

        return surface.retimed(correct)

    def seconds_per_step(self, batch_size: ArrayLike) -> Floats:
        """Return the seconds per step at batch sizes of any shape; NaN if not measured.

        A step of the optimiser takes as many mini-batches as are accumulated.
        """
        if self.throughput is None:
            return np.full(np.shape(batch_size), np.nan)
        seconds = self.throughput.seconds_per_step(batch_size)
        return seconds * self.simulator.optimizer.accumulation_steps

    def stability(self, configurations: Configurations) -> Floats:
        """Return each learning rate over the largest stable learning rate, shape ``(K,)``."""
        return configurations.learning_rate / self.simulator.max_learning_rate(
            configurations.batch_size, configurations.momentum
        )

    def is_hopeless(self, configurations: Configurations) -> Booleans:
        """Return a mask ``(K,)`` of configurations that are certain to blow up."""
        return self.stability(configurations) > self.simulator.training.hopeless_stability

    def predict(self, configurations: Configurations, *, full_curve: bool) -> Prediction:
        """Return simulated predictions; curves end at the target or, if full, at the horizon."""
        # The curve of a configuration that is certain to blow up is of no use.
        rows = np.flatnonzero(~self.is_hopeless(configurations))
        runs = self._simulated(configurations.rows(rows), full_curve=full_curve)
        times = self._times(runs).placed(len(configurations), rows)
        return self._prediction(configurations, times, self.log_growth)

    def estimate(self, configurations: Configurations) -> Prediction:
        """Return predictions by the surface; configurations outside of it are simulated."""
        hopeless = self.is_hopeless(configurations)
        surface = self.simulator.surface
        places = self._places(configurations)
        depths, logs = DEPTHS[-1:], np.full((len(configurations), 1), np.nan)
        steps, outside = _steps_on(surface, places)
        longest = configurations.max_steps
        if surface is not None:
            depths, logs = surface.depths, surface.log_first_passage_times(*places)
            # The surface was simulated up to the predictor's horizon or its patience.
            patience = surface.patience(places[0], places[2])
            end = np.minimum(patience, self.simulator.max_steps)
            outside |= ~np.isfinite(steps) & (longest > end)
            longest = np.minimum(longest, np.ceil(RULES.patience * patience)).astype(np.int64)
        times = FirstPassageTimes.interpolated(depths, logs, hopeless)
        rows = np.flatnonzero(outside & ~hopeless)
        if len(rows):
            times = times.updated(
                self._uncorrected(configurations.rows(rows), longest[rows]), rows
            )
        return self._prediction(configurations, times, np.zeros(len(KNOTS)))

    def score(self, configurations: Configurations, *, simulate_outside: bool) -> Floats:
        """Return the seconds to the target, or the steps if no step was timed, shape ``(K,)``.

        They are interpolated in the surface; with ``simulate_outside``, configurations that it
        would have to extrapolate are simulated. Infinity if the target is not reached.
        """
        hopeless = self.is_hopeless(configurations)
        steps, outside = _steps_on(self.surface, self._places(configurations))
        outside &= ~hopeless
        if simulate_outside and outside.any():
            chosen = configurations.rows(np.flatnonzero(outside))
            times = self._times(self._simulated(chosen, n_seeds=1))
            logs = times.log_steps
            if self.calibration.n_observed:
                logs, _ = self._corrected(chosen, times, self.log_growth)
            steps[outside] = np.ceil(np.exp(np.nan_to_num(logs[:, -1], nan=np.inf)) - 1e-9)
        steps = np.where(hopeless | (steps > configurations.max_steps), np.inf, steps)
        per_step = self.seconds_per_step(configurations.batch_size)
        return np.asarray(steps * np.where(np.isnan(per_step), 1.0, per_step))

    def is_extrapolated(self, configurations: Configurations) -> Booleans:
        """Return a mask ``(K,)`` of configurations that the surface would have to extrapolate."""
        return _steps_on(self.simulator.surface, self._places(configurations))[1]

    def depth_after(self, configurations: Configurations, steps: Floats) -> Floats:
        """Return the depth ``(K,)`` after ``steps`` ``(K,)``: log(initial loss / training loss).

        It is zero if there is no surface or the surface has no times for the configuration.
        """
        if self.surface is None:
            return np.zeros(len(configurations))
        return self.surface.depth_after(*self._places(configurations), steps)

    def remaining_steps(
        self, running: Observation, configuration: Configurations, depth: float | None
    ) -> tuple[float, float] | None:
        """Return the steps that a running trial still needs to a depth, given its observed curve.

        The second number is the standard deviation of their logarithm. None if the response
        surface extrapolates or has no time at the depth. The depth is the target's if it is None.
        """
        surface, places = self.simulator.surface, self._places(configuration)
        if surface is None or surface.steps(*places)[1].any():
            return None
        log_steps = surface.log_first_passage_times(*places)[0]
        passed = np.isfinite(log_steps)
        aim = surface.depths[-1] if depth is None else min(depth, surface.depths[-1])
        if not passed.any() or not surface.depths[passed][-1] >= aim - 1e-9:
            return None
        if not np.isfinite(running.predicted).any():
            return None
        depths = np.append(DEPTHS, np.inf).clip(max=aim)
        steps = np.interp(depths, surface.depths[passed], log_steps[passed])
        return self.calibration.remaining(running, depths, steps)

    def _places(self, configurations: Configurations) -> tuple[Floats, Floats, Floats]:
        """Return learning rates, batch sizes with the surface's noise, and momenta, ``(K,)``."""
        batch_size = self.simulator.simulated_batch_size(configurations.batch_size)
        return configurations.learning_rate, batch_size.astype(np.float64), configurations.momentum

    def _simulated(
        self,
        configurations: Configurations,
        *,
        full_curve: bool = False,
        n_seeds: int | None = None,
    ) -> list[Trajectories]:
        """Return simulations, one for each seed, in which the kernel grows by :attr:`growth`."""
        return self.simulator.run(
            configurations,
            growth=self.growth,
            margin=RULES.margin if self.calibration.n_observed else 1.0,
            full_curve=full_curve,
            n_seeds=n_seeds,
        )

    def _uncorrected(
        self, configurations: Configurations, max_steps: Integers
    ) -> FirstPassageTimes:
        """Return times simulated as for the surface: the corrections of trials come afterwards.

        If trials were faster than predicted, simulations go on beyond ``max_steps``, ``(K,)``.
        """
        slack = np.clip(self.log_growth.max(), 0.0, RULES.most_log_slack)
        horizon = np.ceil(math.exp(float(slack)) * max_steps).astype(np.int64)
        runs = self.simulator.run(
            replace(configurations, max_steps=horizon),
            growth=self.simulator.kernel_growth,
            n_seeds=1,
        )
        return self._times(runs)

    def _times(self, runs: list[Trajectories]) -> FirstPassageTimes:
        """Return the first passage times of simulations, of which there is one per seed."""
        return FirstPassageTimes.of(runs, self.simulator.target, self.simulator.initial_loss)

    def _corrected(
        self, configurations: Configurations, times: FirstPassageTimes, growth: Floats
    ) -> tuple[Floats, Floats]:
        """Return corrected logarithmic times, ``(K, P)``, and their SD at the target, ``(K,)``.

        ``growth`` is the logarithm of the correction that they were simulated with, at KNOTS.
        Without observed trials the times stay as they are.
        """
        stability = self.stability(configurations)
        if not self.calibration.n_observed:
            simulator = self.simulator
            sd = np.sqrt(
                times.log_sd**2
                + linearisation_sd(simulator.spectrum.probe, simulator.loss_fraction) ** 2
                + simulator.approximation_log_error**2
                + simulator.subset_sd**2
                + stability_sd(stability) ** 2
            )
            return times.log_steps, sd
        # Loss levels below the target have its depth in all rows and need no correction of theirs.
        apart = (times.depths[:, :-1] < times.depths[:, -1:]).any(axis=0)
        columns = np.append(np.flatnonzero(apart), times.depths.shape[1] - 1)
        depths = times.depths[:, columns]
        logs, sd = self.calibration.correct(
            SimulatedFirstPassages(
                depths,
                times.log_steps[:, columns],
                growth[None],
                self.simulator.covariates(configurations),
                self.simulator.instability(depths, stability),
                configurations.lag,
            )
        )
        whole = np.repeat(logs[:, -1:], times.depths.shape[1], axis=1)
        whole[:, columns] = logs
        return whole, np.nan_to_num(sd[:, -1])

    def _prediction(
        self, c: Configurations, times: FirstPassageTimes, growth: Floats
    ) -> Prediction:
        """Return the prediction of configurations ``c`` from simulated times, with corrections.

        ``growth`` is the logarithm of the correction that they were simulated with, at KNOTS.
        """
        shape, stability = c.shape, self.stability(c)
        logs, sd = self._corrected(c, times, growth)
        median = np.exp(np.where(np.isfinite(logs[:, -1]), logs[:, -1], np.inf))
        finite = np.isfinite(median)
        whole = np.where(finite, np.maximum(1.0, np.ceil(median - 1e-9)), np.inf)
        steps = np.where(whole > c.max_steps, np.inf, whole)
        widths = np.exp(self._quantile * sd)
        p_diverges = np.zeros(len(c))
        if math.isfinite(self.simulator.training.hopeless_stability):
            p_diverges = self.calibration.divergence.probability(stability)
        p_diverges = np.where(times.blown_up, np.maximum(p_diverges, 0.5), p_diverges)
        p_converges = (1.0 - p_diverges) * probability_below(whole, sd, c.max_steps)
        blown_up = times.blown_up | self.is_hopeless(c)
        covariates = self.simulator.covariates(c)
        every_depth = np.broadcast_to(DEPTHS, (len(c), len(DEPTHS)))
        instability = self.simulator.instability(every_depth, stability)
        return Prediction(
            learning_rate=c.learning_rate.reshape(shape),
            batch_size=c.batch_size.reshape(shape),
            momentum=c.momentum.reshape(shape),
            steps=steps.reshape(shape),
            steps_low=np.maximum(1.0, np.ceil(median / widths - 1e-9)).reshape(shape),
            steps_high=np.maximum(1.0, np.ceil(median * widths - 1e-9)).reshape(shape),
            epochs=(steps / self.simulator.steps_per_epoch(c.batch_size)).reshape(shape),
            seconds=(steps * self.seconds_per_step(c.batch_size)).reshape(shape),
            outcomes=_outcomes(steps, blown_up).reshape(shape),
            p_converges=p_converges.reshape(shape),
            p_diverges=p_diverges.reshape(shape),
            reliable=self._is_reliable(sd).reshape(shape),
            stability=stability.reshape(shape),
            max_steps=c.max_steps.reshape(shape),
            strides=times.strides.reshape(shape),
            curve_steps=times.warped_curve_steps(logs).reshape(*shape, -1),
            curves={name: curve.reshape(*shape, -1) for name, curve in times.curves.items()},
            log_first_passage_times=times.on_levels(times.log_steps).reshape(*shape, -1),
            expected_log_first_passage_times=times.on_levels(logs).reshape(*shape, -1),
            covariates=covariates.reshape(*shape, -1),
            instability=instability.reshape(*shape, -1),
            log_growth=growth,
        )

    @property
    def _quantile(self) -> float:
        """The 90 % quantile of the predictive distribution: normal, or Student's t with trials."""
        if not self.calibration.n_observed:
            return Z_90
        from scipy.stats import t

        return float(t.ppf(0.9, self.calibration.degrees_of_freedom))

    def _is_reliable(self, sd: Floats) -> Booleans:
        """Return a mask of reliable predictions; ``sd`` is that of log times, both ``(K,)``."""
        if not self.calibration.n_observed:
            return np.full(len(sd), self.reliable)
        return (sd < RULES.unreliable_sd) & self.calibration.trusted


def unreliability(simulator: Simulator) -> str:
    """Return the text of the warning that linearisation does not hold up to the target."""
    probe, fraction = simulator.spectrum.probe, simulator.loss_fraction
    remedy = "Trials recorded with TrainingLog correct much of the error"
    if isinstance(simulator.optimizer, SGD) and simulator.optimizer.groups is None:
        remedy = (
            "A short training run of twenty steps, predictor.short_run(task), corrects much of "
            "the error, as do trials recorded with TrainingLog"
        )
    return (
        f"At {simulator.excess_fraction:.0%} of the initial training loss the network is far from "
        f"its linearisation: a weight matrix changes by {displacement(probe, fraction):.2g} times "
        "its norm, and the kernel differs from the predicted one by a factor of "
        f"{math.exp(kernel_mismatch(probe, fraction)):.2g}. The intervals are wider because of "
        f"this. {remedy}; or choose an easier target."
    )


def _outcomes(steps: Floats, blown_up: Booleans) -> NDArray[np.str_]:
    """Return the outcomes ``(K,)`` as strings: blown up, else converged if steps are finite."""
    reached = np.where(np.isfinite(steps), Outcome.CONVERGES.value, Outcome.NOT_REACHED.value)
    return np.where(blown_up, Outcome.DIVERGES.value, reached)


def _steps_on(
    surface: ResponseSurface | ScheduledSurface | None, places: tuple[Floats, Floats, Floats]
) -> tuple[Floats, Booleans]:
    """Return the steps ``(K,)`` to the target and a mask of extrapolated configurations.

    Without a surface all steps are infinite and the mask is true.
    """
    if surface is None:
        return np.full(len(places[0]), np.inf), np.ones(len(places[0]), dtype=bool)
    return surface.steps(*places)
