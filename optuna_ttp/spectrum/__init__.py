"""The stored arrays of a task: its Jacobian eigenspectrum, and its seconds per training step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna_ttp._util.lazy import lazy_names


if TYPE_CHECKING:
    from optuna_ttp.spectrum._low_rank_layer import LowRankLayer
    from optuna_ttp.spectrum._metadata import SpectrumMetadata
    from optuna_ttp.spectrum._probe import Probe
    from optuna_ttp.spectrum._sampled_jacobian import SampledJacobian
    from optuna_ttp.spectrum._saturation import Saturation
    from optuna_ttp.spectrum._spectrum import Spectrum
    from optuna_ttp.spectrum._step_timing import measure_throughput
    from optuna_ttp.spectrum._throughput import learned_throughput
    from optuna_ttp.spectrum._throughput import Throughput
    from optuna_ttp.spectrum._truncation import check_truncation
    from optuna_ttp.spectrum._validation import Validation
    from optuna_ttp.spectrum._whole_file import write_whole


__all__ = [
    "LowRankLayer",
    "Probe",
    "SampledJacobian",
    "Saturation",
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
        "_low_rank_layer": ("LowRankLayer",),
        "_metadata": ("SpectrumMetadata",),
        "_probe": ("Probe",),
        "_sampled_jacobian": ("SampledJacobian",),
        "_saturation": ("Saturation",),
        "_spectrum": ("Spectrum",),
        "_step_timing": ("measure_throughput",),
        "_throughput": (
            "learned_throughput",
            "Throughput",
        ),
        "_truncation": ("check_truncation",),
        "_validation": ("Validation",),
        "_whole_file": ("write_whole",),
    },
)
