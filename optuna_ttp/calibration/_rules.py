"""The tuned numbers of the calibration, and what each of them was chosen on.

An ablation passes ``CalibrationRules`` with other numbers to :func:`calibrate`; the calibration
keeps them for its corrections and for its trust.
"""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
import math


@dataclass(frozen=True)
class ErrorRules:
    """How far the logarithmic times of a trial are expected to be off.

    The numbers maximise together, roughly, the likelihood of held-out times after one to five
    trials of the first draw of each network in benchmarks/accuracy; the other draws test them.
    """

    trial_sd: float = 0.02
    """Standard deviation of the error that neighbouring levels of a trial have in common."""
    trial_length: float = 0.7
    """Depth over which levels have that error in common."""
    level_sd: float = 0.025
    """Standard deviation of the errors of single levels."""
    instability_sd: float = 0.175
    """Standard deviation that comes with instability, a factor e of it."""
    instability_from: float = 0.6
    """Product of stability and kernel growth from which on instability makes times scatter."""
    catapult_sd: float = 1.0
    """Standard deviation of a trial's delay by a loss spike at the start."""
    catapult_from: float = 0.3
    """Learning rate over the largest stable one from which on such a spike is expected."""
    scale_weight: float = 2.0
    """Weight of the prior of the errors' scale, in trials."""
    censored_error: float = 0.15
    """Error of the bound that a trial gives that stopped before its next level."""
    unexplained_sds: float = 4.0
    """A running trial that is later by so many standard deviations is late for no reason that the
    model knows of, and loses as many steps again."""


@dataclass(frozen=True)
class GrowthPriorRules:
    """What is believed before any trial of the clock's correction, and how far it goes.

    Chosen together with :class:`ErrorRules`, on the same likelihood.
    """

    slope_sd: float = 0.35
    """Standard deviation of the slope of ``u`` per unit of depth."""
    slope_length: float = 0.6
    """Depth over which the slope stays about the same."""
    start_sd: float = 0.15
    """Standard deviation of ``u`` at depth zero."""
    effects: tuple[float, float, float] = (-0.09, -0.09, 0.0)
    """Means of the effects of the covariates and of instability on the logarithm of the speed:
    large steps are slower than predicted on all networks in benchmarks/accuracy."""
    effect_sds: tuple[float, float, float] = (0.07, 0.1, 0.14)
    """Their standard deviations."""
    instability_from: float = 1.3
    """Product of stability and kernel growth from which on instability changes the speed."""
    edge: float = 1.0
    """That product at which the kernel stops growing."""
    most_log_speed: float = 12.0
    """Corrections beyond this logarithm are cut off, so that all numbers stay finite."""


@dataclass(frozen=True)
class FitRules:
    """How the posterior is found. Not ablated where no reason is given."""

    robustness: float = 4.0
    """Degrees of freedom with which a trial that does not fit loses its weight."""
    n_rounds: int = 4
    """Gauss-Newton steps."""
    most_trials: int = 128
    """The newest trials that shape the correction: enough, and quick."""
    late_factor: float = 2.0
    """A trial that misses its next level by so many times the expected time has failed."""


@dataclass(frozen=True)
class FirstStepRules:
    """When training begins otherwise than a spectrum says, so that it may be the wrong one.

    Chosen on the recorded runs in benchmarks/accuracy: with the right spectra training was never
    more than 1.42 times as fast or slow as predicted after one, three or five trials; with those
    of shuffled eigenvectors and other data sets, as far as predictions were still trusted, mostly
    1.2 to 1.8 times.
    """

    fraction: float = 0.7
    """Share of the initial loss until which the network is still the pretrained one."""
    level_sd: float = 0.05
    """Errors of single levels, as a standard deviation, that are of no interest."""
    calm_sd: float = 0.2
    """Those of a whole trial; trials that instability makes scatter more weigh less."""
    least_weight: float = 1.0
    """Trials that weigh less than so many calm ones together are not looked at."""
    deviation: float = 0.4
    """Logarithm of a correction of the first steps that is too large for the right spectrum."""
    deviation_sds: float = 3.0
    """Standard deviations that it must be away."""
    least_error: float = 0.25
    """Logarithmic errors of predictions below this make no correction too large."""
    calm_deviation: float = 0.25
    """What trials far from the edge of stability must say of it alone."""
    gross_deviation: float = math.log(4.0)
    """A correction that is too large whatever these trials say."""


