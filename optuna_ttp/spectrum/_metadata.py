"""The origin of a spectrum: its task, engine, device and versions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SpectrumMetadata:
    """The record of how, when and of which task a spectrum was computed.

    Attributes:
        fingerprint:
            The :attr:`~optuna_ttp.FineTuningTask.fingerprint` of its task.
        engine:
            The engine that contracted the Jacobian; ``dtype`` is the Jacobian's precision.
        n_parameters:
            The number D of trainable weights.
        compute_seconds:
            Wall-clock seconds of the computation, including the timing of training steps.
        created_at:
            The time of the computation in ISO 8601, UTC.
        sketch_width:
            The length to which an engine of version 0.1.0 projected each row of the Jacobian.
            :obj:`None` without a projection.
        seed:
            Seed of the sample of columns or of the starting vectors; :obj:`None` if nothing is
            random.
        time_error:
            The relative error that nine out of ten gradient-flow times (to half, a quarter and a
            tenth of the loss) stay below. The columns engine estimates it from four groups of
            columns; the matrix-free engine reports the change due to its last products.
            :obj:`None` for the exact engine.
        n_ritz:
            The number of pairs that are Ritz pairs, see :meth:`Spectrum.truncate`.
        trace_error:
            Standard error of the trace divided by the trace, if the trace is an estimate (of the
            matrix-free engine). :obj:`None` if it is exact.
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
