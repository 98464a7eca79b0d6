"""Layouts, pruning rules and FLOPs against values worked out by hand."""

import math

import pytest
import torch
from small_models import SMALL, random_sequences, small_model

from model import (
    Config,
    Hard,
    Model,
    Sequences,
    Soft,
    TopK,
    bit_operations,
    keep_by_threshold,
    keep_topk,
    last_layer_saving,
    layer_macs,
    macs,
    pack,
    soft_mask,
    threshold_ladder,
    topk_counts,
    topk_rates,
)

# ---- layouts ----


def limited(max_area: float, max_padding: float) -> type[Sequences]:
    """A layout with other limits of its grids."""

    class Limited(Sequences):
        CPU_LIMITS = (max_area, max_padding)

    return Limited


def test_runs_of_sequences():
    seqs = Sequences(torch.tensor([2, 3, 1]))
    assert seqs.num_tokens == 6 and seqs.sizes == [2, 3, 1]
    assert seqs.starts.tolist() == [0, 2, 5]
    assert seqs.ids.tolist() == [0, 0, 1, 1, 1, 2]
    assert seqs.positions.tolist() == [0, 1, 0, 1, 2, 0]
    assert seqs.sum(torch.tensor([1, 0, 1, 1, 0, 1])).tolist() == [1, 2, 1]
    assert seqs.sum(torch.tensor([True, True, True, True, False, False])).tolist() == [2, 2, 0]
    assert seqs.sum(torch.tensor([0.5, 0.25, 1, 1, 1, 2])).tolist() == [0.75, 3.0, 2.0]


def test_packing_by_hand():
    batch = pack([[0, 7, 2], [0, 2]], [[0, 0, 1], [0, 1]])
    assert batch.token_ids.tolist() == [0, 7, 2, 0, 2] and batch.segment_ids.tolist() == [0, 0, 1, 0, 1]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1] and batch.lengths.tolist() == [3, 2]
    assert pack([[0, 7, 2]]).segment_ids.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "sizes, limits, expected",
    [
        ([5, 5, 6, 30, 2], (1000, 30), [3, 1, 1]),
        ([50, 50], (100, 10), [1, 1]),
        ([3, 9, 1], (10**9, math.inf), [3]),
        ([4, 4, 4], (32, 0), [2, 1]),  # two rows of 4² are 32 cells
        ([4, 3], (1000, 3), [1, 1]),  # 7 cells of padding, 3.5 a sequence
        ([4, 3], (1000, 4), [2]),
    ],
)
def test_grids_cover_all_sequences_within_limits(sizes, limits, expected):
    seqs = limited(*limits)(torch.tensor(sizes))
    assert [grid.sequences.stop - grid.sequences.start for grid in seqs.grids] == expected
    assert [grid.sequences.start for grid in seqs.grids] == [sum(expected[:i]) for i in range(len(expected))]
    assert sum(grid.num_tokens for grid in seqs.grids) == sum(sizes)


def test_a_grid_is_a_view_without_padding():
    x = torch.arange(12.0).view(6, 2)
    seqs = Sequences(torch.tensor([3, 3]))
    (grid,) = seqs.grids
    (laid,) = seqs.lay(x)
    assert grid.real is None and grid.cells is None and laid.shape == (2, 3, 2) and laid.data_ptr() == x.data_ptr()


def test_a_grid_with_padding_by_hand():
    seqs = limited(100, 100)(torch.tensor([2, 4]))
    (grid,) = seqs.grids
    assert grid.real.tolist() == [[True, True, False, False], [True] * 4]
    assert grid.cells.tolist() == [0, 1, 4, 5, 6, 7]
    (laid,) = seqs.lay(torch.arange(6)[:, None])
    assert laid[0, :2, 0].tolist() == [0, 1] and laid[1, :, 0].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("limits", [(1, 0), (300, 20), (10**9, math.inf)])
def test_laying_and_flattening_are_inverse(limits):
    lengths = torch.tensor([len(s) for s in random_sequences(13, longest=20)])
    seqs = limited(*limits)(lengths)
    x = torch.randn(int(lengths.sum()), 7)
    assert torch.equal(seqs.flatten(seqs.lay(x)), x)


def test_dropping_by_hand():
    seqs = Sequences(torch.tensor([2, 3, 1]))
    keep = torch.tensor([True, False, True, False, True, True])
    smaller, survivors = seqs.drop(keep, torch.tensor([1, 2, 1]))
    assert survivors.tolist() == [0, 2, 4, 5]
    assert smaller.sizes == [1, 2, 1] and smaller.original_lengths.tolist() == [2, 3, 1]
    same, survivors = seqs.drop(torch.ones(6, dtype=torch.bool), seqs.lengths)
    assert same is seqs and survivors is None  # the grids are kept, too


