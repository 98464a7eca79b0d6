"""Fixtures of the tools' tests: an untrained model that prunes, two runs, and models of questions and of tags."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sentences import made_sentences

from runs.stage import StageRequest, run_stage
from support.checkpoint import load_model, save_model
from support.process import Process
from support.settings import STAGES, PruningOptions, Settings
from tasks import find_task, own_task
from tasks.base import Source
from tools.predict import Predictor, predict_file


@pytest.fixture(scope="session")
def reviews(demo) -> Source:
    """The demo's data as a task."""
    return Source(own_task(None, None, None, regression=False), demo / "data")


@pytest.fixture(scope="session")
def hard(demo, tmp_path_factory) -> Path:
    """The demo's untrained model with thresholds at which some tokens go in each layer but the first."""
    folder = tmp_path_factory.mktemp("hard") / "hard"
    shutil.copytree(demo / "model", folder)
    model = load_model(folder, ("negative", "positive"), prune_mode="absolute_threshold").model
    model.thresholds.data = torch.tensor([0.0, 0.004, 0.0065, 0.009])
    save_model(folder, model)
    return folder


def short_run(
    stage: str, restore: Path, source: Source, output: Path, max_length: int | None = None, **changes
) -> Path:
    settings = Settings(**(STAGES[stage] | {"learning_rate": 1e-3} | changes))
    request = StageRequest(stage, restore, source, settings, PruningOptions(max_seq_length=max_length), output)
    return run_stage(request, Process())[0]


@pytest.fixture(scope="session")
def runs(demo, reviews, tmp_path_factory) -> Path:
    """Folders of two short trainings, the second with an evaluation every step, and the answers of the second."""
    folder = tmp_path_factory.mktemp("runs")
    short_run("finetune", demo / "model", reviews, folder / "dense", batch_size=50, epochs=0.4)
    soft = {"batch_size": 50, "epochs": 1, "save_steps": 1, "threshold_learning_rate": 3e-3}
    short_run("soft", folder / "dense", reviews, folder / "soft", **soft)
    predict_file(Predictor(folder / "soft", Process()), demo / "data" / "dev.jsonl", folder / "answers.jsonl")
    return folder


# ---- questions and tags ----

NAMES = "Anna Boris Clara David Elena Felix Greta Hugo".split()
TOWNS = "Malden Norwick Orleton Pernau Quimby Rosental".split()


def write_questions(path: Path, count: int, seed: int) -> None:
    """Who lives where? Contexts of three sentences in SQuAD's layout; every fourth question has no answer."""
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
        question = {"id": f"{seed}-{number}", "question": f"Where does {person} live?", "answers": answers}
        paragraphs.append({"context": context, "qas": [question]})
    path.write_text(json.dumps({"version": "1", "data": [{"title": "t", "paragraphs": paragraphs}]}))


def write_tags(path: Path, count: int, seed: int) -> None:
    blocks = ("\n".join(f"{w} {t}" for w, t in zip(s.words, s.labels)) for s in made_sentences(count, seed))
    path.write_text("\n\n".join(blocks) + "\n")


class Trained(NamedTuple):
    source: Source
    folder: Path


def train_on(kind: str, demo: Path, folder: Path) -> Trained:
    """A model fine-tuned on questions or on tags for a moment."""
    task = find_task("SQuAD2") if kind == "questions" else own_task(None, None, None, regression=False, tagging=True)
    write, ending = (write_questions, "-v2.0.json") if kind == "questions" else (write_tags, ".conll")
    for split, count, seed in (("train", 96, 0), ("dev", 30, 1)):
        write(folder / f"{split}{ending}", count, seed)
    source = Source(task, folder)
    settings = {"epochs": 4, "learning_rate": 3e-3, "batch_size": 16}
    return Trained(source, short_run("finetune", demo / "model", source, folder / "dense", max_length=60, **settings))


@pytest.fixture(scope="session")
def questions(demo, tmp_path_factory) -> Trained:
    return train_on("questions", demo, tmp_path_factory.mktemp("questions"))


@pytest.fixture(scope="session")
def tags(demo, tmp_path_factory) -> Trained:
    return train_on("tags", demo, tmp_path_factory.mktemp("tags"))
