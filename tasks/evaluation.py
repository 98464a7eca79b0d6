"""What a model answers on a set of examples, and how good the answers are. Evaluation prunes as inference does."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data import Examples, chunked, token_batches
from model import Model, Pruner, bit_operations, macs
from support.process import Process
from tasks.base import Task, task_loss


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
    relative_bops: float  # bit operations as a share of the dense float32 model's
    kept: list[float]  # (L,) share of the tokens that survives each layer
    seconds: float  # of predicting, without loss and metrics
    examples_per_second: float


def by_sequence(logits: Tensor, lengths: list[int], head: str) -> list[Tensor]:
    """The logits of each sequence: (C,), or (n, C) of a head that answers for each token."""
    return list(logits if head == "sequence" else logits.split(lengths))


@torch.inference_mode()
def predict_logits(
    model: Model,
    examples: Examples,
    process: Process,
    batch_size: int,
    pruner: Pruner | None = None,
    max_tokens: int | None = None,
    check: Callable[[], object] = lambda: None,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Logits of each of N examples, (C,) or (n, C), and tokens kept (L, N), in the examples' order, on every process.

    Sequences of similar length run together. Each process takes every world-th of them. max_tokens: limit of a batch,
    where it is fewer than `batch_size` examples have. pruner: default, the model's own. check: called before each
    batch; it may raise.
    """
    model.eval()
    pruner = model.pruner() if pruner is None else pruner
    order = np.argsort(examples.lengths, kind="stable")[process.rank :: process.world]
    logits: list[np.ndarray] = []
    kept = [torch.empty(model.config.num_hidden_layers, 0, dtype=torch.int64)]
    for indices in token_batches(order, examples.lengths, batch_size, max_tokens):
        check()
        with process.autocast(model):
            output = model(examples.batch(indices).to(process.device), pruner)
        rows = by_sequence(output.logits.float().cpu(), examples.lengths[indices].tolist(), model.config.head)
        logits += [row.numpy() for row in rows]
        kept.append(output.kept.cpu())
    parts = process.gather((order, logits, torch.cat(kept, 1).numpy()))
    back = np.argsort(np.concatenate([part[0] for part in parts]))
    all_logits = [row for part in parts for row in part[1]]
    return [all_logits[i] for i in back], np.concatenate([part[2] for part in parts], 1)[:, back]


def mean_loss(task: Task, sets: dict[str, Examples], logits: dict[str, list[np.ndarray]]) -> float:
    """Mean loss of all choices that count."""
    total, count = 0.0, 0
    for suffix, examples in sets.items():
        join = np.stack if task.head == "sequence" else np.concatenate
        for indices in map(np.array, chunked(range(len(examples)), 1024)):
            part = torch.from_numpy(join([logits[suffix][i] for i in indices]))
            choices = task.choices(part, torch.from_numpy(examples.lengths[indices]))
            total += float(task_loss(choices, task.targets(examples, indices)))
            count += task.count_targets(examples, indices)
    return total / count


def judge(
    task: Task, sets: dict[str, Examples], logits: dict[str, list[np.ndarray]]
) -> tuple[dict[str, float], float, float]:
    """Metrics of all sets, the score of the first, and the mean loss."""
    metrics, scores = {}, []
    for suffix, examples in sets.items():
        values, score = task.judge(examples, logits[suffix])
        metrics |= {f"{name}{suffix}": value for name, value in values.items()}
        scores.append(score)
    return metrics, scores[0], mean_loss(task, sets, logits)


def evaluate(
    model: Model,
    task: Task,
    sets: dict[str, Examples],
    process: Process,
    batch_size: int = 32,
    pruner: Pruner | None = None,
    max_tokens: int | None = None,
    check: Callable[[], object] = lambda: None,
) -> tuple[Evaluation, dict[str, list[np.ndarray]]]:
    """Evaluates on one set, or on several (MNLI has two): the first gives the score, all give metrics and FLOPs.

    sets: examples by the suffix of their metrics. The other arguments are those of `predict_logits`. Returns the
    evaluation, and each set's logits. The main process judges them.
    """
    logits, counts, seconds = {}, [], 0.0
    for suffix, examples in sets.items():
        start = time.perf_counter()
        logits[suffix], kept = predict_logits(model, examples, process, batch_size, pruner, max_tokens, check)
        seconds += time.perf_counter() - start
        counts.append(torch.from_numpy(kept))
    metrics, score, loss = process.broadcast(judge(task, sets, logits) if process.main else None)
    lengths = torch.cat([torch.from_numpy(examples.lengths) for examples in sets.values()])
    kept, count = torch.cat(counts, 1), len(lengths)
    used = int(macs(model.config, lengths, kept).sum())
    dense = int(macs(model.config, lengths, lengths.expand(len(kept), -1)).sum())
    evaluation = Evaluation(
        metrics=metrics,
        score=score,
        loss=loss,
        examples=count,
        gflops=2e-9 * used / count,
        dense_gflops=2e-9 * dense / count,
        relative_flops=used / dense,
        # Summed as Python's integers: a hundred thousand long texts and a large model have more than 2^63.
        relative_bops=sum(bit_operations(model.config, lengths, kept, model.linear_bits).tolist()) / (32**2 * dense),
        kept=(kept.sum(1).double() / int(lengths.sum())).tolist(),
        seconds=seconds,
        examples_per_second=count / seconds,
    )
    return evaluation, logits
