"""What making attention probabilities in blocks of queries saves, beside the whole matrix of a batch.

python benchmarks/blocks.py --length 512 --batch-size 32
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from compare import SIZES, peak_memory, set_thresholds

sys.path.insert(0, str(Path(__file__).parent.parent))

import model as ltp_model  # noqa: E402
from data import pack  # noqa: E402
from model import Config, Model, attend, attention_groups, initialize  # noqa: E402
from train import keep_freed_memory  # noqa: E402


def whole_matrix(whole: bool) -> None:
    """Lets all models lay a batch on one grid and make all its probabilities at once, or not any more."""
    unbounded = (math.inf, math.inf)
    ltp_model.attention_groups = (
        (lambda lengths, *_: attention_groups(lengths, *unbounded)) if whole else attention_groups
    )
    ltp_model.attend = (lambda *args: attend(*args[:-1], 2**62)) if whole else attend


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="minilm", show_default=True)
@click.option("--length", default=512, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--reduction", default=2.0, show_default=True, help="FLOPs reduction of the pruned model.")
@click.option("--repeats", default=3, show_default=True)
@torch.inference_mode()
def main(size: str, length: int, batch_size: int, reduction: float, repeats: int) -> None:
    """Times a batch of one length both ways, in turn, after a warm-up, and tells the memory at the peak of each."""
    torch.manual_seed(0)
    keep_freed_memory()
    config = Config(1000, max_position_embeddings=length + 2, type_vocab_size=1, layer_norm_eps=1e-5, **SIZES[size])
    model = Model(replace(config, prune_mode="absolute_threshold")).eval()
    initialize(model, 0.05)
    generator = np.random.default_rng(0)
    batch = pack([generator.integers(3, 1000, length).tolist() for _ in range(batch_size)])
    reached, _ = set_thresholds(model, [batch], reduction)
    times, logits, memory = {True: [], False: []}, {}, {}
    for repeat in range(repeats + 1):
        for whole in times:
            whole_matrix(whole)
            start = time.perf_counter()
            logits[whole] = model(*batch, count=False).logits
            if repeat:
                times[whole].append(time.perf_counter() - start)
    for whole in times:
        whole_matrix(whole)
        memory[whole] = peak_memory(lambda: model(*batch, count=False))
    click.echo(f"{batch_size} x {length} tokens, {size}, {reached:.2f}x fewer FLOPs, {torch.get_num_threads()} threads")
    for whole, name in ((True, "whole matrix"), (False, "blocks")):
        click.echo(f"{name:14}{np.median(times[whole]):8.2f} s{(memory[whole] or 0) / 1e6:10.0f} MB at the peak")
    click.echo(f"largest difference of the logits: {float((logits[True] - logits[False]).abs().max()):.1e}")


if __name__ == "__main__":
    main()
