"""Time of a training step in each stage, beside a dense step and transformers', in turn, in one run.

transformers takes its steps twice: on our batches, which hold texts of similar length, and on batches drawn at random,
as its Trainer does by default. Times are per token, since batches differ in how many they hold: medians and means over
the steps.

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/steps.py --restore CKPT --task MRPC --data glue/

CKPT is a checkpoint of `soft` or `hard`: its thresholds decide what the hard steps drop.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import Examples, epoch_batches  # noqa: E402
from model import macs  # noqa: E402
from support.checkpoint import load_model  # noqa: E402
from support.cpu import use_fast_dropout  # noqa: E402
from support.errors import InputError  # noqa: E402
from support.files import write_json  # noqa: E402
from support.process import Process, start_process  # noqa: E402
from support.settings import Settings  # noqa: E402
from tasks import find_task  # noqa: E402
from tasks.base import Source  # noqa: E402
from tasks.tokenizer import Tokenizer  # noqa: E402
from train import Trainer  # noqa: E402

Step = Callable[[np.ndarray], Any]
STAGES = {"dense": "finetune", "soft": "soft", "hard": "hard", "topk": "topk"}  # by their names in the table
WARM_UP = 2  # steps before the timed ones


def make_trainers(
    restore: Path, source: Source, train_set: Examples, batch_size: int, token_keep_rate: float, process: Process
) -> dict[str, Trainer]:
    """A trainer for each stage, with learning rates of 0: all keep the same weights."""
    settings = Settings(learning_rate=0.0, threshold_learning_rate=0.0, batch_size=batch_size)
    trainers = {}
    for name, stage in STAGES.items():
        model = load_model(restore, source.task.labels or ("score",), token_keep_rate=token_keep_rate).model
        model = use_fast_dropout(model.to(process.device))
        trainers[name] = Trainer(
            model, stage=stage, task=source.task, train_set=train_set, settings=settings, process=process
        )
    return trainers


def their_step(restore: Path, train_set: Examples) -> Step:
    """A step of transformers on a padded batch."""
    import transformers

    load = transformers.AutoModelForSequenceClassification.from_pretrained
    model = load(restore, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    norm = Settings().max_grad_norm

    def step(indices: np.ndarray) -> None:
        lengths = torch.from_numpy(train_set.lengths[indices])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        inputs = []
        for buffer in (train_set.token_ids, train_set.segment_ids):
            flat = torch.from_numpy(buffer[train_set.rows(indices)]).long()
            inputs.append(torch.zeros(mask.shape, dtype=torch.long).masked_scatter(mask, flat))
        labels = torch.from_numpy(train_set.targets[indices])
        model(inputs[0], attention_mask=mask.long(), token_type_ids=inputs[1], labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def time_steps(steps: dict[str, Step], batches: list[np.ndarray], train_set: Examples) -> dict[str, np.ndarray]:
    """Seconds a token of each step after the warm-up, the contenders in turn on each batch."""
    size = len(batches[0])
    drawn = np.random.default_rng(42).permutation(len(train_set))[: len(batches) * size].reshape(-1, size)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number, indices in enumerate(batches):
        for name, step in steps.items():
            chosen = drawn[number] if name.endswith("random batches") else indices
            start = time.perf_counter()
            step(chosen)
            times[name].append((time.perf_counter() - start) / train_set.lengths[chosen].sum())
    return {name: np.array(values[WARM_UP:]) for name, values in times.items()}


@torch.inference_mode()
def flops_reduction(trainer: Trainer, batches: list[np.ndarray]) -> float:
    """Dense FLOPs over those of the stage's training pass, dropout included."""
    model, used, full = trainer.model.train(), 0, 0
    pruner = model.pruner()
    for indices in batches:
        kept = model(trainer.train_set.batch(indices).to(trainer.process.device), pruner).kept.cpu()
        lengths = torch.from_numpy(trainer.train_set.lengths[indices])
        used += int(macs(model.config, lengths, kept).sum())
        full += int(macs(model.config, lengths, lengths.expand(len(kept), -1)).sum())
    return full / used


def print_row(row: dict[str, Any]) -> None:
    tail = ""
    if "flops_reduction" in row:
        tail = f"  {row['flops_reduction']:.2f}x fewer FLOPs, into time {row['flops_to_time']:.2f}"
    median, mean = row["microseconds_per_token"], row["mean_microseconds_per_token"]
    line = f"{row['stage']:38}{median:8.1f} us/token (mean {mean:.1f})  {row['time_over_dense']:.2f} of dense"
    click.echo(line + tail)


@click.command()
@click.option("--restore", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--task", required=True)
@click.option("--data", type=click.Path(exists=True, path_type=Path))
@click.option("--batch-size", default=64, show_default=True)
@click.option("--steps", default=8, show_default=True, help="Timed steps a stage, after the warm-up.")
@click.option("--token-keep-rate", default=0.2, show_default=True, help="Of the top-k steps.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(restore, task, data, batch_size, steps, token_keep_rate, json_file) -> None:
    """Times training steps; the learning rate is 0, so that every stage keeps the same weights."""
    process, source = start_process(), Source(find_task(task), data)
    train_set = source.load("train", Tokenizer(restore), 128)[0][""]
    batches = [
        part for part in epoch_batches(train_set.lengths, batch_size, seed=42, epoch=0) if len(part) == batch_size
    ]
    batches = batches[: steps + WARM_UP]
    trainers = make_trainers(
        restore, source, train_set, batch_size=batch_size, token_keep_rate=token_keep_rate, process=process
    )
    contenders: dict[str, Step] = {name: trainer.step for name, trainer in trainers.items()}
    theirs = their_step(restore, train_set)
    contenders |= {f"transformers SDPA, {kind} batches": theirs for kind in ("the same", "random")}
    times = time_steps(contenders, batches, train_set)
    dense, rows = float(np.median(times["dense"])), []
    for name, values in times.items():
        median = float(np.median(values))
        row = {
            "stage": name,
            "microseconds_per_token": 1e6 * median,
            "mean_microseconds_per_token": 1e6 * float(values.mean()),
            "time_over_dense": median / dense,
        }
        if name in ("hard", "topk"):
            reduction = flops_reduction(trainers[name], batches[WARM_UP:])
            row |= {"flops_reduction": reduction, "flops_to_time": dense / median / reduction}
        rows.append(row)
        print_row(row)
    if json_file:
        conditions = {"batch_size": batch_size, "steps": steps, "threads": torch.get_num_threads()}
        write_json(json_file, {"rows": rows} | conditions)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
