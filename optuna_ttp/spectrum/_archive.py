"""Spectra as earlier versions wrote them: NumPy archives, formats 1 to 3.

Format 1 knew no weight decay, no validation samples and no probe, format 2 less of a probe.
"""

from __future__ import annotations

import io
import json
import math
from typing import Any
from typing import IO
import zipfile

import numpy as np
from numpy.typing import NDArray

from optuna_ttp._util.exceptions import DamagedSpectrumError


MOST_ARCHIVE = 4 * 2**30
"""Bytes of the longest archive that is read: zip files of this kind end there."""
_READABLE = (1, 2, 3)
# What an honest archive unpacks to: arrays of floats hardly shrink.
_MOST_GROWTH = 16
_ALWAYS_ALLOWED = 16 * 2**20
_MOST_ENTRIES = 64


def read_archive(data: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read header and arrays of an archive, allocating no more than its length can explain.

    Args:
        data:
            The archive.

    Returns:
        The header, and the arrays by name.

    Raises:
        DamagedSpectrumError:
            If it is none, or one of a newer format.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check_sizes(archive, len(data))
            arrays = {
                entry.filename.removesuffix(".npy"): _read_array(archive, entry)
                for entry in archive.infolist()
            }
        header = json.loads(arrays.pop("header").tobytes())
        written_as = header["format"]
    # Foreign or damaged bytes make numpy's, zipfile's and json's parsers raise all sorts.
    except Exception as error:
        raise DamagedSpectrumError(f"{type(error).__name__} while reading them") from error
    if written_as not in _READABLE:
        raise DamagedSpectrumError(
            f"they must have format {_READABLE[-1]} or older but got {written_as}; they were "
            "written by another version of optuna_ttp"
        )
    if written_as < 3:
        # Displacements only; the store probes again.
        arrays = {name: array for name, array in arrays.items() if not name.startswith("probe.")}
    return header, arrays


def _check_sizes(archive: zipfile.ZipFile, n_bytes: int) -> None:
    entries = archive.infolist()
    n_unpacked = sum(entry.file_size for entry in entries)
    if len(entries) > _MOST_ENTRIES or n_unpacked > max(_ALWAYS_ALLOWED, _MOST_GROWTH * n_bytes):
        raise ValueError(f"{len(entries)} entries of {n_unpacked} bytes in {n_bytes} bytes")


def _read_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(entry) as file:
        shape, dtype = _array_header(file)
        if dtype.hasobject:
            raise ValueError("an array of Python objects")
        n_expected = file.tell() + math.prod(shape) * dtype.itemsize
        if n_expected != entry.file_size:
            raise ValueError(f"an array of {n_expected} bytes in {entry.file_size}")
        file.seek(0)
        array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        # The zip's checksum is looked at behind the last byte.
        file.read(1)
    return array


def _array_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, _, dtype = read(file)
    return shape, dtype
