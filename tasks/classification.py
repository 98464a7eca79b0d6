"""One answer for a text or a pair of texts: GLUE's tasks and the user's own data, classes or scores."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from data import CACHE_VERSION, Examples, cached_table, chunked, read_columns
from support.errors import InputError
from support.files import file_digest
from tasks.base import Prepared, Reader, Record, Source, Task
from tasks.readers import Row, file_kind, hub_records, is_number, is_text, label_order, read_rows
from tasks.tokenizer import Encoded, Tokenizer, check_room

if TYPE_CHECKING:
    import datasets


def evaluate_predictions(metric: str, logits: np.ndarray, labels: np.ndarray) -> tuple[dict[str, float], float]:
    """GLUE's metrics, and the one score that selects checkpoints.

    logits (N, C), or (N, 1) for regression; labels (N,). Returns ({name: value}, score). The score is the accuracy, the
    mean of accuracy and F1, the mean of Pearson's and Spearman's correlation, or Matthews' coefficient.
    """
    from scipy import stats
    from sklearn import metrics

    if metric == "correlation":
        values = logits[:, 0]
        # A correlation with a constant is undefined; GLUE users expect a number, and no correlation is 0.
        constant = len(values) < 2 or np.ptp(values) == 0 or np.ptp(labels) == 0
        pearson = 0.0 if constant else float(stats.pearsonr(values, labels)[0])
        spearman = 0.0 if constant else float(stats.spearmanr(values, labels)[0])
        return {"pearson": pearson, "spearman": spearman}, (pearson + spearman) / 2
    predicted = logits.argmax(1)
    accuracy = float(metrics.accuracy_score(labels, predicted))
    if metric == "matthews":
        score = float(metrics.matthews_corrcoef(labels, predicted))
        return {"matthews": score, "accuracy": accuracy}, score
    if metric == "accuracy_f1":
        f1 = float(metrics.f1_score(labels, predicted, zero_division=0.0))
        return {"accuracy": accuracy, "f1": f1}, (accuracy + f1) / 2
    if metric == "accuracy_macro_f1":
        macro_f1 = float(metrics.f1_score(labels, predicted, average="macro", zero_division=0.0))
        return {"accuracy": accuracy, "macro_f1": macro_f1}, accuracy
    return {"accuracy": accuracy}, accuracy


@dataclass(frozen=True)
class Classification(Task):
    """A label, or, for regression, a score for each text or pair of texts."""

    head: ClassVar[str] = "sequence"

    @property
    def torn(self) -> bool:
        """Whether torn lines are left out, not refused: GLUE's own files have some."""
        return self.name != "custom"

    def read(self, path: Path) -> Iterator[Row]:
        return read_rows(path, self.columns(path), torn=self.torn)

    def read_hub(self, split: str) -> Iterator[Row]:
        records = hub_records(f"GLUE's {self.name}", "in GLUE's TSV layout", "nyu-mll/glue", self.hub, split=split)
        for number, record in records:
            label = str(record[self.label]) if self.regression else self.labels[record[self.label]]
            yield Row(number, record[self.text], record[self.pair] if self.pair else None, label)

    def load(
        self, source: Source, split: str, tokenizer: Tokenizer, max_length: int, labels: tuple[str, ...] | None = None
    ) -> tuple[dict[str, Examples], tuple[str, ...]]:
        """See `Task.load`. Targets: class ids (N,) int64, or scores (N,) float32.

        Raises: InputError naming file and line for a label outside the set or a score that is not a number.
        """
        check_room(tokenizer, max_length, self.pair is not None)
        tables, locations = {}, {}
        for suffix, (location, identity, rows) in source.rows(split).items():
            key = f"texts {CACHE_VERSION} {identity} {max_length} {tokenizer.identity} {self.torn}"
            tables[suffix] = _tokenize(rows, tokenizer, max_length, hashlib.sha256(key.encode()).hexdigest()[:32])
            locations[suffix] = location
        torn = {suffix: table.data.column("label").null_count for suffix, table in tables.items()}
        tables = {suffix: _whole_lines(table) for suffix, table in tables.items()}
        labels = self.labels if labels is None else labels
        if labels is None:
            names = {label for table in tables.values() for label in table.unique("label")}
            labels = tuple(sorted(names, key=label_order))
            if len(labels) < 2:
                raise InputError(
                    f"{locations['']}: all examples have the label {labels[0]!r}; classification needs two or more"
                )
        sets = {
            suffix: Examples.from_table(
                table,
                targets=_targets(table, labels, locations[suffix]),
                truncated=int(table.data.column("truncated").to_numpy().sum()),
                left_out=torn[suffix],
            )
            for suffix, table in tables.items()
        }
        return sets, labels

    def load_unlabelled(self, path: Path, tokenizer: Tokenizer, max_length: int) -> Examples:
        columns = (*self.columns(path)[:2], None)
        key = (CACHE_VERSION, file_kind(path), columns, file_digest(path), max_length, tokenizer.identity, self.torn)
        key = f"texts {' '.join(map(str, key))}"
        rows = read_rows(path, columns, torn=self.torn)
        table = _tokenize(rows, tokenizer, max_length, hashlib.sha256(key.encode()).hexdigest()[:32])
        torn, table = table.data.column("label").null_count, _whole_lines(table)
        truncated = int(table.data.column("truncated").to_numpy().sum())
        return Examples.from_table(table, targets=np.empty(0), truncated=truncated, left_out=torn)

    def targets(self, examples: Examples, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(examples.targets[indices])

    def count_targets(self, examples: Examples, indices: np.ndarray) -> int:
        return len(indices)

    def judge(self, examples: Examples, logits: list[np.ndarray]) -> tuple[dict[str, float], float]:
        return evaluate_predictions(self.metric, np.stack(logits), examples.targets)

    def prepare(self, records: list[Record], reader: Reader) -> Prepared:
        """{"text"}, {"text", "text_pair"} or {"token_ids"} each gets {"label", "logits", "tokens", "kept"}."""
        encoded, labels = _encode_records(records, reader), reader.config.labels

        def finish(outputs: list[tuple[Tensor, list[int]]]) -> list[dict[str, Any]]:
            answers = []
            for sequence, (logits, kept) in zip(encoded, outputs):
                values = logits.tolist()
                label = values[0] if len(labels) == 1 else labels[max(range(len(values)), key=values.__getitem__)]
                answers.append({"label": label, "logits": values, "tokens": len(sequence.token_ids), "kept": kept})
            return answers

        return Prepared(encoded, finish)


def _tokenize(rows: Iterator[Row], tokenizer: Tokenizer, max_length: int, key: str) -> datasets.Dataset:
    import datasets

    features = {
        "token_ids": datasets.List(datasets.Value("int32")),
        "segment_ids": datasets.List(datasets.Value("int8")),
        "label": datasets.Value("string"),
        "line": datasets.Value("int64"),
        "truncated": datasets.Value("bool"),
    }

    def generate() -> Iterator[dict]:
        for chunk in chunked(rows, 1024):
            pairs = [row.pair for row in chunk] if chunk[0].pair is not None else None
            for row, encoded in zip(chunk, tokenizer.encode([row.text for row in chunk], pairs, max_length)):
                yield {
                    "token_ids": encoded.token_ids,
                    "segment_ids": encoded.segment_ids,
                    "truncated": encoded.truncated,
                    "label": row.label,
                    "line": row.line,
                }

    return cached_table(generate, features, key)


def _whole_lines(table: datasets.Dataset) -> datasets.Dataset:
    """The table without the rows of torn lines, which have no label."""
    import datasets

    column = table.data.column("label")
    return datasets.Dataset(table.data.filter(column.is_valid())) if column.null_count else table


def _targets(table: datasets.Dataset, labels: tuple[str, ...], location: str) -> np.ndarray:
    """Class ids (N,) int64, or, without labels, scores (N,) float32."""
    ids = {name: i for i, name in enumerate(labels)}
    if not any(is_number(name) for name in labels):  # files may also give the classes by their numbers
        ids |= {str(i): i for i in range(len(labels))}
    targets = np.empty(len(table), dtype=np.float32 if labels == () else np.int64)
    for i, (label, line) in enumerate(read_columns(table, "label", "line")):
        if labels == ():
            if not is_number(label):
                raise InputError(f"{location}, line {line}: the score {label!r} is not a number")
            targets[i] = float(label)
        elif label not in ids:
            raise InputError(f"{location}, line {line}: the label {label!r} is none of {', '.join(labels)}")
        else:
            targets[i] = ids[label]
    return targets


def _encode_records(records: list[Record], reader: Reader) -> list[Encoded]:
    """Each record as a sequence. Raises: InputError."""
    encoded: list[Any] = [None] * len(records)
    texts: dict[bool, list[int]] = {False: [], True: []}  # indices of single texts and of pairs
    for i, (location, record) in enumerate(records):
        if not isinstance(record, dict) or ("text" in record) == ("token_ids" in record):
            raise InputError(f'{location}: expected an object with "text", or with "token_ids"')
        if "token_ids" in record:
            token_ids = _checked_ids(location, record["token_ids"], reader.config.vocab_size)
            reader.truncated += len(token_ids) > reader.max_length
            token_ids = token_ids[: reader.max_length]
            encoded[i] = Encoded(token_ids, [0] * len(token_ids))
        elif not all(is_text(record.get(key, "")) for key in ("text", "text_pair")):
            raise InputError(f"{location}: text and text_pair must be strings of valid characters")
        else:
            texts["text_pair" in record].append(i)
    for pair, indices in texts.items():
        if not indices:
            continue
        check_room(reader.tokenizer, reader.max_length, pair)
        first = [records[i][1]["text"] for i in indices]
        second = [records[i][1]["text_pair"] for i in indices] if pair else None
        for i, result in zip(indices, reader.tokenizer.encode(first, second, reader.max_length)):
            encoded[i] = result
            reader.truncated += result.truncated
    return encoded


def _checked_ids(location: str, token_ids: Any, vocab_size: int) -> list[int]:
    valid = isinstance(token_ids, list) and token_ids and all(type(t) is int and 0 <= t < vocab_size for t in token_ids)
    if not valid:
        raise InputError(
            f"{location}: token_ids must be a list of one or more whole numbers from 0 to {vocab_size - 1}"
        )
    return token_ids


# ----------------------------------------------------------------------------------------------------------------------
# GLUE

_ENTAILMENT = ("entailment", "not_entailment")
_MNLI_SETS = (("", "dev_matched", "validation_matched"), ("_mismatched", "dev_mismatched", "validation_mismatched"))


def _glue(
    name: str, labels: tuple[str, ...], metric: str, text: str, pair: str | None, **fields: Any
) -> Classification:
    """A GLUE task; on the hub its name is in lower case, without hyphen."""
    return Classification(name, labels, metric, text, pair, "label", hub=name.replace("-", "").lower(), **fields)


GLUE = (
    _glue("CoLA", ("unacceptable", "acceptable"), "matthews", "sentence", None, tsv=(3, None, 1)),
    _glue("SST-2", ("negative", "positive"), "accuracy", "sentence", None),
    _glue(
        "MRPC",
        ("not_equivalent", "equivalent"),
        "accuracy_f1",
        "sentence1",
        "sentence2",
        tsv=("#1 String", "#2 String", "Quality"),
    ),
    _glue("STS-B", (), "correlation", "sentence1", "sentence2", tsv=("sentence1", "sentence2", "score")),
    _glue(
        "QQP",
        ("not_duplicate", "duplicate"),
        "accuracy_f1",
        "question1",
        "question2",
        tsv=("question1", "question2", "is_duplicate"),
    ),
    _glue(
        "MNLI",
        ("entailment", "neutral", "contradiction"),
        "accuracy",
        "premise",
        "hypothesis",
        tsv=("sentence1", "sentence2", "gold_label"),
        dev=_MNLI_SETS,
    ),
    _glue("QNLI", _ENTAILMENT, "accuracy", "question", "sentence"),
    _glue("RTE", _ENTAILMENT, "accuracy", "sentence1", "sentence2"),
)
