"""What a study's trials teach a predictor."""

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
    """How often a predictor learns from a study, and from what.

    Attributes:
        n_every: While fewer trials are finished, the predictor learns from every one, and from
            what running ones have recorded. Not ablated yet.
        most_awaited: It learns anew after so many further trials at the latest, so that its cost
            does not grow with the study (``benchmarks/search/overhead.py``).
        most_predicted_late: Of finished trials without a prediction only the newest so many are
            predicted afterwards. Not ablated yet.
        most_predictors: What so many predictors have learned from one study is remembered. Sampler
            and pruner have two at most.
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
    """Return what a study's trials tell about a predictor, one observation for each trial.

    Finished, pruned, failed and running trials count alike, in the order of their numbers, if
    they have a usable curve and no prediction for another task. A finished trial for which nothing
    was predicted before it ran, because its process was killed or another sampler began the
    study, is predicted now, by the predictor as it is. The study is warned once of each kind of
    curve that cannot be used. By default the parameters have the names of the hyperparameters.
    """
    trials = trials_of(study, (*FINISHED, TrialState.RUNNING))
    return _observations(study, predictor, trials, hyperparameters or HyperparameterMap())


def informed_by(study: optuna.Study, predictor: _Predictor) -> _Predictor:
    """Return the predictor as a study's trials have corrected its steps and its seconds."""
    return predictor.informed(observations_of(study, predictor))


@dataclass(frozen=True)
class _Learned:
    """What a predictor has learned from a study.

    Attributes:
        given: The predictor before it learned. It is kept alive, and recognised by its identity.
        predictor: The predictor as the trials have corrected it.
        n_finished: From how many finished trials it has learned.
        running: The numbers of the running trials it has learned from, and how far they had come.
    """

    given: SearchPredictor
    predictor: SearchPredictor
    n_finished: int
    running: tuple[tuple[int, float], ...]


class LearnerMemory:
    """What is remembered of a study's trials and of what was learned from them.

    Attributes:
        observations: What finished trials tell, by the fingerprint of the task and the number of
            the trial.
        starts: How the curves begin that can be used as far as each one tells alone, by the number
            of the finished trial.
    """

    def __init__(self) -> None:
        self.observations: dict[str, dict[int, Observation | None]] = {}
        self.starts: dict[int, CurveStart] = {}
        self._learned: list[_Learned] = []

    def learned_by(self, predictor: SearchPredictor) -> _Learned | None:
        """Return what a predictor has learned, :obj:`None` where it has learned nothing yet."""
        return next((one for one in self._learned if one.given is predictor), None)

    def remember(self, learned: _Learned) -> None:
        """Remember what a predictor has learned; what it had learned before is forgotten."""
        others = [one for one in self._learned if one.given is not learned.given]
        self._learned = [*others, learned][-RULES.most_predictors :]


class Learner:
    """Keeps a predictor informed by a study's trials, at a cost that does not grow with them.

    Every finished trial counts at first, and while there are fewer than eight also what running
    ones have recorded. Later it learns anew from every second trial, every fourth, and so on up to
    every thirty-second. When it learns depends on the trials alone, so that a study which was put
    aside goes on as it would have.
    """

    def __init__(self, predictor: SearchPredictor, hyperparameters: HyperparameterMap) -> None:
        self._predictor = predictor
        self._map = hyperparameters

    def informed(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> SearchPredictor:
        """Return the predictor as a study's trials, finished and running, have corrected it."""
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
        # Another thread waits, and then finds what was learned here.
        with state.lock:
            # Sampler and pruner of a study mostly have the same predictor: they learn together.
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
        """Return the predictor as it was last corrected, or as it was given."""
        last = state_of(study).part(LearnerMemory).learned_by(self._predictor)
        return self._predictor if last is None else last.predictor


def _observations(
    study: optuna.Study,
    predictor: SearchPredictor,
    trials: Sequence[FrozenTrial],
    mapping: HyperparameterMap,
) -> list[Observation]:
    """Return what these trials tell, apart from curves that only several together give away."""
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
    """Return the observation that a trial's curve gives, and warn of a curve that is not usable.

    It is :obj:`None` if the trial has no prediction for the predictor's task, or no usable curve.
    With ``hyperparameters`` a trial without a prediction is predicted now. How a finished trial's
    curve starts is remembered with the study.
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
    """Warn that losses of a trial are left out, if there are any."""
    if n_gaps:
        some = "A loss of trial {} is" if n_gaps == 1 else f"{n_gaps:,} losses of trial {{}} are"
        reason = "NaN or infinite, while training went on"
        warn_of_curve(study, number, UnusableCurve(CurveFault.GAPS, reason, f"{some} left out"))


def _late_prediction(
    trial: FrozenTrial, predictor: SearchPredictor, mapping: HyperparameterMap
) -> PredictionRecord | UnusableCurve | None:
    """Return what would have been predicted for a trial that has a curve.

    The given predictor has not learned from the trial. Return why it cannot predict, or
    :obj:`None` if there is nothing to say.
    """
    if curve_attribute(trial) is None:
        return None
    started = time.perf_counter()
    mapping = mapping.with_default_momentum(predictor.default_momentum)
    # In a branch of a conditional space that has no prediction, a decision was written.
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
    """Return that the hyperparameters of a trial are not among its parameters."""
    names = ", ".join(map(repr, sorted(trial.params)))
    return UnusableCurve(
        CurveFault.NAMES,
        "nothing was predicted for it, and now its learning rate, batch size and momentum are not "
        f"found under their names among its parameters {names}",
    )
