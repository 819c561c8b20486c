"""Search spaces, objectives and trials that the tests of the Optuna side share."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextlib import contextmanager
from contextlib import nullcontext
from dataclasses import fields
import fcntl
from functools import cache
from functools import partial
import math
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.samplers import GPSampler
from optuna.samplers import NSGAIISampler
from optuna.samplers import QMCSampler
from optuna.samplers import RandomSampler
from optuna.samplers import TPESampler
from optuna.storages import BaseStorage
from optuna.testing.storages import StorageSupplier
from optuna.trial import TrialState

from optuna_ttp import BestMetric
from optuna_ttp import FastestToTarget
from optuna_ttp import PrunerRules
from optuna_ttp import SamplerRules
from optuna_ttp import TrainingLog
from optuna_ttp import TrainingTimePredictor
from optuna_ttp import TTPPruner
from optuna_ttp import TTPSampler
from optuna_ttp.search import Goal
from optuna_ttp.study import decision_of
from optuna_ttp.study._learner import informed_by
from tests.models import small_spectrum


if TYPE_CHECKING:
    from optuna._gp.acqf import BaseAcquisitionFunc


# The predicted times run from one step to far beyond the horizon, and the largest learning rates
# diverge.
SPACE: dict[str, BaseDistribution] = {
    "learning_rate": FloatDistribution(1e-5, 100.0, log=True),
    "batch_size": IntDistribution(1, 24),
    "momentum": FloatDistribution(0.0, 0.95),
}
FAST = {"learning_rate": 0.1, "batch_size": 8, "momentum": 0.0}  # about 12 steps
SLOW = {"learning_rate": 0.03, "batch_size": 8, "momentum": 0.0}  # about 40 steps
HOPELESS = {"learning_rate": 1e-5, "batch_size": 8, "momentum": 0.0}
DIVERGING = {"learning_rate": 50.0, "batch_size": 8, "momentum": 0.0}
STORAGES = [
    "inmemory",
    "sqlite",
    "cached_sqlite",
    "journal",
    "grpc_rdb",
    "grpc_journal_file",
]


class QuickGPSampler(GPSampler):
    """Takes the best of a few points instead of climbing to the top of the acquisition function.

    The climb takes nine tenths of the time, and nothing here depends on how high it gets.
    """

    def _optimize_acqf(
        self, acqf: BaseAcquisitionFunc, best_params: np.ndarray | None
    ) -> np.ndarray:
        points = acqf.search_space.sample_normalized_params(8, rng=self._rng.rng)
        return np.asarray(points[np.argmax(acqf.eval_acqf_no_grad(points))])


@cache
def quick_predictor() -> TrainingTimePredictor:
    """A predictor with a short horizon, so that no prediction takes more than milliseconds."""
    return TrainingTimePredictor(small_spectrum(), target_fraction=0.5, max_steps=60)


@contextmanager
def storage(kind: str) -> Iterator[BaseStorage]:
    """A fresh storage; the gRPC kinds come with a server on a free port of the loopback."""
    with StorageSupplier(kind) as supplied:
        yield supplied


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    """Suggest the three hyperparameters, in an order that is not that of their names."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 100.0, log=True),
        "batch_size": trial.suggest_int("batch_size", 1, 24),
        "momentum": trial.suggest_float("momentum", 0.0, 0.95),
    }


def predicted_steps(params: dict[str, Any]) -> float:
    """The prediction for a trial's parameters."""
    return float(quick_predictor().estimate(**{n: params[n] for n in SPACE}).steps)


def predicted_seconds(proposed: list[dict[str, Any]]) -> NDArray[np.float64]:
    """The same in seconds, for many trials; 1,000 where the target is out of reach."""
    rates, sizes, momenta = (
        [p[n] for p in proposed] for n in ("learning_rate", "batch_size", "momentum")
    )
    seconds = quick_predictor().score(rates, sizes, momenta)
    return np.where(np.isfinite(seconds), seconds, 1e3)


