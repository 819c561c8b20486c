"""How far the outputs move in one large step, over what linearisation says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from optuna_ttp._util.arrays import Floats
from optuna_ttp._util.arrays import Integers
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.ntk._autocast import without_autocast
from optuna_ttp.spectrum import Saturation


if TYPE_CHECKING:
    from optuna_ttp.spectrum import Spectrum
    from optuna_ttp.task import FineTuningTask
    from optuna_ttp.task import FrozenModel


@dataclass(frozen=True)
class SaturationRules:
    """Tuned numbers of the measurement of saturation.

    Attributes:
        n_samples:
            The largest number of samples in the sub-sample; each half of it is a mini-batch.
        share:
            The largest share of all samples in the sub-sample, and the number of samples up to
            which this does not count. It bounds the cost in small tasks.
        sgd_steps:
            Learning rates of SGD, times the largest curvature of the training loss; 2 is the limit
            of stable full-batch descent on the linearised network.
        adam_rates:
            Learning rates of Adam, from those of fine-tuning to those at which training fails.
        sgd_difference:
            The learning rate of SGD, times the curvature, of the difference quotient that is taken
            for the linear change.
        adam_difference:
            The same for Adam. Smaller ones are lost in the rounding of single precision.
        eps:
            The constant in the denominator of Adam's step, PyTorch's default.
        most_unmoved:
            The largest share of weights in matrices without a gradient with which Adam is
            measured: it moves them from its second step on.
    """

    n_samples: int = 32
    share: tuple[float, int] = (0.25, 16)
    sgd_steps: tuple[float, ...] = (1.0, 4.0, 16.0)
    adam_rates: tuple[float, ...] = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    sgd_difference: float = 0.02
    adam_difference: float = 3e-6
    eps: float = 1e-8
    most_unmoved: float = 0.1


RULES = SaturationRules()


@without_autocast
def measure_saturation(
    task: FineTuningTask,
    spectrum: Spectrum,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    rules: SaturationRules = RULES,
) -> Saturation:
    """Measure how far large first steps of SGD and Adam move the outputs of the network.

    A random sub-sample is halved into two mini-batches. The outputs of the sub-sample are computed
    at the weights ``w_0 - s c u`` for learning rates ``s``, learning-rate multipliers ``c`` and
    directions ``u``. For SGD these are the gradients of the losses of both mini-batches and of the
    whole sub-sample; for Adam ``g / (|g| + eps)`` with the gradient ``g`` of the first mini-batch,
    which is its first step. The linear change is the difference quotient at a small ``s``. In the
    sums of :class:`~optuna_ttp.spectrum.Saturation`, the samples outside of a mini-batch stand for
    all others of the task. Ratio and cosine are zero where the outputs are not finite.

    The cost is two backward passes over the sub-sample, and a forward pass for each direction and
    learning rate and for three difference quotients. ``seed`` decides on the sub-sample.
    """
    part = task.subset(_n_samples(task.n_samples, rules), seed=seed)
    order = np.random.default_rng(seed).permutation(part.n_samples)
    halves = [order] if len(order) == 1 else np.array_split(order, 2)
    model = LinearisedModel.from_spectrum(spectrum, dtype=torch.float64)
    unit = 1.0 / max(float(model.curvatures[0]), 1e-30)
    sgd_rates, adam_rates = unit * np.array(rules.sgd_steps), np.array(rules.adam_rates)
    with part.frozen(device, dtype) as frozen:
        sample = _Sample(part, frozen, task.n_samples, device, dtype)
        gradients = [sample.gradient(half) for half in halves]
        small = unit * rules.sgd_difference
        sgd = [
            sample.curve(half, gradient, sgd_rates, sample.linear_change(gradient, small))
            for half, gradient in zip(halves, gradients, strict=True)
        ]
        if len(halves) > 1:
            shares = sample.shares(halves)
            whole = [_mean(shares, parts) for parts in zip(*gradients, strict=True)]
            linear = _mean(shares, [curve.linear_change for curve in sgd])
            sgd.append(sample.curve(order, whole, sgd_rates, linear))
        adam = []
        reason = sample.unmoved(gradients[0], rules)
        if not reason:
            sign = [g / (g.abs() + rules.eps) for g in gradients[0]]
            linear = sample.linear_change(sign, rules.adam_difference)
            adam.append(sample.curve(halves[0], sign, adam_rates, linear))
    sgd = [curve for curve in sgd if curve.moves]
    if not sgd:
        reason = "The gradient of the loss at the pretrained weights is zero."
    sgd_arrays, adam_arrays = (_arrays(*pair) for pair in ((sgd, sgd_rates), (adam, adam_rates)))
    return Saturation(*sgd_arrays, *adam_arrays, reason)


def _n_samples(n_samples: int, rules: SaturationRules) -> int:
    """Return the number of samples in the sub-sample of ``n_samples``."""
    share, least = rules.share
    return min(n_samples, rules.n_samples, max(least, round(share * n_samples)))


def _mean(shares: list[float], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean of tensors of one shape, weighted by shares."""
    return torch.stack([share * part for share, part in zip(shares, parts, strict=True)]).sum(0)


