from __future__ import annotations

from dataclasses import replace
import hashlib
import io
import os
from pathlib import Path
import pickle
from typing import Any

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
import torch

from optuna_ttp import DamagedSpectrumError
from optuna_ttp import TrainingTimePredictor
from optuna_ttp.spectrum import blob
from optuna_ttp.spectrum import Spectrum
from optuna_ttp.spectrum import Throughput
from optuna_ttp.spectrum import Validation
from optuna_ttp.spectrum._ritz import RULES
from optuna_ttp.spectrum._truncation import n_explaining
from optuna_ttp.task import Loss
from tests.cases import spectrum


def _variants() -> dict[str, Spectrum]:
    weighted = torch.nn.CrossEntropyLoss(torch.tensor([1.0, 0.25, 2.0]), label_smoothing=0.125)
    throughput = Throughput(np.array([2, 8]), np.array([0.25, 0.5]), device="cpu")
    plain = spectrum()
    return {
        "cross-entropy": plain,
        "weighted": spectrum(weighted),
        "mse": spectrum("mse"),
        "throughput": replace(plain, throughput=throughput),
        "single precision": replace(plain, eigenvectors=plain.eigenvectors.astype(np.float32)),
        "foreign name": replace(plain, metadata=replace(plain.metadata, name="Über\n'\"\0")),
        "truncated": plain.truncate(rank=2),
    }


def _assert_same(first: Spectrum, second: Spectrum) -> None:
    for name in ("eigenvalues", "eigenvectors", "initial_outputs", "targets"):
        expected, actual = getattr(first, name), getattr(second, name)
        np.testing.assert_array_equal(actual, expected)
        assert actual.dtype == expected.dtype
    assert first.trace == second.trace
    assert first.loss == second.loss
    assert first.metadata == second.metadata
    assert (first.throughput is None) == (second.throughput is None)
    if first.throughput is not None and second.throughput is not None:
        np.testing.assert_array_equal(first.throughput.batch_sizes, second.throughput.batch_sizes)
        np.testing.assert_array_equal(first.throughput.seconds, second.throughput.seconds)
        assert first.throughput.device == second.throughput.device


@pytest.mark.parametrize("name", _variants())
def test_bytes_and_pickle_keep_everything(name: str) -> None:
    original = _variants()[name]
    _assert_same(original, Spectrum.from_bytes(original.to_bytes()))
    _assert_same(original, pickle.loads(pickle.dumps(original)))


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "mine.spectrum"
    spectrum().save(path)
    _assert_same(spectrum(), Spectrum.load(str(path)))
    assert list(tmp_path.iterdir()) == [path]


def test_save_replaces_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "mine.spectrum"
    spectrum().save(path)
    spectrum("mse").save(path)
    _assert_same(spectrum("mse"), Spectrum.load(path))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="Elsewhere an open file cannot be replaced.")
def test_reader_of_the_old_file_is_not_disturbed(tmp_path: Path) -> None:
    path = tmp_path / "mine.spectrum"
    spectrum().save(path)
    with path.open("rb") as old:
        spectrum("mse").save(path)
        _assert_same(spectrum(), Spectrum.from_bytes(old.read()))


def test_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "mine.spectrum"
    spectrum().save(path)
    unserialisable = replace(spectrum(), metadata=replace(spectrum().metadata, name=object()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not JSON serializable"):
        unserialisable.save(path)
    _assert_same(spectrum(), Spectrum.load(path))
    assert list(tmp_path.iterdir()) == [path]


def test_save_where_it_cannot_replace_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        spectrum().save(folder)
    assert list(tmp_path.iterdir()) == [folder]


def _archive(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=True, **arrays)
    return buffer.getvalue()


def _rewritten(changes: dict[str, Any], arrays: dict[str, Any] | None = None) -> bytes:
    """The bytes of a spectrum with another header and other arrays, and the checksums of those."""
    content = blob.from_bytes(spectrum().to_bytes())
    return blob.to_bytes({**content.meta, **changes}, {**content.arrays, **(arrays or {})})


def _single_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello world, this is no spectrum",
        b"\x80\x04\x95 pickled",
        spectrum().to_bytes()[:200],
        spectrum().to_bytes()[:-100],
        _single_array(),
        _archive(eigenvalues=np.ones(3)),
        _rewritten({"loss": {"kind": "hinge"}}),
        _rewritten({"loss": 3}),
        _rewritten({"metadata": {"unknown": 1}}),
        _rewritten({"trace": None}),
        _rewritten({"throughput_device": "cpu"}),
        _rewritten({"metadata": {**vars(spectrum().metadata), "name": 3}}),
        _rewritten({}, {"foreign": np.zeros(3)}),
        _rewritten({}, {"eigenvalues": np.arange(21, 0, -1)}),
        _rewritten({}, {"targets": np.zeros(11, dtype=int)}),
        _rewritten({}, {"weight_outputs": np.zeros((3, 12))}),
        _rewritten({}, {"decay_factors": np.zeros(20)}),
        _rewritten({}, {"probe.fractions": np.zeros(2)}),
        _rewritten({}, {"probe.other": np.zeros(3)}),
        _rewritten({}, {"validation.features": np.zeros((2, 2))}),
    ],
)
def test_bytes_that_are_no_spectrum_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="These bytes are no spectrum"):
        Spectrum.from_bytes(data)


