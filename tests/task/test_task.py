# ruff: noqa: NPY002 (the legacy random state is what must be kept)
from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
import copy
import functools
import os
from pathlib import Path
import random
import subprocess
import sys
from typing import Any

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset
from torch.utils.data import IterableDataset
from torch.utils.data import RandomSampler
from torch.utils.data import SequentialSampler
from torch.utils.data import Subset
from torch.utils.data import SubsetRandomSampler
from torch.utils.data import TensorDataset
from torch.utils.data import WeightedRandomSampler

from optuna_ttp import DataOrderWarning
from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.ntk import exact_kernel
from optuna_ttp.spectrum import measure_throughput
from optuna_ttp.task import FineTuningTask
from tests.cases import case
from tests.cases import CASES
from tests.cases import TextClassifier
from tests.cases import texts
from tests.models import cnn
from tests.models import images
from tests.models import mlp
from tests.models import vectors


CPU = torch.device("cpu")


class Wrapped(torch.nn.Module):
    """A network whose outputs are changed by a function."""

    def __init__(self, change: Callable[[torch.Tensor], Any], seed: int = 0) -> None:
        super().__init__()
        self.inner = mlp(seed=seed)
        self.change = change

    def forward(self, x: torch.Tensor) -> Any:
        return self.change(self.inner(x))


# What is at hand: data forms


def _assert_reads_in_order(data: Any, order: list[int] | None = None) -> None:
    x, y = vectors()
    model = mlp()
    order = list(range(len(x))) if order is None else order
    task = FineTuningTask(model, data)
    assert task.n_samples == len(order)
    np.testing.assert_array_equal(task.targets, y[order].numpy())
    expected = model(x[order]).detach().numpy()
    np.testing.assert_allclose(task.initial_outputs(CPU), expected, rtol=1e-5, atol=1e-6)


def test_pair_of_tensors() -> None:
    _assert_reads_in_order(vectors())
    _assert_reads_in_order(list(vectors()))


def test_map_style_data_set_of_tuples() -> None:
    x, y = vectors()
    _assert_reads_in_order(TensorDataset(x, y))
    _assert_reads_in_order([(a, int(b)) for a, b in zip(x, y, strict=True)])
    _assert_reads_in_order([(a.numpy(), b.numpy()) for a, b in zip(x, y, strict=True)])


def test_list_of_two_items_is_a_data_set_and_no_pair() -> None:
    x, y = vectors()
    _assert_reads_in_order([(x[0], y[0]), (x[1], y[1])], [0, 1])


@pytest.mark.parametrize("key", ["labels", "label"])
def test_data_set_of_mappings(key: str) -> None:
    items = [{"x": x, key: int(y)} for x, y in zip(*vectors(), strict=True)]
    x, y = vectors()
    task = FineTuningTask(mlp(), items, forward=lambda model, inputs: model(inputs["x"]))
    np.testing.assert_array_equal(task.targets, y.numpy())
    expected = mlp()(x).detach().numpy()
    np.testing.assert_allclose(task.initial_outputs(CPU), expected, rtol=1e-5, atol=1e-6)


def test_mapping_is_passed_as_keywords_and_logits_are_taken() -> None:
    model = TextClassifier()
    task = FineTuningTask(model, texts())
    batch = torch.utils.data.default_collate(texts())
    expected = model(batch["input_ids"], batch["attention_mask"]).logits.detach().numpy()
    np.testing.assert_allclose(task.initial_outputs(CPU), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(task.targets, batch["labels"].numpy())


def test_sequential_loader_is_read_in_order_with_its_collate_function() -> None:
    x, y = vectors()

    def collate(items: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {
            "input": torch.stack([a for a, _ in items]),
            "label": torch.stack([b for _, b in items]),
        }

    _assert_reads_in_order(DataLoader(TensorDataset(x, y), batch_size=7))
    _assert_reads_in_order(DataLoader(TensorDataset(x, y), batch_size=7, collate_fn=collate))


def test_drop_last_drops_no_sample() -> None:
    x, y = vectors()
    _assert_reads_in_order(DataLoader(TensorDataset(x, y), batch_size=7, drop_last=True))


def test_shuffling_loader_is_read_in_order_with_a_warning_at_the_users_line() -> None:
    x, y = vectors()
    loader = DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True)
    with pytest.warns(DataOrderWarning, match="shuffles") as caught:
        task = FineTuningTask(mlp(), loader)
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(task.targets, y.numpy())
    assert task.fingerprint == FineTuningTask(mlp(), (x, y)).fingerprint


def test_shuffling_loader_of_a_subset_gives_the_subset_in_order() -> None:
    sampler = SubsetRandomSampler([11, 3, 17, 5, 2, 8])
    with pytest.warns(DataOrderWarning):
        _assert_reads_in_order(
            DataLoader(TensorDataset(*vectors()), batch_size=4, sampler=sampler),
            [2, 3, 5, 8, 11, 17],
        )


def test_subset_and_sequential_sampler() -> None:
    data = TensorDataset(*vectors())
    _assert_reads_in_order(Subset(data, [4, 1, 9]), [4, 1, 9])
    _assert_reads_in_order(DataLoader(data, sampler=SequentialSampler(data), batch_size=3))


def test_reading_a_loader_leaves_its_generator_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(*vectors()), batch_size=4, shuffle=True, generator=generator)
    before = generator.get_state()
    with pytest.warns(DataOrderWarning):
        FineTuningTask(mlp(), loader)
    assert torch.equal(generator.get_state(), before)


