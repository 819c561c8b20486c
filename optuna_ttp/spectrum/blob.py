"""The binary form of named arrays: versioned, checksummed, read with bounded memory, no pickle.

Integers are little-endian. A blob is a head and, array after array, its chunks::

    head    8 bytes   the magic number  89 54 54 50 0D 0A 1A 0A
            2 bytes   format, 4
            4 bytes   length L of the header
            32 bytes  SHA-256 of format, length and header
            L bytes   header: JSON, {"meta": {...}, "arrays": [{"name", "dtype", "shape", "order",
                      "codec"}, ...]}
    chunk   4 bytes   length M of what is stored
            32 bytes  SHA-256 of the head's SHA-256, the chunk's number (8 bytes) and the M bytes
            M bytes   the bytes of at most 2 MiB of the array, as they are ("raw") or by zlib

Chunks follow each other in the arrays' order in memory (``"C"`` or ``"F"``) without gaps, so that
their sizes follow from the header. A chunk's digest names the head and the place it belongs to:
no bit, no length and no order can change unnoticed. Only small arrays that shrink are compressed
(floats of eigenvectors shrink by 7 % at 25 MB/s, which does not pay): a few bytes can never ask
for more than :data:`MOST_COMPRESSED` of memory, and everything larger is as long as it says.

Formats 1 to 3 were NumPy archives; see :mod:`optuna_ttp.spectrum._spectrum`.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
import hashlib
import json
import math
import struct
from typing import Any
from typing import Protocol
import zlib

import numpy as np
from numpy.typing import NDArray

from optuna_ttp._util.exceptions import DamagedSpectrumError


MAGIC = b"\x89TTP\r\n\x1a\n"
FORMAT = 4
CHUNK = 2 * 2**20
"""Bytes of an array in one chunk."""
MOST_COMPRESSED = 64 * 2**20
"""Bytes that the compressed arrays of one blob have together, at most."""
_MOST_HEADER = 2**20
_MOST_ARRAYS = 64
_MOST_DIMENSIONS = 8
_FIXED_HEAD = struct.Struct("<8sHI32s")
_CHUNK_HEAD = struct.Struct("<I32s")
FRAME = _CHUNK_HEAD.size + CHUNK
"""Bytes of the largest piece that :func:`write` gives."""
_DTYPES = frozenset(
    np.dtype(code).str
    for code in ("<f2", "<f4", "<f8", "|b1", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2", "<u4")
)
# Below this a sample of an array must shrink for the whole to be compressed.
_WORTH_COMPRESSING = 0.75
_SAMPLE = 2**16


class Readable(Protocol):
    """What :func:`read` takes: an open file, or chunks of a database."""

    def read(self, size: int, /) -> bytes | memoryview:
        """Return the next bytes, fewer than asked for only at the end."""
        ...


@dataclass(frozen=True, eq=False)
class Blob:
    """What a blob holds.

    Attributes:
        meta:
            The JSON object that goes with the arrays.
        arrays:
            The arrays by name.
    """

    meta: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


class Digest:
    """Names a blob by its content: the SHA-256 of the SHA-256 of its pieces.

    The pieces' own digests are needed anyhow, so that hashing twice is saved. (A NumPy archive of
    an earlier format is one piece without a digest: what names it is its own SHA-256.)
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, piece: bytes) -> None:
        """Take the digest of the next piece.

        Args:
            piece:
                The head's or a chunk's SHA-256.
        """
        self._hash.update(piece)

    def hexdigest(self) -> str:
        """Return the name of what was added so far, 64 hexadecimal digits."""
        return self._hash.hexdigest()


