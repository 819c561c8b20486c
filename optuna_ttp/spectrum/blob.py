"""The binary form of named arrays: versioned, checksummed, read with bounded memory, no pickle.

Integers are little-endian. A blob is a head and, array after array, its chunks::

    head    8 bytes   the magic number  89 54 54 50 0D 0A 1A 0A
            2 bytes   format, 1
            4 bytes   length L of the header
            32 bytes  SHA-256 of format, length and header
            L bytes   header: JSON, {"meta": {...}, "arrays": [{"name", "dtype", "shape", "order",
                      "codec"}, ...]}
    chunk   4 bytes   length M of the stored bytes
            32 bytes  SHA-256 of the head's SHA-256, the chunk's number (8 bytes) and the M bytes
            M bytes   the bytes of at most 2 MiB of the array, as they are ("raw") or by zlib

Chunks follow each other in the arrays' order in memory (``"C"`` or ``"F"``) without gaps, so that
their sizes follow from the header. A chunk's digest names the head and the place it belongs to:
no bit, no length and no order can change unnoticed. Only small arrays that shrink are compressed
(floats of eigenvectors shrink by 7 % at 25 MB/s, which does not pay), so that a short forged blob
cannot make a reader allocate more than :data:`MOST_COMPRESSED` bytes.
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
FORMAT = 1
CHUNK = 2 * 2**20
"""The maximum number of an array's bytes in one chunk."""
MOST_COMPRESSED = 64 * 2**20
"""The maximum total number of bytes, uncompressed, of the compressed arrays of one blob."""
_MOST_HEADER = 2**20
_MOST_ARRAYS = 4096
_MOST_DIMENSIONS = 8
_FIXED_HEAD = struct.Struct("<8sHI32s")
_CHUNK_HEAD = struct.Struct("<I32s")
FRAME = _CHUNK_HEAD.size + CHUNK
"""The number of bytes of the largest piece that :func:`write` yields."""
_DTYPES = frozenset(
    np.dtype(code).str
    for code in ("<f2", "<f4", "<f8", "|b1", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2", "<u4")
)


@dataclass(frozen=True)
class CompressionRules:
    """The settings that decide which arrays are compressed.

    Attributes:
        sample_bytes:
            Bytes at the beginning of an array that are compressed as a test. A choice
            of speed: it decides if an array is compressed, and changes none.
        most_shrunk:
            An array is compressed if that sample shrinks to less than this share: labels and
            masks do, floats of eigenvectors shrink by 7 % only.
    """

    sample_bytes: int = 2**16
    most_shrunk: float = 0.75


RULES = CompressionRules()


class Readable(Protocol):
    """The stream that :func:`read` takes: an open file, or chunks of a database."""

    def read(self, n_bytes: int, /) -> bytes | memoryview:
        """Return the next ``n_bytes`` bytes, fewer only at the end of the stream."""
        ...


@dataclass(frozen=True, eq=False)
class Blob:
    """The content of a blob: a JSON object, and arrays by name."""

    meta: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


class Digest:
    """The SHA-256 of the SHA-256 digests of a blob's pieces, which names it by its content.

    The digests of the pieces are needed as checksums anyway, so that no byte is hashed twice.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, piece: bytes) -> None:
        """Add ``piece``, the SHA-256 of the blob's next piece (the head or a chunk)."""
        self._hash.update(piece)

    def hexdigest(self) -> str:
        """Return the digest of all pieces added so far, 64 hexadecimal digits."""
        return self._hash.hexdigest()


def write(
    meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], digest: Digest | None = None
) -> Iterator[bytes]:
    """Yield the pieces of a blob, at most :data:`FRAME` bytes each: the head, then the chunks.

    No more than one chunk is copied at a time, whatever the arrays' order in memory. The pieces'
    SHA-256 are added to ``digest``. Raises TypeError if an array holds no numbers or the meta data
    are not JSON, ValueError if the header is too long or there are too many arrays.
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
            chunk_digest = _chunk_digest(binding, number, stored)
            digest.add(chunk_digest)
            yield b"".join((_CHUNK_HEAD.pack(len(stored), chunk_digest), stored))
            number += 1


def read(stream: Readable, n_bytes: int, digest: Digest | None = None) -> Blob:
    """Read the blob that :func:`write` wrote from a stream of ``n_bytes`` bytes.

    Arrays are allocated only if ``n_bytes`` can hold them. The pieces' SHA-256 are added to
    ``digest``. Raises DamagedSpectrumError if a bit has changed, or the format is unknown.
    """
    try:
        return _read(stream, n_bytes, Digest() if digest is None else digest)
    except (struct.error, zlib.error, RecursionError, MemoryError) as error:
        raise DamagedSpectrumError(f"{type(error).__name__} while reading it") from error


def to_bytes(meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return a blob, as :func:`write` yields it, in one piece."""
    return b"".join(write(meta, arrays))


