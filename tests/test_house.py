"""The walls of the house: who may import what, and what an import costs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
import json
import subprocess
import sys
from typing import Any

import pytest

import optuna_ttp
from tests.house import circles
from tests.house import FLOOR_OF
from tests.house import imports_of
from tests.house import longest_chain
from tests.house import MODULES
from tests.house import our_imports
from tests.house import package_of
from tests.house import ROOT
from tests.house import SAME_FLOOR
from tests.house import tree_of


# From this floor on Optuna may be imported.
_OPTUNA_FLOOR = FLOOR_OF["study"]
_COMPATIBILITY = "optuna_ttp.study._optuna_compat"
_MOST_FLOORS = 14


def _is_on_the_side_of_optuna(module: str) -> bool:
    package = package_of(module)
    return FLOOR_OF.get(package, 0) >= _OPTUNA_FLOOR


def test_nothing_but_packages_is_at_the_top() -> None:
    files = {path.name for path in ROOT.iterdir() if path.is_file()}
    assert files == {"__init__.py", "py.typed", "version.py"}
    packages = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"__pycache__"}
    assert packages == set(FLOOR_OF)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downward(module: str) -> None:
    package = package_of(module)
    for source, name in our_imports(module):
        target = package_of(source)
        if package in ("", target) or target in ("", "version") or (package, target) in SAME_FLOOR:
            continue
        assert FLOOR_OF[target] < FLOOR_OF[package], f"{module} imports {name} of {source}"


@pytest.mark.parametrize("module", MODULES)
def test_no_private_name_is_imported_from_another_package(module: str) -> None:
    for source, name in our_imports(module):
        if package_of(source) not in (package_of(module), "_util") and package_of(module):
            inside = source.split(".")[2:]
            names = (*inside, name.removeprefix("__"))
            assert not any(part.startswith("_") for part in names), (
                f"{module} imports {name} of {source}"
            )


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circles() == []


def test_a_floor_of_files_is_not_far_from_the_ground() -> None:
    assert len(longest_chain()) <= _MOST_FLOORS, longest_chain()


@pytest.mark.parametrize("module", [m for m in MODULES if not _is_on_the_side_of_optuna(m)])
def test_the_science_imports_no_optuna(module: str) -> None:
    imported = {pair for pair in imports_of(module) if pair[0].split(".")[0] == "optuna"}
    logger = {("optuna.logging", "get_logger")}
    assert imported <= (logger if package_of(module) == "store" else set())


@pytest.mark.parametrize("module", [m for m in MODULES if package_of(m) != "store"])
def test_only_the_store_knows_of_databases(module: str) -> None:
    roots = {source.split(".")[0] for source, _ in imports_of(module)}
    assert roots.isdisjoint({"sqlalchemy", "sqlite3", "alembic"})


@pytest.mark.parametrize("module", [m for m in MODULES if package_of(m) in ("study", "search")])
def test_study_and_search_do_not_import_torch(module: str) -> None:
    assert "torch" not in {source.split(".")[0] for source, _ in imports_of(module)}


def test_attributes_of_trials_have_their_names_in_one_module() -> None:
    """Everybody else reads and writes records."""
    naming = {
        module
        for module in MODULES
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Constant) and str(node.value).startswith("ttp:")
    }
    assert naming == {"optuna_ttp.study._attributes"}


def _private_attributes(module: str) -> Iterator[str]:
    """Attributes with a leading underscore of anything but the object's own self and class."""
    for node in ast.walk(tree_of(module)):
        if (
            isinstance(node, ast.Attribute)
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
            and node.attr != "_replace"  # of a named tuple, where it is public
            and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        ):
            yield node.attr


@pytest.mark.parametrize(
    "module",
    [
        m
        for m in MODULES
        if _is_on_the_side_of_optuna(m) and m != _COMPATIBILITY and package_of(m) != "cli"
    ],
)
def test_private_attributes_of_optuna_are_touched_in_one_module_only(module: str) -> None:
    # On this side of the wall, no module needs a private attribute of any other object.
    assert list(_private_attributes(module)) == []
    private = {
        source
        for source, name in imports_of(module)
        if source.split(".")[0] == "optuna"
        and any(part.startswith("_") for part in (*source.split("."), name))
    }
    assert private == set()


def test_the_compatibility_module_is_where_they_are_touched() -> None:
    assert {"_storage", "_study_id", "_trial_id", "_get_trials"} <= set(
        _private_attributes(_COMPATIBILITY)
    )


# What may be called for the value of a module's name: it returns nothing that can be changed.
_MAKERS_OF_CONSTANTS = {
    "TypeVar",
    "ParamSpec",
    "compile",
    "exp",
    "frozenset",
    "get_logger",
    "lazy_names",
    "log",
    "parametrize",
    "tuple",
}
_CONTAINERS = (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)


def _mutable_names(module: str) -> Iterator[str]:
    """Names at the top of a module that hold, or may hold, an object that can be changed.

    A container that is annotated as a ``Mapping`` or ``Sequence`` is a constant: mypy lets nobody
    write into it. Instances of ``...Rules`` are frozen.
    """
    for node in tree_of(module).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = ", ".join(ast.unparse(target) for target in targets)
        annotation = "" if isinstance(node, ast.Assign) else ast.unparse(node.annotation)
        value = node.value
        if isinstance(value, _CONTAINERS):
            if names != "__all__" and not annotation.startswith(("Mapping[", "Sequence[")):
                yield names
        elif isinstance(value, ast.Call):
            called = ast.unparse(value.func).split(".")[-1]
            if called not in _MAKERS_OF_CONSTANTS and not called.endswith("Rules"):
                yield names


@pytest.mark.parametrize("module", [m for m in MODULES if _is_on_the_side_of_optuna(m)])
def test_no_module_from_study_up_holds_what_can_be_changed(module: str) -> None:
    """What is remembered of a study is in its ``StudyState``."""
    assert list(_mutable_names(module)) == []
    globals_written = [n for n in ast.walk(tree_of(module)) if isinstance(n, ast.Global)]
    assert globals_written == []


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


def test_the_modules_of_study_and_search_do_not_load_torch() -> None:
    modules = sorted(m for m in MODULES if package_of(m) in ("study", "search", "reporting"))
    loaded = _in_fresh_process(
        "import importlib, json, sys\n"
        f"for module in {modules}:\n"
        "    importlib.import_module(module)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    assert "torch" not in loaded


@pytest.mark.parametrize("engine", ["exact", "columns", "matrix_free"])
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
