"""Our dense and pruned runs beside transformers and ONNX Runtime: same weights, same inputs, one run.

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/compare.py --size base --json benchmarks/base.json

Random weights serve: speed does not depend on them, except for which tokens are pruned, and the thresholds are set so
that the pruned runs reach the asked FLOPs reductions. All dense logits are compared before anything is timed. Every
contender gets freed memory kept (train.keep_freed_memory), which helps the others as much as ours.
"""

from __future__ import annotations

import ctypes
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import Batch, pack  # noqa: E402
from model import Config, Model, initialize, last_layer_saving, macs, save_model, write_file  # noqa: E402
from train import keep_freed_memory, relative_flops  # noqa: E402

SIZES = {
    "base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "minilm": dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
}


def mrpc_like_lengths(count: int, seed: int) -> list[int]:
    """Lengths with the mean (53) and spread of MRPC's sentence pairs."""
    drawn = np.random.default_rng(seed).normal(53, 14, count)
    return np.clip(np.round(drawn), 20, 103).astype(int).tolist()


def done_macs(config: Config, lengths: Tensor, kept: Tensor) -> float:
    """Multiply-accumulates that are really computed: those of the formula less what the last layer saves."""
    entering = torch.cat([lengths[None], kept])[-2]
    return float((macs(config, lengths, kept) - last_layer_saving(config, entering, kept[-1])).sum())


@torch.inference_mode()
def set_thresholds(model: Model, batches: list[Batch], reduction: float) -> tuple[float, float]:
    """Thresholds under which the batches take about 1 / `reduction` of the dense FLOPs.

    Returns the reduction that they reach by the formula, and of what is really computed.

    The share of tokens that leaves layer l falls linearly with l, at the slope that gives the reduction; each threshold
    is the quantile of its layer's scores, in the first batch of every four, that gives the layer's share.
    """
    L = model.config.num_hidden_layers
    lengths = torch.cat([batch.lengths for batch in batches])
    layers = torch.arange(1, L + 1)[:, None]

    def shares(slope: float) -> Tensor:
        return (1 - slope * layers).clamp(min=0.02)

    low, high = 0.0, 1.0
    for _ in range(30):
        slope = (low + high) / 2
        kept = (lengths * shares(slope)).round().long().clamp(min=1)
        too_mild = relative_flops(model.config, lengths, kept) > 1 / reduction
        low, high = (slope, high) if too_mild else (low, slope)
    model.thresholds.fill_(-1.0)
    share = 1.0
    for l, wanted in enumerate(shares(high).flatten().tolist()):
        scores = torch.cat([model(*batch, pruning="hard", trace=True).trace[l].importance for batch in batches[::4]])
        model.thresholds[l] = scores.quantile(1 - wanted / share)
        share = wanted
    kept = torch.cat([model(*batch, pruning="hard").kept for batch in batches], 1)
    dense = lengths.expand(L, -1)
    done = done_macs(model.config, lengths, dense) / done_macs(model.config, lengths, kept)
    return 1 / relative_flops(model.config, lengths, kept), done


