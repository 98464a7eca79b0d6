"""Time of a training step in each stage beside a dense one and transformers', in turn, in one run.

transformers takes its steps twice: on our batches, which hold texts of similar length, and on batches drawn at random,
as its Trainer does by default. Times are medians over the steps, by token: batches differ in how many they hold.

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/steps.py --restore CKPT --task MRPC --data glue/

CKPT is a checkpoint of `soft` or `hard`: its thresholds decide what the hard steps drop.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import InputError, Settings, Source, Tokenizer, epoch_batches, find_task, load_examples  # noqa: E402
from model import load_model, macs, write_file  # noqa: E402
from train import backward, make_optimizer, start_process  # noqa: E402


@click.command()
@click.option("--restore", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--task", required=True)
@click.option("--data", type=click.Path(exists=True, path_type=Path))
@click.option("--batch-size", default=64, show_default=True)
@click.option("--steps", default=8, show_default=True, help="Timed steps a stage, after two to warm up.")
@click.option("--token-keep-rate", default=0.2, show_default=True, help="Of the top-k steps.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(restore, task, data, batch_size, steps, token_keep_rate, json_file) -> None:
    """Times training steps; the learning rate is 0, so that every stage keeps the same weights."""
    process = start_process()
    task = find_task(task)
    tokenizer = Tokenizer(restore)
    train_set = load_examples(Source(task, data), "train", tokenizer, 128)[0][""]
    batches = [part for part in epoch_batches(train_set.lengths, batch_size, 42, 0) if len(part) == batch_size]
    batches = batches[: steps + 2]
    drawn = np.random.default_rng(42).permutation(len(train_set))[: len(batches) * batch_size].reshape(-1, batch_size)
    settings = Settings(learning_rate=0.0, threshold_learning_rate=0.0, batch_size=batch_size)
    runs: dict[str, Callable[[np.ndarray], None]] = {}
    models = {}
    for name, pruning in (("dense", "none"), ("soft", "soft"), ("hard", "hard"), ("topk", "topk")):
        model = load_model(restore, task.labels or ("score",)).model.train()
        model.config = replace(model.config, token_keep_rate=token_keep_rate)
        model.thresholds.requires_grad_(pruning == "soft")
        models[name] = model, pruning
        optimizer = make_optimizer(model, settings)

        def run(indices, model=model, pruning=pruning, optimizer=optimizer):
            backward(model, train_set, indices, pruning, settings, process)
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        runs[name] = run

    import transformers

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        restore, attn_implementation="sdpa"
    ).train()
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.0)

    def padded_step(indices):
        rows = train_set.table[indices.tolist()]
        width = max(map(len, rows["token_ids"]))
        fill = lambda lists, value: torch.tensor([row + [value] * (width - len(row)) for row in lists])  # noqa: E731
        theirs(
            fill(rows["token_ids"], 0),
            attention_mask=fill([[1] * len(row) for row in rows["token_ids"]], 0),
            token_type_ids=fill(rows["segment_ids"], 0),
            labels=torch.from_numpy(train_set.labels[indices]),
        ).loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), settings.max_grad_norm)
        their_optimizer.step()
        their_optimizer.zero_grad(set_to_none=True)

    runs["transformers SDPA, the same batches"] = padded_step
    runs["transformers SDPA, random batches"] = padded_step
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number, indices in enumerate(batches):
        for name, run in runs.items():
            chosen = drawn[number] if name.endswith("random batches") else indices
            start = time.perf_counter()
            run(chosen)
            if number >= 2:
                times[name].append((time.perf_counter() - start) / train_set.lengths[chosen].sum())

    dense = float(np.median(times["dense"]))
    rows = []
    for name, values in times.items():
        value = float(np.median(values))
        row = {"stage": name, "microseconds_per_token": 1e6 * value, "time_over_dense": value / dense}
        if name in ("hard", "topk"):
            model, pruning = models[name]
            used = full = 0
            with torch.inference_mode():
                for indices in batches[2:]:
                    kept = model(*train_set.batch(indices), pruning=pruning).kept
                    lengths = torch.from_numpy(train_set.lengths[indices])
                    used += int(macs(model.config, lengths, kept).sum())
                    full += int(macs(model.config, lengths, lengths.expand(len(kept), -1)).sum())
            row |= {"flops_reduction": full / used, "flops_to_time": dense / value * used / full}
        rows.append(row)
        tail = (
            f"  {row['flops_reduction']:.2f}x fewer FLOPs, into time {row['flops_to_time']:.2f}" if len(row) > 3 else ""
        )
        click.echo(
            f"{name:42}{row['microseconds_per_token']:8.1f} us/token  {row['time_over_dense']:.2f} of dense{tail}"
        )
    if json_file:
        record = {"rows": rows, "batch_size": batch_size, "steps": steps, "threads": torch.get_num_threads()}
        write_file(json_file, lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
