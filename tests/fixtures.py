"""Data that earlier versions of the package wrote."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import create_trial
from optuna.trial import TrialState

from tests.studies import SPACE


_STUDY = Path(__file__).parent / "data" / "study_0_1_0.json"


def study_of_version_0_1_0(
    sampler: BaseSampler | None, pruner: BasePruner | None = None
) -> optuna.Study:
    """A study of twelve trials whose attributes version 0.1.0 wrote.

    They ran, were skipped and were stopped, on curves that were logged, reported, diverged, and
    of another loss, for the task and target of ``quick_predictor``.
    """
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    for stored in json.loads(_STUDY.read_text(encoding="utf-8")):
        trial = create_trial(
            state=TrialState[stored["state"]],
            values=stored["values"],
            params=stored["params"],
            distributions=SPACE,
            user_attrs=stored["user_attrs"],
            intermediate_values={int(k): v for k, v in stored["intermediate_values"].items()},
        )
        study.add_trial(trial)
    return study
