"""The mini-batches of simulated training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from optuna_ttp.dynamics._linearised_model import LinearisedModel
from optuna_ttp.dynamics._low_rank_products import LowRankProducts
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
    low_rank: LowRankProducts | None = None
    """Low-rank adapters, of the samples."""

    def outputs(self, theta: torch.Tensor) -> torch.Tensor:
        """Return the outputs ``(K, B, C)`` at K states ``theta`` of shape ``(K, r)``."""
        n_products = 0 if self.low_rank is None else self.low_rank.n_weights
        flat = self.initial_outputs + theta[:, n_products:] @ self.features.T
        outputs = flat.reshape(len(theta), len(self.normalisers), -1)
        if self.low_rank is not None:
            outputs += self.low_rank.output_changes(theta[:, :n_products])
        return outputs

    def gradient(self, theta: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
        """Return the gradient ``(K, r)`` by ``theta`` for that by the outputs, ``(K, B, C)``."""
        gradient = residuals.reshape(len(residuals), -1) @ self.features
        if self.low_rank is None:
            return gradient
        of_products = self.low_rank.gradient(theta[:, : self.low_rank.n_weights], residuals)
        return torch.cat([of_products, gradient], dim=1)

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
    n_samples = model.n_samples
    generator = torch.Generator().manual_seed(seed)
    n_together = batch_size * accumulation_steps
    rest = torch.arange(0)
    drawn = _Drawn(model)
    while True:
        if batch_size >= n_samples and sampling == "shuffle":
            order = torch.arange(n_samples)
        elif sampling == "shuffle":
            order = torch.cat([rest, torch.randperm(n_samples, generator=generator)])
        else:
            draws = torch.randint(n_samples, (n_samples,), generator=generator)
            order = torch.cat([rest, draws])
        n_used = len(order)
        if across_epochs:
            n_used -= n_used % n_together
        for start in range(0, n_used, n_together):
            stop = min(start + n_together, n_used)
            samples = order[start:stop]
            psi, offset, soft_targets, normalisers = drawn.at(start, samples)
            shares = None
            if accumulation_steps > 1:
                shares = _shares(normalisers, batch_size)
            low_rank = None if model.low_rank is None else model.low_rank.of(samples)
            yield Batch(
                psi.flatten(0, 1), offset.reshape(-1), soft_targets, normalisers, shares, low_rank
            )
        rest = order[n_used:]


class _Drawn:
    """Gathers samples of a model, always into the same memory, which is faster."""

    def __init__(self, model: LinearisedModel) -> None:
        self._whole = (
            model.features,
            model.initial_outputs,
            model.soft_targets,
            model.normalisers,
        )
        self._memory = model.features[:0]

    def at(self, start: int, samples: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return features, initial outputs, soft targets and normalisers of some samples.

        ``start`` is their place in the epoch, at which the features are put in the memory.
        """
        n_samples = len(self._whole[0])
        if len(samples) == n_samples and bool((samples == torch.arange(n_samples)).all()):
            return self._whole
        stop = start + len(samples)
        if stop > len(self._memory):
            shape = max(stop, n_samples), *self._memory.shape[1:]
            self._memory = self._whole[0].new_empty(shape)
        samples = samples.to(self._memory.device)
        features = self._memory[start:stop]
        torch.index_select(self._whole[0], 0, samples, out=features)
        return (features, *(a.index_select(0, samples) for a in self._whole[1:]))


def _shares(normalisers: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Return :attr:`Batch.shares` of mini-batches of ``batch_size`` samples, the last smaller."""
    parts = normalisers.split(batch_size)
    total = normalisers.sum() / len(parts)
    return torch.cat([(total / part.sum()).expand(len(part)) for part in parts])
