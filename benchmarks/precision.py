"""What bf16 is worth on a CPU: dense inference and training steps in fp32 and bf16, in turn, in one run.

python benchmarks/precision.py --size minilm

The weights are random. What comes out depends on the processor: does it multiply bf16?
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from compare import SIZES, mrpc_like_lengths  # noqa: E402

from data import Examples  # noqa: E402
from model import Batch, Config, Dense, Model, initialize  # noqa: E402
from support.devices import for_inference, for_training  # noqa: E402
from support.process import Process, start_process  # noqa: E402
from support.settings import Settings  # noqa: E402
from tasks import own_task  # noqa: E402
from train import Trainer  # noqa: E402

PRECISIONS = ("fp32", "bf16")
WARM_UP = 3


def some_examples(lengths: list[int]) -> Examples:
    """Texts of random tokens."""
    flat = np.random.default_rng(0).integers(5, 30_000, sum(lengths)).astype(np.int32)
    return Examples(flat, np.zeros(len(flat), np.int8), np.array(lengths), targets=np.arange(len(lengths)) % 2)


def answer(model: Model, batch: Batch, process: Process) -> None:
    with torch.inference_mode(), process.autocast(model):
        model(batch, Dense())


def report(name: str, runs: dict[str, Callable[[], object]], repeats: int) -> None:
    """Prints the median time of each precision; the runs take turns."""
    times: dict[str, list[float]] = {precision: [] for precision in runs}
    for turn in range(WARM_UP + repeats):
        for precision, run in runs.items():
            start = time.perf_counter()
            run()
            if turn >= WARM_UP:
                times[precision].append(1e3 * (time.perf_counter() - start))
    fp32, bf16 = (float(np.median(times[precision])) for precision in PRECISIONS)
    click.echo(f"{name:28} fp32 {fp32:8.1f} ms   bf16 {bf16:8.1f} ms   {fp32 / bf16:.2f} times")


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="minilm", show_default=True)
@click.option("--repeats", default=7, show_default=True)
@click.option("--threads", type=int)
def main(size: str, repeats: int, threads: int | None) -> None:
    """Prints the table."""
    start_process("cpu", threads=threads)
    torch.manual_seed(0)
    model = Model(Config(30_000, max_position_embeddings=514, type_vocab_size=1, max_seq_length=384, **SIZES[size]))
    initialize(model, 0.05)
    processes = {precision: Process(precision=precision) for precision in PRECISIONS}
    ready = {name: for_inference(copy.deepcopy(model).eval(), process) for name, process in processes.items()}
    for lengths in ([53], [384], mrpc_like_lengths(32, 0), [384] * 8):
        batch = some_examples(lengths).batch(np.arange(len(lengths)))
        runs = {name: lambda name=name: answer(ready[name], batch, processes[name]) for name in PRECISIONS}
        report(f"{len(lengths)} of {np.mean(lengths):.0f} tokens", runs, repeats)
    examples, task = some_examples(mrpc_like_lengths(32, 0)), own_task(None, None, None, regression=False)
    settings, steps = Settings(learning_rate=1e-5, epochs=1.0, batch_size=32), {}
    for name, process in processes.items():
        trained = for_training(copy.deepcopy(model), process)
        trainer = Trainer(trained, stage="finetune", task=task, train_set=examples, settings=settings, process=process)
        steps[name] = lambda trainer=trainer: trainer.step(np.arange(32))
    report("a training step of 32 of 53", steps, repeats)


if __name__ == "__main__":
    main()
