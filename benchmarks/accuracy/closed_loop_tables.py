"""Tables, figures and the plot of ``closed_loop``."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.evaluation import update_summary
from benchmarks.environment import environment


COUNTS = (0, 1, 2, 3, 5, 10)
GROUPS = {
    "ImageNet": ("efficientnet",),
    "small networks": ("digits", "residual"),
    "transformer": ("minilm",),
}
METHODS = {
    "ours": "ours",
    "none": "no correction",
    "factor": "one factor",
    "offset": "one factor a target",
    "c/eta_e": "`c / eta_e`",
    "c/eta_e+lag": "`c / eta_e + m / (1 - m)`",
    "gp": "Gaussian process",
}
_STYLES: dict[str, dict[str, Any]] = {
    "ours": {"linewidth": 2.5, "color": "tab:blue"},
    "none": {"color": "0.5"},
    "factor": {"color": "tab:orange"},
    "offset": {"color": "tab:green"},
    "c/eta_e": {"color": "tab:red"},
    "c/eta_e+lag": {"color": "tab:purple"},
    "gp": {"color": "tab:brown"},
}


def write(rows: list[dict[str, Any]], extra: dict[str, Any], output: Path) -> None:
    """Write tables, figures and the plot.

    Args:
        rows:
            Of :func:`learning_curves`.
        extra:
            Seed noise, errors from partial curves, and trust, by task.
        output:
            A folder.
    """
    output.mkdir(parents=True, exist_ok=True)
    means = _means(rows)
    with (output / "closed_loop.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, means[0].keys())
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in means
        )
    where = environment()
    figures = _summary(means, extra)
    document = {"environment": where, "summary": figures, **extra}
    (output / "closed_loop.json").write_text(json.dumps(document, indent=1) + "\n")
    update_summary(output, figures)
    lines = _tables(means, extra)
    lines += [f"Measured {where['date']} with `{where['command']}`.", ""]
    (output / "closed_loop.md").write_text("\n".join(lines))
    print("\n".join(lines))
    _draw(means, output / "closed_loop.png")


def _means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the repeats."""
    keys = ("task", "runs", "method", "trials")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in keys), []).append(row)
    return [
        dict(zip(keys, key, strict=True))
        | {
            name: _mean([r[name] for r in members])
            for name in ("error", "median", "coverage", "width")
        }
        for key, members in groups.items()
    ]


def _mean(values: list[float]) -> float:
    """Over the repeats in which a method had anything to go by."""
    known = [v for v in values if np.isfinite(v)]
    return float(np.mean(known)) if known else float("nan")


def _value(
    means: list[dict[str, Any]],
    group: str,
    runs: str,
    method: str,
    trials: int,
    name: str = "error",
) -> float:
    """Mean over the tasks of a group; networks of one group count the same."""
    values = []
    for start in GROUPS[group]:
        chosen = [
            row[name]
            for row in means
            if row["task"].startswith(start)
            and (row["runs"], row["method"], row["trials"]) == (runs, method, trials)
        ]
        if chosen:
            values.append(np.mean(chosen))
    return float(np.mean(values)) if values else float("nan")


def _summary(means: list[dict[str, Any]], extra: dict[str, Any]) -> dict[str, float]:
    figures = {
        "absolute_pretrained_mape_1": _value(means, "ImageNet", "mild", "ours", 1),
        "absolute_pretrained_mape_5": _value(means, "ImageNet", "mild", "ours", 5),
        "absolute_pretrained_mape_1_all": _value(means, "ImageNet", "all", "ours", 1),
        "absolute_pretrained_mape_5_all": _value(means, "ImageNet", "all", "ours", 5),
    }
    for group, prefix in (("small networks", "small_nets"), ("transformer", "transformer")):
        for count in (1, 3, 5):
            figures[f"{prefix}_mape_{count}"] = _value(means, group, "all", "ours", count)
    coverages = [
        row["coverage"]
        for row in means
        if row["method"] == "ours" and row["runs"] == "all" and row["trials"] >= 1
    ]
    figures["coverage_80_min"] = float(np.min(coverages))
    figures["coverage_80_max"] = float(np.max(coverages))
    partial = [np.mean(errors) for errors in extra["partial"].values()]
    figures["partial_curve_error"] = float(np.mean(partial))
    return {name: value for name, value in figures.items() if np.isfinite(value)}


