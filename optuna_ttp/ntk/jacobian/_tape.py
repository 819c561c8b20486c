"""The tape, which records arguments, outputs and graph edges of the calls of layers."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from contextlib import ExitStack
from dataclasses import dataclass
from dataclasses import replace
from typing import Any
from typing import TYPE_CHECKING
from typing import TypeAlias

import torch
from torch.autograd.graph import get_gradient_edge

from optuna_ttp.ntk.layers._call import Call
from optuna_ttp.task import map_tensors
from optuna_ttp.task import tensors_of


if TYPE_CHECKING:
    from optuna_ttp.task import FrozenModel


Gradients: TypeAlias = "tuple[torch.Tensor | None, ...]"
"""The gradients of :func:`torch.autograd.grad`, None for inputs that no output depends on."""

Cotangents: TypeAlias = "dict[str, list[list[list[torch.Tensor]]]]"
"""By module name: lists by call, by output tensor of the call, and by class, of cotangents."""


@dataclass(frozen=True, eq=False)
class Recording:
    """One batch: outputs ``(B, C)`` with their graph, and the calls of each module, in order."""

    outputs: torch.Tensor
    calls: dict[str, list[Call]]

    def cotangents(
        self,
        directions: list[torch.Tensor],
        *,
        batched: bool = False,
        retain_graph: bool = False,
    ) -> Cotangents:
        """Differentiate the outputs by the outputs of every call, in each direction ``(B, C)``.

        Returns lists by module, call, output tensor and direction. One backward pass per direction
        gives the cotangents of all samples, because samples do not mix; gradients of parameters
        are not computed. With ``batched`` one pass is vectorised over all directions.
        ``retain_graph`` is as in :func:`torch.autograd.grad`.
        """
        edges = [e for calls in self.calls.values() for call in calls for e in call.edges]
        shapes = [s for calls in self.calls.values() for call in calls for s in call.shapes]
        columns: list[list[torch.Tensor]] = [[] for _ in edges]
        if not edges:
            return {name: [] for name in self.calls}
        if batched:
            gradients: Gradients = torch.autograd.grad(
                self.outputs,
                edges,
                torch.stack(directions),
                is_grads_batched=True,
                # If this pass fails, single passes must still be possible.
                retain_graph=True,
                allow_unused=True,
            )
            for column, gradient, shape in zip(columns, gradients, shapes, strict=True):
                column.extend(
                    self.outputs.new_zeros((len(directions), *shape))
                    if gradient is None
                    else gradient
                )
        else:
            for k, direction in enumerate(directions):
                # The sum is a scalar: given weights of outputs, PyTorch would first load a
                # computer algebra system.
                singles: Gradients = torch.autograd.grad(
                    (self.outputs * direction).sum(),
                    edges,
                    retain_graph=retain_graph or k + 1 < len(directions),
                    allow_unused=True,
                )
                for column, one, shape in zip(columns, singles, shapes, strict=True):
                    column.append(self.outputs.new_zeros(shape) if one is None else one)
        remaining: Iterator[list[torch.Tensor]] = iter(columns)
        return {
            name: [[next(remaining) for _ in call.edges] for call in calls]
            for name, calls in self.calls.items()
        }


def join_classes(gathered: Cotangents, module: str, more: list[list[list[torch.Tensor]]]) -> None:
    """Append the cotangents of more classes to those of a module in ``gathered``, in place."""
    if module not in gathered:
        gathered[module] = more
        return
    for call, call_more in zip(gathered[module], more, strict=True):
        for output, output_more in zip(call, call_more, strict=True):
            output.extend(output_more)


class Tape:
    """Records the calls of chosen modules while the network runs.

    ``watched`` has the names of these modules, with True if an output that all samples share (a
    position embedding) is replaced by one copy per sample. The inputs of the modules ``copied``
    are copied, because later operations overwrite them. ``shared`` tells, by module and number of
    the call, whether all samples share its output; the tape adds missing entries.
    """

    def __init__(
        self,
        frozen: FrozenModel,
        watched: Mapping[str, bool],
        copied: frozenset[str] = frozenset(),
        shared: dict[tuple[str, int], bool] | None = None,
    ) -> None:
        self._frozen = frozen
        self._watched = dict(watched)
        self._copied = copied
        self._shared = {} if shared is None else shared
        self._n_calls: dict[str, int] = {}
        self._begun: dict[str, list[_Begun]] = {}
        self._calls: dict[str, list[Call]] | None = None
        self._batch_size = 0

    @contextmanager
    def attached(self) -> Iterator[Tape]:
        """Register the hooks on the modules, and remove them at the end."""
        modules = dict(self._frozen.adapter.named_modules(remove_duplicate=False))
        with ExitStack() as stack:
            for name, expand in self._watched.items():
                before = modules[name].register_forward_pre_hook(
                    self._pre_hook(name), with_kwargs=True
                )
                stack.callback(before.remove)
                after = modules[name].register_forward_hook(
                    self._hook(name, expand), with_kwargs=True
                )
                stack.callback(after.remove)
            yield self

    def record(self, inputs: Any, batch_size: int) -> Recording:
        """Run the network on a batch of ``batch_size`` samples; return its outputs and calls."""
        self._calls = {name: [] for name in self._watched}
        self._n_calls = dict.fromkeys(self._watched, 0)
        self._begun = {name: [] for name in self._watched}
        self._batch_size = batch_size
        try:
            outputs = self._frozen(inputs)
            return Recording(outputs, self._calls)
        finally:
            self._calls = None

    def _pre_hook(self, name: str) -> Callable[..., None]:
        """Return a forward pre-hook that stores arguments and state of a call."""

        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._calls is None:
                return

            def held(tensor: torch.Tensor) -> torch.Tensor:
                return tensor.detach().clone() if name in self._copied else tensor.detach()

            # The state is taken now, because the module may write to its arguments and buffers.
            held_args, held_kwargs = map_tensors((args, dict(kwargs)), held, keep_types=True)
            state = {
                **dict(module.named_parameters(remove_duplicate=False)),
                **dict(module.named_buffers(remove_duplicate=False)),
            }
            versions = tuple(t._version for t in tensors_of((held_args, held_kwargs)))
            self._begun[name].append(_Begun(held_args, held_kwargs, state, versions))

        return hook

    def _hook(self, name: str, expand: bool) -> Callable[..., Any]:
        """Return a forward hook that records a call, and replaces an output that samples share."""

        def hook(
            module: torch.nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any
        ) -> Any:
            if self._calls is None:
                return None
            replaced = None
            begun = self._begun[name].pop()
            key = (name, self._n_calls[name])
            self._n_calls[name] += 1
            if expand and isinstance(output, torch.Tensor) and self._is_shared(key, output):
                with_samples = output if len(output) == 1 else output[None]
                output = replaced = with_samples.expand(self._batch_size, *with_samples.shape[1:])
                args, kwargs = self._expanded(begun.args, begun.kwargs)
                begun = replace(begun, args=args, kwargs=kwargs)
            call = self._call(name, module, begun, output)
            if call is not None:
                self._calls[name].append(call)
            return replaced

        return hook

    def _is_shared(self, key: tuple[str, int], output: torch.Tensor) -> bool:
        """Return whether all samples share the output of a call, as decided at its first batch.

        The length of its first axis may equal the size of a later batch by chance.
        """
        if key not in self._shared:
            self._shared[key] = len(output) != self._batch_size
        return self._shared[key]

    def _expanded(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with one copy per sample of the first tensor."""
        remaining = [True]

        def expand(tensor: torch.Tensor) -> torch.Tensor:
            if not remaining:
                return tensor
            remaining.clear()
            with_samples = tensor if len(tensor) == 1 else tensor[None]
            return with_samples.expand(self._batch_size, *with_samples.shape[1:])

        return map_tensors((args, kwargs), expand, keep_types=True)  # type: ignore[no-any-return]

    def _call(self, name: str, module: torch.nn.Module, begun: _Begun, output: Any) -> Call | None:
        """Return the record of a call, or :obj:`None` if no output carries a gradient."""
        tensors = tensors_of(output)
        positions = tuple(i for i, t in enumerate(tensors) if t.requires_grad)
        if not positions:
            return None
        return Call(
            module=module,
            batch_size=self._batch_size,
            args=begun.args,
            kwargs=begun.kwargs,
            state=begun.state,
            positions=positions,
            edges=tuple(get_gradient_edge(tensors[i]) for i in positions),
            shapes=tuple(tensors[i].shape for i in positions),
            versions=begun.versions,
            is_copied=name in self._copied,
        )


@dataclass(frozen=True, eq=False)
class _Begun:
    """A call that has not returned; :class:`Call` explains the fields."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: dict[str, torch.Tensor]
    versions: tuple[int, ...]
