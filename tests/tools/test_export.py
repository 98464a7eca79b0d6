"""ONNX: one sequence is computed as the model computes it, and dropped tokens leave the graph's products."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from small_models import pruning_model, random_sequences, small_model

from model import Sequences, keep_topk, pack
from support.errors import InputError
from tools.export import SingleSequence, compare, export_model, keep_highest

HEADS = ("sequence", "token", "span")
PRUNE_MODES = (None, "absolute_threshold", "topk")


def a_model(head: str, prune_mode: str | None, **changes):
    labels = ("start", "end") if head == "span" else ("a", "b", "c")
    model = pruning_model(head=head, labels=labels, prune_mode=prune_mode, token_keep_rate=0.2, **changes)
    scale = 3 if model.config.score_norm == "length" else 1
    model.thresholds.data = scale * torch.tensor([0.0, 0.006, 0.007, 0.008, 0.012])
    return model.requires_grad_(False)


def question_length(ids: list[int]) -> int:
    """A first text, and a second one of two thirds."""
    return len(ids) // 3 + 1


def segments(ids: list[int]) -> list[int]:
    return [int(i >= question_length(ids)) for i in range(len(ids))]


def inputs_of(ids: list[int]) -> dict[str, torch.Tensor]:
    values = {"input_ids": [ids], "token_type_ids": [segments(ids)], "question_length": [question_length(ids)]}
    return {name: torch.tensor(value) for name, value in values.items()}


@pytest.mark.parametrize("norm", ["max_length", "length"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("prune_mode", PRUNE_MODES)
def test_the_traced_arithmetic_is_the_models(prune_mode, head, norm):
    model = a_model(head, prune_mode, score_norm=norm, protect_question=head == "span")
    dropped = 0
    for ids in [[5], [5, 6], *random_sequences(9, seed=3)]:
        expected = model(pack([ids], [segments(ids)], [question_length(ids)]))
        single = SingleSequence(model)
        logits, kept = single(*(inputs_of(ids)[name] for name in single.input_names))
        assert kept.tolist() == expected.kept[:, 0].tolist()
        assert logits.shape == ((1, 3) if head == "sequence" else (1, len(ids), len(model.config.labels)))
        torch.testing.assert_close(logits.view_as(expected.logits), expected.logits, atol=1e-5, rtol=0)
        dropped += len(ids) - int(kept[-2])
    assert (dropped > 0) == (prune_mode is not None)


def test_keep_highest_is_keep_topk_of_one_sequence():
    generator = torch.Generator().manual_seed(1)
    for n in (1, 2, 7, 30):
        seqs, protected = Sequences(torch.tensor([n])), torch.arange(n) % 9 == 0
        scores = torch.randint(0, 4, (n,), generator=generator) / 4  # with ties
        for count in range(int(protected.sum()), n + 1):
            expected = keep_topk(scores, seqs, torch.tensor([count]), protected)
            assert keep_highest(scores, torch.tensor([count]), protected).tolist() == expected.tolist()


def test_inputs_are_those_that_the_answer_depends_on():
    def names(**changes) -> list[str]:
        return SingleSequence(small_model(**changes)).input_names

    span = {"head": "span", "labels": ("start", "end")}
    assert names() == ["input_ids", "token_type_ids"]
    assert names(type_vocab_size=1) == names(type_vocab_size=1, **span) == ["input_ids"]
    assert names(type_vocab_size=1, protect_question=True, **span) == ["input_ids", "question_length"]


@pytest.mark.parametrize(
    "head, prune_mode, changes",
    [
        ("sequence", None, {"type_vocab_size": 1}),
        ("sequence", "topk", {"score_norm": "length"}),
        ("token", "absolute_threshold", {}),
        ("token", "topk", {}),
        ("span", "absolute_threshold", {"type_vocab_size": 1, "protect_question": True}),
    ],
)
def test_onnx_answers_as_the_model(head, prune_mode, changes, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, dropped = a_model(head, prune_mode, **changes), 0
    report = export_model(model, tmp_path / "m.onnx")
    assert float(re.search(r"differ by at most (\S+) of", report)[1]) < 1e-5
    session = runtime.InferenceSession(tmp_path / "m.onnx")
    names = [node.name for node in session.get_inputs()]
    assert names == SingleSequence(model).input_names
    assert [node.name for node in session.get_outputs()] == ["logits", "kept"]
    for ids in random_sequences(6, seed=2):
        logits, kept = session.run(None, {name: inputs_of(ids)[name].numpy() for name in names})
        read = segments(ids) if "token_type_ids" in names else [0] * len(ids)
        expected = model(pack([ids], [read], [question_length(ids)]))
        np.testing.assert_allclose(logits if head == "sequence" else logits[0], expected.logits, atol=1e-5)
        assert kept.tolist() == expected.kept[:, 0].tolist()
        dropped += len(ids) - int(kept[-2])
    assert (dropped > 0) == (prune_mode is not None)


def test_onnx_drops_tokens_inside_the_graph(tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = small_model(prune_mode="absolute_threshold", num_hidden_layers=2)
    model.thresholds.data = torch.tensor([0.007, 0.012])
    export_model(model, tmp_path / "m.onnx")
    # Each product with the feed-forward weight becomes an output, to see how many tokens come out of it.
    graph = onnx.load(tmp_path / "m.onnx")
    assert json.loads(graph.metadata_props[0].value) == ["a", "b", "c"]
    sizes = {tensor.name: tensor.dims for tensor in graph.graph.initializer}
    wide = [node for node in graph.graph.node if any(47 in sizes.get(name, ()) for name in node.input)]
    graph.graph.output.extend(onnx.ValueInfoProto(name=node.output[0]) for node in wide)
    session = runtime.InferenceSession(graph.SerializeToString())
    for ids in random_sequences(6, seed=2):
        inputs = {"input_ids": np.array([ids]), "token_type_ids": np.zeros((1, len(ids)), dtype=np.int64)}
        _, kept, *inside = session.run(None, inputs)
        tokens = {x.shape[-2] for x in inside if x.ndim >= 2 and x.shape[-1] == 47}
        assert tokens == {kept[0], 1}  # the last layer computes the first token only
    assert kept[0] < len(ids)
    # A graph of another model is noticed.
    model.thresholds.data = torch.tensor([0.0, 0.012])
    with pytest.raises(InputError, match="differs from the model .* was not written"):
        compare(model, tmp_path / "m.onnx")


def test_without_onnxscript_the_command_to_install_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match="pip install onnx onnxscript$"):
        export_model(small_model(), tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_without_onnxruntime_nothing_is_compared(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert compare(small_model(), tmp_path / "absent.onnx").startswith("not compared with the model")
