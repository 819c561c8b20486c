"""The fine-tuning task: a model, its data and its loss, checked and with a fingerprint."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
import copy
from dataclasses import asdict
import hashlib
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_ttp._util.checks import check_seed
from optuna_ttp.task._data import check_targets
from optuna_ttp.task._data import collated
from optuna_ttp.task._data import read_data_argument
from optuna_ttp.task._data import READ_SIZE
from optuna_ttp.task._data import split_batch
from optuna_ttp.task._fingerprint import hash_function
from optuna_ttp.task._fingerprint import hash_module_settings
from optuna_ttp.task._fingerprint import hash_tensor
from optuna_ttp.task._fingerprint import hash_value
from optuna_ttp.task._fingerprint import plain_repr
from optuna_ttp.task._frozen_model import cudnn_for
from optuna_ttp.task._frozen_model import FrozenModel
from optuna_ttp.task._frozen_model import preserved_attributes
from optuna_ttp.task._frozen_model import preserved_random_state
from optuna_ttp.task._loss import Loss
from optuna_ttp.task._model_lock import locked
from optuna_ttp.task._output_checks import check_output_shape
from optuna_ttp.task._output_checks import InputsError
from optuna_ttp.task._output_checks import naming_inputs
from optuna_ttp.task._output_checks import refusing_batch_statistics
from optuna_ttp.task._parameter_checks import check_parameters
from optuna_ttp.task._parameter_checks import rate_multipliers
from optuna_ttp.task._parameter_checks import unwrapped
from optuna_ttp.task._recomputation import plain_checkpoints
from optuna_ttp.task._tensors import cast
from optuna_ttp.task._tensors import check_inputs
from optuna_ttp.task._tensors import check_numbers
from optuna_ttp.task._tensors import describe_inputs
from optuna_ttp.task._tensors import map_tensors


class FineTuningTask:
    """A pretrained model, the data it is fine-tuned on, and the loss.

    The model is never changed: its mode, gradients, buffers, device and the random state of the
    process are the same after every call, also after an exception. It runs in evaluation mode, so
    that batch-norm statistics and dropout are frozen, as in the paper. All parameters with
    ``requires_grad`` count as trainable. Threads that use the same model take turns; none may
    train it meanwhile.

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
            :class:`~optuna_ttp.DataOrderWarning`.
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
            Factors of the learning rate by the beginning of parameters' names, as parameter groups
            have them: ``{"head.": 10.0}``. The longest fitting beginning counts; one by default.
            Only the exact engine of :func:`~optuna_ttp.compute_spectrum` supports other factors
            than one: ``"auto"`` then chooses it, however large the model is.

    Raises:
        TypeError:
            If an argument or the model's output is of the wrong type.
        ValueError:
            If the model has no trainable parameter or mixes samples, the data are empty, not
            finite or not reproducible, or the targets do not fit the loss and the outputs.
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
        self.model = unwrapped(model)
        self.forward = forward
        self.loss = Loss.from_user(loss)
        self.name = type(self.model).__name__ if name is None else name
        # Not while another thread runs the same model with other weights.
        with locked(self.model):
            check_parameters(self.model)
        with preserved_random_state():
            self._dataset, self._indices, self._collate = read_data_argument(data)
            self._check_reproducible()
            raw_targets, self._data_digest = self._read_all()
            self.n_outputs = self._check_outputs()
        if self.loss.kind == "cross_entropy" and self.n_outputs == 1:
            raise ValueError(
                "The cross-entropy of a single output is always zero, but the model gives outputs "
                'of shape (batch, 1). Give it two outputs, one per class, or take loss="mse".'
            )
        self.targets = check_targets(raw_targets, self.loss, self.n_outputs)
        with locked(self.model):
            self.multipliers = rate_multipliers(self.model, learning_rate_multipliers or {})
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
        """The SHA-256, in hexadecimal, of weights, buffers, data, loss, model and forward's code.

        It is computed from the model as it is now: training the model changes it.
        """
        digest = hashlib.sha256()
        self._hash_model(digest)
        self._hash_weights(digest)
        hash_function(digest, self.forward)
        digest.update(self._data_digest)
        # Only if they are used, so that the fingerprints of tasks without them stay the same.
        if any(factor != 1.0 for factor in self.multipliers.values()):
            digest.update(json.dumps(self.multipliers, sort_keys=True).encode())
        if self.validation is not None:
            digest.update(b"validation" + self.validation._data_digest)
        return digest.hexdigest()

    def part_fingerprints(self) -> dict[str, str]:
        """Return a SHA-256, in hexadecimal, of each part of the fingerprint.

        Returns:
            The digests by name: ``"model"`` (its structure and settings, the loss and
            ``forward``), ``"weights"`` (with buffers), ``"data"``, ``"validation_data"`` and
            ``"learning_rate_multipliers"``.
        """
        model, weights = hashlib.sha256(), hashlib.sha256()
        self._hash_model(model)
        hash_function(model, self.forward)
        self._hash_weights(weights)
        held_out = b"" if self.validation is None else self.validation._data_digest
        multipliers = json.dumps(self.multipliers, sort_keys=True).encode()
        return {
            "model": model.hexdigest(),
            "weights": weights.hexdigest(),
            "data": self._data_digest.hex(),
            "validation_data": held_out.hex(),
            "learning_rate_multipliers": hashlib.sha256(multipliers).hexdigest(),
        }

    def _hash_model(self, digest: hashlib._Hash) -> None:
        """Add the model's class, structure and settings, and the loss, to a digest."""
        header = {
            "model": f"{type(self.model).__module__}.{type(self.model).__qualname__}",
            "structure": plain_repr(self.model),
            "loss": asdict(self.loss),
        }
        digest.update(json.dumps(header, sort_keys=True).encode())
        for name, module in self.model.named_modules():
            hash_module_settings(digest, name, module)

    def _hash_weights(self, digest: hashlib._Hash) -> None:
        """Add all parameters and buffers to a digest."""
        for name, parameter in self.model.named_parameters():
            hash_tensor(digest, f"parameter {name} {parameter.requires_grad}", parameter)
        for name, buffer in self.model.named_buffers():
            hash_tensor(digest, f"buffer {name}", buffer)

    def subset(self, n_samples: int, *, seed: int = 0) -> FineTuningTask:
        """Return the same task on a random subset of its training samples.

        With the same seed, a smaller subset is part of a larger one.

        Args:
            n_samples:
                The number of samples, from 1 to N.
            seed:
                The seed of the draw. 0 by default.

        Returns:
            A new task of the same model, loss and validation samples.

        Raises:
            ValueError:
                If the task has fewer samples, or the seed is no whole number of at least 0.
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
        seed = check_seed(seed)
        chosen = np.random.default_rng(seed).permutation(self.n_samples)[: int(n_samples)]
        part = copy.copy(self)
        part._indices = [self._indices[i] for i in sorted(chosen)]
        with preserved_random_state():
            raw_targets, part._data_digest = part._read_all()
        part.targets = check_targets(raw_targets, self.loss, self.n_outputs)
        return part

    def batches(
        self, batch_size: int, device: torch.device, dtype: torch.dtype, *, start: int = 0
    ) -> Iterator[tuple[Any, Any]]:
        """Read the training data in order, as batches.

        Args:
            batch_size:
                The number of samples in a batch; the last batch may be smaller.
            device:
                The device that the inputs are moved to.
            dtype:
                The type that floating-point inputs are cast to.
            start:
                The number of the first sample to read. 0 by default.

        Yields:
            (inputs, targets) as the collate function makes them.
        """
        for first in range(start, self.n_samples, batch_size):
            last = min(first + batch_size, self.n_samples)
            yield self.batch(range(first, last), device, dtype)

    def batch(
        self, samples: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> tuple[Any, Any]:
        """Read some of the training samples as one batch.

        Args:
            samples:
                The numbers of the samples, from zero to N - 1.
            device:
                The device that the inputs are moved to.
            dtype:
                The type that floating-point inputs are cast to.

        Returns:
            (inputs, targets) as the collate function makes them.
        """
        items = [self._dataset[self._indices[i]] for i in samples]
        inputs, targets = split_batch(collated(self._collate, items, samples[0]))
        return map_tensors(inputs, lambda t: cast(t, device, dtype)), targets

    @contextmanager
    def frozen(
        self, device: torch.device, dtype: torch.dtype = torch.float32, *, training: bool = False
    ) -> Iterator[FrozenModel]:
        """Give the model as a pure function, with copies of its parameters and buffers.

        At the end the model and the random state are as before. Other threads that want to use the
        model wait.

        Args:
            device:
                The device to run on.
            dtype:
                The type that floating-point parameters and buffers are cast to. Single precision
                by default.
            training:
                Run in training mode, as a training step does, which only its timing needs. Off by
                default.

        Yields:
            The model as a function of its inputs and trainable parameters.
        """
        if device.type == "cuda":
            # Without it the device has no random state yet that could be saved and restored.
            torch.cuda.init()
        with (
            locked(self.model),
            preserved_random_state(),
            preserved_attributes(self.model),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cuda" if device.type == "cuda" else "cpu", enabled=False),
            cudnn_for(self.model, device, training),
            plain_checkpoints(training=training),
        ):
            for module in self.model.modules():
                module.training = training
            yield FrozenModel(self.model, self.forward, device, dtype)

    def initial_outputs(
        self, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> NDArray[np.float64]:
        """Return the outputs of the pretrained model, of shape ``(N, C)``.

        Args:
            device:
                The device to run on.
            dtype:
                The type that floating-point tensors are cast to. Single precision by default.

        Returns:
            The outputs in double precision.

        Raises:
            ValueError:
                If an output is NaN or infinite.
        """
        with self.frozen(device, dtype) as frozen, torch.no_grad():
            parts: list[torch.Tensor] = []
            for inputs, _ in self.batches(READ_SIZE, device, dtype):
                with naming_inputs(inputs):
                    part = frozen(inputs)
                n_expected = min(READ_SIZE, self.n_samples - READ_SIZE * len(parts))
                check_output_shape(part, n_expected, self.n_outputs)
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
        """Return a task of the validation samples, None for None; errors name the argument."""
        if data is None:
            return None
        try:
            task = FineTuningTask(self.model, data, self.loss, self.forward)
        except InputsError as error:
            inputs, _ = next(
                self.batches(READ_SIZE, torch.device("cpu"), torch.get_default_dtype())
            )
            raise ValueError(
                f"validation_data: {error.what}; those of the training data have "
                f"{describe_inputs(inputs)}. Bring both into one form. {error.reason}"
            ) from error
        except (TypeError, ValueError) as error:
            raise type(error)(f"validation_data: {error}") from error
        if task.n_outputs != self.n_outputs:
            raise ValueError(
                f"validation_data must lead to {self.n_outputs} outputs, like the training data, "
                f"but got {task.n_outputs}."
            )
        return task

    def _check_reproducible(self) -> None:
        """Raise ValueError if one of about eight items of the data differs between two reads."""
        # Augmentation often changes an item with probability one half, so several are read twice.
        for i in self._indices[:: max(1, self.n_samples // 8)][:8]:
            pair = []
            for _ in range(2):
                digest = hashlib.sha256()
                item = self._dataset[i]
                check_numbers("The data", item)
                hash_value(digest, item)
                pair.append(digest.digest())
            if pair[0] != pair[1]:
                raise ValueError(
                    f"The data must be the same every time they are read, but sample {i} differed "
                    "between two reads. Turn random augmentation off for the task (the paper does "
                    "so too: it improves the prediction)."
                )

    def _read_all(self) -> tuple[list[Any], bytes]:
        """Check and hash all data; return a list of each batch's targets and the SHA-256."""
        digest = hashlib.sha256()
        targets = []
        n_read = 0
        for inputs, batch_targets in self.batches(
            READ_SIZE, torch.device("cpu"), torch.get_default_dtype()
        ):
            check_inputs(inputs, n_read)
            hash_value(digest, inputs)
            hash_value(digest, batch_targets)
            targets.append(batch_targets)
            n_read += READ_SIZE
        return targets, digest.digest()

    def _check_outputs(self) -> int:
        """Return the number C of outputs; raise ValueError if they are NaN, infinite or random."""
        first = next(self.model.parameters())
        device = first.device
        with self.frozen(device, torch.float32) as frozen, torch.no_grad():
            n_tried = min(2, self.n_samples)
            inputs, _ = next(self.batches(n_tried, device, torch.float32))
            with refusing_batch_statistics(self.model), naming_inputs(inputs):
                outputs, again = frozen(inputs), frozen(inputs)
        check_output_shape(outputs, n_tried, None)
        if not torch.isfinite(outputs).all():
            raise ValueError("The model's outputs must be finite but got NaN or infinity.")
        deviation = float((outputs - again).abs().max())
        if deviation > 1e-3 * float(outputs.abs().max()) + 1e-5:
            raise ValueError(
                "The model's outputs must be the same every time in evaluation mode but differed "
                f"by {deviation:.2g} between two calls. Does it call functional.dropout without "
                "training=self.training, draw other random numbers, or write to its own weights?"
            )
        return int(outputs.shape[1])


def check_task(task: Any) -> None:
    """Raise TypeError if task is not a :class:`FineTuningTask`."""
    if not isinstance(task, FineTuningTask):
        raise TypeError(f"task must be a FineTuningTask but got {type(task).__name__}.")
