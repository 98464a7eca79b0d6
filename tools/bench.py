"""Measures speed: a checkpoint without pruning, as it prunes, and exported files beside it, in turn in one run."""

from __future__ import annotations

import platform
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import Examples, sorted_batches
from model import Batch, Config, Dense, Model, Pruner, UnscoredLastLayer, bit_operations, last_layer_saving, macs
from runs.checks import check_task, length_limit
from support.checkpoint import load_config, load_model
from support.devices import for_inference
from support.errors import InputError
from support.files import short_names
from support.onnx_file import GRAPH, OnnxModel, model_name, open_file
from support.process import Process, synchronize
from tasks.base import Source
from tasks.tokenizer import Tokenizer
from tools.predict import pruning_name

RANDOM_QUESTION = 12  # tokens of the first segment in random tokens for a model of questions
PAUSE = 0.5  # seconds after a pass of an exported file: ONNX Runtime's threads go on spinning for a while

# ----------------------------------------------------------------------------------------------------------------------
# Contenders, timed in turn


class Contender(NamedTuple):
    """What is timed: a checkpoint dense or as it prunes, or an exported file in its one way."""

    name: str
    model: Model | OnnxModel
    pruner: Pruner  # of the timed passes
    counting_pruner: Pruner  # of the first pass: it gives the last layer's token count, too
    file_bytes: int = 0


@dataclass
class Row:
    """One contender at one batch size."""

    model: str  # "dense" and "pruned" of a checkpoint, or the name of an exported file
    batch_size: int
    file_bytes: int  # of the weights on disk
    latency: float  # seconds a batch, median over batches and passes
    latency_p95: float
    examples_per_second: float  # of the median pass
    speedup: float  # the first contender's time / this one's, medians of the passes
    relative_flops: float  # by the formula of `macs`, as a share of the dense model's
    relative_bops: float  # bit operations as a share of the dense float32 model's
    computed_reduction: float  # of what is computed: both sides without what the last layer saves


@dataclass
class Speed:
    """A checkpoint as it prunes beside its dense self, at one batch size: two rows in one record."""

    batch_size: int
    latency: float
    latency_p95: float
    dense_latency: float
    dense_latency_p95: float
    examples_per_second: float
    dense_examples_per_second: float
    tokens_per_second: float  # tokens of the input, those that are dropped included
    speedup: float  # dense time / pruned time
    flops_reduction: float
    relative_bops: float
    computed_reduction: float
    flops_to_time: float  # speedup / flops_reduction


class Work(NamedTuple):
    """Multiply-accumulates of all batches, and their bit operations."""

    counted: int  # by the formula of `macs`
    computed: int  # those counted, less what the last layer saves
    bit_operations: int  # of those counted


def checkpoint_contenders(model: Model, file_bytes: int = 0) -> list[Contender]:
    """A checkpoint without pruning, and as it prunes."""
    dense = Dense()
    return [
        Contender("dense", model, dense, dense, file_bytes),
        Contender("pruned", model, UnscoredLastLayer(model), model.pruner(), file_bytes),
    ]


def exported_contender(name: str, model: OnnxModel) -> Contender:
    """An exported file."""
    return Contender(name, model, model.pruner(), model.pruner(), model.path.stat().st_size)


@torch.inference_mode()
def measure_rows(contenders: list[Contender], batches: list[Batch], process: Process, repeats: int) -> list[Row]:
    """Times passes of all contenders over all batches, in turn, after a pass of each to warm up.

    The dense model of the first contender is what FLOPs and bit operations are shares of.
    Tokenization and packing are not timed. Neither is the last layer's token count of a checkpoint, which only
    statistics use.
    """
    batches = [batch.to(process.device) for batch in batches]
    lengths = torch.cat([batch.lengths for batch in batches])
    works = []
    for contender in contenders:  # the first pass of each warms up and counts
        kept = time_pass(contender.model.eval(), batches, contender.counting_pruner, process=process)[1]
        works.append(count_work(contender.model, lengths, kept))
    passes: list[list[list[float]]] = [[] for _ in contenders]
    for _ in range(repeats):
        for contender, times in zip(contenders, passes):
            times.append(time_pass(contender.model, batches, contender.pruner, process=process)[0])
    first = contenders[0].model
    dense = count_work(first, lengths, lengths.expand(first.config.num_hidden_layers, -1))
    seconds = [float(np.median(np.sum(times, 1))) for times in passes]
    return [
        Row(
            model=contender.name,
            batch_size=max(len(batch.lengths) for batch in batches),
            file_bytes=contender.file_bytes,
            latency=float(np.median(times)),
            latency_p95=float(np.quantile(times, 0.95)),
            examples_per_second=len(lengths) / total,
            speedup=seconds[0] / total,
            relative_flops=work.counted / dense.counted,
            relative_bops=work.bit_operations / (32**2 * dense.counted),
            computed_reduction=dense.computed / work.computed,
        )
        for contender, times, total, work in zip(contenders, passes, seconds, works)
    ]


