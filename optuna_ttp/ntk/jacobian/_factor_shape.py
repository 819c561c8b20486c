"""The shape of the factors of a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace

from optuna_ttp.ntk.layers._factors import Factors


@dataclass(frozen=True)
class FactorShape:
    """The shape of the :class:`Factors` of one sample's gradient of a weight matrix.

    ``groups``, ``width``, ``positions`` and ``n_rows`` are ``G``, ``o``, ``S`` and ``k``;
    ``source_size`` counts the elements of all sources, which are indices with ``is_table``.
    """

    groups: int
    width: int
    positions: int
    n_rows: int
    source_size: int
    is_table: bool
    transposed: bool

    @classmethod
    def of(cls, factors: Factors) -> FactorShape:
        """Return the shape of one sample's part of ``factors``."""
        groups, _, width, positions, n_rows = factors.shape
        return cls(
            groups,
            width,
            positions,
            n_rows,
            sum(s[0].numel() for s in factors.sources),
            factors.expand is None,
            factors.transposed,
        )

    def plus(self, other: FactorShape | None) -> FactorShape | None:
        """Return the shape of merged factors, or :obj:`None` if the two cannot be merged."""
        if other is None or self._layout() != other._layout():
            return None
        return replace(
            self,
            positions=self.positions + other.positions,
            source_size=self.source_size + other.source_size,
        )

    def _layout(self) -> tuple[int, int, int, bool, bool]:
        """Return the sizes that two factors must share to be merged."""
        return self.groups, self.width, self.n_rows, self.is_table, self.transposed
