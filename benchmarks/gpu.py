"""One GPU in a few minutes: is fewer FLOPs less time? Ours dense and pruned beside transformers, bf16, random weights.

    python benchmarks/gpu.py --json benchmarks/gpu.json

A base-size encoder (12 x 768) on batches of 32, 128 and 512 sequences of MRPC's lengths and of 384 tokens; training
steps of each stage; the latency of a single text. Medians after two passes to warm up; the contenders take turns.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from compare import SIZES, mrpc_like_lengths, padded, set_thresholds  # noqa: E402

from data import Examples  # noqa: E402
from model import Config, Dense, Model, Uncounted, initialize, pack  # noqa: E402
from support.checkpoint import save_model  # noqa: E402
from support.cuda import FlatAttention  # noqa: E402
from support.devices import for_inference, for_training  # noqa: E402
from support.files import write_json  # noqa: E402
from support.process import Process, start_process  # noqa: E402
from support.settings import Settings  # noqa: E402
from tasks import own_task  # noqa: E402
from train import Trainer  # noqa: E402

WARM_UP = 2
REDUCTIONS = (2.0, 4.0)
STAGES = ("finetune", "soft", "hard", "topk")


def make_model(size: str) -> Model:
    torch.manual_seed(0)
    model = Model(Config(30_000, max_position_embeddings=514, type_vocab_size=1, max_seq_length=512, **SIZES[size]))
    initialize(model, 0.05)
    return model.eval()


def sequences_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(5, 30_000, n).tolist() for n in lengths]


def in_turn(runs: dict[str, Callable[[], object]], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """The median seconds and the peak of memory (MB) of each run. Names of runs that ran out of memory are left out."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, float] = {}
    for repeat in range(WARM_UP + repeats):
        for name, run in runs.items():
            if name not in times:
                continue
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            try:
                run()
                torch.cuda.synchronize()
            except torch.OutOfMemoryError:
                del times[name]
                continue
            if repeat >= WARM_UP:
                times[name].append(time.perf_counter() - start)
            peaks[name] = torch.cuda.max_memory_allocated() / 1e6
    return {name: float(np.median(row)) for name, row in times.items()}, peaks


def their_runs(folder: Path, batches: list[Any]) -> dict[str, Callable[[], object]]:
    """transformers on padded batches: SDPA, and its flash attention where it is installed."""
    import transformers

    runs: dict[str, Callable[[], object]] = {}
    inputs = [[tensor.cuda() for tensor in padded(batch)] for batch in batches]
    for kind in ("sdpa", "flash_attention_2"):
        try:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, attn_implementation=kind, dtype=torch.bfloat16
            )
        except ImportError:
            continue
        model = model.cuda().eval()
        runs[f"transformers {kind}"] = lambda model=model: [model(i, attention_mask=m).logits for i, m in inputs]
    return runs


@torch.inference_mode()
def measure_inference(model: Model, folder: Path, lengths: list[int], batch_size: int, process: Process, repeats: int):
    """Rows of one setting: examples a second, FLOPs reduction, FLOPs into time, memory."""
    sequences = sequences_of(lengths)
    batches = [pack(sequences[i : i + batch_size]) for i in range(0, len(sequences), batch_size)]
    there = [batch.to(process.device) for batch in batches]

    def ours(pruned: Model, pruner: Dense) -> Callable[[], object]:
        def run() -> list[Any]:
            with process.autocast():
                return [pruned(batch, pruner).logits for batch in there]

        return run

    dense = for_inference(model, process)
    runs, reached = {"ours dense": ours(dense, Dense())}, {"ours dense": 1.0}
    for reduction in REDUCTIONS:
        pruned = Model(replace(model.config, prune_mode="absolute_threshold")).to(process.device)
        pruned.load_state_dict(model.state_dict())
        with process.autocast():
            by_formula = set_thresholds(pruned.eval(), there, reduction).by_formula
        name = f"ours {reduction:g}x"
        reached[name] = by_formula
        runs[name] = ours(for_inference(pruned, process), Uncounted(pruned))
        grids = Model(pruned.config).to(process.device).eval()
        grids.load_state_dict(pruned.state_dict())
        runs[f"{name}, on grids"], reached[f"{name}, on grids"] = ours(grids, Uncounted(grids)), by_formula
    if batch_size > 1 or len(lengths) == 1:
        runs |= their_runs(folder, batches)
    seconds, peaks = in_turn(runs, repeats)
    rows = []
    for name, value in seconds.items():
        row = {"name": name, "batch_size": batch_size, "mean_length": float(np.mean(lengths))}
        row |= {"examples_per_second": len(lengths) / value, "ms_per_batch": 1e3 * value / len(batches)}
        row |= {"peak_mb": peaks[name]}
        if name in reached:
            row |= {"flops_reduction": reached[name], "speedup": seconds["ours dense"] / value}
            row |= {"flops_to_time": seconds["ours dense"] / value / reached[name]}
        rows.append(row)
    return rows


