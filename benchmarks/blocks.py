"""What attention in small grids and blocks of queries saves, beside the whole matrix of a batch.

python benchmarks/blocks.py --length 512 --batch-size 32
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from compare import SIZES, peak_memory, set_thresholds

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import Config, Model, Sequences, UnscoredLastLayer, initialize, pack  # noqa: E402
from support.cpu import keep_freed_memory  # noqa: E402

LIMITS = {True: (2**62, 2**62), False: Sequences.CPU_LIMITS}  # of a grid: whole matrix or not


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="minilm", show_default=True)
@click.option("--length", default=512, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--reduction", default=2.0, show_default=True, help="FLOPs reduction of the pruned model.")
@click.option("--repeats", default=3, show_default=True)
@torch.inference_mode()
def main(size: str, length: int, batch_size: int, reduction: float, repeats: int) -> None:
    """Times a batch of one length both ways, in turn, after a warm-up, and shows the memory at the peak of each."""
    torch.manual_seed(0)
    keep_freed_memory()
    config = Config(1000, max_position_embeddings=length + 2, type_vocab_size=1, layer_norm_eps=1e-5, **SIZES[size])
    model = Model(replace(config, prune_mode="absolute_threshold")).eval()
    initialize(model, 0.05)
    generator = np.random.default_rng(0)
    batch = pack([generator.integers(3, 1000, length).tolist() for _ in range(batch_size)])
    reached, _ = set_thresholds(model, [batch], reduction)
    pruner = UnscoredLastLayer(model)
    times, logits, memory = {True: [], False: []}, {}, {}
    for repeat in range(repeats + 1):
        for whole, limits in LIMITS.items():
            Sequences.CPU_LIMITS = limits
            start = time.perf_counter()
            logits[whole] = model(batch, pruner).logits
            if repeat:
                times[whole].append(time.perf_counter() - start)
    for whole, limits in LIMITS.items():
        Sequences.CPU_LIMITS = limits
        memory[whole] = peak_memory(lambda: model(batch, pruner))
    click.echo(f"{batch_size} x {length} tokens, {size}, {reached:.2f}x fewer FLOPs, {torch.get_num_threads()} threads")
    for whole, name in ((True, "whole matrix"), (False, "blocks")):
        click.echo(f"{name:14}{np.median(times[whole]):8.2f} s{(memory[whole] or 0) / 1e6:10.0f} MB at the peak")
    click.echo(f"largest difference of the logits: {float((logits[True] - logits[False]).abs().max()):.1e}")


if __name__ == "__main__":
    main()
