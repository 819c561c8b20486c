"""Predictions for recorded runs of adapters, on a network that is linear in the weight."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.accuracy.adamw.lora_evaluate import FRACTIONS
from benchmarks.accuracy.adamw.lora_evaluate import predict
from benchmarks.accuracy.adamw.recording import Curve
from benchmarks.accuracy.adamw.run import LoraRun
from benchmarks.accuracy.adamw.training import evaluated_steps
from optuna_ttp import compute_spectrum
from tests.columns import train
from tests.low_rank import adapted_task


def test_one_spectrum_serves_runs_with_another_alpha() -> None:
    run = LoraRun(
        learning_rate=0.1,
        batch_size=12,
        beta_1=0.9,
        beta_2=0.999,
        weight_decay=0.01,
        eps=1e-8,
        schedule="constant",
        schedule_steps=0,
        warmup_steps=0,
        max_grad_norm=None,
        seed=0,
        max_steps=50,
        rank=2,
        alpha=4.0,
        rank_stabilised=False,
    )
    spectrum = compute_spectrum(
        adapted_task(rank=2, alpha=16.0), engine="columns", measure_speed=False, probe=False
    )
    losses = train(
        adapted_task(rank=2, alpha=4.0),
        torch.nn.CrossEntropyLoss(),
        lambda m: torch.optim.AdamW(m.parameters(), 0.1),
        batch_size=12,
        n_steps=150,
    )
    steps = np.array(evaluated_steps(150, 1.5))
    none = np.empty(0)
    curve = Curve(none, none, steps.astype(np.float64), losses[steps], none, 0.0, "steps")
    real = np.array([curve.steps_to(f) for f in FRACTIONS])
    assert np.isfinite(real).any()
    np.testing.assert_allclose(predict(spectrum, run, with_a=True), real, rtol=0.02)
    assert not np.allclose(predict(spectrum, run, with_a=False), real, rtol=0.02)
