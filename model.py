"""Learned Token Pruning (LTP) for RoBERTa-class encoders, in one file.

Paper: Kim et al., "Learned Token Pruning for Transformers", KDD 2022, https://arxiv.org/abs/2107.00910

The method. Self-attention already tells how much a token matters: in each layer LTP sums the attention probabilities
that a token receives from all queries, takes the mean over heads, divides by a length (see `importance`), and drops the
token when this importance is below the layer's threshold.
Later layers then work on a shorter sequence. The thresholds are learned in two stages. In the *soft* stage nothing is
dropped: a sigmoid mask, which has a gradient, multiplies each token's state, and a regulariser asks for small masks. In
the *hard* stage the thresholds are not learned any more, tokens below them are dropped, and the weights adapt.

Why it is fast. A batch is one flat run of tokens without padding. Dropping tokens is `x = x[survivors]`, and every
later matrix product is that much smaller, at any batch size, in training and in inference. Sequences meet nowhere but
in attention, where each one is laid on a row of a grid.

Legend. B sequences in a batch, T tokens in the batch (all sequences together, fewer after each drop), D hidden size,
H heads, d = D / H head size, F intermediate size, L layers, n length of a sequence, b sequences on one grid, l layer,
s importance score, θ_l threshold, m soft mask, τ temperature, (B, D) a shape. `keep[t] == True` means that token t
survives.

Departures from the authors' release:
- the first token (CLS, <s>) always survives, and its soft mask is 1: the classifier reads it;
- layers count from 1 in θ_l = θ_final · l / L, as the authors' README says (their code counts from 0);
- all thresholds are one vector of the model, saved with the weights as `ltp.thresholds`;
- the regulariser runs over real tokens only, and dropout never touches a score;
- soft masks may act on attention instead of states, which comes closer to dropping (see `Soft`);
- a classifier may also read the states of dropped tokens (`read_dropped`, see `Head`);
- top-k's rate is clamped at 0, not at 0.01.

Read from top to bottom: configuration, sequences in a flat run, pruning rules, pruners, attention, layer, encoder,
heads, FLOPs, Hugging Face folders.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import gelu, linear, pad, relu, scaled_dot_product_attention

# ----------------------------------------------------------------------------------------------------------------------
# Configuration

# Two families cover all model types. RoBERTa counts positions from pad + 1 and has its pooling layer in the classifier;
# BERT counts positions from 0 and has a pooler. I-BERT (in floating point) and LTP compute what RoBERTa does.
FAMILY = {
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "camembert": "roberta",
    "ibert": "roberta",
    "ltp": "roberta",
    "bert": "bert",
}
QUESTION_LENGTH = 384  # max_seq_length of a "span" head, where its config.json has none
CLASS_PREFIX = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert", "bert": "Bert"}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_new": lambda x: gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: gelu(x, approximate="tanh"),
    "relu": relu,
}
# A head answers once for a sequence, once for each token, or says for each token how likely an answer starts and ends
# there. Hugging Face's architecture names end like this.
ARCHITECTURES = {
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "span": "ForQuestionAnswering",
}


@dataclass(frozen=True)
class Config:
    """The keys of a Hugging Face config.json that this encoder uses, and the pruning settings."""

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
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")  # class names in id order; one label alone means regression
    # Pruning
    prune_mode: str | None = None  # in inference: "absolute_threshold", "topk", or None for the dense model
    final_token_threshold: float = 0.01  # θ_final, the last layer's threshold at the start of learning
    token_keep_rate: float = 0.2  # share of the tokens that top-k keeps in the last layer; negative is steeper
    keep_rates: list[float] | None = None  # (L,) of top-k, instead of the schedule of `topk_rates`
    score_norm: str = "max_length"  # N of the importance score: "max_length" (max_seq_length) or "length"
    max_seq_length: int = 128  # texts are cut to this many tokens
    protect_question: bool = False  # "span" heads: no token of the question is dropped
    read_dropped: bool = False  # "sequence" heads: also read the states of dropped tokens, see `Head`
    other: dict = field(default_factory=dict, repr=False)  # config.json as it was read; saving keeps its other keys

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

    @property
    def layer_keep_rates(self) -> list[float]:
        """Share of the original tokens that top-k keeps in each layer (L,)."""
        return self.keep_rates or topk_rates(self.token_keep_rate, self.num_hidden_layers)

    @classmethod
    def json_keys(cls) -> list[str]:
        """The fields that a config.json has under the same names."""
        return [name for name in cls.__dataclass_fields__ if name not in ("head", "labels", "other")]

    @classmethod
    def from_dict(cls, raw: dict) -> Config:
        """Reads the content of a config.json. It checks nothing."""
        values = {name: raw[name] for name in cls.json_keys() if raw.get(name) is not None}
        values.setdefault("pad_token_id", 1 if FAMILY[raw["model_type"]] == "roberta" else 0)
        architecture = (raw.get("architectures") or [""])[0]
        for head, ending in ARCHITECTURES.items():
            if architecture.endswith(ending):
                values["head"] = head
        id2label = raw.get("id2label") or {str(i): f"LABEL_{i}" for i in range(raw.get("num_labels", 2))}
        labels = tuple(str(id2label[str(i)]) for i in range(len(id2label)))
        config = cls(**values, labels=labels, other=dict(raw))
        if config.head != "span":
            return config
        # Questions have no class names, and come with as much of their context as fits.
        length = values.get("max_seq_length", min(QUESTION_LENGTH, config.max_tokens))
        return replace(config, labels=("start", "end"), max_seq_length=length)

    def to_dict(self) -> dict:
        """The config.json of this model: the keys that it was read with, brought up to date."""
        # Other libraries would look for I-BERT's quantization buffers, which a saved model does not have.
        model_type = "roberta" if self.model_type in ("ibert", "ltp") else self.model_type
        outdated = ("quant_mode", "force_dequant", "num_labels", "_name_or_path", "dtype", "torch_dtype")
        raw = {key: value for key, value in self.other.items() if key not in outdated}
        raw |= {name: getattr(self, name) for name in self.json_keys()}
        problem = "regression" if len(self.labels) == 1 else "single_label_classification"
        return raw | {
            "model_type": model_type,
            "architectures": [CLASS_PREFIX[model_type] + ARCHITECTURES[self.head]],
            "id2label": {str(i): name for i, name in enumerate(self.labels)},
            "label2id": {name: i for i, name in enumerate(self.labels)},
            "problem_type": problem if self.head == "sequence" else None,
        }


# ----------------------------------------------------------------------------------------------------------------------
# Sequences in a flat run of tokens


class Batch(NamedTuple):
    """B sequences of T tokens together, one sequence after the other."""

    token_ids: Tensor  # (T,)
    segment_ids: Tensor  # (T,)
    positions: Tensor  # (T,) of each token in its sequence, from 0
    lengths: Tensor  # (B,) at least 1 each
    question_lengths: Tensor  # (B,) tokens at the start that belong to the question, of heads that answer one; else 0

    def to(self, device: Any) -> Batch:
        return Batch(*(send(tensor, device) for tensor in self))


def send(x: Tensor, device: Any) -> Tensor:
    """A tensor on a device. From the host to a GPU it is copied while the program goes on."""
    if x.is_cuda or torch.device(device).type != "cuda":
        return x.to(device)  # on the way to the host, whoever reads it must wait
    return x.pin_memory().to(device, non_blocking=True)


def pack(
    token_ids: list[list[int]], segment_ids: list[list[int]] | None = None, question_lengths: list[int] | None = None
) -> Batch:
    """Packs B sequences of token ids. Segments and lengths of questions are 0 where none are given.

    >>> pack([[0, 7, 2], [0, 2]]).positions
    tensor([0, 1, 2, 0, 1])
    """
    flat = torch.tensor([i for ids in token_ids for i in ids])
    segments = torch.zeros_like(flat) if segment_ids is None else torch.tensor([i for ids in segment_ids for i in ids])
    positions = torch.tensor([position for ids in token_ids for position in range(len(ids))])
    lengths = torch.tensor([len(ids) for ids in token_ids])
    questions = torch.zeros_like(lengths) if question_lengths is None else torch.tensor(question_lengths)
    return Batch(flat, segments, positions, lengths, questions)


class Sequences:
    """How B sequences lie in a flat run of T tokens. A pass makes it once, and again when tokens were dropped."""

    # A grid of b sequences, the longest with n tokens, has b · n² attention probabilities a head. The first number
    # limits them; a longer sequence gets a grid of its own. b times the second limits those that belong to padding.
    # Large grids leave a CPU's cache; a GPU wants few kernels.
    CPU_LIMITS = (40_000, 500)
    GPU_LIMITS = (2**24, 2**16)

    def __init__(self, lengths: Tensor, original_lengths: Tensor | None = None):
        """lengths (B,) now; original_lengths (B,) before anything was dropped."""
        self.lengths = lengths
        self.original_lengths = lengths if original_lengths is None else original_lengths
        self.sizes: list[int] = lengths.tolist()  # waits for the device, the only time that a layout does
        if min(self.sizes) < 1:
            raise ValueError("a sequence has no tokens; a pruner must keep the protected ones")
        self.num_tokens = sum(self.sizes)

    @property
    def single(self) -> bool:
        """Whether each sequence has one token left."""
        return self.num_tokens == len(self.sizes)

    @cached_property
    def bounds(self) -> Tensor:
        """(B + 1,) the place of each sequence's first token, and T."""
        return pad(self.lengths, (1, 0)).cumsum(0)

    @cached_property
    def starts(self) -> Tensor:
        """(B,) the place of each sequence's first token."""
        return self.bounds[:-1]

    @cached_property
    def ids(self) -> Tensor:
        """(T,) the sequence that each token belongs to."""
        sequences = torch.arange(len(self.sizes), device=self.lengths.device)
        return sequences.repeat_interleave(self.lengths, output_size=self.num_tokens)

    @cached_property
    def positions(self) -> Tensor:
        """(T,) the place of each token in its sequence, from 0, counted over the tokens still there."""
        return torch.arange(self.num_tokens, device=self.lengths.device) - self.starts[self.ids]

    @cached_property
    def grids(self) -> list[Grid]:
        """The grids on which these sequences attend."""
        return make_grids(self)

    def lay(self, x: Tensor) -> list[Tensor]:
        """x (T, C) -> (b, n, C) on each grid."""
        parts = x.split([grid.num_tokens for grid in self.grids]) if len(self.grids) > 1 else [x]
        return [grid.lay(part) for grid, part in zip(self.grids, parts)]

    def flatten(self, grids: list[Tensor]) -> Tensor:
        """(b, n, ...) on each grid -> (T, ...)."""
        parts = [grid.flatten(x) for grid, x in zip(self.grids, grids)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def sum(self, values: Tensor) -> Tensor:
        """Sums over each sequence: (T,) -> (B,). Counts the True of a bool."""
        values = values.long() if values.dtype == torch.bool else values
        return values.new_zeros(self.lengths.size(0)).index_add_(0, self.ids, values)

    def drop(self, keep: Tensor, kept: Tensor) -> tuple[Sequences, Tensor | None]:
        """The layout of the survivors, and their places in this one; None where all survive.

        keep (T,) bool, kept (B,) its sums: knowing them, `nonzero` need not wait for the device.

        >>> seqs, keep = Sequences(torch.tensor([3, 2])), torch.tensor([True, False, True, True, False])
        >>> smaller, survivors = seqs.drop(keep, seqs.sum(keep))
        >>> smaller.sizes, survivors
        ([2, 1], tensor([0, 2, 3]))
        """
        smaller = type(self)(kept, self.original_lengths)
        if smaller.num_tokens == self.num_tokens:
            return self, None
        survivors = keep.nonzero_static(size=smaller.num_tokens).squeeze(1)
        smaller.ids = self.ids.index_select(0, survivors)  # known: they need not be made from the lengths
        return smaller, survivors


# ----------------------------------------------------------------------------------------------------------------------
# Pruning rules: what the project is about


def threshold_ladder(final_token_threshold: float, num_layers: int, power: float = 1.0) -> Tensor:
    """Thresholds that grow from layer to layer, θ_l = θ_final · (l / L)^power (L,), l from 1.

    With power 1 they are the start of learning and the manual baseline. A higher power spares the first layers.
    """
    return final_token_threshold * (torch.arange(1, num_layers + 1, dtype=torch.float32) / num_layers) ** power


def importance(received: Tensor, num_heads: int, N: int | Tensor) -> Tensor:
    """s(i) = (1/H) Σ_h (1/N) Σ_j A_h(j, i), equation 3 of the paper.

    received (T,): Σ_h Σ_j A_h(j, i), see `attend_and_score`. N: the maximum length (the release, whose θ, λ and τ are
    on this scale) or the original length of each token's sequence (T,) (the paper's formula). -> (T,)
    """
    return received / (num_heads * N)


def soft_mask(scores: Tensor, threshold: Tensor, temperature: float, protected: Tensor) -> Tensor:
    """m = σ((s − θ) / τ), equation 8 of the paper, and 1 at protected tokens. Scores and threshold get its gradient.

    scores (T,), threshold (), protected (T,) bool -> (T,) from 0 to 1.
    """
    return ((scores - threshold) / temperature).sigmoid().masked_fill(protected, 1.0)


def keep_by_threshold(scores: Tensor, threshold: Tensor, protected: Tensor) -> Tensor:
    """A token survives if s >= θ, equation 4 of the paper, or if it is protected.

    scores (T,), threshold (), protected (T,) bool -> keep (T,) bool.
    """
    return (scores >= threshold) | protected


def topk_rates(token_keep_rate: float, num_layers: int) -> list[float]:
    """Share of the original tokens that top-k keeps in each layer (L,): all in the first max(3, ⌈0.15 L⌉) layers, then
    linearly down to `token_keep_rate` in the last one, never below 0 (Wang et al., SpAtten, arXiv 2012.09852)."""
    dense = max(3, math.ceil(0.15 * num_layers))
    return [
        1.0 if l <= dense else max(0.0, 1.0 + (token_keep_rate - 1.0) * (l - dense) / (num_layers - dense))
        for l in range(1, num_layers + 1)
    ]


def topk_counts(original_lengths: Tensor, rate: float | Tensor) -> Tensor:
    """round(n · rate) tokens of each sequence, halves to even, at least one: (B,) -> (B,)."""
    return torch.round(original_lengths.double() * rate).long().clamp(min=1)


def keep_topk(scores: Tensor, seqs: Sequences, counts: Tensor, protected: Tensor) -> Tensor:
    """The `counts` (B,) best tokens of a sequence survive: protected ones, then the highest scores, ties to the left.

    scores (T,), protected (T,) bool, in a sequence no more than its count -> keep (T,) bool.

    >>> seqs, nobody = Sequences(torch.tensor([3, 2])), torch.zeros(5, dtype=torch.bool)
    >>> keep_topk(torch.tensor([0.1, 0.7, 0.2, 0.6, 0.4]), seqs, torch.tensor([2, 1]), nobody)
    tensor([False,  True,  True,  True, False])
    """
    best_first = scores.masked_fill(protected, math.inf).argsort(descending=True, stable=True)
    # A stable sort by sequence keeps that order inside of each: above 1, 2, 0 and then 3, 4.
    ranked = best_first[seqs.ids[best_first].argsort(stable=True)]
    keep = torch.empty_like(protected)
    keep[ranked] = seqs.positions < counts[seqs.ids]
    return keep


# ----------------------------------------------------------------------------------------------------------------------
# Pruners: the whole of what differs between the modes


class Alive(NamedTuple):
    """The T_l tokens that enter layer l."""

    tokens: Tensor  # (T_l,) which of the batch's T tokens each one is
    protected: Tensor  # (T_l,) bool: never dropped
    presence: Tensor  # (T_l,) how much of it is there: the product of its soft masks so far, 1 without soft masks

    def at(self, survivors: Tensor) -> Alive:
        return Alive(*(tensor.index_select(0, survivors) for tensor in self))


class Decision(NamedTuple):
    """What a pruner decides about the T_l tokens of a layer. It drops some, masks all, or does neither."""

    counts: Tensor  # (B,) tokens of each sequence that survive, the sums of keep; with soft masks Σ_t presence · m
    keep: Tensor | None = None  # (T_l,) bool: who survives; None: nobody is dropped
    mask: Tensor | None = None  # (T_l,) soft mask; None: no soft masks


class Pruner:
    """What decides who survives a layer. A rule overrides these two methods, in which layers count from 0.

    It must keep the protected tokens. One that in each layer drops every second token of those still there:

    >>> class EverySecond(Pruner):
    ...     def decide(self, l, scores, alive, seqs):
    ...         keep = alive.protected | (seqs.positions % 2 == 0)
    ...         return Decision(seqs.sum(keep), keep)
    """

    # Soft masks act on the attention that later layers pay to a token, not on its state. Every layer must then be
    # scored: only scored attention knows presences.
    masks_attention = False

    def needs_scores(self, l: int, seqs: Sequences) -> bool:
        """Whether layer l must score its tokens."""
        return False

    def decide(self, l: int, scores: Tensor | None, alive: Alive, seqs: Sequences) -> Decision:
        """Who survives layer l. scores (T_l,), or None where `needs_scores` says no. Here: everybody."""
        return Decision(seqs.lengths)


class Dense(Pruner):
    """Drops nothing."""


class Hard(Pruner):
    """Drops the tokens that score below their layer's threshold: LTP in inference and in its hard stage, and manual."""

    def __init__(self, thresholds: Tensor):
        """thresholds (L,)."""
        self.thresholds = thresholds
        self.can_drop = (thresholds > 0).tolist()  # waits for the device; no score is below 0

    def needs_scores(self, l: int, seqs: Sequences) -> bool:
        return self.can_drop[l] and not seqs.single

    def decide(self, l: int, scores: Tensor | None, alive: Alive, seqs: Sequences) -> Decision:
        if scores is None:  # nobody can be below the threshold, or the layer is not scored
            return Decision(seqs.lengths)
        keep = keep_by_threshold(scores, self.thresholds[l], alive.protected)
        return Decision(seqs.sum(keep), keep)


class TopK(Pruner):
    """Keeps a fixed share of each sequence's original tokens, those with the highest scores."""

    def __init__(self, rates: list[float]):
        """rates (L,): see `topk_rates`."""
        self.rates = rates

    def needs_scores(self, l: int, seqs: Sequences) -> bool:
        return self.rates[l] < 1 and not seqs.single

    def decide(self, l: int, scores: Tensor | None, alive: Alive, seqs: Sequences) -> Decision:
        counts = topk_counts(seqs.original_lengths, self.rates[l]).minimum(seqs.lengths)
        if scores is None:  # nobody is to be dropped, or it is a last layer of which only the first tokens are read
            return Decision(counts)
        counts = counts.maximum(seqs.sum(alive.protected))
        return Decision(counts, keep_topk(scores, seqs, counts, alive.protected))


class Soft(Pruner):
    """Drops nothing and gives each token a soft mask: the stage in which the thresholds are learned.

    The paper masks a layer's output, though dropping comes before the feed-forward block. A token whose state is 0 says
    nothing to others, as its key and value are the biases alone, yet it takes a part of their attention. The last
    layer's output needs no mask: the first token's is 1, and heads that answer for each token weigh it by its presence.
    So a classifier's last threshold gets the regulariser's gradient alone, and rises until the first token alone is
    left to count there.
    """

    def __init__(self, thresholds: Tensor, temperature: float, masks_attention: bool = False):
        """thresholds (L,), a parameter that wants a gradient. temperature: τ.

        masks_attention: a mask multiplies the presence of its token in the attention of all later layers, so that a
        mask of 0 is the same as dropping. Otherwise it multiplies the token's state, as in the paper.
        """
        self.thresholds, self.temperature, self.masks_attention = thresholds, temperature, masks_attention

    def needs_scores(self, l: int, seqs: Sequences) -> bool:
        return True

    def decide(self, l: int, scores: Tensor | None, alive: Alive, seqs: Sequences) -> Decision:
        mask = soft_mask(scores, self.thresholds[l], self.temperature, alive.protected)
        return Decision(seqs.sum(alive.presence * mask), mask=mask)


class UnscoredLastLayer(Pruner):
    """Decides as a model's own pruner does, but never scores a classifier's last layer: for training and timing.

    Only first tokens are read there, and they are never dropped. Scores change no answer: they tell how many tokens the
    rule keeps.
    """

    def __init__(self, model: Model):
        self.pruner = model.pruner()
        self.last = len(model.layers) - 1 if model.config.head == "sequence" else None

    def needs_scores(self, l: int, seqs: Sequences) -> bool:
        return l != self.last and self.pruner.needs_scores(l, seqs)

    def decide(self, l: int, scores: Tensor | None, alive: Alive, seqs: Sequences) -> Decision:
        return self.pruner.decide(l, scores, alive, seqs)


# ----------------------------------------------------------------------------------------------------------------------
# Attention


class Grid(NamedTuple):
    """b consecutive sequences laid on b rows of cells, each row as long as the longest sequence (n).

    The tensors are None where all sequences have one length: then the run of tokens is the grid, without padding.
    """

    sequences: slice  # which of the B
    num_tokens: int
    source: Tensor | None  # (b · n,) the token that stands in each cell; in padding, any token
    cells: Tensor | None  # (num_tokens,) the cell in which each token stands
    real: Tensor | None  # (b, n) bool, False in padding
    bias: Tensor | None  # (b, 1, 1, n) for the attention logits: 0, and -inf in padding
    query_rows: int | None  # so many queries of each sequence attend at a time; None (in an exported graph): all

    def lay(self, x: Tensor) -> Tensor:
        """x (num_tokens, C) -> (b, n, C)."""
        rows = self.sequences.stop - self.sequences.start
        return (x if self.source is None else x.index_select(0, self.source)).unflatten(0, (rows, -1))

    def flatten(self, x: Tensor) -> Tensor:
        """x (b, n, ...) -> (num_tokens, ...): the inverse of `lay`."""
        return x.flatten(0, 1) if self.cells is None else x.flatten(0, 1)[self.cells]


def attention_probabilities(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q · k / √d + bias), in float32 also of bf16 factors: rounded, it would keep other tokens.

    query (b, H, q, d), key (b, H, n, d), bias (b, 1, 1, n) -> (b, H, q, n).
    """
    b, H, n, d = key.shape
    beta = 0 if bias is None else 1  # with 0, baddbmm ignores its first argument
    query, key = query.flatten(0, 1).float(), key.flatten(0, 1).float()
    bias = query.new_zeros(1, 1, 1) if bias is None else bias.expand(b, H, 1, n).flatten(0, 1)
    with torch.autocast(query.device.type, enabled=False):
        logits = torch.baddbmm(bias, query, key.mT, alpha=d**-0.5, beta=beta)
    return logits.softmax(-1).unflatten(0, (b, H))


def attend_and_score(
    query: Tensor, key: Tensor, value: Tensor, grid: Grid, presence: Tensor | None, dropout: nn.Module
) -> tuple[Tensor, Tensor]:
    """Attention that writes its probabilities down, for some queries at a time, and sums what each token receives.

    query (b, H, q, d), key, value (b, H, n, d). presence (b, n): how much of each token is there; None: all. A key's
    probability is multiplied by its presence before the probabilities are made to sum to 1, and what a query gives
    counts in proportion to its own presence.
    Returns the context (b, H, q, d), and Σ_h Σ_j A_h(j, i) over the queries j that are no padding, before dropout
    (b, n) float32.
    """
    bias, weight = grid.bias, grid.real
    if presence is not None:  # a presence below 1e-6 counts as that: 0 has no logarithm
        log_presence = presence.clamp(min=1e-6).log()[:, None, None]
        bias = log_presence if bias is None else bias + log_presence
        weight = presence if weight is None else presence * weight
    chunks = [query] if grid.query_rows is None else query.split(grid.query_rows, 2)
    contexts, received, start = [], [], 0
    for rows in chunks:
        probabilities = attention_probabilities(rows, key, bias)
        over_heads = probabilities.sum(1)  # (b, q, n)
        if weight is not None:
            over_heads = over_heads * weight[:, start : start + rows.size(2), None]
        received.append(over_heads.sum(1))
        contexts.append(dropout(probabilities).to(value.dtype) @ value)
        start += rows.size(2)
    return torch.cat(contexts, 2) if len(contexts) > 1 else contexts[0], reduce(torch.add, received)


class SelfAttention(nn.Module):
    """Multi-head self-attention over a flat run of tokens. Query, key and value are one product."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, x: Tensor, seqs: Sequences, presence: Tensor | None = None, score: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x (T, D) -> attended (T, D), and if `score` the attention that each token receives (T,).

        presence (T,): see `attend_and_score`. It goes with `score`.
        """
        if seqs.single and not self.training:  # (in training, dropout acts on the one probability)
            return self.attend_alone(x, score)
        presences = [None] * len(seqs.grids)
        if presence is not None:
            presences = [on_grid.squeeze(2) for on_grid in seqs.lay(presence[:, None])]  # (b, n)
        contexts, received = [], []
        for grid, projected, present in zip(seqs.grids, seqs.lay(self.query_key_value(x)), presences):
            query, key, value = self.split_heads(projected, 3)
            if score:
                context, sums = attend_and_score(query, key, value, grid, present, self.dropout)
                received.append(sums)
            else:
                context = self.attend(query, key, value, grid)
            contexts.append(context.transpose(1, 2).flatten(2))  # (b, n, D)
        return self.output(seqs.flatten(contexts)), seqs.flatten(received) if score else None

    def attend_first(self, x: Tensor, seqs: Sequences) -> Tensor:
        """What the first token of each sequence reads: x (T, D) -> (B, D)."""
        if seqs.single and not self.training:
            return self.attend_alone(x, score=False)[0]
        D, weight, bias = x.size(1), self.query_key_value.weight, self.query_key_value.bias
        queries = linear(x.index_select(0, seqs.starts), weight[:D], bias[:D])  # (B, D)
        contexts = []
        for grid, projected in zip(seqs.grids, seqs.lay(linear(x, weight[D:], bias[D:]))):
            (query,) = self.split_heads(queries[grid.sequences, None], 1)  # (b, H, 1, d)
            key, value = self.split_heads(projected, 2)
            contexts.append(self.attend(query, key, value, grid).flatten(1))  # (b, D)
        return self.output(torch.cat(contexts))

    def split_heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """x (b, n, parts · D) -> `parts` times (b, H, n, d)."""
        return x.unflatten(2, (parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid) -> Tensor:
        """By the fused kernel: nobody needs the probabilities. With dropout, writing them down is faster on a CPU."""
        rate = self.dropout.p if self.training else 0.0
        if rate > 0 and not query.is_cuda:
            return attend_and_score(query, key, value, grid, None, self.dropout)[0]
        bias = None if grid.bias is None else grid.bias.to(query.dtype)
        return scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=rate)

    def attend_alone(self, x: Tensor, score: bool) -> tuple[Tensor, Tensor | None]:
        """Each of B tokens attends to itself alone, with probability 1 in each head: (B, D) -> (B, D) and (B,)."""
        D, weight, bias = x.size(1), self.query_key_value.weight, self.query_key_value.bias
        value = linear(x, weight[2 * D :], bias[2 * D :])
        return self.output(value), torch.full_like(x[:, 0], self.num_heads, dtype=torch.float32) if score else None


# ----------------------------------------------------------------------------------------------------------------------
# How grids are made. Nothing is pruned here: skip this at a first reading


def make_grids(seqs: Sequences) -> list[Grid]:
    """Grids for all sequences, from left to right, as few as the limits allow."""
    max_area, max_padding = seqs.GPU_LIMITS if seqs.lengths.is_cuda else seqs.CPU_LIMITS
    grids, first, longest, used = [], 0, 0, 0  # used: Σ n², the area that is no padding
    for i, n in enumerate(seqs.sizes):
        rows = i - first + 1
        area = rows * max(longest, n) ** 2
        if rows > 1 and (area > max_area or area - used - n * n > max_padding * rows):
            grids.append(make_grid(seqs, first, i, longest, max_area))
            first, longest, used = i, 0, 0
        longest, used = max(longest, n), used + n * n
    return [*grids, make_grid(seqs, first, len(seqs.sizes), longest, max_area)]


def make_grid(seqs: Sequences, first: int, stop: int, n: int, max_area: int) -> Grid:
    """The grid of the sequences `first` to `stop` - 1, of which the longest has n tokens."""
    rows, num_tokens, device = stop - first, sum(seqs.sizes[first:stop]), seqs.lengths.device
    query_rows = max(1, max_area // (rows * n))
    if rows * n == num_tokens:
        return Grid(slice(first, stop), num_tokens, None, None, None, None, query_rows)
    column, lengths = torch.arange(n, device=device), seqs.lengths[first:stop]
    starts = seqs.starts[first:stop] - seqs.starts[first]
    source = (starts[:, None] + column).clamp(max=num_tokens - 1).flatten()
    row = torch.arange(rows, device=device).repeat_interleave(lengths, output_size=num_tokens)  # of each token
    cells = row * n + torch.arange(num_tokens, device=device) - starts[row]
    real = column < lengths[:, None]
    bias = torch.zeros(real.shape, device=device).masked_fill(~real, -math.inf)[:, None, None]
    return Grid(slice(first, stop), num_tokens, source, cells, real, bias, query_rows)


# ----------------------------------------------------------------------------------------------------------------------
# Layer, embeddings, encoder


class Layer(nn.Module):
    """One post-norm Transformer layer in two blocks. Tokens are dropped between them."""

    def __init__(self, config: Config):
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(D, eps)
        self.intermediate = nn.Linear(D, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, D)
        self.output_norm = nn.LayerNorm(D, eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.activation = ACTIVATIONS[config.hidden_act]

    def attention_block(
        self, x: Tensor, seqs: Sequences, presence: Tensor | None = None, score: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x (T, D) -> (T, D), and if `score` the attention that each token receives (T,)."""
        attended, received = self.attention(x, seqs, presence, score)
        return self.add_norm(x, attended, self.attention_norm), received

    def first_attention_block(
        self, x: Tensor, seqs: Sequences, presence: Tensor | None = None, score: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The same of the first token of each sequence alone: (B, D). Scores need the queries of all tokens."""
        if score:
            x, received = self.attention_block(x, seqs, presence, score)
            return x.index_select(0, seqs.starts), received
        attended = self.attention.attend_first(x, seqs)
        return self.add_norm(x.index_select(0, seqs.starts), attended, self.attention_norm), None

    def feed_forward_block(self, x: Tensor) -> Tensor:
        """x (T, D) -> (T, D)."""
        return self.add_norm(x, self.output(self.activation(self.intermediate(x))), self.output_norm)

    def add_norm(self, x: Tensor, update: Tensor, norm: nn.Module) -> Tensor:
        """What a block returns: x, update (T, D) -> (T, D)."""
        return norm(x + self.dropout(update))


class Embeddings(nn.Module):
    """Word, position and segment embeddings, summed and normalised."""

    def __init__(self, config: Config):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.segment = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.padding = config.pad_token_id if config.family == "roberta" else None

    def forward(self, batch: Batch) -> Tensor:
        """-> (T, D)."""
        # A model with one segment embedding does not tell segments apart.
        segment_ids = batch.segment_ids if self.segment.num_embeddings > 1 else torch.zeros_like(batch.segment_ids)
        positions = batch.positions if self.padding is None else self.count_positions(batch)
        return self.dropout(
            self.norm(self.word(batch.token_ids) + self.segment(segment_ids) + self.position(positions))
        )

    def count_positions(self, batch: Batch) -> Tensor:
        """RoBERTa's rows of the position table (T,): from pad + 1 on.

        A text may spell a padding token out. It has the row `pad`, and the tokens after it count on without it.
        """
        counted = batch.token_ids != self.padding
        up_to_here = counted.cumsum(0)  # in the whole batch
        # Where each token's sequence begins, and the count before it.
        first = torch.arange(counted.size(0), device=counted.device) - batch.positions
        before = (up_to_here - counted.long())[first]
        return self.padding + counted * (up_to_here - before)


class Step(NamedTuple):
    """What one layer saw and decided."""

    tokens: Tensor  # (T_l,) which of the batch's T tokens entered the layer
    scores: Tensor | None  # (T_l,) their importance, where the pruner needs it
    decision: Decision


class Output(NamedTuple):
    """What the model returns. Counts and traces are read off the steps."""

    logits: Tensor  # (B, labels), or (T, labels) of a head that answers for each token, in the batch's order
    steps: list[Step]  # L of them

    @property
    def kept(self) -> Tensor:
        """(L, B) tokens of each sequence that survive each layer; with soft masks, sums of shares."""
        return torch.stack([step.decision.counts for step in self.steps])


class Model(nn.Module):
    """The packed, pruned encoder with its head."""

    linear_bits = 32  # of the factors of linear layers; an exported model may have fewer

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.head = Head(config) if config.head == "sequence" else TokenHead(config)
        ladder = threshold_ladder(config.final_token_threshold, config.num_hidden_layers)
        self.thresholds = nn.Parameter(ladder, requires_grad=False)  # soft training turns the gradient on

    def pruner(self) -> Pruner:
        """The pruner that the configuration names for inference."""
        if self.config.prune_mode == "absolute_threshold":
            return Hard(self.thresholds)
        if self.config.prune_mode == "topk":
            return TopK(self.config.layer_keep_rates)
        return Dense()

    def forward(self, batch: Batch, pruner: Pruner | None = None, layout: Callable = Sequences) -> Output:
        """Answers for a batch.

        pruner: default, the one of the configuration. layout: what makes Sequences of lengths (an exporter has
        another). A pass waits for the device once for its first layout, and once in each layer whose pruner decides who
        survives; a classifier's last layer does not wait. Making a `Hard` waits once.
        """
        pruner = self.pruner() if pruner is None else pruner
        seqs = whole = layout(batch.lengths)
        alive = self.all_tokens(batch, seqs)
        x = self.embeddings(batch)
        # The states of dropped tokens, for heads that read them.
        exits = torch.zeros_like(x) if self.config.head != "sequence" or self.config.read_dropped else None  # (T, D)
        steps = []
        classifier, last = self.config.head == "sequence", len(self.layers) - 1
        for l in range(last if classifier else last + 1):
            layer = self.layers[l]
            x, step = self.attend_and_decide(l, layer.attention_block, x, alive, seqs, pruner)
            decision = step.decision
            steps.append(step)
            if exits is not None:
                exits = add_dropped(exits, x, alive, decision)
            if decision.keep is not None:
                seqs, survivors = seqs.drop(decision.keep, decision.counts)
                if survivors is not None:  # a dropped token is in no product from here on
                    # x[survivors], whose gradient on a GPU would take a sort
                    x, alive = x.index_select(0, survivors), alive.at(survivors)
            x = layer.feed_forward_block(x)
            if decision.mask is not None:  # soft: nobody was dropped
                alive = alive._replace(presence=alive.presence * decision.mask)
                if l < last and not pruner.masks_attention:  # the last layer's output needs no mask, see `Soft`
                    x = x * decision.mask[:, None].to(x.dtype)
        if not classifier:  # what nobody dropped is added last
            return Output(self.head(add_exits(exits, x, alive, alive.presence)), steps)
        # A classifier reads the first tokens: its last layer computes no more than those, x (T_L, D) -> (B, D).
        layer = self.layers[last]
        x, step = self.attend_and_decide(last, layer.first_attention_block, x, alive, seqs, pruner)
        x = layer.feed_forward_block(x)
        means = None if exits is None else segment_means(exits, batch.segment_ids, whole)
        return Output(self.head(x, means), [*steps, step])

    def attend_and_decide(
        self, l: int, block: Callable, x: Tensor, alive: Alive, seqs: Sequences, pruner: Pruner
    ) -> tuple[Tensor, Step]:
        """An attention block of layer l, and what the pruner decides on its scores."""
        presence = alive.presence if pruner.masks_attention else None
        x, received = block(x, seqs, presence, score=pruner.needs_scores(l, seqs))
        scores = None if received is None else self.score(received, seqs)
        return x, Step(alive.tokens, scores, pruner.decide(l, scores, alive, seqs))

    def all_tokens(self, batch: Batch, seqs: Sequences) -> Alive:
        """Every token of the batch, the first of each sequence protected."""
        tokens = torch.arange(seqs.num_tokens, device=batch.token_ids.device)
        protected = torch.zeros_like(tokens, dtype=torch.bool).index_fill(0, seqs.starts, True)
        if self.config.head == "span" and self.config.protect_question:
            protected = protected | (batch.positions < batch.question_lengths[seqs.ids])
        return Alive(tokens, protected, torch.ones_like(tokens, dtype=torch.float32))

    def score(self, received: Tensor, seqs: Sequences) -> Tensor:
        """The importance of each token (T,), with the N that `score_norm` names."""
        by_length = self.config.score_norm == "length"
        N = seqs.original_lengths[seqs.ids] if by_length else self.config.max_seq_length
        return importance(received, self.config.num_attention_heads, N)

    @classmethod
    def load(cls, folder: str | Path) -> Model:
        """Reads the config.json and model.safetensors of a Hugging Face folder, its head included, for inference.

        It checks nothing, and knows the names of RoBERTa and BERT alone. A folder without thresholds gets
        `threshold_ladder`. Raises: OSError, KeyError.
        """
        config = Config.from_dict(json.loads(Path(folder, "config.json").read_text(encoding="utf-8")))
        tensors = load_file(Path(folder, "model.safetensors"))
        model = cls(config)
        state = model.state_dict()
        for name in state:
            if name != "thresholds" or THRESHOLDS in tensors:
                state[name] = torch.cat([tensors[part].float() for part in tensor_names(name, config)])
        model.load_state_dict(state)
        return model.eval()

    def save(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors. `transformers` opens the folder as the dense model."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.config.to_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        Path(folder, "config.json").write_text(text, encoding="utf-8")
        save_file(self.hub_tensors(), Path(folder, "model.safetensors"), metadata={"format": "pt"})

    def hub_tensors(self) -> dict[str, Tensor]:
        """The weights on the CPU under their Hugging Face names; the thresholds only where they prune."""
        tensors = {}
        for name, tensor in self.state_dict().items():
            if name != "thresholds" or self.config.prune_mode == "absolute_threshold":
                names = tensor_names(name, self.config)
                tensors |= zip(names, (part.cpu().contiguous() for part in tensor.chunk(len(names))))
        return tensors


def add_dropped(exits: Tensor, x: Tensor, alive: Alive, decision: Decision) -> Tensor:
    """Adds to exits (T, D) the state x (T_l, D) of each token times the share of it that this layer drops.

    Hard rules drop the whole of a token once, a soft mask 1 - m of what is left of it. With what remains after the last
    layer, its shares sum to 1.
    """
    if decision.mask is not None:
        dropped = alive.presence * (1 - decision.mask)
    elif decision.keep is not None:
        dropped = alive.presence * ~decision.keep
    else:
        return exits
    return add_exits(exits, x, alive, dropped)


def add_exits(exits: Tensor, x: Tensor, alive: Alive, share: Tensor) -> Tensor:
    """Adds to exits (T, D) the states x (T_l, D) times share (T_l,)."""
    return exits.index_add(0, alive.tokens, share[:, None].to(x.dtype) * x)


def segment_means(x: Tensor, segment_ids: Tensor, seqs: Sequences) -> Tensor:
    """The mean over the tokens of each of two segments: x (T, D), segment_ids (T,) -> (B, 2 D).

    Summed in float32: in bf16 a count would end at 256. A third segment counts as the second.
    """
    groups = 2 * seqs.ids + segment_ids.clamp(max=1)
    sums = torch.zeros(2 * seqs.lengths.size(0), x.size(1), device=x.device).index_add(0, groups, x.float())
    counts = sums.new_zeros(sums.size(0)).index_add(0, groups, sums.new_ones(groups.size(0)))
    return (sums / counts.clamp(min=1)[:, None]).view(-1, 2 * x.size(1)).to(x.dtype)


class Head(nn.Module):
    """Reads the first token's state: (B, D) -> logits (B, labels). BERT's pooler is the same dense layer.

    With `read_dropped` it adds a linear map of what dropped tokens had become: their states when they left, summed in
    each of two segments and divided by the number of all its tokens. The map starts at 0. Tokens that nobody dropped
    before the last layer are not in the sums: where nothing is dropped, the map adds nothing.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, len(config.labels))
        if config.read_dropped:
            self.dropped = nn.Parameter(torch.zeros(config.hidden_size, 2 * config.hidden_size))
        rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(rate)
        self.input_dropout = nn.Dropout(rate if config.family == "roberta" else 0.0)

    def forward(self, x: Tensor, means: Tensor | None = None) -> Tensor:
        """means (B, 2 D): of the dropped tokens' states, see `segment_means`."""
        if means is not None:
            x = x + linear(means, self.dropped)
        return self.output(self.dropout(torch.tanh(self.dense(self.input_dropout(x)))))


class TokenHead(nn.Module):
    """Reads every token's state: (T, D) -> logits (T, labels)."""

    def __init__(self, config: Config):
        super().__init__()
        rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(rate if config.head == "token" else 0.0)
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
    """Multiply-accumulates of each layer and sequence, 4 D² n_in + 2 D n_in² + 2 D F n_out; 2 FLOPs each.

    lengths (B,), kept (L, B) tokens surviving each layer -> (L, B). This is the formula of the authors' release with
    the true feed-forward width. It follows the pruning rule alone: embeddings, head and the last layer's saving do not
    count. The dense model's FLOPs are those with `kept` equal to `lengths`. Soft counts give a differentiable result.
    """
    D, F = config.hidden_size, config.intermediate_size
    entering = torch.cat([lengths[None], kept[:-1]])
    return 4 * D * D * entering + 2 * D * entering**2 + 2 * D * F * kept


def macs(config: Config, lengths: Tensor, kept: Tensor) -> Tensor:
    """`layer_macs` summed over the layers: (B,)."""
    return layer_macs(config, lengths, kept).sum(0)


def bit_operations(config: Config, lengths: Tensor, kept: Tensor, linear_bits: int = 32) -> Tensor:
    """The paper's BOPs of each sequence (B,): multiply-accumulates times the bits of both factors.

    linear_bits: of the factors of linear layers. Attention multiplies activations by each other, in float32.
    """
    entering = torch.cat([lengths[None], kept[:-1]])
    attention = (2 * config.hidden_size * entering**2).sum(0)
    return linear_bits**2 * (macs(config, lengths, kept) - attention) + 32**2 * attention


def last_layer_saving(config: Config, entering: Tensor, kept: Tensor) -> Tensor:
    """Multiply-accumulates of each sequence that `macs` counts and a classifier's last layer does not do.

    entering, kept (B,): tokens before and after the last layer's pruning. One query, one output projection and one
    feed-forward pass remain, where the layer is not scored. A head that answers for each token saves nothing.
    """
    if config.head != "sequence":
        return torch.zeros_like(kept)
    D, F = config.hidden_size, config.intermediate_size
    keys_and_values, one_query, feed_forward = 2 * D * D * entering, 2 * D * D + 2 * D * entering, 2 * D * F
    return layer_macs(config, entering, kept[None])[0] - keys_and_values - one_query - feed_forward


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face names

THRESHOLDS = "ltp.thresholds"
OUR_NAMES = {"thresholds": THRESHOLDS, "head.dropped": "ltp.dropped"}
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


def tensor_names(name: str, config: Config) -> list[str]:
    """The Hugging Face name of one of our parameters; three names for the fused query, key and value.

    >>> tensor_names("layers.0.attention.query_key_value.bias", Config(9, 2, 2, 1, 3, 20, "bert"))[1]
    'bert.encoder.layer.0.attention.self.key.bias'
    """
    if name in OUR_NAMES:
        return [OUR_NAMES[name]]
    path, kind = name.rsplit(".", 1)
    group, rest = path.split(".", 1)
    if group == "head":
        return [f"{head_names(config)[rest]}.{kind}"]
    if group == "embeddings":
        return [f"{config.family}.embeddings.{EMBEDDING_NAMES[rest]}.{kind}"]
    number, rest = rest.split(".", 1)
    theirs = f"{config.family}.encoder.layer.{number}.{LAYER_NAMES[rest]}.{kind}"
    parts = ("query", "key", "value")
    return [theirs.replace("{query,key,value}", part) for part in parts] if "{" in theirs else [theirs]
