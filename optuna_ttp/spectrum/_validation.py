"""The arrays of the validation samples in a spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Validation:
    """The arrays that predict the linearised network's outputs on N_v validation samples.

    Attributes:
        features:
            ``J_v J^T V Lambda^(-1/2)`` with the Jacobian ``J_v`` of the validation samples: the
            cross kernel in the coordinates of the r eigenpairs; shape ``(N_v C, r)``.
        initial_outputs:
            Outputs of the pretrained model, shape ``(N_v, C)``.
        targets:
            Class indices of shape ``(N_v,)``, or real targets of shape ``(N_v, C)``.
    """

    features: NDArray[np.floating[Any]]
    initial_outputs: NDArray[np.float64]
    targets: NDArray[Any]
