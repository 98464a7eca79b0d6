"""The training loop of every stage, evaluation, and prediction: one process or many, under torchrun.

Reads top to bottom: processes, precision, optimizer and schedule, the loss, evaluation, the loop.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import math
import os
import platform
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

from card import cached_name, is_ours, write_card
from data import (
    STAGES,
    Batch,
    Examples,
    InputError,
    Interrupted,
    Settings,
    Source,
    Task,
    Tokenizer,
    check_room,
    chunked,
    custom_task,
    epoch_batches,
    flag,
    is_text,
    load_examples,
    pack,
    plural,
    read_columns,
    token_batches,
    write_demo,
)
from model import (
    Config,
    Model,
    SelfAttention,
    TokenHead,
    initialize,
    last_layer_saving,
    load_config,
    load_model,
    macs,
    save_model,
    threshold_ladder,
    topk_counts,
    topk_rates,
    write_file,
)
from squad import Question, choose_text, find_answers, load_questions, make_windows
from tagging import Sentence, align, best_labels, load_sentences

# ----------------------------------------------------------------------------------------------------------------------
# Processes and precision


@dataclass(frozen=True)
class Process:
    """This process among all: `rank` of `world`, computing on `device` in `precision` ("fp32" or "bf16")."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    precision: str = "fp32"

    @property
    def main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager:
        """bf16 for the matrix products; softmax, scores, masks and thresholds stay in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def sum(self, values: Tensor) -> Tensor:
        """Adds a tensor up over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def broadcast(self, value: Any) -> Any:
        """The main process's value, on every process."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def gather(self, value: Any) -> list:
        """Every process's value, in rank order, on every process."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def keep_freed_memory() -> None:
    """Makes glibc keep large blocks that are freed, for the next tensor of that size.

    By default it gives them back to the kernel at once, and getting them again page by page takes a CPU a quarter of
    the time of a forward pass. Elsewhere than on glibc this does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def start_process(
    device: str | None = None, precision: str | None = None, threads: int | None = None, seed: int = 42
) -> Process:
    """Joins torchrun's process group where there is one, picks the device, and seeds.

    device: default CUDA where there is any; precision: default bf16 on CUDA, fp32 elsewhere.
    Raises: InputError for a device that is not there.
    """
    keep_freed_memory()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if threads:
        torch.set_num_threads(threads)
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise InputError(f"--device {device}: unknown; use cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: not supported; use cpu, cuda or cuda:N")
    if chosen.type == "cuda":
        index = local_rank if chosen.index is None else chosen.index
        if index >= torch.cuda.device_count():
            raise InputError(f"--device {device or 'cuda'}: this machine has {torch.cuda.device_count()} CUDA devices")
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
        torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun's store outlives a restart: without a prefix, workers meet dead ones.
            port = int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(os.environ["MASTER_ADDR"], port, world, is_master=False)
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        else:
            dist.init_process_group(backend)
    torch.manual_seed(seed + rank)  # dropout differs from rank to rank
    return Process(rank, world, chosen, precision or usual_precision(chosen))


def usual_precision(device: torch.device) -> str:
    """Without --precision."""
    return "bf16" if device.type == "cuda" else "fp32"


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer, schedule, loss


def make_optimizer(model: Model, settings: Settings) -> torch.optim.AdamW:
    """AdamW with three groups: weights, weights that are not decayed (biases, norms), and thresholds."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if name != "thresholds":
            (decayed if parameter.ndim > 1 else plain).append(parameter)
    groups = [
        {"params": decayed, "lr": settings.learning_rate, "weight_decay": settings.weight_decay},
        {"params": plain, "lr": settings.learning_rate, "weight_decay": 0.0},
    ]
    if model.thresholds.requires_grad:
        groups.append(
            {
                "params": [model.thresholds],
                "lr": settings.threshold_learning_rate,
                "weight_decay": settings.threshold_weight_decay,
            }
        )
    # Adam's epsilon is an absolute size, and the thresholds' gradients are of any size.
    return torch.optim.AdamW(groups, eps=1e-8, fused=True)


def rate_factor(step: int, steps: int, warmup: float, fall: bool = True) -> float:
    """The learning rate at `step` (from 0) as a share of its peak: linear up over warmup · steps, linear down to 0.

    Without `fall` it stays at the peak.
    """
    rising = max(1, round(steps * warmup))
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising + 1) if fall else 1.0)


DISTILL_TEMPERATURE = 2.0


def distillation_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """How far answers are from the teacher's, summed over examples: (B, C) twice -> ().

    Kullback-Leibler divergence at temperature 2, times its square (Hinton et al., arXiv 1503.02531); for regression
    squared error.
    """
    if logits.size(1) == 1:
        return F.mse_loss(logits.float(), teacher, reduction="sum")
    soft = [(x.float() / DISTILL_TEMPERATURE).log_softmax(-1) for x in (logits, teacher)]
    return DISTILL_TEMPERATURE**2 * F.kl_div(*soft, reduction="sum", log_target=True)


def task_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss summed over examples: cross-entropy, or squared error where there is one output. (B, C), (B,) -> ().

    Examples with the target -100 do not count.
    """
    if logits.size(1) == 1:
        return F.mse_loss(logits[:, 0].float(), targets, reduction="sum")
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def as_choices(head: str, logits: Tensor, lengths: Tensor) -> Tensor:
    """What the losses compare, a row a choice: a head's logits as they are, but those of a span head (T, 2) become the
    choice of the token where the answer starts, and of that where it ends, of each sequence (2 B, n_max)."""
    if head != "span":
        return logits
    # A number so low that it has no probability; of infinities a divergence is not a number.
    grid = pad_sequence(list(logits.float().split(lengths.tolist())), batch_first=True, padding_value=-1e9)
    return grid.transpose(1, 2).flatten(0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@dataclass
class Evaluation:
    """What a model does on a set of examples, as it prunes in inference."""

    metrics: dict[str, float]
    score: float
    loss: float
    examples: int
    gflops: float  # mean of an example, encoder layers only
    dense_gflops: float
    relative_flops: float
    kept: list[float]  # (L,) share of the tokens that leaves each layer
    seconds: float
    examples_per_second: float


@torch.inference_mode()
def predict_examples(
    model: Model,
    examples: Examples,
    process: Process,
    batch_size: int,
    pruning: str | None = None,
    max_tokens: int | None = None,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Logits of each of the N examples, (C,) or (n, C), and tokens kept (L, N), in their order, on every process.

    Sequences of similar length run together, each process taking every world-th of them.
    max_tokens: of a batch, where that is fewer than `batch_size` examples have.
    """
    model.eval()
    order = np.argsort(examples.lengths, kind="stable")[process.rank :: process.world]
    logits: list[np.ndarray] = []
    kept = [torch.empty(model.config.num_hidden_layers, 0, dtype=torch.int64)]
    for chosen in token_batches(order, examples.lengths, batch_size, max_tokens):
        batch = examples.batch(chosen).to(process.device)
        with process.autocast():
            output = model(*batch, pruning=pruning)
        found = output.logits.float().cpu()
        rows = found if model.config.head == "sequence" else found.split(batch.lengths.tolist())
        logits += [row.numpy() for row in rows]
        kept.append(output.kept.cpu())
    parts = process.gather((order, logits, torch.cat(kept, 1).numpy()))
    back = np.argsort(np.concatenate([part[0] for part in parts]))
    everything = [row for part in parts for row in part[1]]
    return [everything[i] for i in back], np.concatenate([part[2] for part in parts], 1)[:, back]


