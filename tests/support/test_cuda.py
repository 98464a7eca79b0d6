"""Attention without a grid: its arithmetic on a CPU, by kernels of plain operations, and the real one interpreted."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from small_models import SMALL, pruning_model, random_sequences
from torch import Tensor

from model import Dense, Hard, Sequences, Soft, TopK, pack
from support.cuda import FlatAttention, FusedLayer, Kernels, ReceivedAttention, Spans, attend, find_kernels


def plain(query: Tensor, key: Tensor, value: Tensor, queries: Spans, keys: Spans, scale, dropout):
    """Products of the given numbers, summed in float32, a sequence at a time."""
    contexts, sums = [], []
    for a, b, c, d in zip(queries.starts, queries.starts[1:], keys.starts, keys.starts[1:]):
        assert b - a <= queries.longest and d - c <= keys.longest and dropout == 0
        logits = torch.einsum("qhd,khd->hqk", query[a:b].float(), key[c:d].float()) * scale
        contexts.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), value[c:d].float()).to(value.dtype))
        sums.append(logits.logsumexp(-1).T)
    return torch.cat(contexts), torch.cat(sums).detach()


def plain_sums(query, key, presence, lse, starts, longest) -> Tensor:
    """What `received_attention` computes."""
    sums, presence = [], torch.ones(len(query)) if presence is None else presence
    for a, b in zip(starts, starts[1:]):
        logits = torch.einsum("qhd,khd->hqk", query[a:b].float(), key[a:b].float()) * query.size(2) ** -0.5
        sums.append(((logits - lse[a:b].T[:, :, None]).exp() * presence[a:b, None]).sum((0, 1)))
    return torch.cat(sums)


def plain_add_norm(x: Tensor, update: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    return norm(x + update)


PLAIN = Kernels(plain, plain_sums, plain_add_norm)


def some_heads(dtype: torch.dtype) -> tuple[Spans, Tensor, Tensor, Tensor]:
    """Four sequences: where they lie, query, key (T, 4, 16) and presence (T,)."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 7, 200, 33])
    spans = Spans(torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(), 200)
    query, key = (2 * torch.randn(int(lengths.sum()), 4, 16, generator=generator) for _ in range(2))
    return spans, query.to(dtype), key.to(dtype), torch.rand(query.size(0), generator=generator) ** 4 + 1e-6


def matrix_sums(spans: Spans, query: Tensor, key: Tensor, presence: Tensor | None) -> Tensor:
    """What each token receives, by the probabilities themselves."""
    presence = torch.ones(len(query)) if presence is None else presence
    sums = []
    for a, b in zip(spans.starts, spans.starts[1:]):
        logits = torch.einsum("qhd,khd->hqk", query[a:b].double(), key[a:b].double()) / 4
        probabilities = (logits + presence[a:b].double().log()).softmax(-1)
        sums.append((probabilities * presence[a:b, None]).sum((0, 1)))
    return torch.cat(sums)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_received_attention_is_the_sum_of_the_matrix(dtype, masked):
    spans, query, key, presence = some_heads(dtype)
    presence = presence if masked else None
    _, lse = attend(query, key, key, spans, spans, presence, PLAIN)
    received = ReceivedAttention.apply(query, key, presence, lse, spans, PLAIN)
    torch.testing.assert_close(received.double(), matrix_sums(spans, query, key, presence), rtol=2e-5, atol=1e-7)
    if not masked:
        assert received[1:8].sum() == pytest.approx(4 * 7, rel=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float32, 1e-5)])
def test_received_attention_has_the_gradient_of_the_matrix(dtype, tolerance, masked):
    spans, query, key, presence = some_heads(dtype)
    inputs = [x.requires_grad_() for x in (query, key, *([presence] if masked else []))]
    weights = torch.randn(len(query), generator=torch.Generator().manual_seed(1))
    _, lse = attend(query, key, key, spans, spans, presence if masked else None, PLAIN)
    received = ReceivedAttention.apply(query, key, presence if masked else None, lse, spans, PLAIN)
    ours = torch.autograd.grad((received * weights).sum(), inputs)
    sums = matrix_sums(spans, query, key, presence if masked else None)
    theirs = torch.autograd.grad((sums * weights).sum(), inputs)
    for one, other in zip(ours, theirs):
        assert (one - other).norm() < tolerance * other.norm()


def attend_without_grids(model, monkeypatch):
    """Lets a model on the CPU attend without grids."""
    monkeypatch.setattr(FlatAttention, "takes_grids", lambda self, x, seqs: False)
    for layer in model.layers:
        layer.__class__, layer.kernels = FusedLayer, PLAIN
        layer.attention.__class__, layer.attention.kernels = FlatAttention, PLAIN


