"""Numbers that predictions were tuned with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PredictionRules:
    """When predictions give up, and how carefully they simulate.

    Attributes:
        hopeless_stability:
            A learning rate above so many times the largest stable one diverges for sure. Above the
            limit a network first goes through a loss spike, and most recover from it up to several
            times the limit, where their curvature has dropped (Lewkowycz et al., 2020, arXiv
            2003.02218). Chosen after the fact: at eight times the limit four of six runs of the
            demo's network still came to 15 % of their initial loss
            (``benchmarks/accuracy/results/digits.csv``).
        unreliable_sd:
            A prediction that trials have corrected is unreliable where the standard deviation of
            its logarithm is larger than this. Not ablated yet.
        margin:
            Simulations go on for so many horizons where trials have corrected the times. Not
            ablated yet.
        most_log_slack:
            Simulations without corrections go on for at most this factor's logarithm longer than
            the horizon. Not ablated yet.
        patience:
            What the response surface gave up is simulated for so many times as long. Not ablated
            yet.
        few_steps:
            Times of fewer steps are compared at smaller learning rates, because a difference of
            one step would be one of more than three percent.
        surface_trace:
            The share of the trace that the eigenpairs of the response surface hold. The surface
            ranks candidates; it does not promise times.
        settled_subset_sd:
            Standard deviation of the logarithm of a time to a share of the curve's end, where only
            a subset of the samples is in the spectrum: both ends of the curve move, mostly
            together. Not ablated yet.
        short_run_shares:
            Learning rates that a short training run chooses from, over the largest stable one. Not
            ablated yet.
        short_run_instability:
            What the product of these shares and the kernel's growth may come to. Not ablated yet.
        most_rise:
            A short training run ends where its loss is so many times the initial one.
    """

    hopeless_stability: float = 8.0
    unreliable_sd: float = 0.4
    margin: float = 1.5
    most_log_slack: float = 3.0
    patience: float = 20.0
    few_steps: int = 32
    surface_trace: float = 0.95
    settled_subset_sd: float = 0.2
    short_run_shares: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
    short_run_instability: float = 0.3
    most_rise: float = 100.0


RULES = PredictionRules()
