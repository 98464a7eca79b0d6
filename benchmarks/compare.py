"""Our dense and pruned runs beside transformers and ONNX Runtime: same weights, same inputs, one run.

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/compare.py --size base --json benchmarks/base.json

Random weights serve: speed does not depend on them, except for which tokens are pruned, and the thresholds are set so
that the pruned runs reach the asked FLOPs reductions. All dense logits are compared before anything is timed.
"""

from __future__ import annotations

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
from model import Config, Model, initialize, macs, save_model, write_file  # noqa: E402

SIZES = {
    "base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "minilm": dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
}


def mrpc_like_lengths(count: int, seed: int) -> list[int]:
    """Lengths with the mean (53) and spread of MRPC's sentence pairs."""
    drawn = np.random.default_rng(seed).normal(53, 14, count)
    return np.clip(np.round(drawn), 20, 103).astype(int).tolist()


@torch.inference_mode()
def set_thresholds(model: Model, batches: list[Batch], reduction: float) -> float:
    """Thresholds under which the batches take 1 / `reduction` of the dense FLOPs; returns what they reach.

    The share of tokens that leaves layer l falls linearly with l, at a slope found by bisection; each threshold is then
    the quantile of the scores that gives its layer's share.
    """
    L = model.config.num_hidden_layers
    lengths = torch.cat([batch.lengths for batch in batches])
    dense = macs(model.config, lengths, lengths.expand(L, -1)).sum()

    def reached() -> float:
        kept = torch.cat([model(*batch, pruning="hard").kept for batch in batches], 1)
        return float(dense / macs(model.config, lengths, kept).sum())

    def apply(slope: float) -> float:
        model.thresholds.fill_(-1.0)
        share = 1.0
        for l in range(L):
            wanted = max(0.03, 1 - slope * (l + 1))
            scores = torch.cat([model(*batch, pruning="hard", trace=True).trace[l].importance for batch in batches])
            model.thresholds[l] = scores.quantile(max(0.0, 1 - wanted / share)) if wanted < share else -1.0
            share = wanted
        return reached()

    low, high = 0.0, 1.0
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (middle, high) if apply(middle) < reduction else (low, middle)
    return apply(high)


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
        start = time.perf_counter()
        for _ in range(4):
            torch.nn.functional.linear(x, w)
        return 4 * 2 * x.numel() * len(w) / (time.perf_counter() - start)

    return measure


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="base", show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--examples", default=96, show_default=True)
@click.option("--length", type=int, help="All sequences of this length instead of MRPC-like lengths.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--reductions", default="1.5,2,4", show_default=True, help="FLOPs reductions of the pruned runs.")
@click.option("--compile", is_flag=True, help="Also transformers with torch.compile (takes minutes to compile).")
@click.option("--others/--only-ours", default=True, show_default=True, help="Leave the other libraries out.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the table there.")
@torch.inference_mode()
def main(size, batch_size, examples, length, repeats, reductions, compile, others, seed, json_file) -> None:
    """Times a dense RoBERTa and its pruned versions against other libraries, in turn, medians after a warm-up."""
    torch.manual_seed(seed)
    config = Config(vocab_size=1000, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, **SIZES[size])
    model = Model(config).eval()
    initialize(model, 0.05)
    lengths = sorted([length] * examples if length else mrpc_like_lengths(examples, seed))
    generator = np.random.default_rng(seed)
    batches = [
        pack([generator.integers(3, 1000, n).tolist() for n in lengths[i : i + batch_size]])
        for i in range(0, examples, batch_size)
    ]

    runs: dict[str, Callable[[Batch], Tensor]] = {"ours, dense": lambda batch: model(*batch, pruning="none").logits}
    reached = {"ours, dense": 1.0}
    for wanted in map(float, reductions.split(",")):
        pruned = Model(replace(config, prune_mode="absolute_threshold")).eval()
        pruned.load_state_dict(model.state_dict())
        name = f"ours, {wanted:g}x fewer FLOPs"
        reached[name] = set_thresholds(pruned, batches, wanted)
        runs[name] = lambda batch, pruned=pruned: pruned(*batch).logits
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
            for name, run in runs.items():
                start = time.perf_counter()
                for batch in batches:
                    run(batch)
                if repeat:
                    times[name].append(time.perf_counter() - start)

    every = torch.tensor(lengths)
    flops = 2 * float(macs(config, every, every.expand(config.num_hidden_layers, -1)).sum())
    seconds = {name: float(np.median(row)) for name, row in times.items()}
    dense = seconds["ours, dense"]
    rows = []
    click.echo(f"{'':36}{'examples/s':>11}{'time / ours':>13}{'FLOPs':>8}{'FLOPs into time':>17}")
    for name, value in seconds.items():
        row = {"name": name, "examples_per_second": examples / value, "time_over_ours_dense": value / dense}
        if name in reached:
            row |= {
                "flops_reduction": reached[name],
                "speedup": dense / value,
                "flops_to_time": dense / value / reached[name],
            }
        rows.append(row)
        tail = f"{row['flops_reduction']:7.2f}x{row['flops_to_time']:17.2f}" if name in reached else ""
        click.echo(f"{name:36}{row['examples_per_second']:11.1f}{row['time_over_ours_dense']:13.2f}{tail}")
    share = flops / dense / float(np.median(rates[1:]))
    conditions = {
        "size": size,
        "batch_size": batch_size,
        "examples": examples,
        "mean_length": float(every.double().mean()),
        "repeats": repeats,
        "statistic": "median of passes over all examples, in turn",
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "torch": torch.__version__,
        "machine": platform.machine(),
        "dense_rate_over_one_product": share,
    }
    click.echo(f"\nour dense run reaches {share:.2f} of the rate of one large product (by the full formula)")
    click.echo(", ".join(f"{k.replace('_', ' ')} {v}" for k, v in conditions.items()))
    if json_file:
        write_file(
            json_file,
            lambda path: path.write_text(json.dumps({"rows": rows, "conditions": conditions}, indent=2) + "\n"),
        )


if __name__ == "__main__":
    main()
