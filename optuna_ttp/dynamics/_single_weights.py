"""The coordinates of a linearised model whose state is the change of single weights."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from optuna_ttp.spectrum import LowRankLayer
from optuna_ttp.spectrum import SampledJacobian


@dataclass(frozen=True, eq=False)
class SingleWeights:
    """The weights that the r coordinates of a state stand for.

    The outputs are ``f_0 + J_S (u delta)`` with the picked columns ``J_S`` of the Jacobian, their
    inflation ``u`` and the changes ``delta`` of the picked weights, which are the state. So the
    derivative of the loss by the state is ``u`` times that by the weight.

    If the spectrum knows ``J w_0``, there is one more coordinate, last, for the weights that were
    not picked. Its column is ``J w_0 - J_S (u w_0)``, its pretrained value is one and its gradient
    zero: only weight decay moves it, and with it the decay of all weights moves the outputs as
    their exact contribution ``J w_0`` says. It is taken to be of the largest parameter.
    """

    inflation: torch.Tensor
    """``u``, shape ``(r,)``; one for the weights that were not picked."""
    parameters: torch.Tensor
    """The index of each weight's parameter in ``names``, shape ``(r,)``."""
    names: tuple[str, ...]
    """The names of the trainable parameters."""
    has_rest: bool
    """True if the last coordinate stands for the weights that were not picked."""

    @classmethod
    def of(
        cls,
        jacobian: SampledJacobian,
        low_rank: Sequence[LowRankLayer] = (),
        *,
        has_rest: bool,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> SingleWeights:
        """Return the coordinates of picked columns, with or without one for the others.

        Those of low-rank adapters come first.
        """
        inflation, parameters = jacobian.inflation, jacobian.parameters
        if has_rest:
            n_weights = jacobian.n_weights.copy()
            for layer in low_rank:
                n_weights[layer.parameters] = 0
            inflation = np.append(inflation, 1.0)
            parameters = np.append(parameters, n_weights.argmax())
        for layer in reversed(low_rank):
            factors = np.repeat(layer.parameters, [layer.first.size, layer.second.size])
            inflation = np.concatenate([np.ones(layer.n_weights), inflation])
            parameters = np.concatenate([factors, parameters])
        return cls(
            torch.as_tensor(inflation).to(device, dtype),
            torch.as_tensor(parameters).to(device),
            jacobian.names,
            has_rest,
        )

    def values(self, by_name: Mapping[str, float], default: float) -> torch.Tensor:
        """Return the value ``(r,)`` of each weight's parameter, or the default if it has none."""
        every = [by_name.get(name, default) for name in self.names]
        return self.inflation.new_tensor(every)[self.parameters]

    def without_rest(self, gradient: torch.Tensor) -> torch.Tensor:
        """Set the gradient ``(K, r)`` of the weights that were not picked to zero, in place."""
        if self.has_rest:
            gradient[:, -1] = 0.0
        return gradient

    def norms(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the norm ``(K, 1)`` of the gradient by all weights, of ``(K, r)`` by the state.

        The norm's square is ``sum_j u_j g_j^2`` over the picked weights, which is unbiased.
        """
        return (gradient.square() @ (1.0 / self.inflation)).sqrt()[:, None]
