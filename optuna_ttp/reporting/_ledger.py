"""The function that makes the report of a study."""

from __future__ import annotations

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_ttp._util.checks import check_kind
from optuna_ttp.calibration import calibrate
from optuna_ttp.calibration import Calibration
from optuna_ttp.calibration import Observation
from optuna_ttp.reporting._ledger_line import LedgerLine
from optuna_ttp.reporting._ledger_line import TypicalCost
from optuna_ttp.reporting._report import Report
from optuna_ttp.study import curve_of
from optuna_ttp.study import CurveRecord
from optuna_ttp.study import CurveStart
from optuna_ttp.study import decision_of
from optuna_ttp.study import FINISHED
from optuna_ttp.study import InitialLoss
from optuna_ttp.study import joint_objections
from optuna_ttp.study import observation_of
from optuna_ttp.study import prediction_of
from optuna_ttp.study import unclosed
from optuna_ttp.study import UnusableCurve


def report(study: optuna.Study) -> Report:
    """Report the prediction, the decision and the seconds of every trial of a study.

    Example:
        >>> print(optuna_ttp.report(study))

    Args:
        study:
            Any study. Trials for which neither a :class:`~optuna_ttp.TTPSampler` nor a
            :class:`~optuna_ttp.TTPPruner` was used have no prediction and no decision.

    Returns:
        The report. It prints as a table with a summary, and has the lines and the sums as
        attributes.

    Raises:
        TypeError:
            If ``study`` is not an :class:`optuna.Study`.
    """
    check_kind("study", study, optuna.Study)
    trials = sorted(study.get_trials(deepcopy=False), key=lambda trial: trial.number)
    typical = TypicalCost.of(trials)
    spectra = {
        prediction.fingerprint: prediction.spectrum_seconds
        for prediction in map(prediction_of, trials)
        if prediction is not None
    }
    best = _best(study, trials)
    lines = tuple(LedgerLine.of(trial, typical, best) for trial in trials)
    return Report(lines, float(sum(spectra.values())), *_learned(study, trials))


def _learned(study: optuna.Study, trials: list[FrozenTrial]) -> tuple[Calibration, dict[int, str]]:
    """Return the calibration that the trials of a study give, and why other curves are not used.

    The calibration uses all trials of the task that was predicted last. The second value has the
    reasons in words, by the number of the trial.
    """
    observations: dict[str, dict[int, Observation]] = {}
    starts: dict[int, CurveStart] = {}
    unusable: dict[int, str] = {}
    newest = ""
    for trial in trials:
        prediction, record = prediction_of(trial), curve_of(trial)
        observation: Observation | UnusableCurve | None = None
        if prediction is None or prediction.first_passages is None:
            observation = record if isinstance(record, UnusableCurve) else None
        else:
            initial = InitialLoss(prediction.initial_loss, prediction.initial_loss_sd)
            observation = observation_of(trial, prediction, initial)
            newest = prediction.fingerprint
            if isinstance(observation, Observation):
                observations.setdefault(newest, {})[trial.number] = observation
                if isinstance(record, CurveRecord) and trial.state in FINISHED:
                    starts[trial.number] = CurveStart.of(record, prediction, initial)
        missing = unclosed(study, trial) if trial.state in FINISHED else None
        if missing is not None:
            unusable[trial.number] = missing.reason
        if isinstance(observation, UnusableCurve):
            unusable[trial.number] = observation.reason
    objections = joint_objections(starts)
    unusable |= {number: one.reason for number, one in objections.items()}
    usable = [o for n, o in observations.get(newest, {}).items() if n not in objections]
    return calibrate(usable), dict(sorted(unusable.items()))


def _best(study: optuna.Study, trials: list[FrozenTrial]) -> int | None:
    """Return the number of the best completed trial of a study with one objective.

    It is None for several objectives, or if every completed trial ran only in spite of an
    objection, because then even the best one may be bad.
    """
    done = [t for t in trials if t.state == TrialState.COMPLETE and t.values]
    decisions = map(decision_of, done)
    willing = any(decision is None or decision.override is None for decision in decisions)
    if len(study.directions) > 1 or not willing:
        return None
    sign = -1.0 if study.directions[0] == StudyDirection.MAXIMIZE else 1.0
    return min(done, key=lambda t: sign * t.values[0]).number
