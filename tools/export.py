"""Writes a model as ONNX with the dropping inside: the graph takes padded texts, and dropped tokens leave its products.

The graph is traced from `Model.forward` itself. Two things there cannot be traced: a layout asks for lengths as Python
numbers, and ONNX has no stable sort for top-k. `TracedSequences` and `RankedTopK` stand in for them.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
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
    Pruner,
    Sequences,
    TopK,
    pack,
    topk_counts,
)
from runs.checks import check_task, length_limit
from support.checkpoint import load_config, load_model
from support.devices import for_inference
from support.errors import InputError
from support.files import write_file
from support.onnx_file import BITS, FILES, GRAPH, open_file, pack_files, padded_inputs
from support.process import Process
from tasks.answers import MAX_ANSWER_TOKENS
from tasks.base import Source
from tasks.evaluation import predict_logits
from tasks.tokenizer import Tokenizer
from tasks.windows import window_sizes

TOLERANCE = 1e-3  # of the logits, relative to the largest: rounding is far below, a wrong graph far above
OUTPUTS = ["logits", "kept"]
LARGE = 2**31  # values of a weight
LARGEST_FILE = 2 * 10**9  # bytes of weights; an ONNX file of 2**31 bytes or more cannot be read


class TracedSequences(Sequences):
    """A layout whose lengths are tensors alone. All sequences lie on one grid, as wide as the longest is now."""

    single = False  # the graph has no branch of its own for single tokens: attention computes the same

    def __init__(self, lengths: Tensor, original_lengths: Tensor, ids: Tensor):
        """lengths, original_lengths (B,), ids (T,): see `Sequences`."""
        self.lengths, self.original_lengths, self.ids = lengths, original_lengths, ids
        self.num_tokens = ids.size(0)

    @cached_property
    def grids(self) -> list[Grid]:
        rows, longest = self.lengths.size(0), self.lengths.max().clamp(min=2).item()
        torch._check(longest >= 2)  # the tracer would ask whether a grid has one column
        column = torch.arange(longest)
        source = (self.starts[:, None] + column).clamp(max=self.num_tokens - 1).flatten()
        real = column < self.lengths[:, None]
        bias = torch.where(real, 0.0, -math.inf)[:, None, None]
        cells = nonzero(real.flatten())
        return [Grid(slice(0, rows), self.num_tokens, source, cells, real, bias, query_rows=None)]

    def lay(self, x: Tensor) -> list[Tensor]:
        (grid,) = self.grids
        return [x.index_select(0, grid.source).view(*grid.real.shape, x.size(1))]

    def drop(self, keep: Tensor, kept: Tensor) -> tuple[TracedSequences, Tensor]:
        survivors = nonzero(keep)
        return TracedSequences(kept, self.original_lengths, self.ids.index_select(0, survivors)), survivors


def nonzero(x: Tensor) -> Tensor:
    """Where x (n,) is not 0. It has at least one place: first tokens survive, and the tracer would ask for it."""
    places = x.nonzero().squeeze(1)
    torch._check(places.size(0) >= 1)
    return places


class RankedTopK(TopK):
    """Top-k without a sort: ONNX has no stable one."""

    def decide(self, l: int, scores: Tensor | None, alive: Alive, seqs: Sequences) -> Decision:
        rate = torch.tensor(self.rates[l], dtype=torch.float64)  # the exporter rounds a Python number to float32
        counts = topk_counts(seqs.original_lengths, rate).minimum(seqs.lengths)
        if scores is None:
            return Decision(counts)
        counts = counts.maximum(seqs.sum(alive.protected))
        return Decision(counts, keep_highest(scores, seqs, counts, alive.protected))


def keep_highest(scores: Tensor, seqs: Sequences, counts: Tensor, protected: Tensor) -> Tensor:
    """`model.keep_topk` by comparisons, on one grid: scores (T,), counts (B,), protected (T,) bool -> keep (T,) bool.

    A token's rank is the number of tokens of its sequence that score more, and of equals to its left.
    """
    (grid,) = seqs.grids
    (scores,) = seqs.lay(scores.masked_fill(protected, math.inf)[:, None])  # (b, n, 1)
    scores = scores.squeeze(2).masked_fill(~grid.real, -math.inf)
    mine, other = scores[:, :, None], scores[:, None]
    positions = torch.arange(scores.size(1))
    ranks = ((other > mine) | (other == mine) & (positions < positions[:, None])).sum(2)
    return seqs.flatten([ranks < counts[:, None]])


class TracedHard(Hard):
    """`Hard` that is told which layers can drop, since a traced threshold has no value to ask for."""

    def __init__(self, thresholds: Tensor, can_drop: list[bool]):
        self.thresholds, self.can_drop = thresholds, can_drop


class Traceable(nn.Module):
    """A model on padded inputs, in operations that an exporter can follow."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model
        self.can_drop = (model.thresholds > 0).tolist()

    @property
    def input_names(self) -> list[str]:
        """input_ids and attention_mask; token_type_ids and question_length where the answer depends on them."""
        config = self.model.config
        segments = config.type_vocab_size > 1 or (config.head == "sequence" and config.read_dropped)
        depends = (segments, config.head == "span" and config.protect_question)
        more = [name for name, used in zip(("token_type_ids", "question_length"), depends) if used]
        return ["input_ids", "attention_mask", *more]

    def pruner(self) -> Pruner:
        """As `Model.pruner` gives it."""
        config = self.model.config
        if config.prune_mode == "absolute_threshold":
            return TracedHard(self.model.thresholds, self.can_drop)
        if config.prune_mode == "topk":
            return RankedTopK(config.layer_keep_rates)
        return Dense()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        question_length: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """input_ids, attention_mask (1 for a token, 0 in padding, which comes last), token_type_ids (B, n) and
        question_length (B,), default zeros -> logits, kept (B, L) int64.

        logits: (B, labels), or (B, n, labels) of a head that answers for each token, 0 in padding.
        """
        rows, width = input_ids.shape
        cells, lengths = nonzero(attention_mask.flatten()), attention_mask.sum(1)
        token_ids, ids = input_ids.flatten().index_select(0, cells), cells // width
        segment_ids = torch.zeros_like(token_ids)
        if token_type_ids is not None:
            segment_ids = token_type_ids.flatten().index_select(0, cells)
        questions = torch.zeros_like(lengths) if question_length is None else question_length
        batch = Batch(token_ids, segment_ids, cells - ids * width, lengths, questions)
        output = self.model(batch, self.pruner(), lambda lengths: TracedSequences(lengths, lengths, ids))
        logits, kept = output.logits, output.kept.T
        if self.model.config.head == "sequence":
            return logits, kept
        padded = logits.new_zeros(rows * width, logits.size(1)).index_copy(0, cells, logits)
        return padded.view(rows, width, logits.size(1)), kept


