"""Differentiation of samples, batch by batch: one forward and C backward passes per batch."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from typing import TYPE_CHECKING
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_ttp.ntk._settings import EngineSettings
from optuna_ttp.ntk.jacobian._claims import Claims
from optuna_ttp.ntk.jacobian._claims import UnclaimedError
from optuna_ttp.ntk.jacobian._layout import Layout
from optuna_ttp.ntk.jacobian._rules import CHECKS
from optuna_ttp.ntk.jacobian._state import BlockState
from optuna_ttp.ntk.jacobian._state import StateBuilder
from optuna_ttp.ntk.jacobian._tape import Cotangents
from optuna_ttp.ntk.jacobian._tape import Gradients
from optuna_ttp.ntk.jacobian._tape import join_classes
from optuna_ttp.ntk.jacobian._tape import Recording
from optuna_ttp.ntk.jacobian._tape import Tape
from optuna_ttp.ntk.layers._rule import Unsummed


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask
    from optuna_ttp.task import FrozenModel


_Part = TypeVar("_Part")


class SampleReader:
    """Differentiates samples of a task, batch by batch, and returns their stored Jacobian.

    ``claims`` say which module computes which gradient, and ``tape`` must be attached to these
    modules; ``reference`` are the outputs ``(N, C)`` to compare with; ``advance`` is called with
    the number of rows after each batch.
    """

    def __init__(
        self,
        task: FineTuningTask,
        frozen: FrozenModel,
        claims: Claims,
        tape: Tape,
        settings: EngineSettings,
        *,
        batch_size: int,
        reference: NDArray[np.float64],
        advance: Callable[[int], object] = lambda _: None,
    ) -> None:
        self._task = task
        self._frozen = frozen
        self._claims = claims
        self._tape = tape
        self._batch_size = batch_size
        self.device, self._dtype = settings.device, settings.dtype
        self._reference = reference
        self._advance = advance
        # The outputs (N, C) of the samples that were read with their contributions.
        self.outputs = np.zeros(reference.shape)
        # On a GPU one vectorised pass keeps it busy; on a CPU it only copies more.
        self._batched = self.device.type == "cuda"

    def read(
        self, layout: Layout, start: int, stop: int, *, weight_outputs: bool = True
    ) -> tuple[BlockState, NDArray[np.float64]]:
        """Differentiate the samples from ``start`` up to, but without, ``stop``.

        Returns their state, and ``J diag(c) w`` of shape ``(stop - start, C)`` (zeros without
        ``weight_outputs``).
        """
        n_outputs = self._task.n_outputs
        weights = self._frozen.parameters if weight_outputs else None
        builder = StateBuilder(layout, stop - start, n_outputs, self.device, self._dtype)
        inner = np.zeros((stop - start, n_outputs))
        for first, recording in self._recordings(start, stop):
            batch_size = len(recording.outputs)
            self._check_unused(recording)
            rows = slice(first - start, first - start + batch_size)
            builder.begin(batch_size)
            for classes, gradients in self._gradients(recording, self._claims.gradients):
                builder.add(gradients, classes)
            inner[rows] = builder.end(weights).numpy()
            self._advance(batch_size * n_outputs)
            del recording
        return builder.finish(), inner

    def contributions(
        self, start: int, stop: int
    ) -> Iterator[tuple[slice, slice, Iterator[tuple[str, Unsummed]]]]:
        """Yield slices of samples and of outputs, with contributions to parameters' gradients.

        Samples are those from ``start`` up to, but without, ``stop``. Contributions to the same
        parameter, samples and outputs add up.
        """
        for first, recording in self._recordings(start, stop):
            self._check_unused(recording)
            samples = slice(first, first + len(recording.outputs))
            self.outputs[samples] = recording.outputs.detach().double().cpu().numpy()
            for classes, gradients in self._gradients(recording, self._claims.unsummed):
                yield samples, classes, gradients
            del recording

    def _gradients(
        self,
        recording: Recording,
        differentiate: Callable[[Recording, Cotangents], Iterator[tuple[str, _Part]]],
    ) -> Iterator[tuple[slice, Iterator[tuple[str, _Part]]]]:
        """Yield ranges of outputs with their contributions, by default one output at a time.

        On a GPU all outputs are one range. Modules without a rule, which run again to be
        differentiated, come last, for all outputs at once.
        """
        n_outputs = recording.outputs.shape[1]
        directions = []
        for c in range(n_outputs):
            direction = torch.zeros_like(recording.outputs)
            direction[:, c] = 1.0
            directions.append(direction)
        everything = slice(0, n_outputs)
        if self._batched:
            try:
                cotangents = recording.cotangents(directions, batched=True)
                yield everything, differentiate(recording, cotangents)
                return
            except (RuntimeError, NotImplementedError):
                # Not every operation has a vectorised derivative: one pass per output does.
                self._batched = False
        waiting: Cotangents = {}
        for c, direction in enumerate(directions):
            cotangents = recording.cotangents([direction], retain_graph=c + 1 < n_outputs)
            for module in self._claims.replayed:
                join_classes(waiting, module, cotangents.pop(module))
            yield slice(c, c + 1), differentiate(recording, cotangents)
        if waiting:
            yield everything, differentiate(recording, waiting)

    def _recordings(self, start: int, stop: int) -> Iterator[tuple[int, Recording]]:
        """Yield the index of each batch's first sample, and its recording."""
        for first in range(start, stop, self._batch_size):
            batch_size = min(self._batch_size, stop - first)
            batches = self._task.batches(batch_size, self.device, self._dtype, start=first)
            inputs, _ = next(batches)
            # No reference stays here, so that the activations are released before the next batch.
            yield first, self._record(inputs, batch_size, first)

    def _record(self, inputs: Any, batch_size: int, first: int) -> Recording:
        """Record a batch; raise ValueError if its outputs differ from the reference."""
        recording = self._tape.record(inputs, batch_size)
        check_same_outputs(recording.outputs, self._reference, first)
        return recording

    def _check_unused(self, recording: Recording) -> None:
        """Raise UnclaimedError if outputs depend on a parameter that the claims call unused."""
        unused = [self._frozen.parameters[n] for n in self._claims.unused]
        if not unused:
            return
        gradients: Gradients = torch.autograd.grad(
            recording.outputs,
            unused,
            torch.ones_like(recording.outputs),
            retain_graph=True,
            allow_unused=True,
        )
        late = [n for n, g in zip(self._claims.unused, gradients, strict=True) if g is not None]
        if late:
            raise UnclaimedError(late, "run for some samples but not for others")


