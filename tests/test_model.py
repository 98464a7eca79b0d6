"""The packed forward pass: against a masked, padded one, against itself in other batches, and its gradients."""

import doctest
import math
import re
import textwrap
from itertools import pairwise
from pathlib import Path

import pytest
import reference
import torch
from small_models import MODES, EverySecond, all_states, make_pruner, pruning_model, random_sequences

import model as model_module
from model import (
    Config,
    Dense,
    Hard,
    Model,
    Pruner,
    Sequences,
    Soft,
    TopK,
    UnscoredLastLayer,
    initialize,
    macs,
    pack,
    threshold_ladder,
)

RULES = (*MODES, "second")


def pruner_of(model: Model, rule: str, temperature: float = 3e-4) -> Pruner:
    return EverySecond() if rule == "second" else make_pruner(model, rule, temperature)


def test_the_examples_in_docstrings():
    result = doctest.testmod(model_module)
    assert result.attempted >= 3 and not result.failed


def test_the_pruner_of_the_contributors_page():
    page = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = dict(vars(model_module))
    exec(textwrap.dedent(code), names)
    model, sequences = pruning_model(head="token"), random_sequences(9)
    pruner = names["Coins"](0.8, len(model.layers), model.config.max_tokens)
    with torch.inference_mode():
        together = model(pack(sequences), pruner)
        alone = [model(pack([sequence]), pruner).logits for sequence in sequences]
    torch.testing.assert_close(together.logits, torch.cat(alone), atol=1e-5, rtol=0)
    assert (together.kept >= 1).all() and together.kept[-1].sum() < 0.6 * sum(map(len, sequences))


# ---- packed = masked, whatever the batch ----


@pytest.mark.parametrize("score_norm", ["max_length", "length"])
@pytest.mark.parametrize("head", ["sequence", "token", "span"])
@pytest.mark.parametrize("rule", RULES)
def test_packed_equals_a_masked_padded_forward(rule, head, score_norm):
    model, sequences = pruning_model(score_norm=score_norm, head=head), random_sequences(9)
    with torch.inference_mode():
        output = model(pack(sequences), pruner_of(model, rule))
        logits, kept, mask_sum = reference.forward(model, sequences, rule)
    torch.testing.assert_close(output.logits, logits, atol=1e-5 if head == "sequence" else 1e-4, rtol=1e-5)
    torch.testing.assert_close(output.kept, kept, atol=1e-4 if rule.startswith("soft") else 0, rtol=0)
    if rule != "dense":  # the test means nothing if nothing is dropped
        assert kept[-1].sum() < 0.6 * sum(map(len, sequences))
    if rule.startswith("soft"):
        sums = sum(step.decision.mask.sum() for step in output.steps)
        assert float(sums) == pytest.approx(float(mask_sum), rel=1e-5)


@pytest.mark.parametrize("head", ["sequence", "token"])
@pytest.mark.parametrize("rule", RULES)
def test_a_result_does_not_depend_on_its_batch(rule, head):
    model, sequences = pruning_model(head=head), random_sequences(64, seed=3)
    order = sorted(range(64), key=lambda i: len(sequences[i]))
    pruner = pruner_of(model, rule)
    with torch.inference_mode():
        alone = [model(pack([s]), pruner) for s in sequences]
        together = model(pack(sequences), pruner)
        by_length = model(pack([sequences[i] for i in order]), pruner)
    torch.testing.assert_close(together.logits, torch.cat([o.logits for o in alone]), atol=1e-5, rtol=0)
    torch.testing.assert_close(by_length.logits, torch.cat([alone[i].logits for i in order]), atol=1e-5, rtol=0)
    kept = torch.cat([output.kept for output in alone], 1)
    torch.testing.assert_close(together.kept, kept, atol=1e-3 if rule.startswith("soft") else 0, rtol=0)


def layout(max_area: float, max_padding: float) -> type[Sequences]:
    """A layout with other limits of its grids, which the layouts of survivors share."""

    class Limited(Sequences):
        CPU_LIMITS = (max_area, max_padding)

    return Limited


