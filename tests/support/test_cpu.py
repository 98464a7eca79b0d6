"""Conversions for a CPU change how fast a model is, and nothing else."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from small_models import random_sequences, small_model

from model import Dense, Hard, TopK, pack, threshold_ladder, topk_rates
from support.cpu import PACKED_TOKENS, FastDropout, PackedLinear, pack_weights, use_fast_dropout

ROOT = Path(__file__).parents[2]
PRUNERS = {
    "dense": Dense(),
    "hard": Hard(threshold_ladder(0.01, 5)),
    "topk": TopK(topk_rates(0.3, 5)),
}
needs_mkldnn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")

# ---- packed weights ----


@needs_mkldnn
@pytest.mark.parametrize("name", PRUNERS)
def test_packed_weights_change_nothing(name):
    model, pruner = small_model(), PRUNERS[name]
    sizes = [5, 9, 3] * 2 + [PACKED_TOKENS - 30]  # above the limit at first; below it alone, or once pruned
    sequences = [[5 + i % 50 for i in range(n)] for n in sizes]
    batches = [pack(sequences), *(pack([ids]) for ids in sequences)]
    names = list(model.state_dict())
    with torch.inference_mode():
        plain = [model(batch, pruner) for batch in batches]
        assert pack_weights(model) is model
        for batch, expected in zip(batches, plain):
            output = model(batch, pruner)
            assert torch.equal(output.kept, expected.kept)
            torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=1e-5)
    layers = [part for part in model.layers.modules() if isinstance(part, nn.Linear)]
    assert len(layers) == 4 * 5 and all(
        isinstance(layer, PackedLinear) and layer.packed is not None for layer in layers
    )
    assert list(model.state_dict()) == names


@needs_mkldnn
def test_the_packed_copy_is_what_is_used_where_tokens_are_few():
    layer = pack_weights(small_model()).layers[0].intermediate
    bias, x = layer.bias.expand(PACKED_TOKENS + 1, -1), torch.ones(PACKED_TOKENS + 1, 30)
    with torch.no_grad():
        layer.weight.zero_()  # the copy does not follow
        assert not torch.equal(layer(x[1:]), bias[1:]) and torch.equal(layer(x), bias)
    assert torch.equal(layer(x[1:]), bias[1:])  # a gradient needs the plain product


@needs_mkldnn
def test_training_drops_the_copy_and_packing_again_takes_the_weights_of_now():
    model = pack_weights(small_model())
    layer, x = model.layers[0].intermediate, torch.randn(3, 30)
    weight = layer.weight
    model.train()
    assert layer.packed is None and model.layers[0].intermediate.weight is weight
    with torch.no_grad():
        weight.mul_(2)
        expected = model.eval().layers[0].intermediate(x)
        assert pack_weights(model).layers[0].intermediate is layer
        torch.testing.assert_close(layer(x), expected)


@needs_mkldnn
def test_bf16_has_no_use_for_packed_weights():
    model, batch = small_model(), pack([[0, 7, 9, 2], [0, 2]])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        plain = model(batch).logits
        assert torch.equal(pack_weights(model)(batch).logits, plain)


def test_other_devices_and_types_stay_as_they_are():
    on_meta = small_model().to("meta")
    for model in (pack_weights(on_meta), pack_weights(small_model().double()), use_fast_dropout(on_meta)):
        assert not any(isinstance(part, (PackedLinear, FastDropout)) for part in model.modules())


# ---- dropout ----


def test_dropout_zeroes_the_share_it_says_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(1001, 333, requires_grad=True)
    dropped = FastDropout(0.3)(x)
    dropped.sum().backward()
    assert set(dropped.unique().tolist()) == {0.0, x.new_tensor(1 / 0.7).item()}
    assert (dropped == 0).float().mean() == pytest.approx(0.3, abs=0.003)
    assert torch.equal(x.grad, dropped)
    assert torch.equal(FastDropout(0.3).eval()(x), x)
    assert not FastDropout(1.0)(x).any() and (FastDropout(0.999995)(x) == 0).float().mean() > 0.99


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 4), (1,)])
def test_dropout_draws_four_16_bit_numbers_from_each_of_64(shape):
    x, rate = torch.randn(shape), 0.1
    torch.manual_seed(3)
    dropped = FastDropout(rate)(x)
    after = torch.rand(1)
    torch.manual_seed(3)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    keep = bits.view(torch.int16)[: x.numel()].view(shape) >= round(2**16 * rate) - 2**15
    assert torch.equal(dropped, x * keep * (1 / (1 - rate))) and torch.equal(after, torch.rand(1))


def test_dropout_scales_correctly_in_bf16():
    torch.manual_seed(0)
    x = (1 + torch.rand(200_000)).bfloat16()
    dropped = FastDropout(0.1)(x)
    assert dropped.dtype == torch.bfloat16
    kept = dropped != 0
    ratio = dropped[kept].double().sum() / x[kept].double().sum()
    assert float(ratio) == pytest.approx(1 / 0.9, rel=2e-4)  # 1 / 0.9 in bf16 is 0.16 % too small


def test_every_dropout_of_a_model_is_replaced():
    model = small_model(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1, classifier_dropout=0.3)
    batch = pack(random_sequences(4, longest=20))
    plain = model(batch).logits
    names = {name: part.p for name, part in model.named_modules() if isinstance(part, nn.Dropout)}
    assert use_fast_dropout(model) is model
    assert torch.equal(model(batch).logits, plain)
    fast = {name: part.p for name, part in model.named_modules() if isinstance(part, FastDropout)}
    assert fast == names and len(names) == 1 + 5 * 2 + 2
    model.train()
    torch.manual_seed(1)
    first = model(batch).logits
    torch.manual_seed(1)
    assert torch.equal(model(batch).logits, first) and not torch.equal(model(batch).logits, first)
    first.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_rate_of_zero_draws_nothing():
    model = use_fast_dropout(small_model()).train()
    before = torch.get_rng_state()
    model(pack(random_sequences(3)))
    assert torch.equal(torch.get_rng_state(), before)


# ---- memory ----

SCRIPT = """
import mmap
from support.cpu import keep_freed_memory
import torch
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * mmap.PAGESIZE / 2**20
def kept_after_freeing():
    before = resident()
    block = torch.ones(2**22)  # 16 MiB
    del block
    return resident() - before
first = kept_after_freeing()
keep_freed_memory()
print(first, kept_after_freeing())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or sys.platform != "linux", reason="needs glibc and /proc")
def test_freed_memory_is_kept():
    result = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True)
    without, with_ = map(float, result.stdout.split())
    assert without < 4 < 12 < with_
