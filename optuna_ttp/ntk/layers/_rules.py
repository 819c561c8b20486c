"""Tuned numbers of the products that rows and factors are made by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProductRules:
    """How large the pieces are in which products of gradients are made.

    Attributes:
        chunk:
            Terms that are summed in the Jacobian's own precision. In single precision the many
            small products would drown in the sum of those before them: with 22 million weights
            that took 0.2 % from every entry of the kernel.
        scratch:
            Elements of what is made on the way: about what a processor's cache holds.
        columns:
            Columns of rows that are multiplied at a time: what the processor's cache holds of
            many rows.
        panel:
            Columns of rows that are made of factors at a time. Not ablated yet.
        n_tiles:
            Pieces of the triangle of a symmetric product, of which half a piece each is wasted.
        min_tile:
            Fewest rows of such a piece. Not ablated yet.
        max_tile:
            Most rows of such a piece. Not ablated yet.
    """

    chunk: int = 2**14
    scratch: int = 2**20
    columns: int = 2**12
    panel: int = 2**13
    n_tiles: int = 10
    min_tile: int = 64
    max_tile: int = 256


PRODUCTS = ProductRules()