# ---- rules ----


def test_threshold_ladder_counts_layers_from_one():
    torch.testing.assert_close(threshold_ladder(0.012, 12)[[2, 5, 8, 11]], torch.tensor([0.003, 0.006, 0.009, 0.012]))
    torch.testing.assert_close(threshold_ladder(0.08, 4, power=2), torch.tensor([0.005, 0.02, 0.045, 0.08]))


def test_keep_by_threshold_keeps_ties_and_first_tokens():
    scores = torch.tensor([0.0, 0.3, 0.2, 0.1, 0.5])
    protected = torch.tensor([True, False, False, True, False])  # the first tokens of two sequences
    assert keep_by_threshold(scores, torch.tensor(0.2), protected).tolist() == [True] * 5
    assert keep_by_threshold(scores, torch.tensor(0.25), protected).tolist() == [True, True, False, True, True]


def test_soft_mask_is_half_at_the_threshold_and_one_at_the_first_token():
    mask = soft_mask(torch.tensor([0.0, 0.02, 0.03]), torch.tensor(0.02), 0.01, torch.tensor([True, False, False]))
    torch.testing.assert_close(mask, torch.tensor([1.0, 0.5, 1 / (1 + math.exp(-1))]))


def test_keep_topk_by_hand():
    #                      first sequence            | second
    scores = torch.tensor([0.0, 0.9, 0.1, 0.5, 0.5, 0.2, 0.8, 0.7])
    seqs = Sequences(torch.tensor([5, 3]))
    keep = keep_topk(scores, seqs, torch.tensor([3, 2]), torch.arange(8) % 5 == 0)
    assert keep.tolist() == [True, True, False, True, False, True, True, False]  # of the equal 0.5 the left one


