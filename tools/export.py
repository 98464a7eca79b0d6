"""Writes a model as ONNX with the dropping inside: the graph takes one sequence, and dropped tokens leave its products.

The graph is traced from `Model.forward` itself. Two things there cannot be traced: a layout asks for lengths as Python
numbers, and ONNX has no stable sort for top-k. `OneSequence` and `RankedTopK` stand in for them, for one sequence.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from model import (
    Alive,
    Batch,
    Config,
    Decision,
    Dense,
    Grid,
    Hard,
    Model,
    Sequences,
    TopK,
    pack,
    topk_counts,
    topk_rates,
)
from support.checkpoint import load_model
from support.errors import InputError
from support.files import write_file
from support.onnx_file import BITS, FILES, GRAPH, pack_files
from tasks.answers import MAX_ANSWER_TOKENS
from tasks.tokenizer import Tokenizer
from tasks.windows import window_sizes

TOLERANCE = 1e-3  # of the logits, relative to the largest: rounding is far below, a wrong graph far above
OUTPUTS = ["logits", "kept"]


class OneSequence(Sequences):
    """The layout of one sequence, with its length in a tensor alone. The run of tokens is the grid, without padding."""

    single = False  # the graph has no branch of its own for a single token: attention computes the same

    def __init__(self, lengths: Tensor, original_lengths: Tensor, num_tokens: Any):
        """lengths, original_lengths (1,): see `Sequences`. num_tokens: the same length, as the size of a tensor."""
        self.lengths, self.original_lengths, self.num_tokens = lengths, original_lengths, num_tokens
        self.starts = torch.zeros_like(lengths)
        no_padding = dict.fromkeys(("source", "alive", "bias", "cells", "query_rows"))
        self.grids = [Grid(slice(0, 1), num_tokens, **no_padding)]

    @property
    def ids(self) -> Tensor:
        return torch.zeros(self.num_tokens, dtype=torch.long)

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.num_tokens)

    def sum(self, values: Tensor) -> Tensor:
        return values.sum(0, keepdim=True)

    def drop(self, keep: Tensor, kept: Tensor) -> tuple[OneSequence, Tensor]:
        survivors = keep.nonzero().squeeze(1)
        torch._check(survivors.size(0) >= 1)  # the first token survives; attention asks whether there are any
        return OneSequence(kept, self.original_lengths, survivors.size(0)), survivors

    def lay(self, x: Tensor) -> list[Tensor]:
        return [x[None]]

    def flatten(self, grids: list[Tensor]) -> Tensor:
        return grids[0][0]


class RankedTopK(TopK):
    """Top-k of one sequence without a sort: ONNX has no stable one."""

    def decide(self, l: int, scores: Tensor | None, alive: Alive, seqs: Sequences) -> Decision:
        counts = topk_counts(seqs.original_lengths, self.rates[l]).minimum(seqs.lengths)
        if scores is None:
            return Decision(counts)
        counts = counts.maximum(seqs.sum(alive.protected))
        return Decision(counts, keep_highest(scores, counts, alive.protected))


def keep_highest(scores: Tensor, count: Tensor, protected: Tensor) -> Tensor:
    """`model.keep_topk` of one sequence by comparisons: scores (n,), count (1,), protected (n,) bool -> keep (n,) bool.

    A token's rank is the number of tokens that score more, and of equals to its left.
    """
    scores = scores.masked_fill(protected, math.inf)
    positions = torch.cumsum(torch.ones_like(scores), 0)
    left = positions < positions[:, None]
    ranks = ((scores > scores[:, None]) | (scores == scores[:, None]) & left).sum(1)
    return ranks < count


class TracedHard(Hard):
    """`Hard` that is told which layers can drop, since a traced threshold has no value to ask for."""

    def __init__(self, thresholds: Tensor, can_drop: list[bool]):
        self.thresholds, self.can_drop = thresholds, can_drop


class SingleSequence(nn.Module):
    """A model for one sequence, in operations that an exporter can follow."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model
        self.can_drop = (model.thresholds > 0).tolist()

    @property
    def input_names(self) -> list[str]:
        """input_ids; token_type_ids and question_length where the answer depends on them."""
        config = self.model.config
        depends = (True, config.type_vocab_size > 1, config.head == "span" and config.protect_question)
        return [name for name, used in zip(("input_ids", "token_type_ids", "question_length"), depends) if used]

    def pruner(self) -> Dense:
        """As `Model.pruner` gives it."""
        config = self.model.config
        if config.prune_mode == "absolute_threshold":
            return TracedHard(self.model.thresholds, self.can_drop)
        if config.prune_mode == "topk":
            return RankedTopK(topk_rates(config.token_keep_rate, config.num_hidden_layers))
        return Dense()

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, question_length: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """input_ids, token_type_ids (1, n), question_length (1,), default zeros -> logits, kept (L,) int64.

        logits: (1, labels), or (1, n, labels) of a head that answers for each token.
        """
        token_ids = input_ids[0]
        n = token_ids.size(0)
        segment_ids = torch.zeros_like(token_ids) if token_type_ids is None else token_type_ids[0]
        lengths = torch.ones_like(token_ids).sum(0, keepdim=True)
        questions = torch.zeros_like(lengths) if question_length is None else question_length
        batch = Batch(token_ids, segment_ids, torch.arange(n), lengths, questions)
        output = self.model(batch, self.pruner(), lambda lengths: OneSequence(lengths, lengths, n))
        logits = output.logits if self.model.config.head == "sequence" else output.logits[None]
        return logits, output.kept[:, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Writing and comparing


def export_checkpoint(folder: Path, output: Path, int8: bool = False, dense: bool = False) -> str:
    """Writes a model folder as one ONNX file, whole or not at all, and returns a line on it. Raises: InputError."""
    if (folder / GRAPH).exists():
        raise InputError(f"{(folder / GRAPH).resolve()}: is exported already; export the checkpoint it was made of")
    model = load_model(folder, **{"prune_mode": None} if dense else {}).model
    tokenizer, reports = Tokenizer(folder), []

    def write(path: Path) -> None:
        if not int8:
            reports.append(export_model(model, path, tokenizer))
            return
        with tempfile.TemporaryDirectory() as between:
            reports.append(export_model(model, Path(between, GRAPH), tokenizer) + "; then rounded to int8")
            quantize(Path(between, GRAPH), path)

    write_file(output, write)
    return reports[0]


def export_model(model: Model, path: Path, tokenizer: Tokenizer | None = None) -> str:
    """Writes the model as one ONNX file and returns a line on the result.

    tokenizer: travels in the file's metadata, with the configuration (see support/onnx_file.py and serving/serve.py).
    Where ONNX Runtime is installed, the file is run there and compared with the model.
    Raises: InputError without onnx and onnxscript, or if the graph does not compute what the model does.
    """
    try:
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(
            f"export needs onnx and onnxscript, and {error.name} is not installed: pip install onnx onnxscript"
        ) from None
    model.requires_grad_(False).eval()
    program = trace(SingleSequence(model).eval())
    program.model.metadata_props.update(metadata_of(model.config, tokenizer))
    program.save(path, external_data=False)
    return f"inputs {', '.join(SingleSequence(model).input_names)} (1, tokens); {compare(model, path)}"


def metadata_of(config: Config, tokenizer: Tokenizer | None) -> dict[str, str]:
    """What an exported file says of itself: labels; for `--restore`, all files; for serving/serve.py, the rest."""
    labels = {"labels": json.dumps(config.labels)}
    if tokenizer is None:
        return labels
    settings = serving_settings(config, tokenizer)
    files = tokenizer.files | {"config.json": json.dumps(config.to_dict()).encode()}
    return labels | {
        "tokenizer": tokenizer.backend.to_str(),
        "settings": json.dumps(settings),
        FILES: pack_files(files),
    }


def serving_settings(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """What serving/serve.py has to know to read and answer as `predict` does.

    limit: tokens of a text, or of a question that is not cut; below 1, the model can read none.
    """
    max_length = min(config.max_seq_length, config.max_tokens)
    settings = {
        "head": config.head,
        "max_length": max_length,
        "limit": max_length - tokenizer.backend.num_special_tokens_to_add(is_pair=False),
        "cut_side": tokenizer.cut_side,
        "reads_segments": tokenizer.reads_segments,
        "split_special_tokens": tokenizer.backend.encode_special_tokens,
        "vocab_size": config.vocab_size,
    }
    if config.head != "span":
        return settings
    sizes = window_sizes(tokenizer, max_length)
    windows = {"stride": sizes.stride, "question_cut": sizes.cut, "max_answer_tokens": MAX_ANSWER_TOKENS}
    return settings | windows | {"limit": sizes.limit}


def quantize(path: Path, output: Path) -> None:
    """Writes a file with the weights of all linear layers in int8, a scale for each output; inputs are rounded as they
    come. Embeddings stay in float32. Raises: InputError without onnxruntime."""
    try:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ModuleNotFoundError as error:
        raise InputError(
            f"--int8 needs onnxruntime, and {error.name} is not installed: pip install onnxruntime"
        ) from None
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):  # it reports shapes it cannot infer
        logging.disable(logging.WARNING)
        try:
            quantize_dynamic(
                path, output, op_types_to_quantize=["Gemm", "MatMul"], per_channel=True, weight_type=QuantType.QInt8
            )
        finally:
            logging.disable(logging.NOTSET)
    program = onnx.load(output)
    program.metadata_props.add(key=BITS, value="8")
    onnx.save(program, output)


def trace(single: SingleSequence) -> Any:
    """The ONNX program of a model, for any number of tokens that it has positions for."""
    names = single.input_names
    # One tensor twice would become one input.
    shapes = {name: (1,) if name == "question_length" else (1, 7) for name in names}
    examples = {name: torch.zeros(shape, dtype=torch.long) for name, shape in shapes.items()}
    tokens = torch.export.Dim("tokens", min=2, max=single.model.config.max_tokens)
    with warnings.catch_warnings():  # dozens, which the exporter raises about itself
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            return torch.onnx.export(
                single,
                kwargs=examples,
                dynamo=True,
                dynamic_shapes={name: {1: tokens} if len(shape) > 1 else {} for name, shape in shapes.items()},
                input_names=names,
                output_names=OUTPUTS,
                verbose=False,
            )
        finally:
            logging.disable(logging.NOTSET)


@torch.inference_mode()
def compare(model: Model, path: Path) -> str:
    """Runs the file and the model on random tokens of several lengths. Raises: InputError if they differ.

    The kept tokens of one text may differ, because rounding may move a score across its threshold.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return "not compared with the model: onnxruntime is not installed"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    generator = torch.Generator().manual_seed(0)
    limit = min(model.config.max_tokens, model.config.max_seq_length)
    lengths = sorted({2, *(max(2, round(limit * share)) for share in (0.05, 0.15, 0.3, 0.5, 0.75, 1.0))})
    worst, ties = 0.0, 0
    for n in lengths:
        token_ids = torch.randint(model.config.vocab_size, (n,), generator=generator).tolist()
        question = n // 3 + 1
        segment_ids = [int(i >= question) if "token_type_ids" in names else 0 for i in range(n)]
        expected = model(pack([token_ids], [segment_ids], [question]))
        values = {"input_ids": [token_ids], "token_type_ids": [segment_ids], "question_length": [question]}
        logits, kept = session.run(OUTPUTS, {name: torch.tensor(values[name]).numpy() for name in names})
        if kept.tolist() != expected.kept[:, 0].tolist():
            ties += 1
        else:
            difference = (torch.from_numpy(logits).view_as(expected.logits) - expected.logits).abs().max()
            worst = max(worst, float(difference / expected.logits.abs().max()))
    if worst > TOLERANCE or ties > 1:
        raise InputError(
            f"the exported graph differs from the model (logits by {worst:.1e}, tokens kept in {ties} of "
            f"{len(lengths)} texts) and was not written"
        )
    return f"logits differ by at most {worst:.1e} of the largest, on {len(lengths) - ties} texts of 2 to {limit} tokens"
