"""Fixtures of all tests, which import what they need. The repository's root and this folder are on sys.path."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; torch reads this when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch  # noqa: E402

for folder in (Path(__file__).parent, Path(__file__).parent.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from small_models import MODES, SMALL, make_pruner, pruning_model, random_sequences, small_model  # noqa: E402

from model import Config, Model, initialize  # noqa: E402

if TYPE_CHECKING:
    from stages import Trained

    from tasks.base import Source

__all__ = ["MODES", "SMALL", "make_pruner", "random_sequences", "small_model"]


@pytest.fixture
def model() -> Model:
    return pruning_model()


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """A folder with the demo's data (data/) and a tiny untrained RoBERTa with its tokenizer (model/)."""
    from support.checkpoint import save_model
    from tools.demo import write_demo

    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder / "data", seed=1, train=150, dev=41)
    torch.manual_seed(0)
    model = Model(
        Config(600, 32, 4, 2, 64, 130, type_vocab_size=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )
    initialize(model, 0.1)
    save_model(folder / "model", model)
    for name in ("vocab.json", "merges.txt"):
        (folder / "data" / name).rename(folder / "model" / name)
    return folder


@pytest.fixture(scope="session")
def source(demo) -> Source:
    """The demo's data as a task of the user's own."""
    from stages import reviews

    return reviews(demo)


@pytest.fixture(scope="session")
def questions(demo, tmp_path_factory) -> Trained:
    from stages import train_on

    return train_on("questions", demo, tmp_path_factory.mktemp("questions"))


@pytest.fixture(scope="session")
def tags(demo, tmp_path_factory) -> Trained:
    from stages import train_on

    return train_on("tags", demo, tmp_path_factory.mktemp("tags"))


@pytest.fixture(params=["questions", "tags"])
def trained(request) -> Trained:
    """Both kinds of heads that answer for each token, one after the other."""
    return request.getfixturevalue(request.param)
