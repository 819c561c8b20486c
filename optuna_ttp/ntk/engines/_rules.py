"""Tuned numbers of the engines."""

from __future__ import annotations

from dataclasses import dataclass


# Independent projections of which a sketch is the mean; its error bar is made of their halves.
N_GROUPS = 4


@dataclass(frozen=True)
class ChoiceRules:
    """What decides which engine computes a spectrum.

    Attributes:
        kernel_share:
            The share of the memory budget that the kernel may take. Not ablated yet.
        max_product:
            Multiplications that the product of all rows may take; the contraction needs a
            fraction of them. Not ablated yet.
        sketch_width:
            Numbers a row of the first, narrowest sketch. Not ablated yet.
        max_sketch_width:
            Numbers a row of the widest sketch. Not ablated yet.
        max_outputs:
            Outputs up to which a sketch is made: it makes a backward pass for each output of each
            sample, products a few hundred in all.
    """

    kernel_share: float = 0.5
    max_product: float = 2e14
    sketch_width: int = 4096
    max_sketch_width: int = 32768
    max_outputs: int = 500


@dataclass(frozen=True)
class ExactRules:
    """How the exact engine groups samples.

    Attributes:
        batch_bytes:
            Bytes for activations and cotangents of the samples that go through the network
            together: more of them hardly make it faster.
        gpu_batch_bytes:
            The same on a GPU.
        max_batch:
            Most samples in a batch: fewer than the outputs are first computed in, so that samples
            see other neighbours.
        n_checkpoint_blocks:
            Blocks that samples are cut in with a checkpoint; their products are stored one by one.
            Not ablated yet.
    """

    batch_bytes: int = 200 * 2**20
    gpu_batch_bytes: int = 2**31
    max_batch: int = 32
    n_checkpoint_blocks: int = 6


@dataclass(frozen=True)
class SketchRules:
    """How a sketch is made, refined and judged.

    Attributes:
        time_error:
            By how much the predicted times may be off because of the projection, before the
            sketch is made twice as wide.
        n_refined:
            Leading eigenpairs that are refined: 100, and half as many for the sake of the last of
            these.
        max_exact_weights:
            Parameters with so many weights stay exact, the smallest first. Not ablated yet.
        exact_share:
            Columns that these have together, at most, for each one of the sketch. Not ablated yet.
        batch_bytes:
            Bytes for what goes through the network together. Not ablated yet.
        max_batch:
            Most samples in a batch. Not ablated yet.
        min_rank:
            Directions in which the error bar follows gradient flow, at least.
        n_entries:
            Numbers that these directions have together: as many as take a second or so.
        error_quantile:
            Student's t of three degrees of freedom at 90 %.
    """

    time_error: float = 0.03
    n_refined: int = 150
    max_exact_weights: int = 2048
    exact_share: float = 0.5
    batch_bytes: int = 2**27
    max_batch: int = 32
    min_rank: int = 200
    n_entries: int = 10**6
    error_quantile: float = 2.353


@dataclass(frozen=True)
class PairRules:
    """How the matrix-free engine computes leading eigenpairs.

    Attributes:
        n_pairs:
            Leading pairs where neither their number nor a share of the trace is asked for.
        extra_columns:
            Columns beside those of the pairs, for the sake of the last of these, as a share of
            them. Not ablated yet.
        pair_tolerance:
            Residual ``|Theta v - lambda v|`` relative to ``lambda`` at which a pair has converged.
            The eigenvalue is off by about the square of that, relative to the gap behind the
            block.
        max_blocks:
            Blocks of products at most. Not ablated yet.
        max_sketch_width:
            Numbers a row of the sketch at the start, at most. Not ablated yet.
        sketch_share:
            The share of the memory budget for that sketch, whose columns are held about three
            times: half of it.
        time_error:
            By how much the times of training may change with the last block of products: what is
            left then is about a tenth of that. Narrow blocks cost a pass each way for few columns,
            so nearly as much.
        condensed_error:
            By how much the times may change if only the Ritz pairs stand for the others.
        max_narrow_blocks:
            Blocks of a few columns at most, for the sake of the times alone. Not ablated yet.
        n_powers:
            Ritz pairs are those of the residuals on the path and of what the kernel makes of them,
            so many together; the second where the first do not suffice.
        rounding:
            Shares of a column that are less count as nothing.
        min_probes:
            Vectors of random signs that estimate a trace, at least.
        columns_a_probe:
            And one for so many columns of a block.
    """

    n_pairs: int = 100
    extra_columns: float = 1.5
    pair_tolerance: float = 0.05
    max_blocks: int = 8
    max_sketch_width: int = 4096
    sketch_share: float = 0.5 / 3.0
    time_error: float = 0.1
    condensed_error: float = 0.01
    max_narrow_blocks: int = 3
    n_powers: tuple[int, ...] = (3, 6)
    rounding: float = 1e-4
    min_probes: int = 10
    columns_a_probe: int = 10


CHOICE = ChoiceRules()
EXACT = ExactRules()
SKETCHES = SketchRules()
PAIRS = PairRules()