@pytest.mark.parametrize("head", ["sequence", "token"])
@pytest.mark.parametrize("mode", ["dense", "hard", "topk"])
def test_a_model_answers_as_with_grids(mode, head, monkeypatch):
    model, sequences = pruning_model(head=head, token_keep_rate=-1.0), random_sequences(9)
    pruner = {"dense": Dense(), "hard": Hard(model.thresholds), "topk": TopK([1.0, 0.8, 0.6, 0.5, 0.3])}[mode]
    batch = pack(sequences)
    with torch.inference_mode():
        expected = model(batch, pruner)
    attend_without_grids(model, monkeypatch)
    with torch.inference_mode():
        output = model(batch, pruner)
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=0)
    assert torch.equal(output.kept, expected.kept)
    assert mode == "dense" or output.kept[-1].sum() < Sequences(batch.lengths).num_tokens / 2


@pytest.mark.parametrize(
    "dtype, training, gradient, fused",
    [
        (torch.bfloat16, False, False, True),
        (torch.bfloat16, True, False, False),  # dropout acts on the update
        (torch.bfloat16, False, True, False),
        (torch.float32, False, False, False),
    ],
)
def test_one_kernel_adds_and_normalises_in_bf16_inference_alone(dtype, training, gradient, fused):
    layer, calls = FusedLayer(SMALL).to(dtype).train(training), []
    layer.kernels = PLAIN._replace(add_norm=lambda *inputs: calls.append(1) or plain_add_norm(*inputs))
    with torch.set_grad_enabled(gradient):
        layer.feed_forward_block(torch.zeros(3, SMALL.hidden_size, dtype=dtype))
    assert len(calls) == fused


@pytest.mark.parametrize("mode", ["hard", "soft", "soft on attention"])
@pytest.mark.parametrize("head", ["sequence", "token"])
def test_gradients_are_those_with_grids(mode, head, monkeypatch):
    model, batch = pruning_model(head=head), pack(random_sequences(5))
    model.requires_grad_(True)
    pruner = Hard(model.thresholds) if mode == "hard" else Soft(model.thresholds, 1e-3, mode == "soft on attention")
    grads = []
    for flat in (False, True):
        model.zero_grad()
        if flat:
            attend_without_grids(model, monkeypatch)
        output = model(batch, pruner)
        (output.logits.square().sum() + output.kept.double().sum()).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert mode == "hard" or grads[0]["thresholds"].abs().min() > 0
    for name, gradient in grads[0].items():
        if not name.endswith("query_key_value.bias"):  # a key's bias has no gradient but rounding
            assert (grads[1][name] - gradient).norm() < 1e-3 * gradient.norm(), name


def test_more_sequences_than_a_kernel_starts_blocks_for_take_grids():
    attention, x = FlatAttention(SMALL), torch.zeros(1, 30, dtype=torch.bfloat16)
    for count in (65_535, 65_536):
        assert attention.takes_grids(x, Sequences(torch.full((count,), 2))) == (count > 65_535)


def test_grids_stay_where_the_kernels_do_not_run(monkeypatch):
    """On a CPU they never do: torch has no such operation there, or triton is missing."""
    find_kernels.cache_clear()
    with pytest.warns(UserWarning, match="attention takes padded grids"):
        assert find_kernels("cpu") is None
    kernels = types.ModuleType("support.kernels")
    kernels.received_attention = kernels.add_norm = lambda *arguments: None
    monkeypatch.setitem(sys.modules, "support.kernels", kernels)
    monkeypatch.setattr("support.kernels", kernels, raising=False)
    monkeypatch.setattr("support.cuda.flash", plain)
    find_kernels.cache_clear()
    assert find_kernels("cpu") is not None
    find_kernels.cache_clear()


RECEIVED = """
spans, query, key, presence = some_heads(torch.float32)
for mask in (None, presence):
    _, lse = attend(query, key, key, spans, spans, mask, PLAIN)
    sums = kernels.received_attention(query, key, mask, lse.T.contiguous().T, *spans)
    sums = sums if mask is None else sums * mask
    torch.testing.assert_close(sums.double(), matrix_sums(spans, query, key, mask), rtol=1e-5, atol=1e-7)
"""
ADD_NORM = """
norm, (x, update) = torch.nn.LayerNorm(24), torch.randn(2, 9, 24)
torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
with torch.no_grad():
    torch.testing.assert_close(kernels.add_norm(x, update, norm), norm(x + update))
"""


@pytest.mark.parametrize("code", [RECEIVED, ADD_NORM], ids=["received", "add_norm"])
def test_a_kernel_in_tritons_interpreter(code):
    pytest.importorskip("triton")
    code = f"import torch\nfrom support import kernels\nfrom test_cuda import *\n{code}"
    tests = Path(__file__).parent.parent
    paths = os.pathsep.join(map(str, (tests.parent, tests, tests / "support")))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
