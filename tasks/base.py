"""What a task is, where its examples come from, and how it reads the records of `predict`.

There is a subclass of `Task` for each kind of head.
"""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from data import IGNORED, Examples
from model import Batch, Config, pack
from support.errors import InputError
from support.files import file_digest
from support.settings import MAX_SEQ_LENGTH
from tasks.readers import SUFFIXES, file_kind
from tasks.tokenizer import Encoded, Tokenizer

Metrics = dict[str, float]
Record = tuple[str, Any]  # where a record stands, for messages, and the record


class Prepared(NamedTuple):
    """Records made ready to run."""

    encoded: list[Encoded]  # the sequences to run
    # Turns the logits ((C,) or (n, C)) and the tokens kept by layer of each sequence into one answer per record.
    finish: Callable[[list[tuple[Tensor, list[int]]]], list[dict[str, Any]]]


def pack_encoded(encoded: list[Encoded]) -> Batch:
    """Packs sequences that are ready to run, on the CPU."""
    return pack(
        [sequence.token_ids for sequence in encoded],
        [sequence.segment_ids for sequence in encoded],
        [sequence.question_length for sequence in encoded],
    )


def task_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, or squared error where there is one output. logits (K, C), targets (K,) -> ()."""
    if logits.size(1) == 1:
        return F.mse_loss(logits[:, 0].float(), targets, reduction="sum")
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")


@dataclass
class Reader:
    """What a checkpoint says about reading records, and a count of those that were cut."""

    folder: Path
    config: Config
    max_length: int
    no_answer_threshold: float | None = None  # "span" heads: see `choose_text`
    truncated: int = 0

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Opened at the first text, since records of token ids need no tokenizer. Raises: InputError."""
        return Tokenizer(self.folder)


@dataclass(frozen=True)
class Task(ABC):
    """What is asked of a text, and how answers are judged."""

    name: str  # "custom" for the user's own data
    labels: tuple[str, ...] | None  # class names in id order; (): regression; None: read them off the training data
    metric: str
    text: str  # columns of the text, the second text and the label
    pair: str | None
    label: str
    hub: str = ""  # its name on the Hugging Face hub
    # Text, pair and label in GLUE's TSV files, where they differ; numbers count columns of a file without header.
    tsv: tuple[str | int, str | int | None, str | int] | None = None
    # The sets to evaluate on: suffix of their metrics, name of their file, split on the hub. MNLI has two.
    dev: tuple[tuple[str, str, str], ...] = (("", "dev", "validation"),)
    max_length: int = MAX_SEQ_LENGTH  # tokens, where neither the user nor the checkpoint says

    head: ClassVar[str]  # of the model, a key of `model.ARCHITECTURES`
    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES  # of its files, the preferred ones first
    expected: ClassVar[str] = ".tsv (or .csv, .jsonl, .parquet)"  # the same, for messages

    @property
    def title(self) -> str:
        """What messages call it."""
        return "your own data" if self.name == "custom" else self.name

    @property
    def regression(self) -> bool:
        return self.labels == ()

    def columns(self, path: Path) -> tuple[Any, Any, Any]:
        """The text, pair and label columns of a file."""
        return self.tsv if self.tsv and file_kind(path) == ".tsv" else (self.text, self.pair, self.label)

    def file_names(self, name: str) -> list[str]:
        """Names, without ending, that a file of this set may have. name: "train", or the name of a set in `dev`."""
        return [name] if name == "train" or len(self.dev) > 1 else [name, "validation", "valid", "testa"]

    @abstractmethod
    def read(self, path: Path) -> Iterator[Any]:
        """Yields the rows of a file. Raises: InputError naming file and line."""

    def read_hub(self, split: str) -> Iterator[Any]:
        """Yields the rows of a split on the hub. Raises: InputError."""
        raise InputError(f"{self.title}: is not on the hub; name its files with --data PATH")

    @abstractmethod
    def load(
        self, source: Source, split: str, tokenizer: Tokenizer, max_length: int, labels: tuple[str, ...] | None = None
    ) -> tuple[dict[str, Examples], tuple[str, ...]]:
        """Reads and tokenizes a split: {suffix of the metrics: examples}, and the label names.

        split: "train", "dev" or "eval", see `Source.rows`. labels: class names in id order; default: the task's, or, if
        it has none, those of this split, sorted. Raises: InputError.
        """

    def load_unlabelled(self, path: Path, tokenizer: Tokenizer, max_length: int) -> Examples:
        """Reads and tokenizes a file of texts without labels, which have no targets. Raises: InputError."""
        raise NotImplementedError  # heads other than classifiers

    def choices(self, logits: Tensor, lengths: Tensor) -> Tensor:
        """The K choices that the losses compare, a row each: logits of B sequences with `lengths` (B,) -> (K, C)."""
        return logits

    @abstractmethod
    def targets(self, examples: Examples, indices: np.ndarray) -> Tensor:
        """What the choices of these examples should be: (K,), `data.IGNORED` where a choice does not count."""

    @abstractmethod
    def count_targets(self, examples: Examples, indices: np.ndarray) -> int:
        """How many choices of these examples count: the loss is their mean."""

    @abstractmethod
    def judge(self, examples: Examples, logits: list[np.ndarray]) -> tuple[Metrics, float]:
        """Metrics and the one score to select on. logits: of each example in order, (C,) or (n, C)."""

    @abstractmethod
    def prepare(self, records: list[Record], reader: Reader) -> Prepared:
        """Makes records of `predict` ready to run. Raises: InputError naming the record."""


