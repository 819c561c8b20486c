"""A sample of columns by four processes against one."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
import json
from pathlib import Path
import subprocess
import sys
import traceback
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as distributed

from optuna_ttp.ntk import compute_spectrum
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.store import SpectrumStore
from optuna_ttp.task import FineTuningTask
from tests.models import cnn
from tests.models import images
from tests.models import mlp
from tests.models import vectors
from tests.reference import relative_error


_N_PROCESSES = 4
pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="needs gloo"
)


def _multipliers() -> FineTuningTask:
    """More validation samples than processes, and learning rates of their own."""
    return FineTuningTask(
        cnn(),
        images(13),
        validation_data=images(6, seed=2),
        learning_rate_multipliers={"9.": 3.0},
    )


def _methods() -> FineTuningTask:
    """A table, tokens, layers of many weights and of few, and fewer validation samples."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(30, 6),
        torch.nn.Linear(6, 40),
        torch.nn.Tanh(),
        torch.nn.Linear(40, 60),
        torch.nn.Tanh(),
        torch.nn.Conv1d(5, 8, 3),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 58, 40),
        torch.nn.Tanh(),
        torch.nn.Linear(40, 3),
    )

    def data(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randint(30, (n, 5)), torch.arange(n) % 3

    return FineTuningTask(model, data(12), validation_data=data(2))


def _pooled() -> FineTuningTask:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 12, 3, groups=2),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(12, 3),
    )
    return FineTuningTask(model, images(9))


TASKS = {
    "multipliers": _multipliers,
    "methods": _methods,
    "pooled": _pooled,
}
SETTINGS: dict[str, Any] = {"engine": "columns", "measure_speed": False, "probe": False}


@contextmanager
def _group(rank: int, folder: str, n_processes: int) -> Iterator[None]:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/group",
        rank=rank,
        world_size=n_processes,
        timeout=timedelta(seconds=60),
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _arrays(spectrum: Spectrum) -> dict[str, Any]:
    """What does not depend on the signs of eigenvectors."""
    vectors = spectrum.eigenvectors.astype(np.float64)
    arrays = {
        "kernel": (vectors * spectrum.eigenvalues) @ vectors.T,
        "outputs": spectrum.weight_outputs,
        "trace": np.array(spectrum.trace),
    }
    assert spectrum.jacobian is not None
    arrays |= {
        "codes": spectrum.jacobian.codes.astype(np.float64),
        "inflation": spectrum.jacobian.inflation,
    }
    if spectrum.validation is not None:
        features = spectrum.validation.features
        arrays["cross"] = features @ (np.sqrt(spectrum.eigenvalues) * vectors).T
    return arrays


def _process(rank: int, folder: str) -> None:
    with _group(rank, folder, _N_PROCESSES):
        for name, make in TASKS.items():
            spectrum = compute_spectrum(make(), distributed=True, **SETTINGS)
            np.savez(f"{folder}/{name}-{rank}.npz", **_arrays(spectrum))


def test_four_processes_give_the_columns_of_one(scenarios: Path) -> None:
    folder = _results(scenarios, "columns")
    for name, make in TASKS.items():
        whole = _arrays(compute_spectrum(make(), **SETTINGS))
        for rank in range(_N_PROCESSES):
            with np.load(folder / f"{name}-{rank}.npz") as found:
                assert set(found) == set(whole)
                for key in found:
                    # Codes are in half precision, and outputs are difference quotients.
                    bound = {"codes": 2e-3, "outputs": 2e-3}.get(key, 1e-5)
                    assert relative_error(found[key], whole[key]) < bound


