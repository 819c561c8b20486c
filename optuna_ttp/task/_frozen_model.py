"""The user's model as a pure function of its inputs and weights, without side effects."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
import random
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optuna_ttp.task._functional import functional_call
from optuna_ttp.task._tensors import cast
from optuna_ttp.task._tensors import map_tensors


# With this number of input channels, convolutions fill the vector registers of every CPU.
_VECTOR_WIDTH = 16


class FrozenModel:
    """The model's outputs as a function of its inputs; see ``FineTuningTask.frozen``.

    Attributes:
        adapter:
            The module that is run: the user's model and ``forward`` in one. It holds the user's
            parameters, but each call replaces them by copies, among them :attr:`parameters`.
        parameters:
            The copies of the trainable parameters by their names in the adapter.
        original_names:
            Maps the ``id`` of each of the user's parameters to its name in the adapter.
        precision:
            The precision of the outputs: single if a double-precision model casts to a lower one.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        forward: Callable[[torch.nn.Module, Any], torch.Tensor] | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.adapter = _Adapter(model, forward)
        self.precision = dtype
        self._state: dict[str, torch.Tensor] = {}
        self.parameters: dict[str, torch.Tensor] = {}
        self.original_names = {id(p): name for name, p in self.adapter.named_parameters()}
        for name, buffer in self.adapter.named_buffers():
            # A copy, because some modules write to their buffers even in evaluation mode.
            self._state[name] = cast(buffer.detach(), device, dtype).clone()
        for name, parameter in self.adapter.named_parameters():
            # A copy, because some modules write to their weights whenever they run.
            value = cast(parameter.detach(), device, dtype)
            if value.data_ptr() == parameter.data_ptr():
                value = value.clone()
            if parameter.requires_grad:
                value = value.requires_grad_()
                self.parameters[name] = value
            self._state[name] = value

    def replace_parameters(self, parameters: dict[str, torch.Tensor]) -> None:
        """Use other trainable parameters, by the same names, in all later calls."""
        self.parameters = parameters
        self._state.update(parameters)

    def try_channels_last(self, inputs: Any) -> None:
        """Lay the weights of two-dimensional convolutions out channels last, if the model can.

        On a CPU that makes convolutions up to twice as fast, and their outputs are laid out the
        same way. A model that needs another layout, such as one with ``x.view(...)``, stays as it
        is, and so does one with a convolution that PyTorch cannot differentiate then, see
        :class:`_Convolutions`. It is tried on ``inputs``, a batch of two or more samples.
        """
        before = self._state, self.parameters
        kinds = (torch.nn.Conv2d, torch.nn.ConvTranspose2d)
        names = {
            f"{name}.weight" for name, m in self.adapter.named_modules() if isinstance(m, kinds)
        }
        changed: dict[str, torch.Tensor] = {}
        for name in names & self._state.keys():
            weight = self._state[name]
            laid_out = weight.detach().contiguous(memory_format=torch.channels_last)
            changed[name] = laid_out.requires_grad_(weight.requires_grad)
        if not changed:
            return
        with _Convolutions() as convolutions, torch.no_grad():
            self(inputs)
        if convolutions.is_unsafe or any(
            isinstance(m, kinds[0]) and _overruns(m.weight, m.stride)
            for m in self.adapter.modules()
        ):
            return
        self._state = {**self._state, **changed}
        self.parameters = {n: changed.get(n, p) for n, p in self.parameters.items()}
        try:
            torch.autograd.grad(
                self(inputs).sum(), list(self.parameters.values()), allow_unused=True
            )
        except RuntimeError:
            self._state, self.parameters = before

    def find_precision(self, outputs: torch.Tensor) -> None:
        """Set :attr:`precision` from double to single if the graph of the outputs has a cast."""
        to_visit, seen = [outputs.grad_fn], set[Any]()
        while to_visit:
            function = to_visit.pop()
            if function is None or function in seen:
                continue
            seen.add(function)
            if function.name() == "ToCopyBackward0" and self.precision == torch.float64:
                self.precision = torch.float32
                return
            to_visit.extend(following for following, _ in function.next_functions)

    def __call__(self, inputs: Any) -> torch.Tensor:
        """Return the outputs ``(batch, C)`` of a batch; raise TypeError unless they are floats."""
        # A copy, because some modules write to their inputs.
        copied = map_tensors(inputs, torch.Tensor.clone)
        outputs = functional_call(self.adapter, self._state, (copied,))
        if not isinstance(outputs, torch.Tensor) or not outputs.is_floating_point():
            kind = outputs.dtype if isinstance(outputs, torch.Tensor) else type(outputs).__name__
            raise TypeError(
                "The model must give a floating-point tensor of shape (batch, C) but got "
                f"{kind}. Pass forward=lambda model, inputs: ... to pick the outputs."
            )
        return outputs


