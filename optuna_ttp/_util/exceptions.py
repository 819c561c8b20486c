"""Exceptions and warnings of this package, so that users can catch or filter them by class.

Wrong arguments raise :exc:`ValueError` or :exc:`TypeError`; the classes here are for conditions
that appear only later. Every warning derives from :class:`OptunaTTPWarning`.
"""

from __future__ import annotations


class OptunaTTPError(Exception):
    """Base class of the exceptions of this package."""


class StoreError(OptunaTTPError):
    """The spectrum store cannot be opened, read or written."""


class StoreVersionError(StoreError):
    """The spectrum store has tables of another version of this package, unknown to this one."""


class DamagedSpectrumError(OptunaTTPError, ValueError):
    """Bytes are no spectrum, were changed after writing, or have another version's format."""


class LearnedConflictError(StoreError):
    """Another worker has stored a newer learned value than the one that was to be replaced."""


class FingerprintMismatchError(OptunaTTPError):
    """A spectrum belongs to another model, data set or loss than the given task."""


class OptunaTTPWarning(UserWarning):
    """Base class of the warnings of this package."""


class DataOrderWarning(OptunaTTPWarning):
    """A data loader shuffles; the samples were taken in a fixed order instead."""


class DamagedSpectrumWarning(OptunaTTPWarning):
    """A stored spectrum is damaged; it was put aside and is computed again."""


class UnreliablePredictionWarning(OptunaTTPWarning):
    """Predictions disagree with observed training, or are an extrapolation."""


class GoalWarning(OptunaTTPWarning):
    """A search's goal is missing, contradicts the study, or differs between sampler and pruner."""


class CallOrderWarning(OptunaTTPWarning):
    """An objective never calls should_prune, or does so before it suggests hyperparameters."""


class UnusableCurveWarning(OptunaTTPWarning):
    """A trial's recorded training loss is unfit to correct predictions with."""


class JacobianMismatchError(OptunaTTPError):
    """Rows of the Jacobian differ from those that plain automatic differentiation computes."""


class ApproximationWarning(OptunaTTPWarning):
    """A sample of the Jacobian's columns, or eigenpairs, are less accurate than they should be."""
