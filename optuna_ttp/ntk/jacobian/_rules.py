"""Tuned numbers of the checks of gradients, and of the storage of the Jacobian."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field

import torch


@dataclass(frozen=True)
class CheckRules:
    """Numbers of samples and tolerances for comparing gradients with plain reverse mode.

    Attributes:
        n_claim_samples:
            Samples on which gradients of layers are compared with those of the whole network.
            Not ablated yet.
        n_single_samples:
            Samples, evenly spread, whose outputs in a batch are compared with their outputs alone.
            Not ablated yet.
        max_lifts:
            How often modules further out are chosen before an error; few networks are as deep.
        claim_tolerances:
            By precision, the largest deviation of a parameter's gradient relative to its norm, and
            relative to that of all gradients, for gradients that are zero but for rounding.
        product_tolerances:
            By precision, the largest relative difference of ``u . (J w)`` and ``(J^T u) . w``,
            which are equal but for rounding.
        kernel_tolerances:
            By precision, the largest deviation of an entry of the kernel relative to the norms of
            both rows. Batches of other sizes round some units to the other side of a kink, and
            models that cast to half precision inside round differently.
        roundings:
            Largest deviation of cotangents from products of a channel's weight and a pattern, in
            units of the rounding error of the largest cotangent of the same output.
    """

    n_claim_samples: int = 3
    n_single_samples: int = 8
    max_lifts: int = 20
    claim_tolerances: Mapping[torch.dtype, tuple[float, float]] = field(
        default_factory=lambda: {torch.float32: (2e-3, 2e-6), torch.float64: (1e-8, 1e-12)}
    )
    product_tolerances: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {torch.float32: 1e-3, torch.float64: 1e-8}
    )
    kernel_tolerances: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {
            torch.float32: 5e-3,
            torch.float64: 1e-6,
            torch.bfloat16: 2e-2,
        }
    )
    roundings: int = 64


@dataclass(frozen=True)
class LayoutRules:
    """Numbers that decide how a parameter's part of the Jacobian is stored.

    Attributes:
        ghost_overhead:
            Time of a flop of the ghost form over that of a flop of one large matrix product. It is
            longer because more memory is moved. Not ablated yet.
        triangle:
            The share of all pairs of rows that is multiplied in a symmetric product: the lower
            triangle in tiles.
        n_alone:
            Fewest weights of a parameter whose rows have a tensor of their own. Not ablated yet.
        direction_batch:
            Batch size for products with directions of the weights. Not ablated yet.
    """

    ghost_overhead: float = 1.4
    triangle: float = 0.53
    n_alone: int = 2048
    direction_batch: int = 32


CHECKS = CheckRules()
LAYOUTS = LayoutRules()
