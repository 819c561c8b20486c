"""Other libraries' ways to the empirical NTK, each as its documentation has it.

Every function takes a model in evaluation mode and inputs. Those in :data:`KERNELS` return the
kernel of shape ``(N C, N C)`` with row ``n C + c`` for output ``c`` of sample ``n``; those in
:data:`EIGENVALUES` its largest :data:`N_EIGENVALUES` eigenvalues, descending, and never see the
kernel; those in :data:`PROJECTIONS` rows of :data:`WIDTH` numbers whose products estimate it.
Libraries are imported inside, because each is only needed for its own measurement.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import eigsh
from scipy.sparse.linalg import LinearOperator
import torch


Array = NDArray[np.floating[Any]]
N_EIGENVALUES = 50
# Numbers a row of a projection.
WIDTH = 4096


def torch_func(model: torch.nn.Module, inputs: torch.Tensor, *, chunk_size: int = 16) -> Array:
    """``vmap(jacrev(f))`` in chunks of samples, one matrix product at the end.

    Args:
        model:
            The network.
        inputs:
            One sample a row.
        chunk_size:
            Samples that are vectorised over together.
    """
    rows = _jacobian(model, inputs, chunk_size)
    return np.asarray((rows @ rows.T).numpy())


def torch_func_by_parameter(
    model: torch.nn.Module, inputs: torch.Tensor, *, chunk_size: int = 4
) -> Array:
    """The tutorial on neural tangent kernels: contracted parameter by parameter.

    Args:
        model:
            The network.
        inputs:
            One sample a row.
        chunk_size:
            Samples that are vectorised over together.
    """
    rows = [j.flatten(2) for j in _jacobians(model, inputs, chunk_size).values()]
    gram: Any = sum(torch.einsum("naf,mbf->namb", j, j) for j in rows)
    n_entries = gram.shape[0] * gram.shape[1]
    return np.asarray(gram.reshape(n_entries, n_entries).numpy())


def torch_func_products(model: torch.nn.Module, inputs: torch.Tensor) -> Array:
    """Lanczos iterations on ``J (J^T v)`` by ``vjp`` and ``jvp`` of the whole batch."""
    parameters = _parameters(model)

    def outputs(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        computed: torch.Tensor = torch.func.functional_call(model, weights, (inputs,))
        return computed

    both: Any = torch.func.vjp(outputs, parameters)
    values, pull = both

    def product(v: NDArray[Any]) -> NDArray[Any]:
        (gradient,) = pull(torch.as_tensor(v).to(values).reshape(values.shape))
        pair: Any = torch.func.jvp(outputs, (parameters,), (gradient,))
        return np.asarray(pair[1].flatten().numpy())

    return _largest(LinearOperator((values.numel(),) * 2, matvec=product, dtype=np.float32))


def _jacobian(model: torch.nn.Module, inputs: torch.Tensor, chunk_size: int) -> torch.Tensor:
    parts = _jacobians(model, inputs, chunk_size)
    return torch.cat([j.flatten(2) for j in parts.values()], 2).flatten(0, 1)


def _jacobians(
    model: torch.nn.Module, inputs: torch.Tensor, chunk_size: int
) -> dict[str, torch.Tensor]:
    def single(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = torch.func.functional_call(model, weights, (x[None],))
        return outputs[0]

    jacobian = torch.func.vmap(torch.func.jacrev(single), (None, 0), chunk_size=chunk_size)
    computed: dict[str, torch.Tensor] = jacobian(_parameters(model), inputs)
    return computed


def _parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def _largest(operator: Any) -> Array:
    n_entries = operator.shape[0]
    start = np.random.default_rng(0).standard_normal(n_entries).astype(operator.dtype)
    values = eigsh(
        operator,
        k=min(N_EIGENVALUES, n_entries - 1),
        v0=start,
        tol=1e-4,
        return_eigenvectors=False,
    )
    return np.asarray(np.sort(values)[::-1])


class _FrozenNorm(torch.nn.Module):
    """Batch norm with frozen statistics as plain arithmetic: TorchJD refuses the real one."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.mean: torch.Tensor
        self.scale: torch.Tensor
        self.weight = torch.nn.Parameter(norm.weight.detach().clone())
        self.bias = torch.nn.Parameter(norm.bias.detach().clone())
        self.register_buffer("mean", norm.running_mean.clone())
        self.register_buffer("scale", (norm.running_var + norm.eps).rsqrt())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normalised = (x - self.mean[:, None, None]) * self.scale[:, None, None]
        outputs: torch.Tensor = normalised * self.weight[:, None, None] + self.bias[:, None, None]
        return outputs


