"""The mini-batches of simulated training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from optuna_ttp.dynamics._linearised_model import LinearisedModel
from optuna_ttp.dynamics._sampling import Sampling


@dataclass(frozen=True, eq=False)
class Batch:
    """The samples of one step: B samples, or several mini-batches of B samples in a row."""

    features: torch.Tensor
    """``Psi`` of the samples, ``(B C, r)``."""
    initial_outputs: torch.Tensor
    """``f_0`` of the samples, ``(B C,)``."""
    soft_targets: torch.Tensor
    """Shape ``(B, C)``."""
    normalisers: torch.Tensor
    """Shape ``(B,)``."""
    shares: torch.Tensor | None = None
    """With several mini-batches, the factor ``(B,)`` on the loss of each sample that makes the
    mean over all samples the mean of the mini-batches' means."""

    def losses(self, model: LinearisedModel, outputs: torch.Tensor) -> torch.Tensor:
        """Return the mean loss ``(K,)`` for outputs ``(K, B, C)``."""
        if self.shares is None:
            return model.batch_loss(outputs, self.soft_targets, self.normalisers)
        single = model.sample_losses(outputs, self.soft_targets)
        return (single @ self.shares) / self.normalisers.sum()

    def residuals(self, model: LinearisedModel, outputs: torch.Tensor) -> torch.Tensor:
        """Return the gradient ``(K, B, C)`` of the mean loss by outputs ``(K, B, C)``."""
        residuals = model.residuals(outputs, self.soft_targets, self.normalisers)
        return residuals if self.shares is None else residuals * self.shares[:, None]


def batches(
    model: LinearisedModel,
    batch_size: int,
    sampling: Sampling,
    seed: int,
    *,
    accumulation_steps: int = 1,
    across_epochs: bool = False,
) -> Iterator[Batch]:
    """Yield the batches of single steps without end.

    An epoch may end with a smaller batch, and with fewer mini-batches than are accumulated, as in
    training; with ``across_epochs``, for coarse steps, the last batch is filled up with samples of
    the next epoch instead.
    """
    n_samples, _, rank = model.features.shape
    whole = [model.features, model.initial_outputs, model.soft_targets, model.normalisers]
    generator = torch.Generator().manual_seed(seed)
    rest = [a[:0] for a in whole]
    n_together = batch_size * accumulation_steps
    while True:
        epoch = whole
        if batch_size < n_samples or sampling == "replacement":
            if sampling == "shuffle":
                order = torch.randperm(n_samples, generator=generator)
            else:
                order = torch.randint(n_samples, (n_samples,), generator=generator)
            epoch = [a[order.to(a.device)] for a in whole]
            if len(rest[0]):
                epoch = [torch.cat(pair) for pair in zip(rest, epoch, strict=True)]
        n_used = len(epoch[0])
        if across_epochs:
            n_used -= n_used % n_together
        for start in range(0, n_used, n_together):
            psi, offset, soft_targets, normalisers = (
                a[start : min(start + n_together, n_used)] for a in epoch
            )
            shares = None
            if accumulation_steps > 1:
                shares = _shares(normalisers, batch_size)
            yield Batch(
                psi.reshape(-1, rank), offset.reshape(-1), soft_targets, normalisers, shares
            )
        rest = [a[n_used:] for a in epoch]


def _shares(normalisers: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Return :attr:`Batch.shares` of mini-batches of ``batch_size`` samples, the last smaller."""
    parts = normalisers.split(batch_size)
    total = normalisers.sum() / len(parts)
    return torch.cat([(total / part.sum()).expand(len(part)) for part in parts])
