"""The report of a study: one line per trial, and the sums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import field
import math
from typing import Any
from typing import TYPE_CHECKING

from optuna_ttp._util.words import counted
from optuna_ttp.calibration import Calibration
from optuna_ttp.study import Action


if TYPE_CHECKING:
    from optuna_ttp.reporting._ledger_line import LedgerLine


# The number of unusable curves whose reasons are printed.
_SHOWN = 3


@dataclass(frozen=True)
class Report:
    """The predictions, decisions and seconds of a study's trials, by :func:`~optuna_ttp.report`.

    Example:
        >>> ledger = optuna_ttp.report(study)
        >>> print(ledger)
        >>> ledger.saved_seconds

    Attributes:
        records:
            One line per trial, in the order of their numbers. See :meth:`to_dicts`.
        spectrum_seconds:
            Seconds that computing the spectra behind the predictions took, even if they were read
            from a store.
        calibration:
            The accuracy of the study's predictions for the task of the newest trial, and how its
            trials correct them.
        unusable:
            The reasons why training-loss curves could not be used, in words, by trial number.
    """

    records: tuple[LedgerLine, ...]
    spectrum_seconds: float
    calibration: Calibration = field(default_factory=Calibration.none, repr=False)
    unusable: dict[int, str] = field(default_factory=dict)

    @property
    def n_skipped(self) -> int:
        """The number of trials that were skipped because of their prediction."""
        return sum(record.decision == Action.SKIP for record in self.records)

    @property
    def n_stopped(self) -> int:
        """The number of trials that were stopped while they ran, because of their loss curve."""
        return sum(record.decision == Action.STOP for record in self.records)

    @property
    def skipped_by_kind(self) -> dict[str, int]:
        """The number of trials that were skipped or stopped, by the kind of reason."""
        ended = (r for r in self.records if r.decision in (Action.SKIP, Action.STOP))
        return dict(sorted(Counter(r.kind or "other" for r in ended).items()))

    @property
    def n_audited(self) -> int:
        """The number of trials that ran despite an objection and show whether it was right.

        They ran as an audit, in shadow mode, because many trials in a row had been skipped, or
        because predictions were not accurate.
        """
        return sum(record.was_wrong is not None for record in self.records)

    @property
    def n_wrong(self) -> int:
        """The number of audited trials that it would have been wrong to skip."""
        return sum(record.was_wrong is True for record in self.records)

    def wrong_share(self, coverage: float = 0.8) -> tuple[float, float, float]:
        """Estimate the share of trials that it is wrong to skip.

        Args:
            coverage:
                The probability that the interval contains the true share. 0.8 by default.

        Returns:
            The share, and the lower and upper end of its Jeffreys interval (Brown, Cai and
            DasGupta, 2001, section 3.1.2). They are NaN, 0 and 1 if no trial was audited.
        """
        from scipy.stats import beta

        n, k = self.n_audited, self.n_wrong
        if n == 0:
            return math.nan, 0.0, 1.0
        low, high = (
            float(beta.ppf(0.5 + sign * coverage / 2, k + 0.5, n - k + 0.5)) for sign in (-1, 1)
        )
        return k / n, 0.0 if k == 0 else low, 1.0 if k == n else high

    @property
    def saved_sd(self) -> float:
        """Standard deviation of :attr:`saved_seconds`.

        It comes from the differences between the trials that ran in seconds, or in the used share
        of their budgets. It is zero if no trial was skipped, and NaN if fewer than two trials ran.
        """
        deviations = [r.avoided_sd for r in self.records if r.avoided_seconds > 0]
        if not deviations:
            return 0.0
        # All skipped trials share the error of the mean over the trials that ran.
        single = sum(sd**2 for sd in deviations)
        common = sum(deviations) ** 2 / max(self._n_ran, 1)
        return math.sqrt(single + common)

    @property
    def _n_ran(self) -> int:
        return sum(
            r.decision != Action.SKIP and math.isfinite(r.paid_seconds) for r in self.records
        )

    @property
    def paid_seconds(self) -> float:
        """Seconds that the finished trials took, including those of their predictions."""
        return _sum(record.paid_seconds for record in self.records)

    @property
    def prediction_seconds(self) -> float:
        """Seconds spent on predictions."""
        return _sum(record.prediction_seconds for record in self.records)

    @property
    def avoided_seconds(self) -> float:
        """Estimated seconds that the skipped and stopped trials would have taken."""
        return _sum(record.avoided_seconds for record in self.records)

    @property
    def saved_seconds(self) -> float:
        """The avoided seconds minus the seconds of the predictions and of the spectra.

        This is an estimate, because it is unknown when a wrapped pruner, or an objective that ends
        at a NaN, would have stopped the skipped trials. It may be negative.
        """
        return self.avoided_seconds - self.prediction_seconds - self.spectrum_seconds

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return one dictionary per trial, with the attributes of its line, for a data frame."""
        return [dict(vars(record)) for record in self.records]

    def __str__(self) -> str:
        return "\n".join([*self._table(), *self._summary()])

    def _table(self) -> list[str]:
        """Return the heading and one line for each trial."""
        lines = [
            f"{'trial':>5}  {'state':<8}  {'predicted steps':>15}  {'predicted s':>11}  "
            f"{'paid s':>8}  {'value':>9}  decision"
        ]
        for r in self.records:
            steps = _number(r.predicted_steps, ",.0f") if r.outcome == "converges" else r.outcome
            lines.append(
                f"{r.number:>5}  {r.state:<8}  {(steps or '-').replace('_', ' '):>15}  "
                f"{_number(r.predicted_seconds, '.3g'):>11}  {_number(r.paid_seconds, '.3g'):>8}  "
                f"{_number(r.value, '.4g'):>9}  {_decision(r)}"
            )
        return lines

    def _summary(self) -> list[str]:
        """Return sentences on the decisions, the seconds paid and saved, and the calibration."""
        lines = [
            f"{counted(len(self.records), 'trial')}: {self.n_skipped} skipped because of their "
            f"prediction, {self.n_stopped} stopped while they ran. They took "
            f"{self.paid_seconds:.1f} s; skipping and stopping avoided about "
            f"{self.avoided_seconds:.1f} s.",
            f"After subtracting the {self.spectrum_seconds:.1f} s of the spectrum and the "
            f"{self.prediction_seconds:.1f} s of the predictions, about {self._saved()}.",
        ]
        if self.n_audited:
            share, low, high = self.wrong_share()
            lines.append(
                f"{self.n_audited} trials ran despite their prediction; skipping {self.n_wrong} "
                f"of them would have been wrong ({share:.0%}, 80 % interval {low:.0%} to "
                f"{high:.0%})."
            )
        if self.calibration.n_observed:
            lines.append(f"Predictions: {self.calibration}.")
        if self.unusable:
            first = [f"trial {n}: {reason}" for n, reason in list(self.unusable.items())[:_SHOWN]]
            more = ["..."] if len(self.unusable) > _SHOWN else []
            count = len(self.unusable)
            lines.append(
                f"Nothing could be learned from {count} training-loss "
                f"{'curve' if count == 1 else 'curves'} ({'; '.join(first + more)})."
            )
        return lines

    def _saved(self) -> str:
        """Return the seconds saved or lost, with their standard deviation, in words."""
        seconds = self.saved_seconds
        text = f"{abs(seconds):.1f} s were {'saved' if seconds >= 0 else 'lost'}"
        sd = self.saved_sd
        return f"{text} (standard deviation {sd:.1f} s)" if sd >= 0.05 else text


def _decision(line: LedgerLine) -> str:
    """Return the decision about a trial and its reason."""
    if line.decision is None:
        return "-"
    # The column of the predicted steps already has the prediction for a trial that runs.
    reason = line.reason.removeprefix("predicted: ").removeprefix("converges: ")
    return f"{line.decision}: {reason}" if reason else line.decision


def _sum(values: Iterable[float]) -> float:
    """Return the sum of the finite values."""
    return float(sum(value for value in values if math.isfinite(value)))


def _number(value: float, form: str) -> str:
    """Return a number in the given format, or a dash if it is not finite."""
    return format(value, form) if math.isfinite(value) else "-"
