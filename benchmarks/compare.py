"""Our dense and pruned runs beside transformers and ONNX Runtime: same weights, same inputs, one run.

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/compare.py --size base --json benchmarks/base.json

The weights are random: speed does not depend on them, except for which tokens are pruned, and the thresholds are set so
that the pruned runs reach the given FLOPs reductions. All dense logits are compared before anything is timed. Freed
memory is kept (support.cpu.keep_freed_memory) for every contender, which helps the others as much as ours.
"""

from __future__ import annotations

import ctypes
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import Batch, Config, Dense, Hard, Model, UnscoredLastLayer, initialize, last_layer_saving, macs, pack  # noqa: E402
from support.checkpoint import save_model  # noqa: E402
from support.cpu import keep_freed_memory, pack_weights  # noqa: E402
from support.files import write_json  # noqa: E402
from tools.inspect import AllScores  # noqa: E402
from train import relative_flops  # noqa: E402

SIZES = {
    "base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "minilm": dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
}
DENSE = "ours, dense"
TOLERANCE = 1e-3  # of the dense logits
Run = Callable[[Batch], Tensor]

# ----------------------------------------------------------------------------------------------------------------------
# Inputs and thresholds


def mrpc_like_lengths(count: int, seed: int) -> list[int]:
    """Lengths with the mean (53) and spread of MRPC's sentence pairs."""
    drawn = np.random.default_rng(seed).normal(53, 14, count)
    return np.clip(np.round(drawn), 20, 103).astype(int).tolist()


def computed_macs(config: Config, lengths: Tensor, kept: Tensor) -> float:
    """Multiply-accumulates that are computed: those of the formula less what the last layer saves."""
    entering = torch.cat([lengths[None], kept])[-2]
    return float((macs(config, lengths, kept) - last_layer_saving(config, entering, kept[-1])).sum())


class Reduction(NamedTuple):
    """Dense FLOPs over a run's FLOPs."""

    by_formula: float
    computed: float  # without what the last layer saves


@torch.inference_mode()
def set_thresholds(model: Model, batches: list[Batch], reduction: float) -> Reduction:
    """Sets thresholds under which the batches take about 1 / `reduction` of the dense FLOPs.

    The share of tokens that leaves layer l falls linearly with l, at the slope that gives the reduction. Each threshold
    is the quantile of its layer's scores that gives the layer's share, in the first batch of every four.
    """
    L = model.config.num_hidden_layers
    lengths = torch.cat([batch.lengths for batch in batches]).cpu()
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
    previous = 1.0
    for l, share in enumerate(shares(high).flatten().tolist()):
        pruner = AllScores(Hard(model.thresholds))
        scores = torch.cat([model(batch, pruner).steps[l].scores for batch in batches[::4]])
        model.thresholds[l] = scores.quantile(1 - share / previous)
        previous = share
    pruner = model.pruner()
    kept = torch.cat([model(batch, pruner).kept for batch in batches], 1).cpu()
    computed = computed_macs(model.config, lengths, lengths.expand(L, -1)) / computed_macs(model.config, lengths, kept)
    return Reduction(1 / relative_flops(model.config, lengths, kept), computed)


def padded(batch: Batch, width: int | None = None) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask (B, width), as other libraries take a batch; width: the longest of the batch."""
    rows = batch.token_ids.split(batch.lengths.tolist())
    width = width or int(batch.lengths.max())
    ids, mask = torch.ones(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask


# ----------------------------------------------------------------------------------------------------------------------
# Contenders


def our_runs(
    model: Model, batches: list[Batch], reductions: list[float]
) -> tuple[dict[str, Run], dict[str, Reduction], dict[str, Model]]:
    """The dense run and the pruned ones, the FLOPs reductions that they reach, and their models."""
    dense, models = Dense(), {DENSE: model}
    runs: dict[str, Run] = {DENSE: lambda batch: model(batch, dense).logits}
    reached = {DENSE: Reduction(1.0, 1.0)}
    for reduction in reductions:
        pruned = Model(replace(model.config, prune_mode="absolute_threshold")).eval()
        pruned.load_state_dict(model.state_dict())
        name = f"ours, {reduction:g}x fewer FLOPs"
        reached[name], models[name] = set_thresholds(pruned, batches, reduction), pruned
        pruner = UnscoredLastLayer(pruned)
        runs[name] = lambda batch, pruned=pack_weights(pruned), pruner=pruner: pruned(batch, pruner).logits
    pack_weights(model)
    return runs, reached, models


def add_exported(runs: dict[str, Run], models: dict[str, Model], folder: Path) -> dict[str, int]:
    """Adds our exported graphs in ONNX Runtime to `runs`, in float32 and in int8. Returns the sizes of their files."""
    from support.onnx_file import OnnxModel
    from tools.export import export_model

    sizes = {}
    for i, (name, model) in enumerate(models.items()):
        copy = Model(model.config).eval()
        copy.load_state_dict(model.state_dict())
        for int8, ending in ((False, "ONNX Runtime"), (True, "ONNX Runtime, int8")):
            path = folder / f"{i}-{ending}.onnx"
            export_model(copy, path, int8=int8)
            graph = OnnxModel(model.config, path, list(range(len(model.config.labels))))
            runs[f"{name}, {ending}"] = lambda batch, graph=graph: graph(batch).logits
            sizes[f"{name}, {ending}"] = path.stat().st_size
    return sizes


def other_libraries(folder: Path, compile: bool) -> dict[str, tuple[Callable, int | None]]:
    """Other libraries' dense runs of the folder: name -> (function of ids and mask to logits, padded width)."""
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
    runs["ONNX Runtime"] = (onnx_run(load("sdpa"), folder / "model.onnx"), None)
    return runs


