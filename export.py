"""ONNX with the dropping inside: one sequence at a time, each pruned token gone from the graph's next product on."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from data import InputError, pack
from model import Model, importance, keep_by_threshold, topk_counts, topk_rates

TOLERANCE = 1e-3  # of the logits, relative to the largest: rounding is far below, a wrong graph far above


class SingleSequence(nn.Module):
    """A model's weights and rules for one sequence, in operations that an exporter can follow.

    `Model.forward` asks for lengths as Python numbers and lays batches on grids; of one sequence neither is needed.
    """

    def __init__(self, model: Model):
        super().__init__()
        self.model = model
        self.thresholds = model.thresholds.tolist()  # which layers prune is part of the graph's shape

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """input_ids (1, n), token_type_ids (1, n) or None: zeros -> logits (1, labels), kept (L,) int64 as Model's."""
        model, config, L = self.model, self.model.config, len(self.model.layers)
        ids = input_ids[0]
        n, H = ids.size(0), config.num_attention_heads
        segments = torch.zeros_like(ids) if token_type_ids is None else token_type_ids[0]
        protected = torch.arange(n) == 0
        original = left = torch.ones_like(ids).sum()
        rates = topk_rates(config.token_keep_rate, L)
        kept = []

        x = model.embeddings(ids, segments, torch.arange(n))
        for index, layer in enumerate(model.layers):
            hard = model.pruning == "hard" and self.thresholds[index] > 0
            topk = model.pruning == "topk" and rates[index] < 1
            query, key, value = layer.attention.query_key_value(x).unflatten(1, (3, H, -1)).permute(1, 2, 0, 3).unbind()
            if index == L - 1:
                x = x[:1]  # the head reads nothing else, and only thresholds need the other queries, to count
                query = query if hard else query[:, :1]
            probs = torch.softmax(query @ key.mT * key.size(-1) ** -0.5, -1)  # (H, queries, n_l)
            context = (probs[:, :1] if index == L - 1 else probs) @ value
            x = layer.attention_norm(x + layer.attention.output(context.transpose(0, 1).flatten(1)))

            keep = None
            if hard or topk and index < L - 1:
                scores = importance(probs.sum((0, 1)), H, n if config.score_norm == "length" else config.max_seq_length)
                if hard:
                    keep = keep_by_threshold(scores, model.thresholds[index], protected)
                else:
                    keep = keep_highest(scores, topk_counts(original, rates[index]))
            left = keep.sum() if keep is not None else topk_counts(original, rates[index]) if topk else left
            kept.append(left)
            if keep is not None and index < L - 1:
                x, protected = x[keep], protected[keep]
            x = layer.feed_forward_block(x)
        return model.head(x[:1]), torch.stack(kept)


def keep_highest(importance: Tensor, count: Tensor) -> Tensor:
    """`model.keep_topk` of one sequence without a sort, which graphs have no stable one of: (n,), () -> keep (n,).

    A token's rank is the number of tokens before it in the order: those that score more, and equals to its left.
    """
    scores = importance.index_fill(0, torch.zeros(1, dtype=torch.long), float("inf"))
    place = torch.cumsum(torch.ones_like(scores), 0)
    before = (scores > scores[:, None]) | (scores == scores[:, None]) & (place < place[:, None])
    return before.sum(1) < count


def export_model(model: Model, path: Path) -> str:
    """Writes the model as one ONNX file, compares it with the model in ONNX Runtime where that is installed, and
    returns a line on what came out.

    Raises: InputError without onnx and onnxscript, or if the graph does not compute what the model does.
    """
    try:
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(
            f"export needs onnx and onnxscript, and {error.name} is not installed: pip install onnx onnxscript"
        ) from None
    if model.config.head != "sequence":
        raise InputError("export: this model answers for each token; only models that classify texts can be exported")
    names = ["input_ids", "token_type_ids"][: 1 + (model.config.type_vocab_size > 1)]
    examples = tuple(torch.zeros(1, 7, dtype=torch.long) for _ in names)  # one tensor twice would become one input
    tokens = torch.export.Dim("tokens", min=2, max=model.config.max_tokens)
    model.requires_grad_(False).eval()
    with warnings.catch_warnings():  # the exporter's own business, by the dozen
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            program = torch.onnx.export(
                SingleSequence(model).eval(),
                examples,
                dynamo=True,
                dynamic_shapes=tuple({1: tokens} for _ in names),
                input_names=names,
                output_names=["logits", "kept"],
                verbose=False,
            )
        finally:
            logging.disable(logging.NOTSET)
    program.model.metadata_props["labels"] = json.dumps(model.config.labels)
    program.save(path, external_data=False)
    return f"inputs {', '.join(names)} (1, tokens); {compare(model, path, names)}"


@torch.inference_mode()
def compare(model: Model, path: Path, names: list[str]) -> str:
    """Runs the file and the model on random tokens of several lengths. Raises: InputError if they differ."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return "not compared with the model: onnxruntime is not installed"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    limit = min(model.config.max_tokens, model.config.max_seq_length)
    lengths = sorted({2, *(max(2, round(limit * share)) for share in (0.05, 0.15, 0.3, 0.5, 0.75, 1.0))})
    worst, ties = 0.0, 0
    for n in lengths:
        ids = torch.randint(model.config.vocab_size, (n,), generator=generator).tolist()
        wanted = model(*pack([ids]))
        given = dict(zip(names, ([ids], [[0] * n])))
        logits, kept = session.run(None, {k: torch.tensor(v).numpy() for k, v in given.items()})
        if kept.tolist() != wanted.kept[:, 0].tolist():  # a score within rounding of its threshold
            ties += 1
        else:
            worst = max(
                worst, float((torch.from_numpy(logits) - wanted.logits).abs().max() / wanted.logits.abs().max())
            )
    if worst > TOLERANCE or ties > 1:
        raise InputError(
            f"the exported graph differs from the model (logits by {worst:.1e}, tokens kept in {ties} of {len(lengths)} "
            "texts) and was not written"
        )
    return f"logits differ by at most {worst:.1e} of the largest, on {len(lengths) - ties} texts of 2 to {limit} tokens"