def test_topk_schedule():
    assert topk_rates(0.2, 7) == pytest.approx([1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert topk_rates(-1.0, 5) == pytest.approx([1, 1, 1, 0, 0])
    assert topk_rates(0.5, 24)[:5] == pytest.approx([1, 1, 1, 1, 1 - 0.5 / 20])  # 15% of 24 layers is more than 3
    assert topk_counts(torch.tensor([90, 22, 9, 3]), 0.75).tolist() == [68, 16, 7, 2]  # halves to even
    assert topk_counts(torch.tensor([9]), 0.0).tolist() == [1]


# ---- a whole forward pass by hand ----


def two_kinds_model(**changes) -> Model:
    """Two layers and one head over states (1, -1) of token 3 (A) and (-1, 1) of token 4 (B).

    Every query gives A three times the attention of B. Attention and feed-forward block add nothing to a state.
    """
    config = Config(5, 2, 2, 1, 3, 20, layer_norm_eps=1e-12, score_norm="length", head="token", **changes)
    model = Model(config).eval()
    for parameter in model.parameters():
        parameter.data.zero_()
    for name, parameter in model.named_parameters():
        if "norm.weight" in name:
            parameter.data.fill_(1)
    model.embeddings.word.weight.data[3:] = torch.tensor([[1.0, -1], [-1, 1]])
    for layer in model.layers:
        layer.attention.query_key_value.bias.data[0] = math.log(3) / math.sqrt(2)  # q · (k_A − k_B) / √2 = ln 3
        layer.attention.query_key_value.weight.data[2:4] = torch.eye(2)  # keys are states
    model.head.output.weight.data = torch.eye(2)
    return model


A, B = 3, 4


def test_hard_pruning_by_hand():
    # Layer 1: A B B A share attention as 3 : 1 : 1 : 3, each of 4 queries gives 3/8 or 1/8, and N = 4.
    # Layer 2: two A are left, each of 2 queries gives each 1/2, and N is still 4.
    # The second sequence is alone with itself: 1 query, probability 1, N = 1.
    model = two_kinds_model()
    with torch.inference_mode():
        output = model(pack([[A, B, B, A], [B]]), Hard(torch.tensor([0.2, 0.3])))
    first, second = output.steps
    torch.testing.assert_close(first.scores, torch.tensor([0.375, 0.125, 0.125, 0.375, 1.0]))
    assert first.tokens.tolist() == [0, 1, 2, 3, 4] and first.decision.keep.tolist() == [True, False, False, True, True]
    torch.testing.assert_close(second.scores, torch.tensor([0.25, 0.25, 1.0]))
    assert second.tokens.tolist() == [0, 3, 4] and second.decision.keep.tolist() == [True, False, True]
    assert output.kept.tolist() == [[2, 1], [1, 1]]
    signs = torch.tensor([[1.0, -1], [-1, 1], [-1, 1], [1, -1], [-1, 1]])
    torch.testing.assert_close(output.logits, signs)  # a dropped token answers with the state it left with


def test_soft_pruning_by_hand():
    # θ = 0.125 and τ = 0.25: B's mask is 1/2, the last A's is σ(1), the first token's is 1.
    model = two_kinds_model()
    with torch.inference_mode():
        output = model(pack([[A, B, B, A]]), Soft(torch.tensor([0.125, -99.0]), 0.25))
    a = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(output.steps[0].decision.mask, torch.tensor([1, 0.5, 0.5, a]))
    torch.testing.assert_close(output.steps[1].decision.mask, torch.ones(4))
    torch.testing.assert_close(output.kept, torch.tensor([[2 + a], [2 + a]]))
    assert output.steps[1].tokens.tolist() == [0, 1, 2, 3]  # nothing leaves
    # Layer 2 sees masked states. A key m · (1, -1) gives the logit m · ln(3) / 2, a key -m · (1, -1) its negative.
    weights = [3 ** (m / 2) for m in (1, -0.5, -0.5, a)]
    torch.testing.assert_close(output.steps[1].scores, torch.tensor([w / sum(weights) for w in weights]))


def test_topk_by_hand():
    model = two_kinds_model()
    with torch.inference_mode():
        output = model(pack([[B, B, A, A, B], [B, A]]), TopK([0.6, 0.2]))
    # 3 of 5: the first token and both A. 1.2 of 2: the first token.
    assert output.steps[0].decision.keep.tolist() == [True, False, True, True, False, True, False]
    assert output.steps[1].tokens.tolist() == [0, 2, 3, 5]
    assert output.kept.tolist() == [[3, 1], [1, 1]]


def test_scores_sum_to_the_share_of_alive_queries():
    for norm, sizes in (("max_length", SMALL.max_seq_length), ("length", torch.tensor([9, 4, 17]))):
        model = small_model(score_norm=norm)
        batch = pack([[5 + i for i in range(n)] for n in (9, 4, 17)])
        step = model(batch, Hard(model.thresholds)).steps[0]
        torch.testing.assert_close(Sequences(batch.lengths).sum(step.scores), torch.tensor([9.0, 4, 17]) / sizes)


# ---- FLOPs ----


def test_macs_by_hand():
    config = Config(10, 2, 2, 1, 3, 20)
    # D = 2, F = 3: layer 1: 16·5 + 4·25 + 12·4 = 228; layer 2: 16·4 + 4·16 + 12·1 = 140
    lengths, kept = torch.tensor([5]), torch.tensor([[4], [1]])
    assert layer_macs(config, lengths, kept).tolist() == [[228], [140]]
    assert macs(config, lengths, kept).tolist() == [368]


def test_soft_counts_give_macs_a_gradient():
    kept = torch.tensor([[4.0], [1.0]], requires_grad=True)
    macs(Config(10, 2, 2, 1, 3, 20), torch.tensor([5]), kept).sum().backward()
    assert kept.grad.tolist() == [[12 + 16 + 8 * 4], [12]]  # 2DF each, and 4D² + 4D·n where a next layer follows


def test_the_last_layers_saving_by_hand():
    # D = 2, F = 3. Counted: 16·4 + 4·16 + 12·2 = 152. Done: keys and values 8·4, one query, one output 4 + 4, their
    # products with 4 tokens 2·2·4, one feed-forward 12: 68.
    entering, kept = torch.tensor([4]), torch.tensor([2])
    assert last_layer_saving(Config(10, 2, 2, 1, 3, 20), entering, kept).tolist() == [152 - 68]
    assert last_layer_saving(Config(10, 2, 2, 1, 3, 20, head="token"), entering, kept).tolist() == [0]


def test_bit_operations_count_products_of_activations_in_float():
    lengths, kept = torch.tensor([7, 3]), torch.tensor([[7, 3], [5, 2], [5, 2], [1, 1], [1, 1]])
    D, F = SMALL.hidden_size, SMALL.intermediate_size
    assert torch.equal(bit_operations(SMALL, lengths, kept), 1024 * macs(SMALL, lengths, kept))
    entering = [7, 7, 5, 5, 1]
    linear = sum(4 * D * D * n for n in entering) + sum(2 * D * F * n for n in kept[:, 0].tolist())
    attention = sum(2 * D * n * n for n in entering)
    assert int(bit_operations(SMALL, lengths, kept, 8)[0]) == 64 * linear + 1024 * attention
