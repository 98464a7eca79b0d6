"""Learned Token Pruning (LTP) for RoBERTa-class encoders, in one file.

Paper: Kim et al., "Learned Token Pruning for Transformers", KDD 2022, https://arxiv.org/abs/2107.00910

The method. Self-attention already says how much every token is looked at. In each layer LTP averages, over heads and
queries, the attention probability a token receives, and drops the token when that importance falls below the layer's
threshold; later layers then work on a shorter sequence. The thresholds are learned: in the *soft* stage a sigmoid
stands for the decision, so that the loss and a regulariser that asks for fewer tokens can move them; in the *hard*
stage they are frozen, tokens are really dropped, and the weights adapt.

How it is made fast. A batch is one flat run of tokens without padding, so that dropping tokens is `x = x[keep]` and
every later matrix product is that much smaller, at any batch size, in training and in inference. Sequences meet only
inside attention.

Legend. B sequences in a batch, T tokens in the batch (all sequences together, shrinking from layer to layer),
D hidden size, H heads, d = D / H head size, F intermediate size, L layers, n length of a sequence, l layer counted
from 1, θ_l threshold, τ temperature. `keep[t] == True` means that token t survives.

Departures from the authors' release, where each was a choice:
- the first token (CLS, <s>) always survives and its soft mask is 1: the classifier reads it;
- layers count from 1 in θ_l = θ_final · l / L, as the authors' README says (their code counts from 0);
- the thresholds are one learnable vector, saved with the weights as `ltp.thresholds`;
- the regulariser runs over real tokens only (towards a budget it is their FLOPs), and dropout never touches a score;
- the top-k rate is clamped at 0, not 0.01;
- a soft mask may act on the attention that later layers pay to the token instead of on the layer's output: then a mask
  of 0 is the same as dropping, and soft training leads where hard pruning goes (the default towards a budget);
- towards a budget the thresholds do not start from θ_final · l / L but where they meet it, as a steep ladder;
- in the last layer a classifier needs the output of the first token only, so only that one is computed;
- where every token has an answer (questions, tags), a pruned token's is read off the state that it was dropped with; in
  soft training a token leaves by degrees, and what is read is the mean of its states by how much left when.

Read it top to bottom: configuration, pruning rules, attention, layer, encoder, head, FLOPs, checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data import FINAL_TOKEN_THRESHOLD, MAX_SEQ_LENGTH, QUESTION_LENGTH, TOKEN_KEEP_RATE, InputError, plural

# ----------------------------------------------------------------------------------------------------------------------
# Configuration


# Which base a model type is read as: RoBERTa counts positions from pad + 1 and keeps its pooling layer in the
# classifier; BERT counts from 0 and has a pooler. I-BERT (in floating point) and LTP are RoBERTa by arithmetic.
FAMILY = {
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "camembert": "roberta",
    "ibert": "roberta",
    "ltp": "roberta",
    "bert": "bert",
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
# What the model answers, by the ending of Hugging Face's architecture names: one answer a sequence, one a token, or
# for each token how likely an answer starts and ends there.
ARCHITECTURES = {
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "span": "ForQuestionAnswering",
}
SPAN_LABELS = ("start", "end")
PRUNE_MODES = ("absolute_threshold", "topk", None)
SCORE_NORMS = ("max_length", "length")


@dataclass(frozen=True)
class Config:
    """The keys of a Hugging Face config.json that this encoder uses, and the pruning settings.

    `other` holds the file's remaining keys, so that saving a model gives them back untouched.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    model_type: str = "roberta"
    type_vocab_size: int = 2
    pad_token_id: int = 1
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    head: str = "sequence"  # a key of ARCHITECTURES
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")  # the class names in id order; exactly one means regression
    # Pruning.
    prune_mode: str | None = None  # what inference does: "absolute_threshold", "topk", or None for the dense model
    final_token_threshold: float = FINAL_TOKEN_THRESHOLD  # θ_final, where the thresholds start from
    token_keep_rate: float = TOKEN_KEEP_RATE  # share of tokens that top-k keeps in the last layer; negative is steeper
    score_norm: str = "max_length"  # which N the importance score is divided by, see `importance`
    max_seq_length: int = MAX_SEQ_LENGTH  # texts are cut to this many tokens; N when score_norm is "max_length"
    protect_question: bool = False  # "span" heads: no token of the question is pruned
    other: dict = field(default_factory=dict, repr=False)

    @property
    def family(self) -> str:
        return FAMILY[self.model_type]

    @property
    def position_offset(self) -> int:
        """Row of the position table that the first token of a sequence reads."""
        return self.pad_token_id + 1 if self.family == "roberta" else 0

    @property
    def max_tokens(self) -> int:
        """Longest sequence that the position table can hold."""
        return self.max_position_embeddings - self.position_offset

    @classmethod
    def from_dict(cls, raw: dict, where: str = "config.json") -> Config:
        """Checks and converts the content of a config.json.

        Raises: InputError naming the file, the key and the value for a missing key, a value of the wrong kind or out
        of range, or a setting that this encoder does not have.
        """

        def bad(key: str, remedy: str) -> InputError:
            return InputError(f"{where}: {key} = {raw.get(key)!r}: {remedy}")

        if not isinstance(raw, dict):
            raise InputError(f"{where}: expected a JSON object, found {type(raw).__name__}")
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILY:
            raise bad("model_type", f"supported are {', '.join(FAMILY)}")
        for key, wanted in (
            ("position_embedding_type", "absolute"),
            ("is_decoder", False),
            ("add_cross_attention", False),
            ("quant_mode", False),
        ):
            if raw.get(key, wanted) not in (wanted, None):
                reason = "integer-only inference is not implemented, use the floating-point checkpoint"
                raise bad(key, reason if key == "quant_mode" else f"not supported, only {json.dumps(wanted)} is")
        if raw.get("problem_type") == "multi_label_classification":
            raise bad("problem_type", "not supported, one label per example is")
        if raw.get("pruned_heads"):
            raise bad("pruned_heads", "not supported, only models with all their heads are")

        values = {}
        for key in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
            "max_seq_length",
        ):
            if key not in raw and hasattr(cls, key):
                continue  # has a default
            if key not in raw:
                raise InputError(f"{where}: the key {key} is missing")
            if type(raw[key]) is not int or not 1 <= raw[key] < 2**31:
                raise bad(key, "expected a whole number of at least 1")
            values[key] = raw[key]
        pad = raw.get("pad_token_id")
        values["pad_token_id"] = pad = (1 if FAMILY[model_type] == "roberta" else 0) if pad is None else pad
        if type(pad) is not int or not 0 <= pad < values["vocab_size"]:
            raise bad("pad_token_id", "expected a token id below vocab_size")
        for key, low, high in (
            ("layer_norm_eps", 0, 1),
            ("initializer_range", 0, 10),
            ("hidden_dropout_prob", 0, 1),
            ("attention_probs_dropout_prob", 0, 1),
            ("classifier_dropout", 0, 1),
            ("final_token_threshold", -math.inf, math.inf),
            ("token_keep_rate", -math.inf, 1),
        ):
            if key not in raw or key == "classifier_dropout" and raw[key] is None:
                continue
            if type(raw[key]) not in (int, float) or not (low <= raw[key] <= high) or abs(raw[key]) > 1e6:
                limits = (
                    f" from {low} to {high}" if high == 1 and low == 0 else f" of at most {high}" if high == 1 else ""
                )
                raise bad(key, f"expected a number{limits}")
            values[key] = float(raw[key])
        for key, allowed in (("hidden_act", ACTIVATIONS), ("prune_mode", PRUNE_MODES), ("score_norm", SCORE_NORMS)):
            if key in raw:
                if not isinstance(raw[key], (str, type(None))) or raw[key] not in allowed:
                    raise bad(key, f"supported are {', '.join('null' if a is None else a for a in allowed)}")
                values[key] = raw[key]
        if "protect_question" in raw:
            if type(raw["protect_question"]) is not bool:
                raise bad("protect_question", "expected true or false")
            values["protect_question"] = raw["protect_question"]
        architectures = raw.get("architectures") or [""]
        for head, ending in ARCHITECTURES.items():
            if isinstance(architectures, list) and str(architectures[0]).endswith(ending):
                values["head"] = head
        if values["hidden_size"] % values["num_attention_heads"]:
            raise bad("hidden_size", f"not a multiple of num_attention_heads = {values['num_attention_heads']}")

        names = raw.get("id2label")
        if names is None:
            count = raw.get("num_labels", 2)
            if type(count) is not int or not 1 <= count <= 10**6:
                raise bad("num_labels", "expected a whole number of at least 1")
            values["labels"] = tuple(f"LABEL_{i}" for i in range(count))
        else:
            ids = [str(i) for i in range(len(names))] if isinstance(names, dict) else None
            strings = ids and all(isinstance(name, str) for name in names.values())
            if not strings or sorted(names) != sorted(ids) or len(set(names.values())) != len(ids):
                raise bad("id2label", 'expected different names for the ids from "0" on without a gap')
            values["labels"] = tuple(names[i] for i in ids)
        config = cls(model_type=model_type, other=dict(raw), **values)
        if config.head == "span":
            length = values.get("max_seq_length", min(QUESTION_LENGTH, config.max_tokens))
            config = replace(config, labels=SPAN_LABELS, max_seq_length=length)
        if config.max_tokens < 2:
            raise bad("max_position_embeddings", "leaves no room for a sequence")
        return config

    def to_dict(self) -> dict:
        """The config.json of this model: the keys it came with, brought up to date."""
        # I-BERT's and the authors' model types would make other libraries look for buffers that are not there.
        model_type = "roberta" if self.model_type in ("ibert", "ltp") else self.model_type
        prefix = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert", "bert": "Bert"}[
            model_type
        ]
        # Not true of what we write.
        untrue = ("quant_mode", "force_dequant", "num_labels", "_name_or_path", "dtype", "torch_dtype")
        raw = {key: value for key, value in self.other.items() if key not in untrue}
        for key in self.__dataclass_fields__:
            if key not in ("head", "labels", "other"):
                raw[key] = getattr(self, key)
        problem = "regression" if len(self.labels) == 1 else "single_label_classification"
        return raw | {
            "model_type": model_type,
            "architectures": [prefix + ARCHITECTURES[self.head]],
            "id2label": {str(i): name for i, name in enumerate(self.labels)},
            "label2id": {name: i for i, name in enumerate(self.labels)},
            "problem_type": problem if self.head == "sequence" else None,
        }


