"""The random projection of the paper, for comparison."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from optuna_ttp.ntk.layers._factors import Factors


class Ternary:
    """Entries -1, 0 and +1 with probabilities 1/6, 2/3 and 1/6, scaled by ``sqrt(3 / width)``.

    The projection of the paper (Achlioptas, 2003). It multiplies with a matrix and is slower than
    :class:`SignFold` by orders of magnitude; the matrix is made again, piece by piece, every time.
    """

    _PIECE = 2**12

    def __init__(
        self,
        n_weights: Mapping[str, int],
        width: int,
        n_groups: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._width = width
        self._seeds = [n_groups * seed + group for group in range(n_groups)]
        self._numbers = {name: k for k, name in enumerate(n_weights)}

    def add(self, target: torch.Tensor, name: str, rows: torch.Tensor) -> None:
        """Add rows, see :meth:`Projection.add`."""
        for group, seed in enumerate(self._seeds):
            generator = torch.Generator().manual_seed(
                (seed * 100_003 + self._numbers[name]) % 2**64
            )
            for start in range(0, rows.shape[-1], self._PIECE):
                piece = rows[..., start : start + self._PIECE]
                draws = torch.randint(6, (piece.shape[-1], self._width), generator=generator)
                entries = (draws == 0).to(rows) - (draws == 1).to(rows)
                target[:, :, group] += (3.0 / self._width) ** 0.5 * (piece @ entries)

    def add_table(self, target: torch.Tensor, name: str, factors: Factors) -> None:
        """Add a table, see :meth:`Projection.add_table`."""
        self.add(target, name, factors.rows())
