"""Correction of a predictor by the trials of a study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math
import time
from typing import TYPE_CHECKING
from typing import TypeVar

from optuna.trial import TrialState

from optuna_ttp.calibration import Observation
from optuna_ttp.study._curve_objections import CurveStart
from optuna_ttp.study._curve_objections import InitialLoss
from optuna_ttp.study._curve_objections import joint_objections
from optuna_ttp.study._curve_record import curve_attribute
from optuna_ttp.study._curve_record import curve_of
from optuna_ttp.study._curve_record import CurveRecord
from optuna_ttp.study._hyperparameters import HyperparameterMap
from optuna_ttp.study._hyperparameters import MissingParameterError
from optuna_ttp.study._observed_trial import observation_of
from optuna_ttp.study._optuna_compat import FINISHED
from optuna_ttp.study._optuna_compat import trials_of
from optuna_ttp.study._prediction_record import PredictionRecord
from optuna_ttp.study._record_prediction import record_prediction
from optuna_ttp.study._study_state import state_of
from optuna_ttp.study._study_warnings import warn_of_curve
from optuna_ttp.study._study_warnings import warn_of_predictions
from optuna_ttp.study._training_log import unclosed
from optuna_ttp.study._trial_record import decision_of
from optuna_ttp.study._trial_record import prediction_of
from optuna_ttp.study._unusable_curve import CurveFault
from optuna_ttp.study._unusable_curve import UnusableCurve


if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from optuna_ttp.prediction import SearchPredictor


_Predictor = TypeVar("_Predictor", bound="SearchPredictor")


@dataclass(frozen=True)
class LearnerRules:
    """The numbers that decide when a predictor learns from a study, and from which trials.

    Attributes:
        n_every: While fewer trials are finished, the predictor learns from every trial, also from
            the curves of running ones. Changes nothing in twelve trials; limits the cost.
        most_awaited: The largest number of further finished trials after which it learns again, so
            that its cost does not grow with the study (``benchmarks/search/overhead.py``).
        most_predicted_late: Finished trials without a prediction are predicted afterwards only if
            they are among this number of newest trials, to limit the cost.
        most_predictors: The largest number of corrected predictors that are remembered per study.
            Sampler and pruner have two at most.
    """

    n_every: int = 8
    most_awaited: int = 32
    most_predicted_late: int = 256
    most_predictors: int = 8


RULES = LearnerRules()


def observations_of(
    study: optuna.Study,
    predictor: SearchPredictor,
    hyperparameters: HyperparameterMap | None = None,
) -> list[Observation]:
    """Return one observation per trial with a usable curve, in the order of the trials' numbers.

    Completed, pruned, failed and running trials count alike, except for those with a prediction
    for another task. A finished trial without a prediction, because its process was killed or
    another sampler began the study, is predicted now by the given predictor. The study is warned
    once of each kind of unusable curve. ``hyperparameters`` is the default map by default.
    """
    trials = trials_of(study, (*FINISHED, TrialState.RUNNING))
    return _observations(study, predictor, trials, hyperparameters or HyperparameterMap())


def informed_by(study: optuna.Study, predictor: _Predictor) -> _Predictor:
    """Return a predictor whose steps and seconds are corrected by all trials of a study."""
    return predictor.informed(observations_of(study, predictor))


@dataclass(frozen=True)
class _Learned:
    """A predictor that was corrected by a study's trials.

    Attributes:
        given: The predictor before it learned, which is recognised by its identity.
        predictor: The corrected predictor.
        n_finished: The number of finished trials from which it has learned.
        running: Pairs of trial number and recorded steps of the running trials it learned from.
    """

    given: SearchPredictor
    predictor: SearchPredictor
    n_finished: int
    running: tuple[tuple[int, float], ...]


class LearnerMemory:
    """The observations of a study's finished trials, and the predictors corrected by them.

    Attributes:
        observations: The observations of finished trials (None if a trial has none), by the
            fingerprint of the task and the number of the trial.
        starts: The beginnings of the finished trials' curves that passed the checks of single
            curves, by the number of the trial.
    """

    def __init__(self) -> None:
        self.observations: dict[str, dict[int, Observation | None]] = {}
        self.starts: dict[int, CurveStart] = {}
        self._learned: list[_Learned] = []

    def learned_by(self, predictor: SearchPredictor) -> _Learned | None:
        """Return the corrected version of a predictor, or None if it has not learned yet."""
        return next((one for one in self._learned if one.given is predictor), None)

    def remember(self, learned: _Learned) -> None:
        """Keep the corrected version of a predictor in place of its earlier one."""
        others = [one for one in self._learned if one.given is not learned.given]
        self._learned = [*others, learned][-RULES.most_predictors :]


class Learner:
    """Corrects a predictor by a study's trials, at a cost that does not grow with their number.

    Up to 15 finished trials it learns again after each one, and with fewer than eight also when
    running trials have recorded more. Then it learns again after every second finished trial,
    from 32 on after every fourth, and so on up to every 32nd. This depends on the trials alone, so
    that a study gives the same predictions after it was interrupted.
    """

    def __init__(self, predictor: SearchPredictor, hyperparameters: HyperparameterMap) -> None:
        self._predictor = predictor
        self._map = hyperparameters

    def informed(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> SearchPredictor:
        """Return the predictor corrected by finished and, while these are few, running trials.

        It learns anew at some numbers of trials only (see the class), and may warn then.
        """
        finished = [trial for trial in trials if trial.state in FINISHED]
        doublings = max(0, (len(finished) // RULES.n_every).bit_length() - 1)
        n_finished = len(finished) - len(finished) % min(2**doublings, RULES.most_awaited)
        running_trials: list[FrozenTrial] = []
        if n_finished < RULES.n_every:
            running_trials = [t for t in trials if t.state not in FINISHED]
        curves = ((t.number, curve_of(t)) for t in running_trials)
        running = tuple(
            (n, float(record.curve.n_steps))
            for n, record in curves
            if isinstance(record, CurveRecord)
        )
        state = state_of(study)
        # Another thread waits for the lock, and then uses the predictor that was corrected here.
        with state.lock:
            # Sampler and pruner mostly share a predictor, and then share its corrected version.
            memory = state.part(LearnerMemory)
            last = memory.learned_by(self._predictor)
            if last is not None and (last.n_finished, last.running) == (n_finished, running):
                return last.predictor
            used = [*sorted(finished, key=lambda t: t.number)[:n_finished], *running_trials]
            observations = _observations(study, self._predictor, used, self._map)
            informed = self._predictor.informed(observations)
            memory.remember(_Learned(self._predictor, informed, n_finished, running))
            warn_of_predictions(study, informed)
            return informed

    def last(self, study: optuna.Study) -> SearchPredictor:
        """Return the predictor as it was last corrected, or unchanged if it has not learned."""
        last = state_of(study).part(LearnerMemory).learned_by(self._predictor)
        return self._predictor if last is None else last.predictor


def _observations(
    study: optuna.Study,
    predictor: SearchPredictor,
    trials: Sequence[FrozenTrial],
    mapping: HyperparameterMap,
) -> list[Observation]:
    """Return usable observations, ordered by the number of the trial; warn of unusable curves.

    Curves that :func:`joint_objections` names are left out, too. Finished trials are read once.
    """
    memory = state_of(study).part(LearnerMemory)
    known = memory.observations.setdefault(predictor.fingerprint, {})
    ordered = sorted(trials, key=lambda t: t.number)
    late = {t.number for t in ordered[-RULES.most_predicted_late :] if t.state in FINISHED}
    observations = {}
    for trial in ordered:
        if trial.number in known:
            one = known[trial.number]
        else:
            one = observation_in(
                study, trial, predictor, mapping if trial.number in late else None
            )
            if trial.state in FINISHED:
                known[trial.number] = one
        if one is not None:
            observations[trial.number] = one
    objections = joint_objections(memory.starts)
    if objections:
        number = min(objections)
        warn_of_curve(study, number, objections[number])
    return [one for number, one in observations.items() if number not in objections]


def observation_in(
    study: optuna.Study,
    trial: FrozenTrial,
    predictor: SearchPredictor,
    hyperparameters: HyperparameterMap | None,
) -> Observation | None:
    """Return the observation of a trial's curve; warn the study once per kind of unusable curve.

    It is None if the trial has no prediction for the predictor's task, or no usable curve. With
    ``hyperparameters`` a trial without a prediction is predicted now. The beginning of a finished
    trial's curve is remembered with the study.
    """
    prediction = prediction_of(trial)
    if prediction is None and hyperparameters is not None:
        late = _late_prediction(trial, predictor, hyperparameters)
        if isinstance(late, UnusableCurve):
            warn_of_curve(study, trial.number, late)
            return None
        prediction = late
    if prediction is None or prediction.first_passages is None:
        return None
    if prediction.fingerprint != predictor.fingerprint:
        return None
    if trial.state in FINISHED:
        missing = unclosed(study, trial)
        if missing is not None:
            warn_of_curve(study, trial.number, missing)
    one = observation_of(trial, prediction, InitialLoss.of(predictor))
    if isinstance(one, UnusableCurve):
        warn_of_curve(study, trial.number, one)
        return None
    if one is not None and trial.state in FINISHED:
        record = curve_of(trial)
        assert isinstance(record, CurveRecord)
        _warn_of_gaps(study, trial.number, record.curve.n_gaps)
        start = CurveStart.of(record, prediction, InitialLoss.of(predictor))
        state_of(study).part(LearnerMemory).starts[trial.number] = start
    return one


def _warn_of_gaps(study: optuna.Study, number: int, n_gaps: int) -> None:
    """Warn that ``n_gaps`` losses of a trial are left out, unless it is zero."""
    if n_gaps:
        some = "A loss of trial {} is" if n_gaps == 1 else f"{n_gaps:,} losses of trial {{}} are"
        reason = "NaN or infinite, while training went on"
        warn_of_curve(study, number, UnusableCurve(CurveFault.GAPS, reason, f"{some} left out"))


def _late_prediction(
    trial: FrozenTrial, predictor: SearchPredictor, mapping: HyperparameterMap
) -> PredictionRecord | UnusableCurve | None:
    """Return a predictor's prediction for a trial that ran without one.

    The predictor must not have learned from the trial. Return the reason if the trial's parameters
    lack the hyperparameters, or None if it has no curve or the map does not apply to it.
    """
    if curve_attribute(trial) is None:
        return None
    started = time.perf_counter()
    mapping = mapping.with_default_momentum(predictor.default_momentum)
    # A trial in a branch of a conditional space without predictions has a stored decision.
    is_decided = decision_of(trial) is not None
    try:
        configuration = mapping.resolve(trial.params)
        if configuration is None:
            nameless = mapping == HyperparameterMap() and trial.params and not is_decided
            return _nameless(trial) if nameless else None
        configuration = configuration.clipped(predictor.n_samples)
        prediction = predictor.estimate(*configuration)
    except MissingParameterError:
        return None if is_decided else _nameless(trial)
    except (TypeError, ValueError):
        # Its objective may have failed because of the same values.
        return None
    return record_prediction(
        predictor,
        configuration,
        prediction,
        budget_steps=math.inf,
        prediction_seconds=time.perf_counter() - started,
    )


def _nameless(trial: FrozenTrial) -> UnusableCurve:
    """Return the reason that a trial's hyperparameters are not among its parameters."""
    names = ", ".join(map(repr, sorted(trial.params)))
    return UnusableCurve(
        CurveFault.NAMES,
        "nothing was predicted for it, and now its learning rate, batch size and momentum are not "
        f"found under their names among its parameters {names}",
    )