def write(
    meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], digest: Digest | None = None
) -> Iterator[bytes]:
    """Yield the pieces of a blob: the head, then one piece a chunk.

    No more than one chunk is copied at a time, whatever the arrays' order in memory.

    Args:
        meta:
            A JSON object.
        arrays:
            Arrays of numbers or booleans by name.
        digest:
            Is told the digests of the pieces. Nothing is by default.

    Yields:
        Pieces of at most :data:`FRAME` bytes (the head may have up to 1 MiB).

    Raises:
        TypeError:
            If an array is of another kind, or the meta data are not JSON.
        ValueError:
            If the header is too long, or there are too many arrays.
    """
    layouts, plain = [], []
    budget = MOST_COMPRESSED
    for name, array in arrays.items():
        flat, order = _in_memory_order(_little_endian(name, array))
        layout = _Layout(name, flat.dtype.str, array.shape, order, _codec(flat, budget))
        if layout.codec == "zlib":
            budget -= layout.n_bytes
        layouts.append(layout)
        plain.append(flat)
    head, binding = _head(meta, layouts)
    digest = Digest() if digest is None else digest
    digest.add(binding)
    yield head
    number = 0
    for layout, flat in zip(layouts, plain, strict=True):
        for piece in _pieces(flat):
            stored = zlib.compress(piece, 1) if layout.codec == "zlib" else piece
            own = _chunk_digest(binding, number, stored)
            digest.add(own)
            yield b"".join((_CHUNK_HEAD.pack(len(stored), own), stored))
            number += 1


def read(
    stream: Readable, n_bytes: int, digest: Digest | None = None, *, start: bytes = b""
) -> Blob:
    """Read what :func:`write` gave.

    Args:
        stream:
            Where to read.
        n_bytes:
            How many bytes it has. Nothing is allocated that they cannot hold.
        digest:
            Is told the digests of the pieces. Nothing is by default.
        start:
            Bytes that were taken from the stream already, at most those of the magic number.

    Returns:
        The meta data and the arrays.

    Raises:
        DamagedSpectrumError:
            If a bit is not as it was written, or the bytes are no blob of this format.
    """
    try:
        return _read(stream, start, n_bytes, Digest() if digest is None else digest)
    except (struct.error, zlib.error, RecursionError, MemoryError) as error:
        raise DamagedSpectrumError(f"{type(error).__name__} while reading it") from error