def evaluate(
    model: Model,
    sets: dict[str, Examples],
    metric: str,
    process: Process,
    batch_size: int = 32,
    pruning: str | None = None,
    max_tokens: int | None = None,
    collect: Callable[[Examples, list[np.ndarray]], Any] = lambda examples, logits: None,
) -> Evaluation:
    """Evaluates on one set, or on several (MNLI's two): the first gives the score, all give metrics and FLOPs.

    collect: called with each set and its logits.
    """
    metrics, scores, losses, targets = {}, [], [], 0
    used, dense = 0, 0
    kept_tokens, tokens = np.zeros(model.config.num_hidden_layers), 0
    start = time.perf_counter()
    for suffix, examples in sets.items():
        logits, kept = predict_examples(model, examples, process, batch_size, pruning, max_tokens)
        found, score = examples.judge(metric, logits)
        metrics |= {f"{name}{suffix}": value for name, value in found.items()}
        scores.append(score)
        collect(examples, logits)
        lengths = torch.from_numpy(examples.lengths)
        for chosen in chunked(range(len(examples)), 1024):
            rows = [torch.from_numpy(logits[i]) for i in chosen]
            stacked = torch.stack(rows) if model.config.head == "sequence" else torch.cat(rows)
            choices = as_choices(model.config.head, stacked, lengths[chosen])
            losses.append(float(task_loss(choices, examples.targets(np.array(chosen)).flatten())))
        targets += examples.count_targets(np.arange(len(examples)))
        used += int(macs(model.config, lengths, torch.from_numpy(kept)).sum())
        dense += int(macs(model.config, lengths, lengths.expand(len(kept), -1)).sum())
        kept_tokens += kept.sum(1)
        tokens += int(lengths.sum())
    seconds = time.perf_counter() - start
    count = sum(len(examples) for examples in sets.values())
    return Evaluation(
        metrics,
        scores[0],
        sum(losses) / targets,
        count,
        2e-9 * used / count,
        2e-9 * dense / count,
        used / dense,
        [float(share) for share in kept_tokens / tokens],
        seconds,
        count / seconds,
    )


@dataclass
class Speed:
    """A pruned model beside itself without pruning, at one batch size: measured in one run, interleaved."""

    batch_size: int
    latency: float  # seconds per batch, median over batches and repeats
    latency_p95: float
    dense_latency: float
    dense_latency_p95: float
    examples_per_second: float  # from the median repeat
    dense_examples_per_second: float
    tokens_per_second: float  # of the input, pruned tokens included
    speedup: float  # dense time / pruned time, medians of the repeats
    flops_reduction: float  # by the formula of `macs`
    done_reduction: float  # the same of what is computed: without what the last layer saves in both runs
    flops_to_time: float  # speedup / flops_reduction


@torch.inference_mode()
def measure_speed(model: Model, batches: list[Batch], process: Process, repeats: int = 5) -> Speed:
    """Times batches as the model prunes and dense, in turn, after a warm-up pass; tokenization and packing apart.

    Nor is the last layer's count of tokens timed, which only statistics need.
    """
    model.eval()
    batches = [batch.to(process.device) for batch in batches]
    times: dict[str, list[list[float]]] = {"pruned": [], "dense": []}
    counted, done = {}, {}
    for repeat in range(repeats + 1):
        for name, pruning in (("pruned", model.pruning), ("dense", "none")):
            row, outputs = [], []
            for batch in batches:
                synchronize(process)
                start = time.perf_counter()
                with process.autocast():
                    outputs.append(model(*batch, pruning=pruning, count=repeat == 0))
                synchronize(process)
                row.append(time.perf_counter() - start)
            if repeat:
                times[name].append(row)
            else:
                lengths = torch.cat([batch.lengths for batch in batches])
                kept = torch.cat([output.kept for output in outputs], 1)
                entering = torch.cat([lengths[None], kept])[-2]
                counted[name] = int(macs(model.config, lengths, kept).sum())
                done[name] = counted[name] - int(last_layer_saving(model.config, entering, kept[-1]).sum())
    pruned, dense = np.array(times["pruned"]), np.array(times["dense"])
    seconds, dense_seconds = np.median(pruned.sum(1)), np.median(dense.sum(1))
    speedup, reduction = dense_seconds / seconds, counted["dense"] / counted["pruned"]
    return Speed(
        *(
            x if isinstance(x, int) else float(x)
            for x in (
                max(len(batch.lengths) for batch in batches),
                np.median(pruned),
                np.quantile(pruned, 0.95),
                np.median(dense),
                np.quantile(dense, 0.95),
                len(lengths) / seconds,
                len(lengths) / dense_seconds,
                lengths.sum() / seconds,
                speedup,
                reduction,
                done["dense"] / done["pruned"],
                speedup / reduction,
            )
        )
    )


def sorted_batches(examples: Examples, batch_size: int) -> list[Batch]:
    """All examples in batches of similar length."""
    order = np.argsort(examples.lengths, kind="stable")
    return [examples.batch(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]


def bench_checkpoint(
    folder: Path,
    source: Source | None,
    lengths: list[int] | None,
    count: int,
    batch_sizes: list[int],
    repeats: int,
    process: Process,
    max_length: int | None = None,
    seed: int = 42,
) -> dict[str, Any]:
    """Speed of a checkpoint at each batch size, on `count` examples of the source, or on random tokens of the lengths.

    Returns the figures and their conditions. Raises: InputError.
    """
    model = load_model(folder).model.to(process.device).pack()
    generator = np.random.default_rng(seed)
    if source is None:
        config = model.config
        drawn = generator.choice(lengths, count)
        if drawn.max() > config.max_tokens:
            raise InputError(f"--lengths {drawn.max()}: {folder} has positions for {config.max_tokens} tokens")
        sequences = [generator.integers(0, config.vocab_size, n).tolist() for n in np.sort(drawn)]
        # Questions have two segments, of which the first may be protected.
        segments = [[int(i >= 12) if config.head == "span" else 0 for i in range(len(ids))] for ids in sequences]
        rows = list(zip(sequences, segments))
        make = lambda size: [pack(*map(list, zip(*part))) for part in chunked(rows, size)]  # noqa: E731
        where = "random tokens"
    else:
        tokenizer = Tokenizer(folder)
        tokenizer.check_fits(model.config.vocab_size, folder)
        labels = check_task(folder, model.config, source.task)
        limit = length_limit(model.config, folder, max_length)
        examples = load_sets(source, "eval", tokenizer, limit, labels)[0][""]
        examples = examples.select(np.sort(generator.permutation(len(examples))[:count]))
        make = lambda size: sorted_batches(examples, size)  # noqa: E731
        where = source.task.name
    speeds = [measure_speed(model, make(size), process, repeats) for size in batch_sizes]
    everything = torch.cat([batch.lengths for batch in make(max(batch_sizes))]).double()
    quantiles = everything.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    if process.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(process.device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "speeds": [asdict(speed) for speed in speeds],
        "conditions": {
            "checkpoint": str(folder),
            "pruning": model.pruning,
            "data": where,
            "examples": len(everything),
            "mean_length": everything.mean().item(),
            "length_quantiles": dict(zip(("5%", "50%", "95%"), quantiles)),
            "device": torch.cuda.get_device_name(process.device)
            if process.device.type == "cuda"
            else platform.processor() or platform.machine(),
            "precision": process.precision,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "repeats": repeats,
            "statistic": "median",
            "peak_memory_bytes": memory,
        },
    }


def synchronize(process: Process) -> None:
    """Waits for the device: a GPU's kernels run on after the call that started them."""
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)


# ----------------------------------------------------------------------------------------------------------------------
# Budgets: pruning to a share of the dense FLOPs

BUDGET_MARGIN = 0.03  # a checkpoint that takes this much more than its target is not kept as the best one


class Budget:
    """Steers λ in soft training so that the soft masks take `target` of the dense FLOPs.

    A proportional-integral controller. A negative λ asks for more tokens.
    """

    def __init__(self, target: float):
        self.target = target
        self.integral = 0.0  # a resumed run needs it

    def regularization(self, relative: float) -> float:
        """The next step's λ, after a batch that took `relative` of its dense FLOPs."""
        error = relative - self.target
        self.integral = min(max(self.integral + 0.3 * error, -1.0), 30.0)
        return self.integral + 10 * error


def starting_thresholds(num_layers: int, target: float) -> Tensor:
    """The thresholds that soft training towards a target starts from (L,), before `scale_thresholds` multiplies them by
    the factor that meets the target.

    A steep ladder leaves the first layers whole and closes the last ones, which then work on what the first ones found.
    Below the cost of two whole layers the first layer prunes instead, so that the second, with threshold 0, has something
    left to read.
    """
    if target >= 2 / num_layers - 0.01:
        return threshold_ladder(0.01, num_layers, power=4.0)
    return 0.01 * torch.tensor([1.0, 0.0, *[10.0] * num_layers])[:num_layers]


