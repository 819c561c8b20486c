"""Tuned numbers of how gradients are checked, and of how their parts of the Jacobian are held."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field

import torch


@dataclass(frozen=True)
class CheckRules:
    """On how many samples, and how strictly, gradients are compared with plain reverse mode.

    Attributes:
        n_claim_samples:
            Samples on which gradients of layers are compared with those of the whole network.
            Not ablated yet.
        n_single_samples:
            Samples, evenly spread, whose outputs in a batch are compared with those alone. Not
            ablated yet.
        max_lifts:
            Modules around a layer that are tried; few networks are nested so deeply.
        claim_tolerances:
            By precision, the relative deviation of a parameter's gradient that is rounding, and
            the same of all gradients together: some gradients are zero but for rounding.
        product_tolerances:
            By precision, the deviation of ``u . (J w)`` from ``(J^T u) . w``, which are the same
            number, relative to the norms of both.
        kernel_tolerances:
            By precision, the deviation of an entry of the kernel relative to the norms of both
            rows. In a batch of another size units are rounded to the other side of a kink, and
            models that cast to half precision inside round differently.
        roundings:
            Roundings of a cotangent that counts as a product of a channel's weight and a pattern,
            relative to the largest cotangent of the same output: those of few operations.
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
    """What decides how a parameter's part of the Jacobian is held.

    Attributes:
        ghost_overhead:
            How much longer the ghost form takes for a flop than one large matrix product, because
            it moves more memory. Not ablated yet.
        triangle:
            The share of all pairs of rows that is multiplied where the product is symmetric: the
            block-lower triangle.
        n_alone:
            Weights from which on a parameter's rows are not held together with those of others.
            Not ablated yet.
        direction_batch:
            Samples that go through the network together for products with one direction. Not
            ablated yet.
    """

    ghost_overhead: float = 1.4
    triangle: float = 0.53
    n_alone: int = 2048
    direction_batch: int = 32


CHECKS = CheckRules()
LAYOUTS = LayoutRules()
