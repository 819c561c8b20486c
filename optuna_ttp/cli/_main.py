"""The ``optuna-ttp`` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
import sys

from optuna_ttp.cli import _store_command
from optuna_ttp.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``optuna-ttp`` with arguments (the process's by default) and return its exit status."""
    options = _parser().parse_args(arguments)
    if options.command == "store":
        return _store_command.run(options)
    if options.command == "demo":
        try:
            from optuna_ttp.demo import run

            run(
                seconds=options.seconds,
                seed=options.seed,
                picture=None if options.no_picture else options.picture,
            )
        except ImportError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="optuna-ttp",
        description="Predict fine-tuning time before the first step, inside Optuna.",
    )
    parser.add_argument("--version", action="version", version=f"optuna_ttp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="search twice for the fastest fine-tuning: without and with predictions",
        description=(
            "Pretrains a small network on the digits 0 to 4, then searches for the learning rate, "
            "batch size and momentum that fine-tune it fastest to the digits 5 to 9: once with "
            "TPE and the median pruner, once with both of them wrapped, each for the same number "
            "of seconds."
        ),
    )
    demo.add_argument(
        "--seconds", type=_positive, default=40.0, help="seconds for each search (default: 40)"
    )
    demo.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    demo.add_argument(
        "--picture",
        type=Path,
        default=Path("optuna-ttp-demo.png"),
        help="file to draw the result into (default: optuna-ttp-demo.png)",
    )
    demo.add_argument("--no-picture", action="store_true", help="do not draw the result")
    _store_command.add_parser(commands)
    return parser


def _positive(text: str) -> float:
    """Return the positive, finite number that a text stands for."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number but got {text!r}")
    return value
