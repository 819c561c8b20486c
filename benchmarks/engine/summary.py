"""One line a figure, from the raw results: ``summary.json`` and a table.

Run with ``python -m benchmarks.engine.summary``. What was not measured is null.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import statistics
from typing import Any

from benchmarks.engine.peers import PROJECTIONS


_TORCH_FUNC = ("torch_func", "torch_func_by_parameter")


def main() -> None:
    """Write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    folder = parser.parse_args().results
    exact = json.loads((folder / "exact.json").read_text())
    cells = exact["cells"]
    products = _read(folder / "matrix_free.json") or {}
    columns = (_read(folder / "columns.json") or {"cells": []})["cells"]
    alone = [c for c in cells if c["threads"] == 1]
    residual = [c for c in alone if c["network"] == "residual"]
    resnet = [c for c in alone if (c["network"], c["n_samples"]) == ("resnet18", 24)]
    summary: dict[str, Any] = {
        "exact_vs_best_peer_cpu_seconds": _worst(residual, "cpu_seconds"),
        "exact_vs_best_peer_memory": _worst(residual, "peak_mib"),
        "resnet18_vs_torch_func_cpu_seconds": _ratio(resnet, _TORCH_FUNC, "cpu_seconds"),
        "resnet18_vs_torch_func_memory": _ratio(resnet, _TORCH_FUNC, "peak_mib"),
        "resnet18_vs_torchjd_cpu_seconds": _ratio(resnet, ("torchjd",), "cpu_seconds"),
        "resnet18_vs_torchjd_memory": _ratio(resnet, ("torchjd",), "peak_mib"),
        "matrix_free_peak_gib": products.get("large", {}).get("peak_gib"),
        "matrix_free_eigenvalue_error": products.get("eigenvalue_error"),
        "share_of_lower_bound": min(
            c["bound"]["cpu_seconds"] / _median(c, "ours_exact", "cpu_seconds") for c in alone
        ),
        "columns_time_error": _of_columns(columns, "time_error_mean"),
        "columns_bar_coverage": _of_columns(columns, "share_within_bar"),
        "columns_full_batch_steps": _of_columns(columns, "full_batch_steps"),
        "environment": exact["environment"],
    }
    setup = _read(folder / "setup.json") or {}
    for name in ("efficientnet", "minilm", "residual"):
        summary[f"setup_steps_{name}"] = setup.get(name, {}).get("everything_steps")
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for cell in cells:
        print(f"{cell['network']}, N = {cell['n_samples']}, threads: {cell['threads']}")
        for method in dict.fromkeys(r["method"] for r in cell["results"]):
            seconds, memory = (_median(cell, method, k) for k in ("cpu_seconds", "peak_mib"))
            print(f"  {method:<26}{seconds:>9.2f} s{memory:>9.0f} MiB")
    print(json.dumps({k: v for k, v in summary.items() if k != "environment"}, indent=2))


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def _median(cell: dict[str, Any], method: str, key: str) -> float:
    values = [r[key] for r in cell["results"] if r["method"] == method and "failed" not in r]
    return statistics.median(values) if values else float("nan")


def _of_columns(cells: list[dict[str, Any]], key: str) -> dict[str, float]:
    """A figure of the sample of columns by network."""
    return {c["network"]: c["columns"][key] for c in cells}


def _fastest(cell: dict[str, Any]) -> str:
    """The peer with the fewest CPU seconds for the whole kernel."""
    whole: set[str] = {r["method"] for r in cell["results"] if "error" in r}
    peers = [m for m in whole if not m.startswith("ours") and m not in PROJECTIONS]
    return min(peers, key=lambda method: _median(cell, method, "cpu_seconds"))


def _worst(cells: list[dict[str, Any]], key: str) -> float | None:
    ratios = [_median(c, "ours_exact", key) / _median(c, _fastest(c), key) for c in cells]
    return max(ratios, default=None)


def _ratio(cells: list[dict[str, Any]], ways: tuple[str, ...], key: str) -> float | None:
    """To the best of a library's ways."""
    ratios = [
        _median(c, "ours_exact", key) / _median(c, way, key)
        for c in cells
        for way in ways
        if any("error" in r for r in c["results"] if r["method"] == way)
    ]
    return max(ratios, default=None)


if __name__ == "__main__":
    main()