# ----------------------------------------------------------------------------------------------------------------------
# Sequences in a flat run of tokens


def sequence_starts(lengths: Tensor) -> Tensor:
    """Where each sequence's first token stands: lengths (B,) -> indices (B,) into the flat run."""
    return lengths.cumsum(0) - lengths


def sequence_ids(lengths: Tensor) -> Tensor:
    """Which sequence each token belongs to: lengths (B,) -> (T,)."""
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def sum_by_sequence(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums per-token integers over each sequence: values (T,), lengths (B,) -> (B,)."""
    ends = lengths.cumsum(0)
    return values.cumsum(0)[ends - 1].diff(prepend=ends.new_zeros(1))


# ----------------------------------------------------------------------------------------------------------------------
# Pruning rules: what the project is about


def threshold_ladder(final_token_threshold: float, num_layers: int, power: float = 1.0) -> Tensor:
    """Thresholds that grow from layer to layer, θ_l = θ_final · (l / L)^power (L,).

    Linearly they are the start of learning and the manual baseline; a steep ladder leaves the first layers alone.
    """
    return final_token_threshold * (torch.arange(1, num_layers + 1, dtype=torch.float32) / num_layers) ** power


def importance(received: Tensor, num_heads: int, N: int | Tensor) -> Tensor:
    """s = Σ_h Σ_j A_h(j, i) / (H · N), equation 3 of the paper.

    received (T,): the sums, see `attend`. N: the maximum length (the authors' code: their θ, λ and τ are on its scale)
    or, as the paper writes it, the original length of each token's sequence (T,) -> (T,).
    """
    return received / (num_heads * N)


def soft_mask(importance: Tensor, threshold: Tensor, temperature: float, protected: Tensor) -> Tensor:
    """m = σ((s − θ) / τ), equation 8 of the paper, with 1 at the protected tokens (the first of each sequence).

    importance (T,), threshold (), protected (T,) bool -> (T,) from 0 to 1. Its gradient reaches scores and threshold.
    """
    return ((importance - threshold) / temperature).sigmoid().masked_fill(protected, 1.0)


def keep_by_threshold(importance: Tensor, threshold: Tensor, protected: Tensor) -> Tensor:
    """A token survives if s >= θ, equation 4 of the paper; protected ones always do.

    importance (T,), threshold (), protected (T,) bool -> keep (T,) bool.
    """
    return (importance >= threshold) | protected


def topk_rates(token_keep_rate: float, num_layers: int) -> list[float]:
    """Share of the original tokens top-k keeps in each layer (L,): all in the first max(3, ⌈0.15 L⌉) layers, then
    linearly down to `token_keep_rate` in the last one, never below 0 (Wang et al., SpAtten, arXiv 2012.09852)."""
    dense = max(3, math.ceil(0.15 * num_layers))
    return [
        1.0 if l <= dense else max(0.0, 1.0 + (token_keep_rate - 1.0) * (l - dense) / (num_layers - dense))
        for l in range(1, num_layers + 1)
    ]


def topk_counts(original_lengths: Tensor, rate: float) -> Tensor:
    """round(n · rate) tokens of each sequence, halves to even, at least the first one: (B,) -> (B,)."""
    return torch.round(original_lengths.double() * rate).long().clamp(min=1)


def keep_topk(importance: Tensor, lengths: Tensor, counts: Tensor, protected: Tensor) -> Tensor:
    """The `counts` (B,) most important tokens of each sequence survive, protected ones first; ties go to the left.

    importance (T,), lengths (B,), protected (T,) bool, of a sequence no more than its count -> keep (T,) bool.
    """
    ids = sequence_ids(lengths)
    # Sort by importance, then stably by sequence: each sequence's tokens stand together, best first.
    order = importance.masked_fill(protected, math.inf).argsort(descending=True, stable=True)
    order = order[ids[order].argsort(stable=True)]
    rank = torch.arange(len(order), device=order.device) - sequence_starts(lengths)[ids]
    return torch.empty_like(rank, dtype=torch.bool).index_put((order,), rank < counts[ids])


# ----------------------------------------------------------------------------------------------------------------------
# Attention

PACKED_TOKENS = 128  # packed weights are used up to here; above, the plain product is as fast


class Linear(nn.Linear):
    """A linear layer that can hold its weight a second time, in the layout of a CPU's fastest kernel: `Model.pack`."""

    packed: Tensor | None = None

    def pack(self) -> None:
        if (
            self.weight.device.type == "cpu"
            and self.weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
        ):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())

    def train(self, mode: bool = True) -> Linear:
        self.packed = None if mode else self.packed
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, in) -> (T, out)."""
        plain = self.packed is None or len(x) > PACKED_TOKENS or x.is_cuda
        if plain or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Dropout(nn.Module):
    """nn.Dropout, with random numbers of 16 bits, four from each that a CPU draws: a fifth of the time."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        if x.is_cuda or self.rate == 1:
            return F.dropout(x, self.rate)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        keep = bits.view(torch.int16)[: x.numel()].view(x.shape) >= round(2**16 * self.rate) - 2**15
        return x * keep.to(x.dtype).mul_(1 / (1 - self.rate))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alive: Tensor | None,
    presence: Tensor | None,
    dropout: Dropout,
    score: bool,
    cls_only: bool,
    max_area: int,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of b sequences laid on a grid, and what each token received.

    query, key, value (b, H, n, d) (query may have fewer rows); alive (b, n) tells tokens from padding, None: all are.
    presence (b, n): how much of each token is there, 0 to 1 (soft pruning; None: all of it). A key's probability is
    multiplied by its presence before they are made to sum to 1, and what a query gives counts in proportion to its own,
    so that presence 0 (taken as 1e-6, which has a logarithm) is as good as absence.
    max_area: how many probabilities of a head are made at a time; a softmax needs whole rows, but not all of them.
    Returns the context (b, H, queries, d), the first query's alone if `cls_only`, and, if `score`, the attention
    probability that each token receives, summed over heads and alive queries (b, n), before dropout, in float32.
    """
    query = query[:, :, :1] if cls_only and not score else query
    rate = dropout.rate if dropout.training else 0.0
    if not score and presence is None and (rate == 0 or query.is_cuda):
        mask = None if alive is None else alive[:, None, None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate), None
    b, H, n, d = key.shape
    q, k, v = (part.flatten(0, 1) for part in (query, key, value))  # (b · H, n, d)
    queries = q.size(1)
    padding = q.new_zeros(b, 1, 1, n)  # added to the logits: -inf where there is no token
    if alive is not None:
        padding.masked_fill_(~alive[:, None, None], -math.inf)
    if presence is not None:
        padding = padding + presence.clamp(min=1e-6).log()[:, None, None]
    padding = padding.expand(b, H, 1, n).flatten(0, 1)
    contexts, received = [], []
    step = max(1, max_area // (b * n))
    for start in range(0, queries, step):
        rows = slice(start, start + step)
        beta = alive is not None or presence is not None
        logits = torch.baddbmm(padding, q[:, rows], k.mT, alpha=d**-0.5, beta=beta)  # (b · H, rows, n)
        probs = logits.softmax(-1, dtype=torch.float32)
        if score:
            given = probs.unflatten(0, (b, H)).sum(1)  # (b, rows, n)
            given = given if presence is None else given * presence[:, rows, None]
            received.append((given if alive is None else given * alive[:, rows, None]).sum(1))
        if not cls_only or start == 0:
            contexts.append(dropout(probs[:, :1] if cls_only else probs).to(v.dtype) @ v)
    context = contexts[0] if len(contexts) == 1 else torch.cat(contexts, 1)
    return context.unflatten(0, (b, H)), sum(received[1:], received[0]) if score else None


class SelfAttention(nn.Module):
    """Multi-head self-attention over a flat run of tokens; query, key and value are one product."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = Dropout(config.attention_probs_dropout_prob)
        self.query_key_value = Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, x: Tensor, lengths: Tensor, presence: Tensor | None, score: bool, cls_only: bool
    ) -> tuple[Tensor, Tensor | None]:
        """x (T, D), lengths (B,), presence (T,) -> attended (T, D), or (B, D) of the first tokens if `cls_only`; received
        (T,) if `score`."""
        D = x.size(1)
        sizes = lengths.tolist()  # on CUDA this waits for the device, as `nonzero` does: shapes depend on the data
        max_area, max_waste = (2**24, math.inf) if x.is_cuda else (40_000, 500)
        groups = attention_groups(sizes, max_area, max_waste)
        tokens = [sum(group) for group in groups]
        if cls_only and not score:  # one query per sequence will do
            weight, bias = self.query_key_value.weight, self.query_key_value.bias
            queries = F.linear(x[sequence_starts(lengths)], weight[:D], bias[:D]).split([len(g) for g in groups])
            keys_values = F.linear(x, weight[D:], bias[D:]).split(tokens)
        else:
            queries = None
            keys_values = self.query_key_value(x).split(tokens)

        presences = [None] * len(groups) if presence is None else presence[:, None].split(tokens)
        contexts, received = [], []
        for i, (group, projected) in enumerate(zip(groups, keys_values)):
            grid, alive, index = to_grid(projected, group)  # (b, n, 3D or 2D)
            b, n = grid.shape[:2]
            parts = grid.view(b, n, -1, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4).unbind()
            key, value = parts[-2:]
            query = parts[0] if queries is None else queries[i].view(b, 1, self.num_heads, -1).transpose(1, 2)
            there = None if presence is None else to_grid(presences[i], group)[0].squeeze(2)
            context, group_received = attend(query, key, value, alive, there, self.dropout, score, cls_only, max_area)
            context = context.transpose(1, 2).reshape(-1, D)
            contexts.append(context if cls_only or index is None else context[index])
            if score:
                group_received = group_received.flatten()
                received.append(group_received if index is None else group_received[index])
        return self.output(torch.cat(contexts)), torch.cat(received) if score else None