class Part(NamedTuple):
    """One set of examples, not read yet."""

    location: str  # the file or the split on the hub, for messages
    identity: str  # changes when the content does; part of cache keys
    rows: Iterator[Any]


@dataclass(frozen=True)
class Source:
    """Where a task's examples come from: the hub, a folder, or a file."""

    task: Task
    path: Path | None = None  # None: the hub
    dev_path: Path | None = None

    def load(
        self, split: str, tokenizer: Tokenizer, max_length: int, labels: tuple[str, ...] | None = None
    ) -> tuple[dict[str, Examples], tuple[str, ...]]:
        """See `Task.load`."""
        return self.task.load(self, split, tokenizer, max_length, labels=labels)

    def rows(self, split: str) -> dict[str, Part]:
        """The sets of a split by the suffix of their metrics.

        split: "train", "dev" (the sets to evaluate on), or "eval" (the same, and one file alone will do).
        Raises: InputError for a file that is missing.
        """
        names = (("", "train", "train"),) if split == "train" else self.task.dev
        if self.path is None and self.dev_path is not None:
            raise InputError("--dev-data goes with --data")
        if self.path is None:
            return {
                suffix: Part(
                    f"{self.task.name}'s {hub_split}",
                    f"hub {self.task.hub} {hub_split}",
                    self.task.read_hub(hub_split),
                )
                for suffix, _, hub_split in names
            }
        if split != "train" and (self.dev_path or self.path).is_file():
            names = names[:1]
        parts = {}
        for suffix, name, _ in names:
            path = self._file(split, name)
            # The file's kind says how it is read.
            identity = f"{file_kind(path)} {self.task.columns(path)} {file_digest(path)}"
            parts[suffix] = Part(str(path), identity, self.task.read(path))
        return parts

    def digest(self) -> str | None:
        """A digest of what training reads: the content of its files, not their names. None: the hub."""
        if self.path is None:
            return None
        parts = [part.identity for split in ("train", "dev") for part in self.rows(split).values()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def files(self) -> list[Path]:
        """The local files that would be read, of those that are there."""
        names = (("train", "train"), *(("eval", name) for _, name, _ in self.task.dev)) if self.path else ()
        files = []
        for split, name in names:
            with contextlib.suppress(InputError):
                files.append(self._file(split, name))
        return files

    def _file(self, split: str, name: str) -> Path:
        use_dev = split != "train" and self.dev_path is not None
        path, option = (self.dev_path, "--dev-data") if use_dev else (self.path, "--data")
        if not path.exists():
            raise InputError(f"{option} {path}: no such file or folder")
        if not path.is_dir():
            if not path.is_file():
                raise InputError(f"{option} {path}: is no regular file; it is read more than once, so save it first")
            if split == "dev" and not use_dev:
                raise InputError(f"--data {path}: is one file; name the file to evaluate on with --dev-data")
            return path
        plain = self.task.name.replace("-", "").lower()
        inner = [f for f in sorted(path.iterdir()) if f.is_dir() and f.name.replace("-", "").lower() == plain]
        for folder in (path, *inner):
            for candidate in self.task.file_names(name):
                for suffix in (*self.task.suffixes, *(f"{suffix}.gz" for suffix in self.task.suffixes)):
                    if (folder / f"{candidate}{suffix}").is_file():
                        return folder / f"{candidate}{suffix}"
        raise InputError(f"{option} {path}: holds no {self.task.file_names(name)[0]}{self.task.expected}")
