"""Tables and a picture of the costs, from the raw results: ``engine.md`` and ``growth.png``.

The exponents are least-squares fits of ``log cost = a + b log size`` over all sizes of a row; the
smallest size also pays what does not grow, so that the exponent between the two largest sizes
stands beside it.

Run with ``python -m benchmarks.engine.report``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import statistics
from typing import Any

import numpy as np

from benchmarks.engine.command import RESULTS


# What grows, and where its sizes are.
_AXES = {"n_samples": "samples N", "n_classes": "outputs C", "n_parameters": "weights D"}
_METHODS = ("ours_exact", "ours_columns", "torch_func")
_COSTS = {"cpu_seconds": "CPU seconds", "peak_mib": "peak memory, MiB"}
Point = tuple[float, float]


def main() -> None:
    """Write the tables and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    folder = parser.parse_args().results
    exact = json.loads((folder / "exact.json").read_text())
    path = folder / "growth.json"
    growth = json.loads(path.read_text())["cells"] if path.exists() else []
    lines = ["# Costs of the engines and of other libraries", ""]
    for cell in sorted(exact["cells"], key=_place):
        lines += _table(cell)
    lines += ["## Growth on the residual network, one thread", "", *_exponents(exact, growth), ""]
    lines.append("![growth](growth.png)")
    (folder / "engine.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    _draw(exact, growth, folder / "growth.png")


def _place(cell: dict[str, Any]) -> tuple[bool, str, int, int]:
    """The residual network first, then by name and size."""
    network = cell["network"]
    return network != "residual", network, cell["n_samples"], cell["threads"]


def _table(cell: dict[str, Any]) -> list[str]:
    threads = "one thread" if cell["threads"] == 1 else f"{cell['threads']} threads"
    ours = _median(cell, "ours_exact", "cpu_seconds")
    lines = [
        f"## {cell['network']}, N = {cell['n_samples']}, C = {cell['n_classes']}, {threads}",
        "",
        f"Lower bound: {cell['bound']['cpu_seconds']:.3g} CPU seconds at "
        f"{cell['bound']['gflop_per_second']:.0f} GFLOP/s; our share of it: "
        f"{_number(cell['bound']['cpu_seconds'] / ours if ours else None)}.",
        "",
        "| method | CPU s | over ours | seconds | MiB | error of kernel | of times | of "
        "eigenvalues | measured |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in dict.fromkeys(r["method"] for r in cell["results"]):
        rows = [r for r in cell["results"] if r["method"] == method]
        version = next((f" ({r['version']})" for r in rows if "version" in r), "")
        date = rows[-1]["date"]
        if all("failed" in r for r in rows):
            reason = rows[-1]["failed"].replace("|", "/")
            lines.append(f"| {method}{version} | failed: {reason} | | | | | | | {date} |")
            continue
        cost = _median(cell, method, "cpu_seconds")
        assert cost is not None
        values = [cost, None if ours is None else cost / ours]
        values += [
            _median(cell, method, key)
            for key in ("wall_seconds", "peak_mib", "error", "time_error", "eigenvalue_error")
        ]
        numbers = " | ".join(_number(value) for value in values)
        compiling = _median(cell, method, "compile_cpu_seconds")
        extra = "" if compiling is None else f", and {compiling:.1f} s to compile"
        lines.append(f"| {method}{version}{extra} | {numbers} | {date} |")
    return [*lines, ""]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _median(cell: dict[str, Any], method: str, key: str) -> float | None:
    values = [r[key] for r in cell["results"] if r["method"] == method and key in r]
    return statistics.median(values) if values else None


def _points(
    exact: dict[str, Any], growth: list[dict[str, Any]], axis: str, method: str, cost: str
) -> list[Point]:
    """Sizes and costs, by size."""
    cells = [c for c in exact["cells"] if c["network"] == "residual" and c["threads"] == 1]
    if axis == "n_classes":
        cells = [c for c in growth if c["width"] == 1.0]
    elif axis == "n_parameters":
        cells = [c for c in growth if c["n_classes"] == 10]
    medians = [(float(c[axis]), _median(c, method, cost)) for c in cells]
    return sorted((n_along_axis, value) for n_along_axis, value in medians if value)


def _exponent(points: list[Point]) -> float | None:
    if len(points) < 2:
        return None
    n_along_axes, costs = np.log(np.array(points)).T
    return float(np.polyfit(n_along_axes, costs, 1)[0])


def _exponents(exact: dict[str, Any], growth: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| grows | method | sizes | exponent of CPU seconds | of the last two sizes | of peak "
        "memory | of the last two sizes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for axis, title in _AXES.items():
        for method in _METHODS:
            rows = [_points(exact, growth, axis, method, cost) for cost in _COSTS]
            n_along_axes = ", ".join(f"{n_along_axis:,.0f}" for n_along_axis, _ in rows[0])
            numbers = [_exponent(part) for row in rows for part in (row, row[-2:])]
            cells = " | ".join("" if b is None else f"{b:.2f}" for b in numbers)
            lines.append(f"| {title} | {method} | {n_along_axes} | {cells} |")
    return lines


def _draw(exact: dict[str, Any], growth: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter
    from matplotlib.ticker import LogLocator
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(10.5, 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(_COSTS), len(_AXES))
    for row, (cost, label) in zip(panels, _COSTS.items(), strict=True):
        for panel, (axis, title) in zip(row, _AXES.items(), strict=True):
            for method in _METHODS:
                points = _points(exact, growth, axis, method, cost)
                slope = _exponent(points)
                if slope is None:
                    continue
                name = f"{method}: {slope:.2f}"
                panel.loglog(*zip(*points, strict=True), marker="o", markersize=4, label=name)
            panel.set_xlabel(title)
            panel.set_ylabel(label)
            panel.grid(visible=True, which="both", alpha=0.25)
            if not panel.lines:
                continue
            panel.legend(title="fitted exponent", fontsize=8, title_fontsize=8)
            # Whole decades only would leave some of these axes without a number.
            for line in (panel.xaxis, panel.yaxis):
                line.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                line.set_major_formatter(EngFormatter(sep=""))
                line.set_minor_formatter(NullFormatter())
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
