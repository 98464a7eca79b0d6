"""Fixtures of the runs' tests: the demo's task, and models fine-tuned on it, on questions and on tags for a moment."""

from pathlib import Path
from typing import NamedTuple

import pytest
from sentences import made_sentences
from stages import reviews, stage, write_questions

from support.settings import PruningOptions
from tasks import find_task, own_task
from tasks.base import Source


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """A cache of data sets for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="session")
def source(demo) -> Source:
    return reviews(demo)


@pytest.fixture(scope="session")
def finetuned(demo, source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finetune"
    stage(source, "finetune", demo / "model", folder)
    return folder


class Trained(NamedTuple):
    """A task, and a model fine-tuned on it."""

    source: Source
    folder: Path


def train_on(source: Source, demo: Path) -> Trained:
    options = PruningOptions(max_seq_length=60)
    folder = source.path / "dense"
    stage(source, "finetune", demo / "model", folder, options, epochs=4, learning_rate=3e-3, load_best=True)
    return Trained(source, folder)


@pytest.fixture(scope="session")
def questions(demo, tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("questions")
    for split, count, seed in (("train", 96, 0), ("dev", 30, 1)):
        write_questions(folder / f"{split}-v2.0.json", count, seed)
    return train_on(Source(find_task("SQuAD2"), folder), demo)


@pytest.fixture(scope="session")
def tags(demo, tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("tags")
    for split, count, seed in (("train", 96, 0), ("dev", 30, 1)):
        sentences = made_sentences(count, seed)
        blocks = ("\n".join(f"{word} {label}" for word, label in zip(s.words, s.labels)) for s in sentences)
        (folder / f"{split}.conll").write_text("\n\n".join(blocks) + "\n")
    return train_on(Source(own_task(None, None, None, regression=False, tagging=True), folder), demo)


@pytest.fixture(params=["questions", "tags"])
def trained(request) -> Trained:
    """Both kinds of heads that answer for each token, one after the other."""
    return request.getfixturevalue(request.param)