class LogitsOnly(torch.nn.Module):
    """A model of transformers that takes ids and mask and returns logits, for the exporter."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(ids, attention_mask=mask).logits


def onnx_run(model: torch.nn.Module, file: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """Exports a model of transformers to ONNX and runs it in ONNX Runtime."""
    import onnxruntime

    example = (torch.ones(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.long))
    shape = {0: torch.export.Dim("batch", min=1, max=4096), 1: torch.export.Dim("length", min=2, max=512)}
    options = {"dynamo": True, "dynamic_shapes": (shape, shape), "input_names": ["ids", "mask"], "verbose": False}
    torch.onnx.export(LogitsOnly(model), example, file, **options)
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, session_options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return lambda ids, mask: torch.from_numpy(session.run(None, dict(zip(names, (ids.numpy(), mask.numpy()))))[0])


def add_others(runs: dict[str, Run], folder: Path, batches: list[Batch], compile: bool) -> None:
    """Adds other libraries' runs to `runs`. Raises: ClickException if their dense logits are not ours."""
    longest = max(int(batch.lengths.max()) for batch in batches)
    expected = torch.cat([runs[DENSE](batch) for batch in batches])
    for name, (run, width) in other_libraries(folder, compile).items():
        if width and longest > width:
            continue
        inputs = {id(batch): padded(batch, width) for batch in batches}
        runs[name] = lambda batch, run=run, inputs=inputs: run(*inputs[id(batch)])
        difference = (torch.cat([runs[name](batch) for batch in batches]) - expected).abs().max().item()
        if difference > TOLERANCE:
            raise click.ClickException(f"{name}: dense logits differ from ours by {difference:.2e}")


# ----------------------------------------------------------------------------------------------------------------------
# Measurements


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