@torch.inference_mode()
def scale_thresholds(
    model: Model, examples: Examples, target: float, process: Process, count: int = 256
) -> float | None:
    """Multiplies the thresholds by the factor with which `count` of the examples take `target` of the dense FLOPs.

    The factor is found by bisection, pruning as inference does, and returned. None, and the thresholds as they were,
    where no factor prunes enough.
    """
    model.eval()
    chosen = np.random.default_rng(0).permutation(len(examples))[:count]
    chosen = chosen[np.argsort(examples.lengths[chosen], kind="stable")]
    batches = [examples.batch(chosen[i : i + 64]).to(process.device) for i in range(0, len(chosen), 64)]
    lengths = torch.cat([batch.lengths for batch in batches])
    start = model.thresholds.clone()

    def prunes_enough(factor: float) -> bool:
        model.thresholds.copy_(start * factor)
        with process.autocast():
            kept = torch.cat([model(*batch, pruning="hard").kept for batch in batches], 1)
        return relative_flops(model.config, lengths, kept) <= target

    low, high = 0.0, 1.0
    while not prunes_enough(high):
        low, high = high, 2 * high
        if high > 10_000:
            model.thresholds.copy_(start)
            return None
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (low, middle) if prunes_enough(middle) else (middle, high)
    prunes_enough(high)
    return high


def protected_tokens(config: Config, examples: Examples) -> Tensor:
    """How many tokens of each example are never pruned (N,)."""
    if config.head == "span" and config.protect_question:
        return torch.tensor([segments.count(0) for (segments,) in read_columns(examples.table, "segment_ids")])
    return torch.ones(len(examples), dtype=torch.long)


def topk_flops(config: Config, lengths: Tensor, protected: Tensor, rate: float) -> float:
    """The share of the dense FLOPs that top-k takes of sequences (B,), of which `protected` (B,) tokens always stay."""
    rates = topk_rates(rate, config.num_hidden_layers)
    kept = [lengths if share == 1 else topk_counts(lengths, share).maximum(protected) for share in rates]
    return relative_flops(config, lengths, torch.stack(kept))


def rate_for_budget(config: Config, lengths: Tensor, protected: Tensor, target: float) -> float:
    """The token_keep_rate with which top-k takes `target` of the dense FLOPs of sequences (B,), as `topk_flops` counts.

    Raises: InputError.
    """
    low, high = -float(config.num_hidden_layers), 1.0  # at the lower end one token is left of the first pruned layer
    lowest = topk_flops(config, lengths, protected, low)
    if lowest > target:
        raise InputError(
            f"--target-flops {target}: top-k does not prune the first layers, and cannot go below {lowest:.3f} here"
        )
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if topk_flops(config, lengths, protected, middle) <= target else (low, middle)
    return low


def relative_flops(config: Config, lengths: Tensor, kept: Tensor) -> float:
    """FLOPs of sequences (B,) of which `kept` (L, B) tokens leave the layers, as a share of the dense model's."""
    return float(macs(config, lengths, kept).sum() / macs(config, lengths, lengths.expand(len(kept), -1)).sum())


def ask_teacher(
    folder: Path,
    source: Source,
    labels: tuple[str, ...],
    student: Tokenizer,
    max_length: int,
    process: Process,
    batch_size: int,
) -> list[np.ndarray]:
    """A dense model's logits of the training examples, tokenized as it wants them, (C,) or (n, C) each.

    They are kept in the cache of `datasets`, for the next stage that asks the same model about the same tokens in the same
    way.
    Raises: InputError; where every token has an answer, the teacher must have the student's tokens.
    """
    import datasets

    tokenizer, config = Tokenizer(folder), load_config(folder)
    tokenizer.check_fits(config.vocab_size, folder)
    check_task(folder, config, source.task)
    if source.task.head != "sequence" and tokenizer.identity != student.identity:
        raise InputError(f"--distill {folder}: has another tokenizer, so that its answers are not for the same tokens")
    if labels and config.labels[0] != "LABEL_0" and {n.lower() for n in config.labels} != {n.lower() for n in labels}:
        raise InputError(f"--distill {folder}: answers {', '.join(config.labels)}, not {', '.join(labels)}")
    limit = length_limit(config, folder, max_length if source.task.head != "sequence" else None)
    examples = load_sets(source, "train", tokenizer, limit, labels)[0][""]
    teacher = load_model(folder, labels or config.labels).model
    key = hashlib.sha256(f"{teacher.config} {process.precision} {process.world} {batch_size}".encode())
    columns = (examples.table.data.column(name) for name in ("token_ids", "segment_ids"))
    tokens = [part.flatten().to_numpy() for column in columns for part in column.chunks]
    for array in (*(tensor.numpy() for tensor in teacher.state_dict().values()), examples.lengths, *tokens):
        key.update(array)
    path = Path(datasets.config.HF_DATASETS_CACHE, f"answers-{key.hexdigest()[:32]}.safetensors")
    if all(process.gather(path.is_file())):
        answers = load_file(path)["logits"]
    else:
        teacher.to(process.device).pack()
        rows = predict_examples(teacher, examples, process, batch_size, "none")[0]
        answers = torch.from_numpy(np.stack(rows) if source.task.head == "sequence" else np.concatenate(rows))
        if process.main:
            write_file(path, lambda beside: save_file({"logits": answers}, beside))
    rows = answers if source.task.head == "sequence" else answers.split(examples.lengths.tolist())
    return [row.numpy() for row in rows]


# ----------------------------------------------------------------------------------------------------------------------
# The loop

RUN_FILES = ("config.json", "model.safetensors", "log.jsonl", *Tokenizer.FILES)
STATES = "resume"  # subfolder of a run in which it keeps what it needs to go on


def check_output(folder: Path, overwrite: bool, resume: bool) -> None:
    """Raises InputError for a folder that holds a run which the user neither resumes nor wants replaced, or a model that
    is no run's."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder}: is a file; name a folder")
    held = [name for name in RUN_FILES if (folder / name).exists()]
    is_run = (folder / "log.jsonl").exists()  # a run begins with its log
    if not held or overwrite or resume and is_run:
        return
    if not is_run:
        raise InputError(
            f"--output {folder}: holds {held[0]} and is no run to resume; choose another, or pass --overwrite to replace it"
        )
    raise InputError(
        f"--output {folder}: already holds a run; choose another, or pass --resume to go on with it or --overwrite to "
        "replace it"
    )


def clear_output(folder: Path) -> None:
    """Removes a run's own files from its folder, and nothing else."""
    if is_ours(folder / "README.md"):
        (folder / "README.md").unlink(missing_ok=True)
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    clear_states(folder)


def clear_states(folder: Path) -> None:
    """Removes what only an unfinished run needs, and what a kill left half written."""
    states = folder / STATES
    halves = [path for name in (*RUN_FILES, "README.md") for path in folder.glob(f".{name}.????????")]
    for path in [*halves, *states.glob("step-*.pt"), *states.glob("step.new"), *states.glob(".step.new.????????")]:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        states.rmdir()


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes what resuming needs to step-NUMBER-DIGEST.pt; the one before it stays, in case this one gets damaged."""

    def write(path: Path) -> None:
        try:
            torch.save(state, path)
        except RuntimeError as error:  # torch's writer reports a full disk like this
            raise OSError(str(error).splitlines()[0]) from None

    earlier = sorted(folder.glob("step-*.pt"))
    whole = folder / "step.new"
    write_file(whole, write)
    whole.replace(folder / f"step-{state['step']:09d}-{file_digest(whole)}.pt")
    for path in earlier[:-1]:
        path.unlink()


def load_state(folder: Path, show: Callable[[str], Any]) -> dict[str, Any] | None:
    """The latest whole state, on the CPU; None where there is none. Says which damaged ones it passed over."""
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        if path.stem.endswith(f"-{file_digest(path)}"):
            return torch.load(path, map_location="cpu", weights_only=True)
        show(f"note: {path} is damaged; trying the one before it")
    return None


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def random_state(process: Process) -> list[dict[str, Tensor]]:
    """The random generators of every process, in rank order."""
    state = {"cpu": torch.get_rng_state()}
    if process.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(process.device)
    return process.gather(state)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Catches Ctrl-C and SIGTERM once each: the list holds the signal that has come."""
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def find_tensorboard() -> Any:
    """TensorBoard's writer of event files. Raises: InputError where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # not installed, or too old
        raise InputError("--tensorboard needs tensorboard, which is not installed: pip install tensorboard") from None
    return SummaryWriter


@contextlib.contextmanager
def event_board(folder: Path | None, step: int) -> Iterator[Callable[[int, dict[str, Any]], None]]:
    """A function that writes named numbers of a step to `folder`, over those that a run wrote there after `step`."""
    if folder is None:
        yield lambda step, values: None
        return
    with find_tensorboard()(str(folder), purge_step=step + 1) as writer:

        def write(step: int, values: dict[str, Any]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield write


def board_values(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation, by the names they get in TensorBoard."""
    values = {f"evaluation/{name}": value for name, value in record["metrics"].items()}
    values |= {f"evaluation/{name}": record[name] for name in ("score", "loss", "relative_flops")}
    for name in ("kept", "thresholds"):
        values |= {f"{name}/layer_{l:02d}": value for l, value in enumerate(record[name] or [], 1)}
    return values


