"""What the engines are compared with, and the report on it."""

from __future__ import annotations

import json
from pathlib import Path
import sys
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.engine import report
from benchmarks.engine.networks import problem
from benchmarks.engine.peers import KERNELS
from benchmarks.engine.peers import torch_func_products
from optuna_ttp import FineTuningTask
from optuna_ttp.ntk import exact_kernel


def _gram(
    model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> np.ndarray[Any, Any]:
    task = FineTuningTask(model, (images, labels))
    settings: dict[str, Any] = {"device": torch.device("cpu"), "show_progress_bar": False}
    return exact_kernel(task, dtype=torch.float64, **settings).gram


def test_peers_find_the_same_kernel() -> None:
    model, images, labels = problem("residual", 3, n_classes=4, width=0.25)
    model, images = model.double(), images.double()
    expected = _gram(model, images, labels)
    for name in ("torch_func", "torch_func_by_parameter"):
        assert KERNELS[name](model, images) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    values = torch_func_products(model, images)
    eigenvalues = np.linalg.eigvalsh(expected)[::-1][: len(values)]
    assert values == pytest.approx(eigenvalues, rel=1e-3)


def _result(method: str, cost: float) -> dict[str, Any]:
    return {"method": method, "cpu_seconds": cost, "peak_mib": cost**0.5, "date": "2026-11-28"}


def test_the_report_has_every_method_its_failures_and_the_exponents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [
        {
            "network": "residual",
            "n_samples": n,
            "n_classes": 10,
            "threads": 1,
            "bound": {"cpu_seconds": 0.5 * n**2, "gflop_per_second": 70.0},
            "results": [
                _result("ours_exact", 1.0 * n**2),
                _result("torch_func", 4.0 * n**2),
                {"method": "torchjd", "failed": "ValueError: no | such", "date": "2026-11-28"},
            ],
        }
        for n in (32, 64, 128)
    ]
    (tmp_path / "exact.json").write_text(json.dumps({"cells": cells}))
    monkeypatch.setattr(sys, "argv", ["report", "--results", str(tmp_path)])
    report.main()
    text = (tmp_path / "engine.md").read_text()
    assert text.count("our share of it: 0.5.") == 3
    assert "| torch_func | 4,096 | 4 |" in text
    assert "failed: ValueError: no / such" in text
    assert "| samples N | ours_exact | 32, 64, 128 | 2.00 | 2.00 | 1.00 | 1.00 |" in text
    assert (tmp_path / "growth.png").stat().st_size > 1000
