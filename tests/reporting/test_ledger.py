from __future__ import annotations

from datetime import datetime
from datetime import timedelta
import json
import math
import re
from typing import Any

import optuna
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest

from optuna_ttp import BestMetric
from optuna_ttp import FastestToTarget
from optuna_ttp import report
from optuna_ttp import TTPSampler
from optuna_ttp.study import decision_of
from optuna_ttp.study import n_skipped_in_a_row
from optuna_ttp.study import prediction_of
from optuna_ttp.study._attributes import PAID
from optuna_ttp.study._attributes import RECORD
from tests.every_decision import study_with_every_decision
from tests.studies import asked
from tests.studies import DIVERGING
from tests.studies import FAST
from tests.studies import HOPELESS
from tests.studies import make_pruner
from tests.studies import objective
from tests.studies import predicted_steps
from tests.studies import quick_predictor
from tests.studies import SLOW
from tests.studies import SPACE


START = datetime(2026, 1, 1)


def _study(**arguments: Any) -> optuna.Study:
    return optuna.create_study(
        sampler=TTPSampler(quick_predictor(), seed=0), pruner=make_pruner(**arguments)
    )


def _run(study: optuna.Study, *configurations: dict[str, Any]) -> list[FrozenTrial]:
    for params in configurations:
        study.enqueue_trial(params)
    study.optimize(objective, n_trials=len(configurations))
    return study.trials


def _line(
    number: int,
    decision: str | None,
    *,
    paid: float,
    budget: float | None = None,
    steps: float | None = 100.0,
    fingerprint: str = "a",
    value: float | None = None,
) -> FrozenTrial:
    """A finished trial with what our sampler and pruner would have written on it."""
    attributes: dict[str, Any] = {PAID: {"trial": number, "seconds": paid}}
    if decision is not None:
        made = {
            "fingerprint": fingerprint,
            "spectrum_seconds": {"a": 3.0, "b": 4.0}[fingerprint],
            "learning_rate": 0.1,
            "batch_size": 8,
            "momentum": 0.0,
            "outcome": "diverges" if steps is None else "converges",
            "steps": steps,
            "seconds": None if steps is None else 0.1 * steps,
            "budget_seconds": budget,
            "prediction_seconds": 0.5,
        }
        decided = {"decision": decision, "reason": "because"}
        attributes[RECORD] = {"trial": number, "prediction": made, "decision": decided}
    return FrozenTrial(
        number=number,
        trial_id=number,
        state=TrialState.PRUNED if value is None else TrialState.COMPLETE,
        value=value,
        values=None,
        datetime_start=START,
        datetime_complete=START + timedelta(seconds=paid + 1.0),
        params={},
        distributions={},
        user_attrs=attributes,
        system_attrs={},
        intermediate_values={},
    )


def test_every_trial_has_a_prediction_a_decision_and_a_price() -> None:
    study = _study()
    trials = _run(study, FAST, SLOW, DIVERGING, HOPELESS)
    assert [t.state.name for t in trials] == ["COMPLETE", "COMPLETE", "PRUNED", "PRUNED"]
    predictions = [prediction_of(trial) for trial in trials]
    outcomes = [p.outcome for p in predictions if p is not None]
    assert outcomes == ["converges", "converges", "diverges", "not_reached"]
    decisions = [decision_of(trial) for trial in trials]
    assert [d.action for d in decisions if d is not None] == ["run", "run", "skip", "skip"]
    paid = [record.paid_seconds for record in report(study).records]
    assert paid == [t.duration.total_seconds() for t in trials if t.duration is not None]


def test_a_prediction_says_for_what_and_from_what_it_was_made() -> None:
    [trial] = _run(_study(max_steps=40), {**FAST, "momentum": 0.5})
    prediction = prediction_of(trial)
    predictor = quick_predictor()
    expected = predictor.estimate(0.1, 8, 0.5)
    assert prediction is not None
    assert (prediction.learning_rate, prediction.batch_size, prediction.momentum) == (
        (0.1, 8, 0.5)
    )
    assert prediction.fingerprint == predictor.spectrum.metadata.fingerprint
    assert prediction.target == predictor.target.value
    assert prediction.steps == float(expected.steps)
    assert prediction.seconds == pytest.approx(float(expected.seconds))
    per_step = float(predictor.seconds_per_step(8))
    assert prediction.budget_seconds == pytest.approx(40 * per_step)
    assert prediction.prediction_seconds > 0