@dataclass
class Result:
    """What a training run leaves behind."""

    best: dict[str, Any]  # the log's record of the checkpoint in the folder
    steps: int
    seconds_per_step: float  # median of this process's steps, without evaluation; nan if it made none


def train(
    model: Model,
    pruning: str,
    train_set: Examples,
    dev_sets: dict[str, Examples],
    metric: str,
    settings: Settings,
    output: Path,
    tokenizer: Tokenizer,
    process: Process = Process(),
    show: Callable[[str], Any] = lambda line: None,
    progress: Callable[..., Any] = lambda **state: None,
    header: dict[str, Any] | None = None,
    resume: bool = False,
    tensorboard: Path | None = None,
) -> Result:
    """Trains one stage and leaves a checkpoint folder at `output`, with the log of its evaluations in log.jsonl.

    pruning: "none", "soft" (thresholds learned with the weights), "hard" or "topk" (tokens dropped by fixed rules).
    Evaluation always prunes as inference will: after soft training that is hard.
    show, progress: called with a line for each evaluation and with the state of each step.
    resume: go on from the last state that was saved in `output`; from the beginning where there is none.
    tensorboard: a folder for TensorBoard's event files.
    Raises: InputError when loss or gradient are no longer finite (the last good checkpoint stays), or when the run to
    be resumed had other settings; Interrupted after a signal.
    """
    check_settings(settings)
    log = output / "log.jsonl"
    header = {
        "event": "start",
        **(header or {}),
        "pruning": pruning,
        "settings": asdict(settings),
        "examples": len(train_set),
        "precision": process.precision,
    }
    state = None
    if resume:
        check_same_run(log, header)
        state = load_state(output / STATES, show) if process.main else None
        state = process.broadcast(state)
        show(
            f"resuming after step {state['step']}"
            if state
            else "no earlier run to go on with: starting from the beginning"
        )
        if state:
            model.load_state_dict(state["model"])

    def thresholds() -> list[float] | None:
        return model.thresholds.tolist() if model.config.prune_mode == "absolute_threshold" else None

    model.to(process.device)
    model.thresholds.requires_grad_(pruning == "soft")
    replica = DistributedDataParallel(model) if process.world > 1 else model
    optimizer = make_optimizer(model, settings)
    weights = [p for group in optimizer.param_groups[:2] for p in group["params"]]
    peak_rates = [group["lr"] for group in optimizer.param_groups]
    steps_per_epoch = math.ceil(len(train_set) / settings.batch_size)
    steps = max(1, round(settings.epochs * steps_per_epoch))
    save_steps = settings.save_steps or steps_per_epoch

    done, best, losses, elapsed = 0, None, [], 0.0  # all that a resumed run needs besides weights and optimizer
    budget = Budget(settings.target_flops) if settings.target_flops and pruning == "soft" else None
    regularization = 0.0 if budget else settings.regularization
    if state:
        done, best, losses, elapsed = state["step"], state["best"], state["losses"], state["elapsed"]
        regularization = state["regularization"]
        if budget:
            budget.integral = state["integral"]
        optimizer.load_state_dict(state["optimizer"])
        if len(state["random"]) == process.world:
            torch.set_rng_state(state["random"][process.rank]["cpu"])
            if process.device.type == "cuda" and "cuda" in state["random"][process.rank]:
                torch.cuda.set_rng_state(state["random"][process.rank]["cuda"], process.device)
        else:
            torch.manual_seed(settings.seed + done * process.world + process.rank)
            show(
                f"note: {process.world} processes instead of {len(state['random'])}: the same data order, other dropout"
            )
        if process.main:  # evaluations after the state will be made again
            kept = [line for line, record in read_log(log) if record["event"] == "start" or record["step"] <= done]
            write_file(log, lambda path: path.write_text("".join(kept), encoding="utf-8"))
    elif process.main:
        clear_output(output)
        output.mkdir(parents=True, exist_ok=True)
        append(
            log,
            header
            | {
                "steps": steps,
                "thresholds": thresholds(),
                "processes": process.world,
                "device": str(process.device),
                "torch": torch.__version__,
                "machine": platform.machine(),
            },
        )
        for name, content in tokenizer.files.items():
            write_file(output / name, lambda path: path.write_bytes(content))

    def save() -> None:
        random = random_state(process)
        if process.main:
            save_state(
                output / STATES,
                {
                    "step": done,
                    "best": best,
                    "losses": losses,
                    "elapsed": elapsed + time.perf_counter() - started,
                    "regularization": regularization,
                    "integral": budget and budget.integral,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "random": random,
                },
            )

    times = []
    started = time.perf_counter()
    with stop_signals() as signals, event_board(tensorboard if process.main else None, done) as board:
        for indices in training_batches(train_set, settings, done, steps):
            step_started = time.perf_counter()
            for group, peak in zip(optimizer.param_groups, peak_rates):
                steered = budget and group["params"][0] is model.thresholds  # to the end, or λ would pull in vain
                group["lr"] = peak * rate_factor(done, steps, settings.warmup, fall=not steered)
            model.train()
            fall = min(1.0, (settings.temperature_end or settings.temperature) / settings.temperature)
            now = replace(
                settings, temperature=settings.temperature * fall ** (done / steps), regularization=regularization
            )
            loss, relative = backward(replica, train_set, indices, pruning, now, process)
            if budget:
                regularization = budget.regularization(relative)
            norm = float(torch.nn.utils.clip_grad_norm_(weights, settings.max_grad_norm))
            if model.thresholds.grad is not None:
                norm += float(model.thresholds.grad.norm())
            check_finite(loss + norm, done + 1, output, best)
            optimizer.step()
            if pruning == "soft":
                model.thresholds.data.clamp_(min=0.0)  # below 0 the sigmoid is flat: no way back
            optimizer.zero_grad(set_to_none=True)
            done += 1
            losses.append(loss)
            times.append(time.perf_counter() - step_started)
            board(done, {"train/loss": loss, "train/learning_rate": optimizer.param_groups[0]["lr"]})
            progress(
                step=done, steps=steps, loss=loss, score=best and best["score"], flops=best and best["relative_flops"]
            )

            if done % save_steps == 0 or done == steps:
                scale = None
                if settings.target_flops and (pruning == "hard" or budget and done == steps):
                    scale = scale_thresholds(model, train_set, settings.target_flops, process)
                evaluation = evaluate(model, dev_sets, metric, process, settings.batch_size)
                check_finite(evaluation.loss, done, output, best)
                record = {
                    "event": "evaluation",
                    "step": done,
                    "epoch": done / steps_per_epoch,
                    "train_loss": sum(losses) / len(losses),
                    **({"soft_relative_flops": relative, "lambda": regularization} if pruning == "soft" else {}),
                    **({"threshold_scale": scale} if scale else {}),
                    **asdict(evaluation),
                    "thresholds": thresholds(),
                    "elapsed": elapsed + time.perf_counter() - started,
                }
                losses = []
                saved = best is None or not settings.load_best or evaluation.score > best["score"]
                if best and settings.target_flops and settings.load_best:
                    over = [r["relative_flops"] > settings.target_flops + BUDGET_MARGIN for r in (best, record)]
                    saved = over[0] if over[0] != over[1] else saved
                best = record if saved else best
                if process.main:
                    if saved:
                        save_model(output, model)
                        write_card(output, model.config, header, record)
                    append(log, record | {"saved": saved})
                board(done, board_values(record))
                show(describe(record, saved and settings.load_best))
                if done < steps:
                    save()
            stopped = process.sum(
                torch.tensor([sum(signals[:1])], device=process.device)
            ).item()  # any process's signal
            if stopped and done < steps:
                save()
                number = signals[0] if signals else signal.SIGTERM  # another process's
                raise Interrupted(
                    f"stopped after step {done} of {steps}; the same command with --resume goes on", number
                )
    if settings.target_flops and abs(best["relative_flops"] - settings.target_flops) > BUDGET_MARGIN:
        show(
            f"note: the target was {settings.target_flops} of the dense FLOPs, but the evaluation examples take "
            f"{best['relative_flops']:.3f}"
        )
    if process.main:
        append(log, {"event": "end", "best": best})
        clear_states(output)
    return Result(best, steps, float(np.median(times)) if times else math.nan)


