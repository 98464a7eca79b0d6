"""A second implementation of the model, padded and masking only, to check the packed one against.

It shares nothing with model.py but the weights: (B, n_max) throughout, one loop a head, pruned tokens masked.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def forward(model, sequences, pruning, temperature=3e-4):
    """Returns logits (B, labels), kept (L, B), and the sum of all soft masks over real tokens (0 without soft masks).

    pruning: "dense", "hard", "topk", "soft", "soft_attention" (soft masks act on attention, not on states) or "second"
    (every second token goes). In soft modes kept is Σ Π m: the masks of a token's layers multiplied, summed over the
    real tokens. Logits of token and span heads are (T, labels), read off each token's states, weighted by the share of
    it that left with them.
    """
    soft, masks_attention = pruning in ("soft", "soft_attention"), pruning == "soft_attention"
    config = model.config
    x, real = embed(model, sequences)
    alive, share, exits, kept, mask_sum = real.clone(), real.float(), torch.zeros_like(x), [], 0.0
    for l, layer in enumerate(model.layers):
        attended, score = attend(layer, x, share if masks_attention else alive.float(), config)
        if config.score_norm == "length":
            score = score / real.sum(1, keepdim=True)
        else:
            score = score / config.max_seq_length
        x = norm(x + attended, layer.attention_norm, config)
        mask = torch.ones_like(score)
        if soft:
            mask = torch.sigmoid((score - model.thresholds[l]) / temperature)
            mask = torch.cat([torch.ones(len(x), 1), mask[:, 1:]], 1)
            mask_sum = mask_sum + (mask * real).sum()
            stays = share * mask
        else:
            alive = alive & survivors(model, l, score, alive, real, pruning)
            stays = alive.float()
        kept.append(stays.sum(1) if soft else alive.sum(1))
        exits = exits + (share - stays)[:, :, None] * x
        y = layer.activation(x @ layer.intermediate.weight.T + layer.intermediate.bias)
        y = y @ layer.output.weight.T + layer.output.bias
        x = norm(x + y, layer.output_norm, config)
        final = exits + stays[:, :, None] * x
        x, share = x if masks_attention else x * mask[:, :, None], stays
    if config.head != "sequence":
        logits = (final @ model.head.output.weight.T + model.head.output.bias)[real]
    else:
        first = torch.tanh(x[:, 0] @ model.head.dense.weight.T + model.head.dense.bias)
        logits = first @ model.head.output.weight.T + model.head.output.bias
    return logits, torch.stack(kept), mask_sum


def embed(model, sequences):
    """Padded states (B, n, D), and which of them are real tokens (B, n)."""
    B, n = len(sequences), max(map(len, sequences))
    ids = torch.full((B, n), model.config.pad_token_id)
    real = torch.zeros(B, n, dtype=torch.bool)
    for b, sequence in enumerate(sequences):
        ids[b, : len(sequence)] = torch.tensor(sequence)
        real[b, : len(sequence)] = True
    first_position = 0 if model.config.model_type == "bert" else model.config.pad_token_id + 1
    e = model.embeddings
    x = e.word(ids) + e.position(torch.arange(n).expand(B, n) + first_position) + e.segment(torch.zeros_like(ids))
    return norm(x, e.norm, model.config), real


def norm(x, layer_norm, config):
    return F.layer_norm(x, (config.hidden_size,), layer_norm.weight, layer_norm.bias, config.layer_norm_eps)


def attend(layer, x, there, config):
    """Attention's output (B, n, D), and the attention that each token receives, a mean over heads (B, n).

    there (B, n): what of each token there is to attend and to be attended to, 0 to 1.
    """
    D, H = config.hidden_size, config.num_attention_heads
    weight, bias = layer.attention.query_key_value.weight, layer.attention.query_key_value.bias
    q, k, v = (x @ weight[i * D : (i + 1) * D].T + bias[i * D : (i + 1) * D] for i in range(3))
    heads, received = [], 0
    for h in range(H):
        part = slice(h * D // H, (h + 1) * D // H)
        logits = torch.einsum("bid,bjd->bij", q[..., part], k[..., part]) / math.sqrt(D // H)
        weights = (logits - logits.amax(-1, keepdim=True)).exp() * there[:, None, :]
        probs = weights / weights.sum(-1, keepdim=True)
        heads.append(probs @ v[..., part])
        received = received + (probs * there[:, :, None]).sum(1) / H
    return torch.cat(heads, -1) @ layer.attention.output.weight.T + layer.attention.output.bias, received


def survivors(model, l, score, alive, real, pruning):
    """Which tokens leave layer l (B, n)."""
    keep = torch.ones_like(alive)
    for b in range(len(alive)):
        places = [i for i in range(alive.shape[1]) if alive[b, i]]
        if pruning == "hard":
            places = [i for i in places if i == 0 or score[b, i] >= model.thresholds[l]]
        elif pruning == "second":
            places = places[::2]
        elif pruning == "topk":
            L, rate = len(model.layers), 1.0
            dense = max(3, math.ceil(0.15 * L))
            if l + 1 > dense:
                rate = max(0.0, 1 + (model.config.token_keep_rate - 1) * (l + 1 - dense) / (L - dense))
            count = max(1, round(int(real[b].sum()) * rate))
            places = sorted(places, key=lambda i: (i > 0, -score[b, i].item(), i))[:count]
        keep[b] = False
        keep[b, places] = True
    return keep
