"""The ``optuna-ttp store`` command."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
import os
from pathlib import Path
import sys
from typing import TYPE_CHECKING

from optuna_ttp._util.exceptions import DamagedSpectrumError
from optuna_ttp._util.exceptions import OptunaTTPError


if TYPE_CHECKING:
    from optuna_ttp.store import SpectrumStore
    from optuna_ttp.store import StoredSpectrum


_VARIABLE = "OPTUNA_TTP_STORE"
_UNITS: Mapping[str, int] = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``optuna-ttp``.

    Args:
        commands:
            Where to add it.
    """
    parser = commands.add_parser(
        "store",
        help="look after the stored spectra",
        description="Lists, checks, shrinks and copies what a SpectrumStore holds.",
    )
    parser.add_argument(
        "--url",
        default=os.environ.get(_VARIABLE),
        help=(
            f"the store's database; better in the environment as {_VARIABLE} where it holds a "
            "password (default: the file in the user's cache folder)"
        ),
    )
    parser.add_argument(
        "--object-folder", type=Path, help="where the store keeps large arrays (default: none)"
    )
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="one line a spectrum, oldest first")
    show = actions.add_parser("show", help="all that is known of a spectrum")
    show.add_argument("key", help="the beginning of its key")
    verify = actions.add_parser("verify", help="read everything and compare it with its checksums")
    verify.add_argument(
        "--put-aside", action="store_true", help="let what is damaged be computed again"
    )
    prune = actions.add_parser("prune", help="delete what is of no use, and the least used")
    prune.add_argument(
        "--max-size",
        type=_size,
        help="how much may stay, such as 500M or 2G (default: no limit)",
    )
    exported = actions.add_parser("export", help="write a spectrum to a file")
    exported.add_argument("key", help="the beginning of its key")
    exported.add_argument("path", type=Path)
    imported = actions.add_parser("import", help="store a spectrum from a file")
    imported.add_argument("path", type=Path)


def run(options: argparse.Namespace) -> int:
    """Run the command.

    Args:
        options:
            What the parser made of the command line.

    Returns:
        The exit status: 1 where something failed or is damaged.
    """
    from optuna_ttp.store import SpectrumStore

    action = {
        "list": _list,
        "show": _show,
        "verify": _verify,
        "prune": _prune,
        "export": _export,
        "import": _import,
    }[options.action]
    try:
        return action(SpectrumStore(options.url, object_folder=options.object_folder), options)
    except (OptunaTTPError, LookupError, OSError) as error:
        print(error.args[0] if isinstance(error, LookupError) else error, file=sys.stderr)
        return 1


def _list(store: SpectrumStore, options: argparse.Namespace) -> int:
    rows = [
        (
            stored.key[:12],
            stored.name[:30],
            f"{stored.n_samples} x {stored.n_outputs}",
            str(stored.rank),
            _shown_size(stored.n_bytes),
            f"{stored.compute_seconds:.1f} s",
            stored.created_at[:16],
            (stored.used_at or "-")[:16],
        )
        for stored in store.list()
    ]
    if not rows:
        print("The store is empty.")
        return 0
    head = ("key", "task", "samples x outputs", "rank", "size", "took", "computed", "last used")
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, tuple("-" * width for width in widths), *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    return 0


def _show(store: SpectrumStore, options: argparse.Namespace) -> int:
    stored = _chosen(store, options.key)
    for name, value in {**stored.provenance, **stored.settings, **vars(stored)}.items():
        if name not in ("provenance", "settings"):
            print(f"{name}: {'-' if value is None else value}")
    return 0


def _verify(store: SpectrumStore, options: argparse.Namespace) -> int:
    verification = store.verify(put_aside=options.put_aside)
    if verification.is_clean:
        print(f"{_count(verification.n_checked)} read, all as they were written.")
        return 0
    for key, reason in verification.damaged.items():
        print(f"{key[:12]} is damaged: {reason}.")
    print(
        f"{_count(verification.n_checked)} read, {len(verification.damaged)} damaged; "
        f"{verification.n_quarantined} put aside, {verification.n_orphaned} without a spectrum "
        "(prune deletes these)."
    )
    return 1


def _prune(store: SpectrumStore, options: argparse.Namespace) -> int:
    pruning = store.prune(max_bytes=options.max_size)
    print(
        f"{_count(pruning.n_evicted)} evicted, {pruning.n_quarantined} damaged ones deleted, "
        f"{pruning.n_checkpoints} given up, {pruning.n_orphaned} orphaned; "
        f"{_shown_size(pruning.n_object_bytes)} of files deleted. "
        f"{_shown_size(pruning.n_bytes_left)} are left."
    )
    return 0


def _export(store: SpectrumStore, options: argparse.Namespace) -> int:
    stored = store.export_spectrum(_chosen(store, options.key).key, options.path)
    print(f"Wrote the spectrum of {stored.name!r} to {options.path}.")
    return 0


def _import(store: SpectrumStore, options: argparse.Namespace) -> int:
    try:
        spectrum = store.import_spectrum(options.path)
    except DamagedSpectrumError as error:
        raise DamagedSpectrumError(f"Could not import {options.path}: {error}.") from error
    print(f"Stored the spectrum of {spectrum.metadata.name!r}.")
    return 0


def _chosen(store: SpectrumStore, beginning: str) -> StoredSpectrum:
    found = [stored for stored in store.list() if stored.key.startswith(beginning)]
    if len(found) != 1:
        raise LookupError(f"The key {beginning!r} must name one spectrum but got {len(found)}.")
    return found[0]


def _count(n_spectra: int) -> str:
    return f"{n_spectra} {'spectrum' if n_spectra == 1 else 'spectra'}"


def _shown_size(n_bytes: int) -> str:
    if n_bytes < 2**20:
        return f"{n_bytes / 2**10:.1f} KiB"
    return f"{n_bytes / 2**20:.1f} MiB" if n_bytes < 2**30 else f"{n_bytes / 2**30:.1f} GiB"


def _size(text: str) -> int:
    unit = text[-1:].upper() if text[-1:].isalpha() else ""
    try:
        number = float(text[: len(text) - len(unit)])
        if not 0 <= number < float("inf"):
            raise ValueError
        return int(number * _UNITS[unit])
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(
            f"must be a size such as 500M or 2G but got {text!r}"
        ) from None
