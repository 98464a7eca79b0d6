"""Fixtures of the tasks' tests: an own cache of data sets, and small tokenizers."""

from pathlib import Path

import pytest
from questions import CONTEXTS, trained

from tasks.tokenizer import Tokenizer

REVIEWS = [
    "a wonderful film with superb music and a clumsy story",
    "the road near the hotel was dreadful but the meal was delightful",
    "it went on and on like a boring letter from two friends",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory) -> Tokenizer:
    """A tokenizer of RoBERTa's kind: byte-level BPE."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    folder: Path = tmp_path_factory.mktemp("byte_level")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(REVIEWS, trainer)
    backend.model.save(str(folder))
    return Tokenizer(folder)


@pytest.fixture(scope="session", params=["bytes", "wordpiece", "metaspace", "bytes-untrimmed"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    """Each kind of tokenizer, trained on the contexts of the questions."""
    return trained(tmp_path_factory.mktemp("tokenizer"), request.param, CONTEXTS)
