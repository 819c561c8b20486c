"""The arrays that are kept of a task: its Jacobian eigenspectrum, and seconds per step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna_ttp._util.lazy import lazy_names


if TYPE_CHECKING:
    from optuna_ttp.spectrum._spectrum import check_truncation
    from optuna_ttp.spectrum._spectrum import Probe
    from optuna_ttp.spectrum._spectrum import Spectrum
    from optuna_ttp.spectrum._spectrum import SpectrumMetadata
    from optuna_ttp.spectrum._spectrum import Validation
    from optuna_ttp.spectrum._spectrum import write_whole
    from optuna_ttp.spectrum._step_timing import measure_throughput
    from optuna_ttp.spectrum._throughput import learned_throughput
    from optuna_ttp.spectrum._throughput import Throughput


__all__ = [
    "Probe",
    "Spectrum",
    "SpectrumMetadata",
    "Throughput",
    "Validation",
    "check_truncation",
    "learned_throughput",
    "measure_throughput",
    "write_whole",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "_spectrum": (
            "check_truncation",
            "Probe",
            "Spectrum",
            "SpectrumMetadata",
            "Validation",
            "write_whole",
        ),
        "_step_timing": ("measure_throughput",),
        "_throughput": (
            "learned_throughput",
            "Throughput",
        ),
    },
)