class _Buckets:
    """A batch sampler of the user's own."""

    def __init__(self, batches: list[list[int]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def test_loader_with_a_batch_sampler_of_its_own() -> None:
    loader = DataLoader(TensorDataset(*vectors()), batch_sampler=_Buckets([[3, 1], [2], [0, 7]]))
    _assert_reads_in_order(loader, [3, 1, 2, 0, 7])


@pytest.mark.parametrize(
    "sampler",
    [
        WeightedRandomSampler([0.1] * 20, 20),
        RandomSampler(range(20), replacement=True),
        RandomSampler(range(20), num_samples=7),
    ],
    ids=["weighted", "replacement", "random subset"],
)
def test_loader_that_draws_other_samples_each_time_is_refused(
    sampler: torch.utils.data.Sampler[int],
) -> None:
    loader = DataLoader(TensorDataset(*vectors()), batch_size=4, sampler=sampler)
    with pytest.raises(ValueError, match="draws other samples every time"):
        FineTuningTask(mlp(), loader)


class _Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return zip(*vectors(), strict=True)


@pytest.mark.parametrize(
    "data", [_Stream(), DataLoader(_Stream()), iter([])], ids=["set", "loader", "list"]
)
def test_iterable_data_are_refused(data: object) -> None:
    with pytest.raises(TypeError, match="must be a map-style data set"):
        FineTuningTask(mlp(), data)


def test_loader_without_batches_is_refused() -> None:
    loader = DataLoader(TensorDataset(*vectors()), batch_size=None)
    with pytest.raises(TypeError, match="batch_size=None"):
        FineTuningTask(mlp(), loader)


class _Augmented(Dataset[Any]):
    def __init__(self, draw: Callable[[], float]) -> None:
        self.x, self.y = vectors()
        self.draw = draw

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.x[i] + self.draw(), self.y[i]


@pytest.mark.parametrize(
    "draw",
    [random.random, np.random.rand, lambda: torch.rand(()).item()],
    ids=["python", "numpy", "torch"],
)
def test_random_augmentation_is_refused(draw: Callable[[], float]) -> None:
    with pytest.raises(ValueError, match="augmentation"):
        FineTuningTask(mlp(), _Augmented(draw))
    loader = DataLoader(_Augmented(draw), batch_size=4)
    with pytest.raises(ValueError, match="augmentation"):
        FineTuningTask(mlp(), loader)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((torch.zeros(3, 6), torch.zeros(4).long()), "one row a sample"),
        ((torch.zeros(()), torch.zeros(())), "one row a sample"),
        ([(torch.zeros(6), 0), (torch.zeros(6), "cat")][1:], "must be tensors or numbers"),
        ([{"x": torch.zeros(6)}], "'labels' or 'label' but got the keys"),
        ((torch.zeros(3, 6), np.zeros(3)), "must be two tensors"),
        ((torch.zeros(3, 6),) * 3, "pair of tensors"),
        (torch.zeros(3, 6), "must be .inputs..., target. or a mapping"),
        ({"x": torch.zeros(3, 6)}, "mapping of columns"),
        (5, "map-style data set"),
        (None, "map-style data set"),
    ],
)
def test_data_of_another_form_are_refused(data: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        FineTuningTask(mlp(), data)


@pytest.mark.parametrize(
    "data",
    [
        (torch.zeros(0, 6), torch.zeros(0).long()),
        [],
        TensorDataset(torch.zeros(0, 6)),
        DataLoader(TensorDataset(torch.zeros(0, 6), torch.zeros(0)), shuffle=False),
        DataLoader(TensorDataset(*vectors()), sampler=SubsetRandomSampler([])),
    ],
    ids=["pair", "list", "data set", "loader", "empty sampler"],
)
def test_empty_data_are_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        FineTuningTask(mlp(), data)


# Bad input: model and forward


def test_model_without_trainable_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="must have a trainable parameter but got 0 parameters"):
        FineTuningTask(torch.nn.Flatten(), vectors())
    with pytest.raises(ValueError, match="must have a trainable parameter but got 4 parameters"):
        FineTuningTask(mlp().requires_grad_(False), vectors())


