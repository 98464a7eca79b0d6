"""One GPU in a few minutes: is fewer FLOPs less time? Ours dense and pruned beside transformers, bf16, random weights.

    python benchmarks/gpu.py --json benchmarks/gpu.json

A base-size encoder (12 x 768) on batches of 32, 128 and 512 sequences of MRPC's lengths and of 384 tokens; training
steps of each stage; the latency of a single text. Thresholds: those that LTP starts from, under which two or three
layers prune, and a ladder under which every layer does. Medians of turns with a fresh batch each, after four to warm
up.
"""

from __future__ import annotations

import copy
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from compare import SIZES, mrpc_like_lengths, padded, set_thresholds  # noqa: E402

from data import Examples  # noqa: E402
from model import Batch, Config, Dense, Model, Pruner, SelfAttention, UnscoredLastLayer, initialize, pack  # noqa: E402
from runs.budget import starting_thresholds  # noqa: E402
from support.checkpoint import save_model  # noqa: E402
from support.devices import for_inference, for_training  # noqa: E402
from support.files import write_json  # noqa: E402
from support.process import Process, start_process  # noqa: E402
from support.settings import Settings  # noqa: E402
from tasks import own_task  # noqa: E402
from train import Trainer, relative_flops, scale_thresholds  # noqa: E402

WARM_UP = 4
REDUCTIONS = (2.0, 4.0)
EVERY = ", every layer prunes"  # ends the names of runs with such thresholds
STEPS = ("finetune", "soft", "hard", "hard" + EVERY, "topk")
Lengths = Callable[[int, int], list[int]]  # (number of sequences, seed) -> the length of each


def make_model(size: str) -> Model:
    torch.manual_seed(0)
    model = Model(Config(30_000, max_position_embeddings=514, type_vocab_size=1, max_seq_length=512, **SIZES[size]))
    initialize(model, 0.05)
    return model.eval()


def all_384(count: int, seed: int) -> list[int]:
    return [384] * count


def sequences_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(5, 30_000, n).tolist() for n in lengths]


def examples_of(sequences: list[list[int]]) -> Examples:
    sizes = np.array([len(sequence) for sequence in sequences])
    flat = np.concatenate([np.array(sequence, np.int32) for sequence in sequences])
    return Examples(flat, np.zeros(len(flat), np.int8), sizes, targets=np.arange(len(sizes)) % 2)


def prune(
    model: Model, examples: Examples, batches: list[Batch], reduction: float, every: bool, process: Process
) -> Model:
    """A copy on the GPU with thresholds for the reduction. every: of a ladder under which every layer prunes."""
    pruned = Model(replace(model.config, prune_mode="absolute_threshold", token_keep_rate=0.0)).to(process.device)
    pruned.load_state_dict(model.state_dict())
    with process.autocast(pruned):
        if every:
            set_thresholds(pruned.eval(), batches, reduction)
        else:
            pruned.thresholds.data.copy_(starting_thresholds(len(model.layers), 1 / reduction))
            scale_thresholds(pruned, examples, 1 / reduction, process)
    return pruned