def padded(batch: Batch, width: int | None = None) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask (B, width), as other libraries take a batch; width: the longest of the batch."""
    rows = batch.token_ids.split(batch.lengths.tolist())
    width = width or int(batch.lengths.max())
    ids, mask = torch.ones(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask


def contenders(folder: Path, compile: bool) -> dict[str, tuple[Callable, int | None]]:
    """Other libraries' dense runs of the folder: name -> (function of ids and mask to logits, padded width)."""
    import onnxruntime
    import transformers

    def load(attention: str) -> torch.nn.Module:
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, attn_implementation=attention
        ).eval()

    eager, sdpa = load("eager"), load("sdpa")
    runs = {
        "transformers eager": (lambda ids, mask: eager(ids, attention_mask=mask).logits, None),
        "transformers SDPA": (lambda ids, mask: sdpa(ids, attention_mask=mask).logits, None),
        "transformers SDPA, padded to 128": (lambda ids, mask: sdpa(ids, attention_mask=mask).logits, 128),
    }
    if compile:
        compiled = torch.compile(load("sdpa"), dynamic=True)
        runs["transformers SDPA, torch.compile"] = (lambda ids, mask: compiled(ids, attention_mask=mask).logits, None)

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = load("sdpa")

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.model(ids, attention_mask=mask).logits

    example = (torch.ones(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.long))
    shape = {0: torch.export.Dim("batch", min=1, max=4096), 1: torch.export.Dim("length", min=2, max=512)}
    file = folder / "model.onnx"
    torch.onnx.export(
        Plain(), example, file, dynamo=True, dynamic_shapes=(shape, shape), input_names=["ids", "mask"], verbose=False
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    runs["ONNX Runtime"] = (
        lambda ids, mask: torch.from_numpy(session.run(None, dict(zip(names, (ids.numpy(), mask.numpy()))))[0]),
        None,
    )
    return runs


def product_rate(tokens: int, config: Config) -> Callable[[], float]:
    """Measures the FLOPs a second of one large product, (tokens, D) by (D, F)."""
    x, w = torch.randn(tokens, config.hidden_size), torch.randn(config.intermediate_size, config.hidden_size)

    def measure() -> float:
        torch.nn.functional.linear(x, w)  # warms up
        start = time.perf_counter()
        for _ in range(4):
            torch.nn.functional.linear(x, w)
        return 4 * 2 * x.numel() * len(w) / (time.perf_counter() - start)

    return measure


def peak_memory(run: Callable[[], object]) -> int | None:
    """Bytes that the process grows by at the peak of a run; None where the kernel does not tell (it is Linux's)."""

    def status(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    if platform.libc_ver()[0] != "glibc":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed goes back to the kernel
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="base", show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--examples", default=64, show_default=True)
@click.option("--length", type=int, help="All sequences of this length instead of MRPC-like lengths.")
@click.option("--sorted", "by_length", is_flag=True, help="Batches of similar length instead of as the data comes.")
@click.option("--repeats", default=5, show_default=True)
@click.option(
    "--reductions",
    default="1,1.5,2,4",
    show_default=True,
    help="FLOPs reductions of the pruned runs; 1 shows what thresholds cost that drop next to nothing.",
)
@click.option("--compile", is_flag=True, help="Also transformers with torch.compile (takes minutes to compile).")
@click.option("--others/--only-ours", default=True, show_default=True, help="Leave the other libraries out.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the table there.")
@torch.inference_mode()
def main(size, batch_size, examples, length, by_length, repeats, reductions, compile, others, seed, json_file) -> None:
    """Times a dense RoBERTa and its pruned versions against other libraries, in turn, medians after a warm-up."""
    torch.manual_seed(seed)
    keep_freed_memory()
    config = Config(vocab_size=1000, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, **SIZES[size])
    model = Model(config).eval()
    initialize(model, 0.05)
    lengths = [length] * examples if length else mrpc_like_lengths(examples, seed)
    lengths = sorted(lengths) if by_length else lengths
    generator = np.random.default_rng(seed)
    batches = [
        pack([generator.integers(3, 1000, n).tolist() for n in lengths[i : i + batch_size]])
        for i in range(0, examples, batch_size)
    ]

    runs: dict[str, Callable[[Batch], Tensor]] = {
        "ours, dense": lambda batch: model(*batch, pruning="none", count=False).logits
    }
    reached = {"ours, dense": (1.0, 1.0)}
    for wanted in map(float, reductions.split(",")):
        pruned = Model(replace(config, prune_mode="absolute_threshold")).eval()
        pruned.load_state_dict(model.state_dict())
        name = f"ours, {wanted:g}x fewer FLOPs"
        reached[name] = set_thresholds(pruned, batches, wanted)
        runs[name] = lambda batch, pruned=pruned.pack(): pruned(*batch, count=False).logits
    model.pack()
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, model)
        found = contenders(Path(folder), compile) if others else {}
        for name, (run, width) in found.items():
            if length and width and length > width:
                continue
            inputs = {id(batch): padded(batch, width) for batch in batches}
            runs[name] = lambda batch, run=run, inputs=inputs: run(*inputs[id(batch)])
        expected = torch.cat([runs["ours, dense"](batch) for batch in batches])
        for name in runs:
            if name in found:
                difference = (torch.cat([runs[name](batch) for batch in batches]) - expected).abs().max().item()
                if difference > 1e-3:
                    raise click.ClickException(f"{name}: dense logits differ from ours by {difference:.2e}")

        rate = product_rate(int(batches[len(batches) // 2].lengths.sum()), config)
        times: dict[str, list[float]] = {name: [] for name in runs}
        rates = []
        for repeat in range(repeats + 1):
            rates.append(rate())
            for name in generator.permutation(list(runs)):  # what ran before may leave its mark: nobody is always next
                run = runs[name]
                start = time.perf_counter()
                for batch in batches:
                    run(batch)
                if repeat:
                    times[name].append(time.perf_counter() - start)
                if name == "ONNX Runtime":
                    time.sleep(0.5)  # its threads go on spinning for a while
        memory = {name: peak_memory(lambda run=run: run(batches[-1])) for name, run in runs.items()}

    every = torch.tensor(lengths)
    flops = 2 * float(macs(config, every, every.expand(config.num_hidden_layers, -1)).sum())
    seconds = {name: float(np.median(row)) for name, row in times.items()}
    dense = seconds["ours, dense"]
    rows = []
    click.echo(
        f"{'':36}{'examples/s':>11}{'ours faster':>13}{'FLOPs':>8}{'into time':>11}{'computed':>10}{'into time':>11}"
    )
    for name, value in seconds.items():
        row = {
            "name": name,
            "examples_per_second": examples / value,
            "time_over_ours_dense": value / dense,
            "peak_memory_bytes": memory[name],
        }
        if name in reached:
            by_formula, done = reached[name]
            row |= {"flops_reduction": by_formula, "flops_to_time": dense / value / by_formula}
            row |= {"done_reduction": done, "done_to_time": dense / value / done}
        rows.append(row)
        tail = "".join(f"{x:{width}.2f}" for x, width in zip(list(row.values())[4:], (8, 11, 10, 11)))
        click.echo(f"{name:36}{row['examples_per_second']:11.1f}{row['time_over_ours_dense']:12.2f}x{tail}")
    click.echo("\nmemory at the peak of a batch, MB:")
    for name, used in memory.items():
        click.echo(f"{name:36}{'?' if used is None else round(used / 1e6):>11}")
    share = flops / dense / float(np.median(rates[1:]))
    every_layer = every.expand(config.num_hidden_layers, -1)
    done_share = share * done_macs(config, every, every_layer) / float(macs(config, every, every_layer).sum())
    conditions = {
        "size": size,
        "batch_size": batch_size,
        "examples": examples,
        "mean_length": float(every.double().mean()),
        "repeats": repeats,
        "statistic": "median of passes over all examples, in turn, in random order",
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "torch": torch.__version__,
        "machine": platform.machine(),
        "order": "by length" if by_length else "as drawn",
        "dense_rate_over_one_product": share,
        "computed_rate_over_one_product": done_share,
    }
    click.echo(
        f"\nour dense run reaches {share:.2f} of the rate of one large product by the formula, {done_share:.2f} computed"
    )
    click.echo(", ".join(f"{k.replace('_', ' ')} {v}" for k, v in conditions.items() if "rate" not in k))
    if json_file:
        write_file(
            json_file,
            lambda path: path.write_text(json.dumps({"rows": rows, "conditions": conditions}, indent=2) + "\n"),
        )


if __name__ == "__main__":
    main()
