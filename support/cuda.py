"""Models on a GPU: attention in bf16 without a grid, fewer shapes, and fewer kernels.

Sequences of any lengths lie one behind the other, unpadded. The kernel of attention writes no probability down, and
returns the log-sum-exp lse(j) of each query's logits. With it, a second kernel (kernels.py) sums the attention that a
token receives in a head:

    r(i) = Σ_j exp(q_j · k_i / √d − lse(j)).

Soft training needs the gradient of r. Let g(i) be the gradient of the loss by r(i). Then Σ_i g(i) r(i) is the sum of
what an attention with the values g returns, and has its gradient.

The kernel of attention adds nothing to its logits, but a product can. The presence of soft masks enters as three more
columns: those of the queries hold 1, and those of the keys its logarithm, cut into three bf16 numbers that sum to it
but for a part in ten million.

The tests check the arithmetic on a CPU, with kernels of plain operations; those marked `cuda` run the real ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.functional import pad

from model import Layer, Model, SelfAttention, Sequences

PARTS, COLUMNS = 3, 8  # pieces of a number; columns for them: the kernel wants head sizes that are multiples of 8
LARGEST_HEAD = 248  # with those columns, as wide as the kernel takes it
MOST_SEQUENCES = 2**16 - 1  # a kernel starts blocks for each of them, and CUDA takes no more along that axis
FEWEST_ROWS, MOST_ROWS = 8, 2**16  # of a product that is rounded up


class Spans(NamedTuple):
    """Where the sequences of some tokens lie."""

    starts: Tensor  # (B + 1,) int32: of each sequence, and the end
    longest: int


class Kernels(NamedTuple):
    """`flash` and those of kernels.py, or what tests put in their place."""

    attention: Callable[[Tensor, Tensor, Tensor, Spans, Spans, float, float], tuple[Tensor, Tensor]]
    received: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, int], Tensor]
    add_norm: Callable[[Tensor, Tensor, nn.LayerNorm], Tensor]


def flash(
    query: Tensor, key: Tensor, value: Tensor, queries: Spans, keys: Spans, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """Torch's kernel for sequences of different lengths.

    query (Q, H, d), key, value (T, H, d) in bf16 -> context (Q, H, d), with a gradient; log-sum-exp of each query's
    logits, before dropout (Q, H) float32, without.
    """
    # torch.nn.attention.varlen is the public way to this operation. It has no dropout, and takes longer to call.
    spans = (queries.starts, keys.starts, queries.longest, keys.longest)
    context, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, *spans, dropout, False, False, scale=scale
    )
    return context, lse.T


def split(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (T, H) float32 -> COLUMNS numbers of a smaller type that sum to it (T, H, COLUMNS)."""
    parts, rest = [], x
    for _ in range(PARTS):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].float()
    return pad(torch.stack(parts, 2), (0, COLUMNS - PARTS))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Spans,
    keys: Spans,
    presence: Tensor | None,
    kernels: Kernels,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention in which a key's probability is multiplied by its token's presence (T,) before they sum to 1.

    query (Q, H, d), key, value (T, H, d) -> context (Q, H, d), log-sum-exps (Q, H) float32.
    """
    scale, d = query.size(-1) ** -0.5, query.size(-1)
    if presence is None:
        return kernels.attention(query, key, value, queries, keys, scale, dropout)
    bias = (presence.log() / scale)[:, None].expand(key.shape[:2])
    key, query = torch.cat([key, split(bias, key.dtype)], 2), pad(query, (0, COLUMNS), value=1.0)
    context, lse = kernels.attention(query, key, pad(value, (0, COLUMNS)), queries, keys, scale, dropout)
    return context[..., :d], lse


class ReceivedAttention(torch.autograd.Function):
    """Σ_h Σ_j w_j A_h(j, i), the attention that each token receives, w its presence: (T,) float32.

    query, key (T, H, d) in bf16; presence (T,) float32, or None; lse (T, H) float32 of the attention.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, presence: Tensor | None, lse: Tensor, tokens: Spans, kernels: Kernels
    ) -> Tensor:
        ctx.save_for_backward(query, key, presence)
        ctx.tokens, ctx.kernels = tokens, kernels
        received = kernels.received(query, key, presence, lse, *tokens)
        return received if presence is None else received * presence

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [None if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors]
        query, key, presence = inputs
        with torch.enable_grad():
            values = pad(gradient[:, None, None].to(key.dtype).expand(*key.shape[:2], 1), (0, key.size(2) - 1))
            told, _ = attend(query, key, values, ctx.tokens, ctx.tokens, presence, ctx.kernels)
            told = told[..., 0].float().sum(1)
            total = (told if presence is None else told * presence).sum()
        gradients = iter(torch.autograd.grad(total, [x for x in inputs if x is not None]))
        return *(None if x is None else next(gradients) for x in inputs), None, None, None


