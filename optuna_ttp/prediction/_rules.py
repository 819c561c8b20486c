"""The tuned numbers of predictions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PredictionRules:
    """The tuned numbers by which predictions simulate, correct and judge configurations.

    All but ``surface_trace`` change no search of ``benchmarks/search/results/ablation.md``. What
    else they decide was measured on recorded runs of benchmarks/accuracy
    (``python -m benchmarks.accuracy.prediction_rules``).
    """

    hopeless_stability: float = 8.0
    """A learning rate above this multiple of the largest stable one is predicted to diverge. Above
    the limit a network first goes through a loss spike; most recover from it up to several times
    the limit, since their curvature drops (Lewkowycz et al., 2020, arXiv 2003.02218). Chosen after
    the fact: five of the 16 real limits of two networks are above it
    (``benchmarks/accuracy/results/stability.csv``). It spares simulations that blow up."""
    unreliable_sd: float = 0.4
    """A prediction that trials have corrected is unreliable if the standard deviation of its
    logarithm is at least this. It decides a word of the prediction only, and whether a short
    training run is advised (tests/prediction/test_reliability.py)."""
    margin: float = 1.5
    """Length of simulations, in horizons, once trials correct the times. After five trials no
    outcome of 118 recorded runs depends on it, but probabilities to reach the target in time do:
    they change by up to 0.3 with 1 and with 3."""
    most_log_slack: float = 3.0
    """Logarithm of the longest simulation without corrections, in horizons, if trials were faster
    than predicted. With zero, probabilities change by up to 0.36 on the same runs."""
    patience: float = 20.0
    """A configuration that did not reach the target on the response surface is simulated for this
    many times the surface's steps. It limits the cost; half and twice of it change nothing."""
    few_steps: int = 32
    """Times of fewer steps are compared at smaller learning rates, because a difference of one
    step would be one of more than three percent. It decides the interval of spectra that lack
    eigenpairs, if the target is reached within few steps."""
    surface_trace: float = 0.95
    """The share of the trace that the eigenpairs of the response surface hold. The surface ranks
    candidates; its times may be less exact."""
    settled_subset_sd: float = 0.2
    """Standard deviation of the logarithm of a time ``T_eps`` if the spectrum has only a subset of
    the samples: both ends of the curve move, mostly together. Chosen without a
    measurement: no recorded task has such a target and a subset."""
    surface_columns: int = 10_000
    """Largest number of columns of the response surface of Adam; with 10,000 times are within 3 %
    of those with many more on a pretrained network. The surface ranks candidates."""
    adam_steps: float = 30.0
    """Steps of slow training by Adam that would use up the initial loss at its first speed. Not
    ablated yet."""
    most_adam_steps: int = 1_000
    """Largest number of steps of slow training by Adam. Not ablated yet."""
    short_run_shares: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
    """Learning rates that a short training run chooses from, over the largest stable one. On
    the small networks of benchmarks/accuracy (digits-0, digits-1, residual-0, residual-1) times
    are off by 5.1, 5.3, 32 and 25 % after a run, and by 5.5, 7.4, 33 and 26 % with 0.1 alone;
    without a run by 6.3, 6.1, 35 and 31 %."""
    short_run_instability: float = 0.3
    """Largest product of such a share and the kernel's growth. Half of it changes none of these
    errors, twice of it 5.3 to 6.3 % on digits-1."""
    most_rise: float = 100.0
    """A short training run ends if its loss exceeds the initial loss by this factor. It
    guards a learning rate that the user gives (tests/prediction/test_short_run.py)."""


RULES = PredictionRules()
