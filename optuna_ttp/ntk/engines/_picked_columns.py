"""A sample of the Jacobian's columns, the error of its times, and the part of it that is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_ttp.dynamics import PathFollower
from optuna_ttp.ntk.engines._eigenpairs import Eigenpairs
from optuna_ttp.ntk.engines._importance import inclusion_factor
from optuna_ttp.ntk.engines._importance import probabilities
from optuna_ttp.ntk.engines._importance import systematic_sample
from optuna_ttp.ntk.engines._rules import N_GROUPS
from optuna_ttp.ntk.engines._time_error import time_error
from optuna_ttp.ntk.engines._time_error import TimeError
from optuna_ttp.spectrum import LowRankLayer
from optuna_ttp.spectrum import SampledJacobian


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


@dataclass(frozen=True, eq=False)
class PickedColumns:
    """The picked columns of the Jacobian, in the engine's precision, on its device.

    ``columns`` have the shape ``(N C, d)``, and ``validation`` ``(N_v C, d)``, or None without
    validation samples. ``chances`` are ``t s``, ``(d,)``: the probability of a column is the
    smaller one of this and one. ``positions`` are indices within the flattened parameters, whose
    indices among the trainable ones are ``parameters``, both ``(d,)``; ``weights`` are their
    pretrained values. ``weight_outputs`` are ``J diag(c) w_0``, of shape ``(N, C)``. ``low_rank``
    are the layers with low-rank adapters, whose weights are among the picked ones, too.
    """

    columns: torch.Tensor
    validation: torch.Tensor | None
    chances: torch.Tensor
    parameters: torch.Tensor
    positions: torch.Tensor
    weights: torch.Tensor
    weight_outputs: NDArray[np.float64]
    low_rank: tuple[LowRankLayer, ...] = ()

    def error(
        self, follower: PathFollower, features: torch.Tensor, pairs: Eigenpairs
    ) -> TimeError:
        """Estimate the relative error of the times that the sample predicts.

        ``features`` are the columns times the root of their inflation, and ``pairs`` the
        eigenpairs of their products. Halves of the columns, with half the probabilities, have a
        bias that is larger by the ratio of ``sum_j (1 / p_j - 1) |J_j|^2``: the variance of the
        sampled trace is zero for certain columns, which all halves share.
        """
        certain = self.chances >= 1.0
        if bool(certain.all()):
            return TimeError(0.0, 0.0)
        order = torch.cat([certain.nonzero(), (~certain).nonzero()]).flatten()
        n_certain = int(certain.sum())
        rest = order[n_certain:]
        groups = [rest[k::N_GROUPS] for k in range(N_GROUPS)]
        width = max(len(g) for g in groups)
        parts = [features[:, order[:n_certain]]]
        for group in groups:
            part = features.new_zeros((len(features), width))
            part[:, : len(group)] = features[:, group]
            parts.append(part)
        energy = features[:, rest].square().sum(0).double()
        u = self.inflation[rest]
        ratio = float((energy * (u - 1.0)).sum() / (energy * (2.0 * u - 1.0)).sum())
        return time_error(follower, torch.cat(parts, 1), n_certain, pairs, bias_ratio=ratio)

    def thinned(self, n_columns: int, task: FineTuningTask, seed: int) -> SampledJacobian:
        """Return a sample of about ``n_columns`` of the columns, in half precision, to be kept.

        They are picked by mean absolute value, for optimisers that act on single weights. Factors
        of low-rank adapters have no columns in it.
        """
        generator = torch.Generator().manual_seed(seed)
        scores = self.columns.abs().mean(0).double() * self.inflation
        for layer in self.low_rank:
            factors = torch.as_tensor(layer.parameters).to(self.parameters)
            scores[torch.isin(self.parameters, factors)] = 0.0
        factor = inclusion_factor([scores], n_columns)
        share = probabilities(scores, factor)
        some = systematic_sample(share, generator)
        columns = self.columns[:, some]
        scales = columns.abs().amax(0)
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))
        precision = torch.float64 if columns.dtype == torch.float64 else torch.float16

        def codes(values: torch.Tensor) -> NDArray[np.floating[Any]]:
            return np.asarray((values / scales).to(precision).cpu().numpy())

        def array(values: torch.Tensor) -> NDArray[Any]:
            return np.asarray(values.cpu().numpy())

        trainable = [p for p in task.model.parameters() if p.requires_grad]
        return SampledJacobian(
            codes=codes(columns),
            scales=array(scales.float()) if precision == torch.float16 else array(scales),
            inflation=array(self.inflation[some] / share[some].clamp(min=1e-300)),
            weights=array(self.weights[some].double()),
            parameters=array(self.parameters[some]),
            positions=array(self.positions[some]),
            names=tuple(task.multipliers),
            n_weights=np.array([p.numel() for p in trainable]),
            validation=None if self.validation is None else codes(self.validation[:, some]),
        )

    def trace(self) -> tuple[float, float | None]:
        """Return the trace of the kernel, and its standard error relative to the trace.

        The error is that of independent picks, which is larger; None if all columns are certain.
        """
        squares = torch.linalg.vector_norm(self.columns, dim=0).double().square()
        u = self.inflation
        trace = float((u * squares).sum())
        if bool((u == 1.0).all()):
            return trace, None
        return trace, float((u * (u - 1.0) * squares.square()).sum()) ** 0.5 / trace

    @property
    def inflation(self) -> torch.Tensor:
        """One over the probability of each column, ``(d,)``, in double precision."""
        return 1.0 / self.chances.double().clamp(max=1.0)
