"""How each kind of layer makes the gradients of its parameters from its inputs and cotangents.

A rule knows the mathematics of a layer and nothing of hooks. Index conventions: ``b`` samples,
``c`` outputs of the network, ``g`` groups, ``o`` outputs of the layer in a group, ``k`` inputs
(fan-in) in a group, ``s`` positions (tokens, pixels).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from typing import TypeAlias

import torch
import torch.nn.functional as functional
from torch.overrides import TorchFunctionMode

from optuna_ttp._util.exceptions import JacobianMismatchError
from optuna_ttp.ntk.layers._call import Call
from optuna_ttp.ntk.layers._factors import Factors
from optuna_ttp.task import functional_call


Contribution: TypeAlias = "Factors | torch.Tensor"
"""The gradient of one parameter: factors, or rows of shape ``(B, C, p)``."""

Rule: TypeAlias = Callable[[Call, list[torch.Tensor]], dict[str, Contribution]]
"""From a call and the cotangent of its output for each class to the gradients by name."""


def rule_for(module: torch.nn.Module) -> Rule | None:
    """Return the rule of a layer, or nothing where only a local derivative will do.

    Args:
        module:
            Any module. A subclass counts as its base where it computes the same: it has the
            base's ``forward`` and plain parameters.

    Returns:
        The rule.
    """
    for kind, rule in _RULES:
        if isinstance(module, kind):
            if not _is_plain(module):
                return None
            if _computes_like(module, kind):
                return rule
            return _prepared_convolution if rule is _convolution else None
    # Hugging Face's own class, which need not be installed.
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return _conv1d_of_transformers
    return None


def _computes_like(module: torch.nn.Module, kind: type[Any]) -> bool:
    for name in ("forward", "_conv_forward"):
        if getattr(type(module), name, None) is not getattr(kind, name, None):
            return False
    return all(name in module._parameters for name in ("weight", "bias") if hasattr(kind, name))


def _is_plain(module: torch.nn.Module) -> bool:
    if getattr(module, "parametrizations", None) is not None or "weight" not in module._parameters:
        return False
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        return module.running_mean is not None
    if isinstance(module, torch.nn.Embedding):
        # A largest norm changes the weights before they are used, not the derivative in them.
        return not module.scale_grad_by_freq
    return True


def _wanted(call: Call) -> set[str]:
    return {n for n, t in call.state.items() if t.requires_grad}


def _linear(call: Call, cotangents: list[torch.Tensor]) -> dict[str, Contribution]:
    """``y_s = W x_s + b``."""
    x = call.input.flatten(1, -2) if call.input.ndim > 2 else call.input[:, None]
    parts = [d.flatten(1, -2) if d.ndim > 2 else d[:, None] for d in cotangents]
    d = _stacked([p.transpose(1, 2) for p in parts], 1)[:, None]
    return _weight_and_bias(call, x, _tokens, d, x.shape[-1])


def _conv1d_of_transformers(call: Call, cotangents: list[torch.Tensor]) -> dict[str, Contribution]:
    """A linear layer whose weight is laid out as (inputs, outputs)."""
    x = call.input.flatten(1, -2) if call.input.ndim > 2 else call.input[:, None]
    parts = [d.flatten(1, -2) if d.ndim > 2 else d[:, None] for d in cotangents]
    d = _stacked([p.transpose(1, 2) for p in parts], 1)[:, None]
    return _weight_and_bias(call, x, _tokens, d, x.shape[-1], transposed=True)


def _convolution(call: Call, cotangents: list[torch.Tensor]) -> dict[str, Contribution]:
    """A linear layer on unfolded inputs, for each group of channels."""
    module: Any = call.module
    groups = module.groups
    d = _stacked([t.flatten(2).unflatten(1, (groups, -1)) for t in cotangents], 2)
    unfold = partial(
        _unfolded,
        kernel=module.kernel_size,
        stride=module.stride,
        dilation=module.dilation,
        padding=tuple(module._reversed_padding_repeated_twice),
        mode=module.padding_mode,
        groups=groups,
    )
    n_rows = call.state["weight"][0].numel()
    return _weight_and_bias(call, call.input, unfold, d, n_rows)


def _prepared_convolution(call: Call, cotangents: list[torch.Tensor]) -> dict[str, Contribution]:
    """A convolution that first does something to its inputs, such as uneven padding."""
    module: Any = call.module
    d = _stacked([t.flatten(2).unflatten(1, (module.groups, -1)) for t in cotangents], 2)
    unfold = partial(
        _unfolded,
        kernel=module.kernel_size,
        stride=tuple(module.stride),
        dilation=module.dilation,
        padding=(),
        mode="zeros",
        groups=module.groups,
    )
    inputs = call.cached("convolved", partial(_convolved, call))
    return _weight_and_bias(call, inputs, unfold, d, call.state["weight"][0].numel())


def _convolved(call: Call) -> torch.Tensor:
    """What a module convolves with its own weight to get its output, padded.

    Raises:
        JacobianMismatchError:
            If it does anything else.
    """
    module: Any = call.module
    state = {name: tensor.detach() for name, tensor in call.state.items()}
    with torch.no_grad(), _Convolutions() as seen:
        output = functional_call(module, state, call.args, call.kwargs)
    found, n_axes = seen.arguments, len(module.kernel_size)
    if len(found) != 1 or seen.outputs[0] is not output:
        raise JacobianMismatchError("The output of the module is not that of one convolution.")
    if found[0]["weight"] is not state["weight"] or isinstance(found[0].get("padding"), str):
        raise JacobianMismatchError("The module convolves with another weight or padding.")
    for name in ("stride", "dilation"):
        if _per_axis(found[0].get(name, 1), n_axes) != _per_axis(getattr(module, name), n_axes):
            raise JacobianMismatchError(f"The module convolves with another {name}.")
    sizes = _per_axis(found[0].get("padding", 0), n_axes)
    inputs = functional.pad(found[0]["input"], [p for p in reversed(sizes) for _ in (0, 1)])
    return inputs.to(call.dtype)


def _per_axis(value: Any, n_axes: int) -> list[int]:
    return [value] * n_axes if isinstance(value, int) else list(value)


class _Convolutions(TorchFunctionMode):
    """Sees the convolutions that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: list[dict[str, Any]] = []
        self.outputs: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (functional.conv1d, functional.conv2d, functional.conv3d):
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            self.arguments.append({**dict(zip(names, args, strict=False)), **(kwargs or {})})
            self.outputs.append(result)
        return result


