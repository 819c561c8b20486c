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
from optuna_ttp.study._study_state import state_of
from optuna_ttp.study._study_warnings import warn_of_curve
from optuna_ttp.study._study_warnings import warn_of_predictions
from optuna_ttp.study._training_log import unclosed
from optuna_ttp.study._trial_record import decision_of
from optuna_ttp.study._trial_record import prediction_of
from optuna_ttp.study._unusable_curve import UnusableCurve


if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from optuna_ttp.prediction import SearchPredictor


_Predictor = TypeVar("_Predictor", bound="SearchPredictor")
# While fewer trials are finished every one counts; at the most so many are waited for.
_FEW = 8
_MOST_NEW = 32
# What so many predictors have learned from one study is remembered; sampler and pruner are two.
_MOST_PREDICTORS = 8
# Nothing older than the newest so many trials is predicted afterwards.
_MOST_LATE = 256


def observations_of(
    study: optuna.Study,
    predictor: SearchPredictor,
    hyperparameters: HyperparameterMap | None = None,
) -> list[Observation]:
    """Return what a study's trials tell about a predictor.

    Finished, pruned, failed and running trials alike, in the order of their numbers, as far as
    they have a usable curve and no prediction for another task. Finished ones for which nothing
    was predicted before they ran, as where their process was killed or another sampler began the
    study, are predicted now, by the predictor as it is. What cannot be used is reported once.

    Args:
        study:
            The study.
        predictor:
            Knows the task. Predictions for another one are left out.
        hyperparameters:
            Which trial parameter is which hyperparameter. The parameters ``"learning_rate"``,
            ``"batch_size"`` and ``"momentum"`` by default.

    Returns:
        One observation a trial.
    """
    trials = trials_of(study, (*FINISHED, TrialState.RUNNING))
    return _observations(study, predictor, trials, hyperparameters or HyperparameterMap())


def informed_by(study: optuna.Study, predictor: _Predictor) -> _Predictor:
    """Return the predictor as a study's trials have corrected it, steps and seconds.

    Args:
        study:
            The study.
        predictor:
            The predictor.

    Returns:
        A predictor that shares everything else with this one.
    """
    return predictor.informed(observations_of(study, predictor))


@dataclass(frozen=True)
class _Learned:
    """What a predictor has learned from a study.

    Attributes:
        given:
            The predictor before it learned. It is kept alive, and recognised by its identity.
        predictor:
            The predictor as the trials have corrected it.
        n_finished:
            From how many finished trials it has learned.
        running:
            The numbers of the running trials it has learned from, and how far they had come.
    """

    given: SearchPredictor
    predictor: SearchPredictor
    n_finished: int
    running: tuple[tuple[int, float], ...]


