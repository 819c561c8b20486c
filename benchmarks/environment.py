"""Where a measurement was made."""

from __future__ import annotations

from datetime import datetime
from datetime import timezone
import importlib.metadata
import os
from pathlib import Path
import platform
import resource
import sys
from typing import Any


_PLACES = ("--store", "--output", "--curves", "--peers", "--peers-jax", "--recordings")


def environment() -> dict[str, Any]:
    """Return date, machine, versions and the command, for the results' files."""
    # Not every environment whose memory is measured has it.
    import torch

    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": " ".join(["python", "-m", _module_name(), *_arguments()]),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{
            name: importlib.metadata.version(name)
            for name in ("optuna_ttp", "optuna", "torch", "numpy", "scipy")
        },
    }


def peak_memory() -> int:
    """Return the largest memory that this process has had so far, in bytes.

    What ``getrusage`` has begins with the memory of the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _module_name() -> str:
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    return Path(sys.argv[0]).stem if spec is None else str(spec.name)


def _arguments() -> list[str]:
    """The command's, without where files lie, which is everybody's own."""
    shown: list[str] = []
    for before, argument in zip(["", *sys.argv[1:]], sys.argv[1:], strict=False):
        if argument not in _PLACES and before not in _PLACES:
            shown.append(argument)
    return shown


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