def _transposed_convolution(call: Call, cotangents: list[torch.Tensor]) -> dict[str, Contribution]:
    """The roles are exchanged: the cotangents are unfolded, and the inputs are the outputs.

    ``y = conv_transpose(x, W)`` is linear in both; its derivative with respect to ``W`` in the
    direction of a cotangent ``d`` is that of the convolution of ``d`` with ``W``, read at ``x``.
    """
    module: Any = call.module
    groups = module.groups
    bias = {}
    if "bias" in _wanted(call):
        bias["bias"] = torch.stack([t.flatten(2).sum(2) for t in cotangents], 1)
    if "weight" not in _wanted(call):
        return dict(bias)
    n_spatial = len(module.kernel_size)
    padding = [p for p in reversed(module.padding) for _ in (0, 1)]
    x = call.input
    unfolded = []
    for t in cotangents:
        u = _unfolded(
            t,
            kernel=module.kernel_size,
            stride=module.stride,
            dilation=module.dilation,
            padding=tuple(padding),
            mode="constant",
            groups=groups,
            n_positions=tuple(x.shape[-n_spatial:]),
        )
        unfolded.append(u)
    d = _stacked(unfolded, 2)
    inputs = partial(_grouped, groups=groups)
    # The weight is laid out as (inputs, outputs / groups, kernel): (G, k, o) here.
    n_rows = x.shape[1] // groups
    weight = Factors((x,), inputs, (d,), n_rows, transposed=True, caches=(call.cache,))
    return {"weight": weight, **bias}


