"""The plan of a spectrum: engine, estimated seconds and bytes, before it is computed."""

from __future__ import annotations

from dataclasses import dataclass

from optuna_ttp.ntk.engines._rules import CHOICE


@dataclass(frozen=True)
class LayerPlan:
    """How the gradients of one parameter are computed and multiplied.

    ``claimed_by`` is the module whose derivative gives them, empty for the whole network;
    ``derivative`` is ``"rule"`` for a formula of the layer, or ``"vmap"`` or ``"loop"`` if the
    module is differentiated for all samples at once or one by one; ``method`` is ``"rows"``,
    ``"panels"``, ``"ghost"`` or ``"separable"``. ``flops`` count computing rows and multiplying
    them, ``bytes`` the memory, both for all samples.
    """

    name: str
    n_weights: int
    claimed_by: str
    derivative: str
    method: str
    flops: float
    bytes: int


@dataclass(frozen=True)
class SpectrumPlan:
    """How a spectrum is going to be computed; printing it shows a table.

    ``seconds`` are the estimated wall-clock seconds of the Jacobian and the kernel,
    ``trace_seconds`` the part of them for estimating the trace (zero if the trace is exact),
    ``bytes`` the estimated peak of memory on top of the model and the data, and ``minimum_bytes``
    the smallest ``max_memory`` that suffices. ``batch_size`` samples go through the network
    together; the Jacobian of ``block_size`` samples is held and multiplied with that of
    ``stream_size`` other samples at a time. ``layers`` has one entry per parameter.
    """

    engine: str
    reason: str
    n_samples: int
    n_outputs: int
    n_parameters: int
    seconds: float
    trace_seconds: float
    bytes: int
    batch_size: int
    block_size: int
    stream_size: int
    minimum_bytes: int
    layers: tuple[LayerPlan, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.engine}, about {_duration(self.seconds)}, {self.bytes / 2**30:.2g} GiB",
            f"  {self.n_samples} samples, {self.n_outputs} outputs, {self.n_parameters:,} weights",
            f"  {self.reason}",
            f"  {self.batch_size} samples in a batch, the Jacobian of {self.block_size} held",
            *self._of_width(),
            *self._of_trace(),
            f"  {'parameter':<44}{'weights':>12}  {'derivative':<11}{'product':<8}"
            f"{'GFLOP':>9}{'MiB':>8}",
        ]
        lines.extend(
            f"  {layer.name[-44:]:<44}{layer.n_weights:>12,}  {layer.derivative:<11}"
            f"{layer.method:<8}{layer.flops / 1e9:>9.3g}{layer.bytes / 2**20:>8.3g}"
            for layer in self.layers
        )
        return "\n".join(lines)

    def _of_width(self) -> list[str]:
        """Return one line on the width of a sketch, none for other engines."""
        if not self.engine.endswith("sketch"):
            return []
        width = CHOICE.sketch_width
        return [
            f"  {width} numbers per row; the sketch is repeated with twice as many while "
            "predicted times are not accurate"
        ]

    def _of_trace(self) -> list[str]:
        """Return one line on the time to estimate the trace, none if the trace is exact."""
        if not self.trace_seconds:
            return []
        took = _duration(self.trace_seconds)
        return [f"  the trace is an estimate by random signs, which takes {took} of that time"]


def _duration(seconds: float) -> str:
    """Return seconds as a text in seconds, minutes or hours, such as ``"3 min"``."""
    if seconds < 100.0:
        return f"{seconds:.2g} s"
    if seconds < 6000.0:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