def _tables(means: list[dict[str, Any]], extra: dict[str, Any]) -> list[str]:
    lines = []
    tasks = list(dict.fromkeys(row["task"] for row in means))
    for group, starts in GROUPS.items():
        names = [name for name in tasks if name.startswith(starts)]
        if not names:
            continue
        noise = ", ".join(
            f"{name} {extra['seed'][name]:.1%}"
            for name in names
            if np.isfinite(extra["seed"][name])
        )
        lines += [
            f"{group} ({', '.join(names)}), mean error by the number of observed trials:",
            "",
            f"| | {' | '.join(map(str, COUNTS))} |",
            f"| --- |{' --- |' * len(COUNTS)}",
        ]
        for method, name in METHODS.items():
            for runs in ("all", "mild") if method in ("ours", "gp") else ("all",):
                cells = [_value(means, group, runs, method, count) for count in COUNTS]
                label = name if runs == "all" else f"{name}, mild configurations"
                shown = " | ".join("-" if np.isnan(c) else f"{c:.1%}" for c in cells)
                lines.append(f"| {label} | {shown} |")
        medians = [_value(means, group, "all", "ours", count, "median") for count in COUNTS]
        lines.append(f"| ours, median error | {' | '.join(f'{c:.1%}' for c in medians)} |")
        lines += ["", f"The same run with another order of the samples: {noise}.", ""]
    lines += [
        "Ours by task: mean error, and share of times in the 80 % interval:",
        "",
        f"| | {' | '.join(map(str, COUNTS))} |",
        f"| --- |{' --- |' * len(COUNTS)}",
    ]
    for name in tasks:
        ours = {
            row["trials"]: row
            for row in means
            if (row["task"], row["runs"], row["method"]) == (name, "all", "ours")
        }
        shown = " | ".join(f"{ours[c]['error']:.1%} ({ours[c]['coverage']:.0%})" for c in COUNTS)
        lines.append(f"| {name} | {shown} |")
    lines += [
        "",
        "| | error of the remaining time, a fifth of the steps shown: mean (median) | "
        "after five trials no longer trusted (or the first steps named as not as predicted): "
        "right spectrum, shuffled, another task's |",
        "| --- | --- | --- |",
    ]
    for name in tasks:
        partial = extra["partial"][name]
        shares = ", ".join(
            f"{1 - np.mean(of['trusted']):.0%} "
            f"({np.mean(np.array(of['named']) | ~np.array(of['trusted'])):.0%})"
            for of in extra["trust"][name].values()
        )
        error = f"{np.mean(partial):.1%} ({np.median(partial):.1%})" if partial else "-"
        lines.append(f"| {name} | {error} | {shares} |")
    return [*lines, ""]


def _draw(means: list[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator
    from matplotlib.ticker import NullFormatter

    present = [g for g in GROUPS if np.isfinite(_value(means, g, "all", "ours", 0))]
    figure, panels = plt.subplots(1, len(present), figsize=(4.5 * len(present), 4), squeeze=False)
    for panel, group in zip(panels[0], present, strict=True):
        for method, name in METHODS.items():
            errors = [100 * _value(means, group, "all", method, count) for count in COUNTS]
            style = _STYLES.get(method, {})
            panel.plot(COUNTS, errors, "o-", markersize=3, label=name.replace("`", ""), **style)
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_title(group)
        panel.set_xlabel("observed trials")
        panel.set_ylabel("mean error of the training time, %")
    panels[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