def attention_groups(lengths: list[int], max_area: int, max_waste: float) -> list[list[int]]:
    """Cuts a batch into runs of consecutive sequences that are attended together on one grid.

    max_area: of a grid, b · n_max² attention probabilities a head; a longer sequence stands alone.
    max_waste: how many of them, per sequence, may be padding. Large grids leave a CPU's cache and padding costs it time,
    while a GPU wants few kernels; the CPU's limits were measured.

    >>> attention_groups([5, 5, 6, 30, 2], 1000, 30)
    [[5, 5, 6], [30], [2]]
    """
    groups: list[list[int]] = []
    for n in lengths:
        if groups:
            longer = [*groups[-1], n]
            area = len(longer) * max(longer) ** 2
            if area <= max_area and area - sum(m * m for m in longer) <= max_waste * len(longer):
                groups[-1].append(n)
                continue
        groups.append([n])
    return groups


def to_grid(x: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Lays a flat run of sequences (T, C) on a grid (b, n_max, C).

    Returns the grid; alive (b, n_max) bool; and index (T,), each token's place on the flattened grid. The last two are
    None where all sequences are of one length: there is no padding, and the grid is only a view.
    """
    b, n_max = len(lengths), max(lengths)
    if b * n_max == len(x):
        return x.view(b, n_max, -1), None, None
    sizes = torch.tensor(lengths, device=x.device)
    place = torch.arange(n_max, device=x.device)
    alive = place < sizes[:, None]
    # Padding repeats some token of the batch: whatever stands there is masked.
    source = (sequence_starts(sizes)[:, None] + place).clamp(max=len(x) - 1)
    index = alive.flatten().nonzero().squeeze(1)
    return x.index_select(0, source.flatten()).view(b, n_max, -1), alive, index


# ----------------------------------------------------------------------------------------------------------------------
# Layer, embeddings, encoder


class Layer(nn.Module):
    """One post-norm Transformer layer in two blocks, with the place for pruning between them."""

    def __init__(self, config: Config):
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(D, eps)
        self.intermediate = Linear(D, config.intermediate_size)
        self.output = Linear(config.intermediate_size, D)
        self.output_norm = nn.LayerNorm(D, eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.activation = ACTIVATIONS[config.hidden_act]

    def attention_block(
        self, x: Tensor, lengths: Tensor, presence: Tensor | None, score: bool, cls_only: bool
    ) -> tuple[Tensor, Tensor | None]:
        """x (T, D) -> x (T, D), or (B, D) if `cls_only`; attention received by each token (T,) if `score`."""
        attended, received = self.attention(x, lengths, presence, score, cls_only)
        residual = x[sequence_starts(lengths)] if cls_only else x
        return self.attention_norm(residual + self.dropout(attended)), received

    def feed_forward_block(self, x: Tensor) -> Tensor:
        """x (T, D) -> (T, D)."""
        return self.output_norm(x + self.dropout(self.output(self.activation(self.intermediate(x)))))


class Embeddings(nn.Module):
    """Word, position and segment embeddings, summed and normalised."""

    def __init__(self, config: Config):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.segment = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.position_offset = config.position_offset

    def forward(self, token_ids: Tensor, segment_ids: Tensor, positions: Tensor) -> Tensor:
        """Three (T,) -> (T, D)."""
        if self.segment.num_embeddings == 1:
            segment_ids = torch.zeros_like(segment_ids)  # the model does not tell segments apart
        x = self.word(token_ids) + self.segment(segment_ids) + self.position(positions + self.position_offset)
        return self.dropout(self.norm(x))


class LayerTrace(NamedTuple):
    """What one layer saw and decided, T_l tokens entering it."""

    tokens: Tensor  # (T_l,) their indices in the batch as it was given
    importance: Tensor  # (T_l,) s_l
    keep: Tensor  # (T_l,) bool


class Output(NamedTuple):
    """What the model returns; T counts the tokens of the batch as it was given."""

    logits: Tensor  # (B, labels); (T, labels) of a head that answers for each token, in the order given
    # (L, B) if `count`: tokens of each sequence leaving each layer, int64; in soft pruning Σ_t Π_k≤l m_k(t), float32
    kept: Tensor | None
    soft_mask_sum: Tensor | None  # (), Σ_l Σ_t m_l(t) in soft pruning: the regulariser, to be divided by T
    # (T, D) if `per_token`: each token's last state, a pruned one's from the layer that dropped it
    hidden: Tensor | None
    trace: list[LayerTrace] | None  # L of them if `trace`


class Model(nn.Module):
    """The packed, pruned encoder with its head: an answer a sequence (a class or a score), or an answer a token."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.head = Head(config) if config.head == "sequence" else TokenHead(config)
        self.thresholds = nn.Parameter(
            threshold_ladder(config.final_token_threshold, config.num_hidden_layers), requires_grad=False
        )

    def pack(self) -> Model:
        """Gives each layer a copy of its weights that a CPU multiplies faster where tokens are few: twice as fast at 25.

        For float32 inference with weights that stay as they are; it takes their memory a second time, and `train` drops
        it. Does nothing on other devices. Returns the model.
        """
        for part in self.layers.modules():
            if isinstance(part, Linear):
                part.pack()
        return self

    @property
    def pruning(self) -> str:
        """How this model prunes in inference, from its configuration: "none", "hard" or "topk"."""
        return {None: "none", "absolute_threshold": "hard", "topk": "topk"}[self.config.prune_mode]

    def forward(
        self,
        token_ids: Tensor,
        segment_ids: Tensor,
        positions: Tensor,
        lengths: Tensor,
        pruning: str | None = None,
        temperature: float | None = None,
        mask_floor: float = 0.0,
        mask_attention: bool = False,
        per_token: bool = False,
        trace: bool = False,
        count: bool = True,
    ) -> Output:
        """Answers for a packed batch.

        token_ids, segment_ids, positions (T,): the sequences one after the other; positions count from 0 in each.
        lengths (B,): their lengths, each at least 1.
        pruning: "none", "soft" (needs `temperature`), "hard" or "topk"; default: what the configuration says.
        mask_floor: tokens whose soft mask falls below it are dropped in soft pruning too.
        mask_attention: let soft masks multiply the token's presence in the attention of all later layers, which comes to
            dropping it as the mask goes to 0, and not, as in the paper, the output of the layer.
        per_token: also return each token's last hidden state, pruned tokens' included, in the order given.
        trace: also return every layer's scores and decisions.
        count: also tell how many tokens are kept. Without it, hard pruning has no use for the last layer's scores: they
            would change no logits.
        """
        pruning = self.pruning if pruning is None else pruning
        config, L = self.config, len(self.layers)
        per_token = per_token or config.head != "sequence"
        original_lengths = lengths
        rates = topk_rates(config.token_keep_rate, L)
        thresholds = self.thresholds.tolist() if pruning == "hard" else None
        kept, traces, soft_mask_sum = [], [], None

        x = self.embeddings(token_ids, segment_ids, positions)
        # Of each token that is still here: which of the T it is, whether it may go, and its masks' product (soft).
        tokens = torch.arange(len(x), device=x.device)
        protected = torch.zeros_like(tokens, dtype=torch.bool).index_fill(0, sequence_starts(lengths), True)
        if config.head == "span" and config.protect_question:
            protected = protected | (segment_ids == 0)
        survival = torch.ones(len(x), device=x.device)
        hidden = torch.zeros_like(x) if per_token else None  # states of tokens that have gone

        for index, layer in enumerate(self.layers):
            cls_only = index == L - 1 and not per_token  # a classifier reads nothing else of the last layer
            drops = pruning == "hard" and thresholds[index] > 0 or pruning == "topk" and rates[index] < 1
            # No score is computed where no token can be dropped: attention takes its fastest form then. Of a classifier's
            # last layer only the first token is read, so that its scores serve counting alone; top-k's counts need none.
            read = not cls_only or count and pruning == "hard"
            score = trace or pruning == "soft" or drops and read
            presence = survival if pruning == "soft" and mask_attention and index else None
            x, received = layer.attention_block(x, lengths, presence, score, cls_only)

            keep = mask = None
            if score:
                by_length = config.score_norm == "length"
                N = original_lengths[sequence_ids(lengths)] if by_length else config.max_seq_length
                scores = importance(received, config.num_attention_heads, N)
                if pruning == "soft":
                    mask = soft_mask(scores, self.thresholds[index], temperature, protected)
                    soft_mask_sum = mask.sum() if soft_mask_sum is None else soft_mask_sum + mask.sum()
                    if per_token:
                        hidden = hidden.index_add(0, tokens, (survival * (1 - mask))[:, None] * x)
                    survival = survival * mask
                    soft_count = mask.new_zeros(len(lengths)).index_add(0, sequence_ids(lengths), survival)
                    keep = mask >= mask_floor if mask_floor else None
                elif drops and pruning == "hard":
                    keep = keep_by_threshold(scores, self.thresholds[index], protected)
                elif drops:
                    counts = topk_counts(original_lengths, rates[index]).maximum(sum_by_sequence(protected, lengths))
                    keep = keep_topk(scores, lengths, counts, protected)
                if trace:
                    everything = torch.ones_like(tokens, dtype=torch.bool)
                    traces.append(LayerTrace(tokens, scores, everything if keep is None else keep))

            # Drop: from here on a pruned token is in no product. (In the last layer x may hold the first tokens only.)
            if keep is not None and len(alive := keep.nonzero().squeeze(1)) < len(keep):
                if per_token:
                    gone = (~keep).nonzero().squeeze(1)
                    hidden = hidden.index_add(0, tokens[gone], survival[gone, None] * x[gone])
                x = x if cls_only else x[alive]
                tokens, protected, survival = tokens[alive], protected[alive], survival[alive]
                mask = None if mask is None else mask[alive]
                lengths = sum_by_sequence(keep, lengths)
            elif drops and pruning == "topk" and not score:
                lengths = topk_counts(original_lengths, rates[index])  # only the numbers: x holds the first tokens
            kept.append(soft_count if pruning == "soft" else lengths)

            x = layer.feed_forward_block(x)
            if mask is not None and not mask_attention and index < L - 1:
                x = x * mask[:, None].to(x.dtype)

        if per_token:
            hidden = hidden.index_add(0, tokens, survival[:, None] * x)
        if config.head == "sequence":
            logits = self.head(x[sequence_starts(lengths)] if per_token else x)
        else:
            logits = self.head(hidden)
        kept = torch.stack(kept) if count else None
        return Output(logits, kept, soft_mask_sum, hidden, traces if trace else None)


class Head(nn.Module):
    """Reads the first token's state: (B, D) -> logits (B, labels). BERT's pooler is the same dense layer."""

    def __init__(self, config: Config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, len(config.labels))
        rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = Dropout(rate)
        self.input_dropout = Dropout(rate if config.family == "roberta" else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.dropout(torch.tanh(self.dense(self.input_dropout(x)))))


class TokenHead(nn.Module):
    """Reads every token's state: (T, D) -> logits (T, labels)."""

    def __init__(self, config: Config):
        super().__init__()
        rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = Dropout(rate if config.head == "token" else 0.0)
        self.output = nn.Linear(config.hidden_size, len(config.labels))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.dropout(x))


