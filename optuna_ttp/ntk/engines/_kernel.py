"""The kernel, which is made of products of Jacobian rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Kernel:
    """Products of the rows of the Jacobian ``J``.

    With learning-rate multipliers ``c`` of the weights, ``Theta = J diag(c) J^T``: SGD on ``w``
    with the learning rates ``c eta`` is SGD on ``w / sqrt(c)`` with the learning rate ``eta``.

    Attributes:
        gram:
            The empirical NTK ``Theta = J J^T``, of shape ``(N C, N C)``, symmetric.
        cross:
            ``J_v J^T`` with the Jacobian of the validation samples, of shape ``(N_v C, N C)``;
            :obj:`None` where the task has none.
        weight_outputs:
            ``J diag(c) w_0`` with the trainable weights ``w_0``, of shape ``(N, C)``.
        stretched:
            ``J diag(c)^2 J^T``, of the shape of ``gram``; :obj:`None` where all multipliers are 1.
    """

    gram: NDArray[np.floating[Any]]
    cross: NDArray[np.floating[Any]] | None
    weight_outputs: NDArray[np.float64]
    stretched: NDArray[np.floating[Any]] | None
