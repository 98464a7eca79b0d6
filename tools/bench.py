"""Measures speed: a checkpoint as it prunes beside itself without pruning, batch by batch in one run."""

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
from model import Batch, Config, Dense, Model, Uncounted, last_layer_saving, macs
from runs.checks import check_task, length_limit
from support.checkpoint import load_model
from support.devices import for_inference
from support.errors import InputError
from support.process import Process, synchronize
from tasks.base import Source
from tasks.tokenizer import Tokenizer
from tools.predict import pruning_name

RANDOM_QUESTION = 12  # tokens of the first segment in random tokens for a model of questions


@dataclass
class Speed:
    """A model as it prunes beside its dense self, at one batch size."""

    batch_size: int
    latency: float  # seconds a batch, median over batches and passes
    latency_p95: float
    dense_latency: float
    dense_latency_p95: float
    examples_per_second: float  # of the median pass
    dense_examples_per_second: float
    tokens_per_second: float  # tokens of the input, those that are dropped included
    speedup: float  # dense time / pruned time, medians of the passes
    flops_reduction: float  # by the formula of `macs`
    done_reduction: float  # of what is computed: both sides without what the last layer saves
    flops_to_time: float  # speedup / flops_reduction


class Work(NamedTuple):
    """Multiply-accumulates of all batches."""

    counted: int  # by the formula of `macs`
    done: int  # without what the last layer saves


@torch.inference_mode()
def measure_speed(model: Model, batches: list[Batch], process: Process, repeats: int = 5) -> Speed:
    """Times passes over all batches as the model prunes and dense, in turn, after a pass to warm up.

    Tokenization and packing are not timed. Neither is the last layer's token count, which only statistics use.
    """
    model.eval()
    batches = [batch.to(process.device) for batch in batches]
    lengths = torch.cat([batch.lengths for batch in batches])
    # The first pass of each warms up and counts.
    pruned_work = count_work(model.config, lengths, time_pass(model, batches, model.pruner(), process=process)[1])
    dense_work = count_work(model.config, lengths, time_pass(model, batches, Dense(), process=process)[1])
    pruner, times, dense_times = Uncounted(model), [], []
    for _ in range(repeats):
        times.append(time_pass(model, batches, pruner, process=process)[0])
        dense_times.append(time_pass(model, batches, Dense(), process=process)[0])
    pruned, dense = np.array(times), np.array(dense_times)  # (repeats, batches)
    seconds, dense_seconds = float(np.median(pruned.sum(1))), float(np.median(dense.sum(1)))
    speedup, reduction = dense_seconds / seconds, dense_work.counted / pruned_work.counted
    return Speed(
        batch_size=max(len(batch.lengths) for batch in batches),
        latency=float(np.median(pruned)),
        latency_p95=float(np.quantile(pruned, 0.95)),
        dense_latency=float(np.median(dense)),
        dense_latency_p95=float(np.quantile(dense, 0.95)),
        examples_per_second=len(lengths) / seconds,
        dense_examples_per_second=len(lengths) / dense_seconds,
        tokens_per_second=int(lengths.sum()) / seconds,
        speedup=speedup,
        flops_reduction=reduction,
        done_reduction=dense_work.done / pruned_work.done,
        flops_to_time=speedup / reduction,
    )


def time_pass(model: Model, batches: list[Batch], pruner: Dense, process: Process) -> tuple[list[float], Tensor]:
    """The seconds of each batch, and the tokens kept (L, B) in all of them."""
    times, outputs = [], []
    for batch in batches:
        synchronize(process)
        start = time.perf_counter()
        with process.autocast(model):
            outputs.append(model(batch, pruner))
        synchronize(process)
        times.append(time.perf_counter() - start)
    return times, torch.cat([output.kept for output in outputs], 1)


def count_work(config: Config, lengths: Tensor, kept: Tensor) -> Work:
    """lengths (B,), kept (L, B) with the last layer's true counts."""
    counted = int(macs(config, lengths, kept).sum())
    entering = torch.cat([lengths[None], kept])[-2]
    return Work(counted, counted - int(last_layer_saving(config, entering, kept[-1]).sum()))


@dataclass
class BenchOptions:
    """What is timed, and how often."""

    batch_sizes: tuple[int, ...] = (1, 32)
    examples: int = 256
    repeats: int = 5
    lengths: list[int] | None = None  # random tokens, each sequence of one of these lengths, instead of a task's texts
    max_length: int | None = None  # texts are cut to this many tokens; None: the checkpoint's setting
    seed: int = 42  # of the choice of examples, or of the random tokens


def bench_checkpoint(folder: Path, source: Source | None, options: BenchOptions, process: Process) -> dict[str, Any]:
    """Measures a checkpoint at each batch size, on examples of the source or, without one, on random tokens.

    Returns {"speeds": [a `Speed` each], "conditions": {...}}. Raises: InputError.
    """
    model = for_inference(load_model(folder).model, process)
    if source is None:
        examples = random_examples(folder, model.config, options)
    else:
        examples = task_examples(folder, model.config, source, options=options)
    speeds = [
        measure_speed(model, sorted_batches(examples, size), process, repeats=options.repeats)
        for size in options.batch_sizes
    ]
    quantiles = np.quantile(examples.lengths, (0.05, 0.5, 0.95)).tolist()
    conditions = {
        "checkpoint": str(folder),
        "pruning": pruning_name(model.config),
        "data": source.task.name if source else "random tokens",
        "examples": len(examples),
        "mean_length": float(examples.lengths.mean()),
        "length_quantiles": dict(zip(("5%", "50%", "95%"), quantiles)),
        "device": device_name(process),
        "precision": process.precision,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "repeats": options.repeats,
        "statistic": "median",
        "peak_memory_bytes": peak_memory(process),
    }
    return {"speeds": [asdict(speed) for speed in speeds], "conditions": conditions}


def random_examples(folder: Path, config: Config, options: BenchOptions) -> Examples:
    """Sequences of random tokens. Raises: InputError for a length that the model has no positions for."""
    generator = np.random.default_rng(options.seed)
    lengths = np.sort(generator.choice(options.lengths, options.examples)).astype(np.int64)
    if lengths[-1] > config.max_tokens:
        raise InputError(f"--lengths {lengths[-1]}: {folder} has positions for {config.max_tokens} tokens")
    token_ids = np.concatenate([generator.integers(0, config.vocab_size, n) for n in lengths])
    segment_ids = np.zeros(len(token_ids), dtype=np.int8)
    questions = np.minimum(lengths, RANDOM_QUESTION) if config.head == "span" else None
    return Examples(token_ids, segment_ids, lengths, targets=np.empty(0), question_lengths=questions)


def task_examples(folder: Path, config: Config, source: Source, options: BenchOptions) -> Examples:
    """A random choice of the source's examples, in their order. Raises: InputError."""
    tokenizer = Tokenizer(folder)
    labels = check_task(folder, config, source.task)
    limit = length_limit(config, folder, options.max_length)
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
