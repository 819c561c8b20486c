"""What the scripts here have in common: their options and how they write results."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).parent / "results"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every script has.

    Args:
        description:
            The script's docstring.
    """
    shared = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    shared.add_argument("--smoke", action="store_true", help="small sizes only")
    shared.add_argument("--output", type=Path, default=RESULTS)
    return shared


def add_peers(shared: argparse.ArgumentParser) -> None:
    """Add the options of scripts that measure other libraries."""
    shared.add_argument("--peers", help="a Python that has peers.txt")
    shared.add_argument("--peers-jax", help="a Python that has peers_jax.txt")
    shared.add_argument("--threads", type=int, default=1)
    shared.add_argument("--limit", type=float, default=1200.0, help="seconds a measurement")


def write(path: Path, document: dict[str, Any]) -> None:
    """Write results into a file, whose folder may be new, and print them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=2)
    path.write_text(text + "\n")
    print(text, flush=True)