def from_bytes(data: bytes | memoryview) -> Blob:
    """Read a blob in memory, as :func:`read` does."""
    return read(Pieces([data]), len(data))


class Pieces:
    """A readable stream of pieces of bytes, each of which is fetched when it is needed."""

    def __init__(self, pieces: Iterable[bytes | memoryview]) -> None:
        self._pieces = iter(pieces)
        self._current = memoryview(b"")

    def read(self, n_bytes: int, /) -> bytes | memoryview:
        """Return the next ``n_bytes`` bytes, fewer at the end; not copied if in one piece."""
        parts: list[memoryview] = []
        while n_bytes:
            if not self._current:
                following = next(self._pieces, None)
                if following is None:
                    break
                self._current = memoryview(following)
                continue
            part, self._current = self._current[:n_bytes], self._current[n_bytes:]
            parts.append(part)
            n_bytes -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


@dataclass(frozen=True)
class _Layout:
    """An array's entry in a blob's header: its type, shape, order in memory and compression."""

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
    """Return only the JSON object of a blob, read from the beginning of a stream."""
    try:
        return _read_head(stream)[0]
    except (struct.error, RecursionError) as error:
        raise DamagedSpectrumError(f"{type(error).__name__} while reading it") from error


def _read(stream: Readable, n_bytes: int, digest: Digest) -> Blob:
    """Read a blob as :func:`read` does, except that errors of struct and zlib are not caught."""
    meta, layouts, binding, n_head = _read_head(stream)
    _check_lengths(layouts, n_bytes - n_head)
    digest.add(binding)
    arrays: dict[str, NDArray[Any]] = {}
    number = 0
    for layout in layouts:
        empty = _empty(layout)
        target = empty.reshape(-1, order="A").view(np.uint8).data
        for begin in range(0, layout.n_bytes, CHUNK):
            n_piece = min(CHUNK, layout.n_bytes - begin)
            target[begin : begin + n_piece] = _read_chunk(
                stream, layout, n_piece, binding, number, digest
            )
            number += 1
        arrays[layout.name] = empty
    if len(stream.read(1)):
        raise DamagedSpectrumError("there are bytes behind its end")
    return Blob(meta, arrays)


def _empty(layout: _Layout) -> NDArray[Any]:
    """Return an uninitialised array of a layout; raise DamagedSpectrumError if NumPy refuses."""
    try:
        return np.empty(layout.shape, layout.dtype, order="F" if layout.order == "F" else "C")
    except ValueError as error:
        raise DamagedSpectrumError(f"the array {layout.name!r:.50}: {error}") from error


def _read_head(stream: Readable) -> tuple[dict[str, Any], list[_Layout], bytes, int]:
    """Return the meta data, the arrays' layouts, the head's SHA-256 and its length in bytes."""
    fixed = bytes(stream.read(_FIXED_HEAD.size))
    magic, written_as, length, binding = _FIXED_HEAD.unpack(fixed)
    if magic != MAGIC:
        raise DamagedSpectrumError("they do not begin with the magic number of one")
    if length > _MOST_HEADER:
        raise DamagedSpectrumError(f"its header must have at most 1 MiB but got {length} bytes")
    text = bytes(stream.read(length))
    if hashlib.sha256(fixed[8:14] + text).digest() != binding:
        raise DamagedSpectrumError("the checksum of its header does not match")
    # Checked after the checksum: a flipped bit in the format is damage, not another version.
    if written_as != FORMAT:
        raise DamagedSpectrumError(
            f"it must have format {FORMAT} but got {written_as}; another version of optuna_ttp "
            "wrote it. Read it with that version, or compute the spectrum again"
        )
    try:
        header = json.loads(text)
        meta = header["meta"]
        layouts = [_layout(entry) for entry in header["arrays"]]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise DamagedSpectrumError(f"its header cannot be read: {error}") from error
    if not isinstance(meta, dict) or len(layouts) > _MOST_ARRAYS:
        raise DamagedSpectrumError(
            f"its header must hold an object and at most {_MOST_ARRAYS} arrays but got "
            f"{type(meta).__name__} and {len(layouts)}"
        )
    if len({layout.name for layout in layouts}) != len(layouts):
        raise DamagedSpectrumError("two of its arrays have the same name")
    return meta, layouts, binding, len(fixed) + length


def _layout(entry: dict[str, Any]) -> _Layout:
    """Return the layout in an array's header entry; raise ValueError if the entry is malformed."""
    if set(entry) != {"name", "dtype", "shape", "order", "codec"}:
        raise ValueError("an array's entry has other keys")
    name, dtype, shape = entry["name"], entry["dtype"], entry["shape"]
    if not isinstance(name, str) or dtype not in _DTYPES:
        raise ValueError(f"the array {name!r:.50} has the unknown type {dtype!r:.50}")
    if not (
        isinstance(shape, list)
        and len(shape) <= _MOST_DIMENSIONS
        and all(type(length) is int and 0 <= length < 2**62 for length in shape)
    ):
        raise ValueError(f"the array {name!r:.50} has an impossible shape")
    if entry["order"] not in ("C", "F") or entry["codec"] not in ("raw", "zlib"):
        raise ValueError(f"the array {name!r:.50} has an unknown order or codec")
    return _Layout(name, dtype, tuple(shape), entry["order"], entry["codec"])


