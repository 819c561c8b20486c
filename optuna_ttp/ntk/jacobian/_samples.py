"""Reading samples into states: one forward pass and C backward passes a batch."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_ttp.ntk.jacobian._claims import Claims
from optuna_ttp.ntk.jacobian._claims import UnclaimedError
from optuna_ttp.ntk.jacobian._layout import Layout
from optuna_ttp.ntk.jacobian._state import BlockState
from optuna_ttp.ntk.jacobian._state import StateBuilder
from optuna_ttp.ntk.jacobian._tape import Cotangents
from optuna_ttp.ntk.jacobian._tape import Gradients
from optuna_ttp.ntk.jacobian._tape import join_classes
from optuna_ttp.ntk.jacobian._tape import Recording
from optuna_ttp.ntk.jacobian._tape import Tape
from optuna_ttp.ntk.layers._rule import Contribution


if TYPE_CHECKING:
    from optuna_ttp.task import FineTuningTask
    from optuna_ttp.task import FrozenModel


# What several samples' outputs are compared with one sample's for, evenly spread.
_N_SINGLES = 8


class SampleReader:
    """Differentiates samples of a task and hands out their states.

    Args:
        task:
            The task whose samples are read.
        frozen:
            The borrowed model.
        claims:
            Who answers for which parameter.
        tape:
            Attached to the model, for these claims.
        batch_size:
            Samples that go through the network together.
        device:
            Where.
        dtype:
            Precision of the Jacobian.
        reference:
            The outputs ``(N, C)`` as larger batches gave them.
        advance:
            Called with the number of rows that were made. Nothing by default.
    """

    def __init__(
        self,
        task: FineTuningTask,
        frozen: FrozenModel,
        claims: Claims,
        tape: Tape,
        *,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        reference: NDArray[np.float64],
        advance: Callable[[int], object] = lambda _: None,
    ) -> None:
        self._task = task
        self._frozen = frozen
        self._claims = claims
        self._tape = tape
        self._batch_size = batch_size
        self.device = device
        self._dtype = dtype
        self._reference = reference
        self._advance = advance
        # On a GPU one vectorised pass keeps it busy; on a CPU it only copies more.
        self._batched = device.type == "cuda"

    def read(
        self, layout: Layout, start: int, stop: int, *, weight_outputs: bool = True
    ) -> tuple[BlockState, NDArray[np.float64]]:
        """Differentiate a range of samples.

        Args:
            layout:
                How each parameter is held.
            start:
                The first sample.
            stop:
                After the last one.
            weight_outputs:
                Whether ``J diag(c) w`` is wanted. By default it is.

        Returns:
            The state, and ``J diag(c) w`` of shape ``(stop - start, C)``, or zeros.
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
            for classes, gradients in self._gradients(recording):
                builder.add(gradients, classes)
            inner[rows] = builder.end(weights).numpy()
            self._advance(batch_size * n_outputs)
            del recording
        return builder.finish(), inner

    def _gradients(
        self, recording: Recording
    ) -> Iterator[tuple[slice, Iterator[tuple[str, Contribution]]]]:
        """Gradients class by class, so that only one class's cotangents are held.

        Modules that are differentiated on their own run again for that, so they wait for all
        classes.
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
                yield everything, self._claims.gradients(recording, cotangents)
                return
            except (RuntimeError, NotImplementedError):
                # Not every operation has a vectorised derivative; one by one gives the same.
                self._batched = False
        waiting: Cotangents = {}
        for c, direction in enumerate(directions):
            cotangents = recording.cotangents([direction], retain_graph=c + 1 < n_outputs)
            for module in self._claims.replayed:
                join_classes(waiting, module, cotangents.pop(module))
            yield slice(c, c + 1), self._claims.gradients(recording, cotangents)
        if waiting:
            yield everything, self._claims.gradients(recording, waiting)

    def _recordings(self, start: int, stop: int) -> Iterator[tuple[int, Recording]]:
        for first in range(start, stop, self._batch_size):
            size = min(self._batch_size, stop - first)
            batches = self._task.batches(size, self.device, self._dtype, start=first)
            inputs, _ = next(batches)
            # Not held here, so that its activations are gone before the next batch.
            yield first, self._record(inputs, size, first)

    def _record(self, inputs: Any, size: int, first: int) -> Recording:
        recording = self._tape.record(inputs, size)
        check_same_outputs(recording.outputs, self._reference, first)
        return recording

    def _check_unused(self, recording: Recording) -> None:
        unused = [self._frozen.parameters[n] for n in self._claims.unused]
        if not unused:
            return
        found: Gradients = torch.autograd.grad(
            recording.outputs,
            unused,
            torch.ones_like(recording.outputs),
            retain_graph=True,
            allow_unused=True,
        )
        late = [n for n, g in zip(self._claims.unused, found, strict=True) if g is not None]
        if late:
            raise UnclaimedError(late, "run for some samples but not for others")


def check_singles(
    task: FineTuningTask,
    frozen: FrozenModel,
    reference: NDArray[np.float64],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Refuse outputs that a sample does not have on its own.

    Args:
        task:
            The task.
        frozen:
            The borrowed model.
        reference:
            The outputs ``(N, C)`` as larger batches gave them.
        device:
            Where.
        dtype:
            Precision.

    Raises:
        ValueError:
            If a batch of one gives another shape, other outputs, or no gradient.
    """
    n = task.n_samples
    for k in sorted({int(i) for i in np.linspace(0, n - 1, min(n, _N_SINGLES))}):
        inputs, _ = next(task.batches(1, device, dtype, start=k))
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
    """Refuse outputs that depend on which other samples are in the batch.

    Args:
        outputs:
            Of a batch.
        reference:
            Those of all samples as batches of other sizes gave them, ``(N, C)``.
        first:
            The number of the batch's first sample.

    Raises:
        ValueError:
            If they differ.
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
