"""Tabulate the recorded runs with AdamW.

How many runs came how far, how many failed, and how much the order of the samples changes.

The difference of two orders of the samples is ``|ln(one time / other time)|``, its mean and median
over runs and over targets at 70, 50, 25 and 10 % of the initial loss that both came to.

Writes ``recordings.md`` beside the recordings. Run with
``python -m benchmarks.accuracy.adamw.table``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy.adamw.recording import read
from benchmarks.accuracy.adamw.recording import Recording
from benchmarks.accuracy.record import RESULTS


_TARGETS = (0.7, 0.5, 0.25, 0.1)
_HEAD = [
    "| task | configurations | to 70 % | to 50 % | to 25 % | to 10 % | diverged | not to 50 %, "
    "of the fastest third of rates | other order of the samples, mean | seconds |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
]


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recordings", type=Path, default=RESULTS / "adamw")
    options = parser.parse_args()
    paths = sorted(options.recordings.glob("*.npz"))
    lines = [*_HEAD, *(_line(read(path)) for path in paths)]
    (options.recordings / "recordings.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _line(recording: Recording) -> str:
    first = [k for k, run in enumerate(recording.runs) if run.seed == 0]
    times = np.array([[c.steps_to(f) for f in _TARGETS] for c in recording.curves])
    reached = np.isfinite(times[first]).sum(axis=0)
    diverged = sum(recording.curves[k].end == "diverged" for k in first)
    fastest = sorted(first, key=lambda k: -recording.runs[k].learning_rate)[: len(first) // 3]
    failed = sum(not math.isfinite(times[k, 1]) for k in fastest)
    differences = _seed_differences(recording, times)
    shown = "-"
    if len(differences):
        mean, median = np.mean(differences), np.median(differences)
        shown = f"{mean:.3f}, median {median:.3f} of {len(differences)}"
    seconds = sum(c.seconds for c in recording.curves)
    cells = [recording.task["name"], len(first), *reached, diverged, failed, shown]
    return "| " + " | ".join(map(str, [*cells, f"{seconds:.0f}"])) + " |"


def _seed_differences(recording: Recording, times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Absolute logarithms of the ratio of two times that differ by the order of samples only."""
    places = {run: k for k, run in enumerate(recording.runs)}
    pairs = [(places.get(replace(run, seed=0)), k) for run, k in places.items() if run.seed == 1]
    both = [times[[j, k]] for j, k in pairs if j is not None]
    if not both:
        return np.empty(0)
    reached = np.concatenate(both, axis=1)
    reached = reached[:, np.isfinite(reached).all(axis=0)]
    return np.asarray(np.abs(np.log(reached[0] / reached[1])))


if __name__ == "__main__":
    main()