def read_log(log: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a log and their records; a last line that a kill cut short is left out."""
    for line in log.read_text(encoding="utf-8").split("\n")[:-1]:
        yield line + "\n", json.loads(line)


def check_same_run(log: Path, header: dict[str, Any]) -> None:
    """Raises InputError if the log was begun with other settings than the resuming command's."""
    try:
        first = json.loads(log.read_text(encoding="utf-8").split("\n", 1)[0])
    except FileNotFoundError:
        return
    except ValueError:
        raise InputError(f"{log}: damaged; remove it, or pass --overwrite, to start again") from None

    def flat(record: dict[str, Any]) -> dict[str, Any]:
        return {k: record.get(k) for k in header if k != "settings"} | record.get("settings", {})

    here, there = flat(header), flat(first)
    for name in here:
        if here[name] != there.get(name):
            raise InputError(
                f"{log}: the run was started with {name} = {there.get(name)}, not {here[name]}; use the same options"
            )


def finished(log: Path) -> dict[str, Any] | None:
    """The best record of a run that has come to its end; None for another."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        *_, (_, last) = read_log(log)
        return last["best"] if last["event"] == "end" else None
    return None


def check_finite(value: float, step: int, output: Path, best: dict[str, Any] | None) -> None:
    """Raises InputError for a loss or gradient that is infinite or not a number."""
    if not math.isfinite(value):
        kept = f"The last good checkpoint is in {output}" if best else "No checkpoint was saved yet"
        raise InputError(f"step {step}: the loss is not finite any more; lower the learning rate. {kept}")


def check_settings(settings: Settings) -> None:
    """Raises InputError for settings out of range."""
    for name, low in (
        ("batch_size", 1),
        ("accumulate", 1),
        ("epochs", 1e-9),
        ("learning_rate", 0),
        ("max_grad_norm", 1e-9),
        ("warmup", 0),
        ("temperature", 1e-12),
        ("threshold_learning_rate", 0),
        ("weight_decay", 0),
        ("regularization", 0),
        ("threshold_weight_decay", 0),
        ("seed", 0),
        ("mask_floor", 0),
        ("distill_weight", 0),
    ):
        value = getattr(settings, name)
        if not (math.isfinite(value) and value >= low):
            raise InputError(f"{flag(name)} {value}: expected {'more than 0' if 0 < low < 1 else f'at least {low}'}")
    if settings.save_steps is not None and settings.save_steps < 1:
        raise InputError(f"{flag('save_steps')} {settings.save_steps}: expected at least 1")
    for name, high in (("target_flops", 1), ("temperature_end", math.inf)):
        value = getattr(settings, name)
        if value is not None and not 0 < value <= high:
            raise InputError(f"{flag(name)} {value}: expected more than 0" + (" and at most 1" if high == 1 else ""))
    for name, high in (("mask_floor", 0.5), ("distill_weight", 1), ("seed", 2**31)):
        if getattr(settings, name) > high:
            raise InputError(f"{flag(name)} {getattr(settings, name)}: expected at most {high}")
    if settings.warmup > 1:
        raise InputError(f"{flag('warmup')} {settings.warmup}: is a share of the steps, expected 0 to 1")


def training_batches(examples: Examples, settings: Settings, first: int, steps: int) -> Iterator[np.ndarray]:
    """The global batches of steps `first` (from 0) to `steps` - 1, epoch after epoch."""
    per_epoch = math.ceil(len(examples) / settings.batch_size)
    for epoch in range(first // per_epoch, math.ceil(steps / per_epoch)):
        batches = epoch_batches(examples.lengths, settings.batch_size, settings.seed, epoch)
        start = epoch * per_epoch
        yield from batches[max(0, first - start) : steps - start]


def backward(
    replica: torch.nn.Module,
    examples: Examples,
    indices: np.ndarray,
    pruning: str,
    settings: Settings,
    process: Process,
) -> tuple[float, float]:
    """Leaves the gradient of a global batch in the parameters; returns its loss (without λ's part) and, in soft pruning,
    relative FLOPs.

    Loss = mean task loss over the batch + λ Σ_l mean of m over its tokens (equation 9 of the paper); with a target,
    λ · relative FLOPs of the soft masks instead. The means are over the global batch, so that neither the number of
    processes nor `accumulate` changes the gradient: each process and each part contributes its sum, divided by the
    counts of the whole.
    """
    config = getattr(replica, "module", replica).config
    lengths = torch.from_numpy(examples.lengths[indices])
    tokens = int(lengths.sum())
    dense = int(macs(config, lengths, lengths.expand(config.num_hidden_layers, -1)).sum())
    count = max(1, examples.count_targets(indices))
    total = torch.zeros(2, dtype=torch.float64, device=process.device)
    parts = np.array_split(indices, min(settings.accumulate, len(indices)))
    for i, part in enumerate(parts):
        share = part[process.rank :: process.world]
        weight = process.world if len(share) else 0  # DistributedDataParallel averages, we want sums
        share = share if len(share) else part[:1]  # every process must take part in the exchange of gradients
        batch = examples.batch(share).to(process.device)
        targets = examples.targets(share).flatten().to(process.device)
        # Gradients are exchanged with the last part's only.
        wait = process.world > 1 and i + 1 < len(parts)
        with replica.no_sync() if wait else contextlib.nullcontext():
            with process.autocast():
                output = replica(
                    *batch,
                    pruning=pruning,
                    temperature=settings.temperature,
                    mask_floor=settings.mask_floor,
                    mask_attention=settings.mask_attention,
                    count=pruning == "soft",
                )
            choices = as_choices(config.head, output.logits, batch.lengths)
            loss, relative, asked = task_loss(choices, targets) / count, 0.0, 0.0
            if examples.teacher is not None:
                rows = [torch.from_numpy(examples.teacher[j]).to(process.device) for j in share]
                taught = torch.stack(rows) if config.head == "sequence" else torch.cat(rows)
                taught = as_choices(config.head, taught, batch.lengths)
                judged = targets >= 0 if config.head == "token" else slice(None)
                taught = distillation_loss(choices[judged], taught[judged]) / count
                loss = (1 - settings.distill_weight) * loss + settings.distill_weight * taught
            if pruning == "soft":
                relative = macs(config, batch.lengths, output.kept).sum() / dense
                asked = relative if settings.target_flops else output.soft_mask_sum / tokens
            ((loss + settings.regularization * asked) * weight).backward()
        total += torch.stack([loss, torch.as_tensor(relative, device=loss.device)]).detach().double() * (weight > 0)
    # A key's bias adds the same to all logits of a query, and a span head's to those of all tokens, which softmax ignores:
    # their gradients are 0 but for rounding, and Adam would blow that up to whole steps in a random direction.
    for module in replica.modules():
        if isinstance(module, SelfAttention):
            module.query_key_value.bias.grad.chunk(3)[1].zero_()
        elif isinstance(module, TokenHead) and config.head == "span":
            module.output.bias.grad.zero_()
    loss, relative = process.sum(total).tolist()
    return loss, relative


def append(path: Path, record: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def describe(record: dict[str, Any], best: bool) -> str:
    """One line of an evaluation."""
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in record["metrics"].items())
    kept = " ".join(f"{share:.2f}" for share in record["kept"])
    return (
        f"epoch {record['epoch']:.2f}  loss {record['train_loss']:.4f}  {metrics}  FLOPs {record['relative_flops']:.3f}"
        f"  kept {kept}{'  (best)' if best else ''}"
    )


# ----------------------------------------------------------------------------------------------------------------------
# A stage from end to end: what the commands call


@dataclass
class PruningOptions:
    """What a stage may set in the checkpoint's pruning configuration; None leaves what the checkpoint says."""

    final_token_threshold: float | None = None
    token_keep_rate: float | None = None
    score_norm: str | None = None
    max_seq_length: int | None = None
    protect_question: bool | None = None


def load_sets(
    source: Source, split: str, tokenizer: Tokenizer, max_length: int, labels: tuple[str, ...] | None
) -> tuple[dict[str, Examples], tuple[str, ...]]:
    """`load_examples`, or what stands for it where the answers are parts of the text or tags of its words."""
    load = {"sequence": load_examples, "span": load_questions, "token": load_sentences}[source.task.head]
    return load(source, split, tokenizer, max_length, labels)


def run_stage(
    stage: str,
    restore: Path,
    source: Source,
    settings: Settings,
    options: PruningOptions = PruningOptions(),
    output: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    process: Process = Process(),
    show: Callable[[str], Any] = lambda line: None,
    progress: Callable[..., Any] = lambda **state: None,
    tensorboard: Path | None = None,
    distill: Path | None = None,
) -> tuple[Path, Result]:
    """Runs "finetune", "soft", "hard", "topk" or "manual" on the model folder `restore`.

    Returns the checkpoint's folder (default: the authors' layout, see `default_output`) and what training left.
    Raises: InputError.
    """
    config = load_config(restore)
    changes = {name: value for name, value in asdict(options).items() if value is not None}
    changes["prune_mode"] = {"finetune": None, "topk": "topk"}.get(stage, "absolute_threshold")
    if stage == "hard":
        if (options.max_seq_length or config.max_seq_length) != config.max_seq_length:
            raise InputError(
                f"--max-length {options.max_seq_length}: the thresholds of {restore} were learned with "
                f"{config.max_seq_length}, and `hard` keeps it; pass the length to `soft`"
            )
        changes = {"prune_mode": "absolute_threshold"}  # thresholds and their scale are what soft training left
    check_pruning(config, changes)
    if stage != "finetune" and config.head != source.task.head:
        raise InputError(f"{restore}: has no head for {source.task.title}; run `finetune` on it first")
    if options.protect_question is not None and source.task.head != "span":
        raise InputError(f"--protect-question is for questions on texts, which {source.task.title} does not have")
    asked = options.max_seq_length
    if stage == "finetune" and not asked and "max_seq_length" not in config.other:
        asked = min(source.task.max_length, config.max_tokens)
    max_length = length_limit(config, restore, asked)
    changes |= {"head": source.task.head} | ({"max_seq_length": asked} if asked else {})

    tokenizer = Tokenizer(restore)
    tokenizer.check_fits(config.vocab_size, restore)
    output = output or default_output(stage, restore, source.task, replace(config, **changes), settings)
    check_settings(settings)
    check_output(output, overwrite, resume)
    if tensorboard:
        find_tensorboard()  # before anything is read
    if output.resolve() in (Path(restore).resolve(), Path(distill or restore).resolve()):
        raise InputError(f"--output {output}: is the checkpoint to start from, or the teacher; choose another")
    header = {
        "stage": stage,
        "task": source.task.name,
        "data": str(source.path),
        "dev_data": str(source.dev_path) if source.dev_path else None,
        "restore": str(restore),
        "distill": str(distill) if distill else None,
        **asdict(options),
    }
    if source.task.name == "custom":
        header["columns"] = [source.task.text, source.task.pair, source.task.label]
    best = finished(output / "log.jsonl") if resume else None
    if best:
        check_same_run(output / "log.jsonl", header | {"settings": asdict(settings), "precision": process.precision})
        if process.main:
            clear_states(output)  # killed right after its last line
        show("this run has come to its end: nothing to resume")
        _, first = next(read_log(output / "log.jsonl"))
        return output, Result(best, first["steps"], math.nan)
    # Fine-tuning may change the classes of your own data; later stages keep those of the checkpoint.
    known = source.task.labels if stage == "finetune" else known_labels(source.task, config)
    train_sets, labels = load_sets(source, "train", tokenizer, max_length, known)
    dev_sets, _ = load_sets(source, "dev", tokenizer, max_length, labels)
    model, has_thresholds, notes = load_model(restore, labels or ("score",), new_head=True, **changes)
    if stage == "hard" and not has_thresholds:
        raise InputError(f"{restore}: has no learned thresholds; run `soft` first (or `manual` for fixed ones)")
    if stage == "manual":
        model.thresholds.data = threshold_ladder(model.config.final_token_threshold, model.config.num_hidden_layers)
    elif stage == "soft":
        scales = [(c.score_norm, c.max_seq_length) for c in (config, model.config)]
        if options.final_token_threshold is not None or scales[0] != scales[1]:
            has_thresholds = False  # asked to start anew, or their scale has changed
        final, L, target = model.config.final_token_threshold, model.config.num_hidden_layers, settings.target_flops
        if not has_thresholds:
            model.thresholds.data = starting_thresholds(L, target) if target else threshold_ladder(final, L)
        anew = "start for the target" if target else f"start from 0 to {final}"
        notes.append(f"the thresholds {'continue from the checkpoint' if has_thresholds else anew}")

    train_set = train_sets[""]
    if settings.target_flops:
        if stage == "topk":
            sizes = torch.from_numpy(train_set.lengths), protected_tokens(model.config, train_set)
            rate = rate_for_budget(model.config, *sizes, settings.target_flops)
            model.config = replace(model.config, token_keep_rate=rate)
            notes.append(f"a token keep rate of {rate:.3f} meets the target")
        else:
            factor = scale_thresholds(model.to(process.device), train_set, settings.target_flops, process)
            if factor is None:
                raise InputError(
                    f"--target-flops {settings.target_flops}: no multiple of the thresholds prunes so much; pass a larger one"
                )
            notes.append(f"the thresholds are multiplied by {factor:.3f} to meet the target")
    if distill:
        show("asking the teacher ...")
        train_set.teacher = ask_teacher(distill, source, labels, tokenizer, max_length, process, settings.batch_size)
    for note in notes:
        show(f"note: {note}")
    for name, examples in (("training", train_set), *((f"evaluation{suffix}", e) for suffix, e in dev_sets.items())):
        cut = f"; {examples.truncated} longer than {max_length} were cut" if examples.truncated else ""
        show(f"{len(examples):,} {name} examples, {examples.lengths.mean():.0f} tokens each on average{cut}")
    pruning = {"finetune": "none", "soft": "soft", "topk": "topk"}.get(stage, "hard")
    result = train(
        model,
        pruning,
        train_set,
        dev_sets,
        source.task.metric,
        settings,
        output,
        tokenizer,
        process,
        show,
        progress,
        header,
        resume,
        tensorboard,
    )
    return output, result


def known_labels(task: Task, config: Config) -> tuple[str, ...] | None:
    """The task's labels; for your own data those of the checkpoint, or None: read them off the data."""
    if task.labels is None:
        # Hugging Face's placeholder names say nothing of the data.
        return None if config.labels[0] == "LABEL_0" else config.labels
    return task.labels


def default_output(stage: str, restore: Path, task: Task, config: Config, settings: Settings) -> Path:
    """Where a stage writes without --output: the folders of the authors' release, and never the hub's cache."""
    rate = f"lr_{settings.learning_rate}"
    if stage == "soft":
        return Path(
            "checkpoints/base",
            task.name.replace("-", ""),
            "absolute_threshold",
            f"rate_{config.final_token_threshold}",
            f"temperature_{settings.temperature}",
            f"flops_{settings.target_flops}" if settings.target_flops else f"lambda_{settings.regularization}",
            rate,
        )
    if stage == "finetune" or cached_name(restore):
        return Path("checkpoints/base", task.name.replace("-", ""), stage, rate)
    return Path(restore, stage, rate)


def length_limit(config: Config, folder: Path, asked: int | None) -> int:
    """How many tokens texts are cut to: what was asked for, else the checkpoint's setting. Raises: InputError."""
    if asked and asked > config.max_tokens:
        raise InputError(f"--max-length {asked}: {folder} has positions for {config.max_tokens} tokens")
    return asked or min(config.max_seq_length, config.max_tokens)


def check_pruning(config: Config, changes: dict[str, Any]) -> None:
    """Raises InputError for a threshold, rate or length out of range."""
    threshold, rate = changes.get("final_token_threshold"), changes.get("token_keep_rate")
    if threshold is not None and not 0 <= threshold <= 1:
        raise InputError(f"--final-token-threshold {threshold}: a score lies between 0 and 1, and so must a threshold")
    if rate is not None and not -math.inf < rate <= 1:
        raise InputError(f"--token-keep-rate {rate}: expected at most 1 (negative values prune more steeply)")
    if changes.get("prune_mode") == "topk" and config.num_hidden_layers <= 3:
        raise InputError(f"topk never prunes the first 3 layers, and this model has {config.num_hidden_layers}")


def check_task(folder: Path, config: Config, task: Task) -> tuple[str, ...] | None:
    """The labels that a checkpoint and a task agree on. Raises: InputError if they do not."""
    labels = config.labels if task.labels is None else task.labels
    if config.head != task.head:
        kinds = {
            "sequence": "classifies texts",
            "token": "tags words (--tagging)",
            "span": "finds answers in a text (--task SQuAD or SQuAD2)",
        }
        raise InputError(f"{folder}: {kinds[config.head]}, which is another kind of task than {task.title}")
    if max(1, len(labels)) != len(config.labels):
        hint = " (scores need --regression)" if len(config.labels) == 1 and task.name == "custom" else ""
        raise InputError(
            f"{folder}: has {plural(len(config.labels), 'output')}, but {task.title} needs {max(1, len(labels))}; "
            f"evaluate the checkpoint of a run on this task{hint}"
        )
    return labels


def evaluate_checkpoint(
    folder: Path,
    source: Source,
    process: Process,
    batch_size: int = 32,
    max_length: int | None = None,
    dense: bool = False,
    show: Callable[[str], Any] = lambda line: None,
    max_tokens: int | None = None,
    collect: Callable[[Examples, list[np.ndarray]], Any] = lambda examples, logits: None,
) -> Evaluation:
    """Evaluates a trained model folder on the source's evaluation set; `collect` as for `evaluate`. Raises: InputError."""
    config = load_config(folder)
    limit = length_limit(config, folder, max_length)
    tokenizer = Tokenizer(folder)
    tokenizer.check_fits(config.vocab_size, folder)
    labels = check_task(folder, config, source.task)
    model, has_thresholds, notes = load_model(folder, labels or config.labels)
    if model.pruning == "hard" and not has_thresholds:
        notes.append(
            f"no thresholds in {folder}: using final_token_threshold · l / L, {config.final_token_threshold} · l / L"
        )
    model.to(process.device).pack()
    sets, _ = load_sets(source, "eval", tokenizer, limit, labels)
    for note in notes:
        show(f"note: {note}")
    cut = sum(examples.truncated for examples in sets.values())
    if cut:
        show(f"{cut:,} texts longer than {limit} tokens were cut")
    pruning = "none" if dense else None
    return evaluate(model, sets, source.task.metric, process, batch_size, pruning, max_tokens, collect)


# ----------------------------------------------------------------------------------------------------------------------
# Prediction


# Token and segment ids of what is to be run, and what makes the records' answers of the logits and counts found there.
Prepared = tuple[list[tuple[list[int], list[int]]], Callable[[list[tuple[Tensor, list[int]]]], list[dict[str, Any]]]]


class Predictor:
    """Answers records, by what the checkpoint does: {"text"}, {"text", "text_pair"} or {"token_ids"} with a label and
    logits; {"words"} or {"text"} with a label for each word; {"question", "context"} with a part of the context."""

    def __init__(
        self,
        folder: Path,
        process: Process,
        batch_size: int,
        max_length: int | None,
        dense: bool,
        max_tokens: int | None = None,
        no_answer_threshold: float | None = None,
    ):
        self.folder, self.process, self.batch_size, self.max_tokens = folder, process, batch_size, max_tokens
        self.model = load_model(folder).model.to(process.device).pack()
        self.tokenizer: Tokenizer | None = None  # read when a text comes: token ids need none
        self.pruning = "none" if dense else None
        self.max_length = length_limit(self.model.config, folder, max_length)
        self.no_answer_threshold = no_answer_threshold
        self.truncated = 0

    def open_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            self.tokenizer = Tokenizer(self.folder)
            self.tokenizer.check_fits(self.model.config.vocab_size, self.folder)
        return self.tokenizer

    def encode(self, records: list[tuple[str, Any]]) -> list[tuple[list[int], list[int]]]:
        """Token and segment ids of texts; each record comes with a word on where it stands, for errors."""
        encoded: list[Any] = [None] * len(records)
        texts: dict[bool, list[int]] = {False: [], True: []}
        for i, (where, record) in enumerate(records):
            if not isinstance(record, dict) or ("text" in record) == ("token_ids" in record):
                raise InputError(f'{where}: expected an object with "text", or with "token_ids"')
            if "token_ids" in record:
                ids, size = record["token_ids"], self.model.config.vocab_size
                if not isinstance(ids, list) or not ids or not all(type(t) is int and 0 <= t < size for t in ids):
                    raise InputError(
                        f"{where}: token_ids must be a list of one or more whole numbers from 0 to {size - 1}"
                    )
                self.truncated += len(ids) > self.max_length
                ids = ids[: self.max_length]
                encoded[i] = (ids, [0] * len(ids))
            elif not all(is_text(record.get(key, "")) for key in ("text", "text_pair")):
                raise InputError(f"{where}: text and text_pair must be strings of valid characters")
            else:
                texts["text_pair" in record].append(i)
        for pair, indices in texts.items():
            if not indices:
                continue
            tokenizer = self.open_tokenizer()
            check_room(tokenizer, self.max_length, pair)
            pairs = [records[i][1]["text_pair"] for i in indices] if pair else None
            for i, result in zip(
                indices, tokenizer.encode([records[i][1]["text"] for i in indices], pairs, self.max_length)
            ):
                encoded[i] = (result.token_ids, result.segment_ids)
                self.truncated += result.truncated
        return encoded

    @torch.inference_mode()
    def run(self, encoded: list[tuple[list[int], list[int]]]) -> list[tuple[Tensor, list[int]]]:
        """Logits, (C,) or (n, C), and tokens kept per layer, of each; inside, sequences of similar length run together."""
        found: list[Any] = [None] * len(encoded)
        lengths = np.array([len(ids) for ids, _ in encoded])
        for part in token_batches(np.argsort(lengths, kind="stable"), lengths, self.batch_size, self.max_tokens):
            batch = pack([encoded[i][0] for i in part], [encoded[i][1] for i in part]).to(self.process.device)
            with self.process.autocast():
                output = self.model(*batch, pruning=self.pruning)
            rows = output.logits.float().cpu()
            rows = rows if self.model.config.head == "sequence" else rows.split(lengths[part].tolist())
            for i, logits, kept in zip(part, rows, output.kept.T.tolist()):
                found[i] = (logits, kept)
        return found

    def answer(self, records: list[tuple[str, Any]]) -> list[dict[str, Any]]:
        """Answers in the records' order, with the "id" of records that have one. Raises: InputError naming the record."""
        encoded, finish = self.prepare(records)
        names = [{"id": record["id"]} if "id" in record else {} for _, record in records]
        return [name | answer for name, answer in zip(names, finish(self.run(encoded)))]

    def prepare(self, records: list[tuple[str, Any]]) -> Prepared:
        """What to `run` for these records, and how to finish their answers. Raises: InputError naming the record."""
        kinds = {"sequence": self.prepare_texts, "token": self.prepare_sentences, "span": self.prepare_questions}
        return kinds[self.model.config.head](records)

    def prepare_texts(self, records: list[tuple[str, Any]]) -> Prepared:
        encoded, labels = self.encode(records), self.model.config.labels

        def finish(found: list[tuple[Tensor, list[int]]]) -> list[dict[str, Any]]:
            answers = []
            for (ids, _), (logits, kept) in zip(encoded, found):
                logits = logits.tolist()
                label = logits[0] if len(labels) == 1 else labels[max(range(len(logits)), key=logits.__getitem__)]
                answers.append({"label": label, "logits": logits, "tokens": len(ids), "kept": kept})
            return answers

        return encoded, finish

    def prepare_sentences(self, records: list[tuple[str, Any]]) -> Prepared:
        """Labels of words, None of those that were cut off."""
        sentences = []
        for where, record in records:
            words = record.get("words") if isinstance(record, dict) else None
            if words is None and isinstance(record, dict) and is_text(record.get("text", 0)):
                words = record["text"].split()
            if not isinstance(words, list) or not words or not all(is_text(word) and word.strip() for word in words):
                raise InputError(f'{where}: expected an object with "words", a list of words, or with "text" of some')
            sentences.append(Sentence(words, None, 0))
        check_room(self.open_tokenizer(), self.max_length)
        aligned = align(self.open_tokenizer(), sentences, self.max_length)
        labels = self.model.config.labels
        self.truncated += sum(result.truncated for result in aligned)

        def finish(found: list[tuple[Tensor, list[int]]]) -> list[dict[str, Any]]:
            answers = []
            for sentence, result, (logits, kept) in zip(sentences, aligned, found):
                best = best_labels(logits.numpy(), result.first, labels)
                best += [None] * (len(sentence.words) - len(best))
                answers.append({"words": sentence.words, "labels": best, "tokens": len(result.token_ids), "kept": kept})
            return answers

        return [(result.token_ids, result.segment_ids) for result in aligned], finish

    def prepare_questions(self, records: list[tuple[str, Any]]) -> Prepared:
        """Runs the windows of all contexts. An answer's tokens are those of all its windows, and so are those kept."""
        questions = []
        for i, (where, record) in enumerate(records):
            texts = [record.get(key) for key in ("question", "context")] if isinstance(record, dict) else [None]
            if not all(is_text(text) and text.strip() for text in texts):
                raise InputError(f'{where}: expected an object with "question" and "context"')
            questions.append(Question(str(i), texts[0].strip(), texts[1], ()))
        windows = make_windows(self.open_tokenizer(), questions, self.max_length)

        def finish(found: list[tuple[Tensor, list[int]]]) -> list[dict[str, Any]]:
            spans = find_answers(questions, windows, [logits.numpy() for logits, _ in found])
            answers = []
            for i, (best, no_answer) in enumerate(spans):
                own = [j for j, window in enumerate(windows) if window.question == i]
                text = choose_text(best, no_answer, self.no_answer_threshold)
                place = {"start": best[0].start, "end": best[0].end, "score": best[0].score} if text else {}
                tokens = sum(len(windows[j].token_ids) for j in own)
                kept = np.sum([found[j][1] for j in own], 0).tolist()
                null = {"no_answer_score": no_answer if best else None}
                counts = {"windows": len(own), "tokens": tokens, "kept": kept}
                answers.append({"answer": text, **place, **null, **counts})
            return answers

        return [(window.token_ids, window.segment_ids) for window in windows], finish


def predict_file(
    predictor: Predictor, source: Path, output: Path | None, progress: Callable[..., Any] = lambda **state: None
) -> int:
    """Answers each line of a JSONL file, in order, a window at a time; returns how many.

    output: written beside and renamed when whole; None: standard output.
    Raises: InputError naming file and line.
    """
    if output is not None and output.resolve() == source.resolve():
        raise InputError(f"--output {output}: is the input; choose another file")
    if output is not None and output.is_dir():
        raise InputError(f"--output {output}: is a folder; name a file")

    def records() -> Iterator[tuple[str, Any]]:
        number = 0
        try:
            with open(source, encoding="utf-8-sig") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        try:
                            yield f"{source}, line {number}", json.loads(line)
                        except (ValueError, RecursionError) as error:
                            raise InputError(f"{source}, line {number}: not JSON ({error})") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{source}, after line {number}: not UTF-8 ({error.reason})") from None

    done = 0

    process = predictor.process

    def run(file: Any) -> None:
        nonlocal done
        for window in chunked(records(), 32 * predictor.batch_size * process.world):
            # Each process answers every world-th line; the main one writes them in order.
            parts = process.gather(predictor.answer(window[process.rank :: process.world]))
            for i in range(len(window) if process.main else 0):
                file.write(json.dumps(parts[i % process.world][i // process.world], ensure_ascii=False) + "\n")
            done += len(window)
            progress(step=done, steps=None)
        if done == 0:
            raise InputError(f"{source}: holds no lines")

    def write(path: Path) -> None:
        with open(path, "w", encoding="utf-8") as file:
            run(file)

    if output is None or not process.main:
        run(sys.stdout)
    else:
        write_file(output, write)
    return done


# ----------------------------------------------------------------------------------------------------------------------
# The demo

DEMO_CONFIG = dict(
    hidden_size=96,
    num_hidden_layers=6,
    num_attention_heads=4,
    intermediate_size=384,
    max_position_embeddings=130,
    vocab_size=600,
    type_vocab_size=1,
    layer_norm_eps=1e-5,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def run_demo(
    folder: Path, seed: int, overwrite: bool, process: Process, show: Callable, progress: Callable
) -> list[tuple[str, dict[str, Any]]]:
    """Makes data, tokenizer and an untrained model, and runs every stage on them as the commands would.

    Returns for each stage its evaluation, with the measured "speedup". Raises: InputError.
    """
    if process.world > 1:
        raise InputError("the demo runs in one process; start it without torchrun")
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        if not overwrite:
            raise InputError(f"--output {folder}: is not empty; choose another or pass --overwrite")
        if not (folder / "untrained" / "config.json").is_file():
            raise InputError(f"--output {folder}: holds something else than a demo; choose another")
    data, start = folder / "data", folder / "untrained"
    write_demo(data, seed)
    model = Model(Config(**DEMO_CONFIG))
    initialize(model, model.config.initializer_range)
    save_model(start, model)
    for name in ("vocab.json", "merges.txt"):
        (data / name).replace(start / name)

    source = Source(custom_task(None, None, None, False), data)
    plan = (
        ("finetune", "untrained", {"learning_rate": 1e-3, "epochs": 6.0}),
        (
            "soft",
            "finetune",
            {"learning_rate": 5e-4, "epochs": 2.0, "threshold_learning_rate": 1e-4, "regularization": 0.05},
        ),
        ("hard", "soft", {"learning_rate": 3e-4, "epochs": 1.0}),
        ("topk", "finetune", {"learning_rate": 3e-4, "epochs": 1.0}),
        ("manual", "finetune", {"learning_rate": 3e-4, "epochs": 1.0}),
    )
    rows = []
    for stage, restore, changes in plan:
        settings = Settings(**(STAGES[stage] | changes | {"seed": seed}))
        flags = " ".join(
            f"{flag} {value}" for flag, value in (("--lr", settings.learning_rate), ("--epochs", settings.epochs))
        )
        if stage == "soft":
            flags += f" --lambda {settings.regularization} --lr-threshold {settings.threshold_learning_rate}"
        show(f"\n$ python ltp.py {stage} --data {data} --restore {folder / restore} {flags} --output {folder / stage}")
        _, result = run_stage(
            stage,
            folder / restore,
            source,
            settings,
            PruningOptions(),
            folder / stage,
            overwrite,
            process=process,
            show=show,
            progress=progress,
        )
        rows.append((stage, dict(result.best)))

    tokenizer, labels = Tokenizer(folder / "hard"), load_config(folder / "hard").labels
    dev = load_examples(source, "dev", tokenizer, model.config.max_seq_length, labels)[0][""]
    for stage, record in rows:
        trained = load_model(folder / stage).model.to(process.device).pack()
        record["speedup"] = {"128": measure_speed(trained, sorted_batches(dev, 128), process).speedup}
    return rows
