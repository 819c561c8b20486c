"""The error bar of the times that a sample of columns predicts.

A sample is the mean of four groups of columns, each right in expectation. The three
ways to make two halves of them give three differences, which are uncorrelated and whose halves
have the variance of the whole (balanced repeated replication: McCarthy, "Pseudo-replication: half
samples", Review of the International Statistical Institute 37, 1969). The bias of the times is
inversely proportional to the number of columns, so that the halves have a larger bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch

from optuna_ttp.dynamics import PathFollower
from optuna_ttp.dynamics import times_to
from optuna_ttp.ntk.engines._eigenpairs import Eigenpairs
from optuna_ttp.ntk.engines._rules import ERRORS
from optuna_ttp.ntk.engines._rules import N_GROUPS


@dataclass(frozen=True)
class TimeError:
    """Relative errors of the times to half, a quarter and a tenth of the reducible loss.

    ``expected`` is the largest standard error or bias of the three times; ``bar`` is the largest
    half-width of an interval that contains 90 % of the errors.
    """

    expected: float
    bar: float


def time_error(
    follower: PathFollower,
    features: torch.Tensor,
    n_exact: int,
    pairs: Eigenpairs,
    *,
    bias_ratio: float,
) -> TimeError:
    """Estimate the relative error of the times that a sample of columns predicts.

    ``features`` are ``Z`` of shape ``(N C, e + d)``: ``e = n_exact`` certain columns, then four
    groups of ``d / 4``; ``pairs`` are the eigenpairs of ``Z Z^T``, of which the leading ones, at
    least 200, are used. If training does not reach half of the loss, the times are those to shares
    of the reduction that it reaches; the error is infinite if there is no such time.
    ``bias_ratio`` is the bias of the whole over that of a half.
    """
    rank = min(len(pairs.eigenvalues), max(ERRORS.min_rank, ERRORS.n_entries // len(features)))
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
        # Groups are scaled for a mean of four, so that a half counts twice.
        inner = squares[0] + 2.0 * sum(squares[1 + k] for k in chosen)
        eigenvalues, mixing = torch.linalg.eigh(inner)
        halves.append(follower.follow(basis, mixing.flip(1), eigenvalues.flip(0)))
    times = times_to([whole, *halves])
    if times.shape[1] == 0:
        return TimeError(float("inf"), float("inf"))
    together, parts = times[0], times[1:]
    # Pairs of halves without a common group are the first and the last, and so on inwards.
    differences = (parts[:3] - parts[:2:-1]) / 2.0
    chance = np.sqrt(np.square(differences).mean(axis=0)) / together
    excess = bias_ratio / (1.0 - bias_ratio)
    on_average = excess * np.abs(parts.mean(axis=0) - together) / together
    return TimeError(
        float(np.maximum(chance, on_average).max()),
        float((ERRORS.error_quantile * chance + on_average).max()),
    )
