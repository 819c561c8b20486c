"""The key of a stored spectrum: its task and the settings that shape its arrays."""

from __future__ import annotations

from collections.abc import Callable
import hashlib
import json
from typing import Any

from optuna_ttp.spectrum import check_truncation
from optuna_ttp.spectrum import Spectrum


# The settings that change the arrays; device, memory and other settings do not.
SETTING_DEFAULTS: dict[str, Any] = {
    "engine": "exact",
    "dtype": "float32",
    "rank": None,
    "explained_trace": None,
    "seed": 0,
    "max_sketch_width": 32768,
    "max_columns": None,
}
# Engines of version 0.1.0, whose spectra can still be read.
_SKETCHES = ("sketch", "refined_sketch")
_WHOLE_NUMBERS = ("rank", "seed", "max_sketch_width", "max_columns")
# Settings that only some engines read.
_ONLY_FOR: dict[str, tuple[str, ...]] = {
    "seed": ("columns", "matrix_free", *_SKETCHES),
    "max_sketch_width": _SKETCHES,
    "max_columns": ("columns",),
}


def complete(settings: dict[str, Any]) -> dict[str, Any]:
    """Return all settings by name as plain Python values.

    A setting that is missing, or that the engine does not read, has its default. Raises TypeError
    if one is unknown, ValueError if one is out of its range.
    """
    unknown = sorted(set(settings) - set(SETTING_DEFAULTS))
    if unknown:
        raise TypeError(
            f"The settings of a stored spectrum are {', '.join(SETTING_DEFAULTS)} but got "
            f"{', '.join(unknown)}."
        )
    for name in ("engine", "dtype"):
        if not isinstance(settings.get(name, ""), str):
            raise TypeError(f"{name} must be a name but got {settings[name]!r}.")
    check_truncation(settings.get("rank"), settings.get("explained_trace"))
    # NumPy's numbers, which JSON does not know, name the same spectrum as Python's.
    kinds: dict[str, Callable[[Any], Any]] = dict.fromkeys(_WHOLE_NUMBERS, int)
    kinds["explained_trace"] = float
    plain = {k: kinds[k](v) if k in kinds and v is not None else v for k, v in settings.items()}
    every = {**SETTING_DEFAULTS, **plain}
    unused = {k for k, engines in _ONLY_FOR.items() if every["engine"] not in engines}
    return {k: SETTING_DEFAULTS[k] if k in unused else v for k, v in every.items()}


def key(fingerprint: str, settings: dict[str, Any]) -> str:
    """Return the key of a row, 64 hexadecimal digits, for a task's fingerprint and settings.

    Only settings that differ from their defaults are part of it, so that a version with one more
    setting still finds the stored spectra.
    """
    changed = {k: v for k, v in complete(settings).items() if v != SETTING_DEFAULTS[k]}
    text = json.dumps([fingerprint, changed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_settings(spectrum: Spectrum, settings: dict[str, Any]) -> None:
    """Raise ValueError if a spectrum was not computed with settings it is to be stored under."""
    actual: dict[str, Any] = {"engine": spectrum.metadata.engine, "dtype": spectrum.metadata.dtype}
    if spectrum.metadata.seed is not None:
        actual["seed"] = spectrum.metadata.seed
    for name, value in actual.items():
        if settings.get(name, value) != value:
            raise ValueError(
                f"The spectrum was computed with {name}={value!r} but got {name}="
                f"{settings[name]!r} to store it under."
            )
    width, widest = spectrum.metadata.sketch_width, settings.get("max_sketch_width")
    if width is not None and widest is not None and width > widest:
        raise ValueError(
            f"The sketch has width {width} but got max_sketch_width={widest} to store it under."
        )
    rank = settings.get("rank")
    # The matrix-free engine has Ritz pairs beside the eigenpairs.
    if rank is not None and spectrum.rank - spectrum.metadata.n_ritz > rank:
        raise ValueError(
            f"The spectrum has rank {spectrum.rank} but got rank={rank} to store it under. "
            "Truncate it first."
        )