def time_pass(
    model: Model | OnnxModel, batches: list[Batch], pruner: Pruner, process: Process
) -> tuple[list[float], Tensor]:
    """The seconds of each batch, and the tokens kept (L, B) in all of them."""
    times, outputs = [], []
    for batch in batches:
        synchronize(process)
        start = time.perf_counter()
        with process.autocast(model):
            outputs.append(model(batch, pruner))
        synchronize(process)
        times.append(time.perf_counter() - start)
    if isinstance(model, OnnxModel):
        time.sleep(PAUSE)
    return times, torch.cat([output.kept for output in outputs], 1)


def count_work(model: Model | OnnxModel, lengths: Tensor, kept: Tensor) -> Work:
    """lengths (B,), kept (L, B) with the last layer's true counts."""
    config = model.config
    counted = int(macs(config, lengths, kept).sum())
    entering = torch.cat([lengths[None], kept])[-2]
    saved = int(last_layer_saving(config, entering, kept[-1]).sum())
    return Work(counted, counted - saved, int(bit_operations(config, lengths, kept, model.linear_bits).sum()))


def speed_of(dense: Row, pruned: Row, mean_length: float) -> Speed:
    """The record of a checkpoint's two rows. mean_length: tokens of an example."""
    return Speed(
        batch_size=pruned.batch_size,
        latency=pruned.latency,
        latency_p95=pruned.latency_p95,
        dense_latency=dense.latency,
        dense_latency_p95=dense.latency_p95,
        examples_per_second=pruned.examples_per_second,
        dense_examples_per_second=dense.examples_per_second,
        tokens_per_second=pruned.examples_per_second * mean_length,
        speedup=pruned.speedup,
        flops_reduction=1 / pruned.relative_flops,
        relative_bops=pruned.relative_bops,
        computed_reduction=pruned.computed_reduction,
        flops_to_time=pruned.speedup * pruned.relative_flops,
    )


def measure_speed(model: Model, batches: list[Batch], process: Process, repeats: int = 5) -> Speed:
    """A checkpoint's speed as it prunes, beside its dense self, see `measure_rows`."""
    mean_length = float(torch.cat([batch.lengths for batch in batches]).double().mean())
    return speed_of(*measure_rows(checkpoint_contenders(model), batches, process, repeats=repeats), mean_length)


# ----------------------------------------------------------------------------------------------------------------------
# The command


@dataclass
class BenchOptions:
    """What is timed, and how often."""

    batch_sizes: tuple[int, ...] = (1, 32)
    examples: int = 256
    repeats: int = 5
    lengths: list[int] | None = None  # random tokens, each sequence of one of these lengths, instead of a task's texts
    max_length: int | None = None  # texts are cut to this many tokens; None: the checkpoint's setting
    seed: int = 42  # of the choice of examples, or of the random tokens
    beside: tuple[Path, ...] = ()  # exported files to time in the same run


def bench_checkpoint(folder: Path, source: Source | None, options: BenchOptions, process: Process) -> dict[str, Any]:
    """Measures a checkpoint at each batch size, on examples of the source or, without one, on random tokens.

    folder: of a checkpoint, or of an opened exported file, over which the speed-ups are then.
    Returns {"speeds": [a `Speed` each], "rows": [a `Row` of each contender at each size], "conditions": {...}}; an
    exported file has no `Speed`. Raises: InputError.
    """
    exported = [*folder.glob(GRAPH), *options.beside]
    if exported and process.device.type != "cpu":
        raise InputError(f"{exported[0].resolve()}: an exported model runs on the CPU; pass --device cpu")
    if exported and process.precision != "fp32":
        raise InputError(f"--precision {process.precision}: {exported[0].resolve()} computes as it was exported")
    model = for_inference(load_model(folder).model, process)
    contenders = find_contenders(folder, model, options.beside, has_texts=source is not None)
    if source is None:
        examples = random_examples(folder, model.config, options)
    else:
        examples = task_examples(folder, model.config, source, options=options)
    mean_length, speeds, rows = float(examples.lengths.mean()), [], []
    for size in options.batch_sizes:
        measured = measure_rows(contenders, sorted_batches(examples, size), process, repeats=options.repeats)
        rows += [asdict(row) for row in measured]
        if isinstance(model, Model):
            speeds.append(asdict(speed_of(*measured[:2], mean_length)))
    quantiles = np.quantile(examples.lengths, (0.05, 0.5, 0.95)).tolist()
    conditions = {
        "checkpoint": str(model_name(folder)),
        "pruning": pruning_name(model.config),
        "data": source.task.name if source else "random tokens",
        "examples": len(examples),
        "mean_length": mean_length,
        "length_quantiles": dict(zip(("5%", "50%", "95%"), quantiles)),
        "device": device_name(process),
        "precision": process.precision,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "repeats": options.repeats,
        "statistic": "median",
        "peak_memory_bytes": peak_memory(process),
    }
    if exported:
        import onnxruntime

        conditions["onnxruntime"] = onnxruntime.__version__
    return {"speeds": speeds, "rows": rows, "conditions": conditions}


