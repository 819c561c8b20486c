"""Damaged and forged blobs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
import hashlib
import json
import struct
import tracemalloc
from typing import Any

from hypothesis import strategies as st
import numpy as np

from optuna_ttp import DamagedSpectrumError
from optuna_ttp.spectrum import blob
from optuna_ttp.spectrum import Spectrum
from tests.cases import spectrum


# Numbers and texts that sizes, types and names are not.
_HOSTILE: list[Any] = [
    *(None, True, -1, 0, 1, 2**31, 2**62 - 1, 2**62, 2**64, 10**30, 0.5, float("inf")),
    *("", "x" * 1000, "|O", "<f8", ">f8", "<i8", "<c16", "|V8", "\0", "raw", "zlib", "F", "C"),
    *([], {}, [[]], [2**40], [2**40, 0], [0], [1] * 9, {"a": 1}),
]


@dataclass(frozen=True)
class Blob:
    """Bytes, and how they were made."""

    kind: str
    data: bytes


def blobs() -> st.SearchStrategy[Blob]:
    """Bytes that are not what was written."""
    return st.one_of(
        st.builds(_flipped, st.integers(0, 8 * len(_written()) - 1)),
        st.builds(_cut, st.floats(0, 1, exclude_max=True)),
        st.builds(_spliced, st.floats(0, 1), st.binary(min_size=1, max_size=40), st.booleans()),
        st.builds(_moved, st.floats(0, 1), st.floats(0, 1), st.integers(1, 3000)),
        st.builds(_other_header, st.lists(st.integers(0, 10**6), min_size=3, max_size=3)),
        st.builds(_signed_anew, st.lists(st.integers(0, 10**6), min_size=3, max_size=3)),
        st.builds(_raw_header, st.binary(max_size=200)),
        st.builds(lambda data: Blob("any bytes", data), st.binary(max_size=300)),
    )


def read(fuzzed: Blob) -> str:
    """Read it and return what came of it; anything but a refusal or the same arrays is an error.

    A hostile writer may sign whatever it likes. What it signs is refused, or a spectrum that is
    whole in itself.
    """
    data = fuzzed.data
    tracemalloc.start()
    try:
        read_back = Spectrum.from_bytes(data)
    except DamagedSpectrumError:
        return "refused"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # Reading a whole one takes a multiple of its few kilobytes.
        assert peak < 2**21 + 64 * len(data), f"{peak} bytes of memory for {len(data)}"
    if data == _written():
        return "unchanged"
    if fuzzed.kind == "signed anew":
        assert np.isfinite(read_back.eigenvectors).all()
        return "a spectrum"
    raise AssertionError("Damaged bytes were read.")


@cache
def _written() -> bytes:
    return spectrum().to_bytes()


def _flipped(bit: int) -> Blob:
    data = bytearray(_written())
    data[bit // 8] ^= 1 << bit % 8
    return Blob("flipped bit", bytes(data))


def _cut(share: float) -> Blob:
    return Blob("cut", _written()[: int(share * len(_written()))])


def _spliced(share: float, foreign: bytes, instead: bool) -> Blob:
    data = _written()
    at = int(share * len(data))
    return Blob("spliced", data[:at] + foreign + data[at + instead * len(foreign) :])


def _moved(source: float, target: float, n_bytes: int) -> Blob:
    data = bytearray(_written())
    begin, end = int(source * len(data)), int(target * len(data))
    piece = data[begin : begin + n_bytes]
    data[end : end + len(piece)] = piece
    return Blob("moved", bytes(data))


def _other_header(choices: list[int]) -> Blob:
    """Another header with the right checksum, before the chunks of the old one."""
    data = _written()
    length = struct.unpack("<I", data[10:14])[0]
    header = _changed(json.loads(data[46 : 46 + length]), choices)
    return Blob("other header", _head(header) + data[46 + length :])


def _signed_anew(choices: list[int]) -> Blob:
    """Another header, and chunks with checksums that belong to it."""
    data = _written()
    length = struct.unpack("<I", data[10:14])[0]
    header = json.loads(data[46 : 46 + length])
    changed = _changed(header, choices)
    head = _head(changed)
    signed, rest, number = [head], memoryview(data)[46 + length :], 0
    while rest:
        length = struct.unpack("<I", rest[:4])[0]
        stored = bytes(rest[36 : 36 + length])
        digest = hashlib.sha256(head[14:46] + struct.pack("<Q", number) + stored).digest()
        signed.append(rest[:4].tobytes() + digest + stored)
        rest, number = rest[36 + length :], number + 1
    return Blob("signed anew", b"".join(signed))


def _raw_header(text: bytes) -> Blob:
    prefix = struct.pack("<HI", blob.FORMAT, len(text))
    return Blob("raw header", blob.MAGIC + prefix + hashlib.sha256(prefix + text).digest() + text)


def _head(header: Any) -> bytes:
    text = json.dumps(header).encode()
    prefix = struct.pack("<HI", blob.FORMAT, len(text))
    return blob.MAGIC + prefix + hashlib.sha256(prefix + text).digest() + text


def _changed(header: Any, choices: list[int]) -> Any:
    """One value somewhere in it is replaced, or left out."""
    places = list(_places(header))
    container, key = places[choices[0] % len(places)]
    if choices[1] % 8 == 0:
        del container[key]
    else:
        container[key] = _HOSTILE[choices[2] % len(_HOSTILE)]
    return header


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)
