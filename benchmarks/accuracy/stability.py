"""The predicted largest stable learning rate against the one that real training shows.

Real limits are found by bisection in the logarithm of the learning rate, to 3 %, by two
definitions of "unstable":

``departure``
    Training starts at a minimum of the mean squared error, found by full-batch training to 0.2 %
    of the initial loss, where the spectrum is computed anew. A run is unstable if its training
    loss over all samples exceeds ten times its value at the start within 200 steps. This is
    dynamical stability as defined by Wu, Ma and E, 2018 (NeurIPS), what the formula is about:
    small distances from a minimum. Ten times, because mini-batch noise multiplies the loss of a
    stable run by ``1 / (1 - S)`` with ``S < 1`` of :class:`~optuna_ttp.dynamics.StabilityLimit`.
    The cross-entropy has no such minimum: its curvature goes to zero with the loss.
``no progress``
    Training starts at the pretrained weights. A run is unstable if its mean training loss over
    steps 31 to 60 is above the initial one: a loss spike from which it recovers does not count.
    The formula says nothing about the region above its limit in which networks recover from a
    spike with a smaller curvature (Lewkowycz et al., 2020, arXiv 2003.02218); this shows how wide
    it is.

With mini-batches a learning rate is unstable if two of three orders of the samples are; the loss
is then taken every fourth step. Each limit is also found in the simulation of the linearised
model, so that the formula's error splits into that of the formula, predicted over simulated, and
that of the linearisation, simulated over real.
``max_learning_rate_error`` in the JSON is the mean of ``|predicted / real - 1|`` by the first
definition over two networks, momentum 0 and 0.9, batch size 16 and all samples. Writes
``stability.csv``, ``stability.json`` and ``stability.md``.

Run with ``python -m benchmarks.accuracy.stability``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import copy
import csv
from dataclasses import dataclass
from dataclasses import replace
import itertools
import json
import math
from pathlib import Path
from typing import Any
import warnings

import numpy as np
from numpy.typing import NDArray
import torch

from benchmarks.accuracy.evaluation import update_summary
from benchmarks.accuracy.tasks import load
from benchmarks.accuracy.tasks import Tuning
from benchmarks.environment import environment
from optuna_ttp import compute_spectrum
from optuna_ttp import Spectrum
from optuna_ttp import TrainingTimePredictor
from optuna_ttp import UnreliablePredictionWarning
from optuna_ttp.dynamics import LinearisedModel
from optuna_ttp.dynamics import SGDConfigurations
from optuna_ttp.dynamics import simulate


PRIMARY = "departure"
_PRIMARY_TASKS = ("residual-mse-0", "digits-mse-0")
_TASKS = (*_PRIMARY_TASKS, "residual-0", "digits-0")
_MINIMUM = 0.002
# A limit further from the predicted one than this factor is not looked for.
_WIDEST = 32.0
_N_SEEDS = 3

# Training losses over all samples as shares of the first one; NaN where they were not taken.
Curves = Callable[[float, int, float, int], NDArray[np.float64]]


@dataclass(frozen=True)
class Definition:
    """What counts as unstable.

    Attributes:
        name:
            As in the module's docstring.
        at_minimum:
            Whether training starts at a minimum instead of at the pretrained weights.
        n_steps:
            So many steps are watched.
        bound:
            Of the loss as a share of the first one.
        since:
            The mean loss from this step on is watched instead of the largest one.
    """

    name: str
    at_minimum: bool
    n_steps: int
    bound: float
    since: int | None = None

    def unstable(self, curve: NDArray[np.float64]) -> bool:
        """Tell whether a curve, of shape ``(n_steps + 1,)``, is that of an unstable run."""
        if np.isposinf(curve).any():
            return True
        value = np.nanmax(curve) if self.since is None else np.nanmean(curve[self.since :])
        return bool(value > self.bound)


DEFINITIONS = (
    Definition("departure", True, 200, 10.0),
    Definition("no progress", False, 60, 1.0, since=31),
)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", default=_TASKS, help="others keep their results")
    parser.add_argument("--smoke", action="store_true", help="one case, coarsely")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in ("digits-mse-0",) if options.smoke else options.tasks:
        _write(options.output, _rows(name, options.smoke), options.smoke)


def _write(folder: Path, rows: list[dict[str, Any]], smoke: bool) -> None:
    """Write the results anew, with those of other tasks that are there."""
    path = folder / "stability.csv"
    if path.exists():
        with path.open(newline="") as file:
            rows = rows + [r for r in csv.DictReader(file) if r["task"] != rows[0]["task"]]
    rows.sort(key=lambda row: _TASKS.index(row["task"]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    summary = {"environment": environment(), **_summary(rows)}
    (folder / "stability.json").write_text(json.dumps(summary, indent=2) + "\n")
    if not smoke and {r["task"] for r in rows} >= set(_PRIMARY_TASKS):
        update_summary(folder, {"max_learning_rate_error": summary["max_learning_rate_error"]})
    table = _table(rows, summary)
    (folder / "stability.md").write_text(table)
    print(table, flush=True)


def train_to_minimum(
    tuning: Tuning, learning_rate: float, *, share: float = _MINIMUM, max_steps: int = 10_000
) -> tuple[Tuning, float]:
    """Train a copy of the network on full batches with momentum 0.9.

    Args:
        tuning:
            Network and data.
        learning_rate:
            Of SGD.
        share:
            Of the initial loss to stop at.
        max_steps:
            To stop at the latest.

    Returns:
        The trained network with its data, and its loss as a share of the initial one.
    """
    model = copy.deepcopy(tuning.model)
    optimiser = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    initial = reached = math.nan
    for step in range(max_steps + 1):
        optimiser.zero_grad()
        loss = tuning.loss(model(tuning.inputs), tuning.labels)
        initial = float(loss.detach()) if step == 0 else initial
        reached = float(loss.detach()) / initial
        if reached <= share or step == max_steps:
            break
        loss.backward()
        optimiser.step()
    return replace(tuning, model=model), reached


def real_curves(tuning: Tuning, stop_at: float) -> Curves:
    """Return a function from (learning rate, batch size, momentum, seed) to a real curve.

    Args:
        tuning:
            Network and data.
        stop_at:
            A run ends where its loss is above this share of its first one; the last value is kept.

    Returns:
        The function. It takes the steps as a keyword.
    """

    def run(rate: float, batch_size: int, momentum: float, seed: int, n_steps: int) -> Any:
        model = copy.deepcopy(tuning.model)
        optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
        generator = torch.Generator().manual_seed(1000 + seed)
        n_samples = len(tuning.labels)
        curve = np.full(n_steps + 1, np.nan)
        order: list[torch.Tensor] = []
        initial = math.nan
        for step in range(n_steps + 1):
            if not order and batch_size >= n_samples:
                order = [torch.arange(n_samples)]
            elif not order:
                order = list(torch.randperm(n_samples, generator=generator).split(batch_size))
            chosen = order.pop(0)
            loss = tuning.loss(model(tuning.inputs[chosen]), tuning.labels[chosen])
            if batch_size >= n_samples or step % 4 == 0:
                whole = (
                    float(loss.detach()) if batch_size >= n_samples else _whole_loss(model, tuning)
                )
                initial = whole if step == 0 else initial
                curve[step] = whole / initial if math.isfinite(whole) else math.inf
                if not curve[step] <= stop_at:
                    curve[step:] = curve[step]
                    break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return curve

    return run  # type: ignore[return-value]


def simulated_curves(spectrum: Spectrum) -> Curves:
    """Return the same function as :func:`real_curves` for the linearised model.

    Args:
        spectrum:
            Of the network where training starts.

    Returns:
        The function.
    """
    model = LinearisedModel.from_spectrum(spectrum)

    def run(rate: float, batch_size: int, momentum: float, seed: int, n_steps: int) -> Any:
        observed = simulate(
            model,
            SGDConfigurations.of(rate, momentum),
            np.array([batch_size]),
            max_steps=np.array([n_steps]),
            full_curves=True,
            exact=True,
            seed=seed,
        )
        curve = np.full(n_steps + 1, np.nan)
        steps, losses = observed.steps[0], observed.curves["loss"][0]
        known = np.isfinite(steps)
        curve[steps[known].astype(int)] = losses[known] / losses[0]
        if observed.blown_up[0]:
            curve[int(steps[known][-1]) :] = np.inf
        return curve

    return run  # type: ignore[return-value]


def bisect(unstable: Callable[[float], bool], start: float, resolution: float) -> float:
    """Find the learning rate above which training is unstable.

    Args:
        unstable:
            Of a learning rate.
        start:
            Where to begin.
        resolution:
            Relative accuracy.

    Returns:
        The learning rate; infinity, or zero, where it is further from ``start`` than 32 times.
    """
    low = high = start
    if unstable(start):
        while unstable(low := low / 1.5):
            high = low
            if low < start / _WIDEST:
                return 0.0
    else:
        while not unstable(high := high * 1.5):
            low = high
            if high > start * _WIDEST:
                return math.inf
    while high / low > 1.0 + resolution:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if unstable(middle) else (middle, high)
    return math.sqrt(low * high)


def _whole_loss(model: torch.nn.Module, tuning: Tuning) -> float:
    with torch.no_grad():
        return float(tuning.loss(model(tuning.inputs), tuning.labels))


def _rows(name: str, smoke: bool) -> list[dict[str, Any]]:
    """One row a batch size, momentum and definition."""
    pretrained = load(name)
    n_samples = len(pretrained.labels)
    spectrum = compute_spectrum(pretrained.task(), measure_speed=False, show_progress_bar=False)
    starts = {False: (pretrained, spectrum, 1.0)}
    if pretrained.labels.is_floating_point():
        # The curvature may grow on the way.
        rate = 0.2 * _predicted(spectrum, n_samples, 0.0)
        trained, share = train_to_minimum(pretrained, rate, max_steps=50 if smoke else 10_000)
        spectrum_there = compute_spectrum(
            trained.task(), measure_speed=False, show_progress_bar=False
        )
        starts[True] = (trained, spectrum_there, share)
        print(f"{name}: minimum at {share:.2%} of the initial loss", flush=True)
    batch_sizes = (n_samples,) if smoke else (16, n_samples)
    rows = []
    for definition in DEFINITIONS:
        if definition.at_minimum not in starts:
            continue
        tuning, here, share = starts[definition.at_minimum]
        for batch_size, momentum in itertools.product(
            batch_sizes, (0.0,) if smoke else (0.0, 0.9)
        ):
            start = _predicted(here, batch_size, momentum)
            seeds = range(1 if batch_size >= n_samples or smoke else _N_SEEDS)
            # Spikes are watched until the loss is lost.
            stop_at = definition.bound if definition.since is None else 100.0
            real, simulated = (
                _limit(
                    curves, definition, batch_size, momentum, start, seeds, 0.3 if smoke else 0.03
                )
                for curves in (real_curves(tuning, stop_at), simulated_curves(here))
            )
            rows.append(
                {
                    "task": name,
                    "batch_size": str(batch_size),
                    "momentum": f"{momentum:g}",
                    "definition": definition.name,
                    "start_loss_share": f"{share:.4g}",
                    "predicted": f"{start:.5g}",
                    "simulated": f"{simulated:.5g}",
                    "real": f"{real:.5g}",
                    "predicted_over_real": f"{start / real if real else math.inf:.4g}",
                }
            )
            print(rows[-1], flush=True)
    return rows


def _predicted(spectrum: Spectrum, batch_size: int, momentum: float) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliablePredictionWarning)
        predictor = TrainingTimePredictor(spectrum, target_fraction=0.5)
    return float(predictor.max_learning_rate(batch_size, momentum))


def _limit(
    curves: Any,
    definition: Definition,
    batch_size: int,
    momentum: float,
    start: float,
    seeds: Sequence[int],
    resolution: float,
) -> float:
    """The learning rate above which most seeds are unstable."""

    def unstable(rate: float) -> bool:
        votes = [0, 0]
        for seed in seeds:
            curve = curves(rate, batch_size, momentum, seed, definition.n_steps)
            votes[definition.unstable(curve)] += 1
            if 2 * max(votes) > len(seeds):
                break
        return votes[1] > votes[0]

    return bisect(unstable, start, resolution)


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    primary = [r for r in rows if r["definition"] == PRIMARY and r["task"] in _PRIMARY_TASKS]
    errors = _ratios(primary, "predicted", "real")
    summary: dict[str, Any] = {
        "max_learning_rate_error": errors.get("mean_absolute_error", math.nan)
    }
    for definition, name in itertools.product(DEFINITIONS, _TASKS):
        mine = [r for r in rows if r["definition"] == definition.name and r["task"] == name]
        if mine:
            summary.setdefault(definition.name, {})[name] = {
                "cases": len(mine),
                "predicted_over_real": _ratios(mine, "predicted", "real"),
                "predicted_over_simulated": _ratios(mine, "predicted", "simulated"),
                "simulated_over_real": _ratios(mine, "simulated", "real"),
            }
    return summary


def _ratios(rows: list[dict[str, Any]], upper: str, lower: str) -> dict[str, Any]:
    """Errors over the cases in which both limits were found."""
    pairs = np.array([(float(r[upper]), float(r[lower])) for r in rows]).reshape(-1, 2)
    good = (np.isfinite(pairs) & (pairs > 0)).all(axis=1)
    ratio = pairs[good, 0] / pairs[good, 1]
    error = np.abs(ratio - 1.0)
    if not len(ratio):
        return {"found": 0}
    return {
        "found": int(good.sum()),
        "mean_absolute_error": round(float(error.mean()), 4),
        "largest_absolute_error": round(float(error.max()), 4),
        "within_20_percent": int((error <= 0.2).sum()),
        "bias_factor": round(float(np.exp(np.log(ratio).mean())), 4),
    }


def _table(rows: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    where = summary["environment"]
    lines = [
        "Largest stable learning rate, predicted over real (in brackets: predicted over that of "
        "the simulated linearised model):",
        "",
        "| network | batch size | momentum | " + " | ".join(d.name for d in DEFINITIONS) + " |",
        "| --- " * (3 + len(DEFINITIONS)) + "|",
    ]
    keys = list(dict.fromkeys((r["task"], r["batch_size"], r["momentum"]) for r in rows))
    for key in keys:
        mine = {
            r["definition"]: r for r in rows if (r["task"], r["batch_size"], r["momentum"]) == key
        }
        cells = [_cell(mine.get(d.name)) for d in DEFINITIONS]
        lines.append(f"| {key[0]} | {key[1]} | {key[2]} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Mean error of the first: {summary['max_learning_rate_error']:.0%}. Measured "
        f"{where['date']} with `{where['command']}`; bisection to 3 %, the majority of {_N_SEEDS} "
        "orders of the samples for mini-batches. The definitions are in the module's docstring.",
        "",
    ]
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    predicted, simulated, real = (float(row[k]) for k in ("predicted", "simulated", "real"))
    return f"{_ratio(predicted, real)} ({_ratio(predicted, simulated)})"


def _ratio(predicted: float, observed: float) -> str:
    if observed == 0.0:
        return f"> {_WIDEST:.0f}"
    return f"{predicted / observed:.2f}" if math.isfinite(observed) else f"< 1/{_WIDEST:.0f}"


if __name__ == "__main__":
    main()