def initialize(module: nn.Module, std: float, generator: torch.Generator | None = None) -> None:
    """Fresh weights for a model trained from scratch, or for a new head: normal with `std`, biases 0, norms 1."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=std, generator=generator)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
        if isinstance(part, (nn.Linear, nn.LayerNorm)):
            nn.init.zeros_(part.bias)


# ----------------------------------------------------------------------------------------------------------------------
# FLOPs


def layer_macs(config: Config, lengths: Tensor, kept: Tensor) -> Tensor:
    """Multiply-accumulates of each layer and sequence, 4 D² n_in + 2 D n_in² + 2 D F n_out.

    lengths (B,) and kept (L, B), int64 -> (L, B); 2 FLOPs each. The formula of the authors' release with the true
    feed-forward width: it follows the pruning rule alone, so embeddings, head and the last layer's saving do not count.
    The dense model's are those with `kept` equal to `lengths` in every layer. Soft counts give a differentiable result.
    """
    D, F = config.hidden_size, config.intermediate_size
    entering = torch.cat([lengths[None], kept[:-1]])
    return 4 * D * D * entering + 2 * D * entering**2 + 2 * D * F * kept


def macs(config: Config, lengths: Tensor, kept: Tensor) -> Tensor:
    """`layer_macs` summed over the layers: (B,)."""
    return layer_macs(config, lengths, kept).sum(0)


def last_layer_saving(config: Config, entering: Tensor, kept: Tensor) -> Tensor:
    """Multiply-accumulates of each sequence that `macs` counts and a classifier's last layer does not do.

    entering, kept (B,): tokens before and after the last layer's pruning. One query, output projection and feed-forward
    pass remain (and where all tokens are scored, see `count` in `Model.forward`, the queries). A head that answers for
    each token saves nothing.
    """
    if config.head != "sequence":
        return torch.zeros_like(kept)
    D, F = config.hidden_size, config.intermediate_size
    counted = layer_macs(config, entering, kept[None])[0]
    return counted - (2 * D * D * entering + 2 * D * entering + 2 * D * D + 2 * D * F)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: ordinary Hugging Face folders

THRESHOLDS = "ltp.thresholds"
# Ours -> theirs, after the family's prefix. Query, key and value are three tensors there and one here.
LAYER_NAMES = {
    "attention.query_key_value": "attention.self.{query,key,value}",
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
EMBEDDING_NAMES = {
    "word": "word_embeddings",
    "position": "position_embeddings",
    "segment": "token_type_embeddings",
    "norm": "LayerNorm",
}


def head_names(config: Config) -> dict[str, str]:
    """Our names of the head's layers -> theirs."""
    if config.head != "sequence":
        return {"output": "qa_outputs" if config.head == "span" else "classifier"}
    if config.family == "bert":
        return {"dense": "bert.pooler.dense", "output": "classifier"}
    return {"dense": "classifier.dense", "output": "classifier.out_proj"}


