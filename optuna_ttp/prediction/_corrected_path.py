"""The way to the target as trials have corrected it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optuna_ttp.calibration import Calibration
from optuna_ttp.calibration import covariates
from optuna_ttp.calibration import DEPTHS
from optuna_ttp.calibration import is_reliable
from optuna_ttp.calibration import KNOTS
from optuna_ttp.calibration import linearisation_sd
from optuna_ttp.calibration import probability_below
from optuna_ttp.calibration import SimulatedFirstPassages
from optuna_ttp.calibration import stability_sd
from optuna_ttp.calibration import Z_90
from optuna_ttp.dynamics import KernelGrowth
from optuna_ttp.dynamics import ResponseSurface
from optuna_ttp.dynamics import Trajectories
from optuna_ttp.prediction._configurations import Configurations
from optuna_ttp.prediction._curves import Curves
from optuna_ttp.prediction._first_passage_times import FirstPassageTimes
from optuna_ttp.prediction._first_passage_times import warped
from optuna_ttp.prediction._outcome import Outcome
from optuna_ttp.prediction._prediction import Prediction
from optuna_ttp.prediction._target_path import TargetPath


# Above the stability limit a network first goes through a loss spike, and most recover from it up
# to several times the limit, where their curvature has dropped (the catapult of Lewkowycz et al.,
# 2020, arXiv 2003.02218). Chosen after the fact: at eight times the limit four of six runs of the
# demo's network still got to 15 % of their initial loss (benchmarks/accuracy/results/digits.csv).
_HOPELESS_STABILITY = 8.0
# A prediction that trials have corrected is unreliable where its logarithm is less sure than this.
_UNRELIABLE_SD = 0.4
# Simulations go on so much longer where trials have corrected the clock.
_MARGIN = 1.5


@dataclass(frozen=True, eq=False)
class CorrectedPath:
    """A path to the target, and what was learned of its clock.

    Attributes:
        path:
            As simulated.
        calibration:
            What trials have told.
    """

    path: TargetPath
    calibration: Calibration

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "surface"}

    @property
    def reliable(self) -> bool:
        """Whether the network stays close to its linearisation on the way to the target.

        See :func:`~optuna_ttp.calibration.is_reliable`; once trials were observed, whether they
        tell how the kernel grows.
        """
        depth = self.path.depth
        if self.calibration.n_observed:
            sd = np.interp(
                -math.log(max(self.path.fraction, 1e-12)), KNOTS, self.calibration.log_growth_sd
            )
            return bool(math.isnan(depth) or (sd < _UNRELIABLE_SD and self.calibration.trusted))
        return math.isnan(depth) or is_reliable(
            self.path.simulator.spectrum.probe, self.path.fraction
        )

    @property
    def log_growth(self) -> NDArray[np.float64]:
        """What simulations multiply the kernel by on top of the predicted growth."""
        if self.path.simulator.settings.method != "linear" or not self.calibration.n_observed:
            return np.zeros(len(KNOTS))
        return self.calibration.log_growth

    @property
    def growth(self) -> KernelGrowth | None:
        """What simulations multiply the kernel by."""
        predicted = self.path.simulator.kernel_growth
        if not self.log_growth.any():
            return predicted
        own = KernelGrowth.none() if predicted is None else predicted
        return own.times(KNOTS, self.log_growth)

    @cached_property
    def surface(self) -> ResponseSurface:
        """The response surface, as trials have corrected it."""
        if not self.calibration.n_observed:
            return self.path.surface
        simulator = self.path.simulator

        def correct(
            logs: NDArray[np.float64],
            rate: NDArray[np.float64],
            noise: NDArray[np.float64],
            mass: NDArray[np.float64],
            depths: NDArray[np.float64],
        ) -> NDArray[np.float64]:
            size = simulator.n_samples / (1.0 + noise * (simulator.n_samples - 1))
            step = rate / (1.0 - mass) * float(simulator.model.curvatures[0])
            stability = rate / simulator.largest(size, mass)
            return self.calibration.expected(
                SimulatedFirstPassages(
                    depths,
                    logs,
                    np.zeros((1, len(KNOTS))),
                    covariates(step, noise),
                    simulator.instability(depths, stability),
                    mass / (1.0 - mass),
                )
            )

        return self.path.surface.retimed(correct)

    def stability(self, configurations: Configurations) -> NDArray[np.float64]:
        """Return learning rates over the largest stable ones.

        Args:
            configurations:
                K of them.

        Returns:
            Shape ``(K,)``.
        """
        largest = self.path.simulator.largest(configurations.batch_size, configurations.momentum)
        return configurations.learning_rate / largest

    def is_hopeless(self, configurations: Configurations) -> NDArray[np.bool_]:
        """Tell which configurations blow up for sure.

        Args:
            configurations:
                K of them.

        Returns:
            Shape ``(K,)``.
        """
        return self.stability(configurations) > _HOPELESS_STABILITY

    def simulated(
        self,
        configurations: Configurations,
        *,
        full_curve: bool = False,
        n_seeds: int | None = None,
    ) -> list[Trajectories]:
        """Simulate with the corrected growth of the kernel.

        Args:
            configurations:
                Which ones.
            full_curve:
                Go on to the horizon. Off by default.
            n_seeds:
                Those of the simulator by default.

        Returns:
            One simulation a seed.
        """
        return self.path.simulator.run(
            configurations,
            self.path.target,
            growth=self.growth,
            margin=_MARGIN if self.calibration.n_observed else 1.0,
            full_curve=full_curve,
            n_seeds=n_seeds,
        )

    def corrected(
        self,
        configurations: Configurations,
        first_passages: FirstPassageTimes,
        growth: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return what times really are.

        Args:
            configurations:
                K of them.
            first_passages:
                Their times as simulated.
            growth:
                Logarithm of the correction that they were simulated with, at :data:`KNOTS`.

        Returns:
            Logarithmic times at the levels, ``(K, P)``, and their deviation at the target.
        """
        stability = self.stability(configurations)
        if not self.calibration.n_observed:
            sd = np.sqrt(
                first_passages.log_sd**2
                + linearisation_sd(self.path.simulator.spectrum.probe, self.path.fraction) ** 2
                + self.path.truncation_log_error**2
                + self.path.subset_sd**2
                + stability_sd(stability) ** 2
            )
            return first_passages.log_steps, sd
        # Loss levels below the target coincide with it in all rows.
        apart = (first_passages.depths[:, :-1] < first_passages.depths[:, -1:]).any(axis=0)
        columns = np.append(np.flatnonzero(apart), first_passages.depths.shape[1] - 1)
        depths = first_passages.depths[:, columns]
        logs, sd = self.calibration.correct(
            SimulatedFirstPassages(
                depths,
                first_passages.log_steps[:, columns],
                growth[None],
                self.path.simulator.covariates(configurations),
                self.path.simulator.instability(depths, stability),
                configurations.lag,
            )
        )
        whole = np.repeat(logs[:, -1:], first_passages.depths.shape[1], axis=1)
        whole[:, columns] = logs
        return whole, np.nan_to_num(sd[:, -1])

    def predict(
        self, configurations: Configurations, per_step: NDArray[np.float64], *, full_curve: bool
    ) -> Prediction:
        """Simulate configurations, and correct their times.

        Args:
            configurations:
                K of them.
            per_step:
                Seconds of a step of each, shape ``(K,)``.
            full_curve:
                Go on to the horizon.

        Returns:
            The prediction.
        """
        # Nobody needs the curve of a configuration that blows up, so it is not simulated.
        kept = np.flatnonzero(~self.is_hopeless(configurations))
        count = len(configurations)
        runs = self.simulated(configurations.rows(kept), full_curve=full_curve)
        first_passages = FirstPassageTimes.of(
            runs, self.path.target, self.path.simulator.initial_loss, count, kept
        )
        curves = Curves.of(runs[0], count, kept)
        return self.predicted(configurations, first_passages, curves, per_step, self.log_growth)

    def predicted(
        self,
        configurations: Configurations,
        first_passages: FirstPassageTimes,
        curves: Curves,
        per_step: NDArray[np.float64],
        growth: NDArray[np.float64],
    ) -> Prediction:
        """Return what first passage times say, as trials have corrected them.

        Args:
            configurations:
                K of them.
            first_passages:
                Their times as simulated.
            curves:
                Their curves as simulated.
            per_step:
                Seconds of a step of each, shape ``(K,)``.
            growth:
                Logarithm of the correction that they were simulated with, at :data:`KNOTS`.

        Returns:
            The prediction.
        """
        c, shape, horizon = configurations, configurations.shape, configurations.max_steps
        stability = self.stability(c)
        hopeless = self.is_hopeless(c)
        logs, sd = self.corrected(c, first_passages, growth)
        median = np.exp(np.where(np.isfinite(logs[:, -1]), logs[:, -1], np.inf))
        steps = np.where(np.isfinite(median), np.maximum(1.0, np.ceil(median - 1e-9)), np.inf)
        late = steps > horizon
        p_diverges = self.calibration.divergence.probability(stability)
        p_diverges = np.where(first_passages.blown_up, np.maximum(p_diverges, 0.5), p_diverges)
        p_converges = (1.0 - p_diverges) * probability_below(steps, sd, horizon)
        steps = np.where(late, np.inf, steps)
        outcomes = np.where(np.isfinite(steps), Outcome.CONVERGES.value, Outcome.NOT_REACHED.value)
        outcomes = np.where(first_passages.blown_up | hopeless, Outcome.DIVERGES.value, outcomes)
        widths = np.exp(self.quantile * sd)
        epochs = steps / np.ceil(self.path.simulator.n_samples / c.batch_size)
        seconds = steps * per_step
        return Prediction(
            learning_rate=c.learning_rate.reshape(shape),
            batch_size=c.batch_size.reshape(shape),
            momentum=c.momentum.reshape(shape),
            steps=steps.reshape(shape),
            steps_low=np.maximum(1.0, np.ceil(median / widths - 1e-9)).reshape(shape),
            steps_high=np.maximum(1.0, np.ceil(median * widths - 1e-9)).reshape(shape),
            epochs=epochs.reshape(shape),
            seconds=seconds.reshape(shape),
            outcomes=outcomes.reshape(shape),
            p_converges=p_converges.reshape(shape),
            p_diverges=p_diverges.reshape(shape),
            reliable=self._is_reliable(sd).reshape(shape),
            stability=stability.reshape(shape),
            max_steps=horizon.reshape(shape),
            strides=curves.strides.reshape(shape),
            curve_steps=warped(curves.steps, first_passages.log_steps, logs).reshape(*shape, -1),
            curves={name: values.reshape(*shape, -1) for name, values in curves.values.items()},
            log_first_passage_times=first_passages.on_levels(first_passages.log_steps).reshape(
                *shape, -1
            ),
            expected_log_first_passage_times=first_passages.on_levels(logs).reshape(*shape, -1),
            covariates=self.path.simulator.covariates(c).reshape(*shape, -1),
            instability=self.path.simulator.instability(
                np.broadcast_to(DEPTHS, (len(c), len(DEPTHS))), stability
            ).reshape(*shape, -1),
            log_growth=growth,
        )

    @property
    def quantile(self) -> float:
        """Of the predictive distribution, at 90 %."""
        if not self.calibration.n_observed:
            return Z_90
        from scipy.stats import t

        return float(t.ppf(0.9, self.calibration.degrees_of_freedom))

    def _is_reliable(self, sd: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Before any trial the probe says it, then the trials do."""
        if not self.calibration.n_observed:
            return np.full(len(sd), self.reliable)
        return (sd < _UNRELIABLE_SD) & self.calibration.trusted
