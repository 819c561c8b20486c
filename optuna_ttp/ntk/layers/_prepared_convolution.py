"""The rule of subclasses of convolutions that first change their inputs, as by uneven padding."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from torch.overrides import TorchFunctionMode

from optuna_ttp._util.exceptions import JacobianMismatchError
from optuna_ttp.ntk.layers._call import Call
from optuna_ttp.ntk.layers._rule import convolution_gradients
from optuna_ttp.ntk.layers._rule import Unsummed
from optuna_ttp.task import functional_call


def prepared_convolution(call: Call, cotangents: list[torch.Tensor]) -> dict[str, Unsummed]:
    """Return the gradients of a module that changes its inputs and then convolves them once."""
    inputs = call.cached("convolved", partial(_convolved, call))
    return convolution_gradients(call, inputs, cotangents, (), "zeros")


def _convolved(call: Call) -> torch.Tensor:
    """Run the module; return the padded tensor that it convolves with its own weight.

    JacobianMismatchError is raised if its output is not one convolution with its own settings.
    """
    module: Any = call.module
    state = {name: tensor.detach() for name, tensor in call.state.items()}
    with torch.no_grad(), _Convolutions(call.shapes[0]) as seen:
        output = functional_call(module, state, call.args, call.kwargs)
    n_axes = len(module.kernel_size)
    if len(seen.arguments) != 1 or seen.outputs[0] is not output:
        raise JacobianMismatchError("The output of the module is not that of one convolution.")
    (arguments,) = seen.arguments
    if arguments["weight"] is not state["weight"] or isinstance(arguments.get("padding"), str):
        raise JacobianMismatchError("The module convolves with another weight or padding.")
    for name in ("stride", "dilation"):
        if _per_axis(arguments.get(name, 1), n_axes) != _per_axis(getattr(module, name), n_axes):
            raise JacobianMismatchError(f"The module convolves with another {name}.")
    padding = _per_axis(arguments.get("padding", 0), n_axes)
    inputs = functional.pad(arguments["input"], [p for p in reversed(padding) for _ in (0, 1)])
    return inputs.to(call.dtype)


def _per_axis(value: Any, n_axes: int) -> list[int]:
    """Return a setting of a convolution as a list of one number per axis."""
    return [value] * n_axes if isinstance(value, int) else list(value)


class _Convolutions(TorchFunctionMode):
    """Records the arguments of convolutions and returns empty outputs of the shape it is given."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self._shape = shape
        self.arguments: list[dict[str, Any]] = []
        self.outputs: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (functional.conv1d, functional.conv2d, functional.conv3d):
            # Only the arguments are of interest, and the convolution is most of the work.
            result = args[0].new_empty(self._shape)
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            self.arguments.append({**dict(zip(names, args, strict=False)), **(kwargs or {})})
            self.outputs.append(result)
            return result
        return func(*args, **(kwargs or {}))