def test_uninitialised_lazy_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lazy parameters \(weight, bias\)"):
        FineTuningTask(torch.nn.LazyLinear(3), vectors())


def test_complex_parameters_are_refused() -> None:
    model = torch.nn.Linear(6, 3, dtype=torch.complex64)
    with pytest.raises(TypeError, match="'weight' is complex"):
        FineTuningTask(model, vectors())


@pytest.mark.parametrize("n_samples", [1, 2, 65])
@pytest.mark.parametrize("shape", [(8,), (8, 3, 3)], ids=["1d", "2d"])
def test_statistics_of_the_batch_are_refused_by_name(
    shape: tuple[int, ...], n_samples: int
) -> None:
    kind = torch.nn.BatchNorm1d if len(shape) == 1 else torch.nn.BatchNorm2d
    model = torch.nn.Sequential()
    model.add_module("norm", kind(8, track_running_stats=False))
    model.add_module("flat", torch.nn.Flatten())
    model.add_module("head", torch.nn.LazyLinear(3))
    model(torch.randn(4, *shape))
    data = torch.randn(n_samples, *shape), torch.zeros(n_samples, dtype=torch.long)
    message = "depend on the other samples of its batch.*'norm'.*track_running_stats=False"
    with pytest.raises(ValueError, match=message):
        FineTuningTask(model, data)
    # Where it does not run, it mixes nothing.
    head: Any = model[2]
    task = FineTuningTask(model, data, forward=lambda _, x: head(x.flatten(1)))
    assert task.n_outputs == 3


@pytest.mark.parametrize("layer", [torch.nn.Embedding, torch.nn.EmbeddingBag])
def test_gradients_by_frequency_in_the_batch_are_refused_by_name(layer: Any) -> None:
    table, head = layer(20, 6, scale_grad_by_freq=True), torch.nn.LazyLinear(3)
    model = torch.nn.Sequential()
    model.add_module("table", table)
    model.add_module("flat", torch.nn.Flatten())
    model.add_module("head", head)
    data = torch.arange(12).reshape(4, 3), torch.arange(4) % 3
    model(data[0])
    with pytest.raises(ValueError, match="'table' has scale_grad_by_freq=True"):
        FineTuningTask(model, data)
    table.requires_grad_(False)
    in_head = sum(p.numel() for p in head.parameters())
    assert FineTuningTask(model, data).n_parameters == in_head


def test_complex_inputs_are_refused() -> None:
    x, y = vectors()
    with pytest.raises(TypeError, match=r"inputs must be real but got torch\.complex64"):
        FineTuningTask(mlp(), (x.to(torch.complex64), y))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused() -> None:
    traced = torch.jit.trace(mlp(), torch.zeros(1, 6))
    for model in (traced, torch.nn.Sequential(traced)):
        with pytest.raises(TypeError, match="TorchScript modules are not supported"):
            FineTuningTask(model, vectors())


@pytest.mark.parametrize(
    "model", [None, mlp, "mlp", torch.nn.Linear], ids=["none", "function", "name", "class"]
)
def test_what_is_no_module_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module but got"):
        FineTuningTask(model, vectors())


def test_forward_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match="forward must be callable"):
        FineTuningTask(mlp(), vectors(), forward="model(x)")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (lambda f: f[:, 0], r"\(2,\)"),
        (lambda f: f[:, None, :], r"\(2, 1, 3\)"),
        (lambda f: f.sum(), r"\(\)"),
        (lambda f: f[:1], r"\(1, 3\)"),
    ],
    ids=["1-D", "3-D", "scalar", "another batch"],
)
def test_outputs_that_are_not_batch_by_c_are_refused(
    change: Callable[[torch.Tensor], torch.Tensor], shape: str
) -> None:
    with pytest.raises(ValueError, match=rf"shape \(batch, C\) but got {shape} for a batch of 2"):
        FineTuningTask(Wrapped(change), vectors())


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda f: (f, f), "tuple"),
        (lambda f: {"scores": f}, "dict"),
        (lambda f: None, "NoneType"),
        (lambda f: f.argmax(dim=1, keepdim=True), "torch.int64"),
    ],
    ids=["tuple", "dict", "none", "integers"],
)
def test_outputs_that_are_no_floating_point_tensor_are_refused(
    change: Callable[[torch.Tensor], Any], kind: str
) -> None:
    with pytest.raises(TypeError, match=rf"got {kind}\. Pass forward="):
        FineTuningTask(Wrapped(change), vectors())


