"""The demo: the same search on a real network twice, without and with predictions.

A small convolutional network is pretrained on the digits 0 to 4 of scikit-learn's bundled set and
fine-tuned to 5 to 9. Everything runs on the CPU and is seeded, but what a search gets done in a
given time depends on the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import copy
from dataclasses import dataclass
import math
from pathlib import Path
import tempfile
import time

import numpy as np
import optuna
import torch

from optuna_ttp.prediction import TrainingTimePredictor
from optuna_ttp.reporting import Report
from optuna_ttp.reporting import report
from optuna_ttp.search import TTPPruner
from optuna_ttp.search import TTPSampler
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.spectrum import Throughput
from optuna_ttp.store import SpectrumStore
from optuna_ttp.study import observed_steps
from optuna_ttp.study import SKIP
from optuna_ttp.study import TrainingLog
from optuna_ttp.task import FineTuningTask
from optuna_ttp.visualization.matplotlib import best_over_time


Data = tuple[torch.Tensor, torch.Tensor]
N_TRAIN = 200
BATCH_SIZES = (8, 16, 32, 64, 128)
TARGET_FRACTION = 0.1
MAX_EPOCHS = 30
_EXPLAINED_TRACE = 0.99


@dataclass(frozen=True, eq=False)
class FineTuning:
    """A pretrained network with a new head, and the data to tune it on.

    Attributes:
        model:
            Pretrained on the digits 0 to 4, with a new head for 5 to 9.
        train:
            Images and labels to train on.
    """

    model: torch.nn.Module
    train: Data


@dataclass(frozen=True, eq=False)
class Search:
    """A finished search.

    Attributes:
        name:
            For people.
        study:
            The Optuna study.
        head_start:
            Seconds spent before the first trial.
        seconds:
            What all of it took, the head start included.
        budget:
            What it should have taken.
    """

    name: str
    study: optuna.Study
    head_start: float
    seconds: float
    budget: float

    @property
    def best(self) -> tuple[float, float]:
        """The best value found within the budget, and the seconds at which it was found."""
        times, values = best_over_time(self.study, head_start=self.head_start)
        within = [(v, t) for t, v in zip(times, values, strict=True) if t <= self.budget]
        return within[-1] if within else (math.nan, math.nan)

    def seconds_to(self, value: float) -> float:
        """Seconds until the best value was at least as good as this one."""
        times, values = best_over_time(self.study, head_start=self.head_start)
        return next((t for t, v in zip(times, values, strict=True) if v <= value), math.nan)

    @property
    def n_reached(self) -> int:
        """Trials that were trained to the target."""
        return sum(record.state == "COMPLETE" for record in report(self.study).records)

    @property
    def wasted_seconds(self) -> float:
        """Seconds spent on trials that did not reach the target, skipped ones included."""
        return sum(
            record.paid_seconds
            for record in report(self.study).records
            if record.state != "COMPLETE" and math.isfinite(record.paid_seconds)
        )

    @property
    def n_trained(self) -> int:
        """Trials that took at least one step."""
        return sum(record.decision != SKIP for record in report(self.study).records)


def pretrain(seed: int = 0, *, steps: int = 300, n_train: int = N_TRAIN) -> FineTuning:
    """Pretrain the network and give it a new head.

    Args:
        seed:
            For weights, data split and batches.
        steps:
            Optimiser steps of the pretraining.
        n_train:
            Samples to fine-tune on.

    Returns:
        The network and the data.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 32, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(32, 64, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(64, 64, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(64 * 16, 5),
        )
        images, labels = _digits(range(5), generator)
        for _ in train(model, (images, labels), 0.05, 32, 0.9, steps, generator):
            pass
        model[-1] = torch.nn.Linear(64 * 16, 5)
    images, labels = _digits(range(5, 10), generator)
    return FineTuning(model, (images[:n_train], labels[:n_train]))


def make_objective(
    tuning: FineTuning, *, target_loss: float, throughput: Throughput, seed: int
) -> Callable[[optuna.Trial], float]:
    """Return an objective as a user would write it: how fast can this network be fine-tuned?

    Args:
        tuning:
            Network and data.
        target_loss:
            Training ends where the mean of the last five mini-batch losses is at or below this.
        throughput:
            Turns steps into seconds, the same for all trials, so that a busy machine does not
            decide which of them was the fastest.
        seed:
            For the order of the samples.

    Returns:
        Seconds of training to the target, as a function of a trial. A trial that does not get
        there in 30 epochs is pruned.
    """

    def objective(trial: optuna.Trial) -> float:
        learning_rate = trial.suggest_float("learning_rate", 1e-5, 10.0, log=True)
        batch_size = trial.suggest_categorical("batch_size", BATCH_SIZES)
        momentum = trial.suggest_float("momentum", 0.0, 0.99)
        if trial.should_prune():
            raise optuna.TrialPruned
        model = copy.deepcopy(tuning.model)
        generator = torch.Generator().manual_seed(seed + trial.number)
        per_epoch = math.ceil(len(tuning.train[0]) / batch_size)
        losses: list[float] = []
        with TrainingLog(trial) as log:
            for loss in train(
                model,
                tuning.train,
                learning_rate,
                batch_size,
                momentum,
                MAX_EPOCHS * per_epoch,
                generator,
            ):
                losses.append(loss)
                log.step(loss)
                if not math.isfinite(loss):
                    raise optuna.TrialPruned
                if len(losses) >= 5 and sum(losses[-5:]) / 5 <= target_loss:
                    return len(losses) * float(throughput.seconds_per_step(batch_size))
                if len(losses) % per_epoch == 0:
                    trial.report(sum(losses[-per_epoch:]) / per_epoch, len(losses) // per_epoch)
                    if trial.should_prune():
                        raise optuna.TrialPruned
        raise optuna.TrialPruned

    return objective


def search(
    tuning: FineTuning,
    *,
    seconds: float,
    seed: int,
    predictor: TrainingTimePredictor,
    wrapped: bool,
) -> Search:
    """Search with TPE and the median pruner, plain or wrapped by ours.

    Args:
        tuning:
            Network and data.
        seconds:
            The budget, the spectrum's seconds included.
        seed:
            For samplers and training.
        predictor:
            Knows the target, and what to wrap with.
        wrapped:
            Whether sampler and pruner are wrapped by ours.

    Returns:
        The finished search.
    """
    sampler: optuna.samplers.BaseSampler = optuna.samplers.TPESampler(seed=seed)
    pruner: optuna.pruners.BasePruner = optuna.pruners.MedianPruner()
    head_start = 0.0
    if wrapped:
        sampler = TTPSampler(predictor, sampler, seed=seed)
        pruner = TTPPruner(predictor, pruner, max_epochs=MAX_EPOCHS)
        head_start = predictor.spectrum.metadata.compute_seconds
    started = time.perf_counter()
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    assert predictor.throughput is not None
    objective = make_objective(
        tuning,
        target_loss=predictor.target.value,
        throughput=predictor.throughput,
        seed=seed,
    )
    study.optimize(objective, timeout=max(0.0, seconds - head_start))
    return Search(
        "the same, wrapped by optuna_ttp" if wrapped else "TPE + median pruner",
        study,
        head_start,
        head_start + time.perf_counter() - started,
        seconds,
    )


def compare(
    *, seconds: float, seed: int, say: Callable[[str], None]
) -> tuple[Search, Search, TrainingTimePredictor]:
    """Pretrain, compute the spectrum, and search twice under the same budget.

    Args:
        seconds:
            The budget of each search.
        seed:
            For everything.
        say:
            Gets a line for every stage.

    Returns:
        The plain search, the wrapped one, and the predictor.
    """
    started = time.perf_counter()
    tuning = pretrain(seed)
    say(
        f"Pretrained on the digits 0 to 4 in {time.perf_counter() - started:.1f} s; now "
        f"fine-tuning to 5 to 9 with {len(tuning.train[0])} images."
    )
    task = FineTuningTask(tuning.model, tuning.train, name="digits 5 to 9")
    spectrum = _spectrum_twice(task, say)
    predictor = TrainingTimePredictor(spectrum, target_fraction=TARGET_FRACTION)
    say(
        f"Target: a training loss of {predictor.target.value:.3f}, {TARGET_FRACTION:.0%} of the "
        f"initial one, within {MAX_EPOCHS} epochs."
    )
    for configuration in ((0.003, 32, 0.9), (0.03, 32, 0.0), (1e-5, 32, 0.9), (3.0, 32, 0.9)):
        rate, size, momentum = configuration
        say(
            f"  learning rate {rate:g}, batch size {size}, momentum {momentum:g}: "
            f"{predictor.predict(*configuration)}"
        )
    plain = search(tuning, seconds=seconds, seed=seed, predictor=predictor, wrapped=False)
    say(_line(plain))
    wrapped = search(tuning, seconds=seconds, seed=seed, predictor=predictor, wrapped=True)
    say(_line(wrapped))
    return plain, wrapped, predictor


def run(*, seconds: float, seed: int, picture: Path | None) -> None:
    """Run the demo and print what happened.

    Args:
        seconds:
            The budget of each search.
        seed:
            For everything.
        picture:
            Where to draw, or :obj:`None`.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # The network is too small for more threads to help, and threads suffer from busy cores.
    torch.set_num_threads(1)
    plain, wrapped, predictor = compare(
        seconds=seconds, seed=seed, say=lambda line: print(line, flush=True)
    )
    ledger = report(wrapped.study)
    print("\nPredicted and real steps to the target, of the trained trials:")
    _print_predictions(wrapped.study, predictor)
    print("\nSkipped before the first step:")
    _print_skipped(ledger)
    print()
    print(str(ledger).splitlines()[-2])
    print(str(ledger).splitlines()[-1])
    _print_verdict(plain, wrapped)
    if picture is not None:
        _draw(plain, wrapped, predictor, picture)
        print(f"Picture: {picture}")


def _spectrum_twice(task: FineTuningTask, say: Callable[[str], None]) -> Spectrum:
    with tempfile.TemporaryDirectory() as folder:
        store = SpectrumStore(f"sqlite:///{Path(folder) / 'ttp.db'}")
        for attempt in ("Computed", "Asked again, read from the store"):
            started = time.perf_counter()
            spectrum = store.get_or_compute(task, explained_trace=_EXPLAINED_TRACE)
            say(f"{attempt}: {spectrum!r} in {time.perf_counter() - started:.2f} s.")
    return spectrum


def _line(search: Search) -> str:
    value, at = search.best
    return (
        f"{search.name}: fastest fine-tuning {value:.3f} s, found after {at:.1f} s; "
        f"{len(search.study.trials)} trials, {search.n_trained} trained, {search.n_reached} to "
        f"the target; {search.wasted_seconds:.1f} of {search.seconds:.1f} s went into the others."
    )


def _print_predictions(study: optuna.Study, predictor: TrainingTimePredictor) -> None:
    rows = []
    for record in report(study).records:
        observed = observed_steps(study.trials[record.number], predictor)
        if record.decision != SKIP and math.isfinite(observed):
            rows.append((record, observed))
    print(f"{'trial':>7} {'rate':>9} {'batch':>6} {'momentum':>9} {'predicted':>10} {'real':>6}")
    for record, observed in rows[:15]:
        rate, size, momentum = (
            record.params[n] for n in ("learning_rate", "batch_size", "momentum")
        )
        steps = (
            f"{record.predicted_steps:.0f}" if math.isfinite(record.predicted_steps) else "never"
        )
        print(
            f"{record.number:>7} {rate:>9.2g} {size:>6} {momentum:>9.2f} {steps:>10} "
            f"{observed:>6.0f}"
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
            f"Typical error: a factor {typical:.2f} (median of {len(ratios)} trials); 90 % of "
            f"them within {most:.2f}."
        )


def _print_skipped(ledger: Report) -> None:
    skipped = [record for record in ledger.records if record.decision == SKIP]
    for record in skipped[:8]:
        print(f"  trial {record.number}: {record.reason}")
    if len(skipped) > 8:
        print(f"  ... and {len(skipped) - 8} more")
    if not skipped:
        print("  nothing")


def _print_verdict(plain: Search, wrapped: Search) -> None:
    goal, at = plain.best
    reached = wrapped.seconds_to(goal)
    if math.isfinite(reached):
        print(
            f"The plain search took {at:.1f} s to find its best, {goal:.3f} s; the wrapped one "
            f"had that or better after {reached:.1f} s (spectrum included)."
        )
    else:
        print(f"The wrapped search did not find the best of the plain one, {goal:.3f} s.")


def _draw(plain: Search, wrapped: Search, predictor: TrainingTimePredictor, picture: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "The demo's picture needs Matplotlib: pip install 'optuna_ttp[demo]', or pass "
            "--no-picture."
        ) from error
    from optuna_ttp.visualization.matplotlib import label_plainly
    from optuna_ttp.visualization.matplotlib import plot_decisions
    from optuna_ttp.visualization.matplotlib import plot_predicted_vs_observed
    from optuna_ttp.visualization.matplotlib import plot_value_over_time

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    plot_predicted_vs_observed(wrapped.study, predictor, ax=axes[0])
    plot_decisions(wrapped.study, ax=axes[1])
    plot_value_over_time(
        {s.name: s.study for s in (plain, wrapped)},
        head_start={s.name: s.head_start for s in (plain, wrapped)},
        end=plain.budget,
        ax=axes[2],
    )
    axes[2].set_ylabel("Fastest fine-tuning found (s)")
    axes[2].set_yscale("log")
    label_plainly(axes[2].yaxis)
    figure.savefig(picture, dpi=110)


def _digits(classes: range, generator: torch.Generator) -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The demo needs scikit-learn and matplotlib: pip install 'optuna_ttp[demo]'."
        ) from error
    pixels, digits = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16.0
    labels = torch.as_tensor(digits) - classes.start
    chosen = torch.nonzero((labels >= 0) & (labels < len(classes))).flatten()
    chosen = chosen[torch.randperm(len(chosen), generator=generator)]
    return images[chosen], labels[chosen]


def train(
    model: torch.nn.Module,
    data: Data,
    learning_rate: float,
    batch_size: int,
    momentum: float,
    steps: int,
    generator: torch.Generator,
) -> Iterator[float]:
    """Train, yielding the mini-batch loss of each step."""
    images, labels = data
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum)
    model.train()
    step = 0
    while True:
        order = torch.randperm(len(images), generator=generator)
        for batch in order.split(batch_size):
            if step == steps:
                return
            loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            yield loss.item()