def check_singles(
    task: FineTuningTask,
    frozen: FrozenModel,
    reference: NDArray[np.float64],
    settings: EngineSettings,
) -> None:
    """Raise ValueError if some samples alone give other outputs, a wrong shape or no gradient.

    ``reference`` are the outputs ``(N, C)`` of all samples in larger batches.
    """
    n = task.n_samples
    for k in sorted({int(i) for i in np.linspace(0, n - 1, min(n, CHECKS.n_single_samples))}):
        inputs, _ = next(task.batches(1, settings.device, settings.dtype, start=k))
        outputs = frozen(inputs)
        if outputs.shape != (1, task.n_outputs):
            raise ValueError(
                f"The model must give outputs of shape (1, {task.n_outputs}) for a batch of one "
                f"but got {tuple(outputs.shape)}. Does it squeeze its outputs?"
            )
        if not outputs.requires_grad:
            raise ValueError(
                "The outputs do not depend on any trainable parameter. Does the model or forward= "
                "run under torch.no_grad, or detach its result?"
            )
        check_same_outputs(outputs, reference, k)


def check_same_outputs(outputs: torch.Tensor, reference: NDArray[np.float64], first: int) -> None:
    """Raise ValueError if the outputs of a sample depend on the other samples of its batch.

    ``outputs`` are of a batch whose first sample has the index ``first``; ``reference`` are those
    of all samples, ``(N, C)``, from batches of other sizes.
    """
    expected = reference[first : first + len(outputs)]
    scale = float(np.abs(reference).max())
    # Half precision models cast inside may round a single sample and a batch differently.
    tolerance = 1e-3 * scale + 1e-5
    away = np.abs(outputs.detach().double().cpu().numpy() - expected).max(axis=1)
    bad = np.flatnonzero(~(away <= tolerance))
    if len(bad):
        raise ValueError(
            f"The outputs of sample {first + bad[0]} depend on the other samples of its batch: "
            f"they differ by {away[bad[0]]:.2g} (outputs up to {scale:.2g}) between batches of "
            "different sizes. The empirical NTK is only defined sample by sample."
        )
