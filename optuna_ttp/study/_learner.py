"""What a study's trials teach a predictor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math
import time
from typing import Any
from typing import TYPE_CHECKING
from typing import TypeVar

import numpy as np
from optuna.logging import get_logger
from optuna.trial import TrialState

from optuna_ttp._util.exceptions import UnreliablePredictionWarning
from optuna_ttp._util.exceptions import UnusableCurveWarning
from optuna_ttp._util.warn import warn_caller
from optuna_ttp.calibration import Calibration
from optuna_ttp.calibration import Observation
from optuna_ttp.study._curve_start import CurveStart
from optuna_ttp.study._curve_start import joint_objections
from optuna_ttp.study._hyperparameters import HyperparameterMap
from optuna_ttp.study._hyperparameters import MissingParameterError
from optuna_ttp.study._observed_trial import InitialLoss
from optuna_ttp.study._observed_trial import observation_of
from optuna_ttp.study._optuna_compat import FINISHED
from optuna_ttp.study._optuna_compat import trials_of
from optuna_ttp.study._recorded_curve import recorded
from optuna_ttp.study._records import CURVE
from optuna_ttp.study._records import DECISION
from optuna_ttp.study._records import entry
from optuna_ttp.study._records import PREDICTION
from optuna_ttp.study._records import prediction_entry
from optuna_ttp.study._study_state import state_of
from optuna_ttp.study._training_log import unclosed
from optuna_ttp.study._unusable_curve import UnusableCurve


if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from optuna_ttp.prediction import SearchPredictor


_logger = get_logger("optuna.ttp.learner")
_Predictor = TypeVar("_Predictor", bound="SearchPredictor")
# While fewer trials are finished every one counts; at the most so many are waited for.
_FEW = 8
_MOST_NEW = 32
# So many curves of which none comes down are strange.
_NONE_FALLS = 5
# What so many predictors have learned from one study is remembered; sampler and pruner are two.
_MOST_PREDICTORS = 8
# Nothing older than the newest so many trials is predicted afterwards.
_MOST_LATE = 256
_CHECK = (
    "Check that steps are optimiser steps and losses means over the mini-batch "
    "(steps_per_report?), and that the spectrum is that of this network, these data and this loss."
)


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
        warned:
            What the study was warned of.
    """

    def __init__(self) -> None:
        self.observations: dict[str, dict[int, Observation | None]] = {}
        self.starts: dict[int, CurveStart] = {}
        self.warned: set[str] = set()
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
        curves = ((t.number, recorded(t)) for t in under_way)
        running = tuple((n, float(c["n_steps"])) for n, c in curves if isinstance(c, dict))
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
            _tell_of_nothing(study, twin)
            _tell_of_trust(study, twin.calibration)
            _tell_of_start(study, twin.calibration)
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


def tell_that_nothing_ran(study: optuna.Study, n_skipped: int, objection: str) -> None:
    """Say once that every trial was skipped, and none has shown whether predictions are right.

    Args:
        study:
            The study.
        n_skipped:
            How many.
        objection:
            Why the next one should be, too.

    Warns:
        UnreliablePredictionWarning:
            The first time.
    """
    told = state_of(study).part(LearnerMemory).warned
    if "unseen" in told:
        return
    told.add("unseen")
    warn_caller(
        f"All {n_skipped} trials so far were skipped, so that nobody knows yet whether "
        f"predictions are right. The next one runs, although {objection}. Check that the target "
        "and the budget can be reached, that the search space holds good learning rates, and that "
        "the spectrum is that of this network, these data and this loss.",
        UnreliablePredictionWarning,
    )


def tell_that_skipping_is_wrong(study: optuna.Study, count: str) -> None:
    """Say once that trials which were to be skipped reach the target.

    Args:
        study:
            The study.
        count:
            How many of how many.

    Warns:
        UnreliablePredictionWarning:
            The first time.
    """
    told = state_of(study).part(LearnerMemory).warned
    if "refuted" in told:
        return
    told.add("refuted")
    warn_caller(
        f"{count} trials that ran although they were predicted to miss the target, or to diverge, "
        f"reached it, or nearly. Nothing is skipped for that reason until that changes. {_CHECK}",
        UnreliablePredictionWarning,
    )


