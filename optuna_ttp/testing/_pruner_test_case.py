"""A conformance suite for pruners, in the manner of ``optuna.testing.pytest_samplers``.

Subclass :class:`PrunerTestCase` in a test module and give it a fixture named ``pruner``:

    >>> class TestMyPruner(PrunerTestCase):
    ...     @pytest.fixture(params=[MyPruner, lambda: MyPruner(n_warmup_steps=2)])
    ...     def pruner(self, request):
    ...         return request.param  # called without arguments, it makes a new pruner

Override a test with ``pass`` if a pruner is meant to behave differently. Optuna's own pruners pass
all tests, except :class:`~optuna.pruners.SuccessiveHalvingPruner` with ``min_resource="auto"``,
which uses the resource of the first study in all later ones. The suite needs pytest.
"""

from __future__ import annotations

from collections.abc import Callable
import copy
import math
import pickle
from typing import get_args
from typing import Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import FloatDistribution
from optuna.pruners import BasePruner
from optuna.trial import create_trial
from optuna.trial import TrialState
import pytest


PrunerFactory = Callable[[], BasePruner]
Direction = Literal["minimize", "maximize"]

_DIRECTIONS = pytest.mark.parametrize("direction", ["minimize", "maximize"])
_N_STEPS = 8


class PrunerTestCase:
    """Tests of the behaviour that Optuna and its samplers expect of any pruner.

    Trials report at the steps 0, 1, 2 and so on. Unless a test says otherwise, the finished trials
    of a study have good values.
    """

    @pytest.fixture
    def pruner(self) -> PrunerFactory:
        """Return a function that makes a new pruner. Subclasses override this fixture.

        Raises:
            NotImplementedError:
                If a subclass does not override it.
        """
        raise NotImplementedError("Give a fixture `pruner` that returns a function.")

    @_DIRECTIONS
    def test_the_first_trial_runs(self, pruner: PrunerFactory, direction: Direction) -> None:
        """The first trial is not pruned, because there are no other trials to compare it with."""
        study = _study(pruner(), direction)
        assert _run(study, [1.0 / (step + 1) for step in range(_N_STEPS)]) == _N_STEPS

    def test_nothing_is_reported_yet(self, pruner: PrunerFactory) -> None:
        """A pruner answers with a bool before a trial has reported a value."""
        study = _study(pruner())
        answer = study.ask(_space()).should_prune()
        assert _is_bool(answer)

    def test_the_answer_is_a_bool(self, pruner: PrunerFactory) -> None:
        """The answer is a bool of Python, or of NumPy, as Optuna's own pruners return it."""
        study = _study(pruner(), n_good=6)
        trial = study.ask(_space())
        for step in range(_N_STEPS):
            trial.report(100.0, step)
            assert _is_bool(trial.should_prune())

    @_DIRECTIONS
    def test_the_best_trial_so_far_runs(self, pruner: PrunerFactory, direction: Direction) -> None:
        """A trial that is better at every step than all before is not pruned."""
        study = _study(pruner(), direction, n_good=6)
        better = -10.0 if direction == "minimize" else 10.0
        assert _run(study, [better] * _N_STEPS) == _N_STEPS

    @_DIRECTIONS
    def test_directions_mirror_each_other(
        self, pruner: PrunerFactory, direction: Direction
    ) -> None:
        """A pruner prunes the same trials whether the value or its negative is optimised."""
        lengths = []
        for mirrored in get_args(Direction):
            sign = 1.0 if mirrored == "minimize" else -1.0
            study = _study(pruner(), mirrored)
            of = 1.0 if direction == "minimize" else -1.0
            values = [(7 * k % 5) * of for k in range(10)]
            lengths.append([_run(study, [sign * v] * _N_STEPS) for v in values])
        assert lengths[0] == lengths[1]

    def test_the_same_reports_get_the_same_answer(self, pruner: PrunerFactory) -> None:
        """A trial that asks twice without a new report gets the same answer."""
        study = _study(pruner(), n_good=6)
        trial = study.ask(_space())
        for step in range(_N_STEPS):
            trial.report(50.0, step)
            assert trial.should_prune() == trial.should_prune()

    def test_the_trial_is_not_changed(self, pruner: PrunerFactory) -> None:
        """A pruner changes neither values nor parameters nor reports of a trial."""
        study = _study(pruner(), n_good=4)
        trial = study.ask(_space())
        trial.report(1.0, 0)
        trial.should_prune()
        before = copy.deepcopy(study.trials[-1])
        trial.should_prune()
        after = study.trials[-1]
        for name in ("params", "intermediate_values", "values", "state", "distributions"):
            assert getattr(before, name) == getattr(after, name)
        assert after.state == TrialState.RUNNING

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_reports_that_are_not_finite(self, pruner: PrunerFactory, value: float) -> None:
        """A pruner answers after a report that is NaN or infinite, and after the next one."""
        study = _study(pruner(), n_good=4)
        trial = study.ask(_space())
        for step, report in enumerate([1.0, value, 1.0]):
            trial.report(report, step)
            assert _is_bool(trial.should_prune())
        study.tell(trial, None, TrialState.PRUNED)
        _run(study, [1.0] * 3)

    def test_trials_without_reports(self, pruner: PrunerFactory) -> None:
        """A pruner answers although other trials, in any state, have reported nothing."""
        study = _study(pruner())
        for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL):
            value = 0.5 if state == TrialState.COMPLETE else None
            study.tell(study.ask(_space()), value, state)
        study.ask(_space())
        trial = study.ask(_space())
        trial.report(1.0, 0)
        assert _is_bool(trial.should_prune())

    def test_steps_that_others_do_not_have(self, pruner: PrunerFactory) -> None:
        """The steps of a trial need not be consecutive, nor the same as those of other trials."""
        study = _study(pruner(), n_good=4)
        trial = study.ask(_space())
        for step in (1, 5, 100, 10_000):
            trial.report(1.0, step)
            assert _is_bool(trial.should_prune())

    @pytest.mark.parametrize("n_jobs", [1, 2])
    def test_a_study_goes_to_its_end(self, pruner: PrunerFactory, n_jobs: int) -> None:
        """Every trial of a search is completed or pruned, and at least one is completed."""

        def objective(trial: optuna.Trial) -> float:
            x = trial.suggest_float("x", 0.0, 1.0)
            for step in range(_N_STEPS):
                trial.report(x + 1.0 / (step + 1), step)
                if trial.should_prune():
                    raise optuna.TrialPruned
            return x

        study = _study(pruner())
        study.optimize(objective, n_trials=20, n_jobs=n_jobs)
        states = [trial.state for trial in study.trials]
        assert set(states) <= {TrialState.COMPLETE, TrialState.PRUNED}
        assert TrialState.COMPLETE in states

    def test_it_goes_on_after_being_pickled(self, pruner: PrunerFactory) -> None:
        """A pruner that was pickled gives the same answer, because studies are pickled."""
        study = _study(pruner(), n_good=6)
        trial = study.ask(_space())
        trial.report(50.0, 0)
        expected = trial.should_prune()
        study.pruner = pickle.loads(pickle.dumps(study.pruner))
        assert trial.should_prune() == expected

    @pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
    def test_ask_and_tell_by_number(self, pruner: PrunerFactory) -> None:
        """A trial may be told by its number, as by code that did not ask for it."""
        study = _study(pruner(), n_good=2)
        trial = study.ask(_space())
        trial.report(1.0, 0)
        trial.should_prune()
        study.tell(trial.number, 1.0)
        assert study.trials[-1].state == TrialState.COMPLETE

    def test_one_pruner_serves_several_studies(self, pruner: PrunerFactory) -> None:
        """Two studies that share a pruner do not learn from each other's reports."""
        shared = pruner()
        lengths = [
            [_run(study, [float(7 * k % 5)] * _N_STEPS) for k in range(8)]
            for study in (_study(shared), _study(shared))
        ]
        assert lengths[0] == lengths[1]


def _is_bool(answer: object) -> bool:
    return isinstance(answer, bool | np.bool_)


def _study(pruner: BasePruner, direction: Direction = "minimize", n_good: int = 0) -> optuna.Study:
    study = optuna.create_study(
        direction=direction,
        # Hyperband chooses the bracket of a trial by the study's name.
        study_name="conformance",
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=pruner,
    )
    for k in range(n_good):
        values = dict.fromkeys(range(_N_STEPS), 0.1 * k)
        study.add_trial(
            create_trial(
                value=0.1 * k,
                params={"x": 0.5},
                distributions=_space(),
                intermediate_values=values,
            )
        )
    return study


def _run(study: optuna.Study, reports: list[float]) -> int:
    """Run a trial with these reports, and return the step of its pruning, or their number."""
    trial = study.ask(_space())
    for step, value in enumerate(reports):
        trial.report(value, step)
        if trial.should_prune():
            study.tell(trial, None, TrialState.PRUNED)
            return step
    study.tell(trial, reports[-1])
    return len(reports)


def _space() -> dict[str, BaseDistribution]:
    """Return the search space of every study: one number."""
    return {"x": FloatDistribution(0.0, 1.0)}