@dataclass(frozen=True, eq=False)
class _Curve:
    """Ratios and cosines, ``(P,)``, along a direction, and the linear change, ``(R, C)``."""

    batch_size: int
    ratios: Floats
    cosines: Floats
    linear_change: torch.Tensor

    @property
    def moves(self) -> bool:
        """True if the direction moves the outputs at all."""
        return bool(self.linear_change.any())


def _arrays(curves: list[_Curve], rates: Floats) -> tuple[Integers, Floats, Floats, Floats]:
    """Return batch sizes, learning rates, ratios and cosines of an optimiser's directions."""
    tables = [np.array([getattr(c, name) for c in curves]) for name in ("ratios", "cosines")]
    ratios, cosines = (table.reshape(len(curves), len(rates)) for table in tables)
    batch_sizes = np.array([curve.batch_size for curve in curves], dtype=np.int64)
    return batch_sizes, rates, ratios, cosines


class _Sample:
    """The R samples of a sub-sample, and the network on them at displaced weights."""

    def __init__(
        self,
        part: FineTuningTask,
        frozen: FrozenModel,
        n_samples: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._part, self._frozen, self._n_samples = part, frozen, n_samples
        ((self._inputs, _),) = part.batches(part.n_samples, device, dtype)
        self._start = dict(frozen.parameters)
        self._graph = frozen(self._inputs)
        self._outputs = self._graph.detach().double().cpu()

    def shares(self, batches: Sequence[Integers]) -> list[float]:
        """Return the share of each batch in the loss of all of them, by their normalisers."""
        _, normalisers = self._part.loss.soft_targets(self._part.targets, self._part.n_outputs)
        sums = [float(normalisers[batch].sum()) for batch in batches]
        return [one / max(sum(sums), 1e-30) for one in sums]

    def gradient(self, batch: Integers) -> list[torch.Tensor]:
        """Return the gradient of a mini-batch's loss, by parameter."""
        targets = self._part.targets[batch]
        residuals = self._part.loss.residuals(self._outputs.numpy()[batch], targets)
        cotangents = torch.zeros_like(self._outputs)
        cotangents[batch] = torch.as_tensor(residuals)
        parts = torch.autograd.grad(
            self._graph,
            list(self._start.values()),
            grad_outputs=cotangents.to(self._graph),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return [g if g.layout == torch.strided else g.to_dense() for g in parts]

    def linear_change(self, direction: list[torch.Tensor], rate: float) -> torch.Tensor:
        """Return ``-J c u`` for a direction ``u``, shape ``(R, C)``, by a quotient at a rate."""
        return (self._displaced(direction, rate) - self._outputs) / rate

    def curve(
        self,
        batch: Integers,
        direction: list[torch.Tensor],
        rates: Floats,
        linear_change: torch.Tensor,
    ) -> _Curve:
        """Return ratios and cosines at learning rates ``(P,)`` along the direction of a batch."""
        values = []
        for rate in rates if bool(linear_change.any()) else []:
            real = self._displaced(direction, float(rate)) - self._outputs
            values.append(self._compared(batch, real, rate * linear_change))
        ratios, cosines = np.array(values).reshape(-1, 2).T
        return _Curve(len(batch), ratios, cosines, linear_change)

    def _compared(
        self, batch: Integers, real: torch.Tensor, linear: torch.Tensor
    ) -> tuple[float, float]:
        """Return ratio and cosine of real and linear changes of the outputs, both ``(R, C)``."""
        n_others = len(real) - len(batch)
        weights = torch.full((len(real), 1), 1.0, dtype=real.dtype)
        if n_others:
            weights[:] = (self._n_samples - len(batch)) / n_others
            weights[batch] = 1.0
        product, real_square, square = (
            float((weights * a * b).sum()) for a, b in ((real, linear), (real,) * 2, (linear,) * 2)
        )
        if not (math.isfinite(real_square) and real_square > 0.0):
            return 0.0, 0.0
        return product / square, product / math.sqrt(real_square * square)

    @torch.no_grad()
    def _displaced(self, direction: list[torch.Tensor], rate: float) -> torch.Tensor:
        """Return the outputs ``(R, C)`` at weights minus the rate times ``c u``."""
        factors = self._part.multipliers.values()
        triples = zip(self._start.items(), direction, factors, strict=True)
        self._frozen.replace_parameters(
            # Other threads that look at the user's model meanwhile see trainable weights.
            {n: torch.add(w, u, alpha=-rate * c).requires_grad_() for (n, w), u, c in triples}
        )
        outputs = self._frozen(self._inputs).double().cpu()
        self._frozen.replace_parameters(self._start)
        return outputs

    def unmoved(self, gradient: list[torch.Tensor], rules: SaturationRules) -> str:
        """Return why the first step of Adam says nothing about later ones; empty if it does."""
        pairs = zip(self._start.items(), gradient, strict=True)
        still = {n: w.numel() for (n, w), g in pairs if w.ndim > 1 and not bool(g.any())}
        total = sum(w.numel() for w in self._start.values())
        if sum(still.values()) <= rules.most_unmoved * total:
            return ""
        return (
            f"The gradient of the loss with respect to {len(still)} weight matrices, the first "
            f"one {min(still)!r}, is zero at the pretrained weights, as under a head of zeros. "
            "Adam moves them from its second step on, so that its first step says nothing."
        )
