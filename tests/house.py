"""The structure of the package as its imports tell it: files, arrows between them, floors."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import optuna_ttp


ROOT = Path(optuna_ttp.__file__).parent
# The packages by floor, from the ground up: a package imports only what lies below it.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("_util",),
    ("task",),
    ("spectrum",),
    ("dynamics",),
    ("ntk", "calibration"),
    ("prediction", "store"),
    ("study",),
    ("search", "reporting", "visualization"),
    ("cli", "integrations", "demo", "testing"),
)
FLOOR_OF = {package: floor for floor, packages in enumerate(FLOORS, 1) for package in packages}
# The command starts the demo.
SAME_FLOOR = {("cli", "demo"), ("demo", "visualization")}


def _dotted(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_dotted(path): path for path in sorted(ROOT.rglob("*.py"))}


def package_of(module: str) -> str:
    """Return the package at the top level that a module is in, empty for the top itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@cache
def tree_of(module: str) -> ast.Module:
    """Return a module's syntax tree."""
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@cache
def imports_of(module: str) -> tuple[tuple[str, str], ...]:
    """Return what a module imports, wherever in the file: pairs of a module and a name.

    The name is empty where the module itself is imported.
    """
    found: list[tuple[str, str]] = []
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            found += [(node.module or "", alias.name) for alias in node.names]
    return tuple(found)


@cache
def our_imports(module: str) -> tuple[tuple[str, str], ...]:
    """Return what a module imports of this package, as pairs of a module and a name."""
    return tuple(
        (f"{source}.{name}", "") if f"{source}.{name}" in MODULES else (source, name)
        for source, name in imports_of(module)
        if source.split(".")[0] == "optuna_ttp"
    )


def defining_module(module: str, name: str) -> str:
    """Return where a name is defined, behind the packages that hand it on."""
    while MODULES[module].name == "__init__.py" and name:
        home = {n: m for m, n in our_imports(module) if n}
        if name not in home:
            break
        module = home[name]
    return module


@cache
def arrows() -> dict[str, frozenset[str]]:
    """Return, by file, the files whose definitions it imports. Packages' faces are left out."""
    files = [m for m, path in MODULES.items() if path.name != "__init__.py"]
    return {
        module: frozenset(
            target
            for source, name in our_imports(module)
            if (target := defining_module(source, name)) != module
            and MODULES[target].name != "__init__.py"
        )
        for module in files
    }


def circles() -> list[list[str]]:
    """Return chains of files that import each other."""
    state: dict[str, int] = {}
    found: list[list[str]] = []

    def visit(module: str, way: list[str]) -> None:
        state[module] = 1
        for target in sorted(arrows()[module]):
            if state.get(target) == 1:
                found.append([*way[way.index(target) :], target])
            elif target not in state:
                visit(target, [*way, target])
        state[module] = 2

    for module in arrows():
        if module not in state:
            visit(module, [module])
    return found


@cache
def floor_of(module: str) -> int:
    """Return the floor of a file: one above the highest of those that it imports."""
    return 1 + max((floor_of(target) for target in arrows()[module]), default=0)


def longest_chain() -> list[str]:
    """Return the files from the highest one down to the ground, each importing the next."""
    module = max(arrows(), key=floor_of)
    chain = [module]
    while arrows()[module]:
        module = max(arrows()[module], key=floor_of)
        chain.append(module)
    return chain