def test_forward_picks_the_outputs() -> None:
    model = Wrapped(lambda f: (f, None))
    task = FineTuningTask(model, vectors(), forward=lambda model, x: model(x)[0])
    assert task.n_outputs == 3


def test_model_that_squeezes_a_batch_of_one_is_refused(device: torch.device) -> None:
    # 65 samples: the last batch that is read has one.
    task = FineTuningTask(Wrapped(torch.squeeze), vectors(65))
    with pytest.raises(ValueError, match=r"shape \(batch, 3\) but got \(3,\) for a batch of 1"):
        task.initial_outputs(device)
    task = FineTuningTask(Wrapped(torch.squeeze), vectors(4))
    with pytest.raises(ValueError, match=r"\(1, 3\) for a batch of one but got \(3,\)"):
        exact_kernel(task, device=device)


def test_random_outputs_are_refused() -> None:
    model = Wrapped(lambda f: torch.nn.functional.dropout(f, 0.5))
    with pytest.raises(ValueError, match=r"the same every time.*functional\.dropout"):
        FineTuningTask(model, vectors())


def test_dropout_layers_are_frozen() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), mlp()).train()
    x, y = vectors()
    task = FineTuningTask(model, (x, y))
    expected = model[1](x).detach().numpy()
    np.testing.assert_allclose(task.initial_outputs(CPU), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("trainable", [True, False])
def test_weights_that_are_not_finite_are_refused(value: float, trainable: bool) -> None:
    model = mlp()
    torch.nn.init.constant_(model.get_parameter("2.bias"), value).requires_grad_(trainable)
    with pytest.raises(ValueError, match=r"weights must be finite but '2\.bias' is not"):
        FineTuningTask(model, vectors())


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_inputs_that_are_not_finite_are_refused(value: float) -> None:
    x, y = vectors(70)
    x[66, 1] = value
    with pytest.raises(ValueError, match=r"inputs must be finite.*in sample 66"):
        FineTuningTask(mlp(), (x, y))
    items = [{"extra": [a], "labels": b} for a, b in zip(x, y, strict=True)]
    with pytest.raises(ValueError, match="inputs must be finite"):
        FineTuningTask(mlp(), items, forward=lambda model, inputs: model(inputs["extra"][0]))


def test_outputs_that_are_not_finite_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="outputs must be finite"):
        FineTuningTask(Wrapped(lambda f: f / 0), vectors())
    x, y = vectors(70)
    x[67] = 0
    task = FineTuningTask(
        mlp(), (x, y), forward=lambda model, x: model(x) / x.abs().sum(1, keepdim=True)
    )
    with pytest.raises(ValueError, match="for 1 of 70 samples, the first one sample 67"):
        task.initial_outputs(device)
    with pytest.raises(ValueError, match="for 1 of 70 samples, the first one sample 67"):
        compute_spectrum(task, device=device)


# Bad input: targets


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([0, 1, 2, 3], r"labels must be in 0\.\.2 .* but got labels from 0 to 3"),
        ([0, -1, 2, 1], r"labels must be in 0\.\.2 .* but got labels from -1 to 2"),
        ([0, -100, 2, 1], r"labels must be in 0\.\.2 .* but got labels from -100 to 2"),
        ([0.0, 1.0, 2.0, 1.0], r"must be class indices \(integers\) but got torch.float32"),
        ([True, False, True, True], r"must be class indices \(integers\) but got torch.bool"),
        ([[0], [1], [2], [1]], r"must have shape \(N,\) but got \(4, 1\)"),
        ([[0.1, 0.2, 0.7]] * 4, r"must be class indices \(integers\)"),
    ],
    ids=["too high", "negative", "ignored", "floats", "bools", "2-D", "probabilities"],
)
def test_bad_targets_of_the_cross_entropy_are_refused(targets: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        FineTuningTask(mlp(), (torch.zeros(4, 6), torch.tensor(targets)))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(4, 2), r"must have shape \(N, 3\), like the outputs, but got \(4, 2\)"),
        (torch.zeros(4), r"must have shape \(N, 3\), like the outputs, but got \(4,\)"),
        (torch.zeros(4, 3, 1), r"must have shape \(N, 3\)"),
        (torch.zeros(4, 3).long(), "must be floats but got torch.int64"),
        (torch.full((4, 3), float("nan")), "targets must be finite"),
    ],
    ids=["columns", "1-D", "3-D", "integers", "nan"],
)
def test_bad_targets_of_the_mean_squared_error_are_refused(
    targets: torch.Tensor, message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        FineTuningTask(mlp(), (torch.zeros(4, 6), targets), loss="mse")


def test_one_real_target_may_come_without_its_column() -> None:
    y = torch.linspace(0, 1, 4)
    task = FineTuningTask(mlp(n_outputs=1), (torch.zeros(4, 6), y), loss="mse")
    np.testing.assert_array_equal(task.targets, y.double().numpy()[:, None])


def test_class_weights_must_fit_outputs_and_data() -> None:
    x, y = vectors()
    loss = torch.nn.CrossEntropyLoss(weight=torch.ones(4))
    with pytest.raises(ValueError, match="one class weight for each of the 3 outputs but got 4"):
        FineTuningTask(mlp(), (x, y), loss=loss)
    loss = torch.nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="all have the class weight zero"):
        FineTuningTask(mlp(), (x, torch.zeros_like(y)), loss=loss)