# Tensors that a folder may hold and this encoder has no use for: pretraining heads, poolers that the head does not
# read, position indices, and I-BERT's quantization buffers.
UNUSED = re.compile(
    r"^(lm_head|cls|qa_outputs)\.|^(roberta|bert)\.pooler\.|(^|\.)position_ids$|"
    r"\.(x_min|x_max|act_scaling_factor|weight_integer|weight_scaling_factor|bias_integer|fc_scaling_factor|shift)$"
)


def tensor_names(name: str, config: Config) -> list[str]:
    """The checkpoint's name of one of our parameters; three for the fused query, key and value.

    >>> tensor_names("layers.0.attention.query_key_value.bias", Config(9, 2, 2, 1, 3, 20, "bert"))[1]
    'bert.encoder.layer.0.attention.self.key.bias'
    """
    family = config.family
    if name == "thresholds":
        return [THRESHOLDS]
    path, kind = name.rsplit(".", 1)
    group, rest = path.split(".", 1)
    if group == "head":
        return [f"{head_names(config)[rest]}.{kind}"]
    if group == "embeddings":
        return [f"{family}.embeddings.{EMBEDDING_NAMES[rest]}.{kind}"]
    number, rest = rest.split(".", 1)
    theirs = f"{family}.encoder.layer.{number}.{LAYER_NAMES[rest]}.{kind}"
    parts = ("query", "key", "value")
    return [theirs.replace("{query,key,value}", part) for part in parts] if "{" in theirs else [theirs]


