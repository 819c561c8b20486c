"""What is written on trials: every record comes back, and nothing foreign can do harm."""

from __future__ import annotations

import copy
from dataclasses import replace
import json
import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import optuna
from optuna.trial import create_trial
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest

from optuna_ttp import BestMetric
from optuna_ttp import report
from optuna_ttp import TTPPruner
from optuna_ttp import TTPSampler
from optuna_ttp.calibration import DEPTHS
from optuna_ttp.calibration import KNOTS
from optuna_ttp.prediction import Outcome
from optuna_ttp.study import Action
from optuna_ttp.study import curve_of
from optuna_ttp.study import CurveRecord
from optuna_ttp.study import decision_of
from optuna_ttp.study import DecisionRecord
from optuna_ttp.study import FirstPassageRecord
from optuna_ttp.study import lost_steps
from optuna_ttp.study import Objection
from optuna_ttp.study import observed_curve
from optuna_ttp.study import Override
from optuna_ttp.study import paid_seconds
from optuna_ttp.study import prediction_of
from optuna_ttp.study import PredictionRecord
from optuna_ttp.study import record_of
from optuna_ttp.study import TrialRecord
from optuna_ttp.study._curve_record import ReportedCurveRecord
from optuna_ttp.study._curve_record import stored_curve
from tests.fixtures import study_of_version_0_1_0
from tests.studies import objective
from tests.studies import quick_predictor
from tests.studies import SPACE


RECORDS = (TrialRecord, PredictionRecord, DecisionRecord, CurveRecord, ReportedCurveRecord)
_GOAL = BestMetric(max_steps=40)
_TRIALS = study_of_version_0_1_0(None).trials

_unknown_or_finite = st.one_of(st.just(math.nan), st.floats(-1e3, 1e3))
_positive = st.floats(1e-6, 1e6)


def _numbers(n: int, elements: st.SearchStrategy[float]) -> st.SearchStrategy[tuple[float, ...]]:
    return st.tuples(*[elements] * n)


_logarithms = st.one_of(st.just(math.nan), st.floats(-50.0, 50.0))
_first_passages = st.builds(
    FirstPassageRecord,
    predicted=_numbers(len(DEPTHS), _logarithms),
    expected=_numbers(len(DEPTHS), _logarithms),
    growth=_numbers(len(KNOTS), st.floats(-10.0, 10.0)),
    covariates=_numbers(2, st.floats(-1e4, 1e4)),
    instability=_numbers(len(DEPTHS), st.floats(0.0, 1e4)),
)
_predictions = st.builds(
    PredictionRecord,
    fingerprint=st.text(),
    spectrum_seconds=_positive,
    initial_loss=_positive,
    initial_loss_sd=_positive,
    target=_positive,
    learning_rate=_positive,
    batch_size=st.integers(1, 10**6),
    momentum=st.floats(0.0, 1.0, exclude_max=True),
    outcome=st.sampled_from(Outcome),
    steps=_unknown_or_finite,
    seconds=_unknown_or_finite,
    stability=_unknown_or_finite,
    budget_steps=_unknown_or_finite,
    budget_seconds=_unknown_or_finite,
    max_steps=_unknown_or_finite,
    prediction_seconds=_positive,
    first_passages=st.one_of(st.none(), _first_passages),
)
_decisions = st.one_of(
    st.builds(
        DecisionRecord,
        action=st.sampled_from([Action.RUN, Action.SKIP]),
        reason=st.text(),
        objection=st.one_of(st.none(), st.sampled_from(Objection)),
        override=st.one_of(st.none(), st.sampled_from(Override)),
        is_predicted=st.booleans(),
    ),
    st.builds(
        DecisionRecord,
        action=st.just(Action.STOP),
        reason=st.text(),
        objection=st.sampled_from(Objection),
        override=st.one_of(st.none(), st.sampled_from(Override)),
        seconds_left=st.one_of(st.just(math.nan), _positive),
        log_sd=st.floats(0.0, 10.0),
    ),
)
_trial_records = st.builds(
    TrialRecord,
    number=st.integers(0, 10**6),
    prediction=st.one_of(st.none(), _predictions),
    decision=st.one_of(st.none(), _decisions),
)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4)
    ),
    max_leaves=8,
)


def _stored(record: Any) -> Any:
    """What a storage gives back of a record."""
    return json.loads(json.dumps(record.to_json(), allow_nan=False))


@given(_trial_records)
def test_a_record_comes_back_as_it_was(record: TrialRecord) -> None:
    # NaN is equal to itself where it is the same object.
    assert repr(TrialRecord.from_json(_stored(record))) == repr(record)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40), st.integers(1, 50))
