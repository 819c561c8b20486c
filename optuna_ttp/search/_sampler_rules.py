"""The tuned numbers of the sampler, each with the evidence for its value."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
import math

from optuna_ttp._util.checks import check_kind
from optuna_ttp._util.checks import check_range


@dataclass(frozen=True)
class ForecastRules:
    """The tuned numbers of a configuration's forecast.

    Attributes:
        largest_sd: Standard deviation of the logarithm of a predicted time before three trials
            were observed, and the largest after that. Half and twice: 1.17 and 1.07 times as long.
        least_sd: The smallest such standard deviation. Changes nothing; guards against zero.
        least_probability: Lower bound of the probability of success, against log(0).
    """

    largest_sd: float = math.log(2.0)
    least_sd: float = 0.1
    least_probability: float = 1e-6


@dataclass(frozen=True)
class PreferenceRules:
    """The tuned numbers of the preference among configurations.

    The recorded tasks are those of ``benchmarks/search``; ``benchmarks/search/parts.py`` searches
    40 parts of their grids, and counts the average trials that a search takes. "Half" and "zero"
    are those of ``ablate.py``, which replays eight searches, which take so many times as long.

    Attributes:
        same: Configurations that differ by less in the logarithms of learning rate, batch size
            and ``1 / (1 - momentum)`` are the same. Zero: 1.41 times as long.
        time_spread_nats: Nats for the distance from all tried configurations if the goal is a
            time. Few, because predictions rank well from the first trial on: the 40 searches took
            2.2, 2.1, 1.9, 1.8 and 1.9 average trials (geometric mean) with 3, 1.5, 0.75, 0.35 and
            no nats.
        metric_spread_nats: Nats for that distance if the goal is a metric: 3.2, 3.1, 3.0, 3.0 and
            2.9 average trials with 1, 0.5, 0.25, 0.12 and no nats.
        spread: The distance, as a share of the space's extent, at which all of these nats are
            given; fewer are given in proportion below it. Half and twice: 1.18 and 1.16
            times as long.
        rank_nats: Nats between the worst and the best rank. Half and twice change times by 1 %.
        saturated_depth: Depth of the training loss (logarithm of the initial loss over the loss)
            above which it does not improve a metric: 2 % of the initial loss. On the recorded
            tasks of draw 0 the best metrics lie at predicted depths from 3.3 to 4.6.
        unsteady: The learning rate over the largest stable one at which the odds of a good metric
            are halved. On the same tasks the best metrics lie at 0.02 to 0.7 times, and none
            above 1.5 times.
        lag: The delay of momentum, as a share of a trial's steps, at which all of ``lag_nats`` are
            subtracted. Among the 30 configurations that rank best without this rule, momenta of
            0.99 have values that rank lower by 0.15 on the digits and the first draw of the
            regression, and as high as others on the other three.
        lag_nats: Nats subtracted for that delay. The 40 searches take 2.9 average trials without
            them, 2.6 with 0.6 and 2.7 with 1.5 nats.
        fewest_values: Least number of values to which a Gaussian process is fitted. Without the
            process searches take 1.01 times as long.
        prior_values: The number of values as much as which the prior assumption counts that
            predictions rank the values perfectly. Half and twice change no time to a good trial.
        noise: Standard deviation of the noise of normal scores in that Gaussian process. Half and
            twice change times by 1 %.
    """

    same: float = 0.03
    time_spread_nats: float = 0.35
    metric_spread_nats: float = 0.1
    spread: float = 0.25
    rank_nats: float = 6.0
    saturated_depth: float = 4.0
    unsteady: float = 0.3
    lag: float = 0.2
    lag_nats: float = 0.6
    fewest_values: int = 4
    prior_values: float = 4.0
    noise: float = 0.3


@dataclass(frozen=True)
class SamplerRules:
    """Settings of :class:`~optuna_ttp.TTPSampler` for experts.

    Example:
        >>> sampler = TTPSampler(predictor, goal, rules=SamplerRules(exploration=0.2))

    Args:
        n_design_trials:
            The number of trials of the initial design. Five by default; none: 1.16 times as long.
        n_candidates:
            The number of independent proposals of which the best is chosen. Eight by default; with
            one the base sampler decides about all trials.
        exploration:
            The share of trials after the design that are left to the base sampler. 0.1 by
            default; with one, all trials are. Zero changes no time to a good trial.
        prior_trials:
            The number of trials from which on the weight of predictions falls, as this number over
            the number of trials (piBO). 30 by default; guards longer studies than were replayed.
        least_trust:
            The least weight of predictions while they are trusted, before ``prior_trials``
            reduces it. 0.3 by default; zero changes two of eight searches, and no time.
        n_newest_values:
            The number of newest values from which is learned. 100 by default, to limit the time.
        n_drawn:
            The number of random configurations that are compared if the space is not a grid of at
            most ``largest_grid``. 512 by default, to limit the time.
        largest_grid:
            The largest number of configurations of a grid that are all compared. 2,048 by default,
            to limit the time.
        preference:
            The numbers of the preference among configurations.
        forecast:
            The numbers of a configuration's forecast.

    Raises:
        ValueError:
            If a setting is out of its range.
        TypeError:
            If a setting is of the wrong kind.
    """

    n_design_trials: int = 5
    n_candidates: int = 8
    exploration: float = 0.1
    prior_trials: float = 30.0
    least_trust: float = 0.3
    n_newest_values: int = 100
    n_drawn: int = 512
    largest_grid: int = 2048
    preference: PreferenceRules = field(default_factory=PreferenceRules)
    forecast: ForecastRules = field(default_factory=ForecastRules)

    def __post_init__(self) -> None:
        for name in ("n_design_trials", "largest_grid"):
            check_range(name, getattr(self, name), 0, kind=int)
        for name in ("n_candidates", "n_newest_values", "n_drawn"):
            check_range(name, getattr(self, name), 1, kind=int)
        check_range("exploration", self.exploration, 0.0, 1.0)
        check_range("prior_trials", self.prior_trials)
        check_range("least_trust", self.least_trust, 0.0, 1.0)
        check_kind("preference", self.preference, PreferenceRules)
        check_kind("forecast", self.forecast, ForecastRules)
        for name, value in {**vars(self.preference), **vars(self.forecast)}.items():
            check_range(name, value)
