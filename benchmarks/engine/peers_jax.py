"""neural-tangents' ways to the empirical NTK, in a process of its own.

The counterpart of :mod:`benchmarks.engine.measure` for an environment without PyTorch. The
residual network is written again in ``jax.lax``, with the weights of the one in PyTorch and the
same images, which :mod:`benchmarks.engine.record` writes into a file. Compilation is measured
apart. Prints one line of JSON.

The third implementation of the release of 2023 fails as it is: it looks for two names of jax where
the versions that it can be imported with no longer show them. Here they are put back.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import json
import os
from pathlib import Path
import time
from typing import Any

import numpy as np

from benchmarks.environment import peak_memory


# Its numbers for its three implementations.
IMPLEMENTATIONS = {
    "neural_tangents_jacobian": 1,
    "neural_tangents_products": 2,
    "neural_tangents_structured": 3,
}
_STRIDES = {"3": 1, "4": 2, "5": 2}
_EPSILON = 1e-5


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=IMPLEMENTATIONS)
    parser.add_argument("problem", type=Path, help="weights and images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gram", type=Path, help="where the kernel is written")
    options = parser.parse_args()
    # The number of threads that XLA takes is that of the cores it may run on.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.threads :])
    import jax
    from jax._src import source_info_util
    from jax.interpreters import ad
    import neural_tangents

    ad.source_info_util, ad.config = source_info_util, jax.config
    with np.load(options.problem) as archive:
        arrays = {name: jax.numpy.asarray(archive[name]) for name in archive.files}
    images = arrays.pop("images")
    frozen = {k: arrays.pop(k) for k in list(arrays) if k.rpartition(".")[2].startswith("running")}
    kernel = neural_tangents.empirical_ntk_fn(
        residual_network(frozen),
        trace_axes=(),
        vmap_axes=0,
        implementation=IMPLEMENTATIONS[options.method],
    )
    started = time.process_time()
    compiled = jax.jit(lambda x, weights: kernel(x, None, weights)).lower(images, arrays).compile()
    compiling = time.process_time() - started
    before, started, wall = peak_memory(), time.process_time(), time.perf_counter()
    gram = compiled(images, arrays).block_until_ready()
    result = {
        "method": options.method,
        "network": "residual",
        "n_samples": len(images),
        "dtype": "float32",
        "threads": options.threads,
        "cpu_seconds": round(time.process_time() - started, 3),
        "wall_seconds": round(time.perf_counter() - wall, 3),
        "peak_mib": round((peak_memory() - before) / 2**20, 1),
        "compile_cpu_seconds": round(compiling, 3),
        "version": f"neural-tangents {neural_tangents.__version__}, jax {jax.__version__}",
    }
    if options.gram is not None:
        # Samples come before outputs there.
        rows = np.asarray(gram).transpose(0, 2, 1, 3)
        np.save(options.gram, rows.reshape(rows.shape[0] * rows.shape[1], -1))
    print(json.dumps(result))


def residual_network(frozen: dict[str, Any]) -> Callable[[dict[str, Any], Any], Any]:
    """Return the network as a function of weights and images.

    Args:
        frozen:
            Batch-norm statistics, by the names that PyTorch gives them.
    """
    from jax import lax
    from jax import numpy as jnp

    def convolve(weights: dict[str, Any], name: str, x: Any, stride: int = 1) -> Any:
        kernel = weights[f"{name}.weight"]
        margin = kernel.shape[-1] // 2
        return lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            [(margin, margin)] * 2,
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
        )

    def normalise(weights: dict[str, Any], name: str, x: Any) -> Any:
        scale = lax.rsqrt(frozen[f"{name}.running_var"] + _EPSILON)
        centred = x - frozen[f"{name}.running_mean"][:, None, None]
        normalised = centred * scale[:, None, None]
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return normalised * weight[:, None, None] + bias[:, None, None]

    def apply(weights: dict[str, Any], x: Any) -> Any:
        x = jnp.maximum(normalise(weights, "1", convolve(weights, "0", x)), 0.0)
        for block, stride in _STRIDES.items():
            hidden = convolve(weights, f"{block}.conv1", x, stride)
            hidden = jnp.maximum(normalise(weights, f"{block}.bn1", hidden), 0.0)
            hidden = convolve(weights, f"{block}.conv2", hidden)
            hidden = normalise(weights, f"{block}.bn2", hidden)
            if f"{block}.skip.0.weight" in weights:
                x = convolve(weights, f"{block}.skip.0", x, stride)
                x = normalise(weights, f"{block}.skip.1", x)
            x = jnp.maximum(hidden + x, 0.0)
        return x.mean((2, 3)) @ weights["8.weight"].T + weights["8.bias"]

    return apply


if __name__ == "__main__":
    main()