def test_a_curve_comes_back_as_it_was(losses: list[float], spacing: int) -> None:
    record = CurveRecord.of(losses, spacing * np.arange(len(losses)), 0.25)
    again = CurveRecord.from_json(_stored(record))
    assert again is not None
    assert again.to_json() == record.to_json()
    assert again.seconds_per_step == 0.25


@given(_json)
def test_reading_random_json_never_fails(values: Any) -> None:
    for record in RECORDS:
        assert record.from_json(values) is None or record is TrialRecord
    if isinstance(values, dict):
        stored_curve(values)


def _paths(values: Any, begin: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values in a nested structure, of lists only the first and the last."""
    paths = [begin] if begin else []
    if isinstance(values, dict):
        places: list[Any] = list(values)
    else:
        places = [0, -1] if isinstance(values, list) and values else []
    for place in places:
        paths += _paths(values[place], (*begin, place))
    return paths


def _changed(values: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with one value replaced, or left out where the new one is KeyError."""
    changed = copy.deepcopy(values)
    inner = changed
    for place in path[:-1]:
        inner = inner[place]
    if new is KeyError:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return changed


_WORSE: list[Any] = [-1, 0, 1e308, 10**400, [[1]], [], {}, [None] * 40]
_FOREIGN: list[Any] = [KeyError, None, "text", True, *_WORSE]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("new", _FOREIGN, ids=repr)
def test_no_damaged_attribute_stops_the_report(new: Any) -> None:
    """Each value of what a study of version 0.1.0 wrote is damaged, one at a time."""
    trial = _TRIALS[0]
    study = study_of_version_0_1_0(None)
    damaged: list[FrozenTrial] = []
    for path in _paths(trial.user_attrs):
        attributes = _changed(trial.user_attrs, path, new)
        number = len(study.trials) + len(damaged)
        for value in attributes.values():
            if isinstance(value, dict) and path[-1] != "trial":
                value["trial"] = number
        damaged.append(_finished(trial, attributes))
    study.add_trials(damaged)
    assert str(report(study))


def _finished(trial: FrozenTrial, attributes: dict[str, Any]) -> FrozenTrial:
    return create_trial(
        state=trial.state,
        values=trial.values,
        params=trial.params,
        distributions=SPACE,
        user_attrs=attributes,
    )


@pytest.mark.filterwarnings("ignore::optuna_ttp.UnusableCurveWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("new", [KeyError, None, "text", [[1]], 1e308], ids=repr)
def test_no_damaged_attribute_stops_a_search(new: Any) -> None:
    predictor = quick_predictor()
    sampler = TTPSampler(predictor, _GOAL, search_space=SPACE, seed=0)
    study = optuna.create_study(sampler=sampler, pruner=TTPPruner(predictor, _GOAL))
    trial = _TRIALS[0]
    for number, path in enumerate(_paths(trial.user_attrs)):
        attributes = _changed(trial.user_attrs, path, new)
        for value in attributes.values():
            if isinstance(value, dict) and path[-1] != "trial":
                value["trial"] = number
        study.add_trial(_finished(trial, attributes))
    study.optimize(objective, n_trials=2)
    assert str(report(study))


@pytest.mark.parametrize(
    ("path", "new"),
    [
        (("prediction", "ladder", "growth"), None),
        (("prediction", "ladder", "expected"), KeyError),
        (("prediction", "ladder", "predicted"), [1.0]),
        (("prediction", "ladder", "instability", 0), None),
        (("prediction", "ladder", "instability", 0), 1e308),
        (("prediction", "momentum"), [[1]]),
        (("prediction", "momentum"), 1.0),
        (("prediction", "learning_rate"), -0.1),
        (("prediction", "batch_size"), 2.5),
        (("prediction", "outcome"), "explodes"),
        (("prediction", "initial_loss"), 0.0),
    ],
)
def test_a_malformed_prediction_is_none_and_the_decision_stays(
    path: tuple[str | int, ...], new: Any
) -> None:
    record = TrialRecord.from_json(_changed(_TRIALS[0].user_attrs["ttp:record"], path, new))
    assert record is not None
    assert record.prediction is None
    assert record.decision is not None and record.decision.action == Action.RUN


@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("errors", None),
        ("steps", [3.0, 2.0]),
        ("losses", [1.0]),
        ("n_steps", -1),
        ("diverged", KeyError),
        ("first", None),
    ],
)
def test_a_malformed_curve_is_none(name: str, new: Any) -> None:
    values = _TRIALS[0].user_attrs["ttp:curve"]
    assert CurveRecord.from_json(values) is not None
    assert CurveRecord.from_json(_changed(values, (name,), new)) is None