def _check_lengths(layouts: list[_Layout], n_left: int) -> None:
    """Raise DamagedSpectrumError if the arrays do not fit the ``n_left`` bytes after the head."""
    compressed = sum(layout.n_bytes for layout in layouts if layout.codec == "zlib")
    if compressed > MOST_COMPRESSED:
        raise DamagedSpectrumError(
            f"its compressed arrays must have at most {MOST_COMPRESSED} bytes but got {compressed}"
        )
    raw = sum(layout.n_bytes for layout in layouts if layout.codec == "raw")
    least = raw + _CHUNK_HEAD.size * sum(layout.n_chunks for layout in layouts)
    if n_left < least or (compressed == 0 and n_left != least):
        raise DamagedSpectrumError(
            f"its header describes {least} bytes of arrays but {n_left} are there"
        )


def _read_chunk(
    stream: Readable, layout: _Layout, n_bytes: int, binding: bytes, number: int, digest: Digest
) -> bytes | memoryview:
    """Read chunk ``number``, check its length and SHA-256, and return its ``n_bytes`` of array."""
    length, expected = _CHUNK_HEAD.unpack(stream.read(_CHUNK_HEAD.size))
    # Bytes that zlib cannot compress become longer by a few bytes only.
    if (length != n_bytes) if layout.codec == "raw" else (length > n_bytes + 2**10):
        raise DamagedSpectrumError(f"a chunk of {layout.name!r:.50} has another length")
    stored = stream.read(length)
    actual = _chunk_digest(binding, number, stored)
    if len(stored) != length or actual != expected:
        raise DamagedSpectrumError(f"a checksum of {layout.name!r:.50} does not match")
    digest.add(actual)
    if layout.codec == "raw":
        return stored
    inflating = zlib.decompressobj()
    piece = inflating.decompress(stored, n_bytes + 1)
    if len(piece) != n_bytes or not inflating.eof or inflating.unused_data:
        raise DamagedSpectrumError(f"a chunk of {layout.name!r:.50} has another length")
    return piece


def _chunk_digest(binding: bytes, number: int, stored: bytes | memoryview) -> bytes:
    """Return the SHA-256 of ``binding`` (the head's SHA-256), a chunk's number and its bytes."""
    digest = hashlib.sha256(binding + struct.pack("<Q", number))
    digest.update(stored)
    return digest.digest()


def _head(meta: Mapping[str, Any], layouts: list[_Layout]) -> tuple[bytes, bytes]:
    """Return a blob's head, and its SHA-256, which is part of every chunk's checksum."""
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
    """Return the array with little-endian numbers; raise TypeError if it holds no numbers."""
    if array.dtype.kind not in "fbiu" or array.dtype.newbyteorder("<").str not in _DTYPES:
        raise TypeError(f"The array {name!r} must hold numbers but got dtype {array.dtype}.")
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _in_memory_order(array: NDArray[Any]) -> tuple[NDArray[Any], str]:
    """Return the array and ``"C"``, or the transpose of a column-major array and ``"F"``."""
    if array.flags.f_contiguous and not array.flags.c_contiguous:
        return array.T, "F"
    return array, "C"


def _codec(array: NDArray[Any], budget: int) -> str:
    """Return ``"zlib"`` for an array of at most ``budget`` bytes that shrinks, else ``"raw"``."""
    if not 0 < array.nbytes <= budget:
        return "raw"
    sample = next(_pieces(array, RULES.sample_bytes))
    shrunk = len(zlib.compress(sample, 1))
    return "zlib" if shrunk < RULES.most_shrunk * len(sample) else "raw"


def _pieces(array: NDArray[Any], n_bytes: int = CHUNK) -> Iterator[memoryview]:
    """Yield the array's bytes in C order, ``n_bytes`` at a time; the last piece may be shorter."""
    if array.nbytes == 0:
        return
    if array.flags.c_contiguous:
        flat = array.reshape(-1).view(np.uint8).data
        for start in range(0, len(flat), n_bytes):
            yield flat[start : start + n_bytes]
        return
    buffer = bytearray()
    n_rows = max(1, n_bytes * len(array) // array.nbytes)
    for start in range(0, len(array), n_rows):
        buffer += np.ascontiguousarray(array[start : start + n_rows]).tobytes()
        while len(buffer) >= n_bytes:
            yield memoryview(bytes(buffer[:n_bytes]))
            del buffer[:n_bytes]
    if buffer:
        yield memoryview(bytes(buffer))
