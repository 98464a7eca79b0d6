"""Kernels of our own, in triton, which comes with torch's CUDA builds."""

from __future__ import annotations

import torch
import torch.nn as nn
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # queries and keys at a time


@triton.jit(do_not_specialize=["num_tokens"])
def sum_probabilities(
    query,
    key,
    lse,
    presence,
    starts,
    sums,
    scale,
    num_tokens,
    query_stride,
    key_stride,
    lse_stride,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums a block of a head's columns of exp(q · k scale − lse), over the queries of one sequence.

    Programs: block of keys, sequence, head. sums (H, T).
    """
    sequence, head = tl.program_id(1), tl.program_id(2)
    first, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    start = first + tl.program_id(0) * BLOCK
    if start < end:
        columns = tl.arange(0, WIDTH)
        tokens = (start + tl.arange(0, BLOCK)).to(tl.int64)
        there = (tokens[:, None] < end) & (columns[None, :] < HEAD)
        keys = tl.load(key + tokens[:, None] * key_stride + head * HEAD + columns[None, :], mask=there, other=0.0)
        total = tl.zeros([BLOCK], tl.float32)
        for asking in range(first, end, BLOCK):
            rows = (asking + tl.arange(0, BLOCK)).to(tl.int64)
            there = (rows[:, None] < end) & (columns[None, :] < HEAD)
            queries = tl.load(query + rows[:, None] * query_stride + head * HEAD + columns[None, :], there, other=0.0)
            rows_lse = tl.load(lse + rows * lse_stride + head * num_tokens, mask=rows < end, other=float("inf"))
            probabilities = tl.exp(tl.dot(queries, tl.trans(keys)) * scale - rows_lse[:, None])
            if MASKED:
                probabilities *= tl.load(presence + rows, mask=rows < end, other=0.0)[:, None]
            total += tl.sum(probabilities, 0)
        tl.store(sums + head.to(tl.int64) * num_tokens + tokens, total, mask=tokens < end)


def received_attention(
    query: Tensor, key: Tensor, presence: Tensor | None, lse: Tensor, starts: Tensor, longest: int
) -> Tensor:
    """Σ_h Σ_j w_j exp(q_j · k_i / √d − lse_j), w the presence or 1: (T,) float32, without gradient.

    query, key (T, H, d) in bf16, the d numbers of a head and the heads of a token next to each other; presence (T,);
    lse (T, H) float32, transposed in memory; starts (B + 1,) int32 of the sequences; longest: their most tokens.
    """
    T, H, d = query.shape
    sums = torch.empty(H, T, device=query.device)
    grid = (triton.cdiv(longest, BLOCK), starts.numel() - 1, H)
    sum_probabilities[grid](
        query,
        key,
        lse,
        presence,
        starts,
        sums,
        d**-0.5,
        T,
        query.stride(0),
        key.stride(0),
        lse.stride(0),
        HEAD=d,
        WIDTH=max(16, triton.next_power_of_2(d)),
        MASKED=presence is not None,
        BLOCK=BLOCK,
    )
    return sums.sum(0)


@triton.jit
def add_norm_row(x, update, weight, bias, result, eps, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """A program a row."""
    columns = tl.arange(0, WIDTH)
    there, row = columns < SIZE, tl.program_id(0).to(tl.int64) * SIZE
    total = tl.load(x + row + columns, there, other=0.0).to(tl.float32)
    total += tl.load(update + row + columns, there, other=0.0).to(tl.float32)
    centered = tl.where(there, total - tl.sum(total, 0) / SIZE, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centered * centered, 0) / SIZE + eps)
    weights = tl.load(weight + columns, there, other=0.0).to(tl.float32)
    biases = tl.load(bias + columns, there, other=0.0).to(tl.float32)
    tl.store(result + row + columns, centered * scale * weights + biases, there)


def add_norm(x: Tensor, update: Tensor, norm: nn.LayerNorm) -> Tensor:
    """norm(x + update), summed in float32: x, update (T, D), rows next to each other -> (T, D), without gradient."""
    result, size = torch.empty_like(x), x.size(1)
    width = triton.next_power_of_2(size)
    add_norm_row[(len(x),)](x, update, norm.weight, norm.bias, result, norm.eps, SIZE=size, WIDTH=width)
    return result
