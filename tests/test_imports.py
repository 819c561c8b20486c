"""The walls of the house: who may import what, and what an import costs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
import json
from pathlib import Path
import subprocess
import sys
from typing import Any

import pytest

import optuna_ttp


ROOT = Path(optuna_ttp.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
}
OPTUNA_SIDE = (
    "_demo",
    "_best_trials",
    "_optuna_compat",
    "_resolution",
    "_under_way",
    "candidates",
    "cli",
    "curve_start",
    "integrations",
    "learner",
    "ledger",
    "memory",
    "observed_trial",
    "preference",
    "pruner",
    "recorded_curve",
    "reported_curve",
    "sampler",
    "study_budget",
    "testing",
    "training_log",
    "trial_entries",
    "unusable_curve",
    "visualization",
)
ENGINE_ROOM = ("dynamics", "jacobian")


def _below(module: str, parts: tuple[str, ...]) -> bool:
    return module.split(".")[0] in parts


def _tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def _imported(module: str) -> set[str]:
    """Names of modules, and of what is taken from them, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def _loaded_packages(module: str) -> set[str]:
    return {name.split(".")[0] for name in _imported(module)}


def _private_attributes(module: str) -> Iterator[str]:
    """Attributes with a leading underscore of anything but the object's own self and class."""
    for node in ast.walk(_tree(module)):
        if (
            isinstance(node, ast.Attribute)
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
            and node.attr != "_replace"  # of a named tuple, where it is public
            and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        ):
            yield node.attr


def test_every_room_of_the_house_is_read() -> None:
    rooms = {"calibration", "predictor", "spectrum", "store", "task", "throughput", *OPTUNA_SIDE}
    assert rooms | set(ENGINE_ROOM) <= {module.split(".")[0] for module in MODULES}


@pytest.mark.parametrize("module", [m for m in MODULES if not _below(m, OPTUNA_SIDE)])
def test_the_science_imports_no_optuna(module: str) -> None:
    imported = {name for name in _imported(module) if name.split(".")[0] == "optuna"}
    allowed = {"optuna.logging.get_logger"} if _below(module, ("store",)) else set()
    assert imported <= allowed


@pytest.mark.parametrize("module", [m for m in MODULES if not _below(m, OPTUNA_SIDE)])
def test_the_science_imports_nothing_of_the_optuna_side(module: str) -> None:
    if module == "__init__":
        imported = {name for name in _eager_imports(module) if name.startswith("optuna_ttp.")} - {
            "optuna_ttp.version.__version__"
        }
        assert imported == set()
        return
    ours = {name.split(".")[1] for name in _imported(module) if name.startswith("optuna_ttp.")}
    assert ours.isdisjoint(OPTUNA_SIDE)


@pytest.mark.parametrize("module", [m for m in MODULES if not _below(m, ("store",))])
def test_only_the_store_knows_of_databases(module: str) -> None:
    assert not _loaded_packages(module) & {"sqlalchemy", "sqlite3", "alembic"}


@pytest.mark.parametrize("module", [m for m in MODULES if _below(m, ENGINE_ROOM)])
def test_the_engine_room_knows_neither_the_store_nor_the_predictor(module: str) -> None:
    ours = {name.split(".")[1] for name in _imported(module) if name.startswith("optuna_ttp.")}
    assert ours.isdisjoint({"calibration", "predictor", "store"})


@pytest.mark.parametrize(
    "module", [m for m in MODULES if _below(m, OPTUNA_SIDE) and m != "_optuna_compat"]
)
def test_private_attributes_of_optuna_are_touched_in_one_module_only(module: str) -> None:
    # On this side of the wall, no module needs a private attribute of any other object.
    assert list(_private_attributes(module)) == []
    private = {
        name
        for name in _imported(module)
        if name.startswith("optuna.") and any(part.startswith("_") for part in name.split("."))
    }
    assert private == set()


def test_the_compatibility_module_is_where_they_are_touched() -> None:
    assert {"_storage", "_study_id", "_trial_id", "_get_trials"} <= set(
        _private_attributes("_optuna_compat")
    )


def _eager_imports(module: str) -> set[str]:
    """What a module imports when it is itself imported, at its top level."""
    names: set[str] = set()
    for node in _tree(module).body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def _in_fresh_process(code: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    return json.loads(done.stdout)


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = _in_fresh_process(
        "import json, sys, optuna_ttp; print(json.dumps(sorted(sys.modules)))"
    )
    heavy = {
        "lightning",
        "matplotlib",
        "numpy",
        "optuna",
        "pandas",
        "scipy",
        "sqlalchemy",
        "torch",
    } | {"transformers"}
    assert heavy.isdisjoint(loaded)


def test_importing_sampler_and_pruner_loads_neither_torch_nor_matplotlib() -> None:
    loaded = _in_fresh_process(
        "import json, sys\n"
        "from optuna_ttp import TTPPruner, TTPSampler, TrainingLog, report\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    assert {"matplotlib", "torch"}.isdisjoint(loaded)


@pytest.mark.parametrize("engine", ["exact", "sketch", "matrix_free"])
def test_computing_a_spectrum_loads_no_compiler(engine: str) -> None:
    """It takes a second, longer than the spectrum of a small network."""
    loaded = _in_fresh_process(
        "import json, sys\n"
        "from optuna_ttp import FineTuningTask, TrainingTimePredictor, compute_spectrum\n"
        "from tests.models import cnn, images\n"
        "task = FineTuningTask(cnn(), images(8))\n"
        f"spectrum = compute_spectrum(task, engine={engine!r}, device='cpu', rank=4)\n"
        "TrainingTimePredictor(spectrum, target_fraction=0.9).predict(0.1, 4, 0.5)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    assert "torch" in loaded
    assert "torch._dynamo" not in loaded


@pytest.mark.parametrize("name", optuna_ttp.__all__)
def test_every_public_name_resolves_and_is_listed(name: str) -> None:
    assert getattr(optuna_ttp, name) is getattr(optuna_ttp, name)
    assert name in dir(optuna_ttp)


def test_public_names_come_under_their_own_name() -> None:
    classes_and_functions = [n for n in optuna_ttp.__all__ if n != "__version__"]
    assert [getattr(optuna_ttp, n).__name__ for n in classes_and_functions] == (
        classes_and_functions
    )


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'TTPSamplr'"):
        optuna_ttp.TTPSamplr  # noqa: B018
