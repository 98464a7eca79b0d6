"""The model card: README.md in a checkpoint's folder, with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model import Config
from support.errors import InputError
from support.files import cached_name, write_text
from support.onnx_file import model_name
from tasks import TASKS

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

MARK = "<!-- Written by ltp.py, which replaces this file as long as this line stands in it. -->"
SPEED = "\n## Measured speed\n"
# Our names of metrics -> the hub's.
HUB_METRICS = {
    "accuracy": "accuracy",
    "f1": "f1",
    "macro_f1": "f1",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "precision": "precision",
    "recall": "recall",
    "exact": "exact_match",
}
# What a head does on the hub, the class that transformers has for it, and the texts that `predict` takes.
HEADS = {
    "sequence": ("text-classification", "AutoModelForSequenceClassification", '"a text"'),
    "token": ("token-classification", "AutoModelForTokenClassification", '"some words"'),
    "span": ("question-answering", "AutoModelForQuestionAnswering", '"a question" --pair "the text with the answer"'),
}
STAGES = {
    "finetune": "fine-tuned without pruning",
    "soft": "trained with soft masks, which learn a threshold for each layer (first stage of LTP)",
    "hard": "trained with tokens dropped by the learned thresholds, now frozen (second stage of LTP)",
    "topk": "trained with a fixed share of the tokens kept in each layer (a baseline)",
    "manual": "trained with fixed thresholds (a baseline)",
}
PRUNING = {
    None: "It prunes nothing.",
    "absolute_threshold": "In each layer it drops the tokens that receive less attention than the layer's threshold.",
    "topk": "In each layer it keeps a fixed share of the tokens, those that receive the most attention.",
}
SHOWN_SETTINGS = ("learning_rate", "batch_size", "epochs", "seed")
SHOWN_SOFT_SETTINGS = ("temperature", "threshold_learning_rate")


def is_ours(path: Path) -> bool:
    """Whether the file is a card that may be replaced: one of ours, or none at all."""
    return not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace")


def base_model(restore: Path) -> str | None:
    """The hub's name of the model that a checkpoint was trained from.

    It is the name of the checkpoint's folder in the hub's cache, or else what the checkpoint's card says.
    """
    if cached_name(restore):
        return cached_name(restore)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        line = re.search(r"^base_model: (\S+)$", (restore / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
        return line and line[1]


def write_card(folder: Path, config: Config, header: dict[str, Any], record: dict[str, Any]) -> None:
    """Writes the card of a checkpoint; a README.md that somebody else wrote stays.

    header, record: of the run and of the evaluation, as in log.jsonl.
    """
    path = folder / "README.md"
    if is_ours(path):
        name = f"ltp-{header['task']}-{header['stage']}".lower()
        metadata = card_metadata(name, config, header=header, record=record)
        sections = (
            f"---\n{metadata.to_yaml()}\n---\n\n{MARK}\n\n# {name}\n",
            summary(config, header, record),
            layer_table(record),
            usage(config, has_pairs(header)),
        )
        write_text(path, "\n".join(sections))


def dataset_fields(header: dict[str, Any]) -> dict[str, str]:
    """The evaluation data as the hub names them: dataset_type, dataset_name, dataset_config."""
    task = TASKS.get(header["task"])
    if task is None:
        name = Path(header["data"]).absolute().name.encode(errors="replace").decode()  # UTF-8 cannot hold every path
        return {"dataset_type": "custom", "dataset_name": name}
    if task.head == "span":
        return {"dataset_type": f"rajpurkar/{task.hub}", "dataset_name": task.name}
    return {"dataset_type": "nyu-mll/glue", "dataset_name": f"GLUE {task.name}", "dataset_config": task.hub}


def card_metadata(name: str, config: Config, header: dict[str, Any], record: dict[str, Any]) -> ModelCardData:
    """What the hub reads: the kind of task, the data, the results."""
    from huggingface_hub import EvalResult, ModelCardData

    dataset, hub_task = dataset_fields(header), HEADS[config.head][0]
    results = [
        EvalResult(
            hub_task,
            metric_type=HUB_METRICS[metric.removesuffix("_mismatched")],
            metric_name=metric,
            metric_value=round(value, 4),
            dataset_split="validation",
            **dataset,
        )
        for metric, value in record["metrics"].items()
        if metric.removesuffix("_mismatched") in HUB_METRICS
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=hub_task,
        tags=["learned-token-pruning", "token-pruning", "ltp"],
        base_model=base_model(Path(header["restore"])),
        datasets=[dataset["dataset_type"]] if header["task"] in TASKS else None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)),
        model_name=name,
        eval_results=results,
    )


def summary(config: Config, header: dict[str, Any], record: dict[str, Any]) -> str:
    """What the model is, what it was trained on, and how good it is."""
    noun = "windows of texts" if config.head == "span" else "examples"
    unlabelled = header.get("unlabelled", 0)
    counts = f"{header['examples'] - unlabelled:,} training and {record['examples']:,} evaluation {noun}"
    counts += f"; {unlabelled:,} more texts without labels" if unlabelled else ""
    settings, names = header["settings"], SHOWN_SETTINGS
    if settings["target_flops"]:
        names += ("target_flops",)  # training finds λ
    elif header["stage"] == "soft":
        names += ("regularization",)
    names += SHOWN_SOFT_SETTINGS if header["stage"] == "soft" else ()
    reads = (
        " Its head also reads the states of dropped tokens."
        if config.head == "sequence" and config.read_dropped
        else ""
    )
    training = ", ".join(f"{name} {settings[name]}" for name in names)
    gflops = f"{record['gflops']:.3g} of {record['dense_gflops']:.3g} GFLOPs per example; encoder layers only"
    rows = (
        ("task", header["task"]),
        ("data", f"{dataset_fields(header)['dataset_name']}, {counts}"),
        *((metric, f"{value:.4f}") for metric, value in record["metrics"].items()),
        ("relative FLOPs", f"{record['relative_flops']:.3f} ({gflops})"),
        ("training", f"{training}; step {record['step']}"),
    )
    return "\n".join(
        (
            f"A {config.model_type} model of {config.num_hidden_layers} layers, {STAGES[header['stage']]}. "
            f"{PRUNING[config.prune_mode]}{reads}",
            f"Labels: {', '.join(config.labels)}.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
        )
    )


def layer_table(record: dict[str, Any]) -> str:
    """The share of the tokens left after each layer, and the layer's threshold where there is one."""
    rows = [f"| {l} | {share:.3f} |" for l, share in enumerate(record["kept"], 1)]
    heading, line = "| layer | tokens left |", "|---|---|"
    if record.get("thresholds"):
        rows = [f"{row} {threshold:.3g} |" for row, threshold in zip(rows, record["thresholds"])]
        heading, line = f"{heading} threshold |", f"{line}---|"
    title = "Share of the tokens left after each layer, on the evaluation examples:"
    return "\n".join((title, "", heading, line, *rows, ""))