class FlatAttention(SelfAttention):
    """Self-attention whose sequences lie one behind the other in bf16, and on grids otherwise."""

    kernels: Kernels

    def forward(
        self, x: Tensor, seqs: Sequences, presence: Tensor | None = None, score: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """See `SelfAttention.forward`."""
        if self.takes_grids(x, seqs):
            return super().forward(x, seqs, presence, score)
        tokens = self.spans(seqs)
        query, key, value = self.split(x)
        presence = None if presence is None else presence.clamp(min=1e-6)  # 0 has no logarithm
        context, lse = attend(query, key, value, tokens, tokens, presence, self.kernels, self.dropout_rate)
        received = ReceivedAttention.apply(query, key, presence, lse, tokens, self.kernels) if score else None
        return self.output(context.flatten(1)), received

    def attend_first(self, x: Tensor, seqs: Sequences) -> Tensor:
        """See `SelfAttention.attend_first`."""
        if self.takes_grids(x, seqs):
            return super().attend_first(x, seqs)
        query, key, value = self.split(x)
        firsts = Spans(torch.arange(len(seqs.sizes) + 1, dtype=torch.int32, device=x.device), 1)
        query = query.index_select(0, seqs.starts)
        context, _ = attend(query, key, value, firsts, self.spans(seqs), None, self.kernels, self.dropout_rate)
        return self.output(context.flatten(1))

    def takes_grids(self, x: Tensor, seqs: Sequences) -> bool:
        """Whether the kernels have nothing to do (not in bf16, or one token alone), or cannot do it."""
        half = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cuda")
        return not half or len(seqs.sizes) > MOST_SEQUENCES or (seqs.single and not self.training)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (T, D) -> query, key, value, (T, H, d) each."""
        return self.query_key_value(x).unflatten(1, (3, self.num_heads, -1)).unbind(1)

    @staticmethod
    def spans(seqs: Sequences) -> Spans:
        return Spans(seqs.bounds.int(), max(seqs.sizes))

    @property
    def dropout_rate(self) -> float:
        return self.dropout.p if self.training else 0.0


class RoundedLinear(nn.Linear):
    """A linear layer that adds rows of zeros up to one of 16 numbers between each power of 2 and the next.

    cuBLAS searches for an algorithm whenever it meets a new shape, and pruning makes new numbers of rows in every layer
    of every batch. The search takes longer than the product, but for the largest ones.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (T, in) -> (T, out)."""
        rows = len(x)
        more = -rows % max(FEWEST_ROWS, 1 << max(0, rows.bit_length() - 5))
        if more == 0 or rows > MOST_ROWS or not x.is_cuda:
            return super().forward(x)
        x = x.to(torch.get_autocast_dtype("cuda")) if torch.is_autocast_enabled("cuda") else x
        return super().forward(torch.cat([x, x.new_zeros(more, x.size(1))]))[:rows]


class FusedLayer(Layer):
    """A layer that adds and normalises in one kernel, where all is in bf16 and nobody asks for a gradient."""

    kernels: Kernels

    def add_norm(self, x: Tensor, update: Tensor, norm: nn.LayerNorm) -> Tensor:
        """See `Layer.add_norm`."""
        if x.dtype != torch.bfloat16 or self.training or torch.is_grad_enabled():
            return super().add_norm(x, update, norm)
        return self.kernels.add_norm(x, update, norm)


def use_gpu(model: Model, precision: str) -> Model:
    """Lets a model on a GPU round the rows of its products, and in "bf16" use the kernels of this file. Returns it.

    Grids stay where the kernels do not take the size of its heads, or do not run. "fp32" does not look for them.
    """
    if not next(model.parameters()).is_cuda:
        return model
    for part in model.layers.modules():
        if type(part) is nn.Linear:
            part.__class__ = RoundedLinear
    head = model.config.hidden_size // model.config.num_attention_heads
    kernels = find_kernels() if precision == "bf16" and head % 8 == 0 and head <= LARGEST_HEAD else None
    for layer in model.layers if kernels else ():
        layer.__class__, layer.kernels = FusedLayer, kernels
        layer.attention.__class__, layer.attention.kernels = FlatAttention, kernels
    return model


@cache
def find_kernels(device: str = "cuda") -> Kernels | None:
    """The kernels, after a first run; None, and a warning, where they do not run.

    triton compiles at the first run, and needs a C compiler and Python's headers for it. The kernel of attention needs
    a GPU of compute capability 8.
    """
    query = torch.zeros(1, 1, 16, dtype=torch.bfloat16, device=device)
    tokens = Spans(torch.tensor([0, 1], dtype=torch.int32, device=device), 1)
    try:
        from support import kernels

        _, lse = flash(query, query, query, tokens, tokens, 1.0, 0.0)
        kernels.received_attention(query, query, None, lse, *tokens)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each library has its own: no module, no compiler, no such GPU
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"attention takes padded grids, which are slower, since its kernels do not run here ({reason})")
        return None
    return Kernels(flash, kernels.received_attention, kernels.add_norm)
