"""Low-rank adapters of peft, and what is not recognised as one."""

from __future__ import annotations

from collections.abc import Callable
import copy
from typing import Any

import numpy as np
import pytest
import torch

from optuna_ttp import compute_spectrum
from optuna_ttp import FineTuningTask
from optuna_ttp import Spectrum
from optuna_ttp.dynamics import LinearisedModel
from tests.low_rank import adapted_task
from tests.low_rank import AdaptedLinear
from tests.low_rank import MeanOfTokens


_N, _T = 7, 6


def _tokens(*, padded: bool) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    items = []
    for n in range(_N):
        tokens = torch.randint(3, 40, (_T,), generator=generator)
        mask = torch.arange(_T) < (_T - n % 3 if padded else _T)
        tokens = torch.where(mask, tokens, 0)
        items.append({"input_ids": tokens, "attention_mask": mask.long(), "labels": n % 3})
    return items


def _spectrum(task: FineTuningTask, **settings: Any) -> Spectrum:
    return compute_spectrum(
        task, engine="columns", dtype="float64", measure_speed=False, probe=False, **settings
    )


def _bert() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=3,
    )
    model: torch.nn.Module = transformers.BertForSequenceClassification(config)
    return model


def _gpt2() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=40,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=12,
        num_labels=3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model: torch.nn.Module = transformers.GPT2ForSequenceClassification(config)
    return model


def _adapted(make: Callable[[], torch.nn.Module], **settings: Any) -> torch.nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=6, **settings)
    model: torch.nn.Module = peft.get_peft_model(make(), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # At zero, where B starts, the gradient of A would be zero as well.
            if "lora_B" in name:
                p.normal_()
    return model


_HEAD = {"modules_to_save": ["classifier"]}
_MODELS: dict[str, tuple[Callable[[], torch.nn.Module], dict[str, Any], int]] = {
    "linear": (_bert, {"target_modules": ["query", "value"], **_HEAD}, 4),
    "conv1d": (
        _gpt2,
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["score"]},
        2,
    ),
    "with a bias": (
        _bert,
        {"target_modules": ["query"], "lora_bias": True, "bias": "none", **_HEAD},
        2,
    ),
    "with all biases": (_bert, {"target_modules": ["dense"], "bias": "all", **_HEAD}, 7),
    "rank-stabilised": (_bert, {"target_modules": ["key"], "use_rslora": True, **_HEAD}, 2),
}


@pytest.mark.parametrize("name", _MODELS)
def test_gradients_of_adapters_of_peft_are_those_of_the_network(
    name: str, device: torch.device
) -> None:
    make, settings, n_layers = _MODELS[name]
    model = _adapted(make, **settings)
    data = _tokens(padded=make is _bert)
    task = FineTuningTask(model, data)
    spectrum = Spectrum.from_bytes(_spectrum(task, device=device).to_bytes())
    jacobian = spectrum.jacobian
    assert jacobian is not None
    assert len(spectrum.low_rank) == n_layers
    linearised = LinearisedModel.from_columns(spectrum, dtype=torch.float64)
    assert linearised.weights is not None
    state = linearised.features.new_zeros((1, linearised.rank))
    gradient = linearised.gradient(state)[0].numpy()
    real = copy.deepcopy(model).double().eval()
    batch = {k: torch.stack([torch.as_tensor(d[k]) for d in data]) for k in data[0]}
    torch.autograd.backward(real(**batch).loss)
    gradients = {n: p.grad for n, p in real.named_parameters() if p.requires_grad}
    assert tuple(gradients) == jacobian.names
    by_parameter = linearised.weights.parameters.numpy()[:-1]
    for k, one in enumerate(gradients.values()):
        assert one is not None
        ours = gradient[:-1][by_parameter == k]
        expected = one.flatten().numpy()
        if not any(k in layer.parameters for layer in spectrum.low_rank):
            expected = expected[jacobian.positions[jacobian.parameters == k]]
        np.testing.assert_allclose(ours, expected, atol=1e-7 * max(1.0, np.abs(expected).max()))


def test_arrays_are_in_half_precision_unless_they_are_computed_in_double() -> None:
    coarse = compute_spectrum(
        adapted_task(), engine="columns", measure_speed=False, probe=False, device="cpu"
    )
    fine = _spectrum(adapted_task(), device="cpu")
    for one, other in zip(coarse.low_rank, fine.low_rank, strict=True):
        for name in ("inputs", "cotangents"):
            assert getattr(one, name).dtype == np.float16
            assert np.abs(getattr(one, name)).max() == pytest.approx(1.0)
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-3)


