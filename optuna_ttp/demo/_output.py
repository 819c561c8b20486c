"""The printed and drawn output of the demo."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import optuna

from optuna_ttp.reporting import report
from optuna_ttp.study import Action
from optuna_ttp.study import observed_steps
from optuna_ttp.visualization.matplotlib import plot_decisions
from optuna_ttp.visualization.matplotlib import plot_predicted_vs_observed
from optuna_ttp.visualization.matplotlib import plot_value_over_time


if TYPE_CHECKING:
    from optuna_ttp.demo._search import Search
    from optuna_ttp.prediction import SearchPredictor
    from optuna_ttp.reporting import Report


def one_line(search: Search) -> str:
    """Return the best value, the trials and the seconds of a search as one line of text."""
    value, seconds = search.best
    best = f"fastest fine-tuning {value:.3f} s, found after {seconds:.1f} s"
    if math.isnan(value):
        best = f"no trial reached the target in {search.budget:g} s"
    return (
        f"{search.name}: {best}; "
        f"{len(search.study.trials)} trials, {search.n_trained} trained, {search.n_reached} "
        f"reached the target; {search.wasted_seconds:.1f} of {search.seconds:.1f} s were spent on "
        "trials that did not."
    )


def print_outcome(plain: Search, wrapped: Search, predictor: SearchPredictor) -> None:
    """Print predictions, skipped trials, the report's summary and a comparison of the searches."""
    ledger = report(wrapped.study)
    print("\nPredicted and real steps to the target of the trained trials:")
    _print_predictions(wrapped.study, predictor)
    print("\nTrials skipped before their first step:")
    _print_skipped(ledger)
    print()
    # The table itself is long, so only the sentences below it are printed.
    print("\n".join(str(ledger).splitlines()[len(ledger.records) + 1 :]))
    _print_verdict(plain, wrapped)


def _print_predictions(study: optuna.Study, predictor: SearchPredictor) -> None:
    """Print predicted and observed steps per trial, and the typical factor between them."""
    rows = []
    for record in report(study).records:
        observed = observed_steps(study.trials[record.number], predictor)
        if record.decision != Action.SKIP and math.isfinite(observed):
            rows.append((record, observed))
    print(
        f"{'trial':>7} {'learning rate':>13} {'batch size':>10} {'momentum':>9} "
        f"{'predicted':>10} {'real':>6}"
    )
    for record, observed in rows[:15]:
        learning_rate, batch_size, momentum = (
            record.params[n] for n in ("learning_rate", "batch_size", "momentum")
        )
        steps = (
            f"{record.predicted_steps:.0f}" if math.isfinite(record.predicted_steps) else "never"
        )
        print(
            f"{record.number:>7} {learning_rate:>13.2g} {batch_size:>10} {momentum:>9.2f} "
            f"{steps:>10} {observed:>6.0f}"
        )
    if len(rows) > 15:
        print(f"        ... and {len(rows) - 15} more")
    ratios = [
        abs(math.log(r.predicted_steps / o))
        for r, o in rows
        if 0 < r.predicted_steps < math.inf and o > 0
    ]
    if ratios:
        typical, most = np.exp(np.quantile(ratios, [0.5, 0.9]))
        print(
            f"Predictions were typically off by a factor of {typical:.2f} (median of "
            f"{len(ratios)} trials); 90 % of them were within a factor of {most:.2f}."
        )


def _print_skipped(ledger: Report) -> None:
    """Print the first few skipped trials with their reasons."""
    skipped = [record for record in ledger.records if record.decision == Action.SKIP]
    for record in skipped[:8]:
        print(f"  trial {record.number}: {record.reason}")
    if len(skipped) > 8:
        print(f"  ... and {len(skipped) - 8} more")
    if not skipped:
        print("  none")


def _print_verdict(plain: Search, wrapped: Search) -> None:
    """Print the seconds after which the wrapped search had the plain search's best value."""
    value, seconds = plain.best
    if math.isnan(value):
        print("The plain search found nothing that the wrapped search could be compared with.")
        return
    reached = wrapped.seconds_to(value)
    if math.isfinite(reached):
        print(
            f"The plain search took {seconds:.1f} s to find its best, {value:.3f} s; the wrapped "
            f"search had that or better after {reached:.1f} s, including the spectrum's seconds."
        )
    else:
        print(f"The wrapped search did not find the best of the plain one, {value:.3f} s.")


def draw(plain: Search, wrapped: Search, predictor: SearchPredictor, picture: Path) -> None:
    """Draw predictions, decisions and both searches side by side into a file."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "The demo's picture needs Matplotlib: pip install 'optuna_ttp[demo]', or pass "
            "--no-picture."
        ) from error
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    plot_predicted_vs_observed(wrapped.study, predictor, ax=axes[0])
    plot_decisions(wrapped.study, ax=axes[1])
    axes[2].set_yscale("log")
    plot_value_over_time(
        {s.name: s.study for s in (plain, wrapped)},
        head_start={s.name: s.head_start for s in (plain, wrapped)},
        end=plain.budget,
        ax=axes[2],
    )
    axes[2].set_ylabel("Fastest fine-tuning found (s)")
    figure.savefig(picture, dpi=110)
