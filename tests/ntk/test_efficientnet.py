"""The spectrum of an EfficientNet as its library builds it, with random weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from optuna_ttp import compute_spectrum
from optuna_ttp import FineTuningTask
from optuna_ttp.ntk import plan_spectrum
from tests.cases import Case
from tests.reference import brute_force_jacobian


# The network halves its input five times.
_SIZE = 32


@pytest.mark.slow
def test_an_efficientnet_as_it_is(device: torch.device) -> None:
    library = pytest.importorskip("efficientnet_lite_pytorch")
    torch.manual_seed(0)
    model = library.EfficientNet.from_name("efficientnet-lite0", num_classes=3)
    images = torch.randn(8, 3, _SIZE, _SIZE)
    with torch.no_grad():
        for _ in range(20):
            # With the initial statistics of batch norm the signal dies out.
            model.train()(images)
    before = copy.deepcopy(model.state_dict())
    data = images[:4], torch.arange(4) % 3
    jacobian = brute_force_jacobian(Case(model, data))
    task = FineTuningTask(model, data)
    spectrum = compute_spectrum(
        task,
        engine="exact",
        device=device,
        measure_speed=False,
        probe=False,
        show_progress_bar=False,
    )
    expected = np.linalg.eigvalsh(jacobian @ jacobian.T)[::-1]
    assert spectrum.metadata.engine == "exact"
    np.testing.assert_allclose(
        spectrum.eigenvalues, expected[: spectrum.rank], rtol=1e-3, atol=1e-5 * expected[0]
    )
    assert {layer.derivative for layer in plan_spectrum(task, device=device).layers} == {"rule"}
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.training
