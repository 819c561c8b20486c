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
    """Add the command ``store`` and its options to the commands of ``optuna-ttp``."""
    parser = commands.add_parser(
        "store",
        help="manage the stored spectra",
        description="Lists, checks, deletes and copies the spectra of a SpectrumStore.",
    )
    parser.add_argument(
        "--url",
        default=os.environ.get(_VARIABLE),
        help=(
            "URL of the store's database; if it contains a password, set it in the environment "
            f"variable {_VARIABLE} instead (default: a file in the user's cache folder)"
        ),
    )
    parser.add_argument(
        "--object-folder", type=Path, help="folder for the store's large arrays (default: none)"
    )
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="print one line for each spectrum, oldest first")
    show = actions.add_parser("show", help="print everything that is known about a spectrum")
    show.add_argument("key", help="the beginning of its key")
    verify = actions.add_parser(
        "verify", help="read all spectra and compare them with their checksums"
    )
    verify.add_argument(
        "--put-aside",
        action="store_true",
        help="put damaged spectra aside, so that they are computed again",
    )
    prune = actions.add_parser(
        "prune",
        help="delete damaged and unfinished data, and spectra above a size limit",
    )
    prune.add_argument(
        "--max-size",
        type=_n_bytes,
        help=(
            "the size of all spectra that remain, such as 500M or 2G; those that were used least "
            "recently are deleted first (default: no limit)"
        ),
    )
    exported = actions.add_parser("export", help="write a spectrum to a file")
    exported.add_argument("key", help="the beginning of its key")
    exported.add_argument("path", type=Path)
    imported = actions.add_parser("import", help="store a spectrum from a file")
    imported.add_argument("path", type=Path)


def run(options: argparse.Namespace) -> int:
    """Run the command and return the exit status: 1 if it failed or something is damaged."""
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
    """Print a table with one line for each stored spectrum."""
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
    head = ("key", "task", "samples x outputs", "rank", "size", "time", "computed at", "last used")
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, tuple("-" * width for width in widths), *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    return 0


def _show(store: SpectrumStore, options: argparse.Namespace) -> int:
    """Print the origin, the settings and the sizes of one spectrum, one per line."""
    stored = _chosen(store, options.key)
    for name, value in {**stored.provenance, **stored.settings, **vars(stored)}.items():
        if name not in ("provenance", "settings"):
            print(f"{name}: {'-' if value is None else value}")
    return 0


def _verify(store: SpectrumStore, options: argparse.Namespace) -> int:
    """Read all spectra and print the damaged ones; return 1 if there are any, else 0."""
    verification = store.verify(put_aside=options.put_aside)
    if verification.is_clean:
        print(f"{_count(verification.n_checked)} read; all of them are as they were written.")
        return 0
    for key, reason in verification.damaged.items():
        print(f"The spectrum {key[:12]} is damaged: {reason}.")
    print(
        f"{_count(verification.n_checked)} read; {len(verification.damaged)} of them damaged. "
        f"The store also has {verification.n_quarantined} damaged spectra that were put aside and "
        f"{verification.n_orphaned} arrays that belong to no spectrum; the command prune deletes "
        "these."
    )
    return 1


def _prune(store: SpectrumStore, options: argparse.Namespace) -> int:
    """Delete damaged and unfinished data and spectra above the size limit, and print counts."""
    pruning = store.prune(max_bytes=options.max_size)
    print(
        f"Deleted: {_count(pruning.n_evicted)} above the size limit, {pruning.n_quarantined} "
        f"damaged spectra, {pruning.n_checkpoints} unfinished computations, {pruning.n_orphaned} "
        f"arrays that belong to no spectrum, and {_shown_size(pruning.n_object_bytes)} of files. "
        f"The remaining spectra take {_shown_size(pruning.n_bytes_left)}."
    )
    return 0


def _export(store: SpectrumStore, options: argparse.Namespace) -> int:
    """Write one spectrum to a file."""
    stored = store.export_spectrum(_chosen(store, options.key).key, options.path)
    print(f"Wrote the spectrum of {stored.name!r} to {options.path}.")
    return 0


def _import(store: SpectrumStore, options: argparse.Namespace) -> int:
    """Store a spectrum from a file that ``export`` wrote."""
    try:
        spectrum = store.import_spectrum(options.path)
    except DamagedSpectrumError as error:
        raise DamagedSpectrumError(f"Could not import {options.path}: {error}.") from error
    print(f"Stored the spectrum of {spectrum.metadata.name!r}.")
    return 0


def _chosen(store: SpectrumStore, beginning: str) -> StoredSpectrum:
    """Return the stored spectrum whose key has this beginning; LookupError if not exactly one."""
    matching = [stored for stored in store.list() if stored.key.startswith(beginning)]
    if len(matching) != 1:
        raise LookupError(f"The key {beginning!r} must name one spectrum but got {len(matching)}.")
    return matching[0]


def _count(n_spectra: int) -> str:
    """Return a number of spectra as text, such as ``1 spectrum``."""
    return f"{n_spectra} {'spectrum' if n_spectra == 1 else 'spectra'}"


def _shown_size(n_bytes: int) -> str:
    """Return a number of bytes as text in KiB, MiB or GiB."""
    if n_bytes < 2**20:
        return f"{n_bytes / 2**10:.1f} KiB"
    return f"{n_bytes / 2**20:.1f} MiB" if n_bytes < 2**30 else f"{n_bytes / 2**30:.1f} GiB"


def _n_bytes(text: str) -> int:
    """Return the number of bytes that a text such as 500M or 2G stands for."""
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
