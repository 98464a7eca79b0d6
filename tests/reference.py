"""A second implementation of the model, padded and masking only, to check the packed one against.

It shares nothing with model.py but the weights: (B, n_max) throughout, one loop a head, pruned tokens masked.
"""

import math

import torch
import torch.nn.functional as F


def forward(model, sequences, pruning, temperature=None, mask_attention=False):
    """Returns logits (B, labels), kept (L, B), and Σ m over real tokens (a number; 0 without soft).

    In soft mode kept is Σ Π m: the masks of a token's layers multiplied, summed over the real tokens. A token head's
    logits are (T, labels), read off each token's states weighted by how much of it left with them.
    """
    config = model.config
    L, H, D = config.num_hidden_layers, config.num_attention_heads, config.hidden_size
    B, n = len(sequences), max(map(len, sequences))
    ids = torch.full((B, n), config.pad_token_id)
    real = torch.zeros(B, n, dtype=torch.bool)
    for b, sequence in enumerate(sequences):
        ids[b, : len(sequence)] = torch.tensor(sequence)
        real[b, : len(sequence)] = True
    e = model.embeddings
    positions = torch.arange(n).expand(B, n) + (config.pad_token_id + 1 if config.model_type != "bert" else 0)
    x = e.word(ids) + e.position(positions) + e.segment(torch.zeros_like(ids))
    x = F.layer_norm(x, (D,), e.norm.weight, e.norm.bias, config.layer_norm_eps)
    alive, kept, mask_sum, survival = real.clone(), [], 0.0, real.float()
    left = torch.zeros_like(x)
    for l, layer in enumerate(model.layers, 1):
        weight, bias = layer.attention.query_key_value.weight, layer.attention.query_key_value.bias
        q, k, v = (x @ weight[i * D : (i + 1) * D].T + bias[i * D : (i + 1) * D] for i in range(3))
        heads, score = [], torch.zeros(B, n)
        there = (
            survival if mask_attention else alive.float()
        )  # what of each token there is to attend and to be attended
        for h in range(H):
            part = slice(h * D // H, (h + 1) * D // H)
            logits = torch.einsum("bid,bjd->bij", q[..., part], k[..., part]) / math.sqrt(D // H)
            weights = (logits - logits.amax(-1, keepdim=True)).exp() * there[:, None, :]
            probs = weights / weights.sum(-1, keepdim=True)
            heads.append(probs @ v[..., part])
            score = score + (probs * there[:, :, None]).sum(1)
        norm = torch.tensor([float(config.max_seq_length)] * B)
        if config.score_norm == "length":
            norm = real.sum(1).float()
        score = score / H / norm[:, None]
        attended = torch.cat(heads, -1) @ layer.attention.output.weight.T + layer.attention.output.bias
        x = F.layer_norm(
            x + attended, (D,), layer.attention_norm.weight, layer.attention_norm.bias, config.layer_norm_eps
        )
        mask, here = torch.ones(B, n), survival if pruning == "soft" else alive.float()
        if pruning == "hard":
            keep = score >= model.thresholds[l - 1]
            keep[:, 0] = True
            alive = alive & keep
        elif pruning == "topk":
            dense = max(3, math.ceil(0.15 * L))
            rate = 1.0 if l <= dense else max(0.0, 1 + (config.token_keep_rate - 1) * (l - dense) / (L - dense))
            for b, sequence in enumerate(sequences):
                count = max(1, round(len(sequence) * rate))
                order = sorted((i for i in range(n) if alive[b, i]), key=lambda i: (i > 0, -score[b, i].item(), i))
                alive[b] = False
                alive[b, order[:count]] = True
        elif pruning == "soft":
            mask = torch.sigmoid((score - model.thresholds[l - 1]) / temperature)
            mask = torch.cat([torch.ones(B, 1), mask[:, 1:]], 1)
            mask_sum = mask_sum + (mask * real).sum()
            survival = survival * mask
        kept.append(survival.sum(1) if pruning == "soft" else alive.sum(1))
        stays = survival if pruning == "soft" else alive.float()
        left = left + (here - stays)[:, :, None] * x
        y = layer.activation(x @ layer.intermediate.weight.T + layer.intermediate.bias)
        y = y @ layer.output.weight.T + layer.output.bias
        x = F.layer_norm(x + y, (D,), layer.output_norm.weight, layer.output_norm.bias, config.layer_norm_eps)
        last = left + stays[:, :, None] * x
        x = x if mask_attention else x * mask[:, :, None]
    if config.head == "token":
        logits = last @ model.head.output.weight.T + model.head.output.bias
        return logits[real], torch.stack(kept), mask_sum
    first = torch.tanh(x[:, 0] @ model.head.dense.weight.T + model.head.dense.bias)
    return first @ model.head.output.weight.T + model.head.output.bias, torch.stack(kept), mask_sum
