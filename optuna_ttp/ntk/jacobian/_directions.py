"""Products with the Jacobian and its transpose, one direction at a time.

A vector-Jacobian product is a backward pass, a Jacobian-vector product a pass in forward mode.
Neither computes a row of the Jacobian, so that the cost does not depend on the number of outputs.
If forward mode fails, it is tried with attention as plain matrix products, and then replaced by
two backward passes: ``J^T u`` is linear in ``u``, with the derivative ``J w`` along ``w``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING
import warnings

import torch
import torch.autograd.forward_ad as forward_ad
from torch.nn.attention import sdpa_kernel
from torch.nn.attention import SDPBackend

from optuna_ttp._util.exceptions import JacobianMismatchError
from optuna_ttp.ntk._settings import EngineSettings
from optuna_ttp.ntk.jacobian._rules import CHECKS
from optuna_ttp.ntk.jacobian._rules import LAYOUTS
from optuna_ttp.ntk.jacobian._tape import Gradients


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask
    from optuna_ttp.task import FrozenModel


_MODES = ("forward", "forward of plain attention", "two backward passes")


class Directions:
    """Products with the Jacobian ``J`` of a task, without any of its rows.

    ``n_together`` is the number of vectors of all weights that fit half of the memory budget.
    """

    def __init__(
        self,
        task: FineTuningTask,
        frozen: FrozenModel,
        settings: EngineSettings,
    ) -> None:
        self._task, self._frozen = task, frozen
        self._device, self._dtype = settings.device, settings.dtype
        weights = settings.dtype.itemsize * max(1, task.n_parameters)
        self.n_together = max(1, settings.max_memory // 2 // weights)
        self._mode = 0
        self._checked = False

    @property
    def mode(self) -> str:
        """Return the name of the method for Jacobian-vector products that is in use."""
        return _MODES[self._mode]

    def images(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return ``J J^T V`` for ``V`` of shape ``(N C, b)``, in double precision."""
        parts = [
            self.forward(self._task, self.adjoint(some))
            for some in vectors.split(self.n_together, dim=1)
        ]
        return torch.cat(parts, 1)

    def adjoint(self, vectors: torch.Tensor) -> list[list[torch.Tensor]]:
        """Return ``J^T V`` for ``V`` of shape ``(N C, b)``, as ``b`` lists, one per column.

        A list has one tensor per trainable parameter, of the parameter's shape.
        """
        parameters = list(self._frozen.parameters.values())
        totals = [[torch.zeros_like(p) for p in parameters] for _ in range(vectors.shape[1])]
        weights = vectors.unflatten(0, (self._task.n_samples, self._task.n_outputs))
        batches = self._task.batches(LAYOUTS.direction_batch, self._device, self._dtype)
        for k, (inputs, _) in enumerate(batches):
            outputs = self._frozen(inputs)
            some = weights[
                k * LAYOUTS.direction_batch : k * LAYOUTS.direction_batch + len(outputs)
            ].to(outputs)
            for b, total in enumerate(totals):
                gradients: Gradients = torch.autograd.grad(
                    outputs,
                    parameters,
                    some[..., b],
                    retain_graph=b + 1 < len(totals),
                    allow_unused=True,
                )
                for whole, part in zip(total, gradients, strict=True):
                    if part is not None:
                        whole += part if part.layout == torch.strided else part.to_dense()
        return totals

    def forward(self, task: FineTuningTask, directions: list[list[torch.Tensor]]) -> torch.Tensor:
        """Return ``J W`` of shape ``(N C, b)``, in double precision.

        ``J`` is for the samples of ``task``; ``directions`` are the ``b`` columns of ``W``, each a
        list of one tensor per trainable parameter.
        """
        parts = [
            self._batch_forward(inputs, directions)
            for inputs, _ in task.batches(LAYOUTS.direction_batch, self._device, self._dtype)
        ]
        return torch.cat(parts).flatten(0, 1)

    def _batch_forward(self, inputs: object, directions: list[list[torch.Tensor]]) -> torch.Tensor:
        """Return ``J W`` of a batch, ``(B, C, b)``, by the first mode that works and is right."""
        while True:
            try:
                with _plain_attention(self._mode > 0):
                    if self._mode < 2:
                        images = self._forward_mode(inputs, directions)
                    else:
                        images = self._two_backward_passes(inputs, directions)
                if not self._checked:
                    self._check(inputs, directions[0], images[..., 0])
            except (RuntimeError, NotImplementedError):  # noqa: PERF203
                if self._mode + 1 == len(_MODES):
                    raise
                self._mode += 1
            else:
                self._checked = True
                return images

    def _forward_mode(self, inputs: object, directions: list[list[torch.Tensor]]) -> torch.Tensor:
        """Return ``J W`` of a batch, ``(B, C, b)``, in forward mode."""
        _load_forward_mode()
        before = self._frozen.parameters
        tangents = []
        try:
            for direction in directions:
                with forward_ad.dual_level():
                    duals = {
                        name: forward_ad.make_dual(p.detach(), d)
                        for (name, p), d in zip(before.items(), direction, strict=True)
                    }
                    self._frozen.replace_parameters(duals)
                    outputs, tangent = forward_ad.unpack_dual(self._frozen(inputs))
                    tangent = torch.zeros_like(outputs) if tangent is None else tangent
                    tangents.append(tangent.detach().double().cpu())
        finally:
            self._frozen.replace_parameters(before)
        return torch.stack(tangents, -1)

    def _two_backward_passes(
        self, inputs: object, directions: list[list[torch.Tensor]]
    ) -> torch.Tensor:
        """Return ``J W`` of a batch, ``(B, C, b)``, as the derivative of ``J^T u`` by ``u``."""
        parameters = list(self._frozen.parameters.values())
        outputs = self._frozen(inputs)
        cotangent = torch.zeros_like(outputs, requires_grad=True)
        gradients: Gradients = torch.autograd.grad(
            outputs, parameters, cotangent, create_graph=True, allow_unused=True
        )
        tangents = []
        for b, direction in enumerate(directions):
            pairs = zip(gradients, direction, strict=True)
            inner = [(g * d).sum() for g, d in pairs if g is not None and g.requires_grad]
            (part,) = torch.autograd.grad(
                torch.stack(inner).sum(), cotangent, retain_graph=b + 1 < len(directions)
            )
            tangents.append(part.double().cpu())
        return torch.stack(tangents, -1)

    def _check(self, inputs: object, direction: list[torch.Tensor], image: torch.Tensor) -> None:
        """Raise JacobianMismatchError unless ``|J w|^2`` is ``(J^T J w) . w`` by reverse mode."""
        parameters = list(self._frozen.parameters.values())
        outputs = self._frozen(inputs)
        self._frozen.find_precision(outputs)
        gradients: Gradients = torch.autograd.grad(
            outputs, parameters, image.to(outputs), allow_unused=True
        )
        pairs = [
            (g if g.layout == torch.strided else g.to_dense(), d)
            for g, d in zip(gradients, direction, strict=True)
            if g is not None
        ]
        expected = sum(float((g.double() * d.double()).sum()) for g, d in pairs)
        scale = float(image.square().sum())
        if abs(scale - expected) > CHECKS.product_tolerances[self._frozen.precision] * max(
            scale, abs(expected)
        ):
            raise JacobianMismatchError(
                f"A product with the Jacobian by {self.mode} must have the squared norm "
                f"{expected:.6g}, the value of reverse mode, but got {scale:.6g}."
            )


@cache
def _load_forward_mode() -> None:
    """Make PyTorch compile its derivatives for forward mode, once per process."""
    with warnings.catch_warnings():
        # PyTorch compiles them with a function that it has deprecated.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated")
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


@contextmanager
def _plain_attention(on: bool) -> Iterator[None]:
    """If ``on``, compute attention as matrix products, which forward mode can differentiate."""
    if not on:
        yield
        return
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