# ----------------------------------------------------------------------------------------------------------------------
# Writing and comparing


def export_checkpoint(folder: Path, output: Path, int8: bool = False, dense: bool = False) -> str:
    """Writes a model folder as one ONNX file, whole or not at all, and returns a line on it. Raises: InputError."""
    if (folder / GRAPH).exists():
        raise InputError(f"{(folder / GRAPH).resolve()}: is exported already; export the checkpoint it was made of")
    # The dense model drops nothing, and its graph needs no map of what was dropped.
    model = load_model(folder, **{"prune_mode": None, "read_dropped": False} if dense else {}).model
    tokenizer, reports = Tokenizer(folder), []
    write_file(output, lambda path: reports.append(export_model(model, path, tokenizer, int8)))
    return reports[0]


def export_model(model: Model, path: Path, tokenizer: Tokenizer | None = None, int8: bool = False) -> str:
    """Writes the model as one ONNX file and returns a line on the result.

    tokenizer: travels in the file's metadata, with the configuration (see support/onnx_file.py and serving/serve.py).
    int8: see `round_products`. Where ONNX Runtime is installed, the file is run there and compared with the model,
    before anything is rounded.
    Raises: InputError without onnx and onnxscript, for weights that do not fit in one file, or if the graph does not
    compute what the model does.
    """
    try:
        import onnx_ir
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(
            f"export needs onnx and onnxscript, and {error.name} is not installed: pip install onnx onnxscript"
        ) from None
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size > LARGEST_FILE:
        raise InputError(f"export: the weights take {size / 1e9:.1f} GB, and one ONNX file holds at most 2 GB")
    model.requires_grad_(False).eval()
    traceable = Traceable(model).eval()
    program = trace(traceable)
    for node in program.model.graph:
        node.metadata_props.clear()  # where each one comes from in the source, with this machine's paths
    program.model.metadata_props.update(metadata_of(model.config, tokenizer))
    onnx_ir.save(program.model, path)  # program.save puts the weights of a large model in a second file
    report = f"inputs {', '.join(traceable.input_names)} (texts, tokens); {compare(model, path)}"
    if int8:
        onnx_ir.save(round_products(program.model), path)
    return report + "; then rounded to int8" * int8


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


