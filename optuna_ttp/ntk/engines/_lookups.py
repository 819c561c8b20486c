"""Gradients of lookup tables that are held until all samples are read, and then picked from."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence

import torch

from optuna_ttp.ntk.engines._importance import Importance
from optuna_ttp.ntk.layers._factors import Factors
from optuna_ttp.ntk.layers._picked import picked_columns


class Lookups:
    """The contributions of all samples to the gradient of one lookup table.

    Which rows of a table count is known only after all samples: most are not looked up at all.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[slice, slice, Factors]] = []

    def add(self, samples: slice, classes: slice, factors: Factors) -> None:
        """Add a contribution of some samples to the gradients of some outputs."""
        self._parts.append((samples, classes, factors))

    @classmethod
    def joined(cls, parts: Sequence[Mapping[str, Lookups]]) -> dict[str, Lookups]:
        """Return contributions by table from those that several processes have read."""
        tables: dict[str, Lookups] = {}
        for part in parts:
            for name, lookups in part.items():
                tables.setdefault(name, cls())._parts.extend(lookups._parts)
        return tables

    @property
    def _used(self) -> torch.Tensor:
        """The rows of the table that are looked up, ascending."""
        rows: torch.Tensor = torch.unique(
            torch.cat([i.flatten() for *_, f in self._parts for i in f.sources])
        )
        return rows

    def importance(self) -> Importance:
        """Return mean squares and absolute values of the columns of all rows that are looked up.

        They are scaled as those of sums of all C outputs with random signs: the mean squares by
        C, the mean absolute values by the root of C.
        """
        used = self._used
        width = self._parts[0][2].shape[2]
        squares, moduli = torch.zeros((2, len(used), width), device=used.device)
        n_samples = max(samples.stop for samples, *_ in self._parts)
        n_outputs = max(classes.stop for _, classes, _ in self._parts)
        for _, _, factors in self._parts:
            rows = torch.unique(torch.cat([i.flatten() for i in factors.sources]))
            place = torch.searchsorted(used, rows)
            units = torch.arange(width, device=used.device)
            picked = (rows[:, None] * width + units).flatten()
            gradient = picked_columns(factors, picked).flatten(0, 1).unflatten(1, (-1, width))
            squares[place] += gradient.square().sum(0).float()
            moduli[place] += gradient.abs().sum(0).float()
        return Importance(
            squares.flatten() / n_samples, moduli.flatten() / (n_samples * n_outputs**0.5)
        )

    def positions(self, picked: torch.Tensor) -> torch.Tensor:
        """Return indices in the flattened table of indices among the rows that are looked up."""
        width = self._parts[0][2].shape[2]
        return self._used[picked // width] * width + picked % width

    def columns(self, positions: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return the columns ``(N, C, m)`` of flattened weights; ``like`` is ``(N, C, ...)``."""
        columns = like.new_zeros((*like.shape[:2], len(positions)))
        for samples, classes, factors in self._parts:
            columns[samples, classes] += picked_columns(factors, positions)
        return columns
