"""The Jacobian eigenspectrum of a task: plain arrays, all that predictions need."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optuna_ttp._util.exceptions import DamagedSpectrumError
from optuna_ttp.spectrum import blob
from optuna_ttp.spectrum._form import header_and_arrays
from optuna_ttp.spectrum._form import spectrum_fields
from optuna_ttp.spectrum._low_rank_layer import LowRankLayer
from optuna_ttp.spectrum._metadata import SpectrumMetadata
from optuna_ttp.spectrum._probe import Probe
from optuna_ttp.spectrum._ritz import RULES
from optuna_ttp.spectrum._sampled_jacobian import SampledJacobian
from optuna_ttp.spectrum._saturation import Saturation
from optuna_ttp.spectrum._throughput import Throughput
from optuna_ttp.spectrum._truncation import check_truncation
from optuna_ttp.spectrum._truncation import condensed
from optuna_ttp.spectrum._truncation import leading
from optuna_ttp.spectrum._truncation import n_explaining
from optuna_ttp.spectrum._validation import Validation
from optuna_ttp.spectrum._whole_file import write_whole
from optuna_ttp.task import Loss


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The largest eigenpairs of the empirical NTK, and the outputs and targets at the start.

    :func:`~optuna_ttp.compute_spectrum` computes it. Arrays are described for N samples, C outputs
    and r eigenpairs.

    Example:
        >>> spectrum = compute_spectrum(task)
        >>> spectrum.save("task.ttp")
        >>> Spectrum.load("task.ttp").rank == spectrum.rank
        True

    Attributes:
        eigenvalues:
            Eigenvalues of ``Theta = J J^T``, not divided by N; shape ``(r,)``, positive,
            descending. The last few may be Ritz values, see :meth:`truncate`.
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
            Seconds per training step, or :obj:`None` if they were not measured.
        metadata:
            The record of how, when and of which task the spectrum was computed.
        weight_outputs:
            ``J w_0``, the contribution of the initial weights to the linearised outputs, of shape
            ``(N, C)``, for weight decay. :obj:`None` if it was not computed.
        decay_factors:
            With learning-rate multipliers ``c``, ``v_k^T J c^2 J^T v_k / lambda_k``, of shape
            ``(r,)``: the multiplier with which weight decay acts on each eigen-direction.
            :obj:`None` if all are one.
        validation:
            The arrays of the validation samples, or :obj:`None` if the task has none.
        probe:
            The network's distance from its linearisation, or :obj:`None` if it was not measured.
        jacobian:
            A sample of the Jacobian's columns, for optimisers that act on single weights, such as
            Adam; :obj:`None` if the engine kept none.
        saturation:
            How far the outputs move in a large step, over what linearisation says, or :obj:`None`
            if it was not measured.
        low_rank:
            The layers with low-rank adapters (LoRA), whose weights have no columns in
            ``jacobian``. None by default.
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
    jacobian: SampledJacobian | None = None
    saturation: Saturation | None = None
    low_rank: tuple[LowRankLayer, ...] = ()

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
        """Raise ValueError if an optional array does not fit r and ``shape``, which is (N, C)."""
        arrays: dict[str, tuple[NDArray[Any] | None, tuple[int, ...]]] = {
            "weight_outputs": (self.weight_outputs, shape),
            "decay_factors": (self.decay_factors, (self.rank,)),
        }
        if self.validation is not None:
            outputs = self.validation.initial_outputs
            n_rows = int(np.prod(outputs.shape))
            arrays["validation.features"] = (self.validation.features, (n_rows, self.rank))
            arrays["validation.initial_outputs"] = (outputs, (len(outputs), shape[1]))
        if self.jacobian is not None:
            codes = self.jacobian.codes
            arrays["jacobian.codes"] = (codes, (shape[0] * shape[1], self.jacobian.n_columns))
        if self.low_rank and self.jacobian is None:
            raise ValueError("Layers with low-rank adapters need columns of the other weights.")
        for layer in self.low_rank:
            layer.check(
                shape[0], shape[1], 0 if self.jacobian is None else len(self.jacobian.names)
            )
        if self.probe is not None:
            points = self.probe.fractions.shape
            arrays.update({f"probe.{k}": (v, points) for k, v in vars(self.probe).items()})
        for name, (array, expected) in arrays.items():
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
        """The number r of eigenpairs that the spectrum holds."""
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
        """The share of the kernel's trace that the eigenvalues sum up to."""
        return min(1.0, float(self.eigenvalues.sum()) / self.trace)

    def truncate(
        self, *, rank: int | None = None, explained_trace: float | None = None
    ) -> Spectrum:
        """Return a spectrum with fewer eigenpairs.

        Args:
            rank:
                Keep at most this number of pairs. All by default.
            explained_trace:
                Keep the fewest pairs whose eigenvalues sum up to this share of the trace, and, as
                far as the rank allows, up to four Ritz pairs in place of the others, with nearly
                their loss curve (:func:`~optuna_ttp.spectrum._ritz.ritz_pairs`). All by default.

        Returns:
            A new spectrum, or this one if no pair is dropped.

        Raises:
            ValueError:
                If a setting is out of its range, or more of the trace is asked for than the
                spectrum holds.
        """
        check_truncation(rank, explained_trace)
        new_rank = self.rank if rank is None else min(rank, self.rank)
        if explained_trace is not None:
            if explained_trace > self.explained_trace + 1e-6:
                raise ValueError(
                    f"explained_trace must be at most {self.explained_trace:.6f}, the share in "
                    f"this spectrum, but got {explained_trace}. Compute it again with more."
                )
            n_needed = n_explaining(self.eigenvalues, explained_trace * self.trace)
            # If there are hardly more others than Ritz pairs, the others are kept themselves.
            if n_needed < new_rank and n_needed + RULES.n_pairs < self.rank:
                return self._condensed(n_needed, min(RULES.n_pairs, new_rank - n_needed))
        if new_rank == self.rank:
            return self
        n_ritz = max(0, self.metadata.n_ritz - (self.rank - new_rank))
        arrays = leading(new_rank, *self._arrays_by_pair())
        return replace(self, metadata=replace(self.metadata, n_ritz=n_ritz), **arrays)

    def _condensed(self, rank: int, n_ritz: int) -> Spectrum:
        """Return a spectrum of the first ``rank`` pairs and up to ``n_ritz`` Ritz pairs."""
        residual = self.loss.residuals(self.initial_outputs, self.targets).ravel()
        arrays = condensed(rank, n_ritz, residual, *self._arrays_by_pair())
        metadata = replace(self.metadata, n_ritz=len(arrays["eigenvalues"]) - rank)
        return replace(self, metadata=metadata, **arrays)

    def _arrays_by_pair(self) -> tuple[Any, ...]:
        """Return eigenvalues, eigenvectors, validation and decay factors: the fields by pair."""
        return self.eigenvalues, self.eigenvectors, self.validation, self.decay_factors

    def to_pieces(
        self, digest: blob.Digest | None = None, *, note: Mapping[str, Any] | None = None
    ) -> Iterator[bytes]:
        """Yield the spectrum in the form of :mod:`optuna_ttp.spectrum.blob`, a few MiB at a time.

        Args:
            digest:
                Names the content: the digests of the pieces are added to it. None by default.
            note:
                A JSON object to store beside the spectrum, which
                :func:`optuna_ttp.spectrum.blob.read_meta` reads. None by default.

        Yields:
            Pieces of the bytes that :meth:`to_bytes` returns.
        """
        header, arrays = header_and_arrays(vars(self), note)
        return blob.write(header, arrays, digest)

    def to_bytes(self) -> bytes:
        """Return the spectrum as bytes in the format of :mod:`optuna_ttp.spectrum.blob`."""
        return b"".join(self.to_pieces())

    @classmethod
    def from_stream(
        cls, stream: blob.Readable, n_bytes: int, digest: blob.Digest | None = None
    ) -> Spectrum:
        """Read a spectrum that :meth:`to_pieces` wrote, without holding its bytes twice.

        Args:
            stream:
                An open file, or :class:`~optuna_ttp.spectrum.blob.Pieces`.
            n_bytes:
                The number of bytes in the stream.
            digest:
                Names the content: the digests of the pieces are added to it. None by default.

        Returns:
            The spectrum.

        Raises:
            DamagedSpectrumError:
                If the bytes are no spectrum, or one of another version's format.
        """
        try:
            content = blob.read(stream, n_bytes, digest)
            return cls(**spectrum_fields(content.meta, content.arrays))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DamagedSpectrumError(f"These bytes are no spectrum: {error}") from error

    @classmethod
    def from_bytes(cls, data: bytes) -> Spectrum:
        """Read a spectrum from bytes.

        Args:
            data:
                The bytes that :meth:`to_bytes` returned.

        Returns:
            The spectrum.

        Raises:
            DamagedSpectrumError:
                If the bytes are no spectrum, or one of another version's format.
        """
        return cls.from_stream(blob.Pieces([data]), len(data))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the spectrum to a file, replacing it as a whole or not at all.

        Workers that cannot reach the database of a :class:`~optuna_ttp.SpectrumStore`, such as
        those of Optuna's gRPC proxy, read it with :meth:`load`.

        Args:
            path:
                The file to write.
        """
        write_whole(Path(path), self.to_pieces())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Spectrum:
        """Read a file that :meth:`save` wrote.

        Args:
            path:
                The file to read.

        Returns:
            The spectrum.

        Raises:
            DamagedSpectrumError:
                If the file is no spectrum, or one of another version's format.
        """
        with Path(path).open("rb") as file:
            return cls.from_stream(file, os.fstat(file.fileno()).st_size)


def _is_finite(array: NDArray[Any]) -> bool:
    """Return whether all values are finite, checking about a million at a time."""
    # A mask of the whole array would take a quarter of a large array's memory again.
    rows = max(1, 2**20 * len(array) // max(1, array.size))
    return all(
        bool(np.isfinite(array[start : start + rows]).all())
        for start in range(0, len(array), rows)
    )
