"""Attention without a grid: its arithmetic on a CPU, by a kernel of plain operations."""

import pytest
import torch
from small_models import pruning_model, random_sequences
from torch import Tensor

from model import Dense, Hard, Sequences, TopK, pack
from support.cuda import FlatAttention, received_attention


def plain(query: Tensor, key: Tensor, value: Tensor, starts, longest, scale) -> tuple[Tensor, Tensor]:
    """Products of the given numbers, summed in float32, a sequence at a time."""
    contexts, sums = [], []
    for a, b, c, d in zip(starts[0], starts[0][1:], starts[1], starts[1][1:]):
        assert b - a <= longest[0] and d - c <= longest[1]
        logits = torch.einsum("qhd,khd->hqk", query[a:b].float(), key[c:d].float()) * scale
        contexts.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), value[c:d].float()).to(value.dtype))
        sums.append(logits.logsumexp(-1).T)
    return torch.cat(contexts), torch.cat(sums)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-6), (torch.float32, 1e-5)])
def test_received_attention_is_the_sum_of_the_matrix(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 7, 200, 33])
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    query, key = (3 * torch.randn(int(lengths.sum()), 4, 16, generator=generator) for _ in range(2))
    query, key = query.to(dtype), key.to(dtype)
    _, lse = plain(query, key, key, (starts, starts), (200, 200), 0.25)
    received = received_attention(query, key, lse, starts, 200, plain)
    for a, b in zip(starts, starts[1:]):
        matrix = (torch.einsum("qhd,khd->hqk", query[a:b].double(), key[a:b].double()) / 4).softmax(-1)
        torch.testing.assert_close(received[a:b].double(), matrix.sum((0, 1)), rtol=tolerance * 10, atol=1e-7)
        assert received[a:b].sum() == pytest.approx(4 * int(b - a), rel=1e-5)


@pytest.mark.parametrize("head", ["sequence", "token"])
@pytest.mark.parametrize("mode", ["dense", "hard", "topk"])
def test_a_model_answers_as_with_grids(mode, head, monkeypatch):
    model, sequences = pruning_model(head=head, token_keep_rate=-1.0), random_sequences(9)
    pruner = {"dense": Dense(), "hard": Hard(model.thresholds), "topk": TopK([1.0, 0.8, 0.6, 0.5, 0.3])}[mode]
    batch = pack(sequences)
    with torch.inference_mode():
        expected = model(batch, pruner)
    monkeypatch.setattr(FlatAttention, "kernel", staticmethod(plain))
    monkeypatch.setattr(
        FlatAttention, "forward", lambda self, x, seqs, presence, *rest: self.attend_flat(x, seqs, *rest)
    )
    for layer in model.layers:
        layer.attention.__class__ = FlatAttention
    with torch.inference_mode():
        output = model(batch, pruner)
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=0)
    assert torch.equal(output.kept, expected.kept)
    assert mode == "dense" or output.kept[-1].sum() < Sequences(batch.lengths).num_tokens / 2


def test_the_context_has_a_gradient_where_tokens_are_dropped(monkeypatch):
    model, batch = pruning_model(), pack(random_sequences(5))
    model.requires_grad_(True)
    grads = []
    for flat in (False, True):
        model.zero_grad()
        if flat:
            monkeypatch.setattr(FlatAttention, "kernel", staticmethod(plain))
            monkeypatch.setattr(
                FlatAttention, "forward", lambda self, x, seqs, p, *rest: self.attend_flat(x, seqs, *rest)
            )
            for layer in model.layers:
                layer.attention.__class__ = FlatAttention
        model(batch, Hard(model.thresholds)).logits.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-3)
