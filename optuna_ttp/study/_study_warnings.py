"""The warnings of a study, each kind given once."""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import TYPE_CHECKING

import numpy as np
from optuna.logging import get_logger

from optuna_ttp._util.exceptions import UnreliablePredictionWarning
from optuna_ttp._util.exceptions import UnusableCurveWarning
from optuna_ttp._util.warn import warn_caller
from optuna_ttp.study._study_state import state_of
from optuna_ttp.study._unusable_curve import CurveFault


if TYPE_CHECKING:
    import optuna

    from optuna_ttp.calibration import Calibration
    from optuna_ttp.prediction import SearchPredictor
    from optuna_ttp.study._unusable_curve import UnusableCurve


_logger = get_logger("optuna.ttp.warnings")
# Advice by the fault of a curve; for other faults the advice is to log mean losses.
_ADVICE: Mapping[CurveFault, str] = {
    CurveFault.EMPTY: (
        "Record a loss at every optimiser step, with TrainingLog.step or Trial.report."
    ),
    CurveFault.FINISHED: "Close the log, or leave its with block, before the trial ends.",
    CurveFault.GAPS: "",
    CurveFault.INFINITE: "",
    CurveFault.JUMP: "Count the optimiser steps of this trial, from 0 on.",
    CurveFault.LATE: "Count the optimiser steps of this trial, from 0 on.",
    CurveFault.NAMES: (
        "Give the present names of its parameters with HyperparameterMap to learn from it."
    ),
    CurveFault.SAMPLES: "Count optimiser steps, not samples.",
    CurveFault.SHORT: "Record more losses of a trial, so that predictions learn from it.",
    CurveFault.SECOND: "Use one TrainingLog per trial.",
    CurveFault.STEPS: "Count the optimiser steps of this trial, from 0 on.",
}
_MEAN_LOSS = "Log the mean loss of each mini-batch."
_CHECK = (
    "Check that steps are optimiser steps and losses means over the mini-batch "
    "(steps_per_report?), and that the spectrum is that of this network, these data and this loss."
)
# The least number of curves for a warning that none of them falls: a choice, it steers nothing.
_NONE_FALLS = 5


class _Warned(set[str]):
    """The warnings given for a study: kinds of unusable curves and names of other warnings."""


def warn_of_curve(study: optuna.Study | None, number: int, unusable: UnusableCurve) -> None:
    """Warn that a trial's curve is left out; log it if the study had a warning of its kind."""
    text = f"{unusable.what.format(number)}: {unusable.reason}."
    if study is not None and not is_first_warning(study, f"curve: {unusable.kind}"):
        _logger.debug(text)
        return
    advice = _ADVICE.get(unusable.kind, _MEAN_LOSS)
    warn_caller(
        f"{text} {advice} ".rstrip() + " Others like it are left out without a warning.",
        UnusableCurveWarning,
    )


def warn_that_nothing_ran(study: optuna.Study, n_skipped: int, reason: str) -> None:
    """Warn once per study that all ``n_skipped`` trials were skipped, so that none was checked.

    ``reason`` is the reason, in words, for which the next trial would also be skipped.
    """
    if not is_first_warning(study, "nothing ran"):
        return
    warn_caller(
        f"All {n_skipped} trials so far were skipped, so it is not known yet whether "
        f"predictions are right. The next one runs, although {reason}. Check that the target "
        "and the budget can be reached, that the search space holds good learning rates, and that "
        "the spectrum is that of this network, these data and this loss.",
        UnreliablePredictionWarning,
    )


def warn_that_skipping_is_wrong(study: optuna.Study, count: str) -> None:
    """Warn once per study that ``count`` trials, as ``3 of 5``, refuted a reason to skip them."""
    if not is_first_warning(study, "refuted"):
        return
    warn_caller(
        f"{count} trials that ran although they were predicted to miss the target, or to diverge, "
        "reached it, or nearly. No trial is skipped for that reason until such trials miss the "
        f"target again. {_CHECK}",
        UnreliablePredictionWarning,
    )


def warn_of_predictions(study: optuna.Study, predictor: SearchPredictor) -> None:
    """Warn once per kind if a corrected predictor's observations contradict its predictions."""
    _warn_that_no_loss_falls(study, predictor)
    _warn_of_distrust(study, predictor.calibration)
    _warn_of_first_steps(study, predictor.calibration)


def is_first_warning(study: optuna.Study, warning: str) -> bool:
    """Return True at the first call with this name of a warning for a study, then False."""
    state = state_of(study)
    with state.lock:
        warned = state.part(_Warned)
        is_first = warning not in warned
        warned.add(warning)
    return is_first


def _warn_that_no_loss_falls(study: optuna.Study, predictor: SearchPredictor) -> None:
    """Warn once if at least five loss curves were observed and none has fallen by 5 %."""
    n_curves = len(predictor.observations)
    if n_curves < _NONE_FALLS:
        return
    if any(np.isfinite(one.observed).any() for one in predictor.observations):
        return
    if not is_first_warning(study, "no loss falls"):
        return
    warn_caller(
        f"None of the training-loss curves of {n_curves} trials has come down by 5 %, so that "
        "predictions learn from them only that they were slow. Check that the recorded values are "
        "training losses, as means over the mini-batch, and neither a metric nor a constant.",
        UnusableCurveWarning,
    )


def _warn_of_distrust(study: optuna.Study, calibration: Calibration) -> None:
    """Warn at the first loss of trust in predictions; log later losses and returns of trust."""
    if calibration.trusted:
        warned = state_of(study).part(_Warned)
        if "distrust" in warned:
            warned.discard("distrust")
            _logger.info(f"Predictions are trusted again: {calibration}.")
        return
    if not is_first_warning(study, "distrust"):
        return
    if calibration.trust < 0.0:
        errors = (
            "were further from the observed ones (typically by a factor "
            f"{math.exp(calibration.compared_error):.2f}) than those of `c / effective learning "
            "rate`, learned from the same trials (a factor "
            f"{math.exp(calibration.baseline_error):.2f}, {calibration.n_observed} trials)"
        )
    else:
        errors = (
            f"were typically off by a factor {math.exp(calibration.log_error):.2f} and do not "
            f"rank the trials (Kendall's tau {calibration.rank_agreement:.2f}, "
            f"{calibration.n_observed} trials)"
        )
    text = (
        f"Predicted training times {errors}. Predictions are ignored until they become accurate "
        f"again: no trial is skipped, and the base sampler decides. {_CHECK}"
    )
    if is_first_warning(study, "ever distrusted"):
        warn_caller(text, UnreliablePredictionWarning)
    else:
        _logger.info(text)


def _warn_of_first_steps(study: optuna.Study, calibration: Calibration) -> None:
    """Warn once if the first steps of trials are faster or slower than predicted.

    There the network is still the pretrained one, so that the cause is not a single trial.
    """
    if calibration.starts_as_predicted or not is_first_warning(study, "first steps"):
        return
    warn_caller(
        f"Training begins {calibration.start_factor:.2g} times as fast as predicted "
        f"({calibration.n_observed} trials), in its first steps, where the network is still the "
        f"pretrained one. {_CHECK} Predictions are corrected by these observations.",
        UnreliablePredictionWarning,
    )
