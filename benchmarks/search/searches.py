"""Searches as they are read from a folder."""

from __future__ import annotations

from collections.abc import Callable
import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.search.contestants import STANDARD


_NUMBERS = {
    "workers": int,
    "seed": int,
    "trials": int,
    "pruned": int,
    "pruned_before_training": int,
    "winners": int,
    "wrongly_pruned": int,
}
_NAMES = ("task", "goal", "contestant")


@dataclass(frozen=True, eq=False)
class Searches:
    """The searches of one goal with one number of workers.

    Attributes:
        rows:
            Of ``searches.csv``.
    """

    rows: list[dict[str, Any]]

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, sorted."""
        return sorted({row["task"] for row in self.rows})

    @property
    def contestants(self) -> list[str]:
        """Names of the contestants, sorted."""
        return sorted({row["contestant"] for row in self.rows})

    def of(self, contestant: str, task: str | None = None) -> list[dict[str, Any]]:
        """Return the rows of a contestant.

        Args:
            contestant:
                Its name.
            task:
                On this task. On all by default.

        Returns:
            The rows.
        """
        return [
            row
            for row in self.rows
            if row["contestant"] == contestant and task in (None, row["task"])
        ]

    def seconds(self, contestant: str, task: str) -> NDArray[np.float64]:
        """Return the seconds to come close to the grid's best, at most the budget.

        Args:
            contestant:
                Its name.
            task:
                Name of the task.

        Returns:
            A value a seed.
        """
        return np.array(
            [min(r["seconds_to_close"], r["budget_seconds"]) for r in self.of(contestant, task)]
        )

    def oracle(self, task: str) -> float:
        """Return the seconds of the oracle.

        Args:
            task:
                Name of the task.

        Returns:
            The seconds.
        """
        return float(next(r["oracle_seconds"] for r in self.rows if r["task"] == task))

    def without_setup(self) -> Searches:
        """Return the searches as if nothing had been charged before their first trials."""
        return self._with(lambda r: r["seconds_to_close"] - r["setup_seconds"])

    def with_best_choice(self, contestant: str) -> Searches:
        """Return the searches as if a contestant's first trial had been the oracle's.

        Args:
            contestant:
                Its name.
        """
        return self._with(
            lambda r: (
                r["setup_seconds"] + r["oracle_seconds"]
                if r["contestant"] == contestant
                else r["seconds_to_close"]
            )
        )

    def _with(self, seconds: Callable[[dict[str, Any]], float]) -> Searches:
        return Searches([{**r, "seconds_to_close": seconds(r)} for r in self.rows])

    def best_pair(self, task: str) -> str:
        """Return the standard sampler and pruner that were fastest on a task, in hindsight.

        Args:
            task:
                Name of the task.

        Returns:
            The contestant's name.
        """
        present = set(self.contestants)
        pairs = [name for name in STANDARD if name in present]
        return min(pairs, key=lambda name: float(np.median(self.seconds(name, task))))


def read(folder: Path) -> tuple[list[dict[str, Any]], list[NDArray[np.float64]]]:
    """Read searches.

    Args:
        folder:
            Of ``searches.csv`` and ``regrets.npz``.

    Returns:
        A row a search, numbers as numbers, and their regrets.
    """
    with (folder / "searches.csv").open(newline="") as file:
        rows = [
            {
                key: value if key in _NAMES else _NUMBERS.get(key, float)(value)
                for key, value in row.items()
            }
            for row in csv.DictReader(file)
        ]
    with np.load(folder / "regrets.npz") as archive:
        return rows, list(archive["regrets"].astype(np.float64))


def by_goal(rows: list[dict[str, Any]]) -> list[tuple[str, int, Searches]]:
    """Return goal, number of workers, and their searches, for each pair of the first two."""
    keys = sorted({(row["goal"], row["workers"]) for row in rows})
    return [
        (
            goal,
            workers,
            Searches([r for r in rows if (r["goal"], r["workers"]) == (goal, workers)]),
        )
        for goal, workers in keys
    ]
