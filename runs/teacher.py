"""The teacher of --distill: a dense model's logits of the training examples."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data import CACHE_VERSION, Examples
from model import Config, Dense, Model
from runs.checks import check_task, length_limit
from support.checkpoint import load_config, load_model
from support.devices import for_inference
from support.errors import InputError
from support.files import write_file
from support.process import Process
from tasks.base import Source
from tasks.evaluation import predict_logits
from tasks.tokenizer import Tokenizer


def ask_teacher(
    folder: Path,
    source: Source,
    labels: tuple[str, ...],
    student: Tokenizer,
    max_length: int,
    process: Process,
    batch_size: int,
    unlabelled: Path | None = None,
    show: Callable[[str], Any] = lambda line: None,
    progress: Callable[..., Any] = lambda **state: None,
) -> Tensor:
    """The teacher's logits of the training examples, for `Examples.teacher`: (N, C), or (ΣT, C) with an answer a token.

    The teacher reads the texts with its own tokenizer. The cache of `datasets` keeps the logits: a later stage with the
    same teacher, tokens and conditions reads them there.
    unlabelled: a file of other texts, whose logits are asked for instead. show: called with what the user should know.
    progress: called with the batch that begins, `step` of `steps`.
    Raises: InputError, also for a teacher that answers for each token and whose tokens are not the student's.
    """
    import datasets

    tokenizer, config = Tokenizer(folder), load_config(folder)
    check_teacher(folder, config, source, labels=labels, tokenizer=tokenizer, student=student)
    limit = length_limit(config, folder, max_length if source.task.head != "sequence" else None)
    if unlabelled:
        examples, kind = source.task.load_unlabelled(unlabelled, tokenizer, limit), "unlabelled"
    else:
        examples, kind = source.load("train", tokenizer, limit, labels=labels)[0][""], "training"
    teacher, _, notes = load_model(folder, labels or config.labels)
    for note in notes:
        show(f"note: --distill {folder}: {note}")
    key = cache_key(teacher, examples, process, batch_size=batch_size)
    path = Path(datasets.config.HF_DATASETS_CACHE, f"answers-{key}.safetensors")
    if all(process.gather(path.is_file())):
        try:
            return load_file(path)["logits"]
        except (SafetensorError, KeyError) as error:
            raise InputError(f"{path}: the teacher's answers in the cache are damaged ({error}); remove it") from None
    show(f"the teacher answers {len(examples):,} {kind} examples")
    teacher = for_inference(teacher, process)
    batches, done = math.ceil(math.ceil(len(examples) / process.world) / batch_size), itertools.count()
    rows, _ = predict_logits(
        teacher,
        examples,
        process,
        batch_size=batch_size,
        pruner=Dense(),
        check=lambda: progress(step=next(done), steps=batches),
    )
    logits = torch.from_numpy(np.stack(rows) if source.task.head == "sequence" else np.concatenate(rows))
    if process.main:
        write_file(path, lambda temporary: save_file({"logits": logits}, temporary))
    return logits


def check_teacher(
    folder: Path,
    config: Config,
    source: Source,
    labels: tuple[str, ...],
    tokenizer: Tokenizer,
    student: Tokenizer,
) -> None:
    """Raises InputError for a teacher of another task, of other labels, or with other tokens where they must agree."""
    check_task(folder, config, source.task)
    if source.task.head != "sequence" and tokenizer.identity != student.identity:
        raise InputError(f"--distill {folder}: has another tokenizer, so that its answers are not for the same tokens")
    named = config.labels[0] != "LABEL_0"
    if labels and named and {name.lower() for name in config.labels} != {name.lower() for name in labels}:
        raise InputError(f"--distill {folder}: answers {', '.join(config.labels)}, not {', '.join(labels)}")


def cache_key(teacher: Model, examples: Examples, process: Process, batch_size: int) -> str:
    """A digest of all that the logits depend on, and of the version of the code."""
    conditions = f"{CACHE_VERSION} {teacher.config} {process.precision} {process.world} {batch_size}"
    key = hashlib.sha256(conditions.encode())
    weights = (tensor.numpy() for tensor in teacher.state_dict().values())
    for array in (*weights, examples.lengths, examples.token_ids, examples.segment_ids):
        key.update(array)
    return key.hexdigest()[:32]
