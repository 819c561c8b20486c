"""The inputs and output cotangents of a layer with a low-rank adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class LowRankLayer:
    """A layer whose weight is changed by a product ``B A`` of trained factors of rank r.

    Where B is zero, as at the start of training, no output depends on A to first order, so that
    columns of the Jacobian do not tell what A does. Instead the network is linear in the product:
    ``f = f_0 + <G, B A - B_0 A_0>`` with ``G = sum_s d_s x_s^T``, summed over positions s (tokens)
    of the inputs ``x`` of the adapter and of the derivatives ``d`` of an output of the network by
    the adapter's output before it is scaled by ``alpha / r`` (Hu et al., 2021, "LoRA: low-rank
    adaptation of large language models", arXiv 2106.09685), times this scale. Arrays are described
    for N samples, N_v validation samples, C outputs, S positions, k inputs and o outputs of the
    layer.

    Attributes:
        inputs:
            ``x`` over its scale, shape ``(N, S, k)``, in half precision if they were stored in it.
        cotangents:
            ``d`` over its scale, shape ``(N, C, S, o)``, likewise.
        scales:
            The scales of inputs and cotangents, shape ``(2,)``, positive.
        first:
            ``A_0``, the pretrained value of A, shape ``(r, k)``.
        second:
            ``B_0``, shape ``(o, r)``.
        parameters:
            The indices of A and B among the names of the trainable parameters, shape ``(2,)``.
        validation_inputs:
            The inputs of the validation samples, ``(N_v, S_v, k)``, or :obj:`None`.
        validation_cotangents:
            The cotangents of the validation samples, ``(N_v, C, S_v, o)``, or :obj:`None`.
    """

    inputs: NDArray[np.floating[Any]]
    cotangents: NDArray[np.floating[Any]]
    scales: NDArray[np.float64]
    first: NDArray[np.floating[Any]]
    second: NDArray[np.floating[Any]]
    parameters: NDArray[np.int64]
    validation_inputs: NDArray[np.floating[Any]] | None = None
    validation_cotangents: NDArray[np.floating[Any]] | None = None

    def __post_init__(self) -> None:
        if self.first.ndim != 2 or self.second.ndim != 2 or self.inputs.ndim != 3:
            raise ValueError(
                "first, second and inputs must have shapes (r, k), (o, r) and (N, S, k) but got "
                f"{self.first.shape}, {self.second.shape} and {self.inputs.shape}."
            )
        rank, width = self.first.shape
        n_samples, n_positions, _ = self.inputs.shape
        n_classes = self.cotangents.shape[1] if self.cotangents.ndim == 4 else 0
        expected: dict[str, tuple[int, ...]] = {
            "second": (len(self.second), rank),
            "inputs": (n_samples, n_positions, width),
            "cotangents": (n_samples, n_classes, n_positions, len(self.second)),
            "scales": (2,),
            "parameters": (2,),
        }
        if (self.validation_inputs is None) != (self.validation_cotangents is None):
            raise ValueError("Validation inputs and cotangents must be given together or not.")
        if self.validation_inputs is not None:
            held_out = self.validation_inputs.shape[:2]
            expected["validation_inputs"] = (*held_out, width)
            expected["validation_cotangents"] = (
                held_out[0],
                n_classes,
                held_out[1],
                len(self.second),
            )
        for name, shape in expected.items():
            got = getattr(self, name).shape
            if got != shape:
                raise ValueError(f"{name} must have shape {shape} but got {got}.")
        for name in ("inputs", "cotangents", "scales", "first", "second"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} must be finite but got NaN or infinity.")
        if not (self.scales > 0.0).all():
            raise ValueError(f"scales must be positive but got {self.scales.tolist()}.")

    def check(self, n_samples: int, n_outputs: int, n_names: int) -> None:
        """Raise ValueError if the arrays do not fit a spectrum.

        Args:
            n_samples:
                N.
            n_outputs:
                C.
            n_names:
                The number of trainable parameters.
        """
        if self.cotangents.shape[:2] != (n_samples, n_outputs):
            raise ValueError(
                "A layer with an adapter must have cotangents of shape "
                f"({n_samples}, {n_outputs}, S, o) but got {self.cotangents.shape}."
            )
        if not (self.parameters.min() >= 0 and self.parameters.max() < n_names):
            raise ValueError(
                f"The parameters of a layer must be indices of the {n_names} names but got "
                f"{self.parameters.tolist()}."
            )

    @property
    def n_weights(self) -> int:
        """The number of weights of A and B."""
        return int(self.first.size + self.second.size)
