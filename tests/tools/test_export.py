"""ONNX: one sequence is computed as the model computes it, and dropped tokens leave the graph's products."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from small_models import pruning_model, random_sequences, small_model

from model import Batch, Model, Output, Sequences, keep_topk, pack
from support.errors import InputError
from support.onnx_file import OnnxModel, padded_inputs
from tools.export import Traceable, TracedSequences, compare, export_model, keep_highest

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


def a_batch(sequences: list[list[int]], reads_segments: bool = True) -> Batch:
    segment_ids = [segments(ids) if reads_segments else [0] * len(ids) for ids in sequences]
    return pack(sequences, segment_ids, [question_length(ids) for ids in sequences])


def assert_same(logits: torch.Tensor, kept: torch.Tensor, expected: Output, lengths: list[int]) -> None:
    """Padded answers are the model's; nothing stands in padding."""
    assert kept.T.tolist() == expected.kept.tolist()
    if logits.ndim == 3:
        assert all(not row[n:].any() for row, n in zip(logits, lengths))
        logits = torch.cat([row[:n] for row, n in zip(logits, lengths)])
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", ["max_length", "length"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("prune_mode", PRUNE_MODES)
def test_the_traced_arithmetic_is_the_models(prune_mode, head, norm):
    model = a_model(head, prune_mode, score_norm=norm, protect_question=head == "span")
    sequences = [[5], [5, 6], *random_sequences(9, seed=3)]
    traceable = Traceable(model)
    for texts in (sequences, sequences[:1], sequences[4:5]):
        batch, lengths = a_batch(texts), [len(ids) for ids in texts]
        expected, inputs = model(batch), padded_inputs(batch, traceable.input_names)
        logits, kept = traceable(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        assert_same(logits, kept, expected, lengths)
    assert (sum(lengths) > int(kept[:, -2].sum())) == (prune_mode is not None)


def test_keep_highest_is_keep_topk():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([1, 2, 30, 7])
    seqs = Sequences(lengths)
    traced = TracedSequences(lengths, lengths, seqs.ids)
    protected = seqs.positions % 9 == 0
    scores = torch.randint(0, 4, (seqs.num_tokens,), generator=generator) / 4  # with ties
    for count in range(31):
        counts = seqs.sum(protected).maximum(torch.tensor(count)).minimum(lengths)
        expected = keep_topk(scores, seqs, counts, protected)
        assert keep_highest(scores, traced, counts, protected).tolist() == expected.tolist()


def test_inputs_are_those_that_the_answer_depends_on():
    def names(**changes) -> list[str]:
        return Traceable(small_model(**changes)).input_names

    span = {"head": "span", "labels": ("start", "end")}
    always = ["input_ids", "attention_mask"]
    assert names() == [*always, "token_type_ids"]
    assert names(type_vocab_size=1) == names(type_vocab_size=1, **span) == always
    assert names(type_vocab_size=1, protect_question=True, **span) == [*always, "question_length"]
    assert names(type_vocab_size=1, read_dropped=True) == [*always, "token_type_ids"]


@pytest.mark.parametrize("prune_mode", PRUNE_MODES)
@pytest.mark.parametrize(
    "head, changes",
    [
        ("sequence", {"type_vocab_size": 1, "score_norm": "length"}),
        ("sequence", {"read_dropped": True, "type_vocab_size": 1}),
        ("token", {}),
        ("span", {"type_vocab_size": 1, "protect_question": True}),
    ],
)
def test_onnx_answers_as_the_model(head, changes, prune_mode, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = a_model(head, prune_mode, **changes)
    report = export_model(model, tmp_path / "m.onnx")
    assert float(re.search(r"differ by at most (\S+) of", report)[1]) < 1e-5
    graph = OnnxModel(model.config, tmp_path / "m.onnx", list(range(len(model.config.labels))))
    assert graph.names == Traceable(model).input_names
    assert [node.name for node in graph.session.get_outputs()] == ["logits", "kept"]
    longest = [5] * model.config.max_tokens
    sequences = [[5], [5, 6], longest, *random_sequences(200, seed=2, longest=model.config.max_tokens)]
    dropped = 0
    for texts in (sequences[:50], *([ids] for ids in sequences)):  # together, and one by one
        batch = a_batch(texts, reads_segments="token_type_ids" in graph.names)
        expected, answers = model(batch), graph(batch)
        torch.testing.assert_close(answers.logits, expected.logits, atol=1e-5, rtol=0)
        assert answers.kept.tolist() == expected.kept.tolist()
        dropped += int((batch.lengths - answers.kept[-2]).sum())
    assert (dropped > 0) == (prune_mode is not None)


def test_halves_of_tokens_are_rounded_as_in_the_model(tmp_path):
    """Top-k keeps round(n · rate) tokens, halves to even: rates in float32 would round others."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = a_model("sequence", "topk", keep_rates=[0.9, 0.7, 0.3, 0.1, 0.1])
    export_model(model, tmp_path / "m.onnx")
    graph = OnnxModel(model.config, tmp_path / "m.onnx", [0, 1, 2])
    for n in range(1, model.config.max_tokens + 1):
        batch = a_batch([[5] * n])
        assert graph(batch).kept.tolist() == model(batch).kept.tolist()


def test_a_large_model_is_one_file(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)  # of bytes
    export_model(small_model(), tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    with torch.device("meta"):  # without memory
        huge = Model(replace(small_model().config, vocab_size=2**25))
    with pytest.raises(InputError, match="take 4.0 GB, and one ONNX file holds at most 2 GB"):
        export_model(huge, tmp_path / "huge.onnx")


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
    names = Traceable(model).input_names
    for texts in (random_sequences(6, seed=2), random_sequences(1, seed=5)):
        _, kept, *inside = session.run(None, padded_inputs(a_batch(texts), names))
        tokens = {x.shape[-2] for x in inside if x.ndim >= 2 and x.shape[-1] == 47}
        assert tokens == {kept[:, 0].sum(), len(texts)}  # the last layer computes the first tokens only
        assert kept[:, 0].sum() < sum(map(len, texts))
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


def test_int8_rounds_each_token_alike_in_any_batch(tmp_path):
    """The products are those of rounded factors, and a text's do not depend on its neighbours."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = a_model("token", None)
    export_model(model, tmp_path / "m.onnx", int8=True)
    graph = OnnxModel(model.config, tmp_path / "m.onnx", [0, 1, 2])
    assert graph.linear_bits == 8
    sequences = [[5], [5, 6], *random_sequences(20, seed=2)]
    together = graph(a_batch(sequences)).logits
    alone = torch.cat([graph(a_batch([ids])).logits for ids in sequences])
    # A factor half-way between two steps may go to either, and takes what follows along: most answers are equal.
    assert (together - alone).abs().median() < 1e-5
    for layer in [module for module in model.modules() if isinstance(module, torch.nn.Linear)]:
        layer.weight.copy_(round_rows(layer.weight))
        layer.register_forward_pre_hook(lambda layer, inputs: round_rows(inputs[0]))
    assert (together - model(a_batch(sequences)).logits).abs().median() < 1e-5


def test_int8_leaves_no_linear_layer_in_float(tmp_path):
    """Not even the last layer's, where the first token alone asks: it takes parts of a weight."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    export_model(a_model("sequence", None), tmp_path / "m.onnx", int8=True)
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert "Gemm" not in {node.op_type for node in graph.node}
    matrices = [part.name for part in graph.initializer if len(part.dims) == 2 and part.data_type == 1]
    assert all("embeddings" in name for name in matrices)


def test_int8_leaves_rows_of_zeros_alone(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = a_model("token", None)
    model.layers[0].output_norm.weight.zero_(), model.layers[0].output_norm.bias.zero_()
    model.layers[2].intermediate.weight.zero_(), model.layers[2].intermediate.bias.zero_()
    export_model(model, tmp_path / "m.onnx", int8=True)
    batch = a_batch([[5, 6, 7], [8]])
    answers = OnnxModel(model.config, tmp_path / "m.onnx", [0, 1, 2])(batch)
    torch.testing.assert_close(answers.logits, model(batch).logits, atol=0.1, rtol=0)


def round_rows(x: torch.Tensor) -> torch.Tensor:
    """Rounds each row to 127 steps of its largest value."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale
