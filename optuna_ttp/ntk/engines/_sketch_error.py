"""How far the times that a sketch predicts may be off: its error bar.

A sketch is the mean of four independent groups of columns, each right in expectation. The three
ways to make two halves of them give three differences, which are uncorrelated and whose halves
have the variance of the whole (balanced repeated replication: McCarthy, "Pseudo-replication: half
samples", Review of the International Statistical Institute 37, 1969). What the projection does to
times on average falls with the width, so that the halves have twice as much of it as the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch

from optuna_ttp.dynamics import PathFollower
from optuna_ttp.dynamics import times_to
from optuna_ttp.ntk.engines._eigenpairs import Eigenpairs
from optuna_ttp.ntk.engines._rules import N_GROUPS
from optuna_ttp.ntk.engines._rules import SKETCHES


@dataclass(frozen=True)
class SketchError:
    """Relative errors of the times to half, a quarter and a tenth of the reducible loss.

    For the largest of the three, ``expected`` is the standard error, or what the projection does
    on average, and ``bar`` is what nine errors in ten are within.
    """

    expected: float
    bar: float


def sketch_error(
    follower: PathFollower, features: torch.Tensor, n_exact: int, pairs: Eigenpairs
) -> SketchError:
    """Estimate by how much the times that a sketch predicts may be off.

    ``features`` are ``Z`` of shape ``(N C, e + d)``: ``e = n_exact`` exact columns, then four
    groups of ``d / 4``; ``pairs`` are the eigenpairs of ``Z Z^T``, as many as there are or at
    least 200 and as many as have a million entries. Where training does not get to half of the
    loss, the times are those to shares of what it gets to; the error is infinite where no time is
    known.
    """
    rank = min(len(pairs.eigenvalues), max(SKETCHES.min_rank, SKETCHES.n_entries // len(features)))
    basis = torch.as_tensor(pairs.eigenvectors[:, :rank])
    values = torch.as_tensor(pairs.eigenvalues[:rank])
    inside = torch.cat(
        [basis[:, k : k + 256].to(features).T @ features for k in range(0, rank, 256)]
    )
    exact, *groups = inside.split(
        [n_exact, *[(inside.shape[1] - n_exact) // N_GROUPS] * N_GROUPS], 1
    )
    whole = follower.follow(basis, torch.eye(rank, dtype=basis.dtype), values)
    squares = [(g @ g.T).double().cpu() for g in (exact, *groups)]
    halves = []
    for chosen in combinations(range(N_GROUPS), N_GROUPS // 2):
        # Groups are scaled for a mean of four.
        inner = squares[0] + 2.0 * sum(squares[1 + k] for k in chosen)
        eigenvalues, mixing = torch.linalg.eigh(inner)
        halves.append(follower.follow(basis, mixing.flip(1), eigenvalues.flip(0)))
    times = times_to([whole, *halves])
    if times.shape[1] == 0:
        return SketchError(float("inf"), float("inf"))
    together, parts = times[0], times[1:]
    # Pairs of halves without a common group are the first and the last, and so on inwards.
    differences = (parts[:3] - parts[:2:-1]) / 2.0
    chance = np.sqrt(np.square(differences).mean(axis=0)) / together
    on_average = np.abs(parts.mean(axis=0) - together) / together
    return SketchError(
        float(np.maximum(chance, on_average).max()),
        float((SKETCHES.error_quantile * chance + on_average).max()),
    )