def test_all_attributes_are_strict_json() -> None:
    study = _study()
    trials = _run(study, FAST, DIVERGING, HOPELESS)
    for trial in trials:
        assert [key for key in trial.user_attrs if key.startswith("ttp:")]
        json.dumps(trial.user_attrs, allow_nan=False)


def test_the_reason_of_a_skipped_trial_is_in_words() -> None:
    diverging, slow = _run(_study(max_steps=16), DIVERGING, SLOW)
    decision = decision_of(diverging)
    assert decision is not None
    assert decision.reason.startswith("predicted to diverge: the learning rate is ")
    decision = decision_of(slow)
    assert decision is not None
    assert decision.reason == (
        "predicted to miss the target by far: not reached in 24 steps, 1.5 times the budget of 16"
    )


def test_a_retried_trial_starts_with_a_clean_page() -> None:
    study = _study(max_steps=16)
    skipped = _run(study, SLOW)[0]
    # As Optuna's retry callback does it: the attributes of the other trial come along.
    study.enqueue_trial(FAST, user_attrs=skipped.user_attrs)
    running = study.ask(SPACE)
    assert decision_of(study.trials[1]) is None
    assert not running.should_prune()
    study.tell(running, 0.0)
    record = report(study).records[1]
    assert (record.decision, record.outcome) == ("run", "converges")


def test_attributes_of_another_trial_count_in_no_report() -> None:
    study = optuna.create_study()
    study.add_trial(_line(0, "skip", paid=1.0, budget=50.0))
    # The same page under another number.
    study.add_trial(_line(7, "skip", paid=1.0, budget=50.0))
    ledger = report(study)
    assert ledger.n_skipped == 1
    assert ledger.avoided_seconds == 50.0
    assert ledger.records[1].outcome is None
    assert ledger.records[1].paid_seconds == 2.0


def test_the_sums_of_a_report() -> None:
    study = optuna.create_study()
    # Half of its budget, as the skipped one would have taken.
    study.add_trial(_line(0, "run", paid=20.0, budget=40.0, value=1.0))
    study.add_trial(_line(1, "skip", paid=1.0, budget=50.0))
    study.add_trial(_line(2, "skip", paid=2.0, steps=None))  # no budget: what the others cost
    study.add_trial(_line(3, "run", paid=30.0, value=0.5, fingerprint="b"))
    ledger = report(study)
    assert ledger.n_skipped == 2
    assert ledger.paid_seconds == 20.0 + 1.0 + 2.0 + 30.0
    assert ledger.avoided_seconds == 0.5 * 50.0 + (20.0 + 30.0) / 2
    assert ledger.prediction_seconds == 4 * 0.5
    assert ledger.spectrum_seconds == 3.0 + 4.0
    assert ledger.saved_seconds == 50.0 - 2.0 - 7.0
    assert [record.avoided_seconds for record in ledger.records] == [0.0, 25.0, 25.0, 0.0]


def test_the_text_of_a_report() -> None:
    study = optuna.create_study()
    study.add_trial(_line(0, "run", paid=20.0, value=0.25, steps=1234.0))
    study.add_trial(_line(1, "skip", paid=1.0, budget=50.0, steps=None))
    heading, first, second, sums, net = str(report(study)).splitlines()
    assert re.split(" {2,}", heading) == [
        "trial",
        "state",
        "predicted steps",
        "predicted s",
        "paid s",
        "value",
        "decision",
    ]
    assert first.split() == ["0", "COMPLETE", "1,234", "123", "20", "0.25", "run:", "because"]
    assert second.split() == ["1", "PRUNED", "diverges", "-", "1", "-", "skip:", "because"]
    assert sums == (
        "2 trials: 1 skipped because of their prediction, 0 stopped while they ran. They took "
        "21.0 s; skipping and stopping avoided about 50.0 s."
    )
    assert net == (
        "After subtracting the 3.0 s of the spectrum and the 1.0 s of the predictions, about "
        "46.0 s were saved."
    )


def test_a_trial_that_runs_is_reported_without_saying_twice_that_it_was_predicted() -> None:
    study = _study()
    _run(study, FAST)
    line = str(report(study)).splitlines()[1]
    assert re.search(r"  run: 1\d steps ", line)


