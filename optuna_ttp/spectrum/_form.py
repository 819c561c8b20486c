"""A spectrum as a JSON header and named arrays, which is how :mod:`.blob` writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optuna_ttp.spectrum._low_rank_layer import LowRankLayer
from optuna_ttp.spectrum._metadata import SpectrumMetadata
from optuna_ttp.spectrum._probe import Probe
from optuna_ttp.spectrum._sampled_jacobian import SampledJacobian
from optuna_ttp.spectrum._saturation import Saturation
from optuna_ttp.spectrum._throughput import Throughput
from optuna_ttp.spectrum._validation import Validation
from optuna_ttp.task import Loss


def header_and_arrays(
    spectrum: Mapping[str, Any], note: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return a file's JSON header (with ``note``) and named arrays for a spectrum's fields."""
    throughput = spectrum["throughput"]
    header: dict[str, Any] = {
        "trace": spectrum["trace"],
        "loss": asdict(spectrum["loss"]),
        "metadata": asdict(spectrum["metadata"]),
        "throughput_device": None if throughput is None else throughput.device,
    }
    if note is not None:
        header["note"] = dict(note)
    required = ("eigenvalues", "eigenvectors", "initial_outputs", "targets")
    arrays: dict[str, NDArray[Any]] = {key: spectrum[key] for key in required}
    for key in ("weight_outputs", "decay_factors"):
        if spectrum[key] is not None:
            arrays[key] = spectrum[key]
    for prefix in ("validation", "probe"):
        part = spectrum[prefix]
        for key, value in (vars(part) if part is not None else {}).items():
            arrays[f"{prefix}.{key}"] = value
    if spectrum["jacobian"] is not None:
        # A header without this entry is one of a spectrum without columns.
        header["parameter_names"] = list(spectrum["jacobian"].names)
        for key, value in vars(spectrum["jacobian"]).items():
            if isinstance(value, np.ndarray):
                arrays[f"jacobian.{key}"] = value
    for k, layer in enumerate(spectrum["low_rank"]):
        for key, value in vars(layer).items():
            if value is not None:
                arrays[f"low_rank.{k}.{key}"] = value
    if spectrum["saturation"] is not None:
        header["saturation_reason"] = spectrum["saturation"].reason
        for key, value in vars(spectrum["saturation"]).items():
            if key != "reason":
                arrays[f"saturation.{key}"] = value
    if throughput is not None:
        arrays["throughput_batch_sizes"] = throughput.batch_sizes
        arrays["throughput_seconds"] = throughput.seconds
    return header, arrays


def spectrum_fields(header: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Return a spectrum's fields by name from a file's header and arrays.

    Arrays of throughput and of the optional parts are removed from ``arrays``. Missing, unknown or
    unfit parts raise AttributeError, KeyError, TypeError or ValueError.
    """
    loss = dict(header["loss"])
    if loss["class_weights"] is not None:
        loss["class_weights"] = tuple(loss["class_weights"])
    throughput = None
    if header["throughput_device"] is not None:
        throughput = Throughput(
            arrays.pop("throughput_batch_sizes"),
            arrays.pop("throughput_seconds"),
            _of_kind("str", "throughput_device", header["throughput_device"]),
        )
    validation, probe, jacobian, saturation = (
        _part(name, arrays) for name in ("validation", "probe", "jacobian", "saturation")
    )
    for name in ("eigenvalues", "eigenvectors", "initial_outputs"):
        if arrays[name].dtype.kind != "f":
            raise ValueError(f"{name} must be floats but got {arrays[name].dtype}")
    kinds = {field.name: str(field.type) for field in fields(SpectrumMetadata)}
    metadata = {k: _of_kind(kinds.get(k, ""), k, v) for k, v in header["metadata"].items()}
    return {
        "trace": float(header["trace"]),
        "validation": Validation(**validation) if validation else None,
        "probe": Probe(**probe) if probe else None,
        "jacobian": SampledJacobian(names=tuple(header["parameter_names"]), **jacobian)
        if jacobian
        else None,
        "low_rank": _low_rank_layers(arrays),
        "saturation": Saturation(
            reason=_of_kind("str", "saturation_reason", header["saturation_reason"]), **saturation
        )
        if saturation
        else None,
        "loss": Loss(**loss),
        "throughput": throughput,
        "metadata": SpectrumMetadata(**metadata),
        **arrays,
    }


def _part(name: str, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Remove the arrays ``"{name}.key"`` of a part such as ``"probe"``; return them by ``key``."""
    keys = sorted(key for key in arrays if key.startswith(f"{name}."))
    return {key.removeprefix(f"{name}."): arrays.pop(key) for key in keys}


def _low_rank_layers(arrays: dict[str, NDArray[Any]]) -> tuple[LowRankLayer, ...]:
    """Remove the arrays ``"low_rank.{k}.key"`` of layers k = 0, 1, ...; return the layers."""
    layers: list[LowRankLayer] = []
    while part := _part(f"low_rank.{len(layers)}", arrays):
        layers.append(LowRankLayer(**part))
    return tuple(layers)


def _of_kind(kind: str, name: str, value: Any) -> Any:
    """Return the value; raise TypeError if ``kind``, "str", "int" or "float", is not its type."""
    expected: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (float, int)}
    if not isinstance(value, expected.get(kind, (object,))):
        raise TypeError(f"{name} must be a {kind} but got {type(value).__name__}")
    return value
