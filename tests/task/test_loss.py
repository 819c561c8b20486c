from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
import torch

from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.task import Loss
from tests.cases import spectrum


def _cross_entropies() -> list[torch.nn.CrossEntropyLoss]:
    weight = torch.tensor([0.3, 2.0, 0.0], dtype=torch.float64)
    return [
        torch.nn.CrossEntropyLoss(),
        torch.nn.CrossEntropyLoss(label_smoothing=0.2),
        torch.nn.CrossEntropyLoss(weight=weight),
        torch.nn.CrossEntropyLoss(weight=weight, label_smoothing=0.3),
    ]


def _model(loss: torch.nn.Module, seed: int = 0) -> LinearisedModel:
    return LinearisedModel.from_spectrum(spectrum(loss, seed=seed), dtype=torch.float64)


def _torch_targets(model: LinearisedModel) -> torch.Tensor:
    if model.kind == "mse":
        return model.soft_targets
    assert model.labels is not None
    return model.labels


@pytest.mark.parametrize("loss", [*_cross_entropies(), torch.nn.MSELoss()], ids=str)
def test_loss_and_gradient_equal_those_of_the_torch_module(loss: torch.nn.Module) -> None:
    model = _model(loss)
    generator = torch.Generator().manual_seed(1)
    shape = (4, *model.initial_outputs.shape)
    outputs = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    for k, values in enumerate(model.loss(outputs)):
        expected = loss(outputs[k], _torch_targets(model))
        assert values.item() == pytest.approx(expected.item(), rel=1e-12)
        (gradient,) = torch.autograd.grad(expected, outputs)
        residuals = model.residuals(
            outputs[k : k + 1].detach(), model.soft_targets, model.normalisers
        )
        torch.testing.assert_close(residuals[0], gradient[k], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("loss", [*_cross_entropies(), torch.nn.MSELoss()], ids=str)
def test_gradient_of_a_mini_batch_equals_that_of_the_torch_module(loss: torch.nn.Module) -> None:
    model = _model(loss)
    batch = torch.tensor([7, 2, 9, 4])
    outputs = model.initial_outputs[batch].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(outputs, _torch_targets(model)[batch]), outputs)
    residuals = model.residuals(
        outputs.detach()[None], model.soft_targets[batch], model.normalisers[batch]
    )
    torch.testing.assert_close(residuals[0], gradient, rtol=1e-10, atol=1e-14)


def test_batch_of_weightless_samples_moves_nothing() -> None:
    model = _model(torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, 0.0])))
    assert model.labels is not None
    batch = (model.labels == 2).nonzero()[:, 0]
    assert len(batch) > 0
    residuals = model.residuals(
        model.initial_outputs[None, batch], model.soft_targets[batch], model.normalisers[batch]
    )
    assert (residuals == 0).all()


@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=8),
    smoothing=st.floats(0.0, 0.99),
    weights=st.none() | st.lists(st.floats(0.01, 10.0), min_size=4, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_soft_targets_reproduce_torch_cross_entropy(
    labels: list[int], smoothing: float, weights: list[float] | None, seed: int
) -> None:
    module = torch.nn.CrossEntropyLoss(
        weight=None if weights is None else torch.tensor(weights, dtype=torch.float64),
        label_smoothing=smoothing,
    )
    outputs = np.random.default_rng(seed).normal(0, 3, (len(labels), 4))
    q, n = Loss.from_user(module).soft_targets(np.array(labels), 4)
    log_p = torch.tensor(outputs).log_softmax(dim=1).numpy()
    expected = module(torch.tensor(outputs), torch.tensor(labels)).item()
    assert -(q * log_p).sum() / n.sum() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("given_loss", "expected"),
    [
        ("cross_entropy", Loss("cross_entropy")),
        ("mse", Loss("mse")),
        (torch.nn.MSELoss(), Loss("mse")),
        (torch.nn.CrossEntropyLoss(label_smoothing=0.25), Loss("cross_entropy", 0.25)),
        (
            torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.5])),
            Loss("cross_entropy", 0.0, (1.0, 0.5)),
        ),
        (Loss("mse"), Loss("mse")),
    ],
    ids=str,
)
def test_loss_from_user(given_loss: str | torch.nn.Module | Loss, expected: Loss) -> None:
    assert Loss.from_user(given_loss) == expected


@pytest.mark.parametrize(
    "module",
    [
        torch.nn.NLLLoss(),
        torch.nn.BCEWithLogitsLoss(),
        torch.nn.HuberLoss(),
        torch.nn.L1Loss(),
        torch.nn.MultiMarginLoss(),
        torch.nn.Linear(2, 2),
    ],
    ids=lambda module: type(module).__name__,
)
def test_unsupported_torch_module_is_refused_by_name(module: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match=f"The loss {type(module).__name__} is not supported"):
        Loss.from_user(module)


def test_subclass_of_a_supported_loss_is_refused() -> None:
    class MyLoss(torch.nn.CrossEntropyLoss):
        pass

    with pytest.raises(ValueError, match="MyLoss is not supported"):
        Loss.from_user(MyLoss())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (torch.nn.CrossEntropyLoss(reduction="sum"), r"CrossEntropyLoss\(reduction='sum'\)"),
        (torch.nn.MSELoss(reduction="none"), r"MSELoss\(reduction='none'\)"),
        (torch.nn.CrossEntropyLoss(ignore_index=0), r"CrossEntropyLoss\(ignore_index=0\)"),
        (torch.nn.CrossEntropyLoss(label_smoothing=1.0), r"label_smoothing must be in \[0, 1\)"),
        (torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, -1.0])), "class_weights must be"),
        (torch.nn.CrossEntropyLoss(weight=torch.zeros(3)), "must not all be zero"),
        ("hinge", "The loss 'hinge' is not supported"),
    ],
)
def test_unsupported_setting_is_refused_by_name(
    module: str | torch.nn.Module, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Loss.from_user(module)


@pytest.mark.parametrize(
    "thing", [None, 3, torch.nn.functional.cross_entropy], ids=["none", "3", "function"]
)
def test_what_is_no_loss_is_refused(thing: object) -> None:
    with pytest.raises(TypeError, match="must be a name or a torch loss module"):
        Loss.from_user(thing)


@pytest.mark.parametrize(
    "settings",
    [
        {"label_smoothing": float("nan")},
        {"label_smoothing": -0.1},
        {"class_weights": (1.0, float("inf"))},
        {"class_weights": (float("nan"), 1.0)},
    ],
    ids=str,
)
def test_loss_settings_out_of_range_are_refused(
    settings: dict[str, float | tuple[float, ...]],
) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Loss("cross_entropy", **settings)  # type: ignore[arg-type]


def test_mse_takes_no_settings_of_the_cross_entropy() -> None:
    with pytest.raises(ValueError, match="belong to the cross-entropy"):
        Loss("mse", label_smoothing=0.1)
    with pytest.raises(ValueError, match="belong to the cross-entropy"):
        Loss("mse", class_weights=(1.0, 1.0))
