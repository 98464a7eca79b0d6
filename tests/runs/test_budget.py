"""What a FLOPs target means before training."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import SMALL

from data import Examples
from model import macs, topk_counts, topk_rates
from runs.budget import protected_tokens, rate_for_budget, starting_thresholds
from support.errors import InputError


def test_starting_thresholds_are_steep_or_spare_the_second_layer():
    assert [len(starting_thresholds(L, 0.5)) for L in (1, 2, 3, 12)] == [1, 2, 3, 12]
    for target, shape in ((0.6, [1, 16, 81, 256]), (0.5, [1, 16, 81, 256]), (0.4, [1, 0, 10, 10])):  # of four layers
        start = starting_thresholds(4, target)
        torch.testing.assert_close(start / start[0], torch.tensor(shape).float())
    # A target with two digits counts as the share that it stands for: 0.33 is two layers of six.
    assert torch.equal(starting_thresholds(6, 0.33), starting_thresholds(6, 0.5))
    assert starting_thresholds(6, 0.32)[1] == 0


def test_topk_rates_for_a_budget():
    lengths, ones = torch.tensor([40, 17, 23]), torch.ones(3, dtype=torch.long)
    rate = rate_for_budget(SMALL, lengths, ones, 0.85)
    kept = torch.stack([topk_counts(lengths, share) for share in topk_rates(rate, 5)])
    dense = macs(SMALL, lengths, lengths.expand(5, -1)).sum()
    assert 0.82 < float(macs(SMALL, lengths, kept).sum() / dense) <= 0.85
    assert rate_for_budget(SMALL, lengths, ones, 1.0) == pytest.approx(1, abs=0.03)
    with pytest.raises(InputError, match="top-k does not prune the first layers, and cannot go below 0.740"):
        rate_for_budget(SMALL, lengths, ones, 0.2)
    # Tokens that are never pruned make a lower rate necessary, and some budgets impossible.
    assert rate_for_budget(SMALL, lengths, 12 * ones, 0.85) < rate
    with pytest.raises(InputError, match="cannot go below 0.8"):
        rate_for_budget(SMALL, lengths, 12 * ones, 0.8)


def test_protected_tokens_by_hand():
    lengths, questions = np.array([3, 5, 1]), np.array([2, 3, 1])
    buffers = np.zeros(9, np.int32), np.zeros(9, np.int8)
    examples = Examples(*buffers, lengths, targets=np.empty(0), question_lengths=questions)
    span = replace(SMALL, head="span", protect_question=True)
    assert protected_tokens(span, examples).tolist() == [2, 3, 1]
    assert protected_tokens(replace(span, protect_question=False), examples).tolist() == [1, 1, 1]
    assert protected_tokens(replace(SMALL, protect_question=True), examples).tolist() == [1, 1, 1]