class _Experts(torch.nn.Module):
    """The second expert is for inputs that start with a positive number."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList([torch.nn.Linear(6, 3), torch.nn.Linear(6, 3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = torch.zeros(len(x), 3, dtype=x.dtype)
        for expert, chosen in zip(self.experts, (x[:, 0] <= 0, x[:, 0] > 0), strict=True):
            if chosen.any():
                outputs[chosen] = expert(x[chosen])
        return outputs


def _one_sided() -> FineTuningTask:
    """Only the samples of the second process reach the second expert."""
    torch.manual_seed(0)
    x, y = vectors(12)
    x[:, 0] = torch.linspace(-1.0, 1.0, 12)
    return FineTuningTask(_Experts(), (x, y))


def _different(name: str, rank: int) -> tuple[FineTuningTask, dict[str, Any]]:
    model, (x, y) = mlp(), vectors(12)
    held_out = vectors(5, seed=4)
    multipliers: dict[str, float] = {}
    settings: dict[str, Any] = {}
    if rank == 1 and name == "weights":
        model = mlp(seed=7)
    if rank == 1 and name == "data":
        x = x.roll(1, 0)
    if rank == 1 and name == "fewer samples":
        x, y = x[:1], y[:1]
    if rank == 1 and name == "outputs":
        model = mlp(n_outputs=5)
    if rank == 1 and name == "validation_data":
        held_out = vectors(5, seed=5)
    if rank == 1 and name == "learning_rate_multipliers":
        multipliers = {"2.": 3.0}
    if rank == 1 and name == "engine":
        settings = {"engine": "exact"}
    if name == "automatic":
        settings = {"engine": ("columns", "auto")[rank]}
    if rank == 1 and name == "rank":
        settings = {"rank": 5}
    if rank == 1 and name == "probe":
        settings = {"probe": False}
    task = FineTuningTask(
        model, (x, y), validation_data=held_out, learning_rate_multipliers=multipliers
    )
    return task, settings


DIFFERENT = {
    "weights": "processes 1 differ from process 0 in weights",
    "data": "processes 1 differ from process 0 in data",
    "fewer samples": "processes 1 differ from process 0 in data",
    "outputs": "processes 1 differ from process 0 in model, weights",
    "validation_data": "processes 1 differ from process 0 in validation_data",
    "learning_rate_multipliers": "differ from process 0 in learning_rate_multipliers",
    "engine": "processes 1 differ from process 0 in engine",
    "automatic": "processes 1 differ from process 0 in engine",
    "rank": "processes 1 differ from process 0 in rank",
    "probe": "processes 1 differ from process 0 in probe",
}


def _process_of_two(rank: int, folder: str) -> None:
    found: dict[str, str] = {}
    with _group(rank, folder, 2):
        for name in DIFFERENT:
            task, settings = _different(name, rank)
            try:
                compute_spectrum(task, distributed=True, measure_speed=False, **settings)
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
        task, settings = _different("none", rank)
        found["exact"] = _refusal(compute_spectrum, task, engine="exact", distributed=True)
        spectrum = compute_spectrum(_one_sided(), distributed=True, **SETTINGS)
        np.save(f"{folder}/experts-{rank}.npy", _arrays(spectrum)["kernel"])
    Path(f"{folder}/found-{rank}.json").write_text(json.dumps(found))


def test_processes_that_differ_are_refused_by_all_of_them(scenarios: Path) -> None:
    folder = _results(scenarios, "different")
    errors = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]
    assert errors[0] == errors[1]
    assert 'distributed=True needs the engine "columns" but got' in errors[0].pop("exact")
    assert set(errors[0]) == set(DIFFERENT)
    for case, message in errors[0].items():
        assert message.startswith("ValueError: All processes must be given the same task")
        assert DIFFERENT[case] in message
    # What goes wrong for the samples of one process only is known to the other one.
    whole = _arrays(compute_spectrum(_one_sided(), **SETTINGS))["kernel"]
    for rank in range(2):
        assert relative_error(np.load(folder / f"experts-{rank}.npy"), whole) < 1e-5


def _storing(rank: int, folder: str) -> None:
    with _group(rank, folder, 2):
        store = SpectrumStore(f"sqlite:///{folder}/ttp.db")
        for run in range(2):
            # The second time it is there.
            found = store.get_or_compute(_multipliers(), distributed=True, engine="columns")
            np.save(f"{folder}/{run}-{rank}.npy", found.eigenvalues)


def test_processes_that_compute_together_store_once_and_do_not_wait(scenarios: Path) -> None:
    folder = _results(scenarios, "storing")
    whole = compute_spectrum(_multipliers(), engine="columns", measure_speed=False, probe=False)
    for run in range(2):
        for rank in range(2):
            found = np.load(folder / f"{run}-{rank}.npy")
            np.testing.assert_allclose(found, whole.eigenvalues, rtol=1e-5, atol=1e-6)
    store = SpectrumStore(f"sqlite:///{folder}/ttp.db")
    assert store.get(_multipliers(), engine="columns") is not None


def _sharing(rank: int, folder: str) -> None:
    with _group(rank, folder, 2):
        found = compute_spectrum(_multipliers(), distributed=True, engine="columns")
        assert found.probe is not None
        assert found.throughput is not None
        arrays = {**vars(found.probe), "seconds": found.throughput.seconds}
        np.savez(f"{folder}/{rank}.npz", **arrays)


def test_processes_share_the_probe_and_have_the_same_times(scenarios: Path) -> None:
    folder = _results(scenarios, "sharing")
    whole = compute_spectrum(_multipliers(), engine="columns", measure_speed=False)
    assert whole.probe is not None
    assert len(whole.probe.fractions) > 2
    with np.load(folder / "0.npz") as first, np.load(folder / "1.npz") as second:
        for name, expected in vars(whole.probe).items():
            np.testing.assert_allclose(first[name], expected, rtol=2e-3, atol=1e-5)
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])


def _refusal(run: Any, *arguments: Any, **settings: Any) -> str:
    with pytest.raises((TypeError, ValueError)) as refused:
        run(*arguments, **settings)
    return str(refused.value)


def _completing(rank: int, folder: str) -> None:
    refused: dict[str, str] = {}
    with _group(rank, folder, 2):
        store = SpectrumStore(f"sqlite:///{folder}/ttp.db")
        settings: dict[str, Any] = {"distributed": True, "engine": "columns"}
        store.get_or_compute(_multipliers(), measure_speed=False, probe=False, **settings)
        for name in ("probe", "measure_speed", "made_up"):
            others = {name: False} if rank == 1 else {}
            refused[name] = _refusal(
                store.get_or_compute, _multipliers(), **{**settings, **others}
            )
        device = ("cpu", "bogus")[rank]
        refused["device"] = _refusal(compute_spectrum, _multipliers(), device=device, **settings)
        found = store.get_or_compute(_multipliers(), **settings)
        assert found.probe is not None
        assert found.throughput is not None
        np.savez(f"{folder}/{rank}.npz", seconds=found.throughput.seconds, **vars(found.probe))
    Path(f"{folder}/refused-{rank}.json").write_text(json.dumps(refused))


def test_processes_complete_a_stored_spectrum_together(scenarios: Path) -> None:
    folder = _results(scenarios, "completing")
    with np.load(folder / "0.npz") as first, np.load(folder / "1.npz") as second:
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])
    expected = {
        "probe": "processes 1 differ from process 0 in probe",
        "measure_speed": "processes 1 differ from process 0 in measure_speed",
        "made_up": "made_up",
        "device": "bogus",
    }
    for rank in range(2):
        refused = json.loads((folder / f"refused-{rank}.json").read_text())
        assert set(refused) == set(expected)
        for name, message in expected.items():
            assert message in refused[name]


def _one_failing(rank: int, folder: str) -> None:
    with _group(rank, folder, 2):
        x, y = vectors(12)
        try:
            # What the second process reads is damaged.
            task = FineTuningTask(mlp(), (x, y) if rank == 0 else (x * np.nan, y))
            compute_spectrum(task, engine="columns", distributed=True, measure_speed=False)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
            Path(f"{folder}/found-{rank}.txt").write_text(found)


def test_a_process_that_fails_alone_is_told_of_by_the_others(scenarios: Path) -> None:
    folder = _results(scenarios, "failing")
    waiting, failing = ((folder / f"found-{rank}.txt").read_text() for rank in range(2))
    assert failing.startswith("ValueError: The inputs must be finite")
    assert waiting.startswith("RuntimeError: Another process of the group must have failed")
    assert "Look for the first error among what the others have printed" in waiting


# What the processes do, one after the other, and how many of them take part: starting a process
# takes longer than any of this. The last one leaves the others without an answer.
_SCENARIOS: dict[str, tuple[Callable[[int, str], None], int]] = {
    "columns": (_process, _N_PROCESSES),
    "different": (_process_of_two, 2),
    "storing": (_storing, 2),
    "sharing": (_sharing, 2),
    "completing": (_completing, 2),
    "failing": (_one_failing, 2),
}


def _run_scenarios(rank: int, folder: str) -> None:
    for name, (run, n_processes) in _SCENARIOS.items():
        if rank >= n_processes:
            continue
        try:
            run(rank, f"{folder}/{name}")
        except Exception:
            Path(f"{folder}/{name}/error-{rank}.txt").write_text(traceback.format_exc())


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the processes have left what each scenario gave, by its name."""
    folder = tmp_path_factory.mktemp("processes")
    for name in _SCENARIOS:
        (folder / name).mkdir()
    context: Any = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_run_scenarios, args=(rank, str(folder)))
        for rank in range(_N_PROCESSES)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=480)
        assert process.exitcode == 0
    return folder