def _embedding(call: Call, cotangents: list[torch.Tensor]) -> dict[str, Contribution]:
    """``y_s = W[i_s]``: a linear layer whose inputs are one-hot."""
    module: Any = call.module
    ids = call.input.flatten(1) if call.input.ndim > 1 else call.input[:, None]
    parts = [t.flatten(1, -2) if t.ndim > 2 else t[:, None] for t in cotangents]
    d = _stacked([p.transpose(1, 2) for p in parts], 1)[:, None]
    if module.padding_idx is not None:
        d = d * (ids != module.padding_idx)[:, None, None, None]
    n_rows = len(call.state["weight"])
    return {"weight": Factors((ids,), None, (d,), n_rows, caches=(call.cache,))}


def _batch_norm(call: Call, cotangents: list[torch.Tensor]) -> dict[str, Contribution]:
    """With frozen statistics: ``y = w (x - mean) / sqrt(variance + eps) + b`` by channel."""
    module: Any = call.module
    x = call.input.flatten(2) if call.input.ndim > 2 else call.input[..., None]
    state = call.state

    def make() -> torch.Tensor:
        scale = (state["running_var"] + module.eps).rsqrt()
        normalised: torch.Tensor = (x - state["running_mean"][:, None]) * scale[:, None]
        return normalised

    normalised = call.cached("normalised", make)
    parts = [t.flatten(2) if t.ndim > 2 else t[..., None] for t in cotangents]
    return _scale_and_shift(call, normalised, parts, sum_over=(2,))


def _channel_norm(
    normalise: Callable[[Any, torch.Tensor], torch.Tensor],
    call: Call,
    cotangents: list[torch.Tensor],
) -> dict[str, Contribution]:
    """Statistics of each sample, then one weight a channel."""
    normalised = call.cached("normalised", lambda: normalise(call.module, call.input).flatten(2))
    parts = [t.reshape(normalised.shape) for t in cotangents]
    return _scale_and_shift(call, normalised, parts, sum_over=(2,))


def _group_normalised(module: Any, x: torch.Tensor) -> torch.Tensor:
    x = x[..., None] if x.ndim == 2 else x
    return functional.group_norm(x, module.num_groups, None, None, module.eps)


def _instance_normalised(module: Any, x: torch.Tensor) -> torch.Tensor:
    return functional.instance_norm(x, eps=module.eps)


def _token_norm(
    normalise: Callable[..., torch.Tensor], call: Call, cotangents: list[torch.Tensor]
) -> dict[str, Contribution]:
    """Statistics of each token, then one weight an element."""
    module: Any = call.module
    shape = tuple(module.normalized_shape)
    normalised = call.cached("normalised", lambda: normalise(call.input, shape, eps=module.eps))
    lead = tuple(range(1, call.input.ndim - len(shape)))
    return _scale_and_shift(call, normalised, cotangents, sum_over=lead)


def _scale_and_shift(
    call: Call,
    normalised: torch.Tensor,
    cotangents: list[torch.Tensor],
    *,
    sum_over: tuple[int, ...],
) -> dict[str, Contribution]:
    """``y = w x + b`` by element: ``sum_s d_s x_s`` and ``sum_s d_s``."""

    def rows(values: list[torch.Tensor]) -> torch.Tensor:
        sums = [v.sum(sum_over) if sum_over else v for v in values]
        return torch.stack([s.flatten(1) for s in sums], 1)

    contributions: dict[str, Contribution] = {}
    wanted = _wanted(call)
    if "weight" in wanted:
        contributions["weight"] = rows([d * normalised for d in cotangents])
    if "bias" in wanted:
        contributions["bias"] = rows(cotangents)
    return contributions