_LIMITS = ("max_steps", "max_epochs", "max_seconds", "study_budget")


def make_sampler(
    base: BaseSampler | None = None, *, goal: type[Goal] = FastestToTarget, **arguments: Any
) -> TTPSampler:
    """A sampler with the quick predictor; limits of its goal, rules and arguments by name."""
    limits = _taken(arguments, _LIMITS)
    rules = SamplerRules(**_taken(arguments, [f.name for f in fields(SamplerRules)]))
    return TTPSampler(quick_predictor(), goal(**limits), base, rules=rules, **arguments)


def make_pruner(
    wrapped_pruner: BasePruner | None = None, *, goal: type[Goal] = BestMetric, **arguments: Any
) -> TTPPruner:
    """A pruner with the quick predictor; limits of its goal, rules and arguments by name."""
    limits = _taken(arguments, _LIMITS)
    rules = PrunerRules(**_taken(arguments, [f.name for f in fields(PrunerRules)]))
    return TTPPruner(quick_predictor(), goal(**limits), wrapped_pruner, rules=rules, **arguments)


def _taken(arguments: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: arguments.pop(name) for name in names if name in arguments}


def losses(steps_to_target: float, n_steps: int) -> NDArray[np.float64]:
    """An exponential curve from the initial loss that is at the target after so many steps."""
    predictor = quick_predictor()
    share = predictor.target.value / predictor.initial_loss
    return np.asarray(predictor.initial_loss * share ** (np.arange(n_steps) / steps_to_target))


def objective(trial: optuna.Trial) -> float:
    """Train a little, on an exponential curve; report; stop when told to."""
    steps = predicted_steps(suggest(trial))
    if trial.should_prune():
        raise optuna.TrialPruned
    loss = math.nan
    # Without times: the same seed gives the same trials.
    with TrainingLog(trial, measure_speed=False) as log:
        for step, loss in enumerate(losses(min(steps, 1e4), 6)):
            log.step(loss)
            trial.report(loss, step)
            if trial.should_prune():
                raise optuna.TrialPruned
    return float(loss)


def asked(study: optuna.Study, params: dict[str, Any]) -> optuna.Trial:
    """A running trial with these hyperparameters."""
    study.enqueue_trial(params)
    return study.ask(SPACE)


