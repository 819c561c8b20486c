"""The change of the outputs by products of low-rank adapters, and its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray
import torch

from optuna_ttp.spectrum import LowRankLayer


@dataclass(frozen=True)
class LowRankRules:
    """How products of adapters are computed."""

    most_numbers: int = 2**22
    """Largest number of a layer's changed outputs at once, for all configurations together: 16 MB
    in single precision. Not ablated."""


RULES = LowRankRules()


@dataclass(frozen=True, eq=False)
class AdaptedWeight:
    """A layer whose weight changes by ``B A - B_0 A_0``; see :class:`LowRankLayer`."""

    inputs: torch.Tensor
    """``x``, of shape ``(N, S, k)``."""
    cotangents: torch.Tensor
    """``d``, of shape ``(N, C, S, o)``."""
    first: torch.Tensor
    """``A_0``, of shape ``(r, k)``."""
    second: torch.Tensor
    """``B_0``, of shape ``(o, r)``."""

    @property
    def n_weights(self) -> int:
        """The number p of weights of A and B."""
        return self.first.numel() + self.second.numel()

    def of(self, samples: slice | torch.Tensor) -> AdaptedWeight:
        """Return the layer of some of the samples."""
        return replace(self, inputs=self.inputs[samples], cotangents=self.cotangents[samples])

    def factors(self, change: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A ``(K, r, k)`` and B ``(K, o, r)`` after changes ``(K, p)`` of their weights."""
        moved_first, moved_second = change.split([self.first.numel(), self.second.numel()], dim=1)
        first = self.first + moved_first.unflatten(1, self.first.shape)
        return first, self.second + moved_second.unflatten(1, self.second.shape)

    def output_change(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Return ``sum_s d_s^T (B A - B_0 A_0) x_s`` for A and B of K states, ``(N, C, K)``.

        The layer's own outputs are changed first, ``(K, N S, o)``, and then multiplied with the
        cotangents, once for all K states.
        """
        x = self.inputs.flatten(0, 1)
        moved = torch.bmm(
            (x @ first.flatten(0, 1).T).unflatten(1, first.shape[:2]).transpose(0, 1),
            second.transpose(1, 2),
        )
        if bool(self.second.any()):
            moved = moved - x @ self.first.T @ self.second.T
        by_sample = moved.unflatten(1, self.inputs.shape[:2]).flatten(2)
        return torch.bmm(self.cotangents.flatten(2), by_sample.permute(1, 2, 0))

    def gradient(
        self, first: torch.Tensor, second: torch.Tensor, residuals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients by A and B, by the chain rule through the product.

        ``residuals`` ``(N, K, C)`` are the derivatives of the loss by the network's outputs.
        """
        n_samples, n_positions, _ = self.inputs.shape
        mixed = torch.bmm(residuals, self.cotangents.flatten(2)).transpose(0, 1)
        # The derivative of the loss by the layer's outputs, (K, N S, o).
        by_output = mixed.reshape(-1, n_samples * n_positions, len(self.second))
        x = self.inputs.flatten(0, 1)
        hidden = (x @ first.flatten(0, 1).T).unflatten(1, first.shape[:2]).transpose(0, 1)
        by_hidden = torch.bmm(by_output, second)
        return by_hidden.transpose(1, 2) @ x, torch.bmm(by_output.transpose(1, 2), hidden)

    def parts(self, n_states: int) -> Iterator[tuple[slice, AdaptedWeight]]:
        """Yield ranges of samples that fit the memory, with the layer of these samples."""
        numbers = n_states * self.inputs.shape[1] * len(self.second)
        step = max(1, RULES.most_numbers // max(1, numbers))
        for start in range(0, len(self.inputs), step):
            samples = slice(start, start + step)
            yield samples, self.of(samples)


@dataclass(frozen=True, eq=False)
class LowRankProducts:
    """All layers with adapters; a state has the changes of A and B of each layer in turn."""

    layers: tuple[AdaptedWeight, ...]

    @classmethod
    def of_layers(
        cls,
        layers: Sequence[LowRankLayer],
        *,
        held_out: bool,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> LowRankProducts | None:
        """Return the layers of a spectrum, ``held_out`` for its validation samples, or None."""
        if not layers:
            return None

        def tensor(values: NDArray[Any], scale: float = 1.0) -> torch.Tensor:
            return torch.as_tensor(values).to(device, dtype) * scale

        weights = []
        for layer in layers:
            inputs, cotangents = layer.inputs, layer.cotangents
            if held_out:
                assert layer.validation_inputs is not None
                assert layer.validation_cotangents is not None
                inputs, cotangents = layer.validation_inputs, layer.validation_cotangents
            scales = layer.scales.tolist()
            weights.append(
                AdaptedWeight(
                    tensor(inputs, scales[0]),
                    tensor(cotangents, scales[1]),
                    tensor(layer.first),
                    tensor(layer.second),
                )
            )
        return cls(tuple(weights))

    @property
    def n_weights(self) -> int:
        """The number p of weights of all layers."""
        return sum(layer.n_weights for layer in self.layers)

    @property
    def initial_weights(self) -> torch.Tensor:
        """The pretrained weights, of shape ``(p,)``."""
        return torch.cat([w.flatten() for a in self.layers for w in (a.first, a.second)])

    def of(self, samples: torch.Tensor) -> LowRankProducts:
        """Return the layers of the samples at the given indices."""
        return replace(self, layers=tuple(layer.of(samples) for layer in self.layers))

    def output_changes(self, change: torch.Tensor) -> torch.Tensor:
        """Return the changes of the outputs ``(K, N, C)`` at changes ``(K, p)`` of the weights."""
        n_samples, n_outputs = self.layers[0].cotangents.shape[:2]
        total = change.new_zeros((n_samples, n_outputs, len(change)))
        for layer, one in zip(self.layers, self._split(change), strict=True):
            first, second = layer.factors(one)
            for samples, part in layer.parts(len(change)):
                total[samples] += part.output_change(first, second)
        return total.permute(2, 0, 1)

    def gradient(self, change: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
        """Return the gradient ``(K, p)`` at changes ``(K, p)`` for residuals ``(K, N, C)``."""
        moved = residuals.transpose(0, 1).contiguous()
        gradients = []
        for layer, one in zip(self.layers, self._split(change), strict=True):
            first, second = layer.factors(one)
            sums = [torch.zeros_like(first), torch.zeros_like(second)]
            for samples, part in layer.parts(len(change)):
                for total, new in zip(
                    sums, part.gradient(first, second, moved[samples]), strict=True
                ):
                    total += new
            gradients += [total.flatten(1) for total in sums]
        return torch.cat(gradients, dim=1)

    def first_order(self, change: torch.Tensor) -> torch.Tensor:
        """Return the changes of the outputs ``(K, N, C)`` to first order in ``(K, p)`` changes.

        That is ``<G, dB A_0 + B_0 dA>``: each factor changes alone.
        """
        total = torch.zeros((), dtype=change.dtype, device=change.device)
        for part in (0, 1):
            alone = change * (self._parts == part)
            if part == 1 or any(bool(layer.second.any()) for layer in self.layers):
                total = total + self.output_changes(alone)
        return total

    def gradient_moments(self, residuals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and variance ``(p,)`` over the samples of each sample's gradient.

        They are those of N times the gradients for residuals ``(N, C)``, at the start.
        """
        means, variances = [], []
        for layer in self.layers:
            by_output = torch.einsum("ncso,nc->nso", layer.cotangents, len(residuals) * residuals)
            by_hidden, hidden = by_output @ layer.second, layer.inputs @ layer.first.T
            for left, right in ((by_hidden, layer.inputs), (by_output, hidden)):
                gradients = torch.bmm(left.transpose(1, 2), right).flatten(1)
                means.append(gradients.mean(dim=0))
                variances.append(gradients.var(dim=0, correction=0))
        return torch.cat(means), torch.cat(variances)

    @property
    def _parts(self) -> torch.Tensor:
        """Zero for weights of A and one for those of B, of shape ``(p,)``."""
        return torch.cat(
            [
                torch.full_like(w.flatten(), part)
                for layer in self.layers
                for part, w in enumerate((layer.first, layer.second))
            ]
        )

    def weight_outputs(self) -> torch.Tensor:
        """Return the contribution ``J w_0`` of the pretrained A and B to the outputs, ``(N, C)``.

        It is twice ``<G, B_0 A_0>``, because each factor contributes once.
        """
        weights = self.initial_weights
        if not any(bool(layer.second.any()) for layer in self.layers):
            return weights.new_zeros(self.layers[0].cotangents.shape[:2])
        # With both factors zero, the change is minus <G, B_0 A_0>.
        return -2.0 * self.output_changes(-weights[None])[0]

    def _split(self, change: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the changes ``(K, p_l)`` of each layer's weights."""
        return tuple(torch.split(change, [layer.n_weights for layer in self.layers], dim=1))
