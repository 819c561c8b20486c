"""The slow-down of large steps, which move the outputs less far than linearisation says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers


@dataclass(frozen=True)
class SaturationRules:
    """Tuned numbers by which measured saturation enters simulations.

    They were chosen on the first draw of EfficientNet on both data sets of benchmarks/accuracy.
    """

    lengthening: float = 2.0
    """A step of SGD in training saturates like a first step that is so many times as long. With 1,
    errors of times to absolute targets are 10.5 % by mini-batches and 10.6 % by full batches, with
    2 10.1 and 7.3 %, with 4 9.6 and 10.8 %; without saturation 11.3 and 12.1 %."""
    least_ratio: float = 0.02
    """Smaller and negative ratios are raised to this. Chosen without a measurement."""
    rounding: float = 1e-3
    """A network whose ratios differ from one by no more than this is taken to be linear."""
    smaller: float = 0.1
    """At this times the smallest measured learning rate the ratio's logarithm is this times that
    at the smallest, because it is proportional to the rate where that is small."""


RULES = SaturationRules()


@dataclass(frozen=True, eq=False)
class Saturation:
    """The real over the linear change of the outputs in one step, by learning rate and batch size.

    A large step of many weights moves the outputs less far than the linearised network says. The
    ratio is measured along the first step of the optimiser, and every simulated step moves the
    outputs by the step of the linearised model times the ratio. With Adam, all steps of a learning
    rate have about the same length. Those of SGD have not: :class:`SlowedSteps`.
    """

    rates: Floats
    """Learning rates of the first step, ascending, shape ``(R,)``."""
    ratios: Floats
    """The ratio at these, positive, of shape ``(R,)`` or, by batch size, ``(S, R)``. Its logarithm
    is linear in the logarithms of both in between, and it stays constant beyond the ends."""
    batch_sizes: Floats | None = None
    """Batch sizes, ascending, shape ``(S,)``; None if the ratio does not depend on them."""

    def __post_init__(self) -> None:
        n_sizes = 1 if self.batch_sizes is None else len(self.batch_sizes)
        expected = (n_sizes, len(self.rates))
        if self._table.shape != expected:
            raise ValueError(f"ratios must have shape {expected} but got {self.ratios.shape}.")
        if not (np.isfinite(self.ratios).all() and (self.ratios > 0.0).all()):
            raise ValueError("ratios must be positive and finite.")
        for name in ("rates", "batch_sizes"):
            values = getattr(self, name)
            if values is not None and not (
                len(values) and (values > 0.0).all() and (np.diff(values) > 0.0).all()
            ):
                raise ValueError(f"{name} must be positive and ascending but got {values}.")

    @classmethod
    def from_measurement(
        cls,
        batch_sizes: Integers,
        rates: Floats,
        ratios: Floats,
        *,
        of_sgd: bool = False,
        rules: SaturationRules = RULES,
    ) -> Saturation | None:
        """Return the mean over directions with batch sizes ``(S,)`` and ratios ``(S, P)``.

        ``rates`` are ``(P,)``; see :class:`optuna_ttp.spectrum.Saturation`. Ratios above one count
        as one: that a network moves further in one step does not mean that it trains faster. For
        steps of SGD, ``of_sgd``, the rates are divided by a factor. None if there is no direction,
        or all ratios are one.
        """
        usual = np.clip(ratios, rules.least_ratio, 1.0)
        if not len(usual) or (usual >= 1.0 - rules.rounding).all():
            return None
        unique, owners = np.unique(batch_sizes, return_inverse=True)
        means = np.stack([usual[owners == k].mean(axis=0) for k in range(len(unique))])
        means = np.concatenate([means[:, :1] ** rules.smaller, means], axis=1)
        every = np.append(rules.smaller * rates[0], rates) / (rules.lengthening if of_sgd else 1.0)
        return cls(every, means, unique.astype(np.float64))

    def of_batch_size(self, batch_size: int) -> tuple[Floats, Floats]:
        """Return two or more learning rates and their ratios at a batch size, two 1-D arrays."""
        rates = self.rates if len(self.rates) > 1 else self.rates[0] * np.array([1.0, 2.0])
        return rates, self.at(rates, batch_size)

    def at(self, rate: Floats, batch_size: ArrayLike) -> Floats:
        """Return the ratios at learning rates and batch sizes that are broadcast together."""
        rate, of_batch = np.broadcast_arrays(rate, np.asarray(batch_size, dtype=np.float64))
        with np.errstate(divide="ignore"):
            at, logs = np.log(rate), np.log(self._table)
        by_size = np.stack([np.interp(at, np.log(self.rates), row) for row in logs])
        if self.batch_sizes is None:
            return np.asarray(np.exp(by_size[0]))
        knots = np.log(self.batch_sizes)
        place = np.interp(np.log(of_batch), knots, np.arange(len(knots)))
        low = np.floor(place).astype(np.int64)
        high = np.minimum(low + 1, len(knots) - 1)
        first, then = (np.take_along_axis(by_size, k[None], axis=0)[0] for k in (low, high))
        return np.asarray(np.exp(first + (place - low) * (then - first)))

    @property
    def _table(self) -> Floats:
        """The ratios by batch size and learning rate, ``(S, R)``."""
        return np.atleast_2d(self.ratios)