def without_batch_norm(model: torch.nn.Module) -> torch.nn.Module:
    """Replace batch norm by the same arithmetic, in place."""
    for name, child in list(model.named_children()):
        if isinstance(child, torch.nn.BatchNorm2d):
            setattr(model, name, _FrozenNorm(child))
        else:
            without_batch_norm(child)
    return model


def torchjd(model: torch.nn.Module, inputs: torch.Tensor) -> Array:
    """TorchJD's Gramian engine."""
    from torchjd.autogram import Engine

    model = without_batch_norm(model)
    engine = Engine(model, batch_dim=0)
    outputs = model(inputs)
    gramian = engine.compute_gramian(outputs)
    n_entries = outputs.numel()
    return np.asarray(gramian.detach().reshape(n_entries, n_entries).numpy())


def backpack(model: torch.nn.Module, inputs: torch.Tensor) -> Array:
    """BackPACK's per-sample gradients, one backward pass for each output."""
    from backpack import backpack as extensions
    from backpack import extend
    from backpack.extensions import BatchGrad

    model = extend(model)
    outputs = model(inputs)
    rows = []
    for c in range(outputs.shape[1]):
        with extensions(BatchGrad(), retain_graph=True):
            outputs[:, c].sum().backward(retain_graph=True)
        weights: list[Any] = list(model.parameters())
        rows.append(torch.cat([p.grad_batch.flatten(1) for p in weights], 1).detach())
    jacobian = torch.stack(rows, 1).flatten(0, 1)
    return np.asarray((jacobian @ jacobian.T).numpy())


def nngeometry(model: torch.nn.Module, inputs: torch.Tensor) -> Array:
    """NNGeometry's dense Gram matrix of all outputs, in one batch."""
    from nngeometry.gram import GramMatrix

    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs.clone()), batch_size=len(inputs)
    )
    gram = GramMatrix(model, loader, function=lambda x: model(x)).data
    # Outputs come before samples there.
    n_entries = gram.shape[0] * gram.shape[1]
    return np.asarray(gram.permute(1, 0, 3, 2).reshape(n_entries, n_entries).detach().numpy())


def curvlinops(model: torch.nn.Module, inputs: torch.Tensor) -> Array:
    """Lanczos iterations on curvlinops' operators ``J J^T``."""
    from curvlinops import JacobianLinearOperator

    data = [(inputs, torch.zeros(len(inputs)))]
    jacobian = JacobianLinearOperator(
        model, list(model.parameters()), data, check_deterministic=False
    )
    return _largest((jacobian @ jacobian.adjoint()).to_scipy(dtype=np.dtype(np.float32)))


def trak(model: torch.nn.Module, inputs: torch.Tensor) -> Array:
    """TRAK's projector for CPUs, of the rows of all outputs.

    TRAK itself projects the gradient of one number a sample. What is projected here is the whole
    Jacobian, which ``torch.func`` differentiates and which the projector takes as one matrix.
    """
    from trak.projectors import BasicProjector
    from trak.projectors import ProjectionType

    rows = _jacobian(model, inputs, 16)
    projector = BasicProjector(
        grad_dim=rows.shape[1],
        proj_dim=WIDTH,
        seed=0,
        proj_type=ProjectionType.rademacher,
        device=torch.device("cpu"),
    )
    # It does not scale what it projects.
    return np.asarray((projector.project(rows, model_id=0) / WIDTH**0.5).numpy())


Way = Callable[[torch.nn.Module, torch.Tensor], Array]
KERNELS: dict[str, Way] = {
    "torch_func": torch_func,
    "torch_func_by_parameter": torch_func_by_parameter,
    "torchjd": torchjd,
    "backpack": backpack,
    "nngeometry": nngeometry,
}
EIGENVALUES: dict[str, Way] = {
    "torch_func_products": torch_func_products,
    "curvlinops": curvlinops,
}
PROJECTIONS: dict[str, Way] = {"trak": trak}
# What of these does not come with PyTorch, and the distributions' names.
DISTRIBUTIONS = {
    "torchjd": "torchjd",
    "backpack": "backpack-for-pytorch",
    "nngeometry": "nngeometry",
    "curvlinops": "curvlinops-for-pytorch",
    "trak": "traker",
}