def release_thresholds(tensors: dict[str, Tensor], config: Config, folder: Path) -> Tensor | None:
    """Takes the thresholds of a folder that the authors' release wrote out of its `tensors`; None where it has none.

    Their layers hold learned offsets to a ladder that counts layers from 0, θ_l = θ_final · l / L + keep_threshold_l.
    Returns (L,). Raises: InputError for a layer without one, and a folder that does not tell θ_final.
    """
    found = {}
    for name in tensors:
        place = re.search(r"\bencoder\.layer\.(\d+)\..*\bkeep_threshold$", name)
        if place:
            found[int(place[1])] = name
    if not found:
        return None
    if sorted(found) != list(range(config.num_hidden_layers)):
        raise InputError(f"{folder}: has {found[max(found)]}, but not one keep_threshold for each layer")
    final = config.other.get("final_token_threshold")
    if final is None:
        raise InputError(
            f"{folder}/config.json: final_token_threshold is missing, from which the thresholds are offsets"
        )
    for name in found.values():
        if tensors[name].numel() != 1 or not tensors[name].isfinite().all():
            raise InputError(f"{folder}: the tensor {name} is not one finite number")
    offsets = torch.stack([tensors.pop(found[l]).float().flatten()[0] for l in range(len(found))])
    return final * torch.arange(len(found)) / len(found) + offsets


