"""How the data are read: forms, order, targets."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import random
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
from optuna_ttp.task import FineTuningTask
from tests.cases import TextClassifier
from tests.cases import texts
from tests.models import mlp
from tests.models import vectors


CPU = torch.device("cpu")


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


def test_loader_with_a_custom_batch_sampler() -> None:
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
        ((torch.zeros(3, 6), torch.zeros(4).long()), "a row per sample"),
        ((torch.zeros(()), torch.zeros(())), "a row per sample"),
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


def test_samples_that_do_not_fit_into_one_batch_are_refused() -> None:
    x, y = vectors(6)
    ragged: list[Any] = [(x[i], y[i] if i else y[:2]) for i in range(6)]
    with pytest.raises(ValueError, match="The samples 0 to 5 must fit into one batch but do not"):
        FineTuningTask(mlp(), ragged)
    unknown: list[Any] = [(x[i], int(y[i]) if i else None) for i in range(6)]
    with pytest.raises(TypeError, match="The samples 0 to 5 must fit into one batch but do not"):
        FineTuningTask(mlp(), unknown)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_inputs_that_are_not_finite_are_refused(value: float) -> None:
    x, y = vectors(70)
    x[66, 1] = value
    with pytest.raises(ValueError, match=r"inputs must be finite.*in sample 66"):
        FineTuningTask(mlp(), (x, y))
    items = [{"extra": [a], "labels": b} for a, b in zip(x, y, strict=True)]
    with pytest.raises(ValueError, match="inputs must be finite"):
        FineTuningTask(mlp(), items, forward=lambda model, inputs: model(inputs["extra"][0]))


def test_complex_inputs_are_refused() -> None:
    x, y = vectors()
    with pytest.raises(TypeError, match=r"inputs must be real but got torch\.complex64"):
        FineTuningTask(mlp(), (x.to(torch.complex64), y))
