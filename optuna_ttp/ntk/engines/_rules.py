"""Tuned numbers of the engines."""

from __future__ import annotations

from dataclasses import dataclass


# A sample of columns is cut into four groups; their halves give its error bar.
N_GROUPS = 4


@dataclass(frozen=True)
class ChoiceRules:
    """Limits that decide which engine computes a spectrum.

    Attributes:
        max_outputs:
            Most outputs for a sample of columns, which takes a backward pass per output of each
            batch, while matrix-free products take a few hundred in all.
        least_columns_a_row:
            Fewest columns of a sample per row of the Jacobian; with fewer, small eigenvalues are
            lost.
    """

    max_outputs: int = 500
    least_columns_a_row: int = 4


@dataclass(frozen=True)
class ExactRules:
    """How the exact engine groups samples.

    Attributes:
        batch_bytes:
            Bytes for the activations and cotangents of a batch on a CPU; larger batches are hardly
            faster.
        gpu_batch_bytes:
            Bytes for the activations and cotangents of a batch on a GPU.
        max_batch:
            Most samples in a batch: fewer than in the batches of the reference outputs, so that
            an influence of other samples in the batch shows.
        n_checkpoint_blocks:
            Blocks of samples with a checkpoint, if the memory does not need more of them; the
            product of each pair of blocks is stored. Not ablated yet.
    """

    batch_bytes: int = 200 * 2**20
    gpu_batch_bytes: int = 2**31
    max_batch: int = 32
    n_checkpoint_blocks: int = 6


@dataclass(frozen=True)
class ErrorRules:
    """Tuned numbers of the error bar of predicted times.

    Attributes:
        min_rank:
            Fewest eigenpairs on which gradient flow is followed for the error bar.
        n_entries:
            Most numbers in the eigenvectors of more than ``min_rank`` pairs.
        error_quantile:
            The 95 % quantile of Student's t with three degrees of freedom: 90 % are within it.
    """

    min_rank: int = 200
    n_entries: int = 2 * 10**5
    error_quantile: float = 2.353


@dataclass(frozen=True)
class PairRules:
    """Tuned numbers of the matrix-free engine.

    Attributes:
        n_pairs:
            Leading eigenpairs if no rank is given.
        extra_columns:
            Additional columns of a block relative to the number of pairs; they make the last pairs
            converge. Not ablated yet.
        pair_tolerance:
            Residual ``|Theta v - lambda v|`` relative to ``lambda`` below which a pair has
            converged. The error of the eigenvalue is about the square of that, relative to the gap
            behind the block.
        max_blocks:
            Most blocks of products. Not ablated yet.
        start_columns:
            Most columns of the sample of the Jacobian whose leading space has the start vectors.
            Not ablated yet.
        start_share:
            The share of the memory budget for that sample: a half over three, because its columns
            are held about three times.
        batch_bytes:
            Bytes for the activations and the stored Jacobian of a batch. Not ablated yet.
        max_batch:
            Most samples in a batch. Not ablated yet.
        time_error:
            Largest relative change of the predicted times by the last block of products; the error
            is then about a tenth of it.
        condensed_error:
            Largest relative change of the times if Ritz pairs replace the other eigenpairs.
        max_narrow_blocks:
            Most blocks of a few columns, which only improve the times. Not ablated yet.
        n_powers:
            Numbers of Krylov blocks of the residuals that the Ritz pairs span; the second is used
            if the times with the first are not accurate.
        rounding:
            Largest remainder of a column, relative to its norm, that counts as zero.
        min_probes:
            Fewest vectors of random signs that estimate a trace.
        columns_a_probe:
            Columns of a block per vector of random signs.
    """

    n_pairs: int = 100
    extra_columns: float = 1.5
    pair_tolerance: float = 0.05
    max_blocks: int = 8
    start_columns: int = 4096
    start_share: float = 0.5 / 3.0
    batch_bytes: int = 2**27
    max_batch: int = 32
    time_error: float = 0.1
    condensed_error: float = 0.01
    max_narrow_blocks: int = 3
    n_powers: tuple[int, ...] = (3, 6)
    rounding: float = 1e-4
    min_probes: int = 10
    columns_a_probe: int = 10


@dataclass(frozen=True)
class ColumnRules:
    """Tuned numbers of the sample of columns.

    Attributes:
        n_rows:
            Rows of the Jacobian, of different samples, from which probabilities are estimated.
        modulus_share:
            The share of the columns that is picked by mean absolute value, for Adam, and not by
            norm.
        smoothing:
            Weight of the products of means by axis in the estimates for single weights.
        columns_a_row:
            Columns of the sample per row of the Jacobian.
        min_columns:
            Fewest columns of the sample.
        most_growth:
            How many times as many columns as the first sample the last one may have. Not ablated
            yet.
        n_stored:
            Columns that a spectrum keeps for optimisers that act on single weights.
        time_error:
            Largest expected relative error of the predicted times by the sample; if it is larger,
            the number of columns is doubled. Below it a second pass would cost more than it gives:
            the linearisation itself is further off. The error is reported in any case.
        max_batch:
            Most samples in a batch.
    """

    n_rows: int = 16
    modulus_share: float = 0.5
    smoothing: float = 0.2
    columns_a_row: int = 40
    min_columns: int = 40_000
    most_growth: int = 8
    n_stored: int = 12_000
    time_error: float = 0.08
    max_batch: int = 16


CHOICE = ChoiceRules()
EXACT = ExactRules()
ERRORS = ErrorRules()
PAIRS = PairRules()
COLUMNS = ColumnRules()
