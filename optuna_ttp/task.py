"""What is fine-tuned: a model, its data and its loss, checked and named by a fingerprint."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
import copy
from dataclasses import asdict
import functools
import hashlib
import json
import math
import random
import re
from types import CodeType
from types import FunctionType
from types import MethodType
from typing import Any
import warnings

import numpy as np
from numpy.typing import NDArray
import torch
from torch.utils.data import DataLoader
from torch.utils.data import default_collate
from torch.utils.data import IterableDataset
from torch.utils.data import TensorDataset

from optuna_ttp.exceptions import DataOrderWarning
from optuna_ttp.loss import Loss


# Samples that are read together; part of the fingerprint, because a collate function may pad.
_READ_SIZE = 64
_LABEL_KEYS = ("labels", "label")
_PLAIN = (bool, int, float, str, type(None))


class FineTuningTask:
    """A pretrained model, the data it is fine-tuned on, and the loss.

    The model is only ever looked at: its mode, gradients, buffers, device and the random state of
    the process are the same after every call, also after an exception. Batch-norm statistics and
    dropout are frozen while we look (evaluation mode), as in the paper. All parameters with
    ``requires_grad`` count as trainable.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> task = FineTuningTask(model, (x, y), loss="cross_entropy")
        >>> task.n_samples, task.n_outputs, task.n_parameters
        (8, 2, 8)

    Args:
        model:
            A :class:`torch.nn.Module` that gives outputs of shape ``(batch, C)``.
        data:
            A map-style data set, a :class:`~torch.utils.data.DataLoader` over one, or a pair of
            tensors (inputs, targets). An item is (inputs..., target), or a mapping with the key
            ``"labels"`` or ``"label"``. It must give the same items every time it is read: turn
            random augmentation off. The samples are taken in the order of the data set; a loader
            that shuffles is read in order, with a
            :class:`~optuna_ttp.exceptions.DataOrderWarning`.
        loss:
            ``"cross_entropy"`` (the default), ``"mse"``, or the torch loss module; label smoothing
            and class weights are respected. Class indices of shape ``(N,)`` are the targets of the
            cross-entropy, floats of shape ``(N, C)`` those of the mean squared error.
        forward:
            ``forward(model, inputs)`` gives the ``(batch, C)`` outputs. By default a mapping is
            passed as keyword arguments, several inputs as positional ones, and the outputs are the
            model's tensor or its ``.logits``.
        name:
            A name for people to read. It is not part of the fingerprint. The class name of the
            model by default.
        validation_data:
            Samples that are not trained on, in any of the forms of ``data``. With them the
            validation loss and accuracy can be predicted. None by default.
        learning_rate_multipliers:
            From the beginning of parameters' names to what multiplies their learning rate, as
            parameter groups do: ``{"head.": 10.0}``. The longest beginning counts; one by default.

    Raises:
        TypeError:
            If an argument, or what the model returns, is of the wrong kind.
        ValueError:
            If the model has no trainable parameter, the data are empty, not finite or not
            reproducible, or the targets do not fit the loss and the outputs.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        data: Any,
        loss: str | torch.nn.Module | Loss = "cross_entropy",
        forward: Callable[[torch.nn.Module, Any], torch.Tensor] | None = None,
        name: str | None = None,
        validation_data: Any = None,
        learning_rate_multipliers: Mapping[str, float] | None = None,
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module but got {type(model).__name__}.")
        if forward is not None and not callable(forward):
            raise TypeError(f"forward must be callable but got {forward!r}.")
        self.model = _unwrap(model)
        self.forward = forward
        self.loss = Loss.from_user(loss)
        self.name = type(self.model).__name__ if name is None else name
        _check_parameters(self.model)
        with _preserved_random_state():
            self._dataset, self._indices, self._collate = _read_data_argument(data)
            self._check_reproducible()
            raw_targets, self._data_digest = self._read_all()
            self.n_outputs = self._check_outputs()
        self.targets = _check_targets(raw_targets, self.loss, self.n_outputs)
        self.multipliers = _multipliers(self.model, learning_rate_multipliers or {})
        self.validation = self._validation_task(validation_data)

    def __repr__(self) -> str:
        return (
            f"FineTuningTask(name={self.name!r}, n_samples={self.n_samples}, "
            f"n_outputs={self.n_outputs}, n_parameters={self.n_parameters}, "
            f"loss={self.loss.kind!r})"
        )

    @property
    def n_samples(self) -> int:
        """The number N of samples."""
        return len(self._indices)

    @property
    def n_parameters(self) -> int:
        """The number D of trainable weights."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, over weights, buffers, data, loss and how outputs are made.

        Computed from the model as it is now: training the model changes it.
        """
        digest = hashlib.sha256()
        header = {
            "model": f"{type(self.model).__module__}.{type(self.model).__qualname__}",
            "structure": _plain_repr(self.model),
            "loss": asdict(self.loss),
        }
        digest.update(json.dumps(header, sort_keys=True).encode())
        for name, module in self.model.named_modules():
            _hash_module_settings(digest, name, module)
        for name, parameter in self.model.named_parameters():
            _hash_tensor(digest, f"parameter {name} {parameter.requires_grad}", parameter)
        for name, buffer in self.model.named_buffers():
            _hash_tensor(digest, f"buffer {name}", buffer)
        _hash_function(digest, self.forward)
        digest.update(self._data_digest)
        # Only where they are used, so that older fingerprints stay.
        if any(factor != 1.0 for factor in self.multipliers.values()):
            digest.update(json.dumps(self.multipliers, sort_keys=True).encode())
        if self.validation is not None:
            digest.update(b"validation" + self.validation._data_digest)
        return digest.hexdigest()

    def subset(self, n_samples: int, *, seed: int = 0) -> FineTuningTask:
        """Return the same task on a random subset of its training samples.

        The subsets of one seed are nested.

        Args:
            n_samples:
                From 1 to N.
            seed:
                Of the draw.

        Returns:
            A new task.

        Raises:
            ValueError:
                If there are not so many samples.
        """
        if (
            isinstance(n_samples, bool)
            or not 1 <= n_samples <= self.n_samples
            or n_samples != int(n_samples)
        ):
            raise ValueError(
                f"n_samples must be from 1 to {self.n_samples}, the samples of the task, but got "
                f"{n_samples!r}."
            )
        chosen = np.random.default_rng(seed).permutation(self.n_samples)[: int(n_samples)]
        part = copy.copy(self)
        part._indices = [self._indices[i] for i in sorted(chosen)]
        with _preserved_random_state():
            raw_targets, part._data_digest = part._read_all()
        part.targets = _check_targets(raw_targets, self.loss, self.n_outputs)
        return part

    def batches(
        self, batch_size: int, device: torch.device, dtype: torch.dtype, *, start: int = 0
    ) -> Iterator[tuple[Any, Any]]:
        """Read the data in order.

        Args:
            batch_size:
                Samples a batch; the last batch may be smaller.
            device:
                Where the inputs go.
            dtype:
                What floating-point inputs are cast to.
            start:
                The first sample to read. The first one of all by default.

        Yields:
            (inputs, targets) as the collate function makes them.
        """
        for first in range(start, self.n_samples, batch_size):
            items = [self._dataset[i] for i in self._indices[first : first + batch_size]]
            inputs, targets = _split_batch(self._collate(items))
            yield _map_tensors(inputs, lambda t: _cast(t, device, dtype)), targets

    @contextmanager
    def frozen(
        self, device: torch.device, dtype: torch.dtype = torch.float32, *, training: bool = False
    ) -> Iterator[FrozenModel]:
        """Borrow the model: copies of its buffers, evaluation mode, random state kept.

        Args:
            device:
                Where to run.
            dtype:
                What floating-point parameters and buffers are cast to. Single precision by
                default.
            training:
                Run in training mode, as a training step does. Only timing needs it.

        Yields:
            The model as a function of its inputs and trainable parameters.
        """
        if device.type == "cuda":
            # Before that there is no random state of the device that could be kept.
            torch.cuda.init()
        with (
            _preserved_random_state(),
            _preserved_attributes(self.model),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cuda" if device.type == "cuda" else "cpu", enabled=False),
            _cudnn_for(self.model, device, training),
        ):
            for module in self.model.modules():
                module.training = training
            yield FrozenModel(self.model, self.forward, device, dtype)

    def initial_outputs(
        self, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> NDArray[np.float64]:
        """Return the outputs of the pretrained model, of shape ``(N, C)``.

        Raises:
            ValueError:
                If an output is NaN or infinite.
        """
        with self.frozen(device, dtype) as frozen, torch.no_grad():
            parts: list[torch.Tensor] = []
            for inputs, _ in self.batches(_READ_SIZE, device, dtype):
                part = frozen(inputs)
                n_expected = min(_READ_SIZE, self.n_samples - _READ_SIZE * len(parts))
                _check_output_shape(part, n_expected, self.n_outputs)
                parts.append(part.double().cpu())
            outputs = torch.cat(parts).numpy()
        bad = np.flatnonzero(~np.isfinite(outputs).all(axis=1))
        if len(bad):
            raise ValueError(
                f"The model's outputs must be finite but got NaN or infinity for {len(bad)} of "
                f"{len(outputs)} samples, the first one sample {bad[0]}."
            )
        return outputs

    def _validation_task(self, data: Any) -> FineTuningTask | None:
        if data is None:
            return None
        try:
            task = FineTuningTask(self.model, data, self.loss, self.forward)
        except (TypeError, ValueError) as error:
            raise type(error)(f"validation_data: {error}") from error
        if task.n_outputs != self.n_outputs:
            raise ValueError(
                f"validation_data must lead to {self.n_outputs} outputs, like the training data, "
                f"but got {task.n_outputs}."
            )
        return task

    def _check_reproducible(self) -> None:
        # Augmentation often changes an item with probability one half, so several are read twice.
        for i in self._indices[:: max(1, self.n_samples // 8)][:8]:
            pair = []
            for _ in range(2):
                digest = hashlib.sha256()
                _hash_value(digest, self._dataset[i])
                pair.append(digest.digest())
            if pair[0] != pair[1]:
                raise ValueError(
                    f"The data must be the same every time they are read, but sample {i} differed "
                    "between two reads. Turn random augmentation off for the task (the paper does "
                    "so too: it improves the prediction)."
                )

    def _read_all(self) -> tuple[list[Any], bytes]:
        digest = hashlib.sha256()
        targets = []
        n_read = 0
        for inputs, batch_targets in self.batches(
            _READ_SIZE, torch.device("cpu"), torch.get_default_dtype()
        ):
            _check_finite_inputs(inputs, n_read)
            _hash_value(digest, inputs)
            _hash_value(digest, batch_targets)
            targets.append(batch_targets)
            n_read += _READ_SIZE
        return targets, digest.digest()

    def _check_outputs(self) -> int:
        first = next(self.model.parameters())
        device = first.device
        with self.frozen(device, torch.float32) as frozen, torch.no_grad():
            n_probe = min(2, self.n_samples)
            inputs, _ = next(self.batches(n_probe, device, torch.float32))
            outputs, again = frozen(inputs), frozen(inputs)
        _check_output_shape(outputs, n_probe, None)
        if not torch.isfinite(outputs).all():
            raise ValueError("The model's outputs must be finite but got NaN or infinity.")
        deviation = float((outputs - again).abs().max())
        if deviation > 1e-3 * float(outputs.abs().max()) + 1e-5:
            raise ValueError(
                "The model's outputs must be the same every time in evaluation mode but differed "
                f"by {deviation:.2g} between two calls. Does it call functional.dropout without "
                "training=self.training, or draw other random numbers?"
            )
        return int(outputs.shape[1])


class FrozenModel:
    """The outputs as a function of inputs and trainable parameters; see ``FineTuningTask.frozen``.

    Args:
        model:
            The user's module, already in the mode to run in.
        forward:
            The user's adapter, or :obj:`None`.
        device:
            Where to run.
        dtype:
            What floating-point tensors are cast to.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        forward: Callable[[torch.nn.Module, Any], torch.Tensor] | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._adapter = _Adapter(model, forward)
        self._state: dict[str, torch.Tensor] = {}
        self.parameters: dict[str, torch.Tensor] = {}
        for name, buffer in self._adapter.named_buffers():
            # A copy, because some modules write to their buffers even in evaluation mode.
            self._state[name] = _cast(buffer.detach(), device, dtype).clone()
        for name, parameter in self._adapter.named_parameters():
            value = _cast(parameter.detach(), device, dtype)
            if parameter.requires_grad:
                value = value.requires_grad_()
                self.parameters[name] = value
            self._state[name] = value

    def replace_parameters(self, parameters: dict[str, torch.Tensor]) -> None:
        """Use other trainable parameters from now on; the user's model is not touched.

        Args:
            parameters:
                A tensor for each name in :attr:`parameters`.
        """
        self.parameters = parameters
        self._state.update(parameters)

    def __call__(self, inputs: Any) -> torch.Tensor:
        """Return the outputs, of shape ``(batch, C)``, for a batch of inputs."""
        outputs = torch.func.functional_call(self._adapter, self._state, (inputs,))
        if not isinstance(outputs, torch.Tensor) or not outputs.is_floating_point():
            kind = outputs.dtype if isinstance(outputs, torch.Tensor) else type(outputs).__name__
            raise TypeError(
                "The model must give a floating-point tensor of shape (batch, C) but got "
                f"{kind}. Pass forward=lambda model, inputs: ... to pick the outputs."
            )
        return outputs


class _Adapter(torch.nn.Module):
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


def _check_output_shape(outputs: torch.Tensor, n_samples: int, n_outputs: int | None) -> None:
    shape = tuple(outputs.shape)
    if len(shape) != 2 or shape[0] != n_samples or shape[1] != (n_outputs or shape[1]):
        raise ValueError(
            f"The model must give outputs of shape (batch, {n_outputs or 'C'}) but got {shape} "
            f"for a batch of {n_samples}. Pass forward= to adapt them."
        )


def _unwrap(model: torch.nn.Module) -> torch.nn.Module:
    if isinstance(model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
        model = model.module
    compiled_from = getattr(model, "_orig_mod", None)
    return compiled_from if isinstance(compiled_from, torch.nn.Module) else model


def _check_parameters(model: torch.nn.Module) -> None:
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise TypeError(
            "TorchScript modules are not supported, because their weights cannot be exchanged. "
            "Pass the module that was scripted or traced."
        )
    parameters = list(model.named_parameters())
    lazy = [n for n, p in parameters if isinstance(p, torch.nn.parameter.UninitializedParameter)]
    if lazy:
        raise ValueError(
            f"The model has uninitialised lazy parameters ({', '.join(lazy[:3])}). "
            "Run one batch through it first."
        )
    trainable = [(name, p) for name, p in parameters if p.requires_grad]
    if not trainable:
        raise ValueError(
            f"The model must have a trainable parameter but got {len(parameters)} parameters, "
            "none with requires_grad=True."
        )
    for name, parameter in parameters:
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise ValueError(f"The model's weights must be finite but {name!r} is not.")
        if parameter.is_complex():
            raise TypeError(f"Complex parameters are not supported but {name!r} is complex.")


def _multipliers(model: torch.nn.Module, given: Mapping[str, float]) -> dict[str, float]:
    """The learning-rate multiplier of each trainable parameter."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for start, factor in given.items():
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(
                f"learning_rate_multipliers must be positive but got {factor} for {start!r}. "
                "Use requires_grad_(False) for weights that are not trained."
            )
        if not any(name.startswith(start) for name in names):
            raise ValueError(
                "learning_rate_multipliers must be given for the beginning of a trainable "
                f"parameter's name but got {start!r}. Names are like {', '.join(names[:3])}."
            )
    multipliers = {}
    for name in names:
        fitting = [start for start in given if name.startswith(start)]
        multipliers[name] = float(given[max(fitting, key=len)]) if fitting else 1.0
    return multipliers


def _read_data_argument(data: Any) -> tuple[Any, list[int], Callable[[list[Any]], Any]]:
    if isinstance(data, DataLoader):
        if isinstance(data.dataset, IterableDataset):
            raise TypeError("data must be a map-style data set but got a loader over an iterable.")
        if data.batch_sampler is None:
            raise TypeError(
                "A loader with batch_size=None does not say what a sample is. Pass the data set."
            )
        return data.dataset, _loader_indices(data), data.collate_fn
    if isinstance(data, tuple | list) and len(data) == 2 and not _is_item_sequence(data):
        inputs, targets = data
        if not isinstance(inputs, torch.Tensor) or not isinstance(targets, torch.Tensor):
            raise TypeError(
                "A pair given as data must be two tensors (inputs, targets) but got "
                f"({type(inputs).__name__}, {type(targets).__name__})."
            )
        if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) != len(targets):
            raise ValueError(
                "The inputs and targets given as data must have one row a sample but got shapes "
                f"{tuple(inputs.shape)} and {tuple(targets.shape)}."
            )
        data = TensorDataset(inputs, targets)
    elif isinstance(data, tuple) and data and all(isinstance(d, torch.Tensor) for d in data):
        raise TypeError(
            "A tuple given as data must be a pair of tensors (inputs, targets) but got "
            f"{len(data)} tensors. Pass several inputs as TensorDataset(*inputs, targets)."
        )
    if isinstance(data, IterableDataset) or not (
        hasattr(data, "__getitem__") and hasattr(data, "__len__")
    ):
        raise TypeError(
            "data must be a map-style data set, a DataLoader over one, or a pair of tensors but "
            f"got {type(data).__name__}."
        )
    if isinstance(data, Mapping):
        raise TypeError("data must be a data set of samples but got a mapping of columns.")
    _check_not_empty(len(data))
    return data, list(range(len(data))), default_collate


def _is_item_sequence(data: Sequence[Any]) -> bool:
    """Tell a list of two (inputs, target) items from a pair of tensors."""
    return isinstance(data, list) and isinstance(data[0], tuple | Mapping)


def _check_not_empty(n_samples: int) -> None:
    if n_samples == 0:
        raise ValueError("The data must have at least one sample but got none.")


def _loader_indices(loader: DataLoader[Any]) -> list[int]:
    """The samples of a loader in a fixed order.

    Raises:
        ValueError:
            If the loader draws other samples each time it is read.
    """
    _check_not_empty(len(loader.dataset))  # type: ignore[arg-type]
    batch_sampler = loader.batch_sampler
    with _preserved_generators(loader, loader.sampler, batch_sampler):
        if batch_sampler is None or type(batch_sampler) is torch.utils.data.BatchSampler:
            reads = [[int(i) for i in loader.sampler] for _ in range(2)]
        else:
            reads = [[int(i) for batch in batch_sampler for i in batch] for _ in range(2)]
    first, second = reads
    if sorted(first) != sorted(second) or len(set(first)) != len(first):
        raise ValueError(
            "The data loader draws other samples every time it is read (sampling with "
            "replacement, or a random subset). Pass the data set itself."
        )
    _check_not_empty(len(first))
    if first == second:
        return first
    warnings.warn(
        "The data loader shuffles. Its samples were taken in the order of the data set instead, "
        "so that the spectrum can be found again; training may shuffle as before.",
        DataOrderWarning,
        stacklevel=4,
    )
    return sorted(first)


def _split_batch(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        for key in _LABEL_KEYS:
            if key in batch:
                return {k: v for k, v in batch.items() if k != key}, batch[key]
        raise ValueError(
            f"A mapping item must have its target under 'labels' or 'label' but got the keys "
            f"{sorted(map(str, batch))}."
        )
    if isinstance(batch, list | tuple) and len(batch) >= 2:
        *inputs, targets = batch
        return (inputs[0] if len(inputs) == 1 else tuple(inputs)), targets
    raise TypeError(
        f"A data item must be (inputs..., target) or a mapping but got {type(batch).__name__}."
    )


def _check_targets(batches: list[Any], loss: Loss, n_outputs: int) -> NDArray[Any]:
    if not all(isinstance(t, torch.Tensor) for t in batches):
        raise TypeError(
            f"The targets must be tensors or numbers but got {type(batches[0]).__name__}."
        )
    targets = torch.cat([t.detach().cpu() for t in batches])
    if loss.kind == "cross_entropy":
        return _check_labels(targets, loss, n_outputs)
    if n_outputs == 1 and targets.ndim == 1:
        targets = targets[:, None]
    if targets.shape[1:] != (n_outputs,):
        raise ValueError(
            f"The targets of the mean squared error must have shape (N, {n_outputs}), like the "
            f"outputs, but got {tuple(targets.shape)}."
        )
    if not targets.is_floating_point():
        raise TypeError(
            f"The targets of the mean squared error must be floats but got {targets.dtype}."
        )
    if not torch.isfinite(targets).all():
        raise ValueError("The targets must be finite but got NaN or infinity.")
    return targets.double().numpy()


def _check_labels(targets: torch.Tensor, loss: Loss, n_outputs: int) -> NDArray[np.int64]:
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.is_complex():
        raise TypeError(
            f"The targets of the cross-entropy must be class indices (integers) but got "
            f"{targets.dtype}."
        )
    if targets.ndim != 1:
        raise ValueError(
            f"The targets of the cross-entropy must have shape (N,) but got "
            f"{tuple(targets.shape)}."
        )
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= n_outputs:
        raise ValueError(
            f"The labels must be in 0..{n_outputs - 1} for a model with {n_outputs} outputs but "
            f"got labels from {low} to {high}."
        )
    if loss.class_weights is not None and len(loss.class_weights) != n_outputs:
        raise ValueError(
            f"The loss must have one class weight for each of the {n_outputs} outputs but got "
            f"{len(loss.class_weights)}."
        )
    labels: NDArray[np.int64] = targets.long().numpy()
    if loss.class_weights is not None and not np.array(loss.class_weights)[labels].any():
        raise ValueError("The classes that occur in the data all have the class weight zero.")
    return labels


def _check_finite_inputs(inputs: Any, n_read: int) -> None:
    def check(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(
                "The inputs must be finite but got NaN or infinity among samples "
                f"{n_read} to {n_read + _READ_SIZE - 1}."
            )
        return tensor

    _map_tensors(inputs, check)


def _cast(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)


def _map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {k: _map_tensors(v, function) for k, v in value.items()}
    if isinstance(value, list | tuple):
        mapped = [_map_tensors(v, function) for v in value]
        return type(value)(*mapped) if hasattr(value, "_fields") else type(value)(mapped)
    return value


def _hash_tensor(digest: hashlib._Hash, name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    contiguous = tensor.detach().cpu().contiguous()
    # Byte view, because numpy has no bfloat16.
    digest.update(contiguous.reshape(-1).view(torch.uint8).numpy().data)


def _hash_value(digest: hashlib._Hash, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        _hash_tensor(digest, "tensor", value)
    elif isinstance(value, np.ndarray):
        _hash_tensor(digest, "array", torch.from_numpy(np.ascontiguousarray(value)))
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"key {key}".encode())
            _hash_value(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"sequence {len(value)}".encode())
        for element in value:
            _hash_value(digest, element)
    elif isinstance(value, set | frozenset):
        # Their order differs between processes.
        digest.update(f"set {sorted(map(_plain_repr, value))}".encode())
    elif isinstance(value, CodeType):
        digest.update(value.co_code)
        _hash_value(digest, (value.co_names, value.co_consts))
    elif isinstance(value, FunctionType):
        _hash_value(digest, value.__code__)
    elif isinstance(value, torch.nn.Module):
        _hash_value(digest, (_plain_repr(value), value.state_dict()))
    else:
        digest.update(_plain_repr(value).encode())


def _plain_repr(value: Any) -> str:
    # Addresses in a printed form differ between processes.
    return re.sub(r"0x[0-9a-fA-F]+", "", repr(value))


def _hash_function(digest: hashlib._Hash, function: Callable[..., Any] | None) -> None:
    """Hash what a function does, as far as it can be seen, the same way in every process."""
    if isinstance(function, functools.partial):
        _hash_value(digest, ("partial", function.args, function.keywords))
        function = function.func
    if isinstance(function, MethodType):
        _hash_value(digest, _plain_attributes(function.__self__))
        function = function.__func__
    if callable(function) and not hasattr(function, "__qualname__"):
        _hash_value(digest, _plain_attributes(function))
        function = type(function).__call__
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
    digest.update(f"function {name}".encode())
    if isinstance(function, FunctionType):
        _hash_value(digest, (function, function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:
                # Not assigned yet.
                continue
            # What can change without being assigned, such as a list that counts calls, is no
            # setting.
            if isinstance(value, (*_PLAIN, tuple, torch.Tensor, torch.nn.Module, FunctionType)):
                _hash_value(digest, value)


def _hash_module_settings(digest: hashlib._Hash, name: str, module: torch.nn.Module) -> None:
    """Hash a module's plain attributes, and its code where it is not PyTorch's own."""
    _hash_value(digest, (name, _plain_attributes(module)))
    if not type(module).__module__.startswith("torch."):
        _hash_function(digest, type(module).forward)


def _plain_attributes(value: Any) -> dict[str, Any]:
    return {
        k: v
        for k, v in getattr(value, "__dict__", {}).items()
        if isinstance(v, _PLAIN) and k != "training" and not k.startswith("_")
    }


@contextmanager
def _preserved_random_state() -> Iterator[None]:
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
def _preserved_attributes(model: torch.nn.Module) -> Iterator[None]:
    """Undo what a forward pass sets: modes, caches, counters, new buffers."""
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
def _preserved_generators(*samplers: Any) -> Iterator[None]:
    """Reading a sampler advances its generator, and with it the order of later training."""
    owners = [*samplers, *(getattr(s, "sampler", None) for s in samplers)]
    generators = [getattr(owner, "generator", None) for owner in owners]
    states = [(g, g.get_state()) for g in generators if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


@contextmanager
def _cudnn_for(model: torch.nn.Module, device: torch.device, training: bool) -> Iterator[None]:
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