@given(
    labels=st.lists(st.integers(-5, 5), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8]),
)
@settings(max_examples=30)
def test_labels_are_taken_exactly_when_in_range(labels: list[int], dtype: torch.dtype) -> None:
    x = torch.zeros(len(labels), 6)
    y = torch.tensor(labels, dtype=dtype)
    if min(labels) >= 0 and max(labels) <= 2:
        assert FineTuningTask(mlp(), (x, y)).targets.tolist() == labels
    else:
        with pytest.raises(ValueError, match="labels must be in"):
            FineTuningTask(mlp(), (x, y))


# The user's model comes back exactly as it was


class _Restless(torch.nn.Module):
    """Draws random numbers, keeps batch statistics, and writes attributes when it runs."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.cnn = cnn()
        self.gru = torch.nn.GRU(8, 4, batch_first=True)
        self.dropout = torch.nn.Dropout(0.3)
        self.head = torch.nn.Linear(7, 3)
        self.n_calls = 0
        self.last: torch.Tensor | None = None
        self.average: torch.Tensor
        self.register_buffer("average", torch.zeros(()))
        self.to(device)
        self.train()
        self.cnn.get_submodule("4").eval()
        self.dropout.eval()
        self.cnn.get_parameter("0.bias").requires_grad_(False)
        self.head.weight.grad = torch.full_like(self.head.weight, 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.n_calls += 1
        self.cache = {"inputs": x}
        self.average = self.average * 0.9 + x.mean()
        self.average.add_(1.0)
        if not hasattr(self, "seen"):
            self.register_buffer("seen", torch.ones(1, device=x.device))
        self.last = self.dropout(torch.cat([self.cnn(x), self.gru(x[:, 0])[1][0]], dim=1))
        torch.rand(1, device=x.device)
        np.random.rand()
        random.random()
        outputs: torch.Tensor = self.head(self.last)
        return outputs


class _RestlessData(Dataset[Any]):
    def __init__(self) -> None:
        self.x, self.y = images()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        torch.rand(1)
        np.random.rand()
        random.random()
        return self.x[i], self.y[i]


class _Interrupted:
    """The model's own forward, which raises at the n-th call."""

    def __init__(self, n_calls: int | None) -> None:
        self.left = n_calls

    def __call__(self, model: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        outputs: torch.Tensor = model(inputs)
        return outputs


def _world(model: torch.nn.Module) -> dict[str, Any]:
    """Whatever could have changed. Tensors that should stay the same objects are kept by id."""
    world: dict[str, Any] = {
        "torch": torch.get_rng_state().tolist(),
        "numpy": repr(np.random.get_state()),
        "python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32),
        "modules": [(n, id(m), m.training) for n, m in model.named_modules()],
        "attributes": [
            {k: id(v) if isinstance(v, torch.Tensor) else repr(v) for k, v in vars(m).items()}
            for m in model.modules()
        ],
    }
    if torch.cuda.is_available():
        world["cuda"] = torch.cuda.get_rng_state().tolist()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist())
        world[name] = (
            id(tensor),
            tensor.data_ptr(),
            tensor.device,
            tensor.requires_grad,
            tensor._version,
            tensor.tolist(),
            grad,
        )
    for module in model.modules():
        if isinstance(module, torch.nn.GRU):
            world["gru"] = [id(w) for w in module._flat_weights]
    return world


def _construct(task: FineTuningTask, device: torch.device) -> None:
    FineTuningTask(task.model, task._dataset, forward=task.forward)