class _Convolutions(TorchDispatchMode):
    """Notes whether a convolution runs whose gradient overruns its memory with channels last.

    The gradient of the weights of a pointwise convolution with a stride and fewer input channels
    than a vector register holds is written past the end of its memory by oneDNN (PyTorch 2.13:
    with two to seven channels on a CPU with AVX2, ungrouped; no other of 3400 combinations of
    kernel, stride, channels, groups and size did). The process crashes, or continues with damaged
    memory. Registers of other CPUs are twice as wide.

    Operations are inspected, not only modules, because a model may call a convolution itself.
    ``is_unsafe`` is True once such a convolution has run.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_unsafe = False


def _watched(
    self: _Convolutions, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
) -> Any:
    """Return an operation's result, and set ``is_unsafe`` if it is an unsafe convolution."""
    if func is torch.ops.aten.convolution.default:
        _, weight, _, stride, _, _, is_transposed, *_ = args
        self.is_unsafe |= not is_transposed and _overruns(weight, stride)
    return func(*args, **(kwargs or {}))


# Not in the class's body: PyTorch wraps it there, and the first call of the wrapper imports the
# compiler, which takes longer than the spectrum of a small network.
_Convolutions.__torch_dispatch__ = _watched  # type: ignore[method-assign,assignment]


def _overruns(weight: torch.Tensor, stride: Sequence[int]) -> bool:
    """Return whether a convolution is pointwise, strided and has fewer than 16 input channels."""
    is_pointwise = weight.ndim == 4 and weight.shape[2:].numel() == 1
    return is_pointwise and max(stride) > 1 and weight.shape[1] < _VECTOR_WIDTH


class _Adapter(torch.nn.Module):
    """The user's model and ``forward`` as one module that takes a batch of inputs."""

    def __init__(
        self,
        model: torch.nn.Module,
        forward: Callable[[torch.nn.Module, Any], torch.Tensor] | None,
    ) -> None:
        super().__init__()
        # The flag only, not .train(): that would set the mode of the user's modules.
        self.training = model.training
        self.model = model
        self._user_forward = forward

    def forward(self, inputs: Any) -> Any:
        if self._user_forward is not None:
            return self._user_forward(self.model, inputs)
        if isinstance(inputs, Mapping):
            outputs = self.model(**inputs)
        elif isinstance(inputs, tuple):
            outputs = self.model(*inputs)
        else:
            outputs = self.model(inputs)
        return (
            outputs if isinstance(outputs, torch.Tensor) else getattr(outputs, "logits", outputs)
        )


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the random states of Python, NumPy and PyTorch, on all devices, on exit."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    initialised = torch.cuda.is_initialized()
    devices = range(torch.cuda.device_count()) if initialised else []
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def preserved_attributes(model: torch.nn.Module) -> Iterator[None]:
    """Restore the attributes and buffers of all modules on exit, which a forward pass may set."""
    saved = [(vars(m), dict(vars(m)), dict(m._buffers)) for m in model.modules()]
    try:
        yield
    finally:
        for attributes, before, buffers in saved:
            for key in attributes.keys() - before.keys():
                del attributes[key]
            attributes.update(before)
            attributes["_buffers"].clear()
            attributes["_buffers"].update(buffers)


@contextmanager
def cudnn_for(model: torch.nn.Module, device: torch.device, training: bool) -> Iterator[None]:
    """Make cuDNN compute in single precision, and turn it off if the model has recurrent layers.

    Nothing is changed on other devices than CUDA, or with ``training``, to time a training step.
    """
    if device.type != "cuda" or training:
        yield
        return
    cudnn: Any = torch.backends.cudnn
    # By default convolutions round their inputs to ten bits (TF32), which is not single precision.
    # From PyTorch 2.9 on each operation has a setting, which must not be mixed with the older one.
    changes: list[tuple[Any, str, Any]] = [(cudnn, "allow_tf32", False)]
    if hasattr(cudnn, "conv"):
        changes = [(cudnn.conv, "fp32_precision", "ieee")]
    # The backward pass of cuDNN's recurrent layers only exists in training mode.
    if any(isinstance(m, torch.nn.RNNBase) for m in model.modules()):
        changes.append((cudnn, "enabled", False))
    before = [getattr(owner, name) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(changes, before, strict=True):
            setattr(owner, name, value)
