"""How far a network may be from its linearisation, before any trial."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PriorScale:
    """How far a network may be from its linearisation, before any trial."""

    growth: float = 1.0
    """Factor of the prior standard deviation of the kernel's growth."""
    scatter: float = 1.5
    """Factor of what sets a trial apart from the others, as far as is known: the standard
    deviations of its logarithmic times, of what instability adds to them, and of the effects of
    its configuration. That of a usual pretrained network by default."""

    @property
    def scales(self) -> tuple[float, float]:
        """Factors of the variances of calm trials' errors, and of what instability adds."""
        return self.scatter**2, self.scatter**1.5