def test_a_curve_without_a_number_of_gaps_has_none() -> None:
    values = _changed(_TRIALS[0].user_attrs["ttp:curve"], ("n_gaps",), KeyError)
    record = CurveRecord.from_json(values)
    assert record is not None and record.curve.n_gaps == 0


@pytest.mark.parametrize("paid", [None, "4", -1.0, math.nan, [3.0]])
def test_a_foreign_price_is_that_of_the_clock(paid: Any) -> None:
    study = optuna.create_study()
    trial = study.ask()
    trial.set_user_attr("ttp:paid", {"trial": 0, "seconds": paid})
    study.tell(trial, 0.0)
    [ended] = study.trials
    assert ended.duration is not None
    assert paid_seconds(ended) == ended.duration.total_seconds()


def test_words_are_printed_as_they_are_stored() -> None:
    assert f"{Action.SKIP} {Objection.STUDY_BUDGET:>13} {Outcome.NOT_REACHED!s}" == (
        "skip  study_budget not_reached"
    )
    assert json.dumps(Override.AUDIT) == '"audit"'


# A study of version 0.1.0


def test_records_of_version_0_1_0_are_read_and_written_as_they_were() -> None:
    predictions = [prediction for prediction in map(prediction_of, _TRIALS) if prediction]
    assert [prediction.outcome.value for prediction in predictions] == [
        *["converges"] * 2,
        "diverges",
        "not_reached",
        *["converges"] * 7,
        "not_reached",
    ]
    decisions = [decision for decision in map(decision_of, _TRIALS) if decision]
    assert [d.action.value for d in decisions] == [
        "run",
        "stop",
        "skip",
        "skip",
        "run",
        "stop",
        "stop",
        *["run"] * 4,
        "skip",
    ]
    for trial in _TRIALS:
        record, attributes = record_of(trial), trial.user_attrs
        assert record is not None and prediction_of(trial) == record.prediction
        assert record.to_json() == attributes["ttp:record"]
        curve = stored_curve(attributes.get("ttp:curve"))
        if curve is not None:
            assert {"trial": trial.number, **curve.to_json()} == attributes["ttp:curve"]


def test_curves_of_version_0_1_0_are_read() -> None:
    lengths = [len(curve.steps) if (curve := observed_curve(t)) else 0 for t in _TRIALS]
    assert [bool(n) for n in lengths] == [True] * 2 + [False] * 2 + [True] * 7 + [False]
    assert lost_steps(_TRIALS[5]) == 3
    # It was reported, and not logged.
    assert isinstance(stored_curve(_TRIALS[4].user_attrs["ttp:curve"]), ReportedCurveRecord)
    assert isinstance(curve_of(_TRIALS[4]), CurveRecord)


def test_a_study_of_version_0_1_0_has_its_report() -> None:
    ledger = report(study_of_version_0_1_0(None))
    assert (ledger.n_skipped, ledger.n_stopped) == (3, 3)
    assert ledger.skipped_by_kind == {"budget": 2, "chance": 3, "diverges": 1}
    assert ledger.calibration.n_observed == 7
    assert ledger.calibration.rank_agreement == pytest.approx(0.67, abs=0.01)
    assert list(ledger.unusable) == [8]
    assert "looks like" in ledger.unusable[8] or "3 times" in ledger.unusable[8]


@pytest.mark.filterwarnings("ignore::optuna_ttp.UnusableCurveWarning")
def test_a_study_of_version_0_1_0_goes_on_as_a_search() -> None:
    predictor = quick_predictor()
    sampler = TTPSampler(predictor, _GOAL, search_space=SPACE, seed=0)
    study = study_of_version_0_1_0(sampler, TTPPruner(predictor, _GOAL))
    study.optimize(objective, n_trials=3)
    new = study.trials[len(_TRIALS) :]
    assert all(record_of(trial) is not None for trial in new)
    assert {trial.state for trial in new} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert report(study).calibration.n_observed >= 7


def test_replacing_a_field_leaves_the_record_as_it_was() -> None:
    record = record_of(_TRIALS[1])
    assert record is not None and record.decision is not None
    other = replace(record.decision, action=Action.RUN)
    assert other.to_json() == {
        name: value
        for name, value in (record.decision.to_json() | {"decision": "run"}).items()
        if name not in ("log_sd", "seconds_left")
    }


def test_a_decision_of_version_0_1_0_does_not_say_that_it_lacks_a_prediction() -> None:
    reason = "no prediction: the hyperparameter map does not apply to this trial"
    record = DecisionRecord.from_json({"decision": "run", "reason": reason})
    assert record == DecisionRecord(Action.RUN, reason, is_predicted=True)
    stored = DecisionRecord(Action.RUN, reason, is_predicted=False).to_json()
    assert stored == {"decision": "run", "reason": reason, "predicted": False}
