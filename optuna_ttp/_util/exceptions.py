"""Exceptions and warnings of this package, so that users can catch or filter them by class.

Wrong arguments raise :exc:`ValueError` or :exc:`TypeError`; the classes here are for what can only
be found out later. Every warning derives from :class:`OptunaTTPWarning`.
"""

from __future__ import annotations


class OptunaTTPError(Exception):
    """Base class of the exceptions of this package."""


class StoreError(OptunaTTPError):
    """The spectrum store cannot be opened, read or written."""


class StoreVersionError(StoreError):
    """The spectrum store was made by a newer version of this package."""


class DamagedSpectrumError(OptunaTTPError, ValueError):
    """Bytes are no spectrum, not as they were written, or of a newer format."""


class LearnedConflictError(StoreError):
    """Another worker stored what it learned of a task in between."""


class FingerprintMismatchError(OptunaTTPError):
    """A spectrum belongs to another model, data set or loss than the task at hand."""


class OptunaTTPWarning(UserWarning):
    """Base class of the warnings of this package."""


class DataOrderWarning(OptunaTTPWarning):
    """A data loader shuffles; the samples were taken in a fixed order instead."""


class DamagedSpectrumWarning(OptunaTTPWarning):
    """A stored spectrum is damaged; it was put aside and is computed again."""


class UnreliablePredictionWarning(OptunaTTPWarning):
    """Predictions disagree with observed training, or rest on an extrapolation."""


class UnusableCurveWarning(OptunaTTPWarning):
    """A trial's recorded training loss cannot be learned from."""


class JacobianMismatchError(OptunaTTPError):
    """Rows of the Jacobian differ from what plain automatic differentiation gives."""


class ApproximationWarning(OptunaTTPWarning):
    """A sketch of the Jacobian is less accurate than it should be."""