def test_file_that_is_no_spectrum_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="no spectrum"):
        Spectrum.load(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        Spectrum.load(tmp_path / "missing")


@pytest.mark.parametrize("number", [0, 2, 99])
def test_spectrum_of_another_format_is_refused(number: int) -> None:
    other = bytearray(spectrum().to_bytes())
    n_header = int.from_bytes(other[10:14], "little")
    other[8:10] = number.to_bytes(2, "little")
    other[14:46] = hashlib.sha256(other[8:14] + other[46 : 46 + n_header]).digest()
    message = rf"format 1 but got {number}; another version .* Read it with that version, or comp"
    with pytest.raises(DamagedSpectrumError, match=message):
        Spectrum.from_bytes(bytes(other))


def test_pickled_arrays_are_not_executed() -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return pytest.fail, ("The pickle was executed.",)

    for data in (_archive(targets=np.array([Trap()], dtype=object)), pickle.dumps(Trap())):
        with pytest.raises(ValueError, match="no spectrum"):
            Spectrum.from_bytes(data)


@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
@settings(max_examples=150)
def test_damaged_bytes_are_refused_whatever_byte_it_is(
    position: float, flip: int, cut: bool
) -> None:
    data = bytearray(spectrum().to_bytes())
    index = int(position * len(data))
    if cut:
        del data[index:]
    else:
        data[index] ^= flip
    with pytest.raises(DamagedSpectrumError):
        Spectrum.from_bytes(bytes(data))


# Truncation


def test_truncate_by_rank() -> None:
    whole = spectrum()
    assert whole.rank == 21
    cut = whole.truncate(rank=4)
    np.testing.assert_array_equal(cut.eigenvalues, whole.eigenvalues[:4])
    np.testing.assert_array_equal(cut.eigenvectors, whole.eigenvectors[:, :4])
    assert cut.trace == whole.trace
    assert cut.explained_trace == pytest.approx(whole.eigenvalues[:4].sum() / whole.trace)
    numpy_rank: Any = np.int64(4)
    assert whole.truncate(rank=numpy_rank).rank == 4
    assert whole.truncate(rank=21) is whole
    assert whole.truncate(rank=1000) is whole
    assert whole.truncate() is whole


@given(share=st.floats(1e-6, 1.0))
@settings(max_examples=50)
def test_truncate_by_trace_keeps_the_fewest_that_explain_it(share: float) -> None:
    whole = spectrum()
    cut = whole.truncate(explained_trace=share)
    assert cut.explained_trace >= share - 1e-9
    n_leading = n_explaining(whole.eigenvalues, share * whole.trace)
    if n_leading + RULES.n_pairs >= whole.rank:
        assert cut is whole
        return
    np.testing.assert_array_equal(cut.eigenvalues[:n_leading], whole.eigenvalues[:n_leading])
    # The eigenvalues of this kernel come in threes.
    n_different = len(np.unique(whole.eigenvalues[n_leading:].round(9)))
    assert cut.rank == n_leading + min(RULES.n_pairs, n_different)


def test_truncate_by_both_keeps_the_fewer() -> None:
    whole = spectrum()
    by_trace = whole.truncate(explained_trace=0.5).rank
    assert by_trace == 4 + RULES.n_pairs
    cut = whole.truncate(rank=2, explained_trace=0.5)
    np.testing.assert_array_equal(cut.eigenvalues, whole.eigenvalues[:2])
    assert whole.truncate(rank=by_trace - 1, explained_trace=0.5).rank == by_trace - 1
    assert whole.truncate(rank=20, explained_trace=0.5).rank == by_trace


def test_truncate_cannot_explain_more_than_the_spectrum_holds() -> None:
    cut = spectrum().truncate(rank=2)
    with pytest.raises(ValueError, match=r"explained_trace must be at most 0\.\d+, the share"):
        cut.truncate(explained_trace=0.999)
    assert cut.truncate(explained_trace=cut.explained_trace) is cut


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_what_is_dropped_is_still_learned(loss: str) -> None:
    whole = spectrum(loss, n_samples=40)
    cut = whole.truncate(explained_trace=0.5)
    bare = whole.truncate(rank=cut.rank)
    assert bare.rank == 8
    # Slow full-batch training, which sees the residual along the smallest eigenvalues.
    rate = 0.2 / whole.eigenvalues[0]
    outcomes = [
        TrainingTimePredictor(s, target_fraction=0.7).predict(rate, 40, max_steps=100_000)
        for s in (whole, cut, bare)
    ]
    steps = [float(o.steps) for o in outcomes]
    assert steps[1] == pytest.approx(steps[0], rel=0.005)
    assert steps[2] > 1.1 * steps[0]


def test_validation_and_decay_follow_the_ritz_pairs() -> None:
    whole = spectrum(n_samples=30)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(6 * whole.n_outputs, whole.rank))
    outputs = rng.normal(size=(6, whole.n_outputs))
    held_out = Validation(features, outputs, np.arange(6) % whole.n_outputs)
    whole = replace(whole, validation=held_out, decay_factors=np.full(whole.rank, 3.0))
    cut = whole.truncate(explained_trace=0.6)
    assert cut.validation is not None
    assert cut.decay_factors is not None
    # The cross kernel, applied to the eigenvectors and to their mixtures.
    cross = features * np.sqrt(whole.eigenvalues) @ whole.eigenvectors.T
    expected = cross @ cut.eigenvectors / np.sqrt(cut.eigenvalues)
    np.testing.assert_allclose(cut.validation.features, expected, rtol=1e-9, atol=1e-9)
    # One factor for all directions stays that.
    np.testing.assert_allclose(cut.decay_factors, 3.0)


