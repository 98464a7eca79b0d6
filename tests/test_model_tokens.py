"""Heads that read more than the first token: exits of dropped tokens, soft shares, protected questions."""

import pytest
import torch
from small_models import MODES, EverySecond, make_pruner, pruning_model, random_sequences

from model import Batch, Decision, Dense, Hard, Model, Pruner, Sequences, Soft, pack, segment_means, threshold_ladder


@pytest.mark.parametrize("rule", [*MODES, "second"])
@pytest.mark.parametrize("head", ["token", "span"])
def test_every_token_has_an_answer(rule, head):
    model, sequences = pruning_model(head=head), random_sequences(7)
    pruner = EverySecond() if rule == "second" else make_pruner(model, rule)
    with torch.inference_mode():
        output = model(pack(sequences), pruner)
    assert output.logits.shape == (sum(map(len, sequences)), 3) and output.logits.isfinite().all()
    if rule in ("hard", "topk", "second"):
        assert output.kept[-1].sum() < 0.5 * sum(map(len, sequences))


@pytest.mark.parametrize("rule", ["hard", "topk", "second"])
def test_a_pruned_token_keeps_the_state_it_was_dropped_with(rule):
    model, batch = pruning_model(head="token"), pack(random_sequences(6))
    pruner = EverySecond() if rule == "second" else make_pruner(model, rule)
    states, read = [], []
    for layer in model.layers:
        layer.attention_norm.register_forward_hook(lambda module, args, out: states.append(out))
    model.layers[-1].output_norm.register_forward_hook(lambda module, args, out: states.append(out))
    model.head.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.inference_mode():
        steps = model(batch, pruner).steps
    (exits,), dropped = read, 0
    for state, step in zip(states, steps):
        if step.decision.keep is not None:
            gone = ~step.decision.keep
            assert torch.equal(exits[step.tokens[gone]], state[gone])
            dropped += int(gone.sum())
    assert dropped > 50
    assert torch.equal(exits[steps[-1].tokens[steps[-1].decision.keep]], states[-1])


@pytest.mark.parametrize("rule", [*MODES, "second"])
def test_the_shares_of_a_token_sum_to_one_over_the_layers(rule):
    """With all states of all tokens equal, a head reads the sum of the shares times this state."""
    model, batch = pruning_model(head="token"), pack(random_sequences(7))
    state = torch.linspace(-1, 1, 30)
    for layer in model.layers:
        for norm in (layer.attention_norm, layer.output_norm):
            norm.weight.data.zero_()
            norm.bias.data = state.clone()
    with torch.inference_mode():
        scores = model(batch, Hard(model.thresholds)).steps[0].scores
    model.thresholds.data.fill_(float(scores.median()))
    pruner = EverySecond() if rule == "second" else make_pruner(model, rule, temperature=5e-3)
    with torch.inference_mode():
        output = model(batch, pruner)
        expected = model.head(state)
    torch.testing.assert_close(output.logits, expected.expand_as(output.logits), atol=1e-5, rtol=0)
    if rule.startswith("soft"):  # the shares are real shares
        masks = torch.stack([step.decision.mask for step in output.steps])
        assert ((masks > 0.1) & (masks < 0.9)).float().mean() > 0.8
    elif rule != "dense":
        assert output.kept[-1].sum() < 0.8 * len(batch.token_ids)