@pytest.mark.parametrize("limits", [(2**24, math.inf), (0, 0), (1, math.inf), (150, 20), (1000, 100)])
@pytest.mark.parametrize("rule", MODES)
@pytest.mark.parametrize("head", ["sequence", "token"])
def test_how_attention_is_grouped_changes_nothing(head, rule, limits):
    """The smaller limits also let a few queries attend at a time."""
    model, batch = pruning_model(head=head), pack(random_sequences(12, seed=5, longest=40))
    pruner = pruner_of(model, rule)
    with torch.inference_mode():
        usual, other = model(batch, pruner), model(batch, pruner, layout=layout(*limits))
    torch.testing.assert_close(other.logits, usual.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(other.kept, usual.kept, atol=1e-4 if rule.startswith("soft") else 0, rtol=0)


@pytest.mark.parametrize("head", ["sequence", "token"])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_equal_the_masked_forwards(rule, head):
    model = pruning_model(head=head).double()
    model.thresholds.requires_grad_(True)
    sequences, temperature = random_sequences(5, seed=1, longest=30), 1e-3  # attention's softmax is in float32
    output = model(pack(sequences), pruner_of(model, rule, temperature))
    mask_sum = sum(step.decision.mask.sum() for step in output.steps) if rule.startswith("soft") else 0
    (output.logits.square().sum() + mask_sum).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits, _, mask_sum = reference.forward(model, sequences, rule, temperature)
    (logits.square().sum() + mask_sum).backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() and ("thresholds" in ours) == rule.startswith("soft")
    for name in ours:
        torch.testing.assert_close(
            ours[name].float(), theirs[name].float(), atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("rule", ["dense", "hard", "topk"])
def test_the_key_bias_has_no_gradient_and_its_neighbours_have(rule):
    """Softmax does not see what adds the same to all keys. A swap of query, key and value would show here."""
    model = pruning_model()
    model(pack(random_sequences(6)), pruner_of(model, rule)).logits.square().sum().backward()
    for layer in model.layers:
        query, key, value = (part.abs().max() for part in layer.attention.query_key_value.bias.grad.chunk(3))
        assert key < 1e-5 and query > 1e-3 and value > 1e-2


# ---- thresholds ----


def test_threshold_zero_is_the_dense_model(model):
    batch = pack(random_sequences(7))
    with torch.inference_mode():
        dense = model(batch, Dense())
        model.thresholds.data.zero_()
        hard = model(batch, Hard(model.thresholds))
    assert torch.equal(hard.kept, dense.kept)
    torch.testing.assert_close(hard.logits, dense.logits, atol=1e-6, rtol=0)
    assert all(step.scores is None for step in hard.steps)  # no score is computed where none can be too low


def test_a_tiny_threshold_scores_and_drops_nothing(model):
    batch = pack(random_sequences(7))
    model.thresholds.data.fill_(1e-30)
    with torch.inference_mode():
        dense, hard = model(batch, Dense()), model(batch, Hard(model.thresholds))
    assert torch.equal(hard.kept, dense.kept) and all(step.scores is not None for step in hard.steps)
    torch.testing.assert_close(hard.logits, dense.logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("head", ["sequence", "token"])
def test_an_impossible_threshold_leaves_the_first_token(head, training):
    model, sequences = pruning_model(head=head).train(training), random_sequences(7)
    model.thresholds.data.fill_(1.0)
    with torch.inference_mode():
        output = model(pack(sequences), Hard(model.thresholds))
        logits, kept, _ = reference.forward(model, sequences, "hard")
    assert (kept == 1).all() and torch.equal(output.kept, kept)
    torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("score_norm", ["max_length", "length"])
@pytest.mark.parametrize("head", ["sequence", "token"])
@pytest.mark.parametrize("rule", RULES)
def test_sequences_of_one_token(rule, head, score_norm, training):
    model = pruning_model(head=head, score_norm=score_norm).train(training)
    sequences = [[5], [17], [5], [80]]
    with torch.inference_mode():
        output = model(pack(sequences), pruner_of(model, rule))
        logits, kept, _ = reference.forward(model, sequences, rule)
    torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.kept, kept)
    scores = [step.scores for step in output.steps if step.scores is not None]
    N = 1 if score_norm == "length" else model.config.max_seq_length
    assert all(torch.equal(score, torch.full((4,), 1 / N)) for score in scores)


def test_soft_masks_of_one_and_zero(model):
    """A mask of 1 everywhere is the dense model. A token with mask 0 stays in attention, unless the masks act there."""
    batch = pack(random_sequences(7))
    with torch.inference_mode():
        dense, hard = model(batch, Dense()), model(batch, Hard(model.thresholds))
        ones, present = (model(batch, Soft(torch.full((5,), -1.0), 1e-3, choice)) for choice in (False, True))
        sharp = model(batch, Soft(model.thresholds, 1e-9))
    for output in (ones, present):
        torch.testing.assert_close(output.logits, dense.logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(output.kept, dense.kept.float())
    torch.testing.assert_close(sharp.kept[0], hard.kept[0].float())
    assert (sharp.logits - hard.logits).abs().max() > 0.01


@pytest.mark.parametrize("head", ["sequence", "token", "span"])
def test_a_sharp_mask_on_attention_is_hard_pruning(head):
    """To attend to nothing of a token is to drop it, also in the layers after; a state of 0 is still attended to."""
    model, batch = pruning_model(head=head), pack(random_sequences(7))
    with torch.inference_mode():
        hard = model(batch, Hard(model.thresholds))
        on_attention, on_output = (model(batch, Soft(model.thresholds, 1e-9, choice)) for choice in (True, False))
    assert hard.kept[-1].sum() < 0.6 * len(batch.token_ids)
    torch.testing.assert_close(on_attention.logits, hard.logits, atol=1e-3, rtol=0)  # presence is at least 1e-6
    torch.testing.assert_close(on_attention.kept, hard.kept.float(), atol=1e-3, rtol=0)
    assert (on_output.logits - hard.logits).abs().max() > 0.01


def test_the_configuration_names_the_pruner(model):
    batch = pack(random_sequences(7))
    for prune_mode, rule in ((None, "dense"), ("absolute_threshold", "hard"), ("topk", "topk")):
        named = pruning_model(prune_mode=prune_mode)
        assert type(named.pruner()) is type(make_pruner(model, rule))
        with torch.inference_mode():
            default, expected = named(batch), model(batch, make_pruner(model, rule))
        assert torch.equal(default.logits, expected.logits) and torch.equal(default.kept, expected.kept)


def test_fewer_tokens_are_fewer_macs(model):
    batch = pack(random_sequences(7))
    with torch.inference_mode():
        dense, hard = (model(batch, make_pruner(model, rule)).kept for rule in ("dense", "hard"))
    full, pruned = macs(model.config, batch.lengths, dense), macs(model.config, batch.lengths, hard)
    assert torch.equal(full, macs(model.config, batch.lengths, batch.lengths.expand(5, -1)))
    assert pruned.sum() < 0.8 * full.sum() and (pruned <= full).all()


# ---- what is computed ----


@pytest.mark.parametrize("rule", RULES)
def test_the_last_layers_saving_is_exact(model, rule):
    """A classifier's last layer works on first tokens alone: the answer and the counts are those of the whole layer."""
    batch = pack(random_sequences(11))
    pruner = pruner_of(model, rule)
    with torch.inference_mode():
        saving, full = model(batch, pruner), all_states(model)(batch, pruner)
        logits = model.head(full.logits[Sequences(batch.lengths).starts])
    torch.testing.assert_close(saving.logits, logits, atol=1e-5, rtol=0)
    assert torch.equal(saving.kept, full.kept)
    for step in full.steps:
        if step.decision.keep is not None:
            assert torch.equal(step.decision.keep.sum(), step.decision.counts.sum())


@pytest.mark.parametrize("prune_mode", ["absolute_threshold", "topk"])
def test_logits_are_the_same_without_the_last_count(prune_mode):
    model, batch = pruning_model(prune_mode=prune_mode), pack(random_sequences(11))
    with torch.inference_mode():
        counted, plain = model(batch), model(batch, UnscoredLastLayer(model))
    torch.testing.assert_close(plain.logits, counted.logits, atol=1e-6, rtol=0)
    assert plain.steps[-1].scores is None and counted.steps[-1].scores is not None
    assert torch.equal(plain.kept[:-1], counted.kept[:-1])
    # Thresholds count nothing without scores; top-k's counts are known without them.
    last = plain.kept[-2] if prune_mode == "absolute_threshold" else counted.kept[-1]
    assert torch.equal(plain.kept[-1], last) and counted.kept[-1].sum() < plain.kept[-2].sum()


@pytest.mark.parametrize("rule", ["hard", "topk", "second"])
def test_pruned_tokens_are_in_no_later_product(model, rule):
    rows = []
    for layer in model.layers:
        layer.attention.query_key_value.register_forward_hook(
            lambda m, args, out: rows.append(("attention", len(args[0])))
        )
        layer.intermediate.register_forward_hook(lambda m, args, out: rows.append(("feed-forward", len(args[0]))))
    model.train()
    sequences = random_sequences(8)
    output = model(pack(sequences), pruner_of(model, rule))
    kept = output.kept.sum(1).tolist()
    entering = [sum(map(len, sequences)), *kept]
    expected = [(kind, n) for pair in zip(entering, kept) for kind, n in zip(("attention", "feed-forward"), pair)]
    expected[-1] = ("feed-forward", len(sequences))  # a classifier's last layer
    if rule == "second":  # without scores, keys and values there come from a part of the fused product
        del expected[-2]
    assert rows == expected and kept[-1] < 0.8 * entering[0]


@pytest.mark.parametrize("rule", MODES)
def test_each_layer_sees_the_survivors_of_the_one_before(model, rule):
    batch = pack(random_sequences(8))
    with torch.inference_mode():
        steps = model(batch, make_pruner(model, rule)).steps
    assert steps[0].tokens.tolist() == list(range(len(batch.token_ids)))
    for before, after in pairwise(steps):
        keep = before.decision.keep
        assert torch.equal(after.tokens, before.tokens if keep is None else before.tokens[keep])


def test_dropout_does_not_touch_the_scores():
    batch = pack(random_sequences(6))
    model = pruning_model(attention_probs_dropout_prob=0.5)
    pruner = Hard(model.thresholds)
    with torch.inference_mode():
        exact, noisy = model.eval()(batch, pruner), model.train()(batch, pruner)
    torch.testing.assert_close(noisy.steps[0].scores, exact.steps[0].scores)
    assert (noisy.logits - exact.logits).abs().max() > 0.01


@pytest.mark.parametrize("rule", MODES)
def test_attention_with_and_without_written_probabilities(rule):
    """Training with dropout writes the probabilities down. A rate that drops nothing shows that they are the same."""
    model, batch = pruning_model(), pack(random_sequences(6))
    pruner = make_pruner(model, rule)
    exact = model(batch, pruner)
    for layer in model.train().layers:
        layer.attention.dropout.p = 1e-30
    torch.testing.assert_close(model(batch, pruner).logits, exact.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("head", ["sequence", "token"])
@pytest.mark.parametrize("rule", RULES)
def test_float64(rule, head):
    model, batch = pruning_model(head=head), pack(random_sequences(7))
    with torch.inference_mode():
        single = model(batch, pruner_of(model, rule))
        double = model.double()(batch, pruner_of(model, rule))
    torch.testing.assert_close(double.logits.float(), single.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(double.kept.float(), single.kept.float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("head", ["sequence", "token", "span"])
@pytest.mark.parametrize("rule", RULES)
def test_bf16(rule, head):
    model, batch = pruning_model(head=head), pack(random_sequences(7))
    pruner = pruner_of(model, rule)
    exact = model(batch, pruner).logits.detach()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.train()(batch, pruner).logits
        logits.float().square().sum().backward()
    assert float((logits.detach() - exact).abs().median()) < 0.05 * float(exact.std())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) > 50 and all(gradient.isfinite().all() for gradient in gradients)


def test_training_from_scratch_is_reproducible():
    def weights(seed):
        model = Model(Config(50, 16, 1, 2, 20, 30))
        initialize(model, 0.02, torch.Generator().manual_seed(seed))
        return model.state_dict()

    assert all(torch.equal(a, b) for a, b in zip(weights(5).values(), weights(5).values()))
    assert not all(torch.equal(a, b) for a, b in zip(weights(5).values(), weights(6).values()))
    model = Model(Config(50, 16, 1, 2, 20, 30))
    assert torch.equal(model.thresholds, threshold_ladder(0.01, 1)) and not model.thresholds.requires_grad


def test_topk_with_a_negative_rate_keeps_one_token(model):
    with torch.inference_mode():
        output = model(pack(random_sequences(7)), TopK([1, 1, 1, 0, 0]))
    assert (output.kept[3:] == 1).all() and output.logits.isfinite().all()


@pytest.mark.parametrize("head", ["sequence", "token"])
def test_topk_with_a_rate_that_rises_brings_no_token_back(head):
    model, batch = pruning_model(head=head), pack(random_sequences(7))
    with torch.inference_mode():
        kept = model(batch, TopK([1, 0.5, 0.5, 0.7, 0.9])).kept
    assert kept[1].sum() < 0.6 * batch.lengths.sum() and torch.equal(kept[1:], kept[1].expand(4, -1))
