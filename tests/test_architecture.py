"""The page on the architecture says what the package is like."""

from __future__ import annotations

import ast
from pathlib import Path
import re

import pytest

from docs import draw_floors
from tests.house import FLOORS
from tests.house import ROOT


_DOCS = Path(draw_floors.__file__).parent
_PAGE = (_DOCS / "architecture.md").read_text(encoding="utf-8")
_STOPS = re.findall(r"`([\w/]+\.py): ([\w.]+)`", _PAGE)
_WALKS = re.split(r"^### ", _PAGE, flags=re.MULTILINE)[1:]


def test_the_table_has_every_package_on_its_floor_with_a_purpose() -> None:
    rows = draw_floors.table(_PAGE)
    expected = {(floor, p) for floor, packages in enumerate(FLOORS, 1) for p in packages}
    assert {(floor, package) for floor, package, _ in rows} == expected
    assert len(rows) == len(expected)
    assert all(len(purpose.split()) > 2 for _, _, purpose in rows)


def test_the_picture_is_drawn_from_the_table() -> None:
    drawn = draw_floors.picture(draw_floors.table(_PAGE))
    # Otherwise run python docs/draw_floors.py.
    assert (_DOCS / "floors.svg").read_text(encoding="utf-8") == drawn


def test_there_are_three_walks_of_many_stops() -> None:
    assert len(_WALKS) == 3
    assert all(len(re.findall(r"^\d+\. `", walk, re.MULTILINE)) > 8 for walk in _WALKS)


def test_every_file_that_is_named_exists() -> None:
    for name in re.findall(r"`([\w/]+\.py)`", _PAGE):
        places = (ROOT / name, ROOT.parent / name)
        assert any(path.is_file() for path in places) or name == "__init__.py", name


@pytest.mark.parametrize(("file", "name"), _STOPS)
def test_every_stop_of_a_walk_exists(file: str, name: str) -> None:
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    for part in name.split("."):
        defined = {
            node.name: node
            for node in body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        }
        assert part in defined, f"{file} defines no {name}"
        body = defined[part].body


def test_tests_and_results_that_the_package_names_exist() -> None:
    named = re.compile(r"\b(?:tests|benchmarks)/[\w/.-]+\.(?:py|csv|md|json)\b")
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted(ROOT.rglob("*.py"))
        for name in named.findall(path.read_text(encoding="utf-8"))
        if not (ROOT.parent / name).exists()
    ]
    assert missing == []