_LOOKS: dict[str, Callable[[FineTuningTask, torch.device], object]] = {
    "construction": _construct,
    "fingerprint": lambda task, device: task.fingerprint,
    "initial_outputs": lambda task, device: task.initial_outputs(device),
    "compute_spectrum": lambda task, device: compute_spectrum(task, device=device),
    "exact_kernel in blocks": lambda task, device: exact_kernel(
        task, device=device, dtype=torch.float64, max_memory=95_000
    ),
    "measure_throughput": lambda task, device: measure_throughput(
        task, device=device, seconds_per_batch_size=0.0
    ),
}


@pytest.mark.parametrize("look", _LOOKS)
def test_model_comes_back_as_it_was(look: str, device: torch.device) -> None:
    model = _Restless(device)
    before = _world(model)
    task = FineTuningTask(model, _RestlessData())
    assert _world(model) == before
    _LOOKS[look](task, device)
    assert _world(model) == before


@pytest.mark.parametrize(
    ("look", "n_calls"),
    [
        ("construction", 0),
        ("construction", 1),
        ("initial_outputs", 0),
        ("compute_spectrum", 1),
        ("compute_spectrum", 7),
        ("compute_spectrum", 20),
        ("exact_kernel in blocks", 1),
        ("exact_kernel in blocks", 20),
        ("measure_throughput", 0),
        ("measure_throughput", 3),
    ],
)
def test_model_comes_back_as_it_was_after_an_interruption(
    look: str, n_calls: int, device: torch.device
) -> None:
    model = _Restless(device)
    interrupted = _Interrupted(None)
    task = FineTuningTask(model, _RestlessData(), forward=interrupted)
    before = _world(model)
    interrupted.left = n_calls
    with pytest.raises(KeyboardInterrupt):
        _LOOKS[look](task, device)
    assert _world(model) == before


def test_model_comes_back_as_it_was_after_a_gradient_that_is_not_finite(
    device: torch.device,
) -> None:
    model = _Restless(device)
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    task = FineTuningTask(model, _RestlessData(), forward=lambda model, x: model(x).abs().sqrt())
    before = _world(model)
    with pytest.raises(ValueError, match="gradient of output 0 of sample 0 must be finite"):
        compute_spectrum(task, device=device)
    assert _world(model) == before


def test_user_keeps_training_as_if_nobody_had_looked() -> None:
    def train(look: bool) -> list[torch.Tensor]:
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        model = _Restless(CPU)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, 0.9)
        x, y = images()
        for step in range(3):
            if look and step == 1:
                compute_spectrum(FineTuningTask(model, (x, y)))
            optimizer.zero_grad()
            torch.autograd.backward(torch.nn.functional.cross_entropy(model(x), y))
            optimizer.step()
        return [t.detach().clone() for t in [*model.parameters(), *model.buffers()]]

    for looked_at, alone in zip(train(True), train(False), strict=True):
        assert torch.equal(looked_at, alone)


