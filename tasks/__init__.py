"""The tasks: what is asked of a text, how its examples are read, and how answers are judged."""

from __future__ import annotations

from support.errors import InputError
from tasks.base import Task
from tasks.classification import GLUE, Classification
from tasks.squad import SQUAD, QuestionAnswering
from tasks.tagging import Tagging

TASKS: dict[str, Task] = {task.name: task for task in (*GLUE, *SQUAD)}


def find_task(name: str) -> Task:
    """A task by name, in any spelling of case and hyphens (SST2, stsb). Raises: InputError."""
    for task in TASKS.values():
        if task.name.replace("-", "").lower() == name.replace("-", "").replace("_", "").lower():
            return task
    raise InputError(
        f"--task {name}: unknown; the tasks are {', '.join(TASKS)}. Omit --task to use your own data with --data"
    )


def own_task(text: str | None, pair: str | None, label: str | None, regression: bool, tagging: bool = False) -> Task:
    """A task on the user's own files: classes that are read off the training data, scores, or a label for each word.

    text, pair, label: names of the columns; None: the usual ones, and no pair.
    """
    if tagging:
        return Tagging("custom", None, "entities", text or "words", None, label or "labels")
    metric = "correlation" if regression else "accuracy_macro_f1"
    return Classification("custom", () if regression else None, metric, text or "text", pair, label or "label")


def task_for_head(head: str) -> Task:
    """A task of the kind that a checkpoint's head is for ("sequence", "token", "span"), to prepare records with."""
    if head == QuestionAnswering.head:
        return SQUAD[0]
    return own_task(None, None, None, regression=False, tagging=head == Tagging.head)
