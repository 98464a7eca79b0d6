"""How often a pass waits for the device, and how much work a layout takes.

A GPU runs behind the program. The program waits when it reads a tensor's values, and when it copies values to it. On a
GPU each wait costs more than a small layer. These tests count on a CPU what would wait on a GPU.
"""

import warnings
from dataclasses import replace

import pytest
import torch
from small_models import MODES, SMALL, make_pruner, pruning_model, random_sequences
from torch.utils._python_dispatch import TorchDispatchMode

from model import Hard, Model, Sequences, initialize, pack, threshold_ladder

READS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "item",
    "_unique2",
    "bincount",
    "lift_fresh",  # torch.tensor(list) and its like
}


def reads_values(name: str, args: tuple, kwargs: dict) -> bool:
    if name == "repeat_interleave":  # its output's size is the sum of its argument, unless it is given
        return kwargs.get("output_size") is None
    if name in ("index", "index_put", "index_put_"):  # a bool index is turned into places
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return name in READS


class Waits(TorchDispatchMode):
    """Lists the operations that would wait for a GPU. Not for inference mode, which hides what is inside of them."""

    METHODS = ("tolist", "numpy", "cpu")  # these do not go through PyTorch's dispatcher on a CPU

    def __init__(self):
        super().__init__()
        self.names = []
        self.methods = {name: getattr(torch.Tensor, name) for name in self.METHODS}

    def __enter__(self):
        for name, method in self.methods.items():
            setattr(torch.Tensor, name, self.counted(name, method))
        return super().__enter__()

    def __exit__(self, *error):
        for name in self.methods:
            delattr(torch.Tensor, name)  # uncovers the method of the class above
        return super().__exit__(*error)

    def counted(self, name, method):
        def count(tensor, *args, **kwargs):
            self.names.append(name)
            return method(tensor, *args, **kwargs)

        return count

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if reads_values(name, args, kwargs or {}):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


X, KEEP, COUNTS = torch.arange(3.0), torch.tensor([True, False, True]), torch.tensor([1, 0, 2])


@pytest.mark.parametrize(
    "waits, action",
    [
        (1, lambda: X.tolist()),
        (1, lambda: X[0].item()),
        (1, lambda: bool(KEEP.any())),
        (1, lambda: int(COUNTS[1])),
        (1, lambda: KEEP.nonzero()),
        (1, lambda: torch.where(KEEP)),
        (1, lambda: X[KEEP]),
        (1, lambda: X.masked_select(KEEP)),
        (1, lambda: X.cpu()),
        (1, lambda: X.numpy()),
        (1, lambda: torch.tensor([1, 2])),
        (1, lambda: X.new_tensor([1.0])),
        (1, lambda: X[[0, 2]]),
        (1, lambda: X.repeat_interleave(COUNTS)),
        (0, lambda: X.repeat_interleave(COUNTS, output_size=3)),
        (0, lambda: KEEP.nonzero_static(size=2)),
        (0, lambda: X[COUNTS]),
        (0, lambda: X.masked_fill(KEEP, 1.0) + torch.zeros_like(X)),
        (0, lambda: torch.arange(3).index_fill(0, COUNTS, 1)),
    ],
)
def test_what_waits_is_counted(waits, action):
    with Waits() as counter:
        action()
    assert len(counter.names) == waits
    assert X.tolist() == [0, 1, 2] and len(counter.names) == waits  # not beyond the block


def deep_model(layers: int, head: str) -> Model:
    torch.manual_seed(0)
    model = Model(replace(SMALL, num_hidden_layers=layers, head=head, token_keep_rate=0.3, read_dropped=True))
    initialize(model, 0.15)
    model.thresholds.data = threshold_ladder(0.01, layers)
    return model


@pytest.mark.parametrize("layers", [3, 12])
@pytest.mark.parametrize("head", ["sequence", "token", "span"])
@pytest.mark.parametrize("rule", MODES)
@pytest.mark.parametrize("training", [False, True])
def test_how_often_a_pass_waits(rule, head, layers, training):
    """Once for the lengths; a pruned pass once more for the thresholds, and once a layer for the survivors' lengths."""
    model, batch = deep_model(layers, head).train(training), pack(random_sequences(20))
    model.thresholds.requires_grad_(training and rule.startswith("soft"))
    with torch.set_grad_enabled(training), Waits() as counter:
        output = model(batch, make_pruner(model, rule))
        if training:
            output.logits.sum().backward()
    allowed = {"dense": 1, "soft": 1, "soft_attention": 1, "hard": 2 + layers, "topk": 1 + layers}[rule]
    assert 1 <= len(counter.names) <= allowed, counter.names
    if rule == "hard":
        assert output.kept[-1].sum() < 0.9 * len(batch.token_ids)


def test_a_pass_that_drops_nothing_makes_no_second_layout(model):
    model.thresholds.data.zero_()
    batch = pack(random_sequences(7))
    with torch.no_grad(), Waits() as counter:
        model(batch, Hard(model.thresholds))
    assert len(counter.names) <= 2, counter.names


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rule", MODES)
def test_how_often_a_pass_waits_on_a_gpu(rule):
    model = pruning_model().cuda()
    batch = pack(random_sequences(20)).to("cuda")
    with torch.no_grad():
        model(batch, make_pruner(model, rule))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model(batch, make_pruner(model, rule))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
    assert len(waits) <= {"dense": 1, "soft": 1, "soft_attention": 1, "hard": 2 + 5, "topk": 1 + 5}[rule], waits


# ---- work of a layout ----


class Work(TorchDispatchMode):
    """Counts the elements that tensor operations write."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            self.elements += tensor.numel() if isinstance(tensor, torch.Tensor) else 0
        return result


class CountedSizes(list):
    """A list that counts how many of its elements are read."""

    reads = 0

    def __getitem__(self, key):
        self.reads += len(range(*key.indices(len(self)))) if isinstance(key, slice) else 1
        return super().__getitem__(key)

    def __iter__(self):
        for value in super().__iter__():
            self.reads += 1
            yield value


class Few(Sequences):
    """Two rows on a grid, so that grids grow in number with the batch."""

    CPU_LIMITS = (200, 10**9)


class Many(Sequences):
    """All rows on one grid."""

    CPU_LIMITS = (10**9, 10**9)


class Quadratic(Few):
    """Finds the start of each grid by adding up all lengths before it."""

    @property
    def grids(self):
        for i in range(0, len(self.sizes), 2):
            assert sum(self.sizes[:i]) >= 0
        return super().grids


def layout_work(layout: type[Sequences], B: int) -> int:
    """Elements written and lengths read to make a layout of B sequences, and to lay and flatten their tokens."""
    with Work() as work:
        seqs = layout(torch.tensor([10, 7] * (B // 2)))
        seqs.sizes = CountedSizes(seqs.sizes)
        seqs.flatten(seqs.lay(torch.zeros(seqs.num_tokens, 1)))
        assert seqs.sum(torch.ones(seqs.num_tokens)).shape == seqs.positions[:B].shape
    return work.elements + seqs.sizes.reads


@pytest.mark.parametrize("layout", [Sequences, Few, Many])
def test_the_work_of_a_layout_grows_with_the_batch(layout):
    assert layout_work(layout, 1600) < 2.2 * layout_work(layout, 800)


def test_quadratic_work_would_be_seen():
    assert layout_work(Quadratic, 1600) > 2.6 * layout_work(Quadratic, 800)
