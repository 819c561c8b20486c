"""The Jacobian eigenspectrum of a task: plain arrays, all that predictions need."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import fields
from dataclasses import replace
import errno
from numbers import Integral
from numbers import Real
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from optuna_ttp._util.exceptions import DamagedSpectrumError
from optuna_ttp.spectrum import blob
from optuna_ttp.spectrum._archive import MOST_ARCHIVE
from optuna_ttp.spectrum._archive import read_archive
from optuna_ttp.spectrum._ritz import N_RITZ
from optuna_ttp.spectrum._ritz import ritz_pairs
from optuna_ttp.spectrum._throughput import Throughput
from optuna_ttp.task import Loss


@dataclass(frozen=True)
class SpectrumMetadata:
    """Where a spectrum comes from.

    Attributes:
        fingerprint:
            The :attr:`~optuna_ttp.FineTuningTask.fingerprint` of its task.
        name:
            The task's name, for people.
        engine:
            How the Jacobian was contracted.
        dtype:
            Precision of the Jacobian.
        device:
            Where it was computed.
        n_parameters:
            The number D of trainable weights.
        compute_seconds:
            Wall-clock seconds it took, the timing of training steps included.
        created_at:
            When, in ISO 8601, UTC.
        package_version:
            Version of this package.
        torch_version:
            Version of PyTorch.
        sketch_width:
            Numbers that each row of the Jacobian was projected to, or :obj:`None` where it was
            not.
        seed:
            Of the projection, or of where products started; :obj:`None` without either.
        time_error:
            By what share at most the times of gradient flow to half, a quarter and a tenth of the
            loss are off because of the projection nine times in ten, from its four groups. Of a
            refined sketch that of the sketch before, which it is better than. Of the matrix-free
            engine by what share they have changed with its last products. :obj:`None` for the
            exact one.
        n_ritz:
            How many of the pairs are Ritz pairs, which stand for what residuals see of the
            eigenpairs that were dropped or not computed.
        trace_error:
            Standard error of the trace, as a share of it, where it is an estimate: with more
            outputs than products the matrix-free engine makes no rows. :obj:`None` where it is
            exact.
    """

    fingerprint: str
    name: str
    engine: str
    dtype: str
    device: str
    n_parameters: int
    compute_seconds: float
    created_at: str
    package_version: str
    torch_version: str
    sketch_width: int | None = None
    seed: int | None = None
    time_error: float | None = None
    n_ritz: int = 0
    trace_error: float | None = None


@dataclass(frozen=True, eq=False)
class Validation:
    """Samples that are not trained on, as the linearised network sees them.

    Attributes:
        features:
            ``J_v J^T V Lambda^(-1/2)`` with the Jacobian ``J_v`` of the validation samples: the
            cross kernel in the coordinates of the kept eigenpairs; shape ``(N_v C, r)``.
        initial_outputs:
            Outputs of the pretrained model, shape ``(N_v, C)``.
        targets:
            Class indices of shape ``(N_v,)``, or real targets of shape ``(N_v, C)``.
    """

    features: NDArray[np.floating[Any]]
    initial_outputs: NDArray[np.float64]
    targets: NDArray[Any]


@dataclass(frozen=True, eq=False)
class Probe:
    """How far the weights have to go, seen without a step of training.

    See :func:`optuna_ttp.ntk.probe_linearisation`.

    Attributes:
        fractions:
            Training loss of the linearised network over the initial one at P points of its path,
            from 1 downwards; shape ``(P,)``.
        relative_displacements:
            ``|w - w_0| / |w_0|`` there of the weight matrix for which it is largest, usually that
            of the new head; infinite where a matrix starts at zero.
        output_deviations:
            ``|f(w) - f_lin| / |f_lin - f_0|`` there, of the network's own outputs at the displaced
            weights from the linearised ones.
        kernel_ratios:
            ``|J(w)^T u|^2 / |J(w_0)^T u|^2`` there: how much larger the kernel is at the displaced
            weights along the gradient ``u`` of the loss with respect to the linearised outputs.
    """

    fractions: NDArray[np.float64]
    relative_displacements: NDArray[np.float64]
    output_deviations: NDArray[np.float64]
    kernel_ratios: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The largest eigenpairs of the empirical NTK, and the outputs and targets at the start.

    Attributes:
        eigenvalues:
            Of ``Theta = J J^T``, not divided by N; shape ``(r,)``, positive, descending. The last
            few may be Ritz values, see :meth:`truncate`.
        eigenvectors:
            Shape ``(N C, r)``; row ``n C + c`` belongs to output c of sample n.
        trace:
            Trace of the whole kernel, dropped eigenvalues included.
        initial_outputs:
            Outputs of the pretrained model, shape ``(N, C)``.
        targets:
            Class indices of shape ``(N,)``, or real targets of shape ``(N, C)``.
        loss:
            The training loss.
        throughput:
            Seconds per step, or :obj:`None` where it was not measured.
        metadata:
            Where it comes from.
        weight_outputs:
            ``J w_0``, what the weights themselves contribute to the linearised outputs, of shape
            ``(N, C)``: weight decay needs it. :obj:`None` where it was not computed.
        decay_factors:
            With learning-rate multipliers ``c``, ``v_k^T J c^2 J^T v_k / lambda_k``, of shape
            ``(r,)``: the multiplier with which weight decay acts on each eigen-direction.
            :obj:`None` where all are one.
        validation:
            The validation samples, or :obj:`None` where the task has none.
        probe:
            How far the network is from its linearisation, or :obj:`None` where it was not probed.
    """

    eigenvalues: NDArray[np.float64]
    eigenvectors: NDArray[np.floating[Any]]
    trace: float
    initial_outputs: NDArray[np.float64]
    targets: NDArray[Any]
    loss: Loss
    throughput: Throughput | None
    metadata: SpectrumMetadata
    weight_outputs: NDArray[np.float64] | None = None
    decay_factors: NDArray[np.float64] | None = None
    validation: Validation | None = None
    probe: Probe | None = None

    def __post_init__(self) -> None:
        shape = self.initial_outputs.shape
        if len(shape) != 2 or self.eigenvectors.shape != (shape[0] * shape[1], self.rank):
            raise ValueError(
                "The arrays of a spectrum must have shapes (r,), (N C, r) and (N, C) but got "
                f"{self.eigenvalues.shape}, {self.eigenvectors.shape} and {shape}."
            )
        expected = (shape[0],) if self.loss.kind == "cross_entropy" else shape
        if self.targets.shape != expected:
            raise ValueError(
                f"The targets of a spectrum must have shape {expected} but got "
                f"{self.targets.shape}."
            )
        if not (self.rank and self.eigenvalues[-1] > 0 and (np.diff(self.eigenvalues) <= 0).all()):
            raise ValueError("The eigenvalues must be positive and descending.")
        for name in ("eigenvalues", "eigenvectors", "initial_outputs"):
            if not _is_finite(getattr(self, name)):
                raise ValueError(f"The {name} of a spectrum must be finite.")
        self._check_optional_arrays(shape)

    def _check_optional_arrays(self, shape: tuple[int, ...]) -> None:
        found: dict[str, tuple[NDArray[Any] | None, tuple[int, ...]]] = {
            "weight_outputs": (self.weight_outputs, shape),
            "decay_factors": (self.decay_factors, (self.rank,)),
        }
        if self.validation is not None:
            outputs = self.validation.initial_outputs
            size = (int(np.prod(outputs.shape)), self.rank)
            found["validation.features"] = (self.validation.features, size)
            found["validation.initial_outputs"] = (outputs, (len(outputs), shape[1]))
        if self.probe is not None:
            points = self.probe.fractions.shape
            found.update({f"probe.{k}": (v, points) for k, v in vars(self.probe).items()})
        for name, (array, expected) in found.items():
            if array is not None and array.shape != expected:
                raise ValueError(
                    f"The array {name} of a spectrum must have shape {expected} but got "
                    f"{array.shape}."
                )

    def __repr__(self) -> str:
        error = self.metadata.trace_error
        uncertain = "" if error is None else f", trace is an estimate to {error:.1%}"
        return (
            f"Spectrum(name={self.metadata.name!r}, n_samples={self.n_samples}, "
            f"n_outputs={self.n_outputs}, rank={self.rank}, "
            f"explained_trace={self.explained_trace:.4f}{uncertain})"
        )

    @property
    def rank(self) -> int:
        """The number r of eigenpairs that are kept."""
        return len(self.eigenvalues)

    @property
    def n_samples(self) -> int:
        """The number N of samples."""
        return int(self.initial_outputs.shape[0])

    @property
    def n_outputs(self) -> int:
        """The number C of outputs."""
        return int(self.initial_outputs.shape[1])

    @property
    def explained_trace(self) -> float:
        """The share of the kernel's trace that the kept eigenvalues hold."""
        return min(1.0, float(self.eigenvalues.sum()) / self.trace)

    def truncate(
        self, *, rank: int | None = None, explained_trace: float | None = None
    ) -> Spectrum:
        """Return a spectrum with fewer eigenpairs.

        Args:
            rank:
                Keep at most so many. All by default.
            explained_trace:
                Keep the fewest that hold this share of the trace, and beside them, as far as the
                rank allows, the four Ritz pairs that stand for what the initial residual sees of
                the others, see :func:`~optuna_ttp.spectrum._ritz.ritz_pairs`. All by default.

        Returns:
            A new spectrum; this one where nothing is dropped.

        Raises:
            ValueError:
                If a setting is out of its range, or more of the trace is asked for than is kept.
        """
        check_truncation(rank, explained_trace)
        n_kept = self.rank if rank is None else min(rank, self.rank)
        if explained_trace is not None:
            if explained_trace > self.explained_trace + 1e-6:
                raise ValueError(
                    f"explained_trace must be at most {self.explained_trace:.6f}, what this "
                    f"spectrum holds, but got {explained_trace}. Compute it again with more."
                )
            n_needed = n_explaining(self.eigenvalues, explained_trace * self.trace)
            # Where the others are so few they stay as they are.
            if n_needed < n_kept and n_needed + N_RITZ < self.rank:
                return self._condensed(n_needed, min(N_RITZ, n_kept - n_needed))
        if n_kept == self.rank:
            return self
        validation = self.validation
        if validation is not None:
            validation = replace(validation, features=validation.features[:, :n_kept])
        n_ritz = max(0, self.metadata.n_ritz - (self.rank - n_kept))
        return replace(
            self,
            metadata=replace(self.metadata, n_ritz=n_ritz),
            eigenvalues=self.eigenvalues[:n_kept],
            eigenvectors=self.eigenvectors[:, :n_kept],
            validation=validation,
            decay_factors=None if self.decay_factors is None else self.decay_factors[:n_kept],
        )

    def _condensed(self, n_kept: int, n_ritz: int) -> Spectrum:
        """Leading eigenpairs, and Ritz pairs for the others."""
        residual = self.loss.residuals(self.initial_outputs, self.targets).ravel()
        rest = self.eigenvalues[n_kept:]
        others = self.eigenvectors[:, n_kept:]
        values, mixing = ritz_pairs(rest, residual @ others, n_ritz)

        def mixed(columns: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
            new = np.concatenate([columns[:, :n_kept], columns[:, n_kept:] @ mixing], axis=1)
            return new.astype(columns.dtype)

        validation = self.validation
        if validation is not None:
            # They are the cross kernel over the root of the eigenvalue.
            cross = mixed(validation.features * np.sqrt(self.eigenvalues))
            kept = np.concatenate([self.eigenvalues[:n_kept], values])
            validation = replace(validation, features=cross / np.sqrt(kept).astype(cross.dtype))
        decay = self.decay_factors
        if decay is not None:
            # Of each direction alone, as they are kept.
            shares = np.square(mixing) * rest[:, None] / values
            decay = np.concatenate([decay[:n_kept], decay[n_kept:] @ shares])
        return replace(
            self,
            metadata=replace(self.metadata, n_ritz=len(values)),
            eigenvalues=np.concatenate([self.eigenvalues[:n_kept], values]),
            eigenvectors=mixed(self.eigenvectors),
            validation=validation,
            decay_factors=decay,
        )

    def to_pieces(
        self, digest: blob.Digest | None = None, *, note: Mapping[str, Any] | None = None
    ) -> Iterator[bytes]:
        """Yield the spectrum in the form of :mod:`optuna_ttp.spectrum.blob`, a few MiB at a time.

        Args:
            digest:
                Is told what names the content. Nothing is by default.
            note:
                A JSON object to keep with it, for
                :func:`optuna_ttp.spectrum.blob.read_meta`. None by default.

        Yields:
            Bytes. Joined they are what :meth:`to_bytes` gives.
        """
        header: dict[str, Any] = {
            "trace": self.trace,
            "loss": asdict(self.loss),
            "metadata": asdict(self.metadata),
            "throughput_device": None if self.throughput is None else self.throughput.device,
        }
        if note is not None:
            header["note"] = dict(note)
        arrays: dict[str, NDArray[Any]] = {
            "eigenvalues": self.eigenvalues,
            "eigenvectors": self.eigenvectors,
            "initial_outputs": self.initial_outputs,
            "targets": self.targets,
        }
        for key in ("weight_outputs", "decay_factors"):
            if getattr(self, key) is not None:
                arrays[key] = getattr(self, key)
        for prefix, part in (("validation", self.validation), ("probe", self.probe)):
            for key, value in (vars(part) if part is not None else {}).items():
                arrays[f"{prefix}.{key}"] = value
        if self.throughput is not None:
            arrays["throughput_batch_sizes"] = self.throughput.batch_sizes
            arrays["throughput_seconds"] = self.throughput.seconds
        return blob.write(header, arrays, digest)

    def to_bytes(self) -> bytes:
        """Return the spectrum in the form of :mod:`optuna_ttp.spectrum.blob`; without pickle."""
        return b"".join(self.to_pieces())

    @classmethod
    def from_stream(
        cls, stream: blob.Readable, n_bytes: int, digest: blob.Digest | None = None
    ) -> Spectrum:
        """Read what :meth:`to_pieces` gave, without holding it twice.

        Args:
            stream:
                An open file, or :class:`~optuna_ttp.spectrum.blob.Pieces`.
            n_bytes:
                How many bytes it has.
            digest:
                Is told what names the content. Nothing is by default.

        Returns:
            The spectrum.

        Raises:
            DamagedSpectrumError:
                If the bytes are no spectrum, or one of a newer format.
        """
        digest = blob.Digest() if digest is None else digest
        start = bytes(stream.read(len(blob.MAGIC)))
        try:
            if blob.is_blob(start):
                content = blob.read(stream, n_bytes, digest, start=start)
                header, arrays = content.meta, content.arrays
            else:
                rest = max(0, min(n_bytes, MOST_ARCHIVE + 1) - len(start))
                data = start + bytes(stream.read(rest))
                digest.add(data)
                header, arrays = read_archive(data)
            return _assembled(header, arrays)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DamagedSpectrumError(f"These bytes are no spectrum: {error}") from error

    @classmethod
    def from_bytes(cls, data: bytes) -> Spectrum:
        """Read what :meth:`to_bytes` wrote, this version's or an older one's.

        Args:
            data:
                The bytes.

        Returns:
            The spectrum.

        Raises:
            DamagedSpectrumError:
                If the bytes are no spectrum, or one of a newer format. It is a
                :exc:`ValueError`, too.
        """
        return cls.from_stream(blob.Pieces([data]), len(data))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the spectrum to a file, replacing it as a whole or not at all.

        Workers that cannot reach the database of a :class:`~optuna_ttp.SpectrumStore`, such as
        those of Optuna's gRPC proxy, read it with :meth:`load`.

        Args:
            path:
                Where to write.
        """
        write_whole(Path(path), self.to_pieces())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Spectrum:
        """Read a file that :meth:`save` wrote.

        Args:
            path:
                Where to read.

        Returns:
            The spectrum.

        Raises:
            DamagedSpectrumError:
                If the file is no spectrum.
        """
        with Path(path).open("rb") as file:
            return cls.from_stream(file, os.fstat(file.fileno()).st_size)


def _is_finite(array: NDArray[Any]) -> bool:
    # Block by block: a mask of the whole would be a quarter of a large array again.
    rows = max(1, 2**20 * len(array) // max(1, array.size))
    return all(
        bool(np.isfinite(array[start : start + rows]).all())
        for start in range(0, len(array), rows)
    )


def write_whole(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file that is there as a whole or not at all, whatever happens.

    Args:
        path:
            Where to write. What is there is replaced.
        pieces:
            The content.
    """
    # Path(".") has no name to derive another one from.
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        # Replacing a device or a pipe would take it away from everybody.
        raise OSError(errno.EINVAL, "Not a file that can be replaced", str(path))
    partial = path.with_name(f"{path.name}.{os.getpid()}.{uuid4().hex[:8]}.partial")
    try:
        with partial.open("xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            # Else a power cut may leave the new name with nothing behind it.
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _assembled(header: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Spectrum:
    """Make a spectrum of what was read. Missing, foreign or unfit parts raise all sorts."""
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
    parts = {
        name: {
            key.partition(".")[2]: arrays.pop(key)
            for key in sorted(arrays)
            if key.startswith(f"{name}.")
        }
        for name in ("validation", "probe")
    }
    for name in ("eigenvalues", "eigenvectors", "initial_outputs"):
        if arrays[name].dtype.kind != "f":
            raise ValueError(f"{name} must be floats but got {arrays[name].dtype}")
    kinds = {field.name: str(field.type) for field in fields(SpectrumMetadata)}
    return Spectrum(
        trace=float(header["trace"]),
        validation=Validation(**parts["validation"]) if parts["validation"] else None,
        probe=Probe(**parts["probe"]) if parts["probe"] else None,
        loss=Loss(**loss),
        throughput=throughput,
        metadata=SpectrumMetadata(
            **{k: _of_kind(kinds.get(k, ""), k, v) for k, v in header["metadata"].items()}
        ),
        **arrays,
    )


def _of_kind(kind: str, name: str, value: Any) -> Any:
    expected: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (float, int)}
    if not isinstance(value, expected.get(kind, (object,))):
        raise TypeError(f"{name} must be a {kind} but got {type(value).__name__}")
    return value


def check_truncation(rank: int | None, explained_trace: float | None) -> None:
    """Refuse a rank below 1 and a share of the trace outside (0, 1].

    Args:
        rank:
            The most eigenpairs to keep, or :obj:`None`.
        explained_trace:
            The share of the trace to keep, or :obj:`None`.

    Raises:
        ValueError:
            If one is out of its range.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1):
        raise ValueError(f"rank must be a positive integer but got {rank!r}.")
    is_number = isinstance(explained_trace, Real) and not isinstance(explained_trace, bool)
    if explained_trace is not None and not (is_number and 0.0 < explained_trace <= 1.0):
        raise ValueError(f"explained_trace must be in (0, 1] but got {explained_trace!r}.")


def n_explaining(eigenvalues: NDArray[np.float64], amount: float) -> int:
    """Return how many of the largest eigenvalues (descending) sum up to the amount, at least one.

    Args:
        eigenvalues:
            Shape ``(r,)``, descending.
        amount:
            The sum to reach. All are needed where it is out of reach.

    Returns:
        A count from 1 to ``r``.
    """
    cumulated = np.cumsum(eigenvalues)
    return min(int(np.searchsorted(cumulated, amount * (1 - 1e-12))) + 1, len(eigenvalues))