def round_products(graph: Any) -> Any:
    """Turns the products of all linear layers of an ONNX graph into products of 8-bit integers.

    A weight has a scale for each output. The factor from the left has one for each token, found as it comes: a text is
    rounded alike in any batch. (ONNX Runtime's own quantizer has one scale for all tokens of a batch.) Embeddings and
    attention stay in float32.
    """
    from onnxscript import optimizer, rewriter

    # A classifier's last layer takes parts of a weight: they become weights of their own.
    optimizer.fold_constants(graph, input_size_limit=LARGE, output_size_limit=LARGE)
    rule = rewriter.RewriteRule(
        linear_layer, integer_layer, lambda context, weight, **rest: weight.const_value is not None
    )
    graph = rewriter.rewrite(graph, [rule])
    graph.metadata_props[BITS] = "8"
    return graph


def linear_layer(op: Any, x: Any, weight: Any) -> Any:
    """x (T, C) times weight (K, C), plus a bias (K,) that is not 0: what `round_products` looks for."""
    return op.Gemm(x, weight, transB=1, _allow_other_inputs=True, _outputs=["result"])


def integer_layer(op: Any, x: Any, weight: Any, result: Any) -> Any:
    """What takes its place. Integers from the left are moved by 128, since kernels multiply uint8 by int8."""
    import onnx_ir as ir

    weights = weight.const_value.numpy()
    scales = np.maximum(np.abs(weights).max(1), 1e-12) / 127  # (K,) more than 0
    integers = np.round(weights / scales[:, None]).astype(np.int8).T.copy()  # (C, K)
    weight_scales = op.initializer(ir.tensor((scales / 127).astype(np.float32)), name=f"{result.name}_scales")
    weight_integers = op.initializer(ir.tensor(integers), name=f"{result.name}_integers")
    # (T, 1). For a row of zeros, 0 / 0 becomes some integer, and a product of it is multiplied by 0 again.
    highest = op.ReduceMax(op.Abs(x), op.Constant(value_ints=[-1]))
    middle = op.Constant(value=ir.tensor(np.array(128, np.uint8)))
    moved = op.QuantizeLinear(op.Div(x, highest), op.Constant(value_float=1 / 127), middle)
    product = op.MatMulInteger(moved, weight_integers, middle)
    scaled = op.Mul(op.Mul(op.Cast(product, to=ir.DataType.FLOAT), highest), weight_scales)
    bias = result.producer().inputs[2:]
    return op.Add(scaled, *bias) if bias else scaled


def trace(traceable: Traceable) -> Any:
    """The ONNX program of a model, for any number of texts and of tokens that it has positions for."""
    names = traceable.input_names
    # A size of 1 would count as fixed, and one tensor twice would become one input.
    shapes = {name: (3,) if name == "question_length" else (3, 7) for name in names}
    examples = {name: torch.ones(shape, dtype=torch.long) for name, shape in shapes.items()}
    batch = torch.export.Dim("batch", min=1)
    tokens = torch.export.Dim("tokens", min=2, max=traceable.model.config.max_tokens)
    with warnings.catch_warnings():  # dozens, which the exporter raises about itself
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            return torch.onnx.export(
                traceable,
                kwargs=examples,
                dynamo=True,
                dynamic_shapes={name: dict(enumerate((batch, tokens)[: len(shape)])) for name, shape in shapes.items()},
                input_names=names,
                output_names=OUTPUTS,
                verbose=False,
            )
        finally:
            logging.disable(logging.NOTSET)


