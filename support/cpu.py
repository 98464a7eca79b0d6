"""What makes a CPU faster: packed weights for inference, cheap dropout for training, and memory that is kept.

model.py uses plain nn.Linear and nn.Dropout. The functions here convert a model from outside; modules on other devices
stay as they are.
"""

from __future__ import annotations

import ctypes
import platform

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import Model

PACKED_TOKENS = 128  # up to this many tokens the packed product is used; above, the plain one is as fast


class PackedLinear(nn.Linear):
    """A linear layer with a second copy of its weight, in the layout of the CPU's fastest kernel.

    It shares weight and bias with the layer that it replaces. The copy does not follow changes of the weight: `train`
    drops it. Modifications of nn.Linear: `pack`, `train`, and the product in `forward`.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.training = linear.weight, linear.bias, linear.training
        self.packed: Tensor | None = None

    def pack(self) -> None:
        """Copies the weight again."""
        # torch.compile uses these operations on a CPU. torch.utils.mkldnn is the public way to them, but it also
        # converts input and output on every call: at 25 tokens that costs most of what packing saves.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())

    def train(self, mode: bool = True) -> PackedLinear:
        if mode:
            self.packed = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, in) -> (T, out)."""
        plain = self.packed is None or len(x) > PACKED_TOKENS or x.is_cuda
        if plain or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack_weights(model: Model) -> Model:
    """Replaces each nn.Linear of the layers by a `PackedLinear`: faster float32 inference where tokens are few.

    It is for weights that stay as they are, and takes their memory a second time. Returns the model.
    """
    if not torch.backends.mkldnn.is_available():
        return model
    for parent in list(model.layers.modules()):
        for name, child in parent.named_children():
            if not isinstance(child, nn.Linear):
                continue
            if child.weight.device.type != "cpu" or child.weight.dtype != torch.float32:
                continue
            if not isinstance(child, PackedLinear):
                child = PackedLinear(child)
                setattr(parent, name, child)
            child.pack()
    return model


class FastDropout(nn.Dropout):
    """nn.Dropout that takes four 16-bit random numbers from each 64-bit number that a CPU draws.

    Drawing them is most of dropout's time on a CPU; this takes a fifth of it. The rate is rounded to 16 bits.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> the same shape and type."""
        if not self.training or self.p == 0:
            return x
        threshold = round(2**16 * self.p) - 2**15
        if x.is_cuda or threshold == 2**15:  # the latter is no 16-bit number
            return F.dropout(x, self.p)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        keep = bits.view(torch.int16)[: x.numel()].view(x.shape) >= threshold
        # The factor needs float32 at least: in bf16, 1 / 0.9 is 1.109.
        factor = keep.to(torch.promote_types(x.dtype, torch.float32)).mul_(1 / (1 - self.p))
        return (x * factor).to(x.dtype)


def use_fast_dropout(model: Model) -> Model:
    """Replaces each nn.Dropout of a model on the CPU by `FastDropout`. Returns the model."""
    if next(model.parameters()).device.type != "cpu":
        return model
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, FastDropout(child.p).train(child.training))
    return model


def keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks for the next tensor of that size. Without glibc it does nothing.

    By default glibc returns them to the kernel at once; getting them back takes a quarter of a forward pass.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
    libc = ctypes.CDLL(None)
    if not libc.mallopt(M_MMAP_THRESHOLD, 2**30):
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that older ones take
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
