"""Draw the floors of the package, from the table in ``architecture.md`` into ``floors.svg``.

Run with ``python docs/draw_floors.py`` after the table was changed.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
import re
import textwrap


_PAGE = Path(__file__).parent / "architecture.md"
_PICTURE = Path(__file__).parent / "floors.svg"
_ROW = re.compile(r"^\| (\d+) \| `(\w+)/` \| (.+) \|$", re.MULTILINE)
_WIDTH, _HEIGHT, _LEFT, _GAP, _TOP = 980, 58, 60, 12, 16
# What may be imported from which floor on, with the colour of its floors.
_ABOVE_OPTUNA = "#dbe9f6"
_BELOW_OPTUNA = "#eef3e6"
_WALL = "Optuna is imported only above this line"
_FIRST_WITH_OPTUNA = "study"


def table(page: str) -> list[tuple[int, str, str]]:
    """Return floor, package and purpose of each row of the table in the page."""
    return [(int(floor), package, purpose) for floor, package, purpose in _ROW.findall(page)]


def picture(rows: list[tuple[int, str, str]]) -> str:
    """Return the picture as SVG: a band for each floor, the ground floor at the bottom."""
    floors = sorted({floor for floor, _, _ in rows}, reverse=True)
    wall = next(floor for floor, package, _ in rows if package == _FIRST_WITH_OPTUNA)
    height = _TOP + len(floors) * (_HEIGHT + _GAP) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="Helvetica, Arial, sans-serif">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
    ]
    y = _TOP
    for floor in floors:
        parts += _floor(floor, [row for row in rows if row[0] == floor], y, floor >= wall)
        y += _HEIGHT + _GAP
        if floor == wall:
            y += 24
            parts += [
                f'<line x1="{_LEFT}" y1="{y - 18}" x2="{_WIDTH - 16}" y2="{y - 18}" '
                'stroke="#b03030" stroke-width="2" stroke-dasharray="8 5"/>',
                f'<text x="{_WIDTH - 16}" y="{y - 23}" font-size="12" fill="#b03030" '
                f'text-anchor="end">{_WALL}</text>',
            ]
    return "\n".join([*parts, _arrow(y), "</svg>", ""])


def _floor(floor: int, rows: list[tuple[int, str, str]], y: int, optuna: bool) -> list[str]:
    """Return the boxes of the packages of one floor, with its number at the left."""
    width = (_WIDTH - 16 - _LEFT - _GAP * (len(rows) - 1)) / len(rows)
    fill = _ABOVE_OPTUNA if optuna else _BELOW_OPTUNA
    parts = [
        f'<text x="{_LEFT - 14}" y="{y + 42}" font-size="16" fill="#555" '
        f'text-anchor="end">{floor}</text>'
    ]
    for k, (_, package, purpose) in enumerate(rows):
        x = _LEFT + k * (width + _GAP)
        parts += [
            f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{_HEIGHT}" rx="6" '
            f'fill="{fill}" stroke="#8899aa"/>',
            f'<text x="{x + 10:.0f}" y="{y + 20}" font-size="15" font-weight="bold">'
            f"{package}</text>",
        ]
        for n, line in enumerate(textwrap.wrap(purpose.replace("`", ""), int(width / 6.1))[:4]):
            parts.append(
                f'<text x="{x + 10:.0f}" y="{y + 35 + 12 * n}" font-size="11" fill="#333">'
                f"{escape(line)}</text>"
            )
    return parts


def _arrow(bottom: int) -> str:
    """Return the arrow at the left that says which way imports go."""
    middle = bottom // 2
    return (
        f'<path d="M 14 {_TOP} V {bottom - 20} l -5 -9 m 5 9 l 5 -9" stroke="#555" fill="none" '
        f'stroke-width="2"/><text x="0" y="0" font-size="12" fill="#555" text-anchor="middle" '
        f'transform="translate(28 {middle}) rotate(-90)">imports go downward only</text>'
    )


if __name__ == "__main__":
    _PICTURE.write_text(picture(table(_PAGE.read_text(encoding="utf-8"))), encoding="utf-8")
