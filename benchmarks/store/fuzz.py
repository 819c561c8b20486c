"""Damaged and forged blobs, ten thousand and more: refused with the package's own exception.

The same blobs as in ``tests/spectrum/test_blob.py``. No array may come out that was not written,
and no more memory may be taken than the blob's length explains. Writes ``fuzz.json`` and
``fuzz.md``.

Run with ``python -m benchmarks.store.fuzz``.
"""

from __future__ import annotations

import argparse
from collections import Counter
import json
from pathlib import Path
import time

from hypothesis import given
from hypothesis import HealthCheck
from hypothesis import settings

from benchmarks.environment import environment
from tests import fuzzing


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="a hundred only")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()

    @settings(
        max_examples=100 if options.smoke else 12_000,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(fuzzed=fuzzing.blobs())
    def run(fuzzed: fuzzing.Blob) -> None:
        counts[fuzzed.kind, fuzzing.read(fuzzed)] += 1

    started = time.perf_counter()
    run()
    results = [
        {"kind": kind, "outcome": outcome, "times": times}
        for (kind, outcome), times in sorted(counts.items())
    ]
    n_damaged = sum(times for (_, outcome), times in counts.items() if outcome != "unchanged")
    summary = {
        "environment": environment(),
        "n_blobs": counts.total(),
        "n_not_as_written": n_damaged,
        "seconds": round(time.perf_counter() - started, 1),
        "results": results,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "fuzz.json").write_text(json.dumps(summary, indent=2) + "\n")
    lines = ["| blob | what came of it | times |", "| --- | --- | --- |"]
    lines += [f"| {r['kind']} | {r['outcome']} | {r['times']} |" for r in results]
    text = "\n".join(lines) + (
        f"\n\n{n_damaged} blobs that were not as written: no crash, no wrong array. 'unchanged': "
        "the arrays are those that were written (a splice or move that changes nothing). 'a "
        "spectrum': its checksums were forged for it, and it is whole in itself.\n"
    )
    (options.output / "fuzz.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
