"""The response surface under a schedule of the learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace

import numpy as np

from optuna_ttp._util.arrays import Booleans
from optuna_ttp._util.arrays import Floats
from optuna_ttp.dynamics._schedule import Schedule
from optuna_ttp.dynamics._surface import Correction
from optuna_ttp.dynamics._surface import noise_scale
from optuna_ttp.dynamics._surface import ResponseSurface


@dataclass(frozen=True, eq=False)
class ScheduledSurface:
    """Steps to one target under a schedule, from the surface of constant learning rates.

    Progress is taken to follow the sum of the learning rates so far: the target is reached when
    the sum of the schedule's multipliers is the intrinsic time at constant rates over the learning
    rate. The intrinsic time is that at the mean learning rate up to this step. For Adam, which
    moves by the learning rate in every step, this is close; simulations are exact.
    """

    constant: ResponseSurface
    """The surface of constant learning rates."""
    schedule: Schedule
    """A schedule of multipliers."""
    n_samples: int
    """The number of samples that are trained on."""
    max_steps: int
    """The number of steps up to which the schedule is followed."""
    sums: dict[int, Floats] = field(default_factory=dict)
    """The sums of the multipliers before each step, ``(T + 1,)``, by steps per epoch."""

    @property
    def depths(self) -> Floats:
        """:attr:`ResponseSurface.depths`."""
        return self.constant.depths

    def patience(self, learning_rate: Floats, momentum: Floats) -> Floats:
        """Return :meth:`ResponseSurface.patience`."""
        return self.constant.patience(learning_rate, momentum)

    def retimed(self, correct: Correction) -> ScheduledSurface:
        """Return the schedule on the surface that :meth:`ResponseSurface.retimed` returns."""
        return replace(self, constant=self.constant.retimed(correct))

    def steps(
        self, learning_rate: Floats, batch_size: Floats, momentum: Floats
    ) -> tuple[Floats, Booleans]:
        """Return steps to the target, and a mask of extrapolated ones, both ``(K,)``."""
        mean = self._mean_rates(learning_rate, batch_size, momentum)
        steps, outside = self.constant.steps(mean, batch_size, momentum)
        sums = steps * (mean / learning_rate)
        return np.ceil(self._when(sums[:, None], batch_size)[:, 0] - 1e-9), outside

    def log_first_passage_times(
        self, learning_rate: Floats, batch_size: Floats, momentum: Floats
    ) -> Floats:
        """Return logarithms of the steps at :attr:`depths`, ``(K, P)``; NaN if not reached."""
        mean = self._mean_rates(learning_rate, batch_size, momentum)
        logs = self.constant.log_first_passage_times(mean, batch_size, momentum)
        sums = np.exp(logs) * (mean / learning_rate)[:, None]
        times = self._when(sums, batch_size)
        return np.where(np.isfinite(times), np.log(np.maximum(times, 1e-9)), np.nan)

    def depth_after(
        self, learning_rate: Floats, batch_size: Floats, momentum: Floats, steps: Floats
    ) -> Floats:
        """Return :meth:`ResponseSurface.depth_after` of as much progress, ``(K,)``."""
        sums = self._sums(steps, batch_size)
        mean = learning_rate * np.maximum(sums / np.maximum(steps, 1.0), 1e-12)
        return self.constant.depth_after(mean, batch_size, momentum, steps)

    def _mean_rates(self, learning_rate: Floats, batch_size: Floats, momentum: Floats) -> Floats:
        """Return the mean learning rate of each configuration up to its target, ``(K,)``."""
        steps, _ = self.constant.steps(learning_rate, batch_size, momentum)
        times = self._when(steps[:, None], batch_size)[:, 0]
        times = np.where(np.isfinite(times), np.maximum(times, 1.0), float(self.max_steps))
        share = self._sums(times, batch_size) / times
        return learning_rate * np.maximum(share, 1e-12)

    def _when(self, sums: Floats, batch_size: Floats) -> Floats:
        """Return the steps at which the sums of the multipliers are reached, ``(K, P)``."""
        result = np.full(sums.shape, np.inf)
        for per_epoch, rows in self._by_epoch(batch_size):
            table, wanted = self._table(per_epoch), sums[rows]
            place = np.searchsorted(table, np.nan_to_num(wanted, nan=np.inf))
            after = np.clip(place, 1, len(table) - 1)
            gap = table[after] - table[after - 1]
            with np.errstate(invalid="ignore"):
                share = (wanted - table[after - 1]) / np.where(gap > 0.0, gap, 1.0)
            result[rows] = np.where(place < len(table), after - 1 + share, np.inf)
        return result

    def _sums(self, steps: Floats, batch_size: Floats) -> Floats:
        """Return the sums of the multipliers up to given steps, ``(K,)``."""
        result = np.empty(len(steps))
        for per_epoch, rows in self._by_epoch(batch_size):
            table = self._table(per_epoch)
            result[rows] = np.interp(steps[rows], np.arange(len(table)), table)
        return result

    def _by_epoch(self, batch_size: Floats) -> list[tuple[int, Booleans]]:
        """Return steps per epoch, and the mask of the configurations that have so many."""
        # Batch sizes are those with the same noise among the samples of the surface.
        n = self.n_samples
        noise = noise_scale(batch_size, self.constant.n_samples)
        samples = np.rint(n / (1.0 + noise * (n - 1)))
        per_epoch = np.ceil(n / np.maximum(samples, 1.0)).astype(np.int64)
        return [(int(one), per_epoch == one) for one in np.unique(per_epoch)]

    def _table(self, steps_per_epoch: int) -> Floats:
        """Return the sums of the multipliers before each step, ``(T + 1,)``."""
        if steps_per_epoch not in self.sums:
            rates, _ = self.schedule.values(
                np.ones(1), np.zeros(1), steps_per_epoch, self.max_steps
            )
            self.sums[steps_per_epoch] = np.concatenate([[0.0], np.cumsum(rates[0])])
        return self.sums[steps_per_epoch]