def measure_steps(model: Model, lengths: list[int], process: Process, repeats: int) -> list[dict[str, Any]]:
    """Seconds of a training step of each stage, at the thresholds of half the FLOPs."""
    sequences = sequences_of(lengths)
    flat = np.concatenate([np.array(s, dtype=np.int32) for s in sequences])
    labels = np.arange(len(lengths)) % 2
    examples = Examples(flat, np.zeros(len(flat), np.int8), np.array(lengths), targets=labels)
    task, indices = own_task(None, None, None, regression=False), np.arange(len(lengths))
    batch = pack(sequences).to(process.device)
    runs: dict[str, Callable[[], object]] = {}
    for stage in STAGES:
        copy = Model(replace(model.config, attention_probs_dropout_prob=0.0, token_keep_rate=0.0)).to(process.device)
        copy.load_state_dict(model.state_dict())
        if stage in ("soft", "hard"):
            copy.config = replace(copy.config, prune_mode="absolute_threshold")
            with process.autocast():
                set_thresholds(copy.eval(), [batch], 2.0)
        settings = Settings(learning_rate=1e-5, epochs=1.0, batch_size=len(lengths))
        copy = for_training(copy.requires_grad_(True), process, stage)
        trainer = Trainer(copy, stage=stage, task=task, train_set=examples, settings=settings, process=process)
        runs[stage] = lambda trainer=trainer: trainer.step(indices)
    seconds, peaks = in_turn(runs, repeats)
    dense = seconds["finetune"]
    return [
        {
            "name": f"step of {n}",
            "batch_size": len(lengths),
            "mean_length": float(np.mean(lengths)),
            "peak_mb": peaks[n],
        }
        | {"ms_per_batch": 1e3 * value, "of_a_dense_step": value / dense}
        for n, value in seconds.items()
    ]


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="base", show_default=True)
@click.option("--batch-sizes", default="32,128,512", show_default=True)
@click.option("--repeats", default=7, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the table there.")
def main(size: str, batch_sizes: str, repeats: int, json_file: Path | None) -> None:
    """Prints and writes the table."""
    if not torch.cuda.is_available():
        raise click.ClickException("needs a GPU, and this machine has none")
    process, model, rows = start_process("cuda", "bf16"), make_model(size), []
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, model)
        for batch_size in map(int, batch_sizes.split(",")):
            for lengths in (mrpc_like_lengths(batch_size, 0), [384] * batch_size):
                rows += measure_inference(model, Path(folder), lengths, batch_size, process, repeats)
        for length in (53, 384):
            rows += measure_inference(model, Path(folder), [length], 1, process, 5 * repeats)
        for lengths in (mrpc_like_lengths(128, 0), [384] * 32):
            rows += measure_steps(model, lengths, process, repeats)
    device = torch.cuda.get_device_name()
    for row in rows:
        figures = "  ".join(f"{k} {v:.3g}" for k, v in row.items() if k not in ("name",))
        click.echo(f"{row['name']:28}{figures}")
    click.echo(f"\n{device}, bf16, torch {torch.__version__}; kernel without a grid: {FlatAttention.kernel.__name__}")
    if json_file:
        write_json(json_file, {"device": device, "torch": torch.__version__, "size": size, "rows": rows})


if __name__ == "__main__":
    main()