def to_bytes(meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return a blob as one piece.

    Args:
        meta:
            A JSON object.
        arrays:
            Arrays by name.

    Returns:
        The blob.
    """
    return b"".join(write(meta, arrays))


def from_bytes(data: bytes | memoryview) -> Blob:
    """Read a blob in memory.

    Args:
        data:
            The blob.

    Returns:
        What it holds.

    Raises:
        DamagedSpectrumError:
            As :func:`read`.
    """
    return read(Pieces([data]), len(data))


class Pieces:
    """Reads one piece after the other as if they were a file.

    Args:
        pieces:
            Bytes, taken when they are needed.
    """

    def __init__(self, pieces: Iterable[bytes | memoryview]) -> None:
        self._pieces = iter(pieces)
        self._current = memoryview(b"")

    def read(self, size: int, /) -> bytes | memoryview:
        """Return the next bytes, without a copy where they are in one piece."""
        parts: list[memoryview] = []
        while size:
            if not self._current:
                following = next(self._pieces, None)
                if following is None:
                    break
                self._current = memoryview(following)
                continue
            part, self._current = self._current[:size], self._current[size:]
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


@dataclass(frozen=True)
class _Layout:
    """How an array lies in the blob."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    order: str
    codec: str

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def n_chunks(self) -> int:
        return -(-self.n_bytes // CHUNK)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "shape": list(self.shape)}


def read_meta(stream: Readable) -> dict[str, Any]:
    """Read the meta data alone.

    Args:
        stream:
            Where to read.

    Returns:
        The JSON object that goes with the arrays.

    Raises:
        DamagedSpectrumError:
            If the bytes are no blob of this format.
    """
    try:
        return _read_head(stream, b"")[0]
    except (struct.error, RecursionError) as error:
        raise DamagedSpectrumError(f"{type(error).__name__} while reading it") from error


def _read(stream: Readable, start: bytes, n_bytes: int, digest: Digest) -> Blob:
    meta, layouts, binding, taken = _read_head(stream, start)
    _check_sizes(layouts, n_bytes - taken)
    digest.add(binding)
    arrays: dict[str, NDArray[Any]] = {}
    number = 0
    for layout in layouts:
        empty = _empty(layout)
        target = empty.reshape(-1, order="A").view(np.uint8).data
        for begin in range(0, layout.n_bytes, CHUNK):
            size = min(CHUNK, layout.n_bytes - begin)
            target[begin : begin + size] = _read_chunk(
                stream, layout, size, binding, number, digest
            )
            number += 1
        arrays[layout.name] = empty
    if len(stream.read(1)):
        raise DamagedSpectrumError("there are bytes behind its end")
    return Blob(meta, arrays)


def _empty(layout: _Layout) -> NDArray[Any]:
    try:
        return np.empty(layout.shape, layout.dtype, order="F" if layout.order == "F" else "C")
    except ValueError as error:
        raise DamagedSpectrumError(f"the array {layout.name!r:.50}: {error}") from error


def _read_head(stream: Readable, start: bytes) -> tuple[dict[str, Any], list[_Layout], bytes, int]:
    fixed = start + bytes(stream.read(_FIXED_HEAD.size - len(start)))
    magic, written_as, length, binding = _FIXED_HEAD.unpack(fixed)
    if magic != MAGIC:
        raise DamagedSpectrumError("it does not begin as one")
    if length > _MOST_HEADER:
        raise DamagedSpectrumError(f"its header must have at most 1 MiB but got {length} bytes")
    text = bytes(stream.read(length))
    if hashlib.sha256(fixed[8:14] + text).digest() != binding:
        raise DamagedSpectrumError("the checksum of its header does not match")
    # After the checksum: a flipped bit in the format is damage, not another version.
    if written_as != FORMAT:
        raise DamagedSpectrumError(
            f"it must have format {FORMAT} or older but got {written_as}; it was written by "
            "another version of optuna_ttp"
        )
    try:
        header = json.loads(text)
        meta = header["meta"]
        layouts = [_layout(entry) for entry in header["arrays"]]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise DamagedSpectrumError(f"its header cannot be read: {error}") from error
    if not isinstance(meta, dict) or len(layouts) > _MOST_ARRAYS:
        raise DamagedSpectrumError("its header has another form")
    if len({layout.name for layout in layouts}) != len(layouts):
        raise DamagedSpectrumError("two of its arrays have the same name")
    return meta, layouts, binding, len(fixed) + length


def _layout(entry: dict[str, Any]) -> _Layout:
    if set(entry) != {"name", "dtype", "shape", "order", "codec"}:
        raise ValueError("an array's entry has other keys")
    name, dtype, shape = entry["name"], entry["dtype"], entry["shape"]
    if not isinstance(name, str) or dtype not in _DTYPES:
        raise ValueError(f"the array {name!r:.50} has the unknown type {dtype!r:.50}")
    if not (
        isinstance(shape, list)
        and len(shape) <= _MOST_DIMENSIONS
        and all(type(size) is int and 0 <= size < 2**62 for size in shape)
    ):
        raise ValueError(f"the array {name!r:.50} has an impossible shape")
    if entry["order"] not in ("C", "F") or entry["codec"] not in ("raw", "zlib"):
        raise ValueError(f"the array {name!r:.50} has an unknown order or codec")
    return _Layout(name, dtype, tuple(shape), entry["order"], entry["codec"])


def _check_sizes(layouts: list[_Layout], n_left: int) -> None:
    """Refuse a header that asks for other sizes than the bytes behind it have."""
    compressed = sum(layout.n_bytes for layout in layouts if layout.codec == "zlib")
    if compressed > MOST_COMPRESSED:
        raise DamagedSpectrumError(
            f"its compressed arrays must have at most {MOST_COMPRESSED} bytes but got {compressed}"
        )
    raw = sum(layout.n_bytes for layout in layouts if layout.codec == "raw")
    least = raw + _CHUNK_HEAD.size * sum(layout.n_chunks for layout in layouts)
    if n_left < least or (compressed == 0 and n_left != least):
        raise DamagedSpectrumError(
            f"its header tells of {least} bytes of arrays but {n_left} are there"
        )


def _read_chunk(
    stream: Readable, layout: _Layout, size: int, binding: bytes, number: int, digest: Digest
) -> bytes | memoryview:
    length, expected = _CHUNK_HEAD.unpack(stream.read(_CHUNK_HEAD.size))
    # What zlib makes longer, it makes longer by a few bytes.
    if (length != size) if layout.codec == "raw" else (length > size + 2**10):
        raise DamagedSpectrumError(f"a chunk of {layout.name!r:.50} has another length")
    stored = stream.read(length)
    own = _chunk_digest(binding, number, stored)
    if len(stored) != length or own != expected:
        raise DamagedSpectrumError(f"a checksum of {layout.name!r:.50} does not match")
    digest.add(own)
    if layout.codec == "raw":
        return stored
    inflating = zlib.decompressobj()
    piece = inflating.decompress(stored, size + 1)
    if len(piece) != size or not inflating.eof or inflating.unused_data:
        raise DamagedSpectrumError(f"a chunk of {layout.name!r:.50} has another length")
    return piece


def _chunk_digest(binding: bytes, number: int, stored: bytes | memoryview) -> bytes:
    own = hashlib.sha256(binding + struct.pack("<Q", number))
    own.update(stored)
    return own.digest()


def _head(meta: Mapping[str, Any], layouts: list[_Layout]) -> tuple[bytes, bytes]:
    header = {"meta": dict(meta), "arrays": [layout.to_json() for layout in layouts]}
    text = json.dumps(header, sort_keys=True).encode()
    if len(text) > _MOST_HEADER or len(layouts) > _MOST_ARRAYS:
        raise ValueError(
            f"The header must have at most {_MOST_HEADER} bytes and {_MOST_ARRAYS} arrays but got "
            f"{len(text)} and {len(layouts)}."
        )
    prefix = struct.pack("<HI", FORMAT, len(text))
    binding = hashlib.sha256(prefix + text).digest()
    return MAGIC + prefix + binding + text, binding


def _little_endian(name: str, array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind not in "fbiu" or array.dtype.newbyteorder("<").str not in _DTYPES:
        raise TypeError(f"The array {name!r} must be one of numbers but got dtype {array.dtype}.")
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _in_memory_order(array: NDArray[Any]) -> tuple[NDArray[Any], str]:
    """The array, transposed where that makes its bytes lie one after the other."""
    if array.flags.f_contiguous and not array.flags.c_contiguous:
        return array.T, "F"
    return array, "C"


def _codec(array: NDArray[Any], budget: int) -> str:
    if not 0 < array.nbytes <= budget:
        return "raw"
    sample = next(_pieces(array, _SAMPLE))
    shrunk = len(zlib.compress(sample, 1))
    return "zlib" if shrunk < _WORTH_COMPRESSING * len(sample) else "raw"


def _pieces(array: NDArray[Any], size: int = CHUNK) -> Iterator[memoryview]:
    """The array's bytes in C order, ``size`` at a time; the last piece may be shorter."""
    if array.nbytes == 0:
        return
    if array.flags.c_contiguous:
        flat = array.reshape(-1).view(np.uint8).data
        for start in range(0, len(flat), size):
            yield flat[start : start + size]
        return
    buffer = bytearray()
    n_rows = max(1, size * len(array) // array.nbytes)
    for start in range(0, len(array), n_rows):
        buffer += np.ascontiguousarray(array[start : start + n_rows]).tobytes()
        while len(buffer) >= size:
            yield memoryview(bytes(buffer[:size]))
            del buffer[:size]
    if buffer:
        yield memoryview(bytes(buffer))


def is_blob(start: bytes | memoryview) -> bool:
    """Return whether bytes begin as a blob of format 4 or newer does.

    Args:
        start:
            At least the first eight bytes.
    """
    return bytes(start[: len(MAGIC)]) == MAGIC
