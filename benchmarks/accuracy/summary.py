"""One table of what was aimed at and what was measured, from ``results/summary.json``.

Writes ``summary.md``, the README's table. Run with ``python -m benchmarks.accuracy.summary`` after
the other benchmarks of this folder.
"""

from __future__ import annotations

import json

from benchmarks.accuracy.record import RESULTS


# What it is, the figure's name, what was aimed at, and the same figure of the paper's equation.
_ROWS = (
    ("paper's protocol, GD: mean error", "paper_gd_mape", "≤ 5 %", "sde_paper_gd_mape"),
    ("paper's protocol, GD: 95th percentile", "paper_gd_p95", "≤ 13 %", "sde_paper_gd_p95"),
    ("paper's protocol, SGD: mean error", "paper_sgd_mape", "< 8 %", "sde_paper_sgd_mape"),
    ("paper's protocol, SGD: 95th percentile", "paper_sgd_p95", "< 20 %", "sde_paper_sgd_p95"),
    ("paper's protocol, SGD: Kendall's tau", "paper_sgd_tau", "> 0.85", "sde_paper_sgd_tau"),
    ("absolute targets, ImageNet weights: mean error", "absolute_pretrained_mape_0", "< 12 %", ""),
    ("absolute targets, ImageNet weights: tau", "absolute_pretrained_tau_0", "> 0.9", ""),
    (
        "residual network: times in the 80 % interval or marked",
        "absolute_residual_coverage_or_marked_0",
        "≥ 70 %",
        "",
    ),
    (
        "digits network: times in the 80 % interval or marked",
        "absolute_digits_coverage_or_marked_0",
        "≥ 70 %",
        "",
    ),
    (
        "sentence encoder: times in the 80 % interval or marked",
        "absolute_minilm_coverage_or_marked_0",
        "≥ 70 %",
        "",
    ),
    (
        "ImageNet weights, mild configurations, after 1 trial: mean error",
        "absolute_pretrained_mape_1",
        "< 6 %",
        "",
    ),
    ("the same after 5 trials", "absolute_pretrained_mape_5", "< 4 %", ""),
    (
        "ImageNet weights, all configurations, after 1 trial",
        "absolute_pretrained_mape_1_all",
        "< 9 %",
        "",
    ),
    ("the same after 5 trials", "absolute_pretrained_mape_5_all", "< 6 %", ""),
    ("small networks, after 1 trial", "small_nets_mape_1", "< 15 %", ""),
    ("the same after 3 trials", "small_nets_mape_3", "< 10 %", ""),
    ("the same after 5 trials", "small_nets_mape_5", "< 8 %", ""),
    ("sentence encoder, after 1 trial", "transformer_mape_1", "< 20 %", ""),
    ("the same after 3 trials", "transformer_mape_3", "< 13 %", ""),
    ("the same after 5 trials", "transformer_mape_5", "< 10 %", ""),
    (
        "the same, no trial, a short training run of 20 steps",
        "transformer_mape_short_run",
        "< 50 %",
        "",
    ),
    ("80 % intervals after trials: least covered", "coverage_80_min", "≥ 72 %", ""),
    ("80 % intervals after trials: most covered", "coverage_80_max", "≤ 88 %", ""),
    ("rest of a trial, a fifth of it seen: mean error", "partial_curve_error", "≤ 10 %", ""),
    ("largest stable learning rate: mean error", "max_learning_rate_error", "≤ 20 %", ""),
    ("250 of 2,000 samples: mean error", "subset_error", "< 20 %", ""),
    ("cost ratio, one full-batch configuration", "cost_ratio_full_batch", "≥ 45", ""),
    ("cost ratio, study of 100 configurations", "cost_ratio_study_100", "≥ 1,000", ""),
    ("predictions a second from the surface", "predictions_per_second", "≥ 100,000", ""),
    ("seconds to build the surface", "surface_seconds", "< 10", ""),
)


def main() -> None:
    """Write the table."""
    figures = json.loads((RESULTS / "summary.json").read_text())
    lines = [
        "| | aimed at | measured | the paper's equation on the same runs |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {what} | {aim} | {_shown(name, figures)} | {_shown(other, figures)} |"
        for what, name, aim, other in _ROWS
        if name in figures
    ]
    text = "\n".join([*lines, ""])
    (RESULTS / "summary.md").write_text(text)
    print(text)


def _shown(name: str, figures: dict[str, float]) -> str:
    if name not in figures:
        return "-"
    value = figures[name]
    if name.endswith(("_tau", "_tau_0")):
        return f"{value:.2f}"
    if name.startswith("cost") or name.endswith("_seconds"):
        return f"{value:.2g}"
    if name.endswith("per_second"):
        return f"{value:,.0f}"
    return f"{value:.1%}"


if __name__ == "__main__":
    main()
