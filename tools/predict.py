"""Answers for records of a user: single ones, or the lines of a file, in memory that does not grow with the file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from data import chunked, token_batches
from model import Config, Dense
from runs.checks import length_limit
from support.checkpoint import load_model
from support.console import quiet
from support.devices import for_inference
from support.errors import InputError
from support.files import json_line, write_file
from support.process import Process
from tasks import task_for_head
from tasks.base import Prepared, Reader, Record, pack_encoded
from tasks.evaluation import by_sequence
from tasks.readers import read_jsonl, read_records
from tasks.tokenizer import Encoded


def pruning_name(config: Config) -> str:
    """How a model prunes in inference: "hard" (below thresholds), "topk" or "none"."""
    return {"absolute_threshold": "hard", "topk": "topk", None: "none"}[config.prune_mode]


class Predictor:
    """Answers records with a checkpoint. Its head decides what a record holds, see the task's `prepare`."""

    def __init__(
        self,
        folder: Path,
        process: Process,
        batch_size: int = 32,
        max_length: int | None = None,
        dense: bool = False,
        max_tokens: int | None = None,
        no_answer_threshold: float | None = None,
    ):
        """Loads the model of a folder.

        batch_size: sequences that run together. max_tokens: limit of their tokens together.
        max_length: texts are cut to this many tokens; default: the checkpoint's setting.
        dense: ignore the checkpoint's pruning.
        no_answer_threshold: a question whose no_answer_score is above it gets an empty answer; default: none does.
        Raises: InputError.
        """
        self.process, self.batch_size, self.max_tokens = process, batch_size, max_tokens
        self.model = for_inference(load_model(folder).model, process)
        self.pruner = Dense() if dense else self.model.pruner()
        config = self.model.config
        self.reader = Reader(
            folder, config, length_limit(config, folder, max_length), no_answer_threshold=no_answer_threshold
        )
        self.task = task_for_head(config.head)

    def answer(self, records: list[Record]) -> list[dict[str, Any]]:
        """An answer for each record, in order, with its "id" if it has one. Raises: InputError naming the record."""
        encoded, finish = self.prepare(records)
        names = [{"id": record["id"]} if "id" in record else {} for _, record in records]
        return [name | answer for name, answer in zip(names, finish(self.run(encoded)))]

    def prepare(self, records: list[Record]) -> Prepared:
        """Turns records into sequences to `run`. Raises: InputError naming the record."""
        return self.task.prepare(records, self.reader)

    @torch.inference_mode()
    def run(self, encoded: list[Encoded]) -> list[tuple[Tensor, list[int]]]:
        """Runs N sequences. Sequences of similar length run together.

        Returns for each its logits, (C,) or (n, C), and the tokens kept in each layer (L,).
        """
        outputs: list[Any] = [None] * len(encoded)
        lengths = np.array([len(sequence.token_ids) for sequence in encoded])
        order = np.argsort(lengths, kind="stable")
        for indices in token_batches(order, lengths, self.batch_size, max_tokens=self.max_tokens):
            batch = pack_encoded([encoded[i] for i in indices])
            with self.process.autocast(self.model):
                output = self.model(batch.to(self.process.device), self.pruner)
            rows = by_sequence(output.logits.float().cpu(), lengths[indices].tolist(), self.model.config.head)
            for i, logits, kept in zip(indices, rows, output.kept.T.tolist()):
                outputs[i] = (logits, kept)
        return outputs


def predict_file(predictor: Predictor, source: Path, output: Path | None, progress: Callable[..., Any] = quiet) -> int:
    """Answers each line of a JSONL file, in order, and returns how many there were.

    output: the file to write, whole or not at all; None: standard output.
    Raises: InputError naming file and line.
    """
    if predictor.process.world > 1 and not source.is_file():
        raise InputError(f"--input {source}: is a pipe, which several processes cannot share; save it first")
    if output is not None and output.resolve() == source.resolve():
        raise InputError(f"--output {output}: is the input; choose another file")
    if output is not None and output.is_dir():
        raise InputError(f"--output {output}: is a folder; name a file")
    if output is None or not predictor.process.main:
        return answer_lines(predictor, source, sys.stdout, progress=progress)
    counts = []

    def write(path: Path) -> None:
        with open(path, "w", encoding="utf-8") as file:
            counts.append(answer_lines(predictor, source, file, progress=progress))

    write_file(output, write)
    return counts[0]


def answer_lines(predictor: Predictor, source: Path, file: TextIO, progress: Callable[..., Any]) -> int:
    """Writes an answer for each line of `source` to `file`, and returns how many.

    Of W processes each answers every W-th line. The main process writes them all, in order.
    """
    process, count = predictor.process, 0
    for records in chunked(read_lines(source), 32 * predictor.batch_size * process.world):
        parts = process.gather(predictor.answer(records[process.rank :: process.world]))
        for i in range(len(records) if process.main else 0):
            file.write(json_line(parts[i % process.world][i // process.world], file))
        count += len(records)
        progress(step=count, steps=None)
    file.flush()  # a full disk fails here, not when the program ends
    if count == 0:
        raise InputError(f"{source}: holds no lines")
    return count


def read_lines(source: Path) -> Iterator[Record]:
    """Yields the records of a JSONL file, each with its place for messages. Raises: InputError."""
    for number, record in read_records(source, read_jsonl):
        yield f"{source}, line {number}", record
