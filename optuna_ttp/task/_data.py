"""Reading the user's data: its samples in a fixed order, as batches of tensors."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch
from torch.utils.data import DataLoader
from torch.utils.data import default_collate
from torch.utils.data import IterableDataset
from torch.utils.data import TensorDataset

from optuna_ttp._util.exceptions import DataOrderWarning
from optuna_ttp._util.warn import warn_caller
from optuna_ttp.task._loss import Loss


READ_SIZE = 64
"""Samples read per batch. The fingerprint depends on it, because a collate function may pad."""
_LABEL_KEYS = ("labels", "label")


def read_data_argument(data: Any) -> tuple[Any, list[int], Callable[[list[Any]], Any]]:
    """Return the data set of the user's argument, its samples' indices and its collate function.

    Raises TypeError if the argument is neither a map-style data set, a loader over one nor a pair
    of tensors, ValueError if it is empty, its tensors have different lengths, or its loader draws
    other samples each time it is read.
    """
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
                "The inputs and targets given as data must have a row per sample but got shapes "
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
    """Return whether data is a list whose first item is a tuple or mapping, not a tensor."""
    return isinstance(data, list) and isinstance(data[0], tuple | Mapping)


def _check_not_empty(n_samples: int) -> None:
    if n_samples == 0:
        raise ValueError("The data must have at least one sample but got none.")


def _loader_indices(loader: DataLoader[Any]) -> list[int]:
    """Return the indices of a loader's samples in its order; sort them and warn if it shuffles.

    Raises ValueError if the loader has no samples, repeats one, or draws others at each reading.
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
    warn_caller(
        "The data loader shuffles. Its samples were taken in the order of the data set instead, "
        "so that the spectrum can be found again; training may shuffle as before.",
        DataOrderWarning,
    )
    return sorted(first)


@contextmanager
def _preserved_generators(*samplers: Any) -> Iterator[None]:
    """Restore the samplers' random generators on exit, so that later training draws the same."""
    owners = [*samplers, *(getattr(s, "sampler", None) for s in samplers)]
    generators = [getattr(owner, "generator", None) for owner in owners]
    states = [(g, g.get_state()) for g in generators if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Split a collated batch into inputs (a tensor, a tuple or a mapping) and targets.

    Raises TypeError if the batch is neither a sequence (inputs..., targets) nor a mapping,
    ValueError if a mapping has neither the key ``"labels"`` nor ``"label"``.
    """
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


def check_targets(batches: list[Any], loss: Loss, n_outputs: int) -> NDArray[Any]:
    """Return the targets of all batches as one array, checked against the loss and C outputs.

    They are class indices ``(N,)`` for the cross-entropy, and floats ``(N, C)`` otherwise.
    Raises TypeError if their type is wrong, ValueError if their shape or range is.
    """
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
    """Return labels as an array ``(N,)`` after checks of type, shape, range and class weights."""
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


def collated(collate: Callable[[list[Any]], Any], items: list[Any], first: int) -> Any:
    """Return the batch that ``collate`` makes of items; ``first`` is the first sample's number.

    Raises TypeError or ValueError, which name the samples, if their types or shapes differ.
    """
    try:
        return collate(items)
    except (TypeError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"The samples {first} to {first + len(items) - 1} must fit into one batch but do not. "
            "Give all of them inputs and targets of the same types and shapes, or a DataLoader "
            f"whose collate_fn pads them. It says: {(str(error) or kind.__name__).splitlines()[0]}"
        ) from error
