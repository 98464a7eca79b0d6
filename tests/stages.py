"""Runs stages as the commands do, on the demo's data, on made questions and on made tags."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sentences import write_questions, write_tags

from runs.stage import StageRequest, run_stage
from support.settings import PruningOptions, Settings
from tasks import find_task, own_task
from tasks.base import Source
from train import Result


def reviews(folder: Path) -> Source:
    """The demo's data as a task of the user's own."""
    return Source(own_task(None, None, None, regression=False), folder / "data")


def stage(
    source: Source,
    name: str,
    restore: Path,
    output: Path,
    options: PruningOptions = PruningOptions(),
    show: Callable[[str], Any] = lambda line: None,
    distill: Path | None = None,
    distill_data: Path | None = None,
    **settings: Any,
) -> Result:
    """Runs a short stage, from the same random state each time."""
    settings = Settings(**{"learning_rate": 1e-3, "epochs": 1.0, "batch_size": 16, "load_best": False} | settings)
    torch.manual_seed(settings.seed)
    request = StageRequest(name, restore, source, settings, options, output, distill=distill, distill_data=distill_data)
    folder, result = run_stage(request, show=show)
    assert folder == output
    return result


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


class Trained(NamedTuple):
    """A task, and a model fine-tuned on it."""

    source: Source
    folder: Path


def train_on(kind: str, demo: Path, folder: Path) -> Trained:
    """A model fine-tuned on questions or on tags for a moment, beside its data in `folder`."""
    if kind == "questions":
        task, write, ending = find_task("SQuAD2"), write_questions, "-v2.0.json"
    else:
        task, write, ending = own_task(None, None, None, regression=False, tagging=True), write_tags, ".conll"
    for split, count, seed in (("train", 96, 0), ("dev", 30, 1)):
        write(folder / f"{split}{ending}", count, seed)
    source, options = Source(task, folder), PruningOptions(max_seq_length=60)
    settings = {"epochs": 4, "learning_rate": 3e-3, "load_best": True}
    stage(source, "finetune", demo / "model", folder / "dense", options, **settings)
    return Trained(source, folder / "dense")
