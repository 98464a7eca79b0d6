"""Attention on a GPU in half precision without a grid: sequences of any lengths lie one behind the other, unpadded.

The kernel writes no probability down. The attention that a token receives still comes from it. Let lse(j) be the
log-sum-exp of query j's logits. Token i receives, in a head,

    Σ_j exp(q_j · k_i / √d − lse(j)).

That is the exponential of a log-sum-exp, too: of the transposed attention, in which keys ask and queries answer, with
−lse(j) added to the logits. The kernel adds nothing, but a product can: three more columns of the "queries" hold 1,
and those of the "keys" hold −lse(j) √d, cut into three bf16 numbers that sum to it but for a part in ten million.

The tests check the arithmetic on a CPU, with a kernel of plain operations; those marked `cuda` run the real one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from model import Model, SelfAttention, Sequences

PARTS, COLUMNS = 3, 8  # pieces of an lse; columns for them, since the kernel wants head sizes that are multiples of 8
# (query, key, value, starts of each sequence's queries and keys, longest of each, scale) -> context, lse; see `flash`
Kernel = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], tuple[int, int], float], tuple[Tensor, Tensor]]


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Torch's kernel for sequences of different lengths.

    query (Q, H, d), key, value (T, H, d); starts: of each sequence's queries and keys, and the end (B + 1,) int32;
    longest: sequence of queries and of keys -> context (Q, H, d), log-sum-exp of each query's logits (Q, H) float32.
    """
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    context, lse = varlen_attn(query, key, value, *starts, *longest, return_aux=AuxRequest(lse=True), scale=scale)
    return context, lse if lse.size(0) == query.size(0) else lse.T


def received_attention(
    query: Tensor, key: Tensor, lse: Tensor, starts: Tensor, longest: int, kernel: Kernel = flash
) -> Tensor:
    """Σ_h Σ_j A_h(j, i), the attention that each token receives: (T,) float32.

    query, key (T, H, d) in half precision; lse (T, H) float32 of the attention. Without gradient.
    """
    scale = query.size(-1) ** -0.5
    rest, parts = -lse.float() / scale, []
    for _ in range(PARTS):
        parts.append(rest.to(query.dtype))
        rest = rest - parts[-1].float()
    asking = torch.cat([pad(key, (0, PARTS), value=1.0), key.new_zeros(*key.shape[:2], COLUMNS - PARTS)], 2)
    answering = torch.cat([query, torch.stack(parts, 2), query.new_zeros(*query.shape[:2], COLUMNS - PARTS)], 2)
    _, sums = kernel(asking, answering, answering, (starts, starts), (longest, longest), scale)
    return sums.exp().sum(1)


class FlatAttention(SelfAttention):
    """Self-attention whose sequences lie one behind the other, where its kernel can; otherwise on grids.

    It cannot in float32, with dropout, or where soft masks need a gradient of the scores.
    """

    kernel: Kernel = staticmethod(flash)
    learns_scores = False  # whether scores get a gradient: soft training

    def forward(
        self, x: Tensor, seqs: Sequences, presence: Tensor | None, score: bool, first_only: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See `SelfAttention.forward`."""
        half = x.is_cuda and torch.is_autocast_enabled("cuda")
        if not half or presence is not None or self.training and (self.dropout.p > 0 or score and self.learns_scores):
            return super().forward(x, seqs, presence, score, first_only)
        return self.attend_flat(x, seqs, score, first_only)

    def attend_flat(self, x: Tensor, seqs: Sequences, score: bool, first_only: bool) -> tuple[Tensor, Tensor | None]:
        """Without presence: as `SelfAttention.forward`."""
        starts, longest = pad(seqs.lengths.cumsum(0), (1, 0)).int(), max(seqs.sizes)
        query, key, value = self.query_key_value(x).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        query_starts, most = starts, longest
        if first_only and not score:
            query, most = query[seqs.starts], 1
            query_starts = torch.arange(len(seqs.sizes) + 1, dtype=torch.int32, device=x.device)
        scale = query.size(-1) ** -0.5
        context, lse = self.kernel(query, key, value, (query_starts, starts), (most, longest), scale)
        received = None
        if score:
            with torch.no_grad():
                received = received_attention(query, key, lse, starts, longest, self.kernel)
            context = context[seqs.starts] if first_only else context
        return self.output(context.flatten(1)), received


def use_flat_attention(model: Model, learns_scores: bool = False) -> Model:
    """Lets a model on a GPU attend without grids, where torch has the kernel (2.11 or later). Returns the model.

    learns_scores: soft training, whose masks need the gradient of the scores.
    """
    try:
        import torch.nn.attention.varlen  # noqa: F401
    except ImportError:
        return model
    if next(model.parameters()).is_cuda:
        for layer in model.layers:
            layer.attention.__class__ = FlatAttention
            layer.attention.learns_scores = learns_scores
    return model