def _weight_and_bias(
    call: Call,
    source: torch.Tensor,
    expand: Callable[[torch.Tensor], torch.Tensor],
    d: torch.Tensor,
    n_rows: int,
    *,
    transposed: bool = False,
) -> dict[str, Contribution]:
    contributions: dict[str, Contribution] = {}
    wanted = _wanted(call)
    if "weight" in wanted:
        contributions["weight"] = Factors(
            (source,), expand, (d,), n_rows, transposed, (call.cache,)
        )
    if "bias" in wanted:
        # (B, G, C, o) to (B, C, G o)
        contributions["bias"] = d.sum(-1).transpose(1, 2).flatten(2)
    return contributions


def _stacked(parts: list[torch.Tensor], axis: int) -> torch.Tensor:
    # A single one need not be copied.
    return parts[0].unsqueeze(axis) if len(parts) == 1 else torch.stack(parts, axis)


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """``(B, S, k)`` to ``(B, 1, k, S)``."""
    return x.transpose(1, 2)[:, None]


def _grouped(x: torch.Tensor, *, groups: int) -> torch.Tensor:
    """``(B, G k, ...)`` to ``(B, G, k, S)``."""
    return x.reshape(len(x), groups, x.shape[1] // groups, -1)


def _unfolded(
    x: torch.Tensor,
    *,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    padding: tuple[int, ...],
    mode: str,
    groups: int,
    n_positions: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """The patches that a convolution sees, ``(B, G, channels kernel, S)``; any number of axes."""
    if any(padding):
        x = functional.pad(x, padding, mode="constant" if mode == "zeros" else mode)
    if n_positions is not None:
        # A transposed convolution's output padding lets outputs hang over at the end.
        needed = [
            (n - 1) * s + (k - 1) * d + 1
            for n, s, k, d in zip(n_positions, stride, kernel, dilation, strict=True)
        ]
        ends = [n - have for n, have in zip(needed, x.shape[2:], strict=True)]
        if any(ends):
            x = functional.pad(x, [v for e in reversed(ends) for v in (0, e)])
    n_axes = len(kernel)
    # Copied once, several times as fast as torch.nn.functional.unfold.
    x = x.contiguous()
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.unfold(axis, (k - 1) * d + 1, s)[..., ::d]
    # (B, channels, positions..., kernel...)
    order = (0, 1, *range(2 + n_axes, 2 + 2 * n_axes), *range(2, 2 + n_axes))
    patches = x.permute(order)
    batch, channels = patches.shape[:2]
    return patches.reshape(batch, groups, channels // groups * _product(kernel), -1)


def _product(sizes: tuple[int, ...]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


_RULES: list[tuple[type[Any], Rule]] = [
    (torch.nn.Linear, _linear),
    (torch.nn.Conv1d, _convolution),
    (torch.nn.Conv2d, _convolution),
    (torch.nn.Conv3d, _convolution),
    (torch.nn.ConvTranspose1d, _transposed_convolution),
    (torch.nn.ConvTranspose2d, _transposed_convolution),
    (torch.nn.ConvTranspose3d, _transposed_convolution),
    (torch.nn.Embedding, _embedding),
    (torch.nn.BatchNorm1d, _batch_norm),
    (torch.nn.BatchNorm2d, _batch_norm),
    (torch.nn.BatchNorm3d, _batch_norm),
    (torch.nn.GroupNorm, partial(_channel_norm, _group_normalised)),
    (torch.nn.InstanceNorm1d, partial(_channel_norm, _instance_normalised)),
    (torch.nn.InstanceNorm2d, partial(_channel_norm, _instance_normalised)),
    (torch.nn.InstanceNorm3d, partial(_channel_norm, _instance_normalised)),
    (torch.nn.LayerNorm, partial(_token_norm, functional.layer_norm)),
]
if hasattr(torch.nn, "RMSNorm"):
    _RULES.append((torch.nn.RMSNorm, partial(_token_norm, functional.rms_norm)))