@pytest.mark.parametrize(
    "context",
    [torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_surrounding_modes_do_not_change_the_result(context: Any) -> None:
    task = FineTuningTask(mlp(), vectors(5))
    expected = exact_kernel(task, device=CPU).gram
    with context:
        np.testing.assert_array_equal(exact_kernel(task, device=CPU).gram, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile])
def test_wrappers_around_the_model_are_seen_through(wrap: Callable[..., Any]) -> None:
    inner = mlp()
    task = FineTuningTask(wrap(inner), vectors())
    assert task.model is inner
    assert FineTuningTask(inner, vectors()).fingerprint == task.fingerprint


def test_repr_and_sizes() -> None:
    task = FineTuningTask(case("frozen parameters").model, vectors(), name="mine")
    assert repr(task) == (
        "FineTuningTask(name='mine', n_samples=20, n_outputs=3, n_parameters=67, "
        "loss='cross_entropy')"
    )


# The fingerprint


def _fingerprint(model: torch.nn.Module, data: Any = None, **arguments: Any) -> str:
    return FineTuningTask(model, vectors() if data is None else data, **arguments).fingerprint


def test_fingerprint_is_a_sha256_of_the_weights_as_they_are_now() -> None:
    model = mlp()
    task = FineTuningTask(model, vectors())
    before = task.fingerprint
    assert len(bytes.fromhex(before)) == 32
    with torch.no_grad():
        model.get_parameter("0.weight").add_(1.0)
    assert task.fingerprint != before
    with torch.no_grad():
        model.get_parameter("0.weight").sub_(1.0)


def test_fingerprint_stays_with_mode_name_and_copy() -> None:
    model = cnn()
    before = _fingerprint(model, images())
    assert _fingerprint(model.train(), images()) == before
    assert _fingerprint(model.eval(), images()) == before
    assert _fingerprint(model, images(), name="another") == before
    assert _fingerprint(copy.deepcopy(model), images()) == before
    assert _fingerprint(model, TensorDataset(*images())) == before


@given(name=st.sampled_from(sorted(dict(cnn().state_dict()))), data=st.data())
@settings(max_examples=40)
def test_fingerprint_changes_with_any_single_weight_or_buffer(
    name: str, data: st.DataObject
) -> None:
    model = cnn()
    model.get_parameter("0.weight").requires_grad_(False)
    before = _fingerprint(model, images())
    state = model.state_dict()
    index = data.draw(st.integers(0, state[name].numel() - 1))
    values = state[name].view(-1)
    changed = (
        values[index] + 1
        if name.endswith("tracked")
        else torch.nextafter(values[index], -values[index])
    )
    values[index] = changed
    assert _fingerprint(model, images()) != before


@pytest.mark.parametrize("index", [0, 63, 64, 69])
def test_fingerprint_changes_with_any_sample_or_label(index: int) -> None:
    x, y = vectors(70)
    before = _fingerprint(mlp(), (x, y))
    changed = x.clone()
    changed[index, 3] += 1e-6
    assert _fingerprint(mlp(), (changed, y)) != before
    changed = y.clone()
    changed[index] = (changed[index] + 1) % 3
    assert _fingerprint(mlp(), (x, changed)) != before
    assert _fingerprint(mlp(), (x[:-1], y[:-1])) != before
    order = torch.arange(70).roll(1)
    assert _fingerprint(mlp(), (x[order], y[order])) != before


def test_fingerprint_changes_with_the_loss_and_its_settings() -> None:
    x, y = vectors()
    losses: list[Any] = [
        "cross_entropy",
        torch.nn.CrossEntropyLoss(label_smoothing=0.1),
        torch.nn.CrossEntropyLoss(label_smoothing=0.2),
        torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])),
        torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 4.0])),
    ]
    assert len({_fingerprint(mlp(), (x, y), loss=loss) for loss in losses}) == len(losses)
    same = _fingerprint(mlp(), (x, y), loss=torch.nn.CrossEntropyLoss())
    assert same == _fingerprint(mlp(), (x, y))


def test_fingerprint_changes_with_what_is_trainable() -> None:
    model = mlp()
    before = _fingerprint(model)
    model.get_parameter("0.bias").requires_grad_(False)
    assert _fingerprint(model) != before


class _Scaled(torch.nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.inner = mlp()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.scale * self.inner(x)
        return outputs


def _scaling(scale: float) -> Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]:
    return lambda model, x: scale * model(x)


