"""What a prediction costs beside the training it predicts, and the speed of the response surface.

EfficientNet-Lite0 on 200 images (NC = 1000). All in one run on the same threads: the spectrum with
today's engine, from nothing; one exact prediction; real training steps, full-batch and mini-batch,
timed and multiplied by T = 150, the paper's horizon. Both ratios are charged with the spectrum:

- one configuration: 150 full-batch steps, over spectrum plus one prediction;
- a study of 100 mini-batch configurations (batch sizes 8, 16 and 50, equally often): the mean of
  150 of their steps, over a hundredth of the spectrum, the surface and 100 exact predictions.

The response surface is built for the target of 25 % of the initial loss, and asked for 100,000
configurations inside of it, in one call.

With ``--threads 1`` all seconds are the processor's, which other work on the machine changes
little; with more, they are seconds of real time.

Writes ``cost.json`` and ``cost.md``, and its figures into ``summary.json``. Run with
``python -m benchmarks.accuracy.cost`` on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import time

import numpy as np
import torch

from benchmarks.accuracy.evaluation import update_summary
from benchmarks.accuracy.record import HORIZON
from benchmarks.accuracy.record import RESULTS
from benchmarks.accuracy.record import Run
from benchmarks.accuracy.record import train
from benchmarks.accuracy.tasks import load
from benchmarks.environment import environment
from optuna_ttp import compute_spectrum
from optuna_ttp import TrainingTimePredictor


_SIZES = (8, 16, 50)
_N_CONFIGURATIONS = 100
_N_SCORED = 100_000


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="the small digits network only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    tuning = load("digits-0" if options.smoke else "efficientnet-digits-0")
    n_samples = len(tuning.labels)
    started = clock()
    spectrum = compute_spectrum(
        tuning.task(), measure_speed=False, max_memory=16 * 2**30, show_progress_bar=False
    )
    figures = {"spectrum_seconds": clock() - started}
    print(figures, flush=True)
    rng = np.random.default_rng(0)
    predictor = TrainingTimePredictor(spectrum, target_fraction=0.25)
    limits = predictor.max_learning_rate(np.array(_SIZES), 0.0)
    batch_sizes = np.resize(_SIZES, _N_CONFIGURATIONS)
    momenta = rng.choice([0.0, 0.9, 0.95], _N_CONFIGURATIONS)
    rates = predictor.max_learning_rate(batch_sizes, momenta) * 10 ** rng.uniform(
        -2, 0, _N_CONFIGURATIONS
    )
    started = clock()
    predictor.predict(rates[0], n_samples, momenta[0], max_steps=HORIZON, full_curve=True)
    figures["prediction_seconds"] = clock() - started
    started = clock()
    predictor.predict(rates, batch_sizes, momenta, max_steps=HORIZON, full_curve=True)
    figures["predictions_100_seconds"] = clock() - started
    scored_rates = rates.min() * (rates.max() / rates.min()) ** rng.random(_N_SCORED)
    scored_sizes = rng.choice([8, 16, 32, 64, 128], _N_SCORED)
    scored_momenta = rng.uniform(0, 0.98, _N_SCORED)
    started = clock()
    predictor.score(rates[:1], batch_sizes[:1], momenta[:1])
    figures["surface_seconds"] = clock() - started
    seconds = []
    for _ in range(5):
        started = clock()
        predictor.score(scored_rates, scored_sizes, scored_momenta, simulate_outside=False)
        seconds.append(clock() - started)
    figures["predictions_per_second"] = _N_SCORED / float(np.median(seconds))
    figures["share_extrapolated"] = float(
        predictor.is_extrapolated(scored_rates, scored_sizes, scored_momenta).mean()
    )
    for a_batch_size, limit in zip((n_samples, *_SIZES), (limits[-1], *limits), strict=True):
        run = Run(float(0.01 * limit), int(a_batch_size), 0.0, 0, 6, 0.01)
        train(tuning, run)
        figures[f"training_seconds_{a_batch_size}"] = (
            train(tuning, run, clock=clock)[2] / 7 * HORIZON
        )
    one = figures["spectrum_seconds"] + figures["prediction_seconds"]
    figures["cost_ratio_full_batch"] = figures[f"training_seconds_{n_samples}"] / one
    amortised = (
        figures["spectrum_seconds"]
        + figures["surface_seconds"]
        + figures["predictions_100_seconds"]
    ) / _N_CONFIGURATIONS
    training = float(
        np.mean([figures[f"training_seconds_{a_batch_size}"] for a_batch_size in _SIZES])
    )
    figures["cost_ratio_study_100"] = training / amortised
    figures["cost_ratio_without_spectrum"] = (
        training * _N_CONFIGURATIONS / figures["predictions_100_seconds"]
    )
    _write(figures, n_samples, options.output)


def _write(figures: dict[str, float], n_samples: int, output: Path) -> None:
    where = environment()
    output.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    clock = "processor" if threads == 1 else "real time"
    document = {"environment": where, "threads": threads, "seconds_of": clock, **figures}
    (output / "cost.json").write_text(json.dumps(document, indent=2) + "\n")
    for_summary = (
        "cost_ratio_full_batch",
        "cost_ratio_study_100",
        "predictions_per_second",
        "surface_seconds",
    )
    update_summary(output, {name: figures[name] for name in for_summary})
    full = figures[f"training_seconds_{n_samples}"]
    lines = [
        "| | |",
        "| --- | --- |",
        f"| 150 full-batch steps over spectrum and one prediction | "
        f"{figures['cost_ratio_full_batch']:.2g} |",
        "| 150 mini-batch steps over a hundredth of spectrum, surface and 100 predictions | "
        f"{figures['cost_ratio_study_100']:.2g} |",
        "| 150 mini-batch steps over one of 100 exact predictions, spectrum at hand | "
        f"{figures['cost_ratio_without_spectrum']:.2g} |",
        f"| spectrum over 150 full-batch steps | {figures['spectrum_seconds'] / full:.2g} |",
        f"| predictions a second from the surface | {figures['predictions_per_second']:,.0f} |",
        f"| seconds to build the surface | {figures['surface_seconds']:.2g} |",
        "",
        f"Measured {where['date']} on {where['cores']} cores of {where['processor']} with "
        f"`{where['command']}`.",
        "",
    ]
    (output / "cost.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
