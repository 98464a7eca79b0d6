"""Folders of `transformers` give its logits, and it opens the folders that we write."""

from dataclasses import replace

import pytest
import torch
from folders import KINDS, SIZES, hugging_face
from small_models import random_sequences

from model import Dense, Hard, pack
from support.checkpoint import load_model, save_model
from support.errors import InputError


def dense_logits(model, sequences, pad):
    n = max(map(len, sequences))
    ids = torch.tensor([s + [pad] * (n - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (n - len(s)) for s in sequences])
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize(
    "kind, act",  # I-BERT knows gelu only
    [(k, a) for k in KINDS for a in ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu") if k != "ibert" or a == "gelu"],
)
def test_dense_logits_equal_transformers_both_ways(kind, act, tmp_path):
    theirs = hugging_face(kind, tmp_path / "theirs", hidden_act=act)
    sequences = random_sequences(7, longest=50)
    ours = load_model(tmp_path / "theirs").model
    with torch.inference_mode():
        logits = ours(pack(sequences)).logits
    pad = 0 if kind == "bert" else 1
    expected = dense_logits(theirs, sequences, pad)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)

    # What we write, thresholds included, is an ordinary folder to transformers.
    import transformers

    ours.config = replace(ours.config, prune_mode="absolute_threshold")
    save_model(tmp_path / "ours", ours)
    again, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"] and set(report["unexpected_keys"]) <= {"ltp.thresholds"}
    torch.testing.assert_close(dense_logits(again.eval(), sequences, pad), expected, atol=1e-4, rtol=0)
    assert again.config.num_labels == 3


@pytest.mark.parametrize("kind", ["roberta", "bert"])
@pytest.mark.parametrize("head, architecture", [("token", "TokenClassification"), ("span", "QuestionAnswering")])
def test_logits_of_every_token_equal_transformers_both_ways(kind, head, architecture, tmp_path):
    import transformers

    outputs = 2 if head == "span" else 4
    theirs = hugging_face(kind, tmp_path / "theirs", architecture, num_labels=outputs, initializer_range=0.15)
    sequences = random_sequences(5, longest=50)

    def logits_of(model):
        with torch.inference_mode():
            outputs = [model(input_ids=torch.tensor([ids])) for ids in sequences]
        if head == "span":
            return torch.cat([torch.stack([o.start_logits[0], o.end_logits[0]], 1) for o in outputs])
        return torch.cat([o.logits[0] for o in outputs])

    ours = load_model(tmp_path / "theirs").model
    assert ours.config.head == head
    expected = logits_of(theirs)
    assert expected.std() > 0.1
    for pruner in (Dense(), Hard(torch.zeros(2))):  # with all thresholds at 0 nothing is pruned
        with torch.inference_mode():
            torch.testing.assert_close(ours(pack(sequences), pruner).logits, expected, atol=1e-4, rtol=0)
    ours.config = replace(ours.config, prune_mode="absolute_threshold")
    save_model(tmp_path / "ours", ours)
    again, report = getattr(transformers, f"AutoModelFor{architecture}").from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"] and set(report["unexpected_keys"]) <= {"ltp.thresholds"}
    torch.testing.assert_close(logits_of(again.eval()), expected, atol=1e-4, rtol=0)


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
