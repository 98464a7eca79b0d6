"""What a FLOPs target means before training: thresholds to start from, and top-k's keep rate."""

from __future__ import annotations

import torch
from torch import Tensor

from data import Examples
from model import Config, threshold_ladder, topk_counts, topk_rates
from support.errors import InputError
from train import relative_flops

# `train.scale_thresholds` multiplies the starting thresholds: only their proportions matter.
START_HEIGHT = 0.01  # near a token's mean score, 1/128, so that few doublings of the factor are needed
LADDER_POWER = 4.0  # steep: the first layers keep almost all tokens, the last ones few
WHOLE_LAYERS = 2  # below the cost of this many dense layers, the ladder would have to prune the first layers too
ROUNDING = 0.01  # a target written with two digits, such as 0.33 for 2 of 6 layers, counts as that share
LOW_BUDGET = (1.0, 0.0)  # proportions of the first two thresholds below that cost ...
LOW_BUDGET_REST = 10.0  # ... and of all others

BISECTIONS = 30  # halve an interval of a few units to a precision of 1e-8


def starting_thresholds(num_layers: int, target: float) -> Tensor:
    """Thresholds that soft training towards `target` starts from, up to one factor: (L,).

    A steep ladder keeps almost all tokens in the first layers, and prunes in the last ones. Below the cost of
    `WHOLE_LAYERS` dense layers the first layer prunes instead, and the second, with threshold 0, does not.
    """
    if target >= WHOLE_LAYERS / num_layers - ROUNDING:
        return threshold_ladder(START_HEIGHT, num_layers, power=LADDER_POWER)
    return START_HEIGHT * torch.tensor([*LOW_BUDGET, *[LOW_BUDGET_REST] * num_layers])[:num_layers]


def protected_tokens(config: Config, examples: Examples) -> Tensor:
    """How many tokens of each example are never pruned: (N,)."""
    if config.head == "span" and config.protect_question:
        return torch.from_numpy(examples.question_lengths)
    return torch.ones(len(examples), dtype=torch.long)


def topk_flops(config: Config, lengths: Tensor, protected: Tensor, rate: float) -> float:
    """The share of the dense FLOPs that top-k takes of sequences (B,), of which `protected` (B,) tokens always stay."""
    rates = topk_rates(rate, config.num_hidden_layers)
    kept = [lengths if share == 1 else topk_counts(lengths, share).maximum(protected) for share in rates]
    return relative_flops(config, lengths, torch.stack(kept))


def lowest_rate(config: Config) -> float:
    """The keep rate at which the first pruned layer already leaves one token: a lower one prunes no more."""
    return -float(config.num_hidden_layers)


def rate_for_budget(config: Config, lengths: Tensor, protected: Tensor, target: float) -> float:
    """The token_keep_rate with which top-k takes `target` of the dense FLOPs of sequences (B,), see `topk_flops`.

    Raises: InputError if no rate prunes so much.
    """
    low, high = lowest_rate(config), 1.0
    lowest = topk_flops(config, lengths, protected, low)
    if lowest > target:
        raise InputError(
            f"--target-flops {target}: top-k does not prune the first layers, and cannot go below {lowest:.3f} here"
        )
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if topk_flops(config, lengths, protected, middle) <= target else (low, middle)
    return low
