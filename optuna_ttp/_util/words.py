"""Numbers in texts."""

from __future__ import annotations


def counted(number: float, noun: str, form: str = ",.0f") -> str:
    """Return a number and a noun as text, such as ``1 step`` and ``1,200 steps``."""
    text = f"{number:{form}}"
    return f"{text} {noun}" if text == "1" else f"{text} {noun}s"
