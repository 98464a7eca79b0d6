"""Runs stages as the commands do, and writes small data for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runs.stage import StageRequest, run_stage
from support.settings import PruningOptions, Settings
from tasks import own_task
from tasks.base import Source
from train import Result

NAMES = "Anna Boris Clara David Elena Felix Greta Hugo".split()
TOWNS = "Malden Norwick Orleton Pernau Quimby Rosental".split()


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
    **settings: Any,
) -> Result:
    """Runs a short stage, from the same random state each time."""
    settings = Settings(**{"learning_rate": 1e-3, "epochs": 1.0, "batch_size": 16, "load_best": False} | settings)
    torch.manual_seed(settings.seed)
    request = StageRequest(name, restore, source, settings, options, output, distill=distill)
    folder, result = run_stage(request, show=show)
    assert folder == output
    return result


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def write_questions(path: Path, count: int, seed: int, words: int = 0) -> None:
    """Who lives where? Contexts of three sentences in SQuAD's layout; every fourth question has no answer.

    words: of a preface that makes each question longer.
    """
    generator = np.random.default_rng(seed)
    paragraphs = []
    for number in range(count):
        people = generator.permutation(NAMES)[:4]
        context = " ".join(f"{name} lives in {generator.choice(TOWNS)}." for name in people[:3])
        person = people[3] if number % 4 == 0 else people[number % 3]
        answers = []
        if person in people[:3]:
            start = context.index(f"{person} lives in ") + len(f"{person} lives in ")
            answers = [{"text": context[start:].split(".")[0], "answer_start": start}]
        text = "Now then " * words + f"where does {person} live?"
        paragraphs.append(
            {"context": context, "qas": [{"id": f"{seed}-{number}", "question": text, "answers": answers}]}
        )
    path.write_text(json.dumps({"version": "1", "data": [{"title": "t", "paragraphs": paragraphs}]}))