def _tell_of_nothing(study: optuna.Study, predictor: SearchPredictor) -> None:
    """Say once that none of several curves has come down: they may be of something else."""
    n_curves = len(predictor.observations)
    told = state_of(study).part(LearnerMemory).warned
    if n_curves < _NONE_FALLS or "nothing" in told:
        return
    if any(np.isfinite(one.observed).any() for one in predictor.observations):
        return
    told.add("nothing")
    warn_caller(
        f"None of the training-loss curves of {n_curves} trials has come down by 5 %, so that "
        "nothing is learned from them but that they were slow. Check that what is recorded is the "
        "training loss, as a mean over the mini-batch, and neither a metric nor a constant.",
        UnusableCurveWarning,
    )


def _tell_of_trust(study: optuna.Study, calibration: Calibration) -> None:
    """Say that predictions are not trusted, at first by a warning, or are again."""
    told = state_of(study).part(LearnerMemory).warned
    if calibration.trusted == ("distrust" not in told):
        return
    if calibration.trusted:
        told.remove("distrust")
        _logger.info(f"Predictions are trusted again: {calibration}.")
        return
    told.add("distrust")
    if calibration.trust < 0.0:
        found = (
            "were further from the observed ones (typically by a factor "
            f"{math.exp(calibration.compared_error):.2f}) than those of `c / effective learning "
            "rate`, learned from the same trials (a factor "
            f"{math.exp(calibration.baseline_error):.2f}, {calibration.n_observed} trials)"
        )
    else:
        found = (
            f"were typically off by a factor {math.exp(calibration.log_error):.2f} and do not "
            f"rank the trials (Kendall's tau {calibration.rank_agreement:.2f}, "
            f"{calibration.n_observed} trials)"
        )
    text = (
        f"Predicted training times {found}. They steer nothing until that changes: nothing is "
        f"skipped, and the base sampler decides. {_CHECK}"
    )
    if "warned" in told:
        _logger.info(text)
        return
    told.add("warned")
    warn_caller(text, UnreliablePredictionWarning)


def _tell_of_start(study: optuna.Study, calibration: Calibration) -> None:
    """Say once that the first steps are not as predicted: no trial can be to blame for that."""
    told = state_of(study).part(LearnerMemory).warned
    if calibration.starts_as_predicted or "start" in told:
        return
    told.add("start")
    warn_caller(
        f"Training begins {calibration.start_factor:.2g} times as fast as predicted "
        f"({calibration.n_observed} trials), in its first steps, where the network is still the "
        f"pretrained one. {_CHECK} Predictions are corrected by what is learned.",
        UnreliablePredictionWarning,
    )


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
        found[number].tell(study, number)
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
    prediction = entry(trial, PREDICTION)
    if prediction is None and hyperparameters is not None:
        late = _late_prediction(trial, predictor, hyperparameters)
        if isinstance(late, UnusableCurve):
            late.tell(study, trial.number)
            return None
        prediction = late
    if prediction is None or prediction.get("ladder") is None:
        return None
    if prediction["fingerprint"] != predictor.fingerprint:
        return None
    if trial.state in FINISHED:
        missing = unclosed(study, trial)
        if missing is not None:
            missing.tell(study, trial.number)
    one = observation_of(trial, prediction, InitialLoss.of(predictor))
    if isinstance(one, UnusableCurve):
        one.tell(study, trial.number)
        return None
    if one is not None and trial.state in FINISHED:
        _tell_of_gaps(study, trial)
        start = CurveStart.of(trial, prediction, InitialLoss.of(predictor))
        if start is not None:
            state_of(study).part(LearnerMemory).starts[trial.number] = start
    return one


def _tell_of_gaps(study: optuna.Study, trial: FrozenTrial) -> None:
    value = recorded(trial)
    n_gaps = value["n_gaps"] if isinstance(value, dict) else 0
    if n_gaps:
        some = "A loss of trial {} is" if n_gaps == 1 else f"{n_gaps:,} losses of trial {{}} are"
        reason = "NaN or infinite, while training went on"
        gaps = UnusableCurve("gaps", reason, f"{some} left out")
        gaps.tell(study, trial.number)


def _late_prediction(
    trial: FrozenTrial, predictor: SearchPredictor, mapping: HyperparameterMap
) -> dict[str, Any] | UnusableCurve | None:
    """What would have been predicted for a trial, nothing where it has no curve.

    It is that of the given predictor, which has not learned from the trial.
    """
    if entry(trial, CURVE) is None:
        return None
    started = time.perf_counter()
    mapping = mapping.with_default_momentum(predictor.default_momentum)
    # It may be in a branch of a conditional space; then that was written when it began.
    known = entry(trial, DECISION) is not None
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
    return prediction_entry(
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
