"""Computation of the eigenpairs of the empirical neural tangent kernel (NTK) of a task.

With outputs ``f`` of shape ``(N, C)`` and trainable weights ``w`` of shape ``(D,)``, the Jacobian
is ``J = df/dw`` of shape ``(N C, D)`` and the empirical neural tangent kernel
``Theta = J J^T``, of shape ``(N C, N C)``; row ``n C + c`` belongs to output ``c`` of sample
``n`` (Zancato et al., NeurIPS 2020, eq. 2).
"""

from __future__ import annotations

from optuna_ttp.ntk._compute import compute_spectrum
from optuna_ttp.ntk._devices import resolve_device
from optuna_ttp.ntk._plan import LayerPlan
from optuna_ttp.ntk._plan import SpectrumPlan
from optuna_ttp.ntk._planning import plan_spectrum
from optuna_ttp.ntk._probe import probe_linearisation
from optuna_ttp.ntk._processes import by_first
from optuna_ttp.ntk._processes import check_same_task
from optuna_ttp.ntk._processes import in_all
from optuna_ttp.ntk._saturation import measure_saturation
from optuna_ttp.ntk.engines._checkpoint import KernelCheckpoint
from optuna_ttp.ntk.engines._choice import column_limit
from optuna_ttp.ntk.engines._choice import resolve_engine
from optuna_ttp.ntk.engines._eigenpairs import Eigenpairs
from optuna_ttp.ntk.engines._eigenpairs import eigenpairs
from optuna_ttp.ntk.engines._exact import exact_kernel
from optuna_ttp.ntk.engines._kernel import Kernel


__all__ = [
    "Eigenpairs",
    "Kernel",
    "KernelCheckpoint",
    "LayerPlan",
    "SpectrumPlan",
    "by_first",
    "check_same_task",
    "column_limit",
    "compute_spectrum",
    "eigenpairs",
    "exact_kernel",
    "in_all",
    "measure_saturation",
    "plan_spectrum",
    "probe_linearisation",
    "resolve_device",
    "resolve_engine",
]
