"""Who is compared: Optuna's samplers and pruners in all pairs, ours, and ours with less."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
import warnings

import numpy as np
from numpy.typing import NDArray
import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import IntDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from benchmarks.search.predictors import recorded_times
from benchmarks.search.predictors import rule_of_thumb
from benchmarks.search.predictors import ShuffledPredictor
from benchmarks.search.table import Table
from optuna_ttp import BestMetric
from optuna_ttp import FastestToTarget
from optuna_ttp import PrunerRules
from optuna_ttp import SamplerRules
from optuna_ttp import TrainingTimePredictor
from optuna_ttp import TTPPruner
from optuna_ttp import TTPSampler
from optuna_ttp.prediction import SearchPredictor


SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "qmc": lambda seed: optuna.samplers.QMCSampler(seed=seed),
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "cmaes": lambda seed: optuna.samplers.CmaEsSampler(seed=seed),
}
PRUNERS: dict[str, Callable[[int], BasePruner]] = {
    "none": lambda n_epochs: optuna.pruners.NopPruner(),
    "median": lambda n_epochs: optuna.pruners.MedianPruner(),
    "percentile": lambda n_epochs: optuna.pruners.PercentilePruner(25.0),
    "halving": lambda n_epochs: optuna.pruners.SuccessiveHalvingPruner(),
    "hyperband": lambda n_epochs: optuna.pruners.HyperbandPruner(max_resource=n_epochs),
    "patient": lambda n_epochs: optuna.pruners.PatientPruner(
        optuna.pruners.MedianPruner(), patience=2
    ),
}
STANDARD = tuple(f"{sampler} + {pruner}" for sampler in SAMPLERS for pruner in PRUNERS)
COST = "ei per cost"
OURS = ("ours (tpe)", "ours (gp)")
SHUFFLED = ("ours (tpe), shuffled", "ours (gp), shuffled")
RULE = "ours (tpe), c / lr"
KNOWN = "ours (tpe), recorded times"
_VARIANTS = ("", ", shuffled", ", c / lr", ", recorded times")
_N_STARTUP = 10


@dataclass(frozen=True, eq=False)
class Players:
    """Sampler and pruner of one search.

    Attributes:
        sampler:
            The sampler.
        pruner:
            The pruner.
        predicts:
            Whether a spectrum is charged and training losses are logged.
    """

    sampler: BaseSampler
    pruner: BasePruner
    predicts: bool


def players(
    contestant: str, table: Table, seed: int, predictor: Callable[[], TrainingTimePredictor]
) -> Players:
    """Build a contestant anew.

    Args:
        contestant:
            One of :data:`STANDARD`, :data:`OURS`, :data:`SHUFFLED`, :data:`COST`, :data:`RULE`
            and :data:`KNOWN`.
        table:
            What is going to be searched.
        seed:
            Of the sampler.
        predictor:
            Gives our predictor where one is needed.

    Returns:
        Sampler and pruner.
    """
    if contestant == COST:
        return Players(ExpectedImprovementPerCost(seed), optuna.pruners.NopPruner(), False)
    if contestant in STANDARD:
        sampler, pruner = contestant.split(" + ")
        return Players(SAMPLERS[sampler](seed), PRUNERS[pruner](table.n_epochs), False)
    base, _, variant = contestant.removeprefix("ours (").partition(")")
    if not contestant.startswith("ours (") or base not in SAMPLERS or variant not in _VARIANTS:
        raise ValueError(f"There is no contestant {contestant!r}.")
    ours = predictor()
    searching: SearchPredictor = ours
    if variant == ", shuffled":
        searching = ShuffledPredictor.of(ours, table, seed)
    elif variant == ", c / lr":
        searching = rule_of_thumb(ours, table)
    elif variant == ", recorded times":
        searching = recorded_times(ours, table)
    return wrapped(searching, SAMPLERS[base](seed), table, seed)


def wrapped(
    predictor: SearchPredictor,
    base: BaseSampler,
    table: Table,
    seed: int,
    sampler_rules: SamplerRules | None = None,
    pruner_rules: PrunerRules | None = None,
) -> Players:
    """Wrap a sampler by ours, as the README shows it.

    Args:
        predictor:
            What predicts.
        base:
            The sampler.
        table:
            What is going to be searched.
        seed:
            Of our sampler.
        sampler_rules:
            The sampler's tuned numbers, where they are not as they are by default.
        pruner_rules:
            The same of the pruner.

    Returns:
        Our sampler and pruner.
    """
    hyperparameters = table.hyperparameters()
    kind = FastestToTarget if table.goal == "time" else BestMetric
    goal = kind(max_epochs=table.n_epochs)
    sampler = TTPSampler(
        predictor,
        goal,
        base,
        hyperparameters=hyperparameters,
        search_space=table.search_space,
        seed=seed,
        rules=sampler_rules,
    )
    pruner = TTPPruner(
        predictor, goal, hyperparameters=hyperparameters, seed=seed, rules=pruner_rules
    )
    return Players(sampler, pruner, True)


class ExpectedImprovementPerCost(BaseSampler):
    """Expected improvement over the cost that a second Gaussian process learns from the trials.

    "Expected improvement per second" of Snoek, Larochelle and Adams (2012, arXiv 1206.2944,
    section 3.2), over all points of a grid of whole numbers that were not tried.

    Args:
        seed:
            Of the first, random trials.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._independent = optuna.samplers.RandomSampler(seed=seed)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the parameters that all trials have."""
        return optuna.search_space.intersection_search_space(
            study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        )

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the point that promises most improvement a second."""
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        trials = study.get_trials(deepcopy=False, states=states)
        completed = [t for t in trials if t.state == TrialState.COMPLETE]
        if len(completed) < _N_STARTUP or not search_space:
            return {}
        highs = [d.high for d in search_space.values() if isinstance(d, IntDistribution)]
        grid = np.stack([g.ravel() for g in np.indices([high + 1 for high in highs])], axis=1)
        sign = -1.0 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1.0
        losses = np.array([sign * (t.value or 0.0) for t in completed])
        # A trial that was given up is as bad as the worst.
        given_up = [t for t in trials if t.state == TrialState.PRUNED and t.duration]
        points = np.array([[t.params[n] for n in search_space] for t in (*completed, *given_up)])
        losses = np.append(losses, np.full(len(given_up), losses.max()))
        seconds = [t.duration.total_seconds() for t in (*completed, *given_up) if t.duration]
        scale = np.maximum(highs, 1)
        mean, sd = _regressed(points / scale, losses, grid / scale)
        cost, _ = _regressed(points / scale, np.log(np.maximum(seconds, 1e-6)), grid / scale)
        tried = {tuple(t.params[n] for n in search_space) for t in study.trials if t.params}
        fresh = np.array([tuple(p) not in tried for p in grid.tolist()])
        score = np.where(fresh, _expected_improvement(mean, sd, losses.min()), -1.0)
        chosen = grid[int(np.argmax(score / np.exp(cost)))]
        return {name: int(value) for name, value in zip(search_space, chosen, strict=True)}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return a random value."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)


def _regressed(
    points: NDArray[np.float64], values: NDArray[np.float64], wanted: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of a Gaussian process."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel
    from sklearn.gaussian_process.kernels import Matern
    from sklearn.gaussian_process.kernels import WhiteKernel

    kernel = ConstantKernel(1.0) * Matern([0.5] * points.shape[1], nu=2.5) + WhiteKernel(1e-3)
    process = GaussianProcessRegressor(kernel, normalize_y=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        process.fit(points, values)
    mean, sd = process.predict(wanted, return_std=True)
    return np.asarray(mean), np.maximum(np.asarray(sd), 1e-12)


def _expected_improvement(
    mean: NDArray[np.float64], sd: NDArray[np.float64], best: float
) -> NDArray[np.float64]:
    from scipy.stats import norm

    z = (best - mean) / sd
    return np.asarray(sd * (z * norm.cdf(z) + norm.pdf(z)))
