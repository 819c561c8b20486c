"""The network, linearised at its pretrained weights, on the kept eigen-directions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from optuna_ttp.spectrum import Spectrum


@dataclass(frozen=True, eq=False)
class LinearisedModel:
    """``f(theta) = f_0 + Psi theta`` with ``Psi = V Lambda^(1/2)``, starting at ``theta = 0``.

    ``Psi Psi^T`` is the kernel on its kept eigenpairs, so that gradient descent on ``theta`` moves
    the outputs as gradient descent on the weights of the linearised network does. The state has
    the rank r as its dimension instead of the number of weights.

    Attributes:
        features:
            ``Psi``, of shape ``(N, C, r)``.
        initial_outputs:
            ``f_0``, of shape ``(N, C)``.
        soft_targets:
            ``q`` of :class:`~optuna_ttp.Loss`, of shape ``(N, C)``.
        normalisers:
            ``n`` of :class:`~optuna_ttp.Loss`, of shape ``(N,)``.
        labels:
            The class to be predicted, of shape ``(N,)``, or :obj:`None` for a single real target.
        kind:
            ``"cross_entropy"`` or ``"mse"``.
    """

    features: torch.Tensor
    initial_outputs: torch.Tensor
    soft_targets: torch.Tensor
    normalisers: torch.Tensor
    labels: torch.Tensor | None
    kind: str

    @classmethod
    def from_spectrum(
        cls,
        spectrum: Spectrum,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> LinearisedModel:
        """Build the model from a spectrum.

        Args:
            spectrum:
                The eigenpairs, initial outputs and targets.
            device:
                Where to simulate. The CPU by default.
            dtype:
                Precision of the simulation. Single precision by default.

        Returns:
            The linearised model.
        """
        psi = np.asarray(spectrum.eigenvectors, dtype=np.float64) * np.sqrt(spectrum.eigenvalues)
        soft_targets, normalisers = spectrum.loss.soft_targets(
            spectrum.targets, spectrum.n_outputs
        )
        labels = None
        if spectrum.loss.kind == "cross_entropy":
            labels = torch.as_tensor(spectrum.targets, device=device)
        elif spectrum.n_outputs > 1:
            labels = torch.as_tensor(spectrum.targets.argmax(axis=1), device=device)

        def tensor(array: np.typing.NDArray[np.floating]) -> torch.Tensor:
            return torch.as_tensor(array).to(device, dtype)

        return cls(
            features=tensor(psi.reshape(spectrum.n_samples, spectrum.n_outputs, spectrum.rank)),
            initial_outputs=tensor(spectrum.initial_outputs),
            soft_targets=tensor(soft_targets),
            normalisers=tensor(normalisers),
            labels=labels,
            kind=spectrum.loss.kind,
        )

    @property
    def n_samples(self) -> int:
        """The number N of samples."""
        return int(self.features.shape[0])

    def outputs(self, theta: torch.Tensor) -> torch.Tensor:
        """Return the outputs for K states of shape ``(K, r)``: shape ``(K, N, C)``."""
        flat = theta @ self.features.reshape(-1, self.features.shape[2]).T
        return self.initial_outputs + flat.reshape(len(theta), *self.initial_outputs.shape)

    def loss(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the training loss over all samples for outputs ``(K, N, C)``: shape ``(K,)``."""
        if self.kind == "mse":
            per_sample = (outputs - self.soft_targets).square().mean(dim=2)
        else:
            per_sample = -(self.soft_targets * outputs.log_softmax(dim=2)).sum(dim=2)
        return per_sample.sum(dim=1) / self.normalisers.sum()

    @property
    def loss_floor(self) -> float:
        """The lowest training loss that any outputs have.

        The entropy of the soft targets for the cross-entropy: zero without label smoothing. Zero
        for the mean squared error.
        """
        if self.kind == "mse":
            return 0.0
        q = self.soft_targets.double()
        entropy = -torch.xlogy(q, q / q.sum(dim=1, keepdim=True).clamp(min=1e-300)).sum()
        return max(0.0, float(entropy / self.normalisers.double().sum()))

    def accuracy(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the share of samples classified rightly for outputs ``(K, N, C)``."""
        if self.labels is None:
            raise ValueError("A single real output has no accuracy.")
        return (outputs.argmax(dim=2) == self.labels).double().mean(dim=1)

    def residuals(
        self, outputs: torch.Tensor, soft_targets: torch.Tensor, normalisers: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradient of a batch's mean loss with respect to its outputs.

        ``(sum_c q_c) softmax(f) - q`` over ``sum n`` for the cross-entropy, ``2 (f - q) / C`` over
        ``sum n`` for the mean squared error.

        Args:
            outputs:
                Shape ``(K, B, C)``.
            soft_targets:
                Shape ``(B, C)``.
            normalisers:
                Shape ``(B,)``.

        Returns:
            Shape ``(K, B, C)``.
        """
        if self.kind == "mse":
            gradient = (outputs - soft_targets) * (2.0 / outputs.shape[2])
        else:
            gradient = (
                outputs.softmax(dim=2) * soft_targets.sum(dim=1, keepdim=True) - soft_targets
            )
        total = normalisers.sum()
        # PyTorch's weighted mean over a batch of weightless samples is 0/0; it moves nothing.
        return gradient / total if total > 0 else torch.zeros_like(gradient)

    @cached_property
    def curvatures(self) -> np.typing.NDArray[np.float64]:
        """Eigenvalues of the generalised Gauss-Newton matrix at the start, descending, ``(r,)``.

        ``H = sum_i Psi_i^T S_i Psi_i / sum_i n_i`` with ``S_i = (sum_c q_ic)(diag(p) - p p^T)``
        for the cross-entropy and ``S_i = (2 / C) I`` for the mean squared error: the Hessian of
        the linearised model's training loss.
        """
        n_samples, n_outputs, rank = self.features.shape
        if self.kind == "mse":
            rooted = self.features * (2.0 / n_outputs) ** 0.5
        else:
            p = self.initial_outputs.softmax(dim=1)
            centred = self.features - torch.einsum("nc,ncr->nr", p, self.features)[:, None, :]
            mass = self.soft_targets.sum(dim=1)[:, None]
            rooted = centred * (p * mass).sqrt()[:, :, None]
        flat = rooted.reshape(n_samples * n_outputs, rank).double()
        hessian = flat.T @ flat / self.normalisers.sum().double()
        values = torch.linalg.eigvalsh(hessian).flip(0).clamp(min=0)
        return np.asarray(values.cpu().numpy())
