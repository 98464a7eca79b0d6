"""What tests of training run on: random examples for each kind of head, tasks for them, and models that prune."""

from __future__ import annotations

import numpy as np
from small_models import pruning_model, random_sequences

from data import Examples
from model import Model
from tasks import find_task, own_task
from tasks.base import Task

HEADS = {"sequence": ("a", "b", "c"), "token": ("a", "b", "c"), "span": ("start", "end")}
CLASSES = own_task(None, None, None, regression=False)


def task_of(head: str) -> Task:
    return (
        find_task("SQuAD") if head == "span" else own_task(None, None, None, regression=False, tagging=head == "token")
    )


def examples(count: int, seed: int = 0, longest: int = 40, head: str = "sequence") -> Examples:
    """Random tokens; what is to be answered can be read off them."""
    sequences = random_sequences(count, seed, longest)
    token_ids, lengths = np.concatenate(sequences).astype(np.int32), np.array([len(s) for s in sequences])
    targets = {
        "sequence": np.array([s[-1] % 3 for s in sequences]),
        "token": np.where(token_ids % 4 == 3, -100, token_ids % 4).astype(np.int64),
        "span": np.stack([lengths // 3, lengths // 2], 1),
    }[head]
    return Examples(token_ids, np.zeros(len(token_ids), np.int8), lengths, targets)


def head_model(head: str, **changes) -> Model:
    return pruning_model(head=head, labels=HEADS[head], **changes)


def mode_model(mode: str, **changes) -> Model:
    """A model whose configuration prunes as this mode does in inference."""
    prune_mode = {"finetune": None, "topk": "topk"}.get(mode, "absolute_threshold")
    return pruning_model(prune_mode=prune_mode, **changes)
