from __future__ import annotations

import tracemalloc
from typing import Any

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import numpy as np
import pytest

from optuna_ttp import DamagedSpectrumError
from optuna_ttp.spectrum import blob
from tests import fuzzing


_DTYPES = st.sampled_from(["<f2", "<f4", "<f8", ">f8", "?", "<i1", "<i4", ">i8", "<u1", "<u4"])


@given(
    array=hnp.arrays(_DTYPES.map(np.dtype), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0)),
    fortran=st.booleans(),
)
@settings(max_examples=200)
def test_arrays_come_back_as_they_were(array: Any, fortran: bool) -> None:
    written = np.asarray(array, order="F" if fortran else "C")
    actual = blob.from_bytes(blob.to_bytes({"a": 1}, {"x": written, "y": np.zeros(0)}))
    assert actual.meta == {"a": 1}
    assert set(actual.arrays) == {"x", "y"}
    np.testing.assert_array_equal(actual.arrays["x"], array)
    assert actual.arrays["x"].dtype == array.dtype.newbyteorder("<")
    assert actual.arrays["x"].shape == array.shape
    assert actual.arrays["x"].flags.writeable


@pytest.mark.parametrize(
    "array",
    [
        np.random.default_rng(0).random((900, 1000)),
        np.random.default_rng(0).random((900, 1000)).T,
        np.random.default_rng(0).random((900, 2000))[:, ::2],
        np.random.default_rng(0).integers(10, size=1_000_000),
        np.zeros((1000, 5000)),
        np.random.default_rng(0).random(2 * blob.CHUNK // 8),
    ],
    ids=["C order", "F order", "strided", "integers", "zeros", "two whole chunks"],
)
def test_large_arrays_are_cut_into_chunks(array: Any) -> None:
    pieces = list(blob.write({}, {"x": array}))
    assert len(pieces) == 1 + -(-array.nbytes // blob.CHUNK)
    assert max(map(len, pieces)) <= blob.FRAME
    actual = blob.read(blob.Pieces(pieces), sum(map(len, pieces))).arrays["x"]
    np.testing.assert_array_equal(actual, array)
    if not array.flags.c_contiguous:
        assert actual.flags.f_contiguous == array.flags.f_contiguous


def test_what_shrinks_is_compressed_and_what_does_not_is_not() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(10, size=100_000)
    noise = generator.standard_normal((1000, 100)).astype(np.float32)
    assert len(blob.to_bytes({}, {"x": labels})) < 0.2 * labels.nbytes
    assert noise.nbytes < len(blob.to_bytes({}, {"x": noise})) < noise.nbytes + 1000
    # More than this is never compressed: a few bytes could ask for much memory.
    huge = np.zeros(blob.MOST_COMPRESSED // 8 + 1)
    assert sum(map(len, blob.write({}, {"x": huge}))) > huge.nbytes


def test_writing_and_reading_hold_little_more_than_the_array() -> None:
    array = np.random.default_rng(0).random((1000, 8000))[:, ::-1]
    tracemalloc.start()
    for piece in blob.write({}, {"x": array}):
        assert piece
    assert tracemalloc.get_traced_memory()[1] < 8 * blob.FRAME
    tracemalloc.stop()
    pieces = list(blob.write({}, {"x": array}))
    tracemalloc.start()
    blob.read(blob.Pieces(pieces), sum(map(len, pieces)))
    assert tracemalloc.get_traced_memory()[1] < array.nbytes + 2 * blob.FRAME
    tracemalloc.stop()


@pytest.mark.parametrize("array", [np.array([object()]), np.array(["text"]), np.ones(2) * 1j])
def test_what_is_no_array_of_numbers_is_refused(array: Any) -> None:
    with pytest.raises(TypeError, match="must hold numbers but got dtype"):
        blob.to_bytes({}, {"x": array})


def test_headers_have_a_limit() -> None:
    with pytest.raises(ValueError, match="header must have at most"):
        blob.to_bytes({"a": "x" * 2**20}, {})
    with pytest.raises(ValueError, match="header must have at most"):
        blob.to_bytes({}, {str(i): np.zeros(1) for i in range(4097)})


def test_meta_data_are_read_alone() -> None:
    data = blob.to_bytes({"a": 1}, {"x": np.zeros(10)})
    assert blob.read_meta(blob.Pieces([data])) == {"a": 1}
    with pytest.raises(DamagedSpectrumError):
        blob.read_meta(blob.Pieces([data[:20]]))


def test_pieces_of_any_length_are_one_stream() -> None:
    data = bytes(range(200))
    for n_bytes in (1, 3, 7, 200):
        stream = blob.Pieces([data[:5], b"", data[5:6], data[6:150], data[150:]])
        read = b"".join(iter(lambda s=stream, n=n_bytes: bytes(s.read(n)), b""))  # type: ignore[misc]
        assert read == data


# benchmarks/store/fuzz.py does this ten thousand times.
@given(fuzzed=fuzzing.blobs())
@settings(max_examples=600)
def test_damaged_and_hostile_blobs_are_refused(fuzzed: fuzzing.Blob) -> None:
    fuzzing.read(fuzzed)
