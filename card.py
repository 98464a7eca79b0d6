"""The model card: README.md in a checkpoint's folder, with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from data import SQUAD, TASKS, InputError, Task
from model import Config, write_file

MARK = "<!-- Written by ltp.py, which replaces this file as long as this line stands in it. -->"
SPEED = "\n## Measured speed\n"
# Our names of metrics -> the hub's, where they differ.
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
# What a head does on the hub, the class that transformers has for it, and what `predict` takes.
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


def is_ours(path: Path) -> bool:
    """Whether the file is a card that may be replaced: one of ours, or none at all."""
    return not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace")


def cached_name(folder: Path) -> str | None:
    """The hub's name of the model that a folder in its cache holds; None of other folders."""
    found = re.search(r"models--([^/]+)/snapshots/", f"{folder.absolute()}/")
    return found and found[1].replace("--", "/")


def base_model(restore: Path) -> str | None:
    """The hub's name of the model that a checkpoint was trained from: its folder in the cache, or what its card says."""
    if cached_name(restore):
        return cached_name(restore)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        told = re.search(r"^base_model: (\S+)$", (restore / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
        return told and told[1]


def write_card(folder: Path, config: Config, header: dict[str, Any], record: dict[str, Any]) -> None:
    """Writes the card of a checkpoint; a README.md that somebody else wrote stays.

    header, record: of the run and of the evaluation, as in log.jsonl.
    """
    path = folder / "README.md"
    if not is_ours(path):
        return
    from huggingface_hub import EvalResult, ModelCardData

    task: Task | None = TASKS.get(header.get("task", ""))
    hub_task, hub_class, given = HEADS[config.head]
    name = f"ltp-{header.get('task', 'custom')}-{header.get('stage', 'train')}".lower()
    if task is None:
        dataset = {"dataset_type": "custom", "dataset_name": Path(header.get("data") or "custom").name}
    elif task.name in SQUAD:
        dataset = {"dataset_type": f"rajpurkar/{task.hub}", "dataset_name": task.name}
    else:
        dataset = {"dataset_type": "nyu-mll/glue", "dataset_name": f"GLUE {task.name}", "dataset_config": task.hub}
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
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=hub_task,
        tags=["learned-token-pruning", "token-pruning", "ltp"],
        base_model=base_model(Path(header["restore"])) if header.get("restore") else None,
        datasets=[dataset["dataset_type"]] if task else None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)),
        model_name=name,
        eval_results=results,
    )
    pruning = {
        None: "It prunes nothing.",
        "absolute_threshold": "In each layer it drops the tokens that receive less attention than the layer's threshold.",
        "topk": "In each layer it keeps a fixed share of the tokens, those that receive the most attention.",
    }[config.prune_mode]
    thresholds = record.get("thresholds") or [None] * len(record["kept"])
    rows = [
        f"| {l} | {share:.3f} |" + ("" if threshold is None else f" {threshold:.3g} |")
        for l, (share, threshold) in enumerate(zip(record["kept"], thresholds), 1)
    ]
    noun = "windows of texts" if config.head == "span" else "examples"
    heading = "| layer | tokens left |" + (" threshold |" if thresholds[0] is not None else "")
    settings = header.get("settings", {})
    shown = ("learning_rate", "batch_size", "epochs", "seed")
    shown += ("regularization", "temperature", "threshold_learning_rate") if header.get("stage") == "soft" else ()
    text = f"""---
{metadata.to_yaml()}
---

{MARK}

# {name}

A {config.model_type} model of {config.num_hidden_layers} layers, {STAGES.get(header.get("stage", ""), "trained")}. {pruning}
Labels: {", ".join(config.labels)}.

| | |
|---|---|
| task | {header.get("task", "custom")} |
| data | {dataset["dataset_name"]}, {header.get("examples", 0):,} training and {record["examples"]:,} evaluation {noun} |
{"".join(f"| {metric} | {value:.4f} |{chr(10)}" for metric, value in record["metrics"].items())}\
| relative FLOPs | {record["relative_flops"]:.3f} ({record["gflops"]:.3g} of {record["dense_gflops"]:.3g} GFLOPs per example; encoder layers only) |
| training | {", ".join(f"{key} {settings[key]}" for key in shown if key in settings)}; step {record["step"]} |

Share of the tokens left after each layer, on the evaluation examples:

{heading}
|---|---|{"---|" if thresholds[0] is not None else ""}
{chr(10).join(rows)}

## How to use it

With the tokens dropped, by `ltp.py` of the project that trained it (Learned Token Pruning, https://arxiv.org/abs/2107.00910):

```bash
python ltp.py predict --restore THIS_FOLDER {given}
```

As the dense model, without pruning:

```python
from transformers import {hub_class}, AutoTokenizer

model = {hub_class}.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```
"""
    write_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def check_card(folder: Path) -> None:
    """Raises InputError where there is no card of ours to add to."""
    path = folder / "README.md"
    if not path.is_file() or not is_ours(path):
        raise InputError(f"--card: {path} is not a card that training wrote; there is nothing to add to")


def add_speed(folder: Path, result: dict[str, Any]) -> None:
    """Puts what `bench` measured, with its conditions, at the end of the card, in place of earlier ones."""
    check_card(folder)
    rows = [
        f"| {s['batch_size']} | {1e3 * s['dense_latency']:.2f} | {1e3 * s['latency']:.2f} | {s['speedup']:.2f}x | "
        f"{s['flops_reduction']:.2f}x |"
        for s in result["speeds"]
    ]
    c = result["conditions"]
    section = f"""{SPEED}
| batch | dense, ms per batch | pruned, ms per batch | speed-up | FLOPs reduction |
|---|---|---|---|---|
{chr(10).join(rows)}

Medians of {c["repeats"]} passes over {c["examples"]} examples ({c["data"]}, {c["mean_length"]:.0f} tokens on average), dense and
pruned in turn in one run: {c["device"]}, threads {c["threads"]}, {c["precision"]}, torch {c["torch"]}.
"""
    path = folder / "README.md"
    text = re.sub(rf"{SPEED}.*?(?=\n## |\Z)", "", path.read_text(encoding="utf-8"), flags=re.DOTALL) + section
    write_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))
