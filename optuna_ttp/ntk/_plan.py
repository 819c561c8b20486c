"""The plan of a spectrum: engine, memory and passes over the data, before it is computed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerPlan:
    """How the gradients of one parameter are computed.

    ``claimed_by`` is the module whose derivative gives them, empty for the whole network;
    ``derivative`` is ``"rule"`` for a formula of the layer, or ``"vmap"`` or ``"loop"`` if the
    module is differentiated for all samples at once or one by one. ``method`` is ``"columns"`` if
    only picked products are computed, else how the exact engine stores and multiplies the
    gradients: as ``"rows"``, ``"panels"``, ``"ghost"`` or ``"separable"``.
    """

    name: str
    n_weights: int
    claimed_by: str
    derivative: str
    method: str


@dataclass(frozen=True)
class SpectrumPlan:
    """How a spectrum is going to be computed; printing it shows a table.

    ``n_columns`` is the number of columns of the Jacobian that are computed first, zero for other
    engines. ``n_passes`` is the estimated number of forward and of backward passes over all
    samples, of which a full-batch training step takes two; passes of the probe and of the timing
    of steps are not among them. ``bytes`` is the estimated peak of memory on top of the model, the
    data and the activations of a batch, ``stored_bytes`` the size of the spectrum on disk, and
    ``minimum_bytes`` the smallest ``max_memory`` that suffices. ``layers`` has one entry per
    parameter that moves an output.
    """

    engine: str
    reason: str
    n_samples: int
    n_outputs: int
    n_parameters: int
    n_columns: int
    n_passes: float
    bytes: int
    stored_bytes: int
    minimum_bytes: int
    layers: tuple[LayerPlan, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.engine}, about {self.n_passes:.2g} passes over the data, "
            f"{self.bytes / 2**30:.2g} GiB of memory, {self.stored_bytes / 2**20:.2g} MiB stored",
            f"  {self.n_samples} samples, {self.n_outputs} outputs, {self.n_parameters:,} weights",
            f"  {self.reason}",
            *self._of_columns(),
            f"  {'parameter':<44}{'weights':>12}  {'derivative':<11}{'product'}",
        ]
        lines.extend(
            f"  {layer.name[-44:]:<44}{layer.n_weights:>12,}  {layer.derivative:<11}{layer.method}"
            for layer in self.layers
        )
        return "\n".join(lines)

    def _of_columns(self) -> list[str]:
        """Return one line on the number of columns, none for engines without."""
        if not self.n_columns:
            return []
        if self.n_columns == self.n_parameters:
            return ["  all columns of the Jacobian, so that nothing is approximated"]
        return [
            f"  {self.n_columns:,} columns; the sample is repeated with twice as many while "
            "predicted times are not accurate"
        ]
