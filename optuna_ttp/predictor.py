"""The one face of the science: from hyperparameters to training time."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
import math
from typing import Any
from typing import get_args
from typing import Literal
from typing import SupportsFloat
from typing import TYPE_CHECKING
import warnings

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray

from optuna_ttp.calibration import calibrate
from optuna_ttp.calibration import Calibration
from optuna_ttp.calibration import covariates
from optuna_ttp.calibration import DEPTHS
from optuna_ttp.calibration import FRACTIONS
from optuna_ttp.calibration import NODES
from optuna_ttp.calibration import Observation
from optuna_ttp.dynamics import KernelGrowth
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import ResponseSurface
from optuna_ttp.dynamics import SampleConvergence
from optuna_ttp.dynamics import Sampling
from optuna_ttp.dynamics import Schedule
from optuna_ttp.dynamics import SGD
from optuna_ttp.dynamics import simulate
from optuna_ttp.dynamics import simulate_equation
from optuna_ttp.dynamics import Smoothing
from optuna_ttp.dynamics import StabilityLimit
from optuna_ttp.dynamics import Target
from optuna_ttp.dynamics import Trajectories
from optuna_ttp.exceptions import FingerprintMismatchError
from optuna_ttp.exceptions import UnreliablePredictionWarning
from optuna_ttp.ladder import Ladder
from optuna_ttp.ladder import warped
from optuna_ttp.loss_curve import LossCurve
from optuna_ttp.prediction import CONVERGES
from optuna_ttp.prediction import DIVERGES
from optuna_ttp.prediction import NOT_REACHED
from optuna_ttp.prediction import Prediction
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.throughput import learned_throughput
from optuna_ttp.throughput import Throughput
from optuna_ttp.uncertainty import displacement
from optuna_ttp.uncertainty import is_reliable
from optuna_ttp.uncertainty import kernel_mismatch
from optuna_ttp.uncertainty import linearisation_sd
from optuna_ttp.uncertainty import probability_below
from optuna_ttp.uncertainty import stability_sd
from optuna_ttp.uncertainty import Z_90


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


Method = Literal["linear", "sde", "ode"]
# Above the stability limit a network first goes through a loss spike, and most recover from it up
# to several times the limit, where their curvature has dropped (the catapult of Lewkowycz et al.,
# 2020, arXiv 2003.02218). Chosen after the fact: at eight times the limit four of six runs of the
# demo's network still got to 15 % of their initial loss (benchmarks/accuracy/results/digits.csv).
_HOPELESS_STABILITY = 8.0
# A prediction that trials have corrected is unreliable where its logarithm is less sure than this.
_UNRELIABLE_SD = 0.4
# Simulations go on so much longer where trials have corrected the clock.
_MARGIN = 1.5
# Learning rates that a probe chooses from, over the largest stable one, and what their product
# with the kernel's growth may come to.
_PROBE_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
_PROBE_INSTABILITY = 0.3
# What the response surface is built from; it ranks candidates, it does not promise times.
_SURFACE_TRACE = 0.95
# Simulations without corrections go on for up to so many times the horizon, as a logarithm.
_MOST_SLACK = 3.0


class TrainingTimePredictor:
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
        max_steps:
            The horizon: a target that takes more steps is ``"not_reached"``. 10,000 by default.
        throughput:
            Seconds per step. What was measured with the spectrum by default.
        smoothing:
            Watch the smoothed loss of the mini-batches, as a training log shows it, instead of the
            loss over all samples: a ``target_loss``, ``target_fraction`` or ``target_epsilon`` is
            that of this curve. Off by default.
        dampening:
            Of :class:`torch.optim.SGD`. Zero by default.
        nesterov:
            Of :class:`torch.optim.SGD`. Off by default.
        weight_decay:
            L2 weight decay of :class:`torch.optim.SGD`. Zero by default. With learning-rate
            multipliers the decay of what was learned is approximate, that of the pretrained
            weights is not.
        schedule:
            A :class:`~optuna_ttp.Schedule`, or a function from the number of steps done to what
            multiplies the learning rate. Constant by default.
        sampling:
            ``"shuffle"``, a permutation an epoch (the default), or ``"replacement"``.
        n_samples:
            The number of samples that will be trained on, where the spectrum is that of a random
            subset. Those of the spectrum by default.
        method:
            ``"linear"``, the exact simulation of the linearised model (the default); ``"sde"`` or
            ``"ode"``, the paper's equation 1 with and without noise, as a baseline.
        kernel_growth:
            What the kernel is multiplied by as the loss falls: ``"predicted"`` from the spectrum's
            probe by :meth:`~optuna_ttp.dynamics.KernelGrowth.from_probe` (the default; it
            is nothing where the spectrum was not probed, and for the paper's equation),
            ``"frozen"``, or a :class:`~optuna_ttp.dynamics.KernelGrowth`.
        n_seeds:
            Orders of the samples that are simulated; the prediction is their geometric mean. Two
            by default.
        seed:
            Of the first of them.
        device:
            Where to simulate. The CPU by default, which is faster for small spectra.
        exact:
            Simulate every single step, also of very slow configurations. Off by default: there,
            several steps are simulated as one (:attr:`Prediction.strides` says how many).
        calibration:
            What was learned from observed trials, see :meth:`calibrated`. Nothing by default.

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
        max_steps: int = 10_000,
        throughput: Throughput | None = None,
        smoothing: Smoothing | None = None,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        schedule: Schedule | Callable[[int], float] | None = None,
        sampling: Sampling = "shuffle",
        n_samples: int | None = None,
        method: Method = "linear",
        kernel_growth: Literal["predicted", "frozen"] | KernelGrowth = "predicted",
        n_seeds: int = 2,
        seed: int = 0,
        device: str = "cpu",
        exact: bool = False,
        calibration: Calibration | None = None,
    ) -> None:
        if not isinstance(spectrum, Spectrum):
            raise TypeError(f"spectrum must be a Spectrum but got {type(spectrum).__name__}.")
        if smoothing is not None and not isinstance(smoothing, Smoothing):
            raise TypeError(f"smoothing must be a Smoothing but got {smoothing!r}.")
        if throughput is not None:
            _check_kind("throughput", throughput, Throughput)
        if calibration is not None:
            _check_kind("calibration", calibration, Calibration)
        _check_seed(seed)
        for name, flag in (("nesterov", nesterov), ("exact", exact)):
            _check_kind(name, flag, bool)
        self.spectrum = spectrum
        self.max_steps = _check_count("max_steps", max_steps)
        self.n_seeds = _check_count("n_seeds", n_seeds)
        self.n_samples = spectrum.n_samples
        if n_samples is not None:
            self.n_samples = _check_count("n_samples", n_samples)
        if self.n_samples < spectrum.n_samples:
            raise ValueError(
                f"n_samples must be at least {spectrum.n_samples}, the samples of the spectrum, "
                f"but got {n_samples}. Use task.subset() for fewer."
            )
        self.throughput = spectrum.throughput if throughput is None else throughput
        self.smoothing = smoothing
        self.schedule = Schedule.of(schedule)
        self.sampling = _check_choice("sampling", sampling, get_args(Sampling))
        self.method = _check_choice("method", method, get_args(Method))
        self.kernel_growth = self._resolve_growth(kernel_growth)
        self.seed = seed
        self.exact = exact
        self.calibration = Calibration.none() if calibration is None else calibration
        self.observations: tuple[Observation, ...] = ()
        self.probe_seconds = 0.0
        # Of a twin: the predictor that keeps the response surface for all of them.
        self._root: TrainingTimePredictor | None = None
        self._device = device
        self._sgd = _check_sgd(dampening, nesterov, weight_decay, spectrum)
        if self.method != "linear" and smoothing is not None:
            raise ValueError(f'smoothing belongs to method="linear" but got method={method!r}.')
        self.target = self._resolve_target(
            {
                "target_loss": target_loss,
                "target_fraction": target_fraction,
                "target_accuracy": target_accuracy,
                "target_validation_loss": target_validation_loss,
                "target_validation_accuracy": target_validation_accuracy,
                "target_epsilon": target_epsilon,
            }
        )
        if not self.reliable:
            warnings.warn(
                f"At {self.depth:.0%} of the initial training loss the network is far from its "
                "linearisation: a weight matrix changes by "
                f"{displacement(spectrum.probe, self._fraction):.2g} times what it was, and the "
                "kernel differs from the predicted one by a factor of "
                f"{math.exp(kernel_mismatch(spectrum.probe, self._fraction)):.2g}. The "
                "intervals say so. Twenty real steps correct much of it, predictor.probe(task), "
                "and so do trials that are recorded with TrainingLog; or choose a target that is "
                "less deep.",
                UnreliablePredictionWarning,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        return (
            f"TrainingTimePredictor({self.spectrum!r}, target {self.target.quantity} "
            f"{self.target.value:.4g})"
        )

    def __getstate__(self) -> dict[str, Any]:
        # The linearised model is derived from the spectrum, and larger.
        derived = ("_model", "_own_surface", "_corrected_surface", "_stability_limit")
        return {k: v for k, v in self.__dict__.items() if k not in derived}

    @property
    def initial_loss(self) -> float:
        """The training loss at the pretrained weights."""
        return float(self._model.loss(self._model.initial_outputs[None]))

    @cached_property
    def depth(self) -> float:
        """Training loss over the initial one where the target is, on the linearised path.

        The lowest loss that is possible, with label smoothing, counts as zero. Of a target that
        depends on the end of the curve it is not known: NaN.
        """
        floor, initial = self._model.loss_floor, self.initial_loss
        if self.target.settled:
            return math.nan
        if self.target.quantity in ("loss", "smoothed_loss"):
            return (self.target.value - floor) / (initial - floor)
        rate = np.array([0.5 / max(float(self._model.curvatures[0]), 1e-30)])
        size = np.array([self.spectrum.n_samples])
        curves = simulate(
            self._model, SGD.of(rate), size, max_steps=np.array([5_000]), target=self.target
        )
        return (float(np.nanmin(curves.curves["loss"])) - floor) / (initial - floor)

    @cached_property
    def _fraction(self) -> float:
        """The loss over the initial one at the depth, as the probe counts it."""
        floor, initial = self._model.loss_floor, self.initial_loss
        return (self.depth * (initial - floor) + floor) / initial

    @property
    def reliable(self) -> bool:
        """Whether the network stays close to its linearisation on the way to the target.

        See :func:`~optuna_ttp.uncertainty.is_reliable`; once trials were observed, whether they
        tell how the kernel grows.
        """
        depth = self.depth
        if self.calibration.n_observed:
            sd = np.interp(
                -math.log(max(self._fraction, 1e-12)), NODES, self.calibration.log_growth_sd
            )
            return bool(math.isnan(depth) or (sd < _UNRELIABLE_SD and self.calibration.trusted))
        return math.isnan(depth) or is_reliable(self.spectrum.probe, self._fraction)

    def sample_convergence(self) -> SampleConvergence:
        """Return how the predicted time depends on the number of samples of the spectrum.

        Its :meth:`~optuna_ttp.dynamics.SampleConvergence.recommended` says how many samples a
        spectrum should have.

        Returns:
            Predicted times of random subsets of the spectrum's samples.
        """
        return self._sample_convergence

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
        twin = self.calibrated(calibrate(every))
        twin.observations = every
        timed = [o for o in every if o.batch_size > 0 and o.seconds_per_step > 0.0]
        twin.throughput = learned_throughput(
            self.throughput,
            np.array([o.batch_size for o in timed], dtype=np.int64),
            np.array([o.seconds_per_step for o in timed]),
        )
        return twin

    def probe(
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
            ...     predictor = predictor.probe(task)

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
            A predictor that has learned from it. What it took is its :attr:`probe_seconds`, and
            is charged by the ledger like the spectrum.

        Raises:
            FingerprintMismatchError:
                If the spectrum belongs to another task.
            ValueError:
                If an argument is out of its range.
        """
        from optuna_ttp.jacobian import resolve_device
        from optuna_ttp.pilot import train_pilot
        from optuna_ttp.task import FineTuningTask

        _check_kind("task", task, FineTuningTask)
        if task.fingerprint != self.spectrum.metadata.fingerprint:
            raise FingerprintMismatchError(
                f"The task must be that of the spectrum, {self.spectrum.metadata.fingerprint[:12]}"
                f"..., but got {task.fingerprint[:12]}..."
            )
        steps = _check_count("steps", steps)
        given = {"learning_rate": learning_rate, "momentum": momentum}
        for name, value in given.items():
            if value is not None:
                _check_number(name, value)
        self._check_configuration(
            1.0 if learning_rate is None else learning_rate,
            1,
            0.0 if momentum is None else momentum,
            steps,
        )
        rate, mass = self._probed_configuration(steps, learning_rate, momentum)
        pilot = train_pilot(
            task,
            self._model,
            learning_rate=rate,
            momentum=mass,
            steps=steps,
            device=resolve_device(task, device),
        )
        size = self.spectrum.n_samples
        # All that the pilot passed counts, also what is deeper than the target.
        deep = self.calibrated(self.calibration)
        deep.target = Target("loss", min(np.nanmin(pilot.losses), 0.99 * self.initial_loss))
        prediction = deep.predict(rate, size, mass, max_steps=100 * steps)
        curve = LossCurve.of(pilot.losses)
        observed, errors = curve.log_passages(self.initial_loss * FRACTIONS)
        twin = self.informed(
            [
                Observation(
                    predicted=prediction.log_passages,
                    expected=prediction.expected_log_passages,
                    growth=prediction.log_growth,
                    covariates=prediction.covariates,
                    instability=prediction.instability,
                    effective_learning_rate=rate / (1.0 - mass),
                    lag=mass / (1.0 - mass),
                    observed=observed,
                    errors=errors,
                    n_steps=steps,
                    diverged=curve.diverged or len(pilot.losses) <= steps,
                )
            ]
        )
        twin.probe_seconds = self.probe_seconds + pilot.seconds
        return twin

    def _probed_configuration(
        self, steps: int, learning_rate: float | None, momentum: float | None
    ) -> tuple[float, float]:
        """The configuration that comes furthest in a few steps and stays stable on the way."""
        if learning_rate is not None:
            return float(learning_rate), 0.0 if momentum is None else float(momentum)
        wanted = (0.0, 0.9) if momentum is None else (float(momentum),)
        shares = np.tile(_PROBE_SHARES, len(wanted))
        masses = np.repeat(wanted, len(_PROBE_SHARES))
        sizes = np.full(len(shares), self.n_samples)
        rates = shares * self._largest(sizes, masses)
        p = self.predict(rates, sizes, masses, max_steps=steps, full_curve=True)
        losses = np.array(
            [
                np.interp(steps, s[np.isfinite(s)], c[np.isfinite(s)])
                for s, c in zip(p.curve_steps, p.curve_losses, strict=True)
            ]
        )
        # A loss may come out as zero where the simulated outputs grow without bound.
        depths = np.log(self.initial_loss / np.maximum(losses, 1e-30))[:, None]
        unstable = self._instability(depths, shares)[:, 0]
        # One of them is always slow enough.
        best = int(np.argmin(np.where(unstable <= _PROBE_INSTABILITY, losses, np.inf)))
        return float(rates[best]), float(masses[best])

    def calibrated(self, calibration: Calibration) -> TrainingTimePredictor:
        """Return a predictor that corrects its times by what was learned from observed trials.

        Args:
            calibration:
                See :func:`optuna_ttp.calibration.calibrate`.

        Returns:
            A new predictor that shares everything else with this one.
        """
        # What is derived from the spectrum alone is derived once.
        _ = self._model, self._stability_limit, self._fraction
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.calibration = calibration
        twin._root = self if self._root is None else self._root
        twin.__dict__.pop("_corrected_surface", None)
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
                In [0, 1), as in :class:`torch.optim.SGD`. Zero by default.
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
        rate, size, mass, horizon = self._check_configuration(
            learning_rate, batch_size, momentum, self.max_steps if max_steps is None else max_steps
        )
        shape = rate.shape
        rate, size, mass, horizon = rate.ravel(), size.ravel(), mass.ravel(), horizon.ravel()
        stability = rate / self._largest(size, mass)
        hopeless = stability > _HOPELESS_STABILITY
        # Nobody needs the curve of a configuration that blows up, so it is not simulated.
        kept = np.flatnonzero(~hopeless)
        runs = self._simulate(
            rate[kept], size[kept], mass[kept], horizon[kept], full_curve=full_curve
        )
        ladder = Ladder.of(runs, self.target, self.initial_loss, len(rate), kept)
        first = runs[0]
        strides = np.ones(len(rate), dtype=np.int64)
        strides[kept] = first.strides
        steps = np.full((len(rate), first.steps.shape[1]), np.nan)
        steps[kept] = first.steps
        curves = {}
        for name, values in first.curves.items():
            curves[name] = np.full(steps.shape, np.nan)
            curves[name][kept] = values
        return self._prediction(
            ladder,
            rate,
            size,
            mass,
            horizon,
            strides,
            steps,
            curves,
            growth=self._log_growth,
            shape=shape,
        )

    def estimate(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike = 0.0,
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
                In [0, 1). Zero by default.
            max_steps:
                The horizon in steps, if another one than the predictor's.

        Returns:
            Steps, epochs, seconds, interval and outcome; the curves are empty.

        Raises:
            ValueError:
                If a hyperparameter is out of its range.
        """
        rate, size, mass, horizon = self._check_configuration(
            learning_rate, batch_size, momentum, self.max_steps if max_steps is None else max_steps
        )
        shape = rate.shape
        rate, size, mass, horizon = rate.ravel(), size.ravel(), mass.ravel(), horizon.ravel()
        hopeless = rate > _HOPELESS_STABILITY * self._largest(size, mass)
        steps, outside = self._scored(rate, size, mass)
        # The surface ends at the predictor's horizon.
        outside |= ~np.isfinite(steps) & (horizon > self.max_steps)
        simulated = np.flatnonzero(outside & ~hopeless)
        depths, logs = (
            self._surface.ladder(rate, self._simulated_size(size).astype(np.float64), mass)
            if self.has_surface
            else (DEPTHS[None, -1:], np.full((len(rate), 1), np.nan))
        )
        ladder = Ladder.interpolated(depths[0], logs, hopeless)
        if len(simulated):
            # As the surface is: without what trials have corrected, which comes afterwards.
            plain = self.calibrated(Calibration.none())
            slack = math.exp(float(np.clip(self._log_growth.max(), 0.0, _MOST_SLACK)))
            runs = plain._simulate(
                rate[simulated],
                size[simulated],
                mass[simulated],
                np.ceil(slack * horizon[simulated]).astype(np.int64),
                n_seeds=1,
            )
            own = Ladder.of(runs, self.target, self.initial_loss, len(rate), simulated)
            ladder = ladder.updated(own, simulated)
        return self._prediction(
            ladder,
            rate,
            size,
            mass,
            horizon,
            np.ones(len(rate), dtype=np.int64),
            np.empty((len(rate), 0)),
            {},
            growth=np.zeros(len(NODES)),
            shape=shape,
        )

    def remaining_steps(
        self, running: Observation, configuration: tuple[float, int, float]
    ) -> tuple[float, float] | None:
        """Return how long a running trial still takes, given its own curve.

        See :meth:`~optuna_ttp.Calibration.remaining`.

        Args:
            running:
                What was predicted for it by :meth:`estimate`, and seen of it so far.
            configuration:
                Its learning rate, batch size and momentum.

        Returns:
            Steps from the last one that was seen, and the standard deviation of their logarithm;
            :obj:`None` where the response surface does not know.
        """
        one_rate, one_size, one_mass = ([value] for value in configuration)
        rate, size, mass, _ = self._check_configuration(
            one_rate, one_size, one_mass, self.max_steps
        )
        if not self.has_surface or self._scored(rate, size, mass)[1].any():
            return None
        depths, logs = self._surface.ladder(
            rate, self._simulated_size(size).astype(np.float64), mass
        )
        ladder = Ladder.interpolated(depths[0], logs, np.zeros(1, dtype=bool))
        if not np.isfinite(ladder.log_steps[0, -1]):
            return None
        return self.calibration.remaining(running, ladder.depths[0], ladder.log_steps[0])

    def _prediction(
        self,
        ladder: Ladder,
        rate: NDArray[np.float64],
        size: NDArray[np.int64],
        mass: NDArray[np.float64],
        horizon: NDArray[np.int64],
        strides: NDArray[np.int64],
        curve_steps: NDArray[np.float64],
        curves: dict[str, NDArray[np.float64]],
        *,
        growth: NDArray[np.float64],
        shape: tuple[int, ...],
    ) -> Prediction:
        """What a ladder says, as trials have corrected it."""
        stability = rate / self._largest(size, mass)
        hopeless = stability > _HOPELESS_STABILITY
        x = self._covariates(rate, size, mass)
        logs, sd = self._corrected(ladder, x, stability, mass, growth)
        median = np.exp(np.where(np.isfinite(logs[:, -1]), logs[:, -1], np.inf))
        steps = np.where(np.isfinite(median), np.maximum(1.0, np.ceil(median - 1e-9)), np.inf)
        late = steps > horizon
        p_diverges = self.calibration.divergence.probability(stability)
        p_diverges = np.where(ladder.blown_up, np.maximum(p_diverges, 0.5), p_diverges)
        p_converges = (1.0 - p_diverges) * probability_below(steps, sd, horizon)
        steps = np.where(late, np.inf, steps)
        outcomes = np.where(np.isfinite(steps), CONVERGES, NOT_REACHED)
        outcomes = np.where(ladder.blown_up | hopeless, DIVERGES, outcomes)
        widths = np.exp(self._quantile * sd)
        epochs = steps / np.ceil(self.n_samples / size)
        seconds = steps * self.seconds_per_step(size)
        return Prediction(
            learning_rate=rate.reshape(shape),
            batch_size=size.reshape(shape),
            momentum=mass.reshape(shape),
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
            strides=strides.reshape(shape),
            curve_steps=warped(curve_steps, ladder.log_steps, logs).reshape(*shape, -1),
            curves={name: values.reshape(*shape, -1) for name, values in curves.items()},
            log_passages=ladder.on_rungs(ladder.log_steps).reshape(*shape, -1),
            expected_log_passages=ladder.on_rungs(logs).reshape(*shape, -1),
            covariates=x.reshape(*shape, -1),
            instability=self._instability(
                np.broadcast_to(DEPTHS, (len(rate), len(DEPTHS))), stability
            ).reshape(*shape, -1),
            log_growth=growth,
        )

    def score(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike = 0.0,
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
                In [0, 1). Zero by default.
            simulate_outside:
                Turn off where speed matters more. On by default.

        Returns:
            Seconds (steps where the time of a step is not known) of the common shape; infinite
            where the target is out of reach or training is predicted to diverge.

        Raises:
            ValueError:
                If a hyperparameter is out of its range.
        """
        rate, size, mass, horizon = self._check_configuration(
            learning_rate, batch_size, momentum, self.max_steps
        )
        shape = rate.shape
        rate, size, mass, horizon = rate.ravel(), size.ravel(), mass.ravel(), horizon.ravel()
        hopeless = rate > _HOPELESS_STABILITY * self._largest(size, mass)
        steps, outside = self._scored(rate, size, mass, corrected=True)
        outside &= ~hopeless
        if simulate_outside and outside.any():
            chosen = np.flatnonzero(outside)
            runs = self._simulate(
                rate[chosen], size[chosen], mass[chosen], horizon[chosen], n_seeds=1
            )
            ladder = Ladder.of(
                runs, self.target, self.initial_loss, len(chosen), np.arange(len(chosen))
            )
            logs = ladder.log_steps
            if self.calibration.n_observed:
                stability = rate[chosen] / self._largest(size[chosen], mass[chosen])
                x = self._covariates(rate[chosen], size[chosen], mass[chosen])
                logs, _ = self._corrected(ladder, x, stability, mass[chosen], self._log_growth)
            steps[chosen] = np.ceil(np.exp(np.nan_to_num(logs[:, -1], nan=np.inf)) - 1e-9)
        steps = np.where(hopeless | (steps > horizon), np.inf, steps)
        per_step = self.seconds_per_step(size)
        return np.asarray(steps * np.where(np.isnan(per_step), 1.0, per_step)).reshape(shape)

    def is_extrapolated(
        self, learning_rate: ArrayLike, batch_size: ArrayLike, momentum: ArrayLike = 0.0
    ) -> NDArray[np.bool_]:
        """Tell where the response surface would have to extrapolate.

        Args:
            learning_rate:
                Positive.
            batch_size:
                Whole numbers from 1 to N.
            momentum:
                In [0, 1). Zero by default.

        Returns:
            The common shape: momentum above 0.995, batches of fewer than four samples, the border
            of what reaches the target, and everything where the learning rate follows a schedule
            or the target depends on the end of the curve.
        """
        rate, size, mass, _ = self._check_configuration(
            learning_rate, batch_size, momentum, self.max_steps
        )
        outside = self._scored(rate.ravel(), size.ravel(), mass.ravel())[1]
        return outside.reshape(rate.shape)

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
            above a rung it is taken to be at the last one that was passed. Zero where training is
            predicted to diverge, or nothing is known.
        """
        if not self.has_surface:
            return np.zeros(len(learning_rate))
        rate, size, mass, _ = self._check_configuration(
            learning_rate, batch_size, momentum, self.max_steps
        )
        surface = self._corrected_surface
        logs = surface.passages(rate, self._simulated_size(size).astype(np.float64), mass)
        goal = np.log(np.maximum(steps, 1.0))
        # The first rung is where the first step is, or before it.
        logs = np.concatenate([np.minimum(logs[:, :1], 0.0) - 1.0, logs], axis=1)
        depths = np.concatenate([[0.0], surface.depths])
        passed = np.logical_and.accumulate(np.nan_to_num(logs, nan=np.inf) <= goal[:, None], 1)
        last = np.maximum(passed.sum(axis=1) - 1, 0)
        rows = np.arange(len(goal))
        after = np.minimum(last + 1, len(depths) - 1)
        before = np.where(last < len(depths) - 1, last, len(depths) - 2)
        first, then = logs[rows, before], logs[rows, after]
        slope = (depths[after] - depths[before]) / np.maximum(then - first, 1e-3)
        rest = np.clip(goal - logs[rows, last], 0.0, _MOST_SLACK)
        further = np.where(np.isfinite(slope), slope * rest, 0.0)
        # No further than the next rung, of which the surface knows that it was not passed.
        further = np.where(
            last < len(depths) - 1, np.minimum(further, depths[after] - depths[last]), further
        )
        return np.asarray(np.where(np.isfinite(logs[rows, last]), depths[last] + further, 0.0))

    @cached_property
    def best_depth(self) -> float:
        """Depth at which the validation loss is predicted to be lowest.

        That of slow full-batch training of the linearised network; infinite without validation
        data, or where more training always helps within 20,000 steps.
        """
        if self._model.validation is None:
            return math.inf
        rate = np.array([0.5 / max(float(self._model.curvatures[0]), 1e-30)])
        run = simulate(
            self._model,
            SGD.of(rate),
            np.array([self._model.n_samples]),
            max_steps=np.array([20_000]),
            target=Target("validation_loss", 1e-12),
            full_curves=True,
        )
        losses = run.curves["validation_loss"][0]
        known = np.flatnonzero(np.isfinite(losses) & np.isfinite(run.steps[0]))
        best = known[int(np.argmin(losses[known]))]
        if best == known[-1]:
            return math.inf
        return math.log(self.initial_loss / max(float(run.curves["loss"][0, best]), 1e-300))

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
            Learning rates of the common shape; see
            :class:`optuna_ttp.dynamics.StabilityLimit`.
        """
        _, size, mass, _ = self._check_configuration(1.0, batch_size, momentum, self.max_steps)
        return self._largest(size.ravel(), mass.ravel()).reshape(size.shape)

    @cached_property
    def _model(self) -> LinearisedModel:
        return LinearisedModel.from_spectrum(self.spectrum, device=self._device)

    @cached_property
    def _stability_limit(self) -> StabilityLimit:
        return StabilityLimit.of(self._model, self.n_samples)

    @property
    def has_surface(self) -> bool:
        """Whether times are a function of learning rate, batch size and momentum alone."""
        settled = self.target.settled
        return bool(self.schedule.is_constant and not settled and self.method == "linear")

    @property
    def _surface(self) -> ResponseSurface:
        return self._own_surface if self._root is None else self._root._surface

    @cached_property
    def _own_surface(self) -> ResponseSurface:
        share = min(_SURFACE_TRACE, self.spectrum.explained_trace)
        model = LinearisedModel.from_spectrum(
            self.spectrum.truncate(explained_trace=share), device=self._device
        )
        return ResponseSurface.build(
            model,
            self.target,
            DEPTHS,
            max_steps=self.max_steps,
            sampling=self.sampling,
            smoothing=self.smoothing,
            growth=self.kernel_growth,
            seed=self.seed,
            **self._sgd,
        )

    @cached_property
    def _sample_convergence(self) -> SampleConvergence:
        return SampleConvergence.measure(
            self._model, self.target, growth=self.kernel_growth, seed=self.seed
        )

    @cached_property
    def _subset_sd(self) -> float:
        if self.n_samples == self.spectrum.n_samples:
            return 0.0
        if self.target.settled:
            # Both ends of the curve move, mostly together.
            return 0.2
        return self._sample_convergence.error(self.n_samples)

    @cached_property
    def _truncation_log_error(self) -> float:
        """What the dropped eigenpairs change, from what dropping as much again changes."""
        kept = self.spectrum.explained_trace
        if kept > 1.0 - 1e-6 or self.target.settled:
            return 0.0
        model = LinearisedModel.from_spectrum(
            self.spectrum.truncate(explained_trace=max(1.0 - 2.0 * (1.0 - kept), 0.01))
        )
        target = self.target
        if target.quantity == "smoothed_loss":
            target = replace(target, quantity="loss")
        rate = 0.5 / max(float(self._model.curvatures[0]), 1e-30)
        times = [
            simulate(
                m,
                SGD.of(rate),
                np.array([m.n_samples]),
                max_steps=np.array([5_000]),
                target=target,
            ).first_passages(target)[0]
            for m in (self._model, model)
        ]
        if not np.isfinite(times).all():
            return 1.0
        return abs(math.log(max(times[1], 1.0) / max(times[0], 1.0)))

    @property
    def _log_growth(self) -> NDArray[np.float64]:
        """What simulations multiply the kernel by on top of the predicted growth."""
        if self.method != "linear" or not self.calibration.n_observed:
            return np.zeros(len(NODES))
        return self.calibration.log_growth

    @property
    def _growth(self) -> KernelGrowth | None:
        if not self._log_growth.any():
            return self.kernel_growth
        own = KernelGrowth.none() if self.kernel_growth is None else self.kernel_growth
        return own.times(NODES, self._log_growth)

    def _covariates(
        self,
        rate: NDArray[np.float64],
        size: NDArray[np.int64],
        mass: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        n = self.n_samples
        step = rate / (1.0 - mass) * float(self._model.curvatures[0])
        return covariates(step, (n - size) / (max(n - 1, 1) * size))

    def _instability(
        self, depths: NDArray[np.float64], stability: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Learning rate over the largest stable one, times the growth that the probe predicts."""
        if self.kernel_growth is None:
            return np.broadcast_to(stability[:, None], (len(stability), depths.shape[1]))
        return np.asarray(stability[:, None] * self.kernel_growth.at(np.exp(-depths)))

    def _corrected(
        self,
        ladder: Ladder,
        x: NDArray[np.float64],
        stability: NDArray[np.float64],
        mass: NDArray[np.float64],
        growth: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Logarithmic times at the rungs, ``(K, P)``, and their deviation at the target."""
        if not self.calibration.n_observed:
            sd = np.sqrt(
                ladder.log_sd**2
                + linearisation_sd(self.spectrum.probe, self._fraction) ** 2
                + self._truncation_log_error**2
                + self._subset_sd**2
                + stability_sd(stability) ** 2
            )
            return ladder.log_steps, sd
        # Rungs below the target coincide with it in all rows.
        apart = (ladder.depths[:, :-1] < ladder.depths[:, -1:]).any(axis=0)
        columns = np.append(np.flatnonzero(apart), ladder.depths.shape[1] - 1)
        depths = ladder.depths[:, columns]
        logs, sd = self.calibration.correct(
            depths,
            ladder.log_steps[:, columns],
            growth,
            x,
            self._instability(depths, stability),
            mass / (1.0 - mass),
        )
        whole = np.repeat(logs[:, -1:], ladder.depths.shape[1], axis=1)
        whole[:, columns] = logs
        return whole, np.nan_to_num(sd[:, -1])

    @property
    def _quantile(self) -> float:
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

    def _largest(
        self, size: NDArray[np.int64] | NDArray[np.float64], mass: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        return self._stability_limit.max_learning_rate(
            size,
            mass,
            **self._sgd,
            replacement=self.sampling == "replacement",
        )

    def _scored(
        self,
        rate: NDArray[np.float64],
        size: NDArray[np.int64],
        mass: NDArray[np.float64],
        *,
        corrected: bool = False,
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Steps from the response surface, and where they are extrapolated."""
        if not self.has_surface:
            return np.full(len(rate), np.inf), np.ones(len(rate), dtype=bool)
        sizes = self._simulated_size(size).astype(np.float64)
        return (self._corrected_surface if corrected else self._surface).steps(rate, sizes, mass)

    @cached_property
    def _corrected_surface(self) -> ResponseSurface:
        """The response surface as trials have corrected it."""
        if not self.calibration.n_observed:
            return self._surface

        def correct(
            logs: NDArray[np.float64],
            rate: NDArray[np.float64],
            noise: NDArray[np.float64],
            mass: NDArray[np.float64],
            depths: NDArray[np.float64],
        ) -> NDArray[np.float64]:
            size = self.n_samples / (1.0 + noise * (self.n_samples - 1))
            step = rate / (1.0 - mass) * float(self._model.curvatures[0])
            stability = rate / self._largest(size, mass)
            return self.calibration.expected(
                depths,
                logs,
                np.zeros(len(NODES)),
                covariates(step, noise),
                self._instability(depths, stability),
                mass / (1.0 - mass),
            )

        return self._surface.retimed(correct)

    def _simulated_size(self, size: NDArray[np.int64]) -> NDArray[np.int64]:
        """The batch size that makes as much noise among the spectrum's samples.

        ``gamma = (N - B) / ((N - 1) B)`` on all ``N`` samples is that of
        ``N_0 / (1 + gamma (N_0 - 1))`` among the ``N_0`` samples of the spectrum.
        """
        n, own = self.n_samples, self.spectrum.n_samples
        if n == own:
            return size
        gamma = (n - size) / ((n - 1) * size)
        return np.maximum(1, np.rint(own / (1.0 + gamma * (own - 1)))).astype(np.int64)

    def _simulate(
        self,
        rate: NDArray[np.float64],
        size: NDArray[np.int64],
        mass: NDArray[np.float64],
        horizon: NDArray[np.int64],
        *,
        full_curve: bool = False,
        n_seeds: int | None = None,
    ) -> list[Trajectories]:
        """One simulation a seed."""
        sgd = SGD.of(rate, mass, schedule=self.schedule, **self._sgd)
        # The horizon counts real steps; the simulation's own clock runs a little differently.
        margin = _MARGIN if self.calibration.n_observed else 1.0
        steps = np.maximum(1, np.ceil(margin * horizon)).astype(np.int64)
        sizes = self._simulated_size(size)
        per_epoch = -(-self.n_samples // size)
        full_curve = full_curve or self.target.settled
        if self.method != "linear":
            return [
                simulate_equation(
                    self._model,
                    sgd,
                    sizes,
                    max_steps=steps,
                    method=self.method,
                    target=self.target,
                    full_curves=full_curve,
                    seed=self.seed + k,
                    steps_per_epoch=per_epoch,
                )
                for k in range(self.n_seeds if n_seeds is None else n_seeds)
            ]
        noisy = self.sampling == "replacement" or (sizes < self.spectrum.n_samples).any()
        wanted = self.n_seeds if n_seeds is None else n_seeds
        return [
            simulate(
                self._model,
                sgd,
                sizes,
                max_steps=steps,
                target=self.target,
                full_curves=full_curve,
                exact=self.exact or self.target.settled,
                sampling=self.sampling,
                smoothing=self.smoothing,
                growth=self._growth,
                seed=self.seed + k,
                steps_per_epoch=per_epoch,
            )
            for k in range(wanted if noisy else 1)
        ]

    def _resolve_growth(self, growth: str | KernelGrowth) -> KernelGrowth | None:
        if isinstance(growth, KernelGrowth):
            if self.method != "linear":
                raise ValueError(
                    f'kernel_growth belongs to method="linear" but got method={self.method!r}.'
                )
            return growth
        _check_choice("kernel_growth", growth, ("predicted", "frozen"))
        probe = self.spectrum.probe
        if growth == "frozen" or probe is None or self.method != "linear":
            return None
        return KernelGrowth.from_probe(
            probe.fractions, probe.relative_displacements, probe.kernel_ratios
        )

    def _resolve_target(self, arguments: dict[str, float | None]) -> Target:
        given = {name: value for name, value in arguments.items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                f"Exactly one of {', '.join(arguments)} must be given but got {len(given)}."
            )
        name, value = next(iter(given.items()))
        _check_number(name, value)
        if not self.initial_loss > 0.0:
            raise ValueError(
                "The initial training loss must be positive but got 0: nothing is left to train. "
                "Do data and loss fit the model?"
            )
        if name == "target_epsilon":
            if not 0.0 < value < 1.0:
                raise ValueError(f"target_epsilon must be in (0, 1) but got {value}.")
            return Target("loss" if self.smoothing is None else "smoothed_loss", value, True)
        if "validation" in name and self.method != "linear":
            raise ValueError(f'{name} belongs to method="linear" but got {self.method!r}.')
        if "validation" in name and self._model.validation is None:
            raise ValueError(
                f"{name} needs validation data: FineTuningTask(..., validation_data=...) before "
                "the spectrum is computed, but got a spectrum without."
            )
        if name.endswith("accuracy"):
            return self._accuracy_target(name, value)
        if name == "target_fraction":
            if not 0.0 < value < 1.0:
                raise ValueError(f"target_fraction must be in (0, 1) but got {value}.")
            value *= self.initial_loss
        return self._loss_target(name, float(value))

    def _loss_target(self, name: str, loss: float) -> Target:
        watched = self._model.validation if "validation" in name else self._model
        assert watched is not None
        kind = "validation" if "validation" in name else "training"
        initial = float(watched.loss(watched.initial_outputs[None]))
        if not (math.isfinite(loss) and loss > 0.0):
            raise ValueError(f"{name} must be positive and finite but got {loss}.")
        if loss >= initial:
            raise ValueError(
                f"{name} must be below the initial {kind} loss {initial:.4g} but got "
                f"{loss}: no step would be needed."
            )
        if loss <= watched.loss_floor * (1 + 1e-6):
            raise ValueError(
                f"The target loss must be above {watched.loss_floor:.4g}, the lowest that label "
                f"smoothing and class weights leave possible, but got {loss:.4g}."
            )
        if kind == "validation":
            return Target("validation_loss", loss)
        return Target("loss" if self.smoothing is None else "smoothed_loss", loss)

    def _accuracy_target(self, name: str, accuracy: float) -> Target:
        watched = self._model.validation if "validation" in name else self._model
        assert watched is not None
        kind = "validation" if "validation" in name else "training"
        if not 0.0 < accuracy <= 1.0:
            raise ValueError(f"{name} must be in (0, 1] but got {accuracy}.")
        if watched.labels is None:
            raise ValueError(f"{name} needs classes but the model has one real output.")
        initial = float(watched.accuracy(watched.initial_outputs[None]))
        if accuracy <= initial:
            raise ValueError(
                f"{name} must be above the initial {kind} accuracy {initial:.4g} but "
                f"got {accuracy}: no step would be needed."
            )
        return Target("accuracy" if kind == "training" else "validation_accuracy", float(accuracy))

    def _check_configuration(
        self,
        learning_rate: ArrayLike,
        batch_size: ArrayLike,
        momentum: ArrayLike,
        max_steps: ArrayLike,
    ) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
        rate, size, mass, horizon = _broadcast(
            learning_rate=learning_rate,
            batch_size=batch_size,
            momentum=momentum,
            max_steps=max_steps,
        )
        if rate.size == 0:
            raise ValueError("At least one configuration must be given but got none.")
        _refuse(rate, (rate > 0) & np.isfinite(rate), "learning_rate must be positive and finite")
        n = self.n_samples
        _refuse(
            size,
            (size >= 1) & (size <= n) & (size == np.floor(size)),
            f"batch_size must be a whole number from 1 to the number of samples, {n},",
        )
        _refuse(mass, (mass >= 0) & (mass < 1), "momentum must be in [0, 1)")
        _refuse(
            horizon,
            (horizon >= 1) & (horizon <= 2**53) & (horizon == np.floor(horizon)),
            "max_steps must be a positive integer",
        )
        return rate, size.astype(np.int64), mass, horizon.astype(np.int64)


def _name(observation: Observation) -> tuple[float, ...]:
    """What tells an observation from others, as far as it survives being stored."""
    seen = np.nansum(observation.observed), np.nansum(observation.predicted)
    return (*(round(float(s), 2) for s in seen), observation.n_steps, observation.lag)


def _broadcast(**arguments: ArrayLike) -> tuple[NDArray[np.float64], ...]:
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in arguments.items()}
    try:
        return np.broadcast_arrays(*arrays.values())
    except ValueError as error:
        shapes = ", ".join(f"{name} {a.shape}" for name, a in arrays.items() if a.ndim)
        raise ValueError(
            f"{', '.join(arrays)} must have shapes that go together, one value a configuration, "
            f"but got {shapes}."
        ) from error


def _refuse(values: NDArray[np.float64], good: NDArray[np.bool_], message: str) -> None:
    if not good.all():
        raise ValueError(f"{message} but got {values[~good].flat[0]}.")


def _check_number(name: str, value: Any) -> None:
    if (
        isinstance(value, bool | str)
        or np.ndim(value) != 0
        or not isinstance(value, SupportsFloat)
    ):
        raise TypeError(f"{name} must be a number but got {value!r}.")


def _check_kind(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__} but got {value!r}.")


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be a whole number of at least 0 but got {seed!r}.")


def _check_count(name: str, value: int) -> int:
    if not isinstance(value, bool):
        _check_number(name, value)
    if isinstance(value, bool) or not 1 <= value <= 2**53 or value != int(value):
        raise ValueError(f"{name} must be a positive integer but got {value!r}.")
    return int(value)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)} but got {value!r}.")
    return value


def _check_sgd(
    dampening: float, nesterov: bool, weight_decay: float, spectrum: Spectrum
) -> dict[str, Any]:
    _check_number("dampening", dampening)
    _check_number("weight_decay", weight_decay)
    if not 0.0 <= dampening < 1.0:
        raise ValueError(f"dampening must be in [0, 1) but got {dampening}.")
    if nesterov and dampening:
        raise ValueError(
            f"Nesterov momentum needs zero dampening, as in PyTorch, but got {dampening}."
        )
    if not (math.isfinite(weight_decay) and weight_decay >= 0.0):
        raise ValueError(f"weight_decay must not be negative but got {weight_decay}.")
    if weight_decay and spectrum.weight_outputs is None:
        raise ValueError(
            "weight_decay needs a spectrum that knows what the weights contribute to the outputs "
            "but got one that was computed by an older version. Compute it again."
        )
    return {"dampening": dampening, "nesterov": bool(nesterov), "weight_decay": weight_decay}
