"""The kernel matrix and other products of Jacobian rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Kernel:
    """Products of the rows of the Jacobian ``J``.

    With learning-rate multipliers ``c`` of the weights, ``gram`` is ``Theta = J diag(c) J^T``, the
    empirical NTK of shape ``(N C, N C)``: SGD on ``w`` with the learning rates ``c eta`` is SGD on
    ``w / sqrt(c)`` with the learning rate ``eta``. ``cross`` is ``J_v diag(c) J^T``, of shape
    ``(N_v C, N C)``, with the Jacobian ``J_v`` of the validation samples (None without any);
    ``weight_outputs`` are ``J diag(c) w_0`` with the trainable weights ``w_0``, of shape ``(N,
    C)``; and ``stretched`` is ``J diag(c)^2 J^T``, None if all multipliers are 1.
    """

    gram: NDArray[np.floating[Any]]
    cross: NDArray[np.floating[Any]] | None
    weight_outputs: NDArray[np.float64]
    stretched: NDArray[np.floating[Any]] | None
