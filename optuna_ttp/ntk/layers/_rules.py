"""Tuned numbers of the products of rows and of factors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProductRules:
    """Sizes of the pieces in which products of gradients are computed.

    Attributes:
        chunk:
            Number of terms that are summed in the Jacobian's precision. In a longer sum in single
            precision, small terms are rounded away: with 22 million weights every entry of the
            kernel was 0.2 % too small.
        scratch:
            Elements of a temporary tensor, chosen to fit a processor's cache.
        columns:
            Columns of rows that are multiplied at a time, chosen to fit a processor's cache.
        panel:
            Columns of rows that are computed from factors at a time. Not ablated yet.
        n_tiles:
            Tiles into which the rows of a symmetric product are cut. Half of each tile on the
            diagonal is computed in vain.
        min_tile:
            Fewest rows of a tile. Not ablated yet.
        max_tile:
            Most rows of a tile. Not ablated yet.
        gather_cost:
            Time in which one picked entry of a gradient is gathered, in entries of a product of
            matrices.
        gathered:
            Elements that are gathered at a time, chosen to fit a processor's cache.
    """

    chunk: int = 2**14
    scratch: int = 2**20
    columns: int = 2**12
    panel: int = 2**13
    n_tiles: int = 10
    min_tile: int = 64
    max_tile: int = 256
    gather_cost: int = 30
    gathered: int = 2**17


PRODUCTS = ProductRules()
