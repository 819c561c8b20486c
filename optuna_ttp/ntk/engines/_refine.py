"""Refining the leading eigenpairs of a sketch by two more passes over the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from optuna_ttp.ntk._settings import EngineSettings
from optuna_ttp.ntk.engines._eigenpairs import Eigenpairs
from optuna_ttp.ntk.engines._nystrom import nystrom
from optuna_ttp.ntk.engines._sketch import Passes
from optuna_ttp.ntk.jacobian._prepare import lifting


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask


def refine(
    task: FineTuningTask,
    features: torch.Tensor,
    pairs: Eigenpairs,
    settings: EngineSettings,
    *,
    n_refined: int,
    others: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Replace the leading part of a sketch ``Z``, ``(N C, d)``, by products with the Jacobian.

    For the leading ``n_refined`` eigenvectors ``V`` of the sketch, ``Theta V = J (J^T V)`` is
    computed in two more passes over the data (more if ``J^T V`` exceeds the memory budget), and
    the sketch is replaced in their space by ``Theta V (V^T Theta V)^(-1) (Theta V)^T`` (Nystrom's
    method, stabilised as in Tropp, Yurtsever, Udell and Cevher, NeurIPS 2017, arXiv 1706.05736).

    Returns features ``Z'``, with one column more per refined pair, whose products ``Z' Z'^T`` are
    the refined kernel, and likewise those of the validation samples, whose sketch is ``others``
    (None without it): ``J_v (J^T V)`` extends the leading part to them.
    """
    n = min(n_refined, len(pairs.eigenvalues))
    vectors = torch.as_tensor(pairs.eigenvectors[:, :n], **settings.place)

    def run(lifts: Mapping[str, int]) -> tuple[torch.Tensor, ...]:
        with Passes(task, settings, lifts) as passes:
            return passes.images(vectors, others=others is not None)

    images, *images_of_others = lifting(run)
    basis, values, weights = nystrom(vectors.double().cpu(), images)
    roots = values.sqrt().to(features)
    basis = basis.to(features)
    explained = basis.T @ features
    refined = torch.cat([basis * roots, features - basis @ explained], 1)
    if others is None:
        return refined, None
    extended = (images_of_others[0] @ weights).to(features)
    return refined, torch.cat([extended * roots, others - extended @ explained], 1)