def _scaled_by(scale: float, model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    outputs: torch.Tensor = scale * model(x)
    return outputs


class _ScalesBy:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def forward(self, model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return _scaled_by(self.scale, model, x)

    __call__ = forward


def test_fingerprint_changes_with_settings_of_the_model_that_are_no_weights() -> None:
    assert _fingerprint(_Scaled(1.0)) != _fingerprint(_Scaled(2.0))
    assert _fingerprint(_Scaled(1.0)) == _fingerprint(_Scaled(1.0))
    relu, gelu = (
        torch.nn.Sequential(torch.nn.Linear(6, 3), activation)
        for activation in (torch.nn.ReLU(), torch.nn.GELU())
    )
    gelu.load_state_dict(relu.state_dict())
    assert _fingerprint(relu) != _fingerprint(gelu)


def test_fingerprint_changes_with_the_code_of_the_model() -> None:
    def build(forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> torch.nn.Module:
        kind = type("Model", (_Scaled,), {"forward": forward})
        model: torch.nn.Module = kind(1.0)
        return model

    doubled = build(lambda self, x: self.inner(2.0 * x))
    tripled = build(lambda self, x: self.inner(3.0 * x))
    assert _fingerprint(doubled) != _fingerprint(tripled)


@pytest.mark.parametrize(
    "make",
    [
        _scaling,
        lambda scale: functools.partial(_scaled_by, scale),
        lambda scale: eval(f"lambda model, x: {scale} * model(x)"),
        lambda scale: eval(f"lambda model, x, s={scale}: s * model(x)"),
        lambda scale: _ScalesBy(scale).forward,
        _ScalesBy,
    ],
    ids=["closure", "partial", "constant", "default", "method", "callable object"],
)
def test_fingerprint_changes_with_what_forward_does(make: Callable[[float], Any]) -> None:
    assert _fingerprint(mlp(), forward=make(1.0)) == _fingerprint(mlp(), forward=make(1.0))
    assert _fingerprint(mlp(), forward=make(1.0)) != _fingerprint(mlp(), forward=make(2.0))
    assert _fingerprint(mlp(), forward=make(1.0)) != _fingerprint(mlp())


def test_fingerprint_stays_while_forward_counts_its_calls() -> None:
    calls: list[int] = []

    def forward(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        outputs: torch.Tensor = model(x)
        return outputs

    task = FineTuningTask(mlp(), vectors(), forward=forward)
    before = task.fingerprint
    task.initial_outputs(CPU)
    assert len(calls) > 0
    assert task.fingerprint == before


def constants_of_any_order(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """A set of strings, whose order depends on the process, among the function's constants."""
    kept = {k: v for k, v in inputs.items() if k in {"input_ids", "attention_mask", "a", "b"}}
    outputs: torch.Tensor = model(**kept).logits
    return outputs


def all_fingerprints() -> list[str]:
    named = [case(name) for name in CASES]
    return [
        _fingerprint(TextClassifier_seeded(), texts(), forward=constants_of_any_order),
        *(_fingerprint(c.model, c.data, forward=c.forward) for c in named),
    ]


def TextClassifier_seeded() -> torch.nn.Module:
    torch.manual_seed(0)
    return TextClassifier()


def test_fingerprint_is_the_same_in_another_process() -> None:
    code = "from tests.task.test_task import all_fingerprints; print(*all_fingerprints())"
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "123"},
    )
    assert other.stdout.split() == all_fingerprints()


def test_what_holds_no_numbers_is_refused() -> None:
    x, y = vectors(6)
    with torch.device("meta"):
        empty = torch.nn.Linear(6, 3)
    offloaded = mlp()
    offloaded.register_buffer("scale", torch.ones(1, device="meta"))
    for model, data, what in (
        (empty, (x, y), "The model's weights and buffers .'weight'."),
        (offloaded, (x, y), "The model's weights and buffers .'scale'."),
        (mlp(), (x.to("meta"), y), "The data"),
        (mlp(), (x, y.to("meta")), "The data"),
    ):
        with pytest.raises(ValueError, match=f"{what} must hold numbers but got .* meta device"):
            FineTuningTask(model, data)


def test_samples_that_do_not_fit_into_one_batch_are_refused() -> None:
    x, y = vectors(6)
    ragged: list[Any] = [(x[i], y[i] if i else y[:2]) for i in range(6)]
    with pytest.raises(ValueError, match="The samples 0 to 5 must fit into one batch but do not"):
        FineTuningTask(mlp(), ragged)
    unknown: list[Any] = [(x[i], int(y[i]) if i else None) for i in range(6)]
    with pytest.raises(TypeError, match="The samples 0 to 5 must fit into one batch but do not"):
        FineTuningTask(mlp(), unknown)


# One model, several threads, and other things of a second look


@pytest.mark.parametrize("engine", ["exact", "sketch", "refined_sketch", "matrix_free"])
def test_threads_that_share_a_model_take_turns(engine: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Dropout(0.5), torch.nn.Linear(10, 3)
    )

    wrapped = torch.nn.Sequential(model)

    def computed(k: int) -> Any:
        task = FineTuningTask(wrapped if k % 2 else model, vectors(9))
        return compute_spectrum(task, engine=engine, device="cpu", measure_speed=False)

    alone = computed(0)
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(computed, range(6)))
    for one in together:
        np.testing.assert_allclose(one.eigenvalues, alone.eigenvalues, rtol=1e-5)
    assert all(module.training for module in model.modules())
    assert len(list(model.parameters())) == 4
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_that_was_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = torch.nn.Linear(6, 3)
    with pytest.raises(ValueError, match=r"'weight' was made under torch\.inference_mode"):
        FineTuningTask(model, vectors(4))


def test_a_cross_entropy_of_one_output_is_refused() -> None:
    inputs = torch.randn(5, 6)
    with pytest.raises(ValueError, match=r"single output is always zero.*\(batch, 1\)"):
        FineTuningTask(torch.nn.Linear(6, 1), (inputs, torch.zeros(5, dtype=torch.long)))


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"explained_trace": "a"}, ValueError),
        ({"probe": "no"}, TypeError),
        ({"measure_speed": 3}, TypeError),
    ],
)
def test_settings_of_another_kind_are_refused(
    setting: dict[str, Any], error: type[Exception]
) -> None:
    task = FineTuningTask(torch.nn.Linear(6, 3), vectors(4))
    with pytest.raises(error, match=f"{next(iter(setting))} must be"):
        compute_spectrum(task, **setting)