class LearnerMemory:
    """What is remembered of a study's trials and of what was learned from them.

    Attributes:
        observations:
            What finished trials tell, by the fingerprint of the task and the number of the trial.
        starts:
            How the curves begin that can be used as far as each one tells alone, by the number of
            the finished trial.
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
        self._learned = [*others, learned][-_MOST_PREDICTORS:]


class Learner:
    """Keeps a predictor informed by a study's trials, at a cost that does not grow with them.

    Every finished trial counts at first, and while there are fewer than eight also what running
    ones have recorded. Later it learns anew from every second trial, every fourth, and so on up to
    every thirty-second. It depends on the trials alone when that is, so that a study which was put
    aside goes on as it would have.

    Args:
        predictor:
            The predictor.
        hyperparameters:
            Which trial parameter is which hyperparameter.
    """

    def __init__(self, predictor: SearchPredictor, hyperparameters: HyperparameterMap) -> None:
        self._predictor = predictor
        self._map = hyperparameters

    def informed(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> SearchPredictor:
        """Return the predictor as a study's trials have corrected it.

        Args:
            study:
                The study.
            trials:
                Its finished and running trials, as they were just read.

        Returns:
            A predictor that shares everything else with the given one.
        """
        finished = [trial for trial in trials if trial.state in FINISHED]
        step = min(2 ** max(0, (len(finished) // _FEW).bit_length() - 1), _MOST_NEW)
        n_finished = len(finished) - len(finished) % step
        under_way: list[FrozenTrial] = []
        if n_finished < _FEW:
            under_way = [t for t in trials if t.state not in FINISHED]
        curves = ((t.number, curve_of(t)) for t in under_way)
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
            used = [*sorted(finished, key=lambda t: t.number)[:n_finished], *under_way]
            twin = self._predictor.informed(_observations(study, self._predictor, used, self._map))
            memory.remember(_Learned(self._predictor, twin, n_finished, running))
            warn_of_predictions(study, twin)
            return twin

    def last(self, study: optuna.Study) -> SearchPredictor:
        """Return the predictor as it was last corrected.

        Args:
            study:
                The study.

        Returns:
            The given one where nothing was learned yet.
        """
        last = state_of(study).part(LearnerMemory).learned_by(self._predictor)
        return self._predictor if last is None else last.predictor


def _observations(
    study: optuna.Study,
    predictor: SearchPredictor,
    trials: Sequence[FrozenTrial],
    mapping: HyperparameterMap,
) -> list[Observation]:
    memory = state_of(study).part(LearnerMemory)
    known = memory.observations.setdefault(predictor.fingerprint, {})
    ordered = sorted(trials, key=lambda t: t.number)
    late = {t.number for t in ordered[-_MOST_LATE:] if t.state in FINISHED}
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
    found = joint_objections(memory.starts)
    if found:
        number = min(found)
        warn_of_curve(study, number, found[number])
    return [one for number, one in observations.items() if number not in found]


def observation_in(
    study: optuna.Study,
    trial: FrozenTrial,
    predictor: SearchPredictor,
    hyperparameters: HyperparameterMap | None,
) -> Observation | None:
    """Return what a trial of a study tells about a predictor, and say once what cannot be used.

    Args:
        study:
            The study.
        trial:
            The trial.
        predictor:
            Knows the task.
        hyperparameters:
            To predict what was not predicted before the trial ran. Nothing is, where there are
            none.

    Returns:
        The observation, or :obj:`None` where the trial has no prediction for this task or no
        usable curve.
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
        warn_of_curve(study, number, UnusableCurve("gaps", reason, f"{some} left out"))


def _late_prediction(
    trial: FrozenTrial, predictor: SearchPredictor, mapping: HyperparameterMap
) -> PredictionRecord | UnusableCurve | None:
    """What would have been predicted for a trial, nothing where it has no curve.

    It is that of the given predictor, which has not learned from the trial.
    """
    if curve_attribute(trial) is None:
        return None
    started = time.perf_counter()
    mapping = mapping.with_default_momentum(predictor.default_momentum)
    # It may be in a branch of a conditional space; then that was written when it began.
    known = decision_of(trial) is not None
    try:
        configuration = mapping.resolve(trial.params)
        if configuration is None:
            nameless = mapping == HyperparameterMap() and trial.params and not known
            return _nameless(trial) if nameless else None
        configuration = configuration.clipped(predictor.n_samples)
        prediction = predictor.estimate(*configuration)
    except MissingParameterError:
        return None if known else _nameless(trial)
    except (TypeError, ValueError):
        # Its objective may have failed for just that.
        return None
    return PredictionRecord.of(
        predictor,
        configuration,
        prediction,
        budget_steps=math.inf,
        prediction_seconds=time.perf_counter() - started,
    )


def _nameless(trial: FrozenTrial) -> UnusableCurve:
    names = ", ".join(map(repr, sorted(trial.params)))
    return UnusableCurve(
        "names",
        "nothing was predicted for it, and now its learning rate, batch size and momentum are not "
        f"found under their names among its parameters {names}",
    )