def find_contenders(
    folder: Path, model: Model | OnnxModel, beside: tuple[Path, ...], has_texts: bool
) -> list[Contender]:
    """The model of the folder, and the exported files beside it. Raises: InputError."""
    others = [open_beside(path, folder, model.config, has_texts=has_texts) for path in beside]
    if isinstance(model, Model):
        names, contenders = short_names(list(beside)), checkpoint_contenders(model, weight_bytes(folder))
    else:
        name, *names = short_names([model_name(folder), *beside])
        contenders = [exported_contender(name, model)]
    return contenders + [exported_contender(*both) for both in zip(names, others)]


def open_beside(path: Path, folder: Path, config: Config, has_texts: bool) -> OnnxModel:
    """The model of an exported file, which must answer the same texts as the folder's. Raises: InputError."""
    opened = open_file(path)
    other = load_config(opened)
    for name in ("head", "labels", "vocab_size", "max_position_embeddings"):
        values = getattr(other, name), getattr(config, name)
        if values[0] != values[1]:
            raise InputError(
                f"--beside {path}: has {name} = {values[0]}, and {model_name(folder)} has {values[1]}; pass files of "
                "one task and one vocabulary"
            )
    if has_texts and Tokenizer(opened).identity != Tokenizer(folder).identity:
        raise InputError(f"--beside {path}: its tokenizer is not that of {model_name(folder)}; the tokens would differ")
    return load_model(opened).model


def weight_bytes(folder: Path) -> int:
    """The size of a checkpoint's weights on disk."""
    files = [*folder.glob("model*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
    return sum(file.stat().st_size for file in files)


def random_examples(folder: Path, config: Config, options: BenchOptions) -> Examples:
    """Sequences of random tokens. Raises: InputError for a length that the model has no positions for."""
    generator = np.random.default_rng(options.seed)
    lengths = np.sort(generator.choice(options.lengths, options.examples)).astype(np.int64)
    if lengths[-1] > config.max_tokens:
        raise InputError(f"--lengths {lengths[-1]}: {model_name(folder)} has positions for {config.max_tokens} tokens")
    token_ids = np.concatenate([generator.integers(0, config.vocab_size, n) for n in lengths])
    segment_ids = np.zeros(len(token_ids), dtype=np.int8)
    questions = np.minimum(lengths, RANDOM_QUESTION) if config.head == "span" else None
    return Examples(token_ids, segment_ids, lengths, targets=np.empty(0), question_lengths=questions)


def task_examples(folder: Path, config: Config, source: Source, options: BenchOptions) -> Examples:
    """A random choice of the source's examples, in their order. Raises: InputError."""
    tokenizer, path = Tokenizer(folder), model_name(folder)
    labels = check_task(path, config, source.task)
    limit = length_limit(config, path, options.max_length)
    examples = source.load("eval", tokenizer, limit, labels=labels)[0][""]
    chosen = np.random.default_rng(options.seed).permutation(len(examples))[: options.examples]
    return examples.select(np.sort(chosen))


def device_name(process: Process) -> str:
    """The GPU's or the processor's name."""
    if process.device.type == "cuda":
        return torch.cuda.get_device_name(process.device)
    return platform.processor() or platform.machine()


def peak_memory(process: Process) -> int:
    """Bytes that the GPU's tensors, or the whole process on a CPU, took at the peak so far."""
    if process.device.type == "cuda":
        return torch.cuda.max_memory_allocated(process.device)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
