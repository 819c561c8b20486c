"""The tuned numbers of the calibration, and the data that each of them was chosen on.

An ablation passes ``CalibrationRules`` with other numbers to :func:`calibrate`; the calibration
keeps them for its corrections and for its trust.
"""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field


@dataclass(frozen=True)
class ErrorRules:
    """The expected errors of the logarithmic times of a trial.

    Together the numbers roughly maximise the likelihood of held-out times after one to five
    trials of the first draw of each network in benchmarks/accuracy; the other draws test them.
    """

    trial_sd: float = 0.02
    """Standard deviation of the error that neighbouring levels of a trial have in common."""
    trial_length: float = 0.7
    """Correlation length of that error, as a difference of depths."""
    level_sd: float = 0.025
    """Standard deviation of the errors of single levels."""
    instability_sd: float = 0.175
    """Standard deviation that each factor e of instability adds."""
    instability_from: float = 0.6
    """Product of stability and kernel growth above which instability makes times scatter."""
    spike_sd: float = 1.0
    """Standard deviation of the logarithm of a delay by a loss spike at the start of a trial."""
    spike_from: float = 0.3
    """Learning rate over the largest stable one above which such a spike is expected."""
    scale_weight: float = 2.0
    """Weight of the prior of the errors' scale, in trials."""
    censored_error: float = 0.15
    """Standard error of the lower bound from a trial that stopped before its next level."""
    unexplained_sds: float = 4.0
    """A running trial that is later by more than this many standard deviations has a delay that
    the model does not explain, and is expected to lose as many steps again."""


@dataclass(frozen=True)
class GrowthPriorRules:
    """The prior of the correction of predicted times, and the bounds of the correction.

    Chosen together with :class:`ErrorRules`, by the same likelihood.
    """

    slope_sd: float = 0.35
    """Standard deviation of the slope of ``u`` per unit of depth."""
    slope_length: float = 0.6
    """Correlation length of the slope, as a difference of depths."""
    start_sd: float = 0.15
    """Standard deviation of ``u`` at depth zero."""
    effects: tuple[float, float, float] = (-0.09, -0.09, 0.0)
    """Means of the effects of the covariates and of instability on the logarithm of the speed:
    large steps are slower than predicted on all networks in benchmarks/accuracy."""
    effect_sds: tuple[float, float, float] = (0.07, 0.1, 0.14)
    """Standard deviations of these effects."""
    instability_from: float = 1.3
    """Product of stability and kernel growth above which instability changes the speed."""
    edge: float = 1.0
    """The product of stability and kernel growth at which the kernel stops growing."""
    most_log_speed: float = 12.0
    """Largest absolute logarithm of a corrected speed, so that all numbers stay finite."""


@dataclass(frozen=True)
class FitRules:
    """The computation of the posterior, ablated in ``benchmarks/search/results/ablation.md``."""

    robustness: float = 4.0
    """Degrees of freedom of the Student's t by which a trial that does not fit weighs less."""
    n_rounds: int = 4
    """Number of Gauss-Newton steps."""
    most_trials: int = 128
    """Number of newest trials that determine the correction: enough, and fast."""
    late_factor: float = 2.0
    """A trial has failed if its next level takes more than this factor times the expected time."""