def test_a_deviation_that_rounds_to_nothing_is_not_printed() -> None:
    study = optuna.create_study()
    for number, paid in enumerate((20.0, 20.01, 20.02)):
        study.add_trial(_line(number, "run", paid=paid, value=1.0))
    study.add_trial(_line(3, "skip", paid=1.0, steps=None))
    assert 0.0 < report(study).saved_sd < 0.05
    assert "standard deviation" not in str(report(study))


def test_the_columns_of_a_report_are_aligned() -> None:
    study = _study()
    _run(study, FAST, DIVERGING)
    lines = str(report(study)).splitlines()
    column = lines[0].index("decision")
    assert lines[1][column:].startswith("run:")
    assert lines[2][column:].startswith("skip:")


def test_more_can_be_lost_than_saved() -> None:
    study = optuna.create_study()
    study.add_trial(_line(0, "run", paid=20.0, value=1.0))
    assert report(study).saved_seconds == -3.5
    assert "about 3.5 s were lost." in str(report(study))


def test_records_as_dictionaries_hold_what_the_report_holds() -> None:
    study = _study()
    _run(study, FAST, DIVERGING)
    first, second = report(study).to_dicts()
    assert first["params"] == FAST
    assert first["predicted_steps"] == predicted_steps(FAST)
    assert (second["state"], second["decision"]) == ("PRUNED", "skip")
    assert math.isnan(second["predicted_steps"])


def test_a_study_without_our_attributes_gets_a_report() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    running = study.ask()
    ledger = report(study)
    assert [record.state for record in ledger.records] == ["COMPLETE", "COMPLETE", "RUNNING"]
    assert ledger.n_skipped == ledger.spectrum_seconds == ledger.saved_seconds == 0
    assert ledger.paid_seconds > 0
    assert ledger.records[0].params == study.trials[0].params
    assert math.isnan(ledger.records[running.number].paid_seconds)
    assert len(str(ledger).splitlines()) == 1 + 3 + 2


def test_an_empty_study_gets_a_report() -> None:
    ledger = report(optuna.create_study())
    assert ledger.records == ()
    assert ledger.paid_seconds == 0
    assert "0 trials" in str(ledger)


def test_a_study_with_every_decision_gets_a_report() -> None:
    study, counts = study_with_every_decision()
    ledger = report(study)
    assert len(str(ledger).splitlines()) > len(ledger.records) == len(study.trials)
    finished = [r for r in ledger.records if study.trials[r.number].state.is_finished()]
    assert sum(r.decision == "skip" for r in finished) == sum(
        count for group, count in counts.items() if group.startswith("skipped")
    )
    assert sum(r.decision == "stop" for r in finished) == counts["stopped"]
    assert (
        sum(r.decision == "run" and r.override is not None for r in finished)
        == (counts["despite"])
    )
    assert sum(r.outcome is None for r in finished) == counts["unknown"]


def test_a_study_with_several_objectives_gets_a_report() -> None:
    study = optuna.create_study(directions=["minimize", "maximize"])
    study.optimize(lambda trial: (trial.suggest_float("x", 0, 1), 2.0), n_trials=1)
    [record] = report(study).records
    assert math.isnan(record.value)


def test_trials_skipped_in_a_row_are_counted_back_to_one_that_ran() -> None:
    study = _study(max_steps=16, goal=FastestToTarget)
    assert n_skipped_in_a_row(study.trials) == 0
    _run(study, SLOW, FAST, SLOW, DIVERGING)
    assert n_skipped_in_a_row(study.trials) == 2
    _run(study, FAST)
    assert n_skipped_in_a_row(study.trials) == 0


def test_a_trial_that_still_runs_ends_the_row() -> None:
    study = _study(max_steps=16)
    _run(study, SLOW, SLOW)
    running = asked(study, FAST)
    # It has not asked yet.
    assert n_skipped_in_a_row(study.trials) == 2
    assert not running.should_prune()
    assert n_skipped_in_a_row(study.trials) == 0
    _run(study, SLOW)
    assert n_skipped_in_a_row(study.trials) == 1


def test_a_trial_that_another_pruner_saw_ends_the_row() -> None:
    study = _study(max_steps=16)
    _run(study, SLOW)
    study.pruner = optuna.pruners.NopPruner()
    study.sampler = TTPSampler(quick_predictor(), BestMetric(), seed=0)
    _run(study, SLOW)
    assert n_skipped_in_a_row(study.trials) == 0