@dataclass(frozen=True)
class TrustRules:
    """When predictions are distrusted, compared with rules of thumb.

    Chosen on the recorded runs in benchmarks/accuracy, in many orders of the trials, with the
    right spectra and with shuffled eigenvectors.
    """

    min_observations: int = 3
    """Trials from which on predictions are compared; one order of 200 looks grossly wrong after
    three where the spectrum is right, six of ten where its eigenvectors are shuffled."""
    min_distrust: int = 5
    """Trials from which on predictions that are not grossly wrong may be distrusted."""
    gross_error: float = 1.0
    """Typical logarithmic errors above this (a factor e) are gross."""
    gross_trust: float = -1.0
    """With gross errors three trials are enough where twice the rule's squared error is made."""
    harmless_error: float = 0.5
    """Typical logarithmic errors below this (a factor 1.65) do no harm, whatever a rule does."""
    added_error: float = 0.2
    """Error that is added to those of both, so that no comparison hangs on a hair."""
    clear_trust: float = 0.5
    """Share of the rule's squared error that unranked or grossly wrong predictions must avoid."""
    min_agreement: float = 0.2
    """Kendall's tau below which predictions do not rank the trials."""
    backwards: float = -0.75
    """Kendall's tau of predictions that rank them backwards: of five trials one pair at most may
    be in order (by chance in 4 %)."""
    least_superiority: float = 1.05
    """The rule's advantage over its own standard deviation that is no accident of one trial.
    Without this and the next one the right spectrum of the residual net in benchmarks/accuracy was
    distrusted after five trials in 24 of 100 orders, with them in six, and in no search of
    benchmarks/search (40 looked at); shuffled predictions are found out nearly as often."""
    least_compared: float = 0.5
    """What the compared trials must weigh together, in calm trials, where errors are not gross."""
    n_recent: int = 15
    """The newest trials that say how good predictions are: what was learned may have mended older
    errors."""
    most_compared: int = 256
    """The newest trials that are compared with rules which learn from the trials before."""
    unreached_error: float = 3.0
    """What counts as the error where a prediction was out of reach."""
    calm_sd: float = 0.2
    """Errors, as a standard deviation, of trials that weigh one; instability makes them weigh
    less."""


@dataclass(frozen=True)
class DivergenceRules:
    """From which learning rate over the stability limit on trials fail, before any trial."""

    half: float = 4.2
    """Where half of all networks do not recover in 60 steps: the geometric mean of the 16 real
    limits in benchmarks/accuracy/results/stability.csv, two small networks with two losses."""
    network_sd: float = 1.0
    """Standard deviation of its logarithm from network to network, of the same 16 limits."""
    width: float = 0.25
    """Its spread from configuration to configuration, as the width of a logistic function."""


@dataclass(frozen=True)
class CalibrationRules:
    """All rules by which a predictor learns from trials."""

    errors: ErrorRules = field(default_factory=ErrorRules)
    """Of the errors of logarithmic times."""
    growth_prior: GrowthPriorRules = field(default_factory=GrowthPriorRules)
    """Of the correction."""
    fit: FitRules = field(default_factory=FitRules)
    """Of the posterior."""
    first_steps: FirstStepRules = field(default_factory=FirstStepRules)
    """Of how training begins."""
    trust: TrustRules = field(default_factory=TrustRules)
    """Of what is trusted."""
    divergence: DivergenceRules = field(default_factory=DivergenceRules)
    """Of training that does not recover."""
    failure: DivergenceRules = field(default_factory=lambda: DivergenceRules(1.0, 1.2))
    """Of trials that diverge or are late. Of the configurations above the stability limit that are
    predicted to reach their target on the first draws in benchmarks/search, 41 of 47 of the
    digits' do, and 3 of 73 of the other four tasks'."""


RULES = CalibrationRules()
