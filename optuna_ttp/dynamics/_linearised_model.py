"""The network, linearised at its pretrained weights, on eigen-directions or single weights."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace
from functools import cached_property
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_ttp._util.arrays import Floats
from optuna_ttp.dynamics._low_rank_products import LowRankProducts
from optuna_ttp.dynamics._single_weights import SingleWeights
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.task import Loss
from optuna_ttp.task import output_gradients


@dataclass(frozen=True, eq=False)
class LinearisedModel:
    """``f(theta) = f_0 + Psi theta`` with ``Psi = V Lambda^(1/2)``, starting at ``theta = 0``.

    ``Psi Psi^T`` is the kernel on the eigenpairs of the spectrum, so that gradient descent on
    ``theta`` moves the outputs as gradient descent on the weights of the linearised network does.
    The state has the rank r as its dimension instead of the number of weights.
    """

    features: torch.Tensor
    """``Psi``, of shape ``(N, C, r)``."""
    initial_outputs: torch.Tensor
    """``f_0``, of shape ``(N, C)``."""
    soft_targets: torch.Tensor
    """``q`` of :class:`~optuna_ttp.Loss`, of shape ``(N, C)``."""
    normalisers: torch.Tensor
    """``n`` of :class:`~optuna_ttp.Loss`, of shape ``(N,)``."""
    labels: torch.Tensor | None
    """The class of each sample, of shape ``(N,)``, or :obj:`None` for a single real target."""
    kind: str
    """``"cross_entropy"`` or ``"mse"``."""
    pull: torch.Tensor | None = None
    """The pretrained weights in the coordinates of ``theta``, ``Lambda^(-1/2) V^T J w_0``, of
    shape ``(r,)``; weight decay shrinks ``pull + theta``. :obj:`None` if the spectrum lacks it."""
    validation: LinearisedModel | None = None
    """The same model on the validation samples, or :obj:`None`."""
    decay_factors: torch.Tensor | None = None
    """Factors on the weight decay of ``theta``, of shape ``(r,)``; see
    :class:`~optuna_ttp.Spectrum`. :obj:`None` if all are one."""
    weights: SingleWeights | None = None
    """The weights that the coordinates of ``theta`` stand for, see :meth:`from_columns`, or
    :obj:`None` on the eigen-directions."""
    low_rank: LowRankProducts | None = None
    """Low-rank adapters, which change the outputs by products of their weights. These are the
    first coordinates of ``theta``, followed by those of the features; :obj:`None` without."""

    @classmethod
    def from_spectrum(
        cls,
        spectrum: Spectrum,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> LinearisedModel:
        """Return the model of a spectrum, including its validation samples if it has any."""
        vectors = np.asarray(spectrum.eigenvectors, dtype=np.float64)
        roots = np.sqrt(spectrum.eigenvalues)

        def model(psi: NDArray[Any], outputs: Floats, targets: NDArray[Any]) -> LinearisedModel:
            return cls._of_samples(psi, outputs, targets, spectrum.loss, device, dtype)

        whole = model(vectors * roots, spectrum.initial_outputs, spectrum.targets)
        if spectrum.weight_outputs is not None:
            pull = torch.as_tensor(spectrum.weight_outputs.ravel() @ vectors / roots)
            whole = replace(whole, pull=pull.to(device, dtype))
        if spectrum.decay_factors is not None:
            decay = torch.as_tensor(spectrum.decay_factors).to(device, dtype)
            whole = replace(whole, decay_factors=decay)
        if spectrum.validation is not None:
            held_out = spectrum.validation
            part = model(held_out.features, held_out.initial_outputs, held_out.targets)
            whole = replace(whole, validation=part)
        return whole

    @classmethod
    def from_columns(
        cls,
        spectrum: Spectrum,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> LinearisedModel:
        """Return the model of a spectrum's sampled columns, whose state are changes of weights.

        Its features are ``J_S u`` (see :class:`SingleWeights`), its ``pull`` is ``w_0``. Low-rank
        adapters are not linearised, only the network in their products. The methods that speak of
        the kernel or of a curvature are those of the eigen-directions only. ValueError if the
        spectrum has no columns.
        """
        jacobian = spectrum.jacobian
        if jacobian is None:
            raise ValueError(
                "An optimiser that acts on single weights, as Adam, AdamW and parameter groups "
                "do, needs a spectrum with a sample of the Jacobian's columns but got one "
                'without. Compute it again with engine="columns".'
            )
        has_rest = spectrum.weight_outputs is not None
        weights = SingleWeights.of(
            jacobian, spectrum.low_rank, has_rest=has_rest, device=device, dtype=dtype
        )

        def products(*, held_out: bool) -> LowRankProducts | None:
            return LowRankProducts.of_layers(
                spectrum.low_rank, held_out=held_out, device=device, dtype=dtype
            )

        def model(
            columns: NDArray[Any],
            rest: Floats | None,
            outputs: Floats,
            targets: NDArray[Any],
            low_rank: LowRankProducts | None,
        ) -> LinearisedModel:
            # Rows are gathered by batches, which is fast if they are contiguous.
            psi = np.ascontiguousarray(columns) * jacobian.inflation.astype(columns.dtype)
            if has_rest:
                decay = psi @ jacobian.weights.astype(psi.dtype)
                if rest is not None and low_rank is not None:
                    rest = rest - np.asarray(low_rank.weight_outputs().double().cpu().numpy())
                last = np.zeros(len(psi)) if rest is None else rest.ravel() - decay
                psi = np.concatenate([psi, last[:, None].astype(psi.dtype)], axis=1)
            one = cls._of_samples(psi, outputs, targets, spectrum.loss, device, dtype)
            return replace(one, low_rank=low_rank)

        whole = model(
            jacobian.columns,
            spectrum.weight_outputs,
            spectrum.initial_outputs,
            spectrum.targets,
            products(held_out=False),
        )
        initial = np.append(jacobian.weights, 1.0) if has_rest else jacobian.weights
        pull = torch.as_tensor(initial).to(device, dtype)
        if whole.low_rank is not None:
            pull = torch.cat([whole.low_rank.initial_weights, pull])
        whole = replace(whole, pull=pull, weights=weights)
        if spectrum.validation is not None and jacobian.validation_columns is not None:
            held_out, columns = spectrum.validation, jacobian.validation_columns
            low_rank = products(held_out=True)
            part = model(columns, None, held_out.initial_outputs, held_out.targets, low_rank)
            whole = replace(whole, validation=part)
        return whole

    @classmethod
    def _of_samples(
        cls,
        psi: NDArray[Any],
        initial_outputs: Floats,
        targets: NDArray[Any],
        loss: Loss,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> LinearisedModel:
        """Return the model of N samples with features ``psi``, ``(N C, r)``, and their targets."""
        n_samples, n_outputs = initial_outputs.shape
        soft_targets, normalisers = loss.soft_targets(targets, n_outputs)
        labels = None
        if loss.kind == "cross_entropy":
            labels = torch.as_tensor(targets, device=device)
        elif n_outputs > 1:
            labels = torch.as_tensor(targets.argmax(axis=1), device=device)

        def tensor(array: NDArray[Any]) -> torch.Tensor:
            return torch.as_tensor(array).to(device, dtype)

        return cls(
            features=tensor(psi.reshape(n_samples, n_outputs, -1)),
            initial_outputs=tensor(initial_outputs),
            soft_targets=tensor(soft_targets),
            normalisers=tensor(normalisers),
            labels=labels,
            kind=loss.kind,
        )

    def restricted(self, samples: torch.Tensor) -> LinearisedModel:
        """Return the model of the samples at the given indices ``(n,)``, in the same coordinates.

        Pull, decay factors and the validation model stay as they are.
        """
        samples = samples.to(self.features.device)
        return replace(
            self,
            features=self.features[samples],
            initial_outputs=self.initial_outputs[samples],
            soft_targets=self.soft_targets[samples],
            normalisers=self.normalisers[samples],
            labels=None if self.labels is None else self.labels[samples],
            low_rank=None if self.low_rank is None else self.low_rank.of(samples),
        )

    @property
    def n_samples(self) -> int:
        """The number N of samples."""
        return int(self.features.shape[0])

    @property
    def rank(self) -> int:
        """The number r of eigen-directions, or of other coordinates."""
        return int(self.features.shape[2]) + self.n_low_rank

    @property
    def n_low_rank(self) -> int:
        """The number of coordinates that are weights of low-rank adapters, the first ones."""
        return 0 if self.low_rank is None else self.low_rank.n_weights

    def outputs(self, theta: torch.Tensor) -> torch.Tensor:
        """Return the outputs ``(K, N, C)`` at K states ``theta`` of shape ``(K, r)``."""
        flat = theta[:, self.n_low_rank :] @ self.features.flatten(0, 1).T
        shape = (len(theta), *self.initial_outputs.shape)
        outputs: torch.Tensor = self.initial_outputs + flat.reshape(shape)
        if self.low_rank is not None:
            outputs += self.low_rank.output_changes(theta[:, : self.n_low_rank])
        return outputs

    def loss(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the mean loss ``(K,)`` over all samples for outputs ``(K, N, C)``."""
        return self.batch_loss(outputs, self.soft_targets, self.normalisers)

    def batch_loss(
        self, outputs: torch.Tensor, soft_targets: torch.Tensor, normalisers: torch.Tensor
    ) -> torch.Tensor:
        """Return the mean loss ``(K,)`` of a batch with outputs ``(K, B, C)``.

        The soft targets are of shape ``(B, C)``, the normalisers of shape ``(B,)``.
        """
        return self.sample_losses(outputs, soft_targets).sum(dim=1) / normalisers.sum()

    def sample_losses(self, outputs: torch.Tensor, soft_targets: torch.Tensor) -> torch.Tensor:
        """Return losses ``(K, B)`` before normalisation; targets have the shape ``(B, C)``."""
        if self.kind == "mse":
            return (outputs - soft_targets).square().mean(dim=2)
        return -(soft_targets * outputs.log_softmax(dim=2)).sum(dim=2)

    @property
    def loss_floor(self) -> float:
        """The lowest possible training loss.

        For the cross-entropy this is the mean entropy of the soft targets (zero without label
        smoothing), for the mean squared error zero.
        """
        if self.kind == "mse":
            return 0.0
        q = self.soft_targets.double()
        entropy = -torch.xlogy(q, q / q.sum(dim=1, keepdim=True).clamp(min=1e-300)).sum()
        return max(0.0, float(entropy / self.normalisers.double().sum()))

    def accuracy(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the share ``(K,)`` of correctly classified samples for outputs ``(K, N, C)``."""
        if self.labels is None:
            raise ValueError("A single real output has no accuracy.")
        return (outputs.argmax(dim=2) == self.labels).double().mean(dim=1)

    def residuals(
        self, outputs: torch.Tensor, soft_targets: torch.Tensor, normalisers: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradient ``(K, B, C)`` of a batch's mean loss with respect to its outputs."""
        return output_gradients(self.kind, outputs, soft_targets, normalisers)

    def gradient_norms(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the norms ``(K, 1)`` of gradients by all weights from those by ``theta``."""
        if self.weights is not None:
            return self.weights.norms(gradient)
        return gradient.square().sum(dim=1, keepdim=True).sqrt()

    def gradient_length(self, batch_size: int) -> float:
        """Return the root mean square norm of a mini-batch's gradient at ``theta = 0``.

        ``sqrt(|g|^2 + gamma (mean_n |g_n|^2 - |g|^2))`` with the gradients ``g_n`` of samples,
        their mean ``g`` and ``gamma = (N - B) / ((N - 1) B)``, for batches without replacement.
        """
        samples, n = self.sample_gradients, self.n_samples
        mean = float(self.gradient_norms(samples.mean(dim=0, keepdim=True)).square())
        square = float(self.gradient_norms(samples).square().mean())
        batch = min(batch_size, n)
        gamma = (n - batch) / (max(n - 1, 1) * batch)
        return math.sqrt(mean + gamma * max(square - mean, 0.0))

    def gradient(self, theta: torch.Tensor) -> torch.Tensor:
        """Return the gradient ``(K, r)`` of the training loss at states ``theta`` ``(K, r)``."""
        residuals = self.residuals(self.outputs(theta), self.soft_targets, self.normalisers)
        return self.pulled_back(theta, residuals)

    def pulled_back(self, theta: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
        """Return gradients ``(K, r)`` at states ``(K, r)`` for those by outputs, ``(K, N, C)``."""
        gradient = residuals.flatten(1) @ self.features.flatten(0, 1)
        if self.low_rank is None:
            return gradient
        of_products = self.low_rank.gradient(theta[:, : self.n_low_rank], residuals)
        return torch.cat([of_products, gradient], dim=1)

    @cached_property
    def sample_gradients(self) -> torch.Tensor:
        """The gradient of each sample's loss by ``theta`` at ``theta = 0``, of shape ``(N, r)``.

        Their mean is the gradient of the training loss. The product of two of them equals that of
        the network's gradients, ``r_n^T Theta_nm r_m`` with the residuals ``r`` (the derivatives
        of a sample's loss by its outputs), so that no further pass over the data is needed.
        Weights of low-rank adapters are left out.
        """
        whole = self.residuals(self.initial_outputs[None], self.soft_targets, self.normalisers)[0]
        return self.n_samples * torch.einsum("ncr,nc->nr", self.features, whole)

    @cached_property
    def gradient_moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance over the samples of each sample's gradient, each ``(r,)``."""
        mean = self.sample_gradients.mean(dim=0)
        variance = self.gradient_variances
        if self.low_rank is None:
            return mean, variance
        whole = self.residuals(self.initial_outputs[None], self.soft_targets, self.normalisers)[0]
        parts = self.low_rank.gradient_moments(whole)
        return torch.cat([parts[0], mean]), torch.cat([parts[1], variance])

    @cached_property
    def gradient_variances(self) -> torch.Tensor:
        """The variance over the samples of each entry of :attr:`sample_gradients`, ``(r,)``.

        This is the diagonal of the paper's ``Sigma`` (equation 3) in the coordinates of ``theta``;
        its sum is the trace of the covariance of a single sample's gradient.
        """
        return self.sample_gradients.var(dim=0, correction=0)

    @cached_property
    def curvatures(self) -> Floats:
        """Eigenvalues ``(r,)``, descending, of the training loss's Hessian at ``theta = 0``."""
        return self.curvatures_at(self.initial_outputs)

    def curvatures_at(self, outputs: torch.Tensor) -> Floats:
        """Return the eigenvalues ``(r,)``, descending, of the Hessian at outputs ``(N, C)``.

        ``H = Z^T Z / sum_i n_i`` with ``Z`` of :meth:`rooted_features`: the Hessian of the
        linearised model's training loss, the generalised Gauss-Newton matrix of the network.
        """
        flat = self.rooted_features(outputs).flatten(0, 1).double()
        hessian = flat.T @ flat / self.normalisers.sum().double()
        values = torch.linalg.eigvalsh(hessian).flip(0).clamp(min=0)
        return np.asarray(values.cpu().numpy())

    def rooted_features(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return ``Z`` with ``Z_i^T Z_i = Psi_i^T S_i Psi_i``, of shape ``(N, C, r)``.

        Weights of low-rank adapters are left out, see :meth:`rooted_product` for them.
        ``S_i = (sum_c q_ic)(diag(p) - p p^T)`` for the cross-entropy and ``S_i = (2 / C) I`` for
        the mean squared error is the Hessian of a sample's loss at its outputs, shape ``(N, C)``.
        """
        return self._rooted(self.features, outputs)

    def _rooted(self, values: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """Return ``R_i v_i`` with ``R_i^T R_i = S_i`` for values ``v`` of shape ``(N, C, m)``."""
        if self.kind == "mse":
            return values * math.sqrt(2.0 / values.shape[1])
        p = outputs.softmax(dim=1)
        centred = values - torch.einsum("nc,ncr->nr", p, values)[:, None, :]
        total = self.soft_targets.sum(dim=1)[:, None]
        rooted: torch.Tensor = centred * (p * total).sqrt()[:, :, None]
        return rooted

    def rooted_product(self, inverse: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        """Return ``Z diag(inverse) Z^T v`` for low-rank adapters at the start, shape ``(N C,)``.

        ``inverse`` has the shape ``(p,)`` of their weights, ``vector`` that of the result.
        """
        assert self.low_rank is not None
        values, outputs = vector.reshape(self.initial_outputs.shape), self.initial_outputs
        if self.kind == "mse":
            pulled = values * math.sqrt(2.0 / values.shape[1])
        else:
            p = outputs.softmax(dim=1)
            scaled = (p * self.soft_targets.sum(dim=1)[:, None]).sqrt() * values
            pulled = scaled - p * scaled.sum(dim=1, keepdim=True)
        start = values.new_zeros((1, self.n_low_rank))
        step = inverse * self.low_rank.gradient(start, pulled[None])
        moved = self.low_rank.first_order(step)[0]
        return self._rooted(moved[:, :, None], outputs).flatten()
