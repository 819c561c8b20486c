"""A study with a trial for every decision that can be written on one, and for none."""

from __future__ import annotations

from datetime import datetime
from datetime import timedelta
from typing import Any

import optuna
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from tests.studies import quick_predictor


KINDS = ("diverges", "budget", "cost", "study_budget")
OVERRIDES = ("untrusted", "refuted", "shadow", "turn", "audit")
_START = datetime(2026, 1, 1)


def _prediction(outcome: str, place: int = 0) -> dict[str, Any]:
    """What version 0.1.0 wrote of a prediction. Places differ in the hyperparameters."""
    rate = {"diverges": 50.0, "not_reached": 1e-4}.get(outcome, 0.05) * 1.1 ** (place % 10)
    batch_size, momentum = 4 + place % 3, 0.1 * (place % 4)
    made = quick_predictor().estimate(rate, batch_size, momentum)
    assert made.outcome == outcome
    metadata = quick_predictor().spectrum.metadata

    def listed(name: str) -> list[float | None]:
        return [None if v != v else float(v) for v in getattr(made, name)]

    return {
        "fingerprint": metadata.fingerprint,
        "spectrum_seconds": metadata.compute_seconds,
        "initial_loss": quick_predictor().initial_loss,
        "initial_loss_sd": quick_predictor().initial_loss_sd,
        "target": quick_predictor().target.value,
        "learning_rate": rate,
        "batch_size": batch_size,
        "momentum": momentum,
        "outcome": outcome,
        "steps": float(made.steps) if outcome == "converges" else None,
        "seconds": float(made.seconds) if outcome == "converges" else None,
        "stability": float(made.stability),
        "budget_steps": 40.0,
        "budget_seconds": 4.0,
        "max_steps": 60.0,
        "prediction_seconds": 0.01,
        "ladder": {
            "predicted": listed("log_first_passage_times"),
            "expected": listed("expected_log_first_passage_times"),
            "growth": listed("log_growth"),
            "covariates": listed("covariates"),
            "instability": listed("instability"),
        },
    }


def _curve() -> dict[str, Any]:
    """What version 0.1.0 wrote of a loss curve: a tenth less at every step."""
    losses = [quick_predictor().initial_loss * 0.9**step for step in range(30)]
    return {
        "n_steps": len(losses),
        "diverged": False,
        "n_gaps": 0,
        "first": losses[0],
        "steps": list(range(len(losses))),
        "losses": losses,
        "errors": [0.01] * len(losses),
    }


def _outcome(kind: str | None) -> str:
    return {"diverges": "diverges", "budget": "not_reached"}.get(kind or "", "converges")


def _decision(decision: str, kind: str | None, override: str | None) -> dict[str, Any]:
    written: dict[str, Any] = {"decision": decision, "reason": "the reason in words"}
    if kind is not None:
        written["kind"] = kind
    if override is not None:
        written["override"] = override
    if decision == "stop":
        written |= {"log_sd": 0.2, "seconds_left": None if kind == "chance" else 2.0}
    return written


def _decisions() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """The group that a trial belongs to, its prediction and its decision."""
    made: list[tuple[str, str, str | None, str | None]] = [("ran", "run", None, None)]
    made += [(f"skipped {kind}", "skip", kind, None) for kind in KINDS]
    made += [("despite", "run", kind, override) for kind in KINDS for override in OVERRIDES]
    made += [("despite", "run", "chance", "shadow")]
    made += [("stopped", "stop", "chance", None)]
    made += [("stopped", "stop", kind, why) for kind in KINDS for why in (None, *OVERRIDES)]
    return [
        (group, _prediction(_outcome(kind), place), _decision(decision, kind, override))
        for place, (group, decision, kind, override) in enumerate(made)
    ]


def _trial(
    number: int, state: TrialState, attributes: dict[str, Any], repeats: int | None
) -> FrozenTrial:
    """A trial whose attributes carry its own number, or that of the trial that it repeats."""
    written = number if repeats is None else repeats
    done = state.is_finished()
    return FrozenTrial(
        number=number,
        trial_id=number,
        state=state,
        value=0.5 if state == TrialState.COMPLETE else None,
        values=None,
        datetime_start=None if state == TrialState.WAITING else _START,
        datetime_complete=_START + timedelta(seconds=3.0) if done else None,
        params={},
        distributions={},
        user_attrs={
            key: {"trial": written, **value} if isinstance(value, dict) else value
            for key, value in attributes.items()
        },
        system_attrs={},
        intermediate_values={},
    )


def study_with_every_decision() -> tuple[optuna.Study, dict[str, int]]:
    """Return the study and how many of its finished trials are in each group.

    Each decision is written on a trial of each state. The groups are ``"ran"``, ``"despite"`` (it
    ran despite its prediction), ``"skipped KIND"``, ``"stopped"``, ``"undecided"`` (it has a
    prediction only) and ``"unknown"`` (no prediction can be read from it). Some are malformed.
    """
    trials: list[FrozenTrial] = []
    counts: dict[str, int] = {}

    def add(group: str, attributes: dict[str, Any], repeats: int | None = None) -> None:
        for state in TrialState:
            trials.append(_trial(len(trials), state, attributes, repeats))
            counts[group] = counts.get(group, 0) + state.is_finished()

    for group, prediction, decision in _decisions():
        attributes: dict[str, Any] = {
            "ttp:record": {"prediction": prediction, "decision": decision}
        }
        # Learning from a curve takes time, so few trials have one.
        override, kind = decision.get("override"), decision.get("kind")
        if override in (None, "audit") and kind in (None, "chance", "diverges"):
            attributes["ttp:curve"] = _curve()
        add(group, attributes)
    prediction = _prediction("converges")
    add("undecided", {"ttp:record": {"prediction": prediction}})
    no_map = {"decision": "run", "reason": "the hyperparameter map does not apply"}
    add("unknown", {"ttp:record": {"decision": no_map}})
    add("unknown", {})
    repeated = {"prediction": prediction, "decision": {"decision": "skip", "reason": "because"}}
    add("unknown", {"ttp:record": repeated}, 0)
    run = {"decision": "run", "reason": "the reason in words"}
    for malformed in ({"momentum": [[1]]}, {"momentum": 1.0}, {"learning_rate": None}):
        add("unknown", {"ttp:record": {"prediction": {**prediction, **malformed}}})
    no_objects: tuple[Any, ...] = ("text", 3, [], None)
    for made in no_objects:
        add("unknown", {"ttp:record": {"prediction": made, "decision": run}})
        add("undecided", {"ttp:record": {"prediction": prediction, "decision": made}})
    add("unknown", {"ttp:record": "text", "ttp:curve": "text"})
    damaged = {**prediction, "ladder": 1}
    add("unknown", {"ttp:record": {"prediction": damaged, "decision": run}})
    add("ran", {"ttp:record": {"prediction": prediction, "decision": run}, "ttp:curve": {"n": 1}})
    study = optuna.create_study()
    study.add_trials(trials)
    return study, counts
