"""Checks of the outputs of the user's model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from optuna_ttp.task._tensors import describe_inputs


class InputsError(ValueError):
    """The model raised an error: ``what`` says on which inputs, ``reason`` quotes its message."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(what, reason)
        self.what, self.reason = what, reason

    def __str__(self) -> str:
        return (
            f"{self.what}. Give inputs in the form, the type and the range that the model "
            f"expects, or forward= to adapt them. {self.reason}"
        )


@contextmanager
def naming_inputs(inputs: Any) -> Iterator[None]:
    """Turn a RuntimeError (but out of memory) or IndexError of the model into an InputsError."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        raise InputsError(
            f"The model cannot be run on inputs of {describe_inputs(inputs)}",
            f"The model says: {(str(error) or type(error).__name__).splitlines()[0]}",
        ) from error


@contextmanager
def refusing_batch_statistics(model: torch.nn.Module) -> Iterator[None]:
    """Raise ValueError on exit if a module has run that normalises by statistics of its batch."""
    kind = torch.nn.modules.batchnorm._BatchNorm
    called: list[str] = []

    def refuse(error: Exception | None) -> None:
        if called:
            raise ValueError(
                "The outputs of a sample depend on the other samples of its batch, because the "
                f"module {called[0]!r} normalises by the batch (track_running_stats=False). "
                "Neither the empirical NTK nor a prediction is defined for that. Use one with "
                "running statistics, or torch.nn.GroupNorm."
            ) from error

    with ExitStack() as stack:
        for name, module in model.named_modules():
            # In evaluation mode modules with running statistics use those.
            if (
                isinstance(module, kind)
                and type(module).forward is kind.forward
                and module.running_mean is None
            ):
                hook = partial(_append, called, name)
                stack.callback(module.register_forward_pre_hook(hook).remove)
        try:
            yield
        except Exception as error:
            # A batch of one has no statistics, which PyTorch reports as an error of its own.
            refuse(error)
            raise
        refuse(None)


def _append(names: list[str], name: str, *_: object) -> None:
    """Append a name, as a hook that ignores the module and its inputs."""
    names.append(name)


def check_output_shape(outputs: torch.Tensor, n_samples: int, n_outputs: int | None) -> None:
    """Raise ValueError unless outputs have shape (n_samples, n_outputs); None fits any number."""
    shape = tuple(outputs.shape)
    if len(shape) != 2 or shape[0] != n_samples or shape[1] != (n_outputs or shape[1]):
        raise ValueError(
            f"The model must give outputs of shape (batch, {n_outputs or 'C'}) but got {shape} "
            f"for a batch of {n_samples}. Pass forward= to adapt them."
        )
