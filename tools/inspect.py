"""Shows which tokens survive which layer, in the terminal or as one HTML page.

An *example* is a dict, ready for JSON, of one text and what every layer does with it: see `examine`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from model import Alive, Batch, Config, Decision, Dense, Output, Pruner, Sequences, Step, layer_macs
from support.console import output_console
from support.errors import InputError
from tasks.base import Prepared, Record, pack_encoded
from tools.predict import Predictor

# ----------------------------------------------------------------------------------------------------------------------
# Examples


class AllScores(Pruner):
    """Decides as another pruner does, and scores the tokens of every layer."""

    def __init__(self, pruner: Pruner):
        self.pruner = pruner

    def needs_scores(self, l: int, seqs: Sequences) -> bool:
        return True

    def decide(self, l: int, scores: Tensor | None, alive: Alive, seqs: Sequences) -> Decision:
        return self.pruner.decide(l, scores, alive, seqs)


class Passes(NamedTuple):
    """The outputs of one text, pruned and not."""

    pruned: Output
    dense: Output


def examine(predictor: Predictor, records: list[Record]) -> list[dict[str, Any]]:
    """What every layer does with each text, and the answers of the pruned and of the dense model.

    Returns for each text of n tokens:
    text: the record's; tokens: n strings;
    dense, pruned: the answers, {"label"}, of a classifier with "probabilities" by label, of a regression with "score";
    relative_flops;
    layers: each with threshold (None where none decides), scores (n numbers, None where the token was dropped before),
    alive (positions of the tokens that leave it) and relative_flops.
    Raises: InputError for records that are no texts, or that take several windows.
    """
    return [examine_one(predictor, record) for record in records]


@torch.inference_mode()
def examine_one(predictor: Predictor, record: Record) -> dict[str, Any]:
    """See `examine`."""
    location, content = record
    prepared = predictor.prepare([record])
    if len(prepared.encoded) > 1:
        raise InputError(
            f"{location}: makes {len(prepared.encoded)} windows of {predictor.reader.max_length} tokens, and one can "
            "be shown; shorten the context, or pass a larger --max-length"
        )
    token_ids = prepared.encoded[0].token_ids
    batch = pack_encoded(prepared.encoded).to(predictor.process.device)
    with predictor.process.autocast(predictor.model):
        pruned = predictor.model(batch, AllScores(predictor.model.pruner()))
        passes = Passes(pruned, predictor.model(batch, Dense()))
    config = predictor.model.config
    used, full = (layer_macs(config, batch.lengths, output.kept)[:, 0].tolist() for output in passes)
    tokens = predictor.reader.tokenizer.tokens(token_ids)
    texts = [content[name] for name in ("text", "text_pair", "question", "context") if name in content]
    thresholds = [None] * config.num_hidden_layers
    if config.prune_mode == "absolute_threshold":
        thresholds = predictor.model.thresholds.tolist()
    return {
        "text": " / ".join(texts) or " ".join(tokens),
        "tokens": tokens,
        "dense": describe_output(passes.dense, config, prepared),
        "pruned": describe_output(passes.pruned, config, prepared),
        "relative_flops": sum(used) / sum(full),
        "layers": [
            describe_step(step, batch) | {"threshold": threshold, "relative_flops": layer_used / layer_full}
            for step, threshold, layer_used, layer_full in zip(passes.pruned.steps, thresholds, used, full)
        ],
    }


def describe_step(step: Step, batch: Batch) -> dict[str, Any]:
    """The scores and the surviving positions of one layer, for a batch of one text."""
    scores: list[float | None] = [None] * len(batch.token_ids)
    for position, score in zip(step.tokens.tolist(), step.scores.tolist()):
        scores[position] = score
    keep = step.decision.keep
    return {"scores": scores, "alive": (step.tokens if keep is None else step.tokens[keep]).tolist()}


def describe_output(output: Output, config: Config, prepared: Prepared) -> dict[str, Any]:
    """The answer for the one text of a batch, see `examine`."""
    logits = output.logits.float().cpu()
    logits = logits[0] if config.head == "sequence" else logits
    (answer,) = prepared.finish([(logits, output.kept[:, 0].tolist())])
    if config.head == "span":
        return {"label": f"“{answer['answer']}”" if answer["answer"] else "no answer"}
    if config.head == "token":
        pairs = zip(answer["words"], answer["labels"])
        tagged = [f"{word} {label}" for word, label in pairs if label not in ("O", None)]
        return {"label": ", ".join(tagged) or "no tags"}
    if len(config.labels) == 1:
        return {"label": config.labels[0], "score": answer["label"]}
    return {"label": answer["label"], "probabilities": dict(zip(config.labels, logits.softmax(0).tolist()))}


# ----------------------------------------------------------------------------------------------------------------------
# Terminal


def print_examples(examples: list[dict[str, Any]]) -> None:
    """Prints each text on standard output: as wide as the terminal, or wider in a file or a pipe."""
    console = output_console()
    for example in examples:
        print_example(example, console)


def print_example(example: dict[str, Any], console: Console) -> None:
    """Prints a text once a layer, and both answers.

    The more attention a survivor receives, the stronger is its colour. Dropped tokens are dimmed; where the console has
    no colours, they are dots.
    """
    tokens = example["tokens"]
    wraps = sum(map(len, tokens)) + len(tokens) + 24 > console.width
    table = Table(show_edge=False, pad_edge=False, leading=int(wraps))
    for name in ("layer", "tokens", "FLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("text", ratio=1)
    table.add_row("", str(len(tokens)), "", Text(" ".join(tokens)))
    for number, layer in enumerate(example["layers"], 1):
        text = layer_text(tokens, layer, colours=console.color_system is not None)
        table.add_row(str(number), str(len(layer["alive"])), f"{layer['relative_flops']:.2f}", text)
    console.print()
    console.print(table)
    line = Text("\n")
    dense = Text.assemble(("dense ", "dim"), describe_answer(example["dense"]))
    if example["relative_flops"] < 1:
        line.append("pruned ", "dim").append(describe_answer(example["pruned"])).append("   ").append(dense)
        line.append(f"   relative FLOPs {example['relative_flops']:.3f}", "dim")
    else:
        line.append(dense).append("   no token is dropped", "dim")
    console.print(line, soft_wrap=True)


def layer_text(tokens: list[str], layer: dict[str, Any], colours: bool) -> Text:
    """The tokens of one layer, survivors coloured and the others struck through or dots."""
    alive, shares = set(layer["alive"]), relative_importance(layer["scores"])
    dropped = [Text(token, style="dim strike") if colours else Text("·") for token in tokens]
    return Text(" ").join(
        Text(token, style=colour_style(shares[i])) if i in alive else dropped[i] for i, token in enumerate(tokens)
    )


def describe_answer(answer: dict[str, Any]) -> str:
    """
    >>> describe_answer({"label": "good", "probabilities": {"bad": 0.25, "good": 0.75}})
    'good (0.75)'
    """
    if "score" in answer:
        return f"{answer['score']:.3f}"
    probability = f" ({answer['probabilities'][answer['label']]:.2f})" if "probabilities" in answer else ""
    return answer["label"] + probability


def relative_importance(scores: list[float | None]) -> list[float]:
    """A layer's scores as shares of colour, 0 to 1: relative to the highest but the first token's. Dropped tokens: 0.

    Attention is spread very unevenly. The square root makes middle and low scores differ to the eye.
    """
    highest = max((score for score in scores[1:] if score is not None), default=scores[0]) or 1.0
    return [min(1.0, math.sqrt((score or 0.0) / highest)) for score in scores]


def colour_style(share: float) -> str:
    """Black on a blue that grows stronger with `share` (0 to 1): readable on light and on dark terminals."""
    pale, strong = (226, 236, 244), (66, 165, 227)
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(pale, strong))
    return f"#000000 on #{red:02x}{green:02x}{blue:02x}"


# ----------------------------------------------------------------------------------------------------------------------
# Page


def page(examples: list[dict[str, Any]], model: dict[str, str]) -> str:
    """One HTML page of the examples that needs no other file. model: {"name", "pruning"} for its heading.

    Texts and names reach the page as JSON without a "<", and its script sets them as text: they cannot become markup.
    """
    data = json.dumps({"model": model, "examples": rounded(examples)}, allow_nan=False).replace("<", "\\u003c")
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return template.replace("{{DATA}}", data)


def rounded(value: Any) -> Any:
    """Rounds all numbers in nested lists and dicts, which halves the page."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value
