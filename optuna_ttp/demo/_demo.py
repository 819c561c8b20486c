"""Both searches of the demo, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
import tempfile
import time

import optuna
import torch

from optuna_ttp.demo._objective import make_objective
from optuna_ttp.demo._objective import MAX_EPOCHS
from optuna_ttp.demo._output import draw
from optuna_ttp.demo._output import one_line
from optuna_ttp.demo._output import print_outcome
from optuna_ttp.demo._search import Search
from optuna_ttp.demo._training import FineTuning
from optuna_ttp.demo._training import pretrain
from optuna_ttp.prediction import TrainingTimePredictor
from optuna_ttp.search import FastestToTarget
from optuna_ttp.search import TTPPruner
from optuna_ttp.search import TTPSampler
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.store import SpectrumStore
from optuna_ttp.task import FineTuningTask


TARGET_FRACTION = 0.1
_EXPLAINED_TRACE = 0.99


def run(*, seconds: float, seed: int, picture: Path | None) -> None:
    """Run both searches for ``seconds`` each, print their results, and draw them into a file.

    ``picture`` is that file, or None for no picture. This sets Optuna's verbosity and PyTorch's
    number of threads.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # The network is too small for more threads to help, and busy cores slow threads down.
    torch.set_num_threads(1)
    plain, wrapped, predictor = compare(
        seconds=seconds, seed=seed, say=lambda line: print(line, flush=True)
    )
    print_outcome(plain, wrapped, predictor)
    if picture is not None:
        draw(plain, wrapped, predictor, picture)
        print(f"The picture is in {picture}.")


def compare(
    *, seconds: float, seed: int, say: Callable[[str], None]
) -> tuple[Search, Search, TrainingTimePredictor]:
    """Pretrain, compute the spectrum, and search twice, each time for ``seconds``.

    Return the plain search, the wrapped search and the predictor. ``say`` is called with a line of
    text at every stage.
    """
    started = time.perf_counter()
    tuning = pretrain(seed)
    say(
        f"The network was pretrained on the digits 0 to 4 in {time.perf_counter() - started:.1f} "
        f"s; it is fine-tuned to the digits 5 to 9 with {len(tuning.train[0])} images."
    )
    task = FineTuningTask(tuning.model, tuning.train, name="digits 5 to 9")
    spectrum = _spectrum_twice(task, say)
    predictor = TrainingTimePredictor(spectrum, target_fraction=TARGET_FRACTION)
    say(
        f"The target is a training loss of {predictor.target.value:.3f}, {TARGET_FRACTION:.0%} of "
        f"the initial one, within {MAX_EPOCHS} epochs. Predictions for four configurations:"
    )
    for configuration in ((0.003, 32, 0.9), (0.03, 32, 0.0), (1e-5, 32, 0.9), (3.0, 32, 0.9)):
        learning_rate, batch_size, momentum = configuration
        say(
            f"  learning rate {learning_rate:g}, batch size {batch_size}, momentum {momentum:g}: "
            f"{predictor.predict(*configuration)}"
        )
    plain = search(tuning, seconds=seconds, seed=seed, predictor=predictor, wrapped=False)
    say(one_line(plain))
    wrapped = search(tuning, seconds=seconds, seed=seed, predictor=predictor, wrapped=True)
    say(one_line(wrapped))
    return plain, wrapped, predictor


def _spectrum_twice(task: FineTuningTask, say: Callable[[str], None]) -> Spectrum:
    """Return the spectrum from a new store; get it twice and report the seconds of each time."""
    with tempfile.TemporaryDirectory() as folder:
        store = SpectrumStore(f"sqlite:///{Path(folder) / 'ttp.db'}")
        for how in ("The spectrum was computed", "The second time it was read from the store"):
            started = time.perf_counter()
            spectrum = store.get_or_compute(task, explained_trace=_EXPLAINED_TRACE)
            say(f"{how} in {time.perf_counter() - started:.2f} s: {spectrum!r}.")
    return spectrum


def search(
    tuning: FineTuning,
    *,
    seconds: float,
    seed: int,
    predictor: TrainingTimePredictor,
    wrapped: bool,
) -> Search:
    """Search with TPE and the median pruner, inside TTPSampler and TTPPruner if ``wrapped``.

    The budget ``seconds`` then includes the seconds of the spectrum. ``seed`` determines the
    samplers and the training.
    """
    sampler: optuna.samplers.BaseSampler = optuna.samplers.TPESampler(seed=seed)
    pruner: optuna.pruners.BasePruner = optuna.pruners.MedianPruner()
    head_start = 0.0
    if wrapped:
        goal = FastestToTarget(max_epochs=MAX_EPOCHS)
        sampler = TTPSampler(predictor, goal, sampler, seed=seed)
        pruner = TTPPruner(predictor, goal, pruner)
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
