"""The result and the cost of a search of the demo."""

from __future__ import annotations

from dataclasses import dataclass
import math

import optuna

from optuna_ttp.reporting import report
from optuna_ttp.study import Action
from optuna_ttp.study import best_over_time


@dataclass(frozen=True, eq=False)
class Search:
    """A finished search.

    Attributes:
        name: The name that is printed.
        study: The Optuna study.
        head_start: Seconds spent before the first trial.
        seconds: Seconds that the search took, including the head start.
        budget: Seconds that the search was given.
    """

    name: str
    study: optuna.Study
    head_start: float
    seconds: float
    budget: float

    @property
    def best(self) -> tuple[float, float]:
        """The best value within the budget and the seconds until it was found; NaN if none."""
        times, values = best_over_time(self.study, head_start=self.head_start)
        within = [(v, t) for t, v in zip(times, values, strict=True) if t <= self.budget]
        return within[-1] if within else (math.nan, math.nan)

    def seconds_to(self, value: float) -> float:
        """Return the seconds until a value of at most ``value`` was found, NaN if none was."""
        times, values = best_over_time(self.study, head_start=self.head_start)
        return next((t for t, v in zip(times, values, strict=True) if v <= value), math.nan)

    @property
    def n_reached(self) -> int:
        """The number of trials that reached the target."""
        return sum(record.state == "COMPLETE" for record in report(self.study).records)

    @property
    def wasted_seconds(self) -> float:
        """Seconds spent on trials that did not reach the target, including skipped ones."""
        return sum(
            record.paid_seconds
            for record in report(self.study).records
            if record.state != "COMPLETE" and math.isfinite(record.paid_seconds)
        )

    @property
    def n_trained(self) -> int:
        """The number of trials that took at least one step."""
        return sum(record.decision != Action.SKIP for record in report(self.study).records)