@pytest.mark.parametrize("rank", [0, -1, 2.5, 3.0, True, float("inf"), float("nan"), "3"])
def test_rank_that_is_no_positive_integer_is_refused(rank: Any) -> None:
    with pytest.raises(ValueError, match="rank must be a positive integer but got"):
        spectrum().truncate(rank=rank)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.0001, float("inf"), float("nan")])
def test_share_of_the_trace_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"explained_trace must be in \(0, 1\] but got"):
        spectrum().truncate(explained_trace=share)


@given(values=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20), share=st.floats(0.0, 1.5))
def test_n_explaining_is_the_smallest_sufficient_count(values: list[float], share: float) -> None:
    descending = np.sort(values)[::-1]
    amount = share * descending.sum()
    n = n_explaining(descending, amount)
    assert 1 <= n <= len(values)
    assert n == len(values) or descending[:n].sum() >= amount * (1 - 1e-9)
    assert n == 1 or descending[: n - 1].sum() < amount


# Wrong arrays


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eigenvectors": np.ones((36, 3))}, "must have shapes"),
        ({"eigenvectors": np.ones((35, 21))}, "must have shapes"),
        ({"initial_outputs": np.zeros(36)}, "must have shapes"),
        ({"targets": np.zeros(11, dtype=int)}, r"targets of a spectrum must have shape \(12,\)"),
        ({"targets": np.zeros((12, 3))}, r"targets of a spectrum must have shape \(12,\)"),
        ({"loss": Loss("mse")}, r"targets of a spectrum must have shape \(12, 3\)"),
        ({"eigenvalues": np.linspace(1, 2, 21)}, "positive and descending"),
        ({"eigenvalues": np.linspace(1, 0, 21)}, "positive and descending"),
        ({"eigenvalues": np.full(21, np.nan)}, "positive and descending"),
        ({"eigenvectors": np.full((36, 21), np.nan)}, "eigenvectors of a spectrum must be finite"),
        ({"initial_outputs": np.full((12, 3), np.inf)}, "initial_outputs of a spectrum must be"),
        ({"eigenvalues": np.ones(0), "eigenvectors": np.ones((36, 0))}, "positive and desc"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(spectrum(), **changes)


def test_repr_and_sizes() -> None:
    one = replace(spectrum(), metadata=replace(spectrum().metadata, name="mine"))
    assert (one.n_samples, one.n_outputs, one.rank) == (12, 3, 21)
    assert repr(one) == (
        "Spectrum(name='mine', n_samples=12, n_outputs=3, rank=21, explained_trace=1.0000)"
    )


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="Not a file that can be replaced"):
        spectrum().save(pipe)
    assert pipe.is_fifo()