def test_a_sharp_soft_mask_in_the_last_layer_answers_as_hard_pruning_does():
    model, batch = pruning_model(head="token"), pack(random_sequences(7))
    thresholds = torch.tensor([-1.0, -1, -1, -1, 0.01])
    with torch.inference_mode():
        hard, soft = model(batch, Hard(thresholds)), model(batch, Soft(thresholds, 1e-9))
    assert int(hard.kept[-1].sum()) < 0.8 * len(batch.token_ids)
    torch.testing.assert_close(soft.logits, hard.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(soft.kept, hard.kept.float())


@pytest.mark.parametrize("rule", ["soft", "soft_attention"])
def test_a_token_that_is_nearly_gone_still_moves_the_thresholds(rule):
    model, batch = pruning_model(head="token"), pack(random_sequences(5))
    model.thresholds.requires_grad_(True)
    output = model(batch, make_pruner(model, rule, temperature=5e-4))
    output.logits.sum().backward()
    assert (model.thresholds.grad != 0).all()
    assert min(float(step.decision.mask.detach().min()) for step in output.steps) < 0.01


@pytest.mark.parametrize("rule", ["soft", "soft_attention", "hard", "topk"])
def test_a_protected_question_is_never_pruned(rule):
    sequences = random_sequences(6)
    segments = [[0] * (1 + len(s) // 3) + [1] * (len(s) - 1 - len(s) // 3) for s in sequences]
    question = torch.tensor([s.count(0) for s in segments])
    batch = pack(sequences, segments, question.tolist())
    for protect in (True, False):
        model = pruning_model(head="span", labels=("start", "end"), protect_question=protect, token_keep_rate=-2.0)
        model.thresholds.data = threshold_ladder(0.05, 5)
        pruner = make_pruner(model, rule)
        with torch.inference_mode():
            output = model(batch, pruner)
            alone = [model(pack([s], [g], [int(n)]), pruner).logits for s, g, n in zip(sequences, segments, question)]
        torch.testing.assert_close(output.logits, torch.cat(alone), atol=1e-5, rtol=0)
        if rule.startswith("soft"):
            assert (output.kept[-1] >= question - 1e-3).all() == protect
            continue
        last = output.steps[-1]
        tokens = last.tokens if last.decision.keep is None else last.tokens[last.decision.keep]
        left = torch.zeros(len(batch.token_ids)).index_fill(0, tokens, 1)
        left = Sequences(batch.lengths).sum(left * (batch.segment_ids == 0))
        assert torch.equal(left, question.float()) == protect


def test_other_heads_do_not_protect_questions():
    sequences = random_sequences(6)
    batch = pack(sequences)  # all of segment 0
    kept = [
        model(batch, make_pruner(model, "hard")).kept
        for model in (pruning_model(head="token", protect_question=protect) for protect in (True, False))
    ]
    assert torch.equal(*kept) and kept[0][-1].sum() < sum(map(len, sequences))


def test_a_pruner_may_drop_nothing_in_some_layers():
    class Later(Pruner):
        """Drops in the fourth layer alone."""

        def decide(self, l, scores, alive, seqs):
            keep = alive.protected | (seqs.positions < 3) if l == 3 else torch.ones_like(alive.protected)
            return Decision(seqs.sum(keep), keep)

    for head in ("sequence", "token", "span"):
        model, sequences = pruning_model(head=head), random_sequences(6)
        lengths = torch.tensor([len(s) for s in sequences])
        with torch.inference_mode():
            output = model(pack(sequences), Later())
            dense = model(pack(sequences), Dense())
        assert torch.equal(output.kept, torch.stack([lengths] * 3 + [lengths.clamp(max=3)] * 2))
        assert [len(step.tokens) for step in output.steps] == [int(lengths.sum())] * 4 + [int(output.kept[-1].sum())]
        assert (output.logits - dense.logits).abs().max() > 0.01


def classifier_that_reads(**changes) -> Model:
    return pruning_model(read_dropped=True, **changes)


def pairs(count: int) -> Batch:
    sequences = random_sequences(count)
    return pack(sequences, [[int(i > len(ids) // 3) for i in range(len(ids))] for ids in sequences])


@pytest.mark.parametrize("rule", ["hard", "topk", "second", "soft_attention"])
def test_a_classifier_reads_the_states_of_dropped_tokens(rule):
    """The states, taken from the layers by hooks, are summed token by token with loops."""
    model, batch = classifier_that_reads(), pairs(6)
    pruner = EverySecond() if rule == "second" else make_pruner(model, rule)
    states, read = [], []
    for layer in model.layers:
        layer.attention_norm.register_forward_hook(lambda module, args, out: states.append(out))
    model.head.register_forward_pre_hook(lambda module, args: read.append(args))
    with torch.inference_mode():
        output = model(batch, pruner)
    ((first, means),) = read
    expected, sizes = torch.zeros(6, 2, 30), torch.zeros(6, 2)
    ids = Sequences(batch.lengths).ids.tolist()
    for t, segment in enumerate(batch.segment_ids.tolist()):
        sizes[ids[t], segment] += 1
    shares = torch.ones(len(ids))
    for state, step in zip(states[:-1], output.steps):  # in the last layer nobody is dropped: only first tokens go on
        stay = step.decision.keep if step.decision.mask is None else step.decision.mask
        stay = torch.ones(len(step.tokens)) if stay is None else stay.float()
        for row, t in enumerate(step.tokens.tolist()):
            expected[ids[t], batch.segment_ids[t]] += shares[t] * (1 - stay[row]) * state[row]
            shares[t] *= stay[row]
    expected = (expected / sizes[:, :, None]).flatten(1)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(means, expected, atol=1e-5, rtol=0)
    head = model.head
    logits = head.output(torch.tanh(head.dense(first + expected @ head.dropped.T)))
    torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", [*MODES, "second"])
def test_what_a_classifier_reads_does_not_depend_on_the_batch(rule):
    model, batch = classifier_that_reads(), pairs(7)
    pruner = EverySecond() if rule == "second" else make_pruner(model, rule)
    parts = zip(*(part.split(batch.lengths.tolist()) for part in batch[:2]))
    with torch.inference_mode():
        together = model(batch, pruner).logits
        alone = torch.cat([model(pack([ids.tolist()], [segments.tolist()]), pruner).logits for ids, segments in parts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_a_classifier_that_reads_dropped_tokens_is_the_plain_one_where_none_is_dropped(tmp_path):
    model, batch = classifier_that_reads(), pairs(5)
    model.save(tmp_path)
    again, plain = Model.load(tmp_path), pruning_model()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name != "head.dropped"})
    with torch.inference_mode():
        assert torch.equal(model(batch, Dense()).logits, plain(batch, Dense()).logits)
        hard = Hard(model.thresholds)
        assert torch.equal(again(batch, hard).logits, model(batch, hard).logits)
        assert not torch.allclose(model(batch, hard).logits, plain(batch, hard).logits, atol=0.01)


def test_the_mean_of_a_long_segment_is_exact_in_bf16():
    """512 numbers summed and counted in bf16 would stay at 256."""
    means = segment_means(
        torch.ones(600, 3).bfloat16(), (torch.arange(600) >= 512).long(), Sequences(torch.tensor([600]))
    )
    assert means.dtype == torch.bfloat16 and torch.equal(means, torch.ones(1, 6).bfloat16())