def test_a_layer_that_is_called_twice_adds_up() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = AdaptedLinear(torch.nn.Linear(4, 4))
            self.layer.start()
            self.head = torch.nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            outputs: torch.Tensor = self.head(self.layer(self.layer(x).tanh()))
            return outputs

    torch.manual_seed(0)
    model = Twice().double()
    x, y = torch.randn(9, 4).double(), torch.randint(2, (9,))
    spectrum = _spectrum(FineTuningTask(model, (x, y)), device="cpu")
    assert spectrum.low_rank[0].inputs.shape == (9, 2, 4)
    linearised = LinearisedModel.from_columns(spectrum, dtype=torch.float64)
    gradient = linearised.gradient(linearised.features.new_zeros((1, linearised.rank)))[0]
    torch.autograd.backward(torch.nn.functional.cross_entropy(model(x), y))
    grads = [getattr(model.layer, f"lora_{k}")["default"].weight.grad for k in "AB"]
    expected = torch.cat([g.flatten() for g in grads])
    np.testing.assert_allclose(gradient[: len(expected)], expected, rtol=1e-9)


@pytest.mark.parametrize("fixed", ["lora_A", "lora_B"])
def test_an_adapter_with_a_fixed_factor_is_linear_and_has_columns(fixed: str) -> None:
    task = adapted_task(started=True)
    part = getattr(task.model.layer, fixed)
    part.requires_grad_(requires_grad=False)
    again = FineTuningTask(task.model, task._dataset.tensors)
    spectrum = _spectrum(again, device="cpu")
    assert spectrum.low_rank == ()
    n_weights = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    assert spectrum.jacobian is not None
    assert spectrum.jacobian.n_columns == n_weights


def test_an_adapter_that_is_not_trained_needs_no_structure() -> None:
    layer = _layer(use_dora={"default": True}).requires_grad_(requires_grad=False)
    assert _spectrum(_task(layer), device="cpu").low_rank == ()


def _layer(**attributes: Any) -> AdaptedLinear:
    layer = AdaptedLinear(torch.nn.Linear(6, 5), dropout=attributes.pop("dropout", 0.0))
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def _several() -> AdaptedLinear:
    layer = _layer()
    for part in (layer.lora_A, layer.lora_B):
        part["other"] = copy.deepcopy(part["default"])
    layer.lora_dropout["other"] = torch.nn.Identity()
    layer.scaling["other"] = 1.0
    layer.active_adapters = ["default", "other"]
    return layer


def _embedding() -> AdaptedLinear:
    table = torch.nn.ParameterDict({"default": torch.nn.Parameter(torch.zeros(2, 3))})
    return _layer(lora_embedding_A=table)


def _biased() -> AdaptedLinear:
    layer = _layer()
    layer.lora_A["default"] = torch.nn.Linear(6, 2)
    return layer


def _task(layer: torch.nn.Module) -> FineTuningTask:
    torch.manual_seed(0)
    x, y = torch.randn(8, 4, 6), torch.randint(3, (8,))
    task = FineTuningTask(MeanOfTokens(torch.nn.Linear(6, 5), 5), (x, y))
    task.model.layer = layer
    return FineTuningTask(task.model, (x, y)) if type(layer) is AdaptedLinear else task


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _layer(use_dora={"default": True}), r"use_dora \(DoRA\)"),
        (
            lambda: _layer(lora_magnitude_vector={"default": torch.ones(1)}),
            r"use_dora \(DoRA\)",
        ),
        (lambda: _layer(lora_variant={"default": object()}), "the variant object"),
        (lambda: _layer(dropout=0.1), "lora_dropout=0.1 in training mode"),
        (lambda: _layer(merged=True), "merged into the weight"),
        (lambda: _layer(disable_adapters=True), "one that is disabled"),
        (_several, "2 active adapters"),
        (_embedding, "one of an embedding"),
        (_biased, "a factor A with a bias"),
    ],
    ids=["DoRA", "magnitude", "variant", "dropout", "merged", "off", "several", "table", "biased"],
)
def test_what_is_not_plain_lora_is_refused_by_name(
    make: Callable[[], AdaptedLinear], message: str
) -> None:
    task = _task(make())
    with pytest.raises(ValueError, match=f"adapter of 'layer' must be plain LoRA.*{message}"):
        _spectrum(task, device="cpu")


def test_dropout_does_not_matter_in_evaluation_mode() -> None:
    task = _task(_layer(dropout=0.1).eval())
    assert len(_spectrum(task, device="cpu").low_rank) == 1


def test_dora_of_peft_is_refused_by_name() -> None:
    model = _adapted(_bert, target_modules=["query"], use_dora=True, **_HEAD)
    task = FineTuningTask(model, _tokens(padded=True))
    with pytest.raises(ValueError, match=r"attention\.self\.query' must be plain LoRA.*DoRA"):
        _spectrum(task, device="cpu")


def test_shared_factors_are_refused() -> None:
    one, other = _layer(), _layer()
    other.lora_A = one.lora_A
    torch.manual_seed(0)
    model = MeanOfTokens(torch.nn.Sequential(one, torch.nn.Linear(5, 6), other), 5)
    task = FineTuningTask(model, (torch.randn(8, 4, 6), torch.randint(3, (8,))))
    with pytest.raises(ValueError, match=r"shared ones in 'layer\.0'"):
        _spectrum(task, device="cpu")


def test_arrays_beyond_the_memory_are_refused() -> None:
    task = adapted_task(n_samples=40, n_tokens=300)
    with pytest.raises(ValueError, match=r"must fit max_memory, .* Use fewer samples"):
        _spectrum(task, device="cpu", max_memory=2**20)
