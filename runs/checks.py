"""Whether a checkpoint, a task and the user's options go together. Each error names the folder or the option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model import Config, topk_rates
from support.errors import InputError, plural
from support.onnx_file import model_name
from tasks.base import Task


def length_limit(config: Config, folder: Path, max_length: int | None) -> int:
    """How many tokens texts are cut to: `max_length`, or else the checkpoint's setting. Raises: InputError."""
    if max_length and max_length > config.max_tokens:
        raise InputError(
            f"--max-length {max_length}: {model_name(folder)} has positions for {config.max_tokens} tokens"
        )
    return max_length or min(config.max_seq_length, config.max_tokens)


def check_pruning(config: Config, changes: dict[str, Any]) -> None:
    """Raises InputError for a threshold or a keep rate out of range, and for top-k on a model with too few layers.

    changes: fields of the configuration that a stage replaces.
    """
    threshold, rate = changes.get("final_token_threshold"), changes.get("token_keep_rate")
    if threshold is not None and not 0 <= threshold <= 1:
        raise InputError(f"--final-token-threshold {threshold}: a score lies between 0 and 1, and so must a threshold")
    if rate is not None and not -1e6 <= rate <= 1:
        raise InputError(f"--token-keep-rate {rate}: expected -1e6 to 1 (negative values prune more steeply)")
    rates = changes.get("keep_rates")
    if rates and rate is not None:
        raise InputError("--keep-rates and --token-keep-rate each say how much is kept; pass one of them")
    if rates and len(rates) != config.num_hidden_layers:
        raise InputError(
            f"--keep-rates: {plural(len(rates), 'rate')}, but the model has {config.num_hidden_layers} layers"
        )
    if (
        changes.get("prune_mode") == "topk"
        and not changes.get("keep_rates", config.keep_rates)
        and min(topk_rates(0.0, config.num_hidden_layers)) == 1
    ):
        raise InputError(f"topk never prunes the first layers, and this model has only {config.num_hidden_layers}")


def known_labels(task: Task, config: Config) -> tuple[str, ...] | None:
    """The task's labels. For the user's own data: the checkpoint's, or None where they are to be read off the data."""
    if task.labels is not None:
        return task.labels
    # Hugging Face's placeholder names say nothing about the data.
    return None if config.labels[0] == "LABEL_0" else config.labels


def check_scores(folder: Path, config: Config, task: Task) -> None:
    """Raises InputError for a model that gives a score, where the user's own data are to have classes."""
    if task.labels is None and config.head == task.head == "sequence" and len(config.labels) == 1:
        raise InputError(f"{model_name(folder)}: gives a score, and {task.title} would have classes; pass --regression")


def check_task(folder: Path, config: Config, task: Task) -> tuple[str, ...]:
    """The labels on which a checkpoint and a task agree; () for regression. Raises: InputError if they do not agree."""
    labels = config.labels if task.labels is None else task.labels
    if config.head != task.head:
        descriptions = {
            "sequence": "classifies texts",
            "token": "tags words (--tagging)",
            "span": "finds answers in a text (--task SQuAD or SQuAD2)",
        }
        raise InputError(
            f"{model_name(folder)}: {descriptions[config.head]}, which is another kind of task than {task.title}"
        )
    check_scores(folder, config, task)
    if max(1, len(labels)) != len(config.labels):
        raise InputError(
            f"{model_name(folder)}: has {plural(len(config.labels), 'output')}, but {task.title} needs "
            f"{max(1, len(labels))}; evaluate the checkpoint of a run on this task"
        )
    return labels


def describe_left_out(task: Task, count: int) -> str:
    """Says that `count` lines or questions were left out; "" if none was."""
    if not count:
        return ""
    what = plural(count, "question" if task.head == "span" else "torn line")
    return f"{what}{' without an answer' * (task.head == 'span')} {'was' if count == 1 else 'were'} left out"


def describe_cut(task: Task, count: int, max_length: int) -> str:
    """Says that `count` texts were cut; "" if none was. Question answering cuts questions, and windows its contexts."""
    if not count:
        return ""
    verb = "was" if count == 1 else "were"
    if task.head == "span":
        return f"{plural(count, 'question')} {verb} cut: too long for windows of {max_length} tokens"
    return f"{plural(count, 'text')} longer than {max_length} tokens {verb} cut"
