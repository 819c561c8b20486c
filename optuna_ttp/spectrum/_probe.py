"""How far the network is from its linearisation along the path of the linearised training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Probe:
    """Measurements of the network at P points of the linearised path, without a training step.

    :func:`optuna_ttp.ntk.probe_linearisation` makes them. All arrays have shape ``(P,)``.

    Attributes:
        fractions:
            Training loss of the linearised network divided by its initial loss, descending from 1.
        relative_displacements:
            ``|w - w_0| / |w_0|`` of the weight matrix for which it is largest, usually that of
            the new head; infinite if a matrix starts at zero.
        output_deviations:
            ``|f(w) - f_lin| / |f_lin - f_0|``, with the network's outputs ``f(w)`` at the
            displaced weights, the linearised outputs ``f_lin`` and the initial outputs ``f_0``.
        kernel_ratios:
            ``|J(w)^T u|^2 / |J(w_0)^T u|^2``: how much larger the kernel is at the displaced
            weights along the gradient ``u`` of the loss with respect to the linearised outputs.
    """

    fractions: NDArray[np.float64]
    relative_displacements: NDArray[np.float64]
    output_deviations: NDArray[np.float64]
    kernel_ratios: NDArray[np.float64]
