"""Small random models with odd, distinct sizes, so that a swapped axis fails, and what tests run them on."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn as nn

from model import Config, Decision, Dense, Hard, Model, Pruner, Soft, TopK, initialize, threshold_ladder, topk_rates

SMALL = Config(
    vocab_size=83,
    hidden_size=30,
    num_hidden_layers=5,
    num_attention_heads=3,
    intermediate_size=47,
    max_position_embeddings=140,
    layer_norm_eps=1e-5,
    labels=("a", "b", "c"),
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
MODES = ("dense", "soft", "soft_attention", "hard", "topk")  # soft_attention: soft masks act on attention


def small_model(**changes) -> Model:
    """A random model with weights large enough that attention is not uniform, and small enough not to be chaotic."""
    torch.manual_seed(0)
    model = Model(replace(SMALL, **changes))
    initialize(model, 0.15)
    if model.config.read_dropped:
        nn.init.normal_(model.head.dropped, std=0.5)
    return model.eval()


def pruning_model(**changes) -> Model:
    """A small model with settings under which every pruner drops a good part of the tokens."""
    model = small_model(**{"token_keep_rate": 0.3} | changes)
    model.thresholds.data = threshold_ladder(0.01 if model.config.score_norm == "max_length" else 0.02, 5)
    return model


def make_pruner(model: Model, mode: str, temperature: float = 3e-4) -> Pruner:
    """The pruner of a mode, with the model's thresholds or keep rate."""
    if mode == "hard":
        return Hard(model.thresholds)
    if mode in ("soft", "soft_attention"):
        return Soft(model.thresholds, temperature, masks_attention=mode == "soft_attention")
    if mode == "topk":
        return TopK(topk_rates(model.config.token_keep_rate, len(model.layers)))
    return Dense()


class EverySecond(Pruner):
    """A pruner that needs no scores: in each layer every second of a sequence's tokens goes."""

    def decide(self, l, scores, alive, seqs):
        keep = alive.protected | (seqs.positions % 2 == 0)
        return Decision(seqs.sum(keep), keep)


def all_states(model: Model) -> Model:
    """A model with the same encoder that answers with every token's last state (T, D)."""
    twin = Model(replace(model.config, head="token"))
    twin.load_state_dict(model.state_dict() | {f"head.{k}": v for k, v in twin.head.state_dict().items()}, strict=False)
    twin.head = nn.Identity()
    return twin.eval()


def random_sequences(count: int, seed: int = 0, longest: int = 100) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, 83, (n,), generator=generator).tolist() for n in lengths]