def add_observed(
    study: optuna.Study,
    observed: Callable[[float], float],
    rates: tuple[float, ...] = (0.05, 0.07, 0.1, 0.15, 0.22, 0.3),
    predictor: TrainingTimePredictor | None = None,
    asking: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Run trials whose curves reach the target after so many steps as the function says.

    Args:
        study: The study, whose sampler or pruner writes down what was predicted.
        observed: From predicted to observed steps.
        rates: The trials' learning rates.
        predictor: What predicts, where it is not `quick_predictor`.
        asking: Held while a trial is asked for.
    """
    for rate in rates:
        with asking():
            trial = asked(study, {**FAST, "learning_rate": rate})
        if isinstance(study.pruner, TTPPruner):
            assert not trial.should_prune()
        prediction = (predictor or quick_predictor()).predict(rate, 8, 0.0)
        steps = observed(float(prediction.steps))
        with TrainingLog(trial) as log:
            for loss in losses(steps, math.ceil(1.5 * steps) + 2):
                log.step(loss)
        study.tell(trial, rate)


def work(storage_url: str, study_name: str, seed: int, n_trials: int) -> None:
    """What one of several worker processes does."""
    study = optuna.load_study(
        study_name=study_name,
        storage=storage_url,
        sampler=make_sampler(goal=BestMetric, max_steps=500, n_candidates=3, seed=seed),
        pruner=TTPPruner(quick_predictor()),
    )
    study.optimize(objective, n_trials=n_trials)


@contextmanager
def _one_process(storage_url: str) -> Iterator[None]:
    """Let one process in at a time: on SQLite, Optuna may give two the same enqueued trial."""
    with open(storage_url.removeprefix("sqlite:///") + ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def observe_and_predict(storage_url: str, rates: tuple[float, ...]) -> tuple[int, list[float]]:
    """What one of several processes learns: the number of trials behind it, and predictions."""
    predictor = quick_predictor()
    study = optuna.load_study(
        study_name="shared",
        storage=storage_url,
        sampler=TTPSampler(predictor, BestMetric(), seed=0),
        pruner=TTPPruner(predictor),
    )
    asking = partial(_one_process, storage_url)
    add_observed(study, lambda steps: 2.0 * steps, rates, asking=asking)
    calibration = informed_by(study, predictor).calibration
    prediction = predictor.calibrated(calibration).predict([0.05, 0.1], 8, 0.0)
    return calibration.n_observed, prediction.steps.tolist()


def proposals(sampler: optuna.samplers.BaseSampler, n_trials: int) -> list[dict[str, Any]]:
    """The parameters of a study's first trials."""
    study = optuna.create_study(sampler=sampler)
    # What is good has nothing to do with what is fast.
    study.optimize(lambda trial: abs(suggest(trial)["momentum"] - 0.5), n_trials)
    return [trial.params for trial in study.trials]


def quick_sampler(base: BaseSampler | None = None, **arguments: Any) -> TTPSampler:
    """A sampler with a seed that weighs four candidates."""
    return make_sampler(base, **{"n_candidates": 4, "seed": 0, **arguments})


def quick_tpe(seed: int = 1, **arguments: Any) -> TPESampler:
    """A TPE sampler as it is by default in Optuna 5, also with Optuna 4."""
    options = {"multivariate": True, "constant_liar": True, "n_startup_trials": 5}
    return TPESampler(seed=seed, **{**options, **arguments})


BASES: dict[str, Callable[[], BaseSampler]] = {
    "random": lambda: RandomSampler(seed=1),
    "tpe": quick_tpe,
    "tpe-univariate": lambda: quick_tpe(multivariate=False, constant_liar=False),
    "tpe-group": lambda: quick_tpe(group=True),
    "qmc": lambda: QMCSampler(seed=1, warn_independent_sampling=False),
    "nsgaii": lambda: NSGAIISampler(population_size=5, seed=1),
    "gp": lambda: QuickGPSampler(seed=1, n_startup_trials=8),
}


def mixed_space(trial: optuna.Trial) -> float:
    """An objective whose parameters are neither in the order of their names, nor ours first."""
    params = suggest(trial)
    dropout = trial.suggest_float("a_dropout", 0.0, 0.5, step=0.1)
    layers = trial.suggest_int("layers", 1, 4)
    return float(np.log(params["learning_rate"])) ** 2 + dropout + layers


def params_of(sampler: BaseSampler, objective: Any, n_trials: int) -> list[dict[str, Any]]:
    """The parameters of all trials of a new study."""
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=n_trials)
    return [trial.params for trial in study.trials]


def pruned_study(pruner: BasePruner | None = None, **arguments: Any) -> optuna.Study:
    """A study with a random sampler and a pruner, by default one with these arguments."""
    return optuna.create_study(
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=make_pruner(**arguments) if pruner is None else pruner,
    )


def is_skipped(study: optuna.Study, params: dict[str, Any]) -> bool:
    """Ask about a trial, and let it end as an objective would."""
    trial = asked(study, params)
    skipped = trial.should_prune()
    study.tell(trial, None if skipped else 1.0, TrialState.PRUNED if skipped else None)
    return skipped


def decision_on(study: optuna.Study, number: int = -1) -> tuple[str, str]:
    """The decision about a trial of a study, by default the last one."""
    decision = decision_of(study.trials[number])
    assert decision is not None
    return decision.action, decision.reason