@dataclass(frozen=True)
class TrustRules:
    """The limits beyond which predictions are distrusted, or their first steps contradict them.

    Predictions are compared with two trivial rules. Chosen on the recorded runs in
    benchmarks/accuracy, in many orders of the trials, with the right spectra, with shuffled
    eigenvectors and with spectra of other tasks. Percentages are shares of 200 orders with right
    and 200 with shuffled spectra, from ``benchmarks/accuracy/results/ablation.md``.
    """

    min_observations: int = 3
    """Least number of trials to compare predictions. With fewer, after two trials, 8 % of the
    orders with the right spectra are distrusted, and none with shuffled ones."""
    min_distrust: int = 5
    """Least number of trials to distrust predictions that are not grossly wrong. Without it 2 %
    of the right ones are distrusted after three trials."""
    gross_error: float = 1.0
    """Typical logarithmic errors above this (a factor e) are gross: three trials are enough to
    distrust them. Without it no shuffled spectrum is distrusted after three trials, 52 % with."""
    harmless_error: float = 0.5
    """Typical logarithmic errors below this (a factor 1.65) are harmless, whatever the rule's.
    Without it 9 % of the right ones are distrusted after five trials, 1.5 % with it."""
    added_error: float = 0.2
    """Error that is added to those of predictions and rule. It changes one order in 600 and no
    search; it keeps trust, by which the sampler weighs predictions, from being decided by small
    errors, and defined if the rule is exact."""
    clear_trust: float = 0.5
    """Least trust of predictions that do not rank the trials or have gross errors. With zero one
    order in 200 fewer is distrusted of the shuffled ones, two fewer of the right ones."""
    min_agreement: float = 0.2
    """Kendall's tau below which predictions do not rank the trials. Without this 3 % fewer of the
    shuffled ones are distrusted after three trials."""
    least_superiority: float = 1.05
    """Least advantage of the rule, over its own standard deviation, that one trial alone does not
    explain. Without this 3 and 4 % of the right ones are distrusted after five and ten trials,
    with it 1.5 and 0.5 %."""
    least_compared: float = 0.5
    """Least sum of the compared trials' weights for superiority to count. It changes no order and
    no search; it guards a study whose trials are all near the edge of stability, where no spectrum
    predicts well (tests/calibration/test_trust.py)."""
    n_recent: int = 15
    """Number of newest trials whose errors count: corrections may have removed older errors.
    Chosen without a measurement: no recorded search is that long."""
    most_compared: int = 256
    """Number of newest trials that are compared with rules, which learn from earlier trials: it
    limits the cost of long studies."""
    unreached_error: float = 3.0
    """The logarithmic error of a prediction that the level is not reached. Half and twice of it
    change no order and no search."""
    stable_sd: float = 0.2
    """Standard deviation of the errors of trials with the weight one; instability that adds more
    to the errors makes a trial weigh less. If all weigh the same, 3 % of the right ones are
    distrusted after five trials, 1.5 % with it."""
    first_steps: float = 0.4
    """Logarithm of a correction of the first steps that is too large for the right spectrum. With
    the right ones it was at most 0.33 after ten trials; of the shuffled ones 40 % exceed it after
    five and 76 % after ten trials."""


@dataclass(frozen=True)
class DivergenceRules:
    """The prior of the learning rate, over the largest stable one, above which trials fail."""

    half: float = 4.2
    """Its median, above which half of all networks do not recover in 60 steps: the geometric mean
    of the 16 real limits, of two small networks with two losses, in
    benchmarks/accuracy/results/stability.csv."""
    network_sd: float = 1.0
    """Standard deviation of its logarithm between networks, from the same 16 limits."""
    width: float = 0.25
    """Width of the logistic function of its logarithm, for configurations of one network."""


@dataclass(frozen=True)
class CalibrationRules:
    """All rules by which a predictor learns from trials."""

    errors: ErrorRules = field(default_factory=ErrorRules)
    """The rules of the errors of logarithmic times."""
    growth_prior: GrowthPriorRules = field(default_factory=GrowthPriorRules)
    """The rules of the correction's prior."""
    fit: FitRules = field(default_factory=FitRules)
    """The rules of the posterior."""
    trust: TrustRules = field(default_factory=TrustRules)
    """The rules by which predictions are trusted, and first steps are as predicted."""
    divergence: DivergenceRules = field(default_factory=DivergenceRules)
    """The rules of training that does not recover."""
    failure: DivergenceRules = field(default_factory=lambda: DivergenceRules(1.0, 1.2))
    """The rules of trials that diverge or are late. On the first draws in benchmarks/search, of
    the configurations above the stability limit that are predicted to reach their target, 41 of
    47 do so on digits, and 3 of 73 on the other four tasks."""


RULES = CalibrationRules()
