"""The exact engine on models of the transformers library as they are, with tiny random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pytest
import torch

from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.ntk import exact_kernel
from optuna_ttp.ntk import plan_spectrum
from optuna_ttp.task import FineTuningTask
from tests.cases import Case
from tests.reference import brute_force_jacobian
from tests.reference import relative_error


transformers = pytest.importorskip("transformers")

_N, _T = 7, 6


def _texts(*, padded: bool = True) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    items = []
    for n in range(_N):
        tokens = torch.randint(3, 40, (_T,), generator=generator)
        mask = torch.arange(_T) < (_T - n % 3 if padded else _T)
        items.append(
            {
                "input_ids": torch.where(mask, tokens, 0),
                "attention_mask": mask.long(),
                "labels": n % 3,
            }
        )
    return items


def _pictures() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(_N, 3, 8, 8, generator=generator)
    return [{"pixel_values": p, "labels": n % 3} for n, p in enumerate(pictures)]


def _bert() -> Case:
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=3,
    )
    return Case(transformers.BertForSequenceClassification(config), _texts())


def _distilbert() -> Case:
    config = transformers.DistilBertConfig(
        vocab_size=40,
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=24,
        max_position_embeddings=12,
        num_labels=3,
    )
    return Case(transformers.DistilBertForSequenceClassification(config), _texts())


def _gpt2() -> Case:
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
    return Case(transformers.GPT2ForSequenceClassification(config), _texts())


_SMALL_DECODER: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 12,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _llama() -> Case:
    config = transformers.LlamaConfig(**_SMALL_DECODER)
    return Case(transformers.LlamaForSequenceClassification(config), _texts())


def _gemma() -> Case:
    config = transformers.Gemma2Config(head_dim=8, **_SMALL_DECODER)
    return Case(transformers.Gemma2ForSequenceClassification(config), _texts())


def _vit() -> Case:
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
    )
    return Case(transformers.ViTForImageClassification(config), _pictures())


def _lora(*, use_dora: bool = False) -> Case:
    one = _bert()
    config = peft.LoraConfig(
        r=2,
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
        use_dora=use_dora,
    )
    model = peft.get_peft_model(one.model, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # It starts at zero, where the gradient of the other factor is zero as well.
            if "lora_B" in name:
                p.normal_()
    return Case(model, one.data)


def _dora() -> Case:
    return _lora(use_dora=True)


MODELS: dict[str, Callable[[], Case]] = {
    "bert": _bert,
    "distilbert": _distilbert,
    "gpt2": _gpt2,
    "llama": _llama,
    "gemma": _gemma,
    "vit": _vit,
    "lora": _lora,
    "dora": _dora,
}
# Whose norms round to single precision, in which their gradients are added up.
ROUNDED = {"gemma"}
# What no rule knows is differentiated on its own; all else by the rules of its layers.
ALONE = {
    "llama": {
        "model.norm.weight",
        *(
            f"model.layers.{k}.{name}_layernorm.weight"
            for k in range(2)
            for name in ("input", "post_attention")
        ),
    },
    "gemma": {
        # A table that scales what it gives.
        "model.embed_tokens.weight",
        "model.norm.weight",
        *(
            f"model.layers.{k}.{name}_layernorm.weight"
            for k in range(2)
            for name in (
                "input",
                "post_attention",
                "pre_feedforward",
                "post_feedforward",
            )
        ),
    },
    "dora": {
        f"base_model.model.bert.encoder.layer.{k}.attention.self.{name}.lora_{part}.default.weight"
        for k in range(2)
        for name in ("query", "value")
        for part in ("A", "B", "magnitude_vector")
    },
    "vit": {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"},
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_the_transformers_library(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    one = MODELS[name]()
    with torch.no_grad():
        for p in one.model.parameters():
            # Larger than the initial ones, so that nothing is nearly linear.
            p.mul_(4.0 if p.ndim > 1 else 1.0)
    jacobian = brute_force_jacobian(one)
    expected = jacobian @ jacobian.T
    task = FineTuningTask(one.model, one.data)
    double = 1e-6 if name in ROUNDED else 1e-12
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, double)):
        kernel = exact_kernel(task, device=device, dtype=dtype, show_progress_bar=False)
        assert relative_error(kernel.gram, expected) < tolerance
    derivatives = {p.name: p.derivative for p in plan_spectrum(task, device=device).layers}
    assert {n for n, d in derivatives.items() if d != "rule"} == ALONE.get(name, set())
    assert set(derivatives.values()) <= {"rule", "vmap"}
    assert np.isfinite(kernel.weight_outputs).all()


# The columns engine refuses DoRA by name, see test_low_rank_adapters.py.
@pytest.mark.parametrize("engine", ["exact", "matrix_free"])
def test_every_engine_differentiates_weights_of_modules_among_the_arguments(engine: str) -> None:
    # DoRA hands one module to another, whose weights then carry a gradient of their own.
    torch.manual_seed(0)
    one = _dora()
    jacobian = brute_force_jacobian(one)
    expected = np.linalg.eigvalsh(jacobian @ jacobian.T)[::-1]
    spectrum = compute_spectrum(
        FineTuningTask(one.model, one.data),
        engine=engine,
        measure_speed=False,
        show_progress_bar=False,
    )
    np.testing.assert_allclose(spectrum.eigenvalues[0], expected[0], rtol=1e-3)
    np.testing.assert_allclose(spectrum.trace, expected.sum(), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    def look(*, checkpointing: bool) -> Any:
        torch.manual_seed(0)
        one = _bert()
        if checkpointing:
            model: Any = one.model
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        task = FineTuningTask(one.model, one.data)
        return compute_spectrum(task, device="cpu", show_progress_bar=False)

    plain, checkpointed = look(checkpointing=False), look(checkpointing=True)
    np.testing.assert_allclose(checkpointed.eigenvalues, plain.eigenvalues, rtol=1e-6)
    assert checkpointed.throughput is not None