@torch.inference_mode()
def compare(model: Model, path: Path) -> str:
    """Runs the file and the model on a batch of random tokens, of several lengths. Raises: InputError if they differ.

    The kept tokens of one text may differ, because rounding may move a score across its threshold.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return "not compared with the model: onnxruntime is not installed"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    limit = min(model.config.max_tokens, model.config.max_seq_length)
    lengths = sorted({1, 2, *(max(2, round(limit * share)) for share in (0.05, 0.15, 0.3, 0.5, 0.75, 1.0))})
    token_ids = [torch.randint(model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    questions = [n // 3 + 1 for n in lengths]
    segment_ids = [[int(i >= question) for i in range(n)] for n, question in zip(lengths, questions)]
    batch = pack(token_ids, segment_ids, questions)
    expected = model(batch)
    logits, kept = session.run(OUTPUTS, padded_inputs(batch, [node.name for node in session.get_inputs()]))
    logits, same = torch.from_numpy(logits), (torch.from_numpy(kept).T == expected.kept).all(0)
    if model.config.head == "sequence":
        rows = zip(logits, expected.logits)
    else:
        rows = zip((row[:n] for row, n in zip(logits, lengths)), expected.logits.split(lengths))
    differences = [float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in rows]
    worst = max([difference for difference, kept in zip(differences, same.tolist()) if kept], default=0.0)
    ties = int((~same).sum())
    if worst > TOLERANCE or ties > 1:
        raise InputError(
            f"the exported graph differs from the model (logits by {worst:.1e}, tokens kept in {ties} of "
            f"{len(lengths)} texts) and was not written"
        )
    return f"logits differ by at most {worst:.1e} of the largest, on {len(lengths) - ties} texts of 1 to {limit} tokens"


# ----------------------------------------------------------------------------------------------------------------------
# What rounding costs


def describe_agreement(
    folder: Path, output: Path, source: Source, process: Process, dense: bool, max_length: int | None = None
) -> str:
    """Lines on an exported file beside its checkpoint, on the source's evaluation examples. Raises: InputError.

    dense: the file does not prune. max_length: texts are cut to this many tokens; None: the checkpoint's setting.
    """
    config, tokenizer, task = load_config(folder), Tokenizer(folder), source.task
    labels = check_task(folder, config, task)
    examples = source.load("eval", tokenizer, length_limit(config, folder, max_length), labels=labels)[0][""]
    models = {"checkpoint": folder, output.name: open_file(output)}
    results, lines = [], []
    for name, path in models.items():
        model = for_inference(load_model(path, labels or config.labels).model, process)
        pruner = Dense() if dense and path == folder else model.pruner()
        logits, kept = predict_logits(model, examples, process, batch_size=32, pruner=pruner)
        metrics = ", ".join(f"{metric} {value:.4f}" for metric, value in task.judge(examples, logits)[0].items())
        results.append((logits, kept))
        lines.append(f"{name}: {metrics}")
    (expected, expected_kept), (logits, kept) = results
    same_kept = (kept == expected_kept).all(0).mean()
    if task.regression:
        answers = f"scores {np.abs(np.stack(logits) - np.stack(expected)).mean():.3f} apart on average"
    else:
        axis = 0 if task.head == "span" else -1  # a question is answered by a token, a token by a class
        same = [np.array_equal(a.argmax(axis), b.argmax(axis)) for a, b in zip(logits, expected)]
        answers = f"{np.mean(same):.1%} get the same answer"
    return "\n".join(
        [*lines, f"{same_kept:.1%} of {len(examples):,} texts keep as many tokens in every layer; {answers}"]
    )