def in_turn(runs: dict[str, Callable[[int], object]], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """The median seconds and the peak of memory (MB) of each run. Names of runs that ran out of memory are left out.

    A run gets the number of the turn, and takes another batch in each: a GPU's libraries remember what they have
    found out about a shape, and no two batches of a training run or a service have the same ones.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, float] = {}
    for turn in range(WARM_UP + repeats):
        for name, run in runs.items():
            if name not in times:
                continue
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            try:
                run(turn)
                torch.cuda.synchronize()
            except torch.OutOfMemoryError:
                del times[name]
                continue
            if turn >= WARM_UP:
                times[name].append(time.perf_counter() - start)
            peaks[name] = torch.cuda.max_memory_allocated() / 1e6
    return {name: float(np.median(row)) for name, row in times.items()}, peaks


def their_runs(folder: Path, batches: list[Batch]) -> dict[str, Callable[[int], object]]:
    """transformers on padded batches: SDPA, and its flash attention where it is installed."""
    import transformers

    runs: dict[str, Callable[[int], object]] = {}
    inputs = [[tensor.cuda() for tensor in padded(batch)] for batch in batches]
    for kind in ("sdpa", "flash_attention_2"):
        try:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, attn_implementation=kind, dtype=torch.bfloat16
            )
        except ImportError:
            continue
        model = model.cuda().eval()
        runs[f"transformers {kind}"] = lambda turn, model=model: (
            model(inputs[turn][0], attention_mask=inputs[turn][1]).logits
        )
    return runs


def on_grids(pruned: Model) -> Model:
    """What attention without grids is worth: the same model with them."""
    grids = copy.deepcopy(pruned)
    for layer in grids.layers:
        layer.attention.__class__ = SelfAttention
    return grids


@torch.inference_mode()
def measure_inference(
    model: Model, folder: Path, lengths_of: Lengths, batch_size: int, process: Process, repeats: int
) -> list[dict[str, Any]]:
    """Rows of one setting: examples a second, FLOPs reduction, FLOPs into time, memory."""
    sequences = [sequences_of(lengths_of(batch_size, turn), turn) for turn in range(WARM_UP + repeats)]
    examples, batches = examples_of(sum(sequences, [])), [pack(rows) for rows in sequences]
    there = [batch.to(process.device) for batch in batches]

    def ours(model: Model, pruner: Pruner) -> Callable[[int], object]:
        def run(turn: int) -> object:
            with process.autocast(model):
                return model(there[turn], pruner).logits

        return run

    dense = for_inference(model, process)
    runs, reached = {"ours dense": ours(dense, Dense())}, {"ours dense": 1.0}
    lengths = torch.cat([batch.lengths for batch in there])
    for reduction, every in itertools.product(REDUCTIONS, (False, True)):
        pruned = for_inference(prune(model, examples, there, reduction, every, process).eval(), process)
        kept = torch.cat([pruned(batch).kept for batch in there], 1)
        name = f"ours {reduction:g}x{EVERY if every else ''}"
        contenders = {name: pruned} if every else {name: pruned, name + ", on grids": on_grids(pruned)}
        for name, contender in contenders.items():
            runs[name] = ours(contender, UnscoredLastLayer(contender))
            reached[name] = 1 / relative_flops(model.config, lengths, kept)
    runs |= their_runs(folder, batches)
    seconds, peaks = in_turn(runs, repeats)
    mean_length, rows = float(torch.cat([batch.lengths for batch in batches]).float().mean()), []
    for name, value in seconds.items():
        row = {"name": name, "batch_size": batch_size, "mean_length": mean_length}
        row |= {"examples_per_second": batch_size / value, "ms_per_batch": 1e3 * value, "peak_mb": peaks[name]}
        if name in reached:
            row["flops_reduction"] = reached[name]
        if name in reached and "ours dense" in seconds:
            speedup = seconds["ours dense"] / value
            row |= {"speedup": speedup, "flops_to_time": speedup / reached[name]}
        rows.append(row)
    return rows


def measure_steps(
    model: Model, lengths_of: Lengths, batch_size: int, process: Process, repeats: int
) -> list[dict[str, Any]]:
    """Seconds of a training step of each stage, at the thresholds of half the FLOPs."""
    sequences = sequences_of([n for turn in range(WARM_UP + repeats) for n in lengths_of(batch_size, turn)])
    examples, first = examples_of(sequences), pack(sequences[:batch_size]).to(process.device)
    task = own_task(None, None, None, regression=False)
    runs: dict[str, Callable[[int], object]] = {}
    for name in STEPS:
        trained = prune(model, examples, [first], 2.0, name.endswith(EVERY), process)
        settings = Settings(learning_rate=1e-5, epochs=1.0, batch_size=batch_size)
        trained, stage = for_training(trained.requires_grad_(True), process), name.removesuffix(EVERY)
        trainer = Trainer(trained, stage=stage, task=task, train_set=examples, settings=settings, process=process)
        runs[name] = lambda turn, trainer=trainer: trainer.step(np.arange(turn * batch_size, (turn + 1) * batch_size))
    seconds, peaks = in_turn(runs, repeats)
    rows = []
    for name, value in seconds.items():
        row = {"name": f"step of {name}", "batch_size": batch_size, "mean_length": float(examples.lengths.mean())}
        row |= {"ms_per_batch": 1e3 * value, "peak_mb": peaks[name]}
        rows.append(row | ({"of_a_dense_step": value / seconds["finetune"]} if "finetune" in seconds else {}))
    return rows


def measurements(
    model: Model, folder: Path, batch_sizes: list[int], process: Process, repeats: int
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each setting."""
    for lengths_of in (mrpc_like_lengths, all_384):
        for batch_size in batch_sizes:
            yield measure_inference(model, folder, lengths_of, batch_size, process, repeats)
        yield measure_inference(model, folder, lengths_of, 1, process, 3 * repeats)
    for lengths_of, batch_size in ((mrpc_like_lengths, 128), (all_384, 32), (all_384, 128)):
        yield measure_steps(model, lengths_of, batch_size, process, repeats)


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="base", show_default=True)
@click.option("--batch-sizes", default="32,128,512", show_default=True)
@click.option("--repeats", default=7, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the table there.")
def main(size: str, batch_sizes: str, repeats: int, json_file: Path | None) -> None:
    """Prints and writes the table, a setting after the other."""
    if not torch.cuda.is_available():
        raise click.ClickException("needs a GPU, and this machine has none")
    process, model, device = start_process("cuda", "bf16"), make_model(size), torch.cuda.get_device_name()
    rows: list[dict[str, Any]] = []
    click.echo(f"{device}, bf16, torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, model)
        for more in measurements(model, Path(folder), list(map(int, batch_sizes.split(","))), process, repeats):
            rows += more
            for row in more:
                click.echo(f"{row['name']:34}" + "  ".join(f"{k} {v:.3g}" for k, v in row.items() if k != "name"))
            if json_file:  # now: what a time limit ends is not lost
                write_json(json_file, {"device": device, "torch": torch.__version__, "size": size, "rows": rows})


if __name__ == "__main__":
    main()
