"""The training loss, its settings, and its targets as plain arrays."""

from __future__ import annotations

from dataclasses import dataclass
import math
from typing import Any
from typing import Literal
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from numpy.typing import NDArray
    import torch


_HINT = (
    'Use "cross_entropy", "mse", torch.nn.CrossEntropyLoss (weight, label_smoothing) or '
    "torch.nn.MSELoss, each with reduction='mean'."
)


@dataclass(frozen=True)
class Loss:
    """A training loss, averaged over the batch the way PyTorch does it.

    Both kinds reduce to two arrays, see :meth:`soft_targets`: with outputs ``f`` of shape
    ``(N, C)`` the cross-entropy of a batch is ``-sum_i sum_c q_ic log softmax(f_i)_c / sum_i n_i``
    with soft targets ``q`` and normalisers ``n``; the mean squared error is
    ``sum_i mean_c (f_ic - q_ic)^2 / sum_i n_i`` with ``n_i = 1``.

    Args:
        kind:
            ``"cross_entropy"`` or ``"mse"``.
        label_smoothing:
            The smoothing of :class:`torch.nn.CrossEntropyLoss`, in [0, 1). Zero by default.
        class_weights:
            One non-negative weight for each class, as ``weight`` of
            :class:`torch.nn.CrossEntropyLoss`. All classes weigh the same by default.

    Raises:
        ValueError:
            If an argument is out of its range, or belongs to the other kind of loss.
    """

    kind: Literal["cross_entropy", "mse"]
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("cross_entropy", "mse"):
            raise ValueError(f"The loss {self.kind!r} is not supported. {_HINT}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1) but got {self.label_smoothing}.")
        if self.kind == "mse" and (self.label_smoothing or self.class_weights is not None):
            raise ValueError(
                "label_smoothing and class_weights belong to the cross-entropy but got them for "
                "the mean squared error."
            )
        if self.class_weights is not None:
            if not all(math.isfinite(w) and w >= 0 for w in self.class_weights):
                raise ValueError(
                    f"class_weights must be finite and non-negative but got {self.class_weights}."
                )
            if not any(self.class_weights):
                raise ValueError("class_weights must not all be zero.")

    @classmethod
    def from_user(cls, loss: Any) -> Loss:
        """Turn a name, a torch loss module or a :class:`Loss` into a :class:`Loss`.

        Args:
            loss:
                ``"cross_entropy"``, ``"mse"``, a :class:`torch.nn.CrossEntropyLoss`, a
                :class:`torch.nn.MSELoss`, or a :class:`Loss`, which is returned as it is.

        Returns:
            The loss with its settings.

        Raises:
            ValueError:
                If the loss, or one of its settings, is not supported.
            TypeError:
                If it is no loss at all.

        Example:
            >>> Loss.from_user(torch.nn.CrossEntropyLoss(label_smoothing=0.1))
            Loss(kind='cross_entropy', label_smoothing=0.1, class_weights=None)
        """
        import torch

        if isinstance(loss, Loss):
            return loss
        if isinstance(loss, str):
            if loss not in ("cross_entropy", "mse"):
                raise ValueError(f"The loss {loss!r} is not supported. {_HINT}")
            return cls(loss)  # type: ignore[arg-type]
        if type(loss) in (torch.nn.CrossEntropyLoss, torch.nn.MSELoss):
            if loss.reduction != "mean":
                raise ValueError(
                    f"{type(loss).__name__}(reduction={loss.reduction!r}) is not supported. "
                    f"{_HINT}"
                )
            if isinstance(loss, torch.nn.MSELoss):
                return cls("mse")
            if loss.ignore_index != -100:
                raise ValueError(
                    f"CrossEntropyLoss(ignore_index={loss.ignore_index}) is not supported. Leave "
                    f"these samples out of the data. {_HINT}"
                )
            weights = None
            if loss.weight is not None:
                weights = tuple(float(w) for w in loss.weight.detach().cpu().tolist())
            return cls("cross_entropy", float(loss.label_smoothing), weights)
        if isinstance(loss, torch.nn.Module):
            raise ValueError(f"The loss {type(loss).__name__} is not supported. {_HINT}")
        raise TypeError(f"loss must be a name or a torch loss module but got {loss!r}. {_HINT}")

    def soft_targets(
        self, targets: NDArray[Any], n_outputs: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the soft targets ``q`` and the normalisers ``n`` of the class docstring.

        For the cross-entropy with smoothing ``s`` and class weights ``w``,
        ``q_ic = (1 - s) w_{y_i} [c = y_i] + (s / C) w_c`` and ``n_i = w_{y_i}`` (the definition
        of :class:`torch.nn.CrossEntropyLoss`).

        Args:
            targets:
                Class indices of shape ``(N,)`` for the cross-entropy, real values of shape
                ``(N, C)`` for the mean squared error.
            n_outputs:
                The number C of outputs.

        Returns:
            ``q`` of shape ``(N, C)`` and ``n`` of shape ``(N,)``.
        """
        n_samples = len(targets)
        if self.kind == "mse":
            return np.asarray(targets, dtype=np.float64), np.ones(n_samples)
        weights = (
            np.ones(n_outputs) if self.class_weights is None else np.array(self.class_weights)
        )
        labels = np.asarray(targets, dtype=np.int64)
        q = np.tile(self.label_smoothing / n_outputs * weights, (n_samples, 1))
        q[np.arange(n_samples), labels] += (1.0 - self.label_smoothing) * weights[labels]
        return q, weights[labels]

    def residuals(
        self, outputs: NDArray[np.float64], targets: NDArray[Any]
    ) -> NDArray[np.float64]:
        """Return the gradient of the mean loss with respect to the outputs.

        Args:
            outputs:
                The outputs, of shape ``(N, C)``.
            targets:
                The targets as :meth:`soft_targets` takes them.

        Returns:
            The gradient, of shape ``(N, C)``, by the formula of :func:`output_gradients`.
        """
        import torch

        soft_targets, normalisers = self.soft_targets(targets, outputs.shape[1])
        gradients = output_gradients(
            self.kind, *map(torch.as_tensor, (outputs[None], soft_targets, normalisers))
        )
        return np.asarray(gradients[0].numpy())


def output_gradients(
    kind: str, outputs: torch.Tensor, soft_targets: torch.Tensor, normalisers: torch.Tensor
) -> torch.Tensor:
    """Return the gradients of a batch's mean loss in K sets of outputs f, shape ``(K, B, C)``.

    ``((sum_c q_c) softmax(f) - q) / sum n`` for the cross-entropy, ``2 (f - q) / (C sum n)`` for
    the mean squared error, with soft targets q of shape ``(B, C)`` and normalisers n of shape
    ``(B,)``. They are zero if all normalisers are.
    """
    if kind == "mse":
        gradient = (outputs - soft_targets) * (2.0 / outputs.shape[2])
    else:
        gradient = outputs.softmax(dim=2) * soft_targets.sum(dim=1, keepdim=True) - soft_targets
    total = normalisers.sum()
    # PyTorch's weighted mean over a batch of weightless samples is 0/0; here its gradient is zero.
    return gradient / total if total > 0 else gradient * 0.0
