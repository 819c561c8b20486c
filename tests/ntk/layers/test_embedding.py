"""The rule of tables."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest
import torch

from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.ntk import plan_spectrum
from optuna_ttp.task import FineTuningTask
from tests.cases import Case
from tests.ntk.kernels import check_kernel
from tests.ntk.kernels import SEEDS
from tests.ntk.kernels import with_head
from tests.reference import brute_force_jacobian
from tests.reference import relative_error


@given(seed=SEEDS, vocabulary=st.integers(2, 60), n_tokens=st.integers(1, 6), padded=st.booleans())
@settings(max_examples=15)
def test_embeddings(seed: int, vocabulary: int, n_tokens: int, padded: bool) -> None:
    torch.manual_seed(seed)
    layer = torch.nn.Embedding(vocabulary, 4, padding_idx=0 if padded else None)
    tokens = torch.randint(vocabulary, (5, n_tokens))
    tokens[0] = 1
    check_kernel(with_head(layer, tokens, -1), derivatives={"layer.weight": "rule"})


@pytest.mark.parametrize("engine", ["exact", "columns", "matrix_free"])
@pytest.mark.parametrize("layer", [torch.nn.Embedding, torch.nn.EmbeddingBag])
def test_tables_that_renormalise_their_rows(layer: Any, engine: str) -> None:
    """They write to their weights whenever they run; the user's must stay as they are."""
    torch.manual_seed(0)
    table = layer(11, 6, max_norm=0.5)
    model = torch.nn.Sequential(table, torch.nn.Flatten(), torch.nn.Tanh(), torch.nn.LazyLinear(3))
    data = torch.randint(11, (9, 7)), torch.arange(9) % 3
    with torch.no_grad():
        model(data[0][:1])
        # Far above the largest norm again.
        table.weight.normal_()
    before = {name: (p.clone(), p._version) for name, p in model.named_parameters()}
    task = FineTuningTask(model, data)
    fingerprint = task.fingerprint
    spectrum = compute_spectrum(task, engine=engine, show_progress_bar=False)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name][0], rtol=0, atol=0)
        assert p._version == before[name][1]
    assert task.fingerprint == fingerprint
    if layer is torch.nn.Embedding:
        claims = {p.name: p.derivative for p in plan_spectrum(task).layers}
        assert set(claims.values()) == {"rule"}
    # At the weights that the forward pass uses: it renormalises this copy.
    jacobian = brute_force_jacobian(Case(model, data))
    kernel = (spectrum.eigenvectors * spectrum.eigenvalues) @ spectrum.eigenvectors.T
    assert relative_error(kernel, jacobian @ jacobian.T) < 1e-5
    assert task.fingerprint == fingerprint
