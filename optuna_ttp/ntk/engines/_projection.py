"""Random projections of Jacobian rows that keep inner products in expectation."""

from __future__ import annotations

from typing import Protocol

import torch

from optuna_ttp.ntk.layers._factors import Factors


class Projection(Protocol):
    """Maps rows of ``p`` weights of a parameter to ``width`` numbers, by G independent maps."""

    def add(self, target: torch.Tensor, name: str, rows: torch.Tensor) -> None:
        """Add the projected rows ``(B, C, p)`` of a parameter to ``(B, C, G, width)``."""

    def add_table(self, target: torch.Tensor, name: str, factors: Factors) -> None:
        """Add the projected gradient of a table that integers index to ``(B, C, G, width)``."""


class SignFold:
    """Random signs, then a fold: weight ``j`` is added to number ``(j + shift) mod width``.

    It is a count sketch (Charikar, Chen and Farach-Colton, 2002) with regular instead of random
    buckets; the random signs keep inner products right in expectation. All groups have the same
    buckets, so that the rows are read once, but different signs, so that their errors are
    uncorrelated.
    """

    def __init__(
        self,
        n_weights: dict[str, int],
        width: int,
        n_groups: int,
        seed: int,
        device: torch.device,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._width = width
        self._signs: dict[str, torch.Tensor] = {}
        self._shifts: dict[str, int] = {}
        for name, n in n_weights.items():
            signs = torch.randint(2, (n_groups, n), generator=generator, dtype=torch.int8)
            # A sign takes one byte; add() converts those of one parameter to floats.
            self._signs[name] = (2 * signs - 1).to(device)
            self._shifts[name] = int(torch.randint(width, (), generator=generator))

    def add(self, target: torch.Tensor, name: str, rows: torch.Tensor) -> None:
        """Add projected rows, see :meth:`Projection.add`."""
        shift, width = self._shifts[name], self._width
        signs = self._signs[name].to(rows.dtype)
        n = rows.shape[-1]
        rows = rows[:, :, None]
        first = min(n, width - shift)
        target[..., shift : shift + first].addcmul_(rows[..., :first], signs[:, :first])
        for start in range(first, n, width):
            some = slice(start, min(start + width, n))
            target[..., : some.stop - start].addcmul_(rows[..., some], signs[:, some])

    def add_table(self, target: torch.Tensor, name: str, factors: Factors) -> None:
        """Add the projected gradient of a lookup table to ``target`` ``(B, C, G, width)``."""
        columns = factors.shape[2]
        signs = self._signs[name].unflatten(1, (-1, columns))
        within = torch.arange(columns, device=target.device)
        for ids, cotangents in zip(factors.sources, factors.cotangents, strict=True):
            where = (ids[..., None] * columns + within + self._shifts[name]) % self._width
            for group, of_group in enumerate(signs):
                # (B, C, S, o)
                values = cotangents[:, 0].transpose(2, 3) * of_group[ids][:, None]
                index = where.flatten(1)[:, None].expand(-1, values.shape[1], -1)
                target[:, :, group].scatter_add_(2, index, values.flatten(2))