class Loaded(NamedTuple):
    """What `load_model` returns."""

    model: Model
    has_thresholds: bool  # whether the folder held thresholds of its own
    notes: list[str]  # what the user should be told


def find_model(name: str, option: str = "--restore") -> Path:
    """The folder of a model: `name` itself, or the copy of a hub model in the local cache, fetched at need.

    A hub name may say which revision, a branch, tag or commit: "name@revision".
    Raises: InputError, speaking of the command line's `option`, if it is neither.
    """
    on_hub = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?", name)
    if Path(name).exists() or not on_hub:
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.txt", "model*.safetensors"]
        folder = Path(snapshot_download(on_hub[1], revision=on_hub[2], allow_patterns=wanted))
        if not any(folder.glob("model*.safetensors")):
            wanted.append("pytorch_model*.bin")
            folder = Path(snapshot_download(on_hub[1], revision=on_hub[2], allow_patterns=wanted))
        return folder
    except Exception as error:  # offline, unknown or private: the library's errors have no common class
        raise InputError(
            f"{option} {name}: no such folder here, and the hub gave no model of that name"
            f"{' and revision' if on_hub[2] else ''} ({type(error).__name__})"
        ) from None


def load_config(folder: str | Path) -> Config:
    """Reads the folder's config.json. Raises: InputError."""
    path = Path(folder) / "config.json"
    if not path.parent.is_dir():
        raise InputError(f"{folder}: no such model folder")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found; a model folder has config.json, its weights and its tokenizer") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    return Config.from_dict(raw, str(path))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder: model.safetensors or else pytorch_model.bin, each in one file or in shards.

    Raises: InputError for a missing or damaged file. Pickles are read with weights_only=True: they cannot run code.
    """
    for name in (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ):
        path = folder / name
        if path.is_file():
            break
    else:
        raise InputError(f"{folder}: no weights; expected model.safetensors or pytorch_model.bin")
    shards = [path]
    if name.endswith(".index.json"):
        try:
            shards = sorted({folder / shard for shard in json.loads(path.read_text("utf-8"))["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: not a shard index ({type(error).__name__}: {error})") from None
    tensors = {}
    for shard in shards:
        try:
            if ".safetensors" in name:
                with safe_open(shard, "pt") as file:
                    tensors |= {key: file.get_tensor(key) for key in file.keys()}
            else:
                tensors |= torch.load(shard, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise InputError(f"{shard}: not found, though {path.name} names it") from None
        except Exception as error:  # damaged files raise whatever their readers meet first
            reason = str(error).strip().split("\n")[0][:200]
            raise InputError(f"{shard}: damaged or not a weights file ({type(error).__name__}: {reason})") from None
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()):
        raise InputError(f"{path}: holds other things than named tensors; expected a state dict")
    # Conversions from TensorFlow call a norm's weight gamma and its bias beta.
    old_names = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    return {re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: old_names[m[0]], name): t for name, t in tensors.items()}


def load_model(folder: str | Path, labels: tuple[str, ...] | None = None, new_head: bool = False, **changes) -> Loaded:
    """Reads a model folder, in float32 on the CPU, in evaluation mode.

    labels: names of the classes the head must have, in order; default: the folder's. A head with the same names in
    another order is permuted.
    new_head: give a folder without a head, or with one for another number of classes, a fresh one, and say so in the
    notes; otherwise that is an error.
    changes: configuration fields to replace.
    Raises: InputError naming file and tensor for whatever is missing, unknown, of a wrong shape or not finite.
    """
    folder = Path(folder)
    config = load_config(folder)
    found_head = config.head
    config = replace(config, **changes)
    family = config.family
    # Bare encoders have no prefix; I-BERT and the authors' LTP have their own.
    prefix = re.compile(r"^(roberta|bert|ibert|ltp)\.|^(?=(embeddings|encoder|pooler)\.)")
    tensors = {
        prefix.sub(f"{family}.", name) if name != THRESHOLDS else name: tensor
        for name, tensor in read_tensors(folder).items()
    }
    notes = []

    head_weight = f"{head_names(config)['output']}.weight"
    old_head = tensors.get(head_weight) if config.head == found_head else None
    labels = config.labels if labels is None else tuple(labels)
    fits = old_head is not None and len(config.labels) == len(labels)
    kind = "classification head" if config.head == "sequence" else f"{config.head} head"
    if not fits and not new_head:
        raise InputError(
            f"{folder}: the {kind} ({head_weight}) "
            + ("is missing" if old_head is None else f"has {plural(len(config.labels), 'output')}, not {len(labels)}")
            + "; fine-tune this model on the task first"
        )
    fresh = {}
    # The same labels in another order, perhaps in other case, are the same head with its rows in that order.
    order = {name: i for i, name in enumerate(config.labels)}
    if set(order) != set(labels):
        order = {name.lower(): i for i, name in enumerate(config.labels)}
    named = [name if name in order else name.lower() for name in labels]
    if not fits:
        found = (
            "the folder has none" if old_head is None else f"the folder's has {plural(len(config.labels), 'output')}"
        )
        notes.append(f"the {kind} is new, with {plural(len(labels), 'output')}: {found}")
        tensors = {n: tensor for n, tensor in tensors.items() if not n.startswith(("classifier.", "qa_outputs."))}
        head = (Head if config.head == "sequence" else TokenHead)(replace(config, labels=labels))
        initialize(head, config.initializer_range)
        fresh = {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    elif len(order) == len(labels) and sorted(order) == sorted(named):
        for name in (head_weight, head_weight.replace("weight", "bias")):
            if name in tensors and tensors[name].shape[:1] == (len(labels),):
                tensors[name] = tensors[name][[order[label] for label in named]]
    elif len(labels) > 1 and not config.labels[0].startswith("LABEL_"):
        notes.append(f"the {kind} for {', '.join(config.labels)} now stands for {', '.join(labels)}")
    config = replace(config, labels=labels)
    if THRESHOLDS not in tensors:
        theirs = release_thresholds(tensors, config, folder)
        if theirs is not None:
            tensors[THRESHOLDS] = theirs
    has_thresholds = THRESHOLDS in tensors
    fresh["thresholds"] = threshold_ladder(config.final_token_threshold, config.num_hidden_layers)

    with torch.device("meta"):  # no time or memory for weights that are replaced at once
        model = Model(config)
    state = {}
    for name, parameter in model.state_dict().items():
        names = tensor_names(name, config)
        if name in fresh and names[0] not in tensors:
            state[name] = fresh[name]
            continue
        wanted = (parameter.size(0) // len(names), *parameter.shape[1:])
        for part in names:
            if part not in tensors:
                raise InputError(f"{folder}: the tensor {part} is missing from the weights")
            if tuple(tensors[part].shape) != wanted:
                shape = tuple(tensors[part].shape)
                raise InputError(f"{folder}: the tensor {part} has shape {shape}, but config.json asks for {wanted}")
            if not tensors[part].is_floating_point():
                raise InputError(
                    f"{folder}: the tensor {part} is of type {tensors[part].dtype}, expected floating point"
                )
            if not tensors[part].isfinite().all():
                raise InputError(f"{folder}: the tensor {part} holds values that are not finite numbers")
        state[name] = torch.cat([tensors.pop(part).float() for part in names])
    unknown = sorted(name for name in tensors if not UNUSED.search(name))
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise InputError(f"{folder}: the tensor {unknown[0]}{more} is not part of a {config.model_type} classifier")
    model.load_state_dict(state, assign=True)
    model.requires_grad_(True).thresholds.requires_grad_(False)
    return Loaded(model.eval(), has_thresholds, notes)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside and renames, so that `path` is at every moment either the old file or the whole new one.

    Through a link, into the file that it names; into a device or a pipe directly. Raises: InputError.
    """
    for descriptor in (1, 2):  # a file that our output goes to, such as /dev/stdout may be, must not be replaced
        with contextlib.suppress(OSError):  # not there, or closed
            if path.is_file() and os.path.samestat(path.stat(), os.fstat(descriptor)):
                raise InputError(f"{path}: is the file that this program's output goes to; name another")
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            write(path)
            return
        place = path.resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(prefix=f".{place.name}.", dir=place.parent)
    except OSError as error:
        raise InputError(f"{path}: could not be written ({error})") from None
    os.close(handle)
    try:
        write(Path(beside))
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(beside, 0o666 & ~umask)  # mkstemp's files are private
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, place)
    except (OSError, SafetensorError) as error:  # a full disk, most of the time
        raise InputError(f"{path}: could not be written ({error}); what was there before is untouched") from None
    finally:
        Path(beside).unlink(missing_ok=True)


def save_model(folder: str | Path, model: Model) -> None:
    """Writes config.json and model.safetensors; `transformers` opens the folder as the dense model."""
    config, tensors = model.config, {}
    for name, tensor in model.state_dict().items():
        if name == "thresholds" and config.prune_mode != "absolute_threshold":
            continue
        names = tensor_names(name, config)
        tensors |= zip(names, (part.cpu().contiguous() for part in tensor.chunk(len(names))))
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_file(Path(folder) / "config.json", lambda path: path.write_text(text, encoding="utf-8"))
    write_file(Path(folder) / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
