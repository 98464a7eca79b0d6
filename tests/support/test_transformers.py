"""Folders of `transformers` give its logits, and it opens the folders that we write."""

from pathlib import Path

import pytest
import torch
from folders import KINDS, KINDS_AND_ACTIVATIONS, SIZES, expect_equal_both_ways, hugging_face

from model import Model, pack
from support.checkpoint import load_model, save_model
from support.errors import InputError


def load(folder: Path) -> Model:
    return load_model(folder).model


def save(model: Model, folder: Path) -> None:
    save_model(folder, model)


@pytest.mark.parametrize("kind, act", KINDS_AND_ACTIVATIONS)
def test_dense_logits_equal_transformers_both_ways(kind, act, tmp_path):
    expect_equal_both_ways(kind, tmp_path, "sequence", load, save, hidden_act=act)


@pytest.mark.parametrize("kind", ["roberta", "bert"])
@pytest.mark.parametrize("head", ["token", "span"])
def test_logits_of_every_token_equal_transformers_both_ways(kind, head, tmp_path):
    changes = {"num_labels": 2 if head == "span" else 4, "initializer_range": 0.15}
    expect_equal_both_ways(kind, tmp_path, head, load, save, **changes)


def test_segments_and_regression(tmp_path):
    theirs = hugging_face("bert", tmp_path, num_labels=1)
    ours = load_model(tmp_path).model
    with torch.inference_mode():
        expected = theirs(torch.tensor([[5, 6, 7, 8]]), token_type_ids=torch.tensor([[0, 0, 1, 1]])).logits
        torch.testing.assert_close(ours(pack([[5, 6, 7, 8]], [[0, 0, 1, 1]])).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_bare_encoders_and_pretraining_heads(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{KINDS[kind]}Config")(**SIZES)
    for name, cls in (("bare", f"{KINDS[kind]}Model"), ("masked", f"{KINDS[kind]}ForMaskedLM")):
        getattr(transformers, cls)(config).save_pretrained(tmp_path / name)
        with pytest.raises(InputError, match="classification head .* is missing"):
            load_model(tmp_path / name)
        loaded = load_model(tmp_path / name, labels=("x", "y"), new_head=True)
        assert "head is new, with 2 outputs" in loaded.notes[0] and not loaded.has_thresholds
        assert loaded.model.config.labels == ("x", "y")
