"""The packed encoder: against hand-worked values, a masked reference, transformers, and the authors' numbers."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import MODES, random_sequences, small_model
from safetensors.torch import load_file, save_file

from data import InputError, pack
from model import (
    PACKED_TOKENS,
    Config,
    Model,
    Dropout,
    attend,
    attention_groups,
    initialize,
    keep_by_threshold,
    keep_topk,
    last_layer_saving,
    load_model,
    macs,
    save_model,
    sequence_ids,
    sequence_starts,
    soft_mask,
    sum_by_sequence,
    threshold_ladder,
    to_grid,
    topk_counts,
    topk_rates,
)

GOLDEN = Path(os.environ.get("LTP_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))


# ---- the rules, by hand ----


def test_runs_of_sequences():
    lengths = torch.tensor([2, 3, 1])
    assert sequence_starts(lengths).tolist() == [0, 2, 5]
    assert sequence_ids(lengths).tolist() == [0, 0, 1, 1, 1, 2]
    assert sum_by_sequence(torch.tensor([1, 0, 1, 1, 0, 1]), lengths).tolist() == [1, 2, 1]


def test_threshold_ladder_counts_layers_from_one():
    assert torch.allclose(threshold_ladder(0.012, 12)[[2, 5, 8, 11]], torch.tensor([0.003, 0.006, 0.009, 0.012]))


def test_keep_by_threshold_keeps_ties_and_first_tokens():
    importance = torch.tensor([0.0, 0.3, 0.2, 0.1, 0.5])
    protected = torch.arange(len(importance)) % 3 == 0  # the first tokens of two sequences
    keep = keep_by_threshold(importance, torch.tensor(0.2), protected)
    assert keep.tolist() == [True, True, True, True, True]
    assert keep_by_threshold(importance, torch.tensor(0.25), protected).tolist() == [
        True,
        True,
        False,
        True,
        True,
    ]


def test_soft_mask_is_half_at_the_threshold_and_one_at_the_first_token():
    mask = soft_mask(torch.tensor([0.0, 0.02, 0.03]), torch.tensor(0.02), 0.01, torch.tensor([True, False, False]))
    assert torch.allclose(mask, torch.tensor([1.0, 0.5, 1 / (1 + torch.e**-1)]))


def test_keep_topk_by_hand():
    #                          first sequence        | second
    importance = torch.tensor([0.0, 0.9, 0.1, 0.5, 0.5, 0.2, 0.8, 0.7])
    keep = keep_topk(importance, torch.tensor([5, 3]), torch.tensor([3, 2]), torch.arange(8) % 5 == 0)
    assert keep.tolist() == [True, True, False, True, False, True, True, False]  # of the equal 0.5 the left one


def test_topk_schedule():
    assert topk_rates(0.2, 7) == pytest.approx([1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert topk_rates(-1.0, 5) == pytest.approx([1, 1, 1, 0, 0])
    assert topk_rates(0.5, 24)[:5] == pytest.approx([1, 1, 1, 1, 1 - 0.5 / 20])  # 15% of 24 layers is more than 3
    assert topk_counts(torch.tensor([90, 22, 9, 3]), 0.75).tolist() == [68, 16, 7, 2]  # halves to even
    assert topk_counts(torch.tensor([9]), 0.0).tolist() == [1]


def test_macs_by_hand():
    config = Config(10, 2, 2, 1, 3, 20)
    # D = 2, F = 3: layer 1: 16·5 + 4·25 + 12·4 = 228; layer 2: 16·4 + 4·16 + 12·1 = 140
    assert macs(config, torch.tensor([5]), torch.tensor([[4], [1]])).tolist() == [368]


def test_the_last_layers_saving_by_hand():
    config = Config(10, 2, 2, 1, 3, 20)  # D = 2, F = 3
    # Counted: 16·4 + 4·16 + 12·2 = 152. Done: keys and values 8·4, one query, one output 4 + 4, their products with 4
    # tokens 2·2·4, one feed-forward 12: 68.
    assert last_layer_saving(config, torch.tensor([4]), torch.tensor([2])).tolist() == [152 - 68]


def test_attention_groups_cover_all_sequences_within_limits():
    assert attention_groups([5, 5, 6, 30, 2], 1000, 30) == [[5, 5, 6], [30], [2]]
    assert attention_groups([50, 50], 100, 10) == [[50], [50]]
    assert attention_groups([3, 9, 1], 10**9, float("inf")) == [[3, 9, 1]]


def test_grid_is_a_view_without_padding():
    x = torch.arange(12.0).view(6, 2)
    grid, alive, index = to_grid(x, [3, 3])
    assert alive is None and index is None and grid.data_ptr() == x.data_ptr()
    grid, alive, index = to_grid(x, [2, 4])
    assert alive.tolist() == [[True, True, False, False], [True] * 4] and index.tolist() == [0, 1, 4, 5, 6, 7]
    assert torch.equal(grid.view(8, 2)[index], x)


def test_received_attention_sums_over_heads_and_alive_queries():
    query = key = value = torch.zeros(1, 2, 3, 4)  # uniform attention over the two alive keys
    alive = torch.tensor([[True, True, False]])
    _, received = attend(query, key, value, alive, None, Dropout(0.0), True, False, 100)
    assert received.tolist() == [[2.0, 2.0, 0.0]]  # 2 heads · 2 queries · 1/2


def test_presence_counts_whether_scores_are_asked_for_or_not():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 5, 4).unbind()
    presence = torch.rand(2, 5)
    scored, plain = (attend(query, key, value, None, presence, Dropout(0.0), s, False, 100)[0] for s in (True, False))
    torch.testing.assert_close(plain, scored)
    assert (plain - attend(query, key, value, None, None, Dropout(0.0), False, False, 100)[0]).abs().max() > 0.01


def test_dropout_does_not_touch_the_scores():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, 4).unbind()
    with_dropout, without = (
        attend(query, key, value, None, None, Dropout(rate), True, False, 100)[1] for rate in (0.5, 0.0)
    )
    torch.testing.assert_close(with_dropout, without)


def test_dropout_zeroes_the_share_it_says_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(1001, 333, requires_grad=True)
    dropped = Dropout(0.3)(x)
    dropped.sum().backward()
    assert set(dropped.unique().tolist()) == {0.0, x.new_tensor(1 / 0.7).item()}
    assert (dropped == 0).float().mean() == pytest.approx(0.3, abs=0.003)
    assert torch.equal(x.grad, dropped)
    assert torch.equal(Dropout(0.3).eval()(x), x)
    assert not Dropout(1.0)(x).any()


@pytest.mark.parametrize("cls_only", [False, True])
@pytest.mark.parametrize(
    "area", [1, 15, 30, 31, 1000]
)  # 2 sequences of at most 5 tokens: one to five queries at a time
def test_attention_in_blocks_of_queries_equals_the_whole(area, cls_only):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 5, 4).unbind()
    alive = torch.tensor([[True] * 5, [True, True, True, False, False]])
    whole = F.scaled_dot_product_attention(query, key, value, alive[:, None, None])
    probs = (query @ key.mT / 2).masked_fill(~alive[:, None, None], -torch.inf).softmax(-1)
    context, received = attend(query, key, value, alive, None, Dropout(0.0), True, cls_only, area)
    torch.testing.assert_close(context, whole[:, :, :1] if cls_only else whole)
    torch.testing.assert_close(received, (probs * alive[:, None, :, None]).sum((1, 2)))


# ---- packed = masked, whatever the batch ----


@pytest.mark.parametrize("score_norm", ["max_length", "length"])
@pytest.mark.parametrize("mode", MODES)
def test_packed_equals_a_masked_padded_forward(mode, score_norm):
    model = small_model(score_norm=score_norm, token_keep_rate=0.3)
    model.thresholds.data = threshold_ladder(0.01 if score_norm == "max_length" else 0.02, 5)
    sequences = random_sequences(9)
    with torch.inference_mode():
        output = model(*pack(sequences), pruning=mode, **MODES[mode])
        logits, kept, mask_sum = reference.forward(model, sequences, mode, **MODES[mode])
    torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.kept, kept, atol=1e-4 if mode == "soft" else 0, rtol=0)
    if mode in ("hard", "topk"):  # the test means nothing if nothing is dropped
        assert kept[-1].sum() < 0.6 * sum(map(len, sequences))
    if mode == "soft":
        assert float(output.soft_mask_sum) == pytest.approx(float(mask_sum), rel=1e-5)


def test_masks_on_attention_equal_the_masked_forward_and_go_over_into_dropping():
    model = small_model().double()
    model.thresholds.data = threshold_ladder(0.01, 5).double()
    model.thresholds.requires_grad_(True)
    sequences, soft = random_sequences(7), {"temperature": 1e-3, "mask_attention": True}
    output = model(*pack(sequences), pruning="soft", **soft)
    logits, kept, mask_sum = reference.forward(model, sequences, "soft", **soft)
    torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.kept.double(), kept.double(), atol=1e-3, rtol=0)
    found, expected = (
        torch.autograd.grad(value.square().sum(), [model.thresholds, model.embeddings.word.weight], retain_graph=True)
        for value in (output.logits, logits)
    )
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        hard = model(*pack(sequences), pruning="hard")
        sharp = model(*pack(sequences), pruning="soft", temperature=1e-9, mask_attention=True)
        on_output = model(*pack(sequences), pruning="soft", temperature=1e-9)
    torch.testing.assert_close(sharp.logits, hard.logits, atol=1e-3, rtol=0)  # presence is at least 1e-6
    assert (on_output.logits - hard.logits).abs().max() > 0.01  # zeroed tokens are still attended to


@pytest.mark.parametrize("mode", MODES)
def test_a_result_does_not_depend_on_its_batch(model, mode):
    sequences = random_sequences(64, seed=3)
    order = sorted(range(64), key=lambda i: len(sequences[i]))
    with torch.inference_mode():
        alone = [model(*pack([s]), pruning=mode, **MODES[mode]) for s in sequences]
        together = model(*pack(sequences), pruning=mode, **MODES[mode])
        sorted_ = model(*pack([sequences[i] for i in order]), pruning=mode, **MODES[mode])
    single = torch.cat([output.logits for output in alone])
    torch.testing.assert_close(together.logits, single, atol=1e-5, rtol=0)
    torch.testing.assert_close(sorted_.logits, single[order], atol=1e-5, rtol=0)
    kept = torch.cat([output.kept for output in alone], 1)
    torch.testing.assert_close(together.kept, kept, atol=1e-3 if mode == "soft" else 0, rtol=0)


@pytest.mark.parametrize("mode", ["none", "hard", "topk"])
def test_packed_weights_change_nothing(model, mode):
    sizes = [5, 9, 3] * 2 + [PACKED_TOKENS - 30]  # above the limit at first; below it alone, or once pruned
    sequences = [[5 + i % 50 for i in range(n)] for n in sizes]
    with torch.inference_mode():
        batches = [pack(sequences), *(pack([s]) for s in sequences)]
        plain = [model(*batch, pruning=mode) for batch in batches]
        used = []
        model.pack().layers[0].intermediate.register_forward_pre_hook(lambda layer, x: used.append(layer.packed))
        for batch, expected in zip(batches, plain):
            output = model(*batch, pruning=mode)
            assert torch.equal(output.kept, expected.kept)
            torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert all(packed is not None for packed in used)
    assert not any("packed" in name for name in model.state_dict())
    model.train()
    assert model.layers[0].intermediate.packed is None


def test_bf16_has_no_use_for_packed_weights(model):
    batch = pack([[0, 7, 9, 2], [0, 2]])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        plain = model(*batch).logits
        assert torch.equal(model.pack()(*batch).logits, plain)


@pytest.mark.parametrize("limits", [(2**24, float("inf")), (40_000, 500), (0, 0)])
def test_how_attention_is_grouped_changes_nothing(model, limits, monkeypatch):
    batch = pack(random_sequences(12, seed=5))
    with torch.inference_mode():
        usual = model(*batch, pruning="hard")
        monkeypatch.setattr("model.attention_groups", lambda sizes, *_: attention_groups(sizes, *limits))
        other = model(*batch, pruning="hard")
    torch.testing.assert_close(other.logits, usual.logits, atol=1e-5, rtol=0)
    assert torch.equal(other.kept, usual.kept)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_equal_the_masked_forwards(mode):
    model = small_model(token_keep_rate=0.3).double()
    model.thresholds.data = threshold_ladder(0.01, 5).double()
    model.thresholds.requires_grad_(True)
    sequences = random_sequences(5, seed=1, longest=30)
    output = model(*pack(sequences), pruning=mode, **MODES[mode])
    (output.logits.square().sum() + (output.soft_mask_sum if mode == "soft" else 0)).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits, _, mask_sum = reference.forward(model, sequences, mode, **MODES[mode])
    (logits.square().sum() + mask_sum).backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() and ("thresholds" in ours) == (mode == "soft")
    for name in ours:
        torch.testing.assert_close(
            ours[name].float(), theirs[name].float(), atol=1e-4, rtol=1e-3, msg=lambda m: f"{name}: {m}"
        )


def test_threshold_zero_is_the_dense_model(model):
    batch = pack(random_sequences(7))
    with torch.inference_mode():
        dense = model(*batch, pruning="none")
        model.thresholds.data.zero_()
        hard = model(*batch, pruning="hard")
    assert torch.equal(hard.kept, dense.kept)
    torch.testing.assert_close(hard.logits, dense.logits, atol=1e-6, rtol=0)


def test_an_impossible_threshold_leaves_the_first_token(model):
    model.thresholds.data.fill_(1.0)
    with torch.inference_mode():
        output = model(*pack(random_sequences(7)), pruning="hard")
    assert (output.kept == 1).all() and output.logits.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_the_last_layers_saving_is_exact(model, mode):
    batch = pack(random_sequences(11))
    with torch.inference_mode():
        saving = model(*batch, pruning=mode, **MODES[mode])
        full = model(*batch, pruning=mode, **MODES[mode], per_token=True, trace=True)
    torch.testing.assert_close(saving.logits, full.logits, atol=1e-5, rtol=0)
    assert torch.equal(saving.kept, full.kept)
    if mode != "soft":
        for l, layer in enumerate(full.trace):
            assert int(layer.keep.sum()) == int(full.kept[l].sum())


@pytest.mark.parametrize("mode", ["none", "hard", "topk"])
def test_logits_are_the_same_without_the_count(model, mode):
    batch = pack(random_sequences(11))
    with torch.inference_mode():
        counted, plain = (model(*batch, pruning=mode, count=count) for count in (True, False))
    torch.testing.assert_close(plain.logits, counted.logits, atol=1e-6, rtol=0)
    assert plain.kept is None


def test_a_pruned_token_keeps_the_state_it_was_dropped_with(model):
    sequences = random_sequences(6)
    batch = pack(sequences)
    states = []
    for layer in model.layers:
        layer.attention_norm.register_forward_hook(lambda module, args, out: states.append(out))
    with torch.inference_mode():
        output = model(*batch, pruning="hard", per_token=True, trace=True)
    assert output.hidden.shape == (len(batch.token_ids), 30)
    dropped = 0
    for state, layer in zip(states, output.trace):
        gone = layer.tokens[~layer.keep]
        assert torch.equal(output.hidden[gone], state[~layer.keep])
        dropped += len(gone)
    assert dropped > 50
    # The head read the first tokens of the same states.
    torch.testing.assert_close(model.head(output.hidden[sequence_starts(batch.lengths)]), output.logits)


def test_pruned_tokens_are_in_no_later_product(model):
    seen = []
    for layer in model.layers:
        layer.attention.query_key_value.register_forward_hook(
            lambda m, args, out: seen.append(("attention", len(args[0])))
        )
        layer.intermediate.register_forward_hook(lambda m, args, out: seen.append(("feed-forward", len(args[0]))))
    model.train()
    sequences = random_sequences(8)
    output = model(*pack(sequences), pruning="hard")
    kept = output.kept.sum(1).tolist()
    entering = [sum(map(len, sequences)), *kept]
    expected = [(kind, n) for i in range(5) for kind, n in (("attention", entering[i]), ("feed-forward", kept[i]))]
    expected[-1] = ("feed-forward", len(sequences))  # the last layer's saving
    assert seen == expected and kept[-1] < 0.8 * entering[0]


# ---- the authors' values ----


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden values are not beside this checkout")
@pytest.mark.parametrize("case", ["case1", "case2", "case3"])
def test_golden_values(case):
    folder = GOLDEN / case
    model = load_model(folder).model
    expected, inputs = load_file(folder / "expected.safetensors"), load_file(folder / "inputs.safetensors")
    temperature = json.loads((folder / "meta.json").read_text())["temperature"]
    model.thresholds.data = expected["thresholds"]
    real = inputs["attention_mask"].bool()
    lengths = real.sum(1)
    batch = pack([ids[mask].tolist() for ids, mask in zip(inputs["input_ids"], real)])
    with torch.inference_mode():
        for mode, name in (
            ("none", "dense_logits"),
            ("hard", "hard_logits"),
            ("topk", "topk_logits"),
            ("soft", "soft_logits_cls_kept"),
        ):
            output = model(*batch, pruning=mode, temperature=temperature, trace=True)
            torch.testing.assert_close(output.logits, expected[name], atol=1e-4, rtol=0)
            plain = model(*batch, pruning=mode, temperature=temperature)
            torch.testing.assert_close(plain.logits, expected[name], atol=1e-4, rtol=0)
            if mode in ("hard", "topk"):
                assert torch.equal(output.kept, expected[f"{mode}_kept_ffn"])
                assert torch.equal(plain.kept, expected[f"{mode}_kept_ffn"])
                for l, layer in enumerate(output.trace):
                    mask = torch.zeros(int(lengths.sum()), dtype=torch.bool)
                    mask[layer.tokens[layer.keep]] = True
                    assert torch.equal(mask, expected[f"{mode}_keep_mask"][l][real])
            if mode == "hard":
                for l, layer in enumerate(output.trace):
                    scores = torch.zeros(int(lengths.sum()))
                    scores[layer.tokens] = layer.importance
                    torch.testing.assert_close(scores, expected["hard_scores"][l][real], atol=1e-4, rtol=0)
                assert torch.equal(macs(model.config, lengths, output.kept), expected["macs_general"])
            if mode == "none":
                assert torch.equal(macs(model.config, lengths, output.kept), expected["baseline_macs_general"])
    assert topk_rates(model.config.token_keep_rate, model.config.num_hidden_layers) == pytest.approx(
        expected["topk_keep_rates"].tolist()
    )


# ---- transformers ----

KINDS = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert", "ibert": "IBert", "bert": "Bert"}
SIZES = dict(
    vocab_size=101,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=37,
    max_position_embeddings=60,
    num_labels=3,
    initializer_range=0.3,
)


def hugging_face(kind: str, folder: Path, **changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{KINDS[kind]}Config")(**SIZES | changes)
    model = getattr(transformers, f"{KINDS[kind]}ForSequenceClassification")(config).eval()
    for parameter in model.parameters():  # biases and norms too, so that a swapped one shows
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


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
        logits = ours(*pack(sequences)).logits
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


def test_segments_and_regression(tmp_path):
    theirs = hugging_face("bert", tmp_path, num_labels=1)
    ours = load_model(tmp_path).model
    with torch.inference_mode():
        expected = theirs(torch.tensor([[5, 6, 7, 8]]), token_type_ids=torch.tensor([[0, 0, 1, 1]])).logits
        torch.testing.assert_close(ours(*pack([[5, 6, 7, 8]], [[0, 0, 1, 1]])).logits, expected, atol=1e-4, rtol=0)


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


def test_sharded_and_pickled_folders(tmp_path):
    theirs = hugging_face("roberta", tmp_path / "one")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "config.json").write_bytes((tmp_path / "one" / "config.json").read_bytes())
    torch.save(theirs.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    one = load_model(tmp_path / "one").model.state_dict()
    for name in ("shards", "pickle"):
        other = load_model(tmp_path / name).model.state_dict()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_pickle_cannot_run_code(tmp_path):
    class Bad:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    hugging_face("roberta", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"x": Bad()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin: damaged"):
        load_model(tmp_path)
    assert not (tmp_path / "ran").exists()


# ---- saving and refusing ----


def test_saving_gives_back_everything(model, tmp_path):
    model.config = replace(model.config, prune_mode="absolute_threshold", other={"my_key": [1, 2]})
    save_model(tmp_path, model)
    again = load_model(tmp_path)
    assert again.has_thresholds
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.model.state_dict().values()))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["my_key"] == [1, 2] and written["prune_mode"] == "absolute_threshold"
    assert again.model.pruning == "hard" and sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_new_head_when_the_number_of_classes_changes(model, tmp_path):
    save_model(tmp_path, model)
    loaded = load_model(tmp_path, labels=("p", "q"), new_head=True)
    assert "the folder's has 3 outputs" in loaded.notes[0] and loaded.model.head.output.out_features == 2
    assert "for a, b, c now stands for x, y, z" in load_model(tmp_path, labels=("x", "y", "z")).notes[0]
    assert not load_model(tmp_path, labels=("a", "b", "c")).notes
    with pytest.raises(InputError, match="has 3 outputs, not 2; fine-tune this model"):
        load_model(tmp_path, labels=("p", "q"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2'"),
        ({"quant_mode": True}, "quant_mode"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_act": "silu"}, "hidden_act"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 31}, "hidden_size = 31"),
        ({"vocab_size": "83"}, "vocab_size"),
        ({"prune_mode": "other"}, "prune_mode"),
        ({"score_norm": "sum"}, "score_norm"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob"),
        ({"token_keep_rate": 2}, "token_keep_rate"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label"),
        ({"final_token_threshold": "x"}, "final_token_threshold"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"layer_norm_eps": -1}, "layer_norm_eps"),
    ],
)
def test_refused_configurations_name_file_and_key(model, tmp_path, change, message):
    save_model(tmp_path, model)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=f"config.json.*{message}"):
        load_model(tmp_path)


def test_missing_keys_files_and_damaged_ones(model, tmp_path):
    with pytest.raises(InputError, match="no such model folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(InputError, match="config.json: not found"):
        load_model(tmp_path)
    save_model(tmp_path, model)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    whole = json.loads(config.read_text())
    config.write_text(json.dumps({k: v for k, v in whole.items() if k != "vocab_size"}))
    with pytest.raises(InputError, match="the key vocab_size is missing"):
        load_model(tmp_path)
    for text, message in (("{", "not readable as JSON"), ("[]", "expected a JSON object")):
        config.write_text(text)
        with pytest.raises(InputError, match=message):
            load_model(tmp_path)
    config.write_text(json.dumps(whole))
    content = weights.read_bytes()
    for damaged in (content[: len(content) // 2], b"", content[:7], b"\xff" * 100):
        weights.write_bytes(damaged)
        with pytest.raises(InputError, match="model.safetensors: damaged"):
            load_model(tmp_path)
    weights.unlink()
    with pytest.raises(InputError, match="no weights"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "edit, message",
    [
        (
            lambda t: t.pop("roberta.encoder.layer.2.attention.self.key.bias"),
            "layer.2.attention.self.key.bias is missing",
        ),
        (lambda t: t.update({"roberta.encoder.layer.9.extra": torch.zeros(2)}), "layer.9.extra is not part"),
        (
            lambda t: t.update({"classifier.dense.weight": torch.zeros(30, 29)}),
            r"classifier.dense.weight has shape \(30, 29\)",
        ),
        (lambda t: t.update({"ltp.thresholds": torch.zeros(4)}), r"ltp.thresholds has shape \(4,\)"),
        (lambda t: t["ltp.thresholds"].fill_(float("nan")), "ltp.thresholds holds values that are not finite"),
    ],
)
def test_wrong_tensors_are_named(model, tmp_path, edit, message):
    model.config = replace(model.config, prune_mode="absolute_threshold")
    save_model(tmp_path, model)
    tensors = load_file(tmp_path / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        load_model(tmp_path)


def test_training_from_scratch_is_reproducible():
    def weights():
        torch.manual_seed(5)
        model = Model(Config(50, 16, 1, 2, 20, 30))
        initialize(model, 0.02)
        return model.state_dict()

    assert all(torch.equal(a, b) for a, b in zip(weights().values(), weights().values()))