def time_in_turn(
    runs: dict[str, Run], batches: list[Batch], rate: Callable[[], float], repeats: int, generator: np.random.Generator
) -> tuple[dict[str, float], float]:
    """The median seconds of a pass over all batches, by run, and the median of `rate`, after a pass to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    rates = []
    for repeat in range(repeats + 1):
        rates.append(rate())
        for name in generator.permutation(list(runs)):  # one run may disturb the next: the order changes
            start = time.perf_counter()
            for batch in batches:
                runs[name](batch)
            if repeat:
                times[name].append(time.perf_counter() - start)
            if "ONNX Runtime" in name:
                time.sleep(0.5)  # its threads go on spinning for a while
    return {name: float(np.median(row)) for name, row in times.items()}, float(np.median(rates[1:]))


# ----------------------------------------------------------------------------------------------------------------------
# The table


def table_rows(
    seconds: dict[str, float],
    reached: dict[str, Reduction],
    memory: dict[str, int | None],
    file_bytes: dict[str, int],
    examples: int,
) -> list[dict[str, Any]]:
    """A record for each run."""
    rows, dense = [], seconds[DENSE]
    for name, value in seconds.items():
        row = {
            "name": name,
            "examples_per_second": examples / value,
            "time_over_ours_dense": value / dense,
            "peak_memory_bytes": memory[name],
            "file_bytes": file_bytes.get(name),
        }
        if name in reached:
            by_formula, computed = reached[name]
            row |= {"flops_reduction": by_formula, "flops_to_time": dense / value / by_formula}
            row |= {"computed_reduction": computed, "computed_to_time": dense / value / computed}
        rows.append(row)
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    titles = ("examples/s", "ours faster", "FLOPs", "into time", "computed", "into time")
    widths = (11, 13, 8, 11, 10, 11)
    click.echo(" " * 36 + "".join(f"{title:>{width}}" for title, width in zip(titles, widths)))
    for row in rows:
        tail = "".join(f"{value:{width}.2f}" for value, width in zip(list(row.values())[5:], widths[2:]))
        click.echo(f"{row['name']:36}{row['examples_per_second']:11.1f}{row['time_over_ours_dense']:12.2f}x{tail}")
    click.echo("\nmemory at the peak of a batch, and size of an exported file, MB:")
    for row in rows:
        used, size = row["peak_memory_bytes"], row["file_bytes"]
        size = "" if size is None else round(size / 1e6)
        click.echo(f"{row['name']:36}{'?' if used is None else round(used / 1e6):>11}{size:>13}")


def print_result(rows: list[dict[str, Any]], conditions: dict[str, Any]) -> None:
    """The table of one batch size, and what was measured."""
    print_rows(rows)
    shares = [f"{value:.2f}" for name, value in conditions.items() if "rate" in name]
    click.echo(f"\nour dense run reaches {shares[0]} of one large product's rate by the formula, {shares[1]} computed")
    click.echo(", ".join(f"{k.replace('_', ' ')} {v}" for k, v in conditions.items() if "rate" not in k) + "\n")


def make_conditions(
    options: dict[str, Any], batch_size: int, config: Config, lengths: Tensor, product: float
) -> dict[str, Any]:
    """What was measured and how. product: the rate that the dense run reaches by the formula, over one product's."""
    every_layer = lengths.expand(config.num_hidden_layers, -1)
    computed = computed_macs(config, lengths, every_layer) / float(macs(config, lengths, every_layer).sum())
    return {
        "size": options["size"],
        "batch_size": batch_size,
        "examples": options["examples"],
        "mean_length": float(lengths.double().mean()),
        "repeats": options["repeats"],
        "statistic": "median of passes over all examples, in turn, in random order",
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "torch": torch.__version__,
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "order": "by length" if options["by_length"] else "as drawn",
        "dense_rate_over_one_product": product,
        "computed_rate_over_one_product": product * computed,
    }


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="base", show_default=True)
@click.option("--batch-size", "batch_sizes", default=[32], multiple=True, show_default=True)
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
@click.option("--exported", is_flag=True, help="Also our exported graphs, in float32 and int8.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the table there.")
@torch.inference_mode()
def main(**options: Any) -> None:
    """Times a dense RoBERTa and its pruned versions against other libraries, in turn, medians after a warm-up."""
    seed, examples = options["seed"], options["examples"]
    torch.manual_seed(seed)
    keep_freed_memory()
    config = Config(1000, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, **SIZES[options["size"]])
    model = Model(config).eval()
    initialize(model, 0.05)
    lengths = [options["length"]] * examples if options["length"] else mrpc_like_lengths(examples, seed)
    lengths = sorted(lengths) if options["by_length"] else lengths
    generator = np.random.default_rng(seed)
    sequences = [generator.integers(3, 1000, n).tolist() for n in lengths]
    parts = {size: [pack(sequences[i : i + size]) for i in range(0, examples, size)] for size in options["batch_sizes"]}
    largest = parts[max(parts)]
    runs, reached, models = our_runs(model, largest, [float(word) for word in options["reductions"].split(",")])
    results, file_bytes = [], {}
    with tempfile.TemporaryDirectory() as folder:
        if options["others"]:
            save_model(folder, model)
            add_others(
                runs, Path(folder), [batch for batches in parts.values() for batch in batches], options["compile"]
            )
        if options["exported"]:
            file_bytes = add_exported(runs, models, Path(folder))
        every = torch.tensor(lengths)
        flops = 2 * float(macs(config, every, every.expand(config.num_hidden_layers, -1)).sum())
        for size, batches in parts.items():
            rate = product_rate(int(batches[len(batches) // 2].lengths.sum()), config)
            seconds, product = time_in_turn(runs, batches, rate, options["repeats"], generator)
            memory = {name: peak_memory(lambda run=run: run(batches[-1])) for name, run in runs.items()}
            rows = table_rows(seconds, reached, memory, file_bytes, examples)
            conditions = make_conditions(options, size, config, every, flops / seconds[DENSE] / product)
            print_result(rows, conditions)
            results.append({"rows": rows, "conditions": conditions})
    if options["json_file"]:
        write_json(options["json_file"], results)


if __name__ == "__main__":
    main()
