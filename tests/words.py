"""Words that the project does not use, and where they occur.

Its code, its messages and its documents are read by people to whom English is foreign. So things
have the name that the field gives them, not a metaphor, and a name says what is held.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
import io
import json
from pathlib import Path
import re
import tokenize


# What stands for it: first passage times, loss level, forecast, short training run, prior scale,
# stop reason, running trial, progress to the target, cost, knot, momentum, loss spike,
# stable, unstable, lost progress. The last four words do not say what a name holds.
_AS_NAME = re.compile(
    r"(^|_)(ladders?|rungs?|outlooks?|pilots?|doubts?|setbacks?|under_way|way_gone|ways_gone|gift"
    r"|nodes?|mass|masses|catapult|calm|wild|wildness|thrown|told|own|found|kept)(_|$)",
    re.IGNORECASE,
)
_AS_CLASS = re.compile(r"Ladder|Rung|Outlook|Pilot|Doubt|Setback|UnderWay|Node")
_PASSAGE = re.compile(r"(?<!first)(?<!first_)passage", re.IGNORECASE)
_IN_TEXT = re.compile(
    r"\b(ladders?|rungs?|outlooks?|pilots?|doubts?|setbacks?|under way|a gift|way gone"
    r"|thrown back|nodes?|(?<!first )(?<!first-)passages?)\b",
    re.IGNORECASE,
)
# A variable says of what it is the size.
_BARE = {"size", "sizes"}


def words_in_text(text: str) -> list[tuple[int, str]]:
    """Return lines and words of a text that are in the list."""
    return [(text.count("\n", 0, m.start()) + 1, m[0].lower()) for m in _IN_TEXT.finditer(text)]


def words_in_code(path: Path) -> list[tuple[int, str]]:
    """Return lines and words of names, strings and comments of a module that are in the list."""
    source = path.read_text(encoding="utf-8")
    found = {
        pair
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        for pair in _in_token(token)
    }
    return sorted(found | set(_bare_sizes(ast.parse(source))))


def _in_token(token: tokenize.TokenInfo) -> Iterator[tuple[int, str]]:
    line = token.start[0]
    if token.type == tokenize.NAME:
        name = token.string
        if _AS_NAME.search(name) or _AS_CLASS.search(name) or _PASSAGE.search(name):
            yield line, name
    elif token.type in (tokenize.STRING, tokenize.COMMENT) or (
        # From Python 3.12 on the parts of a formatted string are tokens of their own.
        tokenize.tok_name[token.type].startswith("FSTRING")
    ):
        for later, word in words_in_text(token.string):
            yield line + later - 1, word


def _bare_sizes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in _BARE:
            yield node.lineno, node.id
        if isinstance(node, ast.arg) and node.arg in _BARE:
            yield node.lineno, node.arg


def text_of_notebook(path: Path) -> str:
    """Return the sources of a notebook's cells."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells)
