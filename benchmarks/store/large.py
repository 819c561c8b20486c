"""A large spectrum in and out of the store, against its raw bytes through the same driver.

Every measurement is a process of its own, which tells its seconds and its largest resident size.
The raw bytes go in as rows of 2 MiB in one transaction, as the store's do: neither driver takes
512 MB at once. Writes ``large.json`` and ``large.md``.

Run with ``python -m benchmarks.store.large``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import json
from pathlib import Path
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import sqlalchemy as sa

from benchmarks.environment import environment
from benchmarks.store.spectra import databases
from benchmarks.store.spectra import synthetic
from optuna_ttp.store import SpectrumStore


_ROW = 2 * 2**20
_MEBIBYTE = 2**20


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="16 MB, once")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is not None:
        step, url, n_bytes = options.step
        print(json.dumps(_measured(STEPS[step], url, int(n_bytes))))
        return
    n_bytes = 16_000_000 if options.smoke else 512_000_000
    results = {}
    for kind in ("sqlite", "postgresql"):
        rounds = []
        for _ in range(1 if options.smoke else 3):
            with databases([kind]) as urls:
                rounds.append({step: _run(step, urls[kind], n_bytes) for step in STEPS})
        results[kind] = rounds
    summary = {"environment": environment(), "n_bytes": n_bytes, "rounds": results}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "large.json").write_text(json.dumps(summary, indent=2) + "\n")
    text = _table(n_bytes, results)
    (options.output / "large.md").write_text(text)
    print(text)


def _run(step: str, url: str, n_bytes: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.store.large", "--step", step, url, str(n_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def _measured(step: Callable[[str, int], float], url: str, n_bytes: int) -> dict[str, float]:
    before = _peak()
    seconds = step(url, n_bytes)
    return {
        "seconds": seconds,
        "peak_over_size": _peak() / n_bytes,
        "peak_above_imports_over_size": (_peak() - before) / n_bytes,
    }


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _write_raw(url: str, n_bytes: int) -> float:
    data = memoryview(synthetic(n_bytes).eigenvectors.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    connection = sa.create_engine(url).raw_connection()
    cursor = connection.cursor()
    kind = "BLOB" if url.startswith("sqlite") else "BYTEA"
    mark = "?" if url.startswith("sqlite") else "%s"
    if url.startswith("sqlite"):
        cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute(f"CREATE TABLE raw (position INTEGER PRIMARY KEY, data {kind})")
    connection.commit()
    started = time.perf_counter()
    for position, start in enumerate(range(0, len(data), _ROW)):
        piece = bytes(data[start : start + _ROW])
        cursor.execute(f"INSERT INTO raw VALUES ({mark}, {mark})", (position, piece))
    connection.commit()
    return time.perf_counter() - started


def _read_raw(url: str, n_bytes: int) -> float:
    connection = sa.create_engine(url).raw_connection()
    cursor = connection.cursor()
    mark = "?" if url.startswith("sqlite") else "%s"
    started = time.perf_counter()
    target = bytearray()
    for position in range(-(-n_bytes // _ROW)):
        cursor.execute(f"SELECT data FROM raw WHERE position = {mark}", (position,))
        row = cursor.fetchone()
        target += row[0] if row is not None else b""
    assert len(target) > 0.99 * n_bytes
    return time.perf_counter() - started


def _write(url: str, n_bytes: int) -> float:
    spectrum = synthetic(n_bytes)
    store = SpectrumStore(url)
    started = time.perf_counter()
    store.put(spectrum)
    return time.perf_counter() - started


def _read(url: str, n_bytes: int) -> float:
    store = SpectrumStore(url)
    [stored] = store.list()
    assert stored.n_bytes > 0.99 * n_bytes
    started = time.perf_counter()
    assert store.get(stored.fingerprint) is not None
    return time.perf_counter() - started


STEPS: dict[str, Callable[[str, int], float]] = {
    "write_raw": _write_raw,
    "write": _write,
    "read_raw": _read_raw,
    "read": _read,
}


def _table(n_bytes: int, results: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        f"| {n_bytes / 1e6:.0f} MB | seconds in, raw | in, store | out, raw | out, store | "
        "in and out: store over raw | largest memory over size |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind, rounds in results.items():
        seconds = {s: statistics.median(r[s]["seconds"] for r in rounds) for s in STEPS}
        ratios = [
            (r["write"]["seconds"] + r["read"]["seconds"])
            / (r["write_raw"]["seconds"] + r["read_raw"]["seconds"])
            for r in rounds
        ]
        peak = max(r[s]["peak_over_size"] for r in rounds for s in ("write", "read"))
        lines.append(
            f"| {kind} | {seconds['write_raw']:.2f} | {seconds['write']:.2f} "
            f"| {seconds['read_raw']:.2f} | {seconds['read']:.2f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f}) "
            f"| {peak:.2f} |"
        )
    return "\n".join(lines) + "\n\nMedians of the rounds in `large.json` (smallest..largest).\n"


if __name__ == "__main__":
    main()