def has_pairs(header: dict[str, Any]) -> bool:
    """Whether the run's examples are pairs of texts."""
    task = TASKS.get(header["task"])
    return bool(task.pair if task else header["columns"][1])


def usage(config: Config, pairs: bool) -> str:
    """How to load the model, pruned and dense. pairs: a classifier answers for pairs of texts."""
    _, hub_class, texts = HEADS[config.head]
    texts += ' --pair "another"' if pairs and config.head == "sequence" else ""
    scores = ", whose scores are not those above" if config.prune_mode else ""
    return f"""## How to use it

With the tokens dropped, by `ltp.py` of the project that trained it (Learned Token Pruning,
https://arxiv.org/abs/2107.00910):

```bash
python ltp.py predict --restore THIS_FOLDER {texts}
```

As the dense model, without pruning{scores}:

```python
from transformers import {hub_class}, AutoTokenizer

model = {hub_class}.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```
"""


def check_card(folder: Path) -> None:
    """Raises InputError where there is no card of ours to add to."""
    path = folder / "README.md"
    if not path.is_file() or not is_ours(path):
        raise InputError(f"--card: {model_name(folder)} has no README.md that training wrote; nothing to add to")


def add_speed(folder: Path, result: dict[str, Any]) -> None:
    """Puts what `bench` measured, with its conditions, at the end of the card, in place of earlier measurements.

    Raises: InputError where there is no card of ours.
    """
    check_card(folder)
    rows, c = result["rows"], result["conditions"]
    rounded = any(row["relative_bops"] != row["relative_flops"] for row in rows)
    names = ["batch", "", "MB", "ms per batch", "speed-up", "FLOPs reduction", *["relative BOPs"] * rounded]
    cells = [
        [
            str(row["batch_size"]),
            row["model"],
            f"{row['file_bytes'] / 1e6:.1f}",
            f"{1e3 * row['latency']:.2f}",
            f"{row['speedup']:.2f}x",
            f"{1 / row['relative_flops']:.2f}x",
            *[f"{row['relative_bops']:.3f}"] * rounded,
        ]
        for row in rows
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in (names, ["---"] * len(names), *cells))
    data = f"{c['examples']} examples ({c['data']}, {c['mean_length']:.0f} tokens on average)"
    versions = f"torch {c['torch']}" + (f", onnxruntime {c['onnxruntime']}" if "onnxruntime" in c else "")
    section = f"""{SPEED}
{table}

Medians of {c["repeats"]} passes over {data}, all in turn in one run:
{c["device"]}, threads {c["threads"]}, {c["precision"]}, {versions}.
"""
    path = folder / "README.md"
    text = re.sub(rf"{SPEED}.*?(?=\n## |\Z)", "", path.read_text(encoding="utf-8"), flags=re.DOTALL) + section
    write_text(path, text)