def _results(scenarios: Path, name: str) -> Path:
    errors = [path.read_text() for path in sorted((scenarios / name).glob("error-*.txt"))]
    assert not errors, "\n".join(errors)
    return scenarios / name


_THREADS = """
from pathlib import Path
import sys

import torch.distributed as distributed

address = f"file://{sys.argv[1]}/group"
if sys.argv[2] == "first":
    distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
from optuna_ttp import compute_spectrum
from optuna_ttp import FineTuningTask
from tests.models import cnn
from tests.models import images

if sys.argv[2] != "first":
    distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
task = FineTuningTask(cnn(), images(12))
compute_spectrum(task, engine="columns", device="cpu", distributed=True)
threads = {p.read_text().strip() for p in Path("/proc/self/task").glob("*/comm")}
assert any("gloo" in name for name in threads), threads
distributed.destroy_process_group()
threads = {p.read_text().strip() for p in Path("/proc/self/task").glob("*/comm")}
assert not any("gloo" in name for name in threads), threads
"""


@pytest.mark.skipif(sys.platform != "linux", reason="names of threads are read from /proc")
@pytest.mark.parametrize("group", ["first", "later"])
def test_a_group_that_is_destroyed_leaves_no_threads(group: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _THREADS, str(tmp_path), group]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_a_group_it_is_refused() -> None:
    task = FineTuningTask(mlp(), vectors(4))
    with pytest.raises(ValueError, match="distributed=True needs a group of processes"):
        compute_spectrum(task, distributed=True, **SETTINGS)
