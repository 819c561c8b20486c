"""Names and texts are in the field's words."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.house import FLOOR_OF
from tests.house import ROOT
from tests.words import text_of_notebook
from tests.words import words_in_code
from tests.words import words_in_text


_TOP = ROOT.parent
_DOCUMENTS = [
    _TOP / "README.md",
    _TOP / "CONTRIBUTING.md",
    *sorted((_TOP / "docs").glob("*.md")),
]
# Words that are meant, with the reason: by file and word.
_MEANT = {
    ("store/_lease.py", "node"): "a function of the standard library, the name of the machine",
    ("study/_prediction_record.py", "ladder"): "a key of the records that version 0.1.0 wrote",
}


@pytest.mark.parametrize("package", ["", *FLOOR_OF])
def test_code_is_in_the_words_of_the_field(package: str) -> None:
    paths = ROOT.glob("*.py") if package == "" else (ROOT / package).rglob("*.py")
    offences = [
        f"{name}:{line}: {word}"
        for path in sorted(paths)
        for name in [str(path.relative_to(ROOT))]
        for line, word in words_in_code(path)
        if (name, word) not in _MEANT
    ]
    assert offences == []


@pytest.mark.parametrize("path", _DOCUMENTS, ids=lambda path: path.name)
def test_documents_are_in_the_words_of_the_field(path: Path) -> None:
    assert words_in_text(path.read_text(encoding="utf-8")) == []


def test_the_notebook_is_in_the_words_of_the_field() -> None:
    assert words_in_text(text_of_notebook(_TOP / "notebooks" / "quickstart.ipynb")) == []


def test_exceptions_are_still_needed() -> None:
    for name, word in _MEANT:
        path = ROOT / name
        assert word in {w for _, w in words_in_code(path)}, (name, word)


def test_what_is_looked_for_is_found(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '"""Of a rung."""\n'
        "n_kept = first_passage_times = 1\n"
        "class Outlook:\n"
        "    passages: int  # under way\n"
        "def f(size: int) -> int:\n"
        '    return f"the node {size}"\n'
    )
    assert words_in_code(path) == [
        (1, "rung"),
        (2, "n_kept"),
        (3, "Outlook"),
        (4, "passages"),
        (4, "under way"),
        (5, "size"),
        (6, "node"),
    ]
