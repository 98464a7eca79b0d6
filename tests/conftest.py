"""Fixtures: small models with odd, distinct sizes, so that a swapped axis fails."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from data import pack, write_demo  # noqa: E402
from model import Config, Model, initialize, save_model, threshold_ladder  # noqa: E402

SMALL = Config(
    vocab_size=83,
    hidden_size=30,
    num_hidden_layers=5,
    num_attention_heads=3,
    intermediate_size=47,
    max_position_embeddings=140,
    layer_norm_eps=1e-5,
    labels=("a", "b", "c"),
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def small_model(**changes) -> Model:
    """A random model with weights large enough that attention is not uniform, and small enough not to be chaotic."""
    torch.manual_seed(0)
    model = Model(replace(SMALL, **changes))
    initialize(model, 0.15)
    return model.eval()


def random_sequences(count: int, seed: int = 0, longest: int = 100) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, 83, (n,), generator=generator).tolist() for n in lengths]


# Pruning modes with settings under which the random models drop a good part of the tokens.
MODES = {
    "none": {},
    "soft": {"temperature": 3e-4},
    "hard": {},
    "topk": {},
}


@pytest.fixture
def model() -> Model:
    model = small_model(token_keep_rate=0.3)
    model.thresholds.data = threshold_ladder(0.01, 5)
    return model


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """A folder with the demo's data (data/) and a tiny untrained RoBERTa with its tokenizer (model/)."""
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


__all__ = ["MODES", "SMALL", "pack", "random_sequences", "small_model"]
