"""Nystrom's approximation of a kernel from its products with some vectors."""

from __future__ import annotations

import torch


def nystrom(
    vectors: torch.Tensor, images: torch.Tensor, n_wanted: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return orthonormal eigenvectors ``U`` and eigenvalues of ``Y (V^T Y)^(-1) Y^T``, descending.

    ``vectors`` are ``V``, ``(n, p)``, with orthonormal columns; ``images`` are ``Y = Theta V``.
    The third result is ``W`` with ``U = Y W`` up to rounding; at most ``n_wanted`` pairs are
    returned. The eigenvalues are those of the small matrix ``L^(-1) Y^T Y L^(-T)`` with ``L L^T =
    V^T Y``. ValueError is raised if ``Y`` is not finite.
    """
    check_overflow(images)
    inner, squares = vectors.T @ images, images.T @ images
    inner = (inner + inner.T) / 2
    # The images were computed in single precision: a smaller shift may leave no Cholesky root.
    shift = 1e-6 * float(torch.linalg.matrix_norm(squares, 2)) ** 0.5
    identity = torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    root = torch.linalg.cholesky(inner + shift * identity)
    squares = squares + 2.0 * shift * inner + shift**2 * identity
    half = torch.linalg.solve_triangular(root, squares, upper=False)
    small = torch.linalg.solve_triangular(root, half.T, upper=False)
    values, mixing = torch.linalg.eigh((small + small.T) / 2)
    values, mixing = values.flip(0)[:n_wanted], mixing.flip(1)[:, :n_wanted]
    values = values.clamp(min=shift)
    weights = torch.linalg.solve_triangular(root.T, mixing, upper=True) / values.sqrt()
    return images @ weights + vectors @ (shift * weights), values - shift, weights


def check_overflow(images: torch.Tensor) -> None:
    """Raise ValueError if ``images``, products with the kernel, are not finite."""
    if not torch.isfinite(images).all():
        raise ValueError(
            "The kernel must be finite but overflowed. Scale the inputs, or compute with "
            'dtype="float64".'
        )
