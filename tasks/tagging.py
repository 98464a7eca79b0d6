"""Token classification: a label for each word of a sentence, such as a part of speech or a named entity."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import CACHE_VERSION, IGNORED, Examples, cached_table, chunked, list_buffer, read_columns
from support.errors import InputError
from tasks.base import Metrics, Prepared, Reader, Record, Source, Task
from tasks.readers import (
    CONLL_SUFFIXES,
    SUFFIXES,
    check_file,
    file_kind,
    is_text,
    label_order,
    parquet_has,
    read_conll,
    read_jsonl,
    read_parquet,
    read_records,
)
from tasks.tokenizer import Encoded, Tokenizer, check_room

if TYPE_CHECKING:
    import datasets

# ----------------------------------------------------------------------------------------------------------------------
# Reading


class Sentence(NamedTuple):
    words: list[str]
    labels: list[str] | None  # one for each word; None: the file has none
    line: int  # where it ends in the file, from 1


def read_tagged(path: Path, words: str = "words", labels: str = "labels") -> Iterator[Sentence]:
    """Yields the sentences of a file. The ending of its name tells its kind:

    .jsonl, .json  an object a line: {"words": ["in", "Malden"], "labels": ["O", "B-LOC"]}
    .parquet       the same columns
    any other      CoNLL, see `readers.read_conll`

    words, labels: the names of the columns in JSONL and Parquet, where labels may be whole numbers (read as "0", "1").
    Labels are None where there is no such column, or words alone: enough to predict, not to train.
    Raises: InputError naming file and line for a file that is missing, empty, damaged, not UTF-8 or without words, and
    for labels that are missing in part or not as many as the words.
    """
    check_file(path)
    suffix = file_kind(path)
    if suffix in (".jsonl", ".json"):
        records = read_records(path, read_jsonl, [words])
    elif suffix == ".parquet":
        records = read_records(path, read_parquet, [words, labels] if parquet_has(path, labels) else [words])
    else:
        records, words, labels = read_records(path, read_conll), "words", "labels"
    tagged = None  # whether the sentences have labels
    for line, record in records:
        location = f"{path}, line {line}"
        sentence = Sentence(
            _checked_words(record[words], words, location), _checked_labels(record.get(labels), labels, location), line
        )
        if sentence.labels is not None and len(sentence.labels) != len(sentence.words):
            raise InputError(
                f"{location}: {len(sentence.words)} words, {len(sentence.labels)} labels; expected one a word"
            )
        if tagged not in (None, sentence.labels is not None):
            raise InputError(
                f"{location}: {'no labels' if tagged else 'labels'}, unlike the sentences before; give all or none"
            )
        tagged = sentence.labels is not None
        yield sentence
    if tagged is None:
        raise InputError(f"{path}: holds no sentences")


def _checked_words(words: Any, name: str, location: str) -> list[str]:
    if not isinstance(words, list) or not words or not all(is_text(word) and word for word in words):
        raise InputError(f"{location}: {name!r} is not a list of words; expected strings, at least one and none empty")
    return words


def _checked_labels(labels: Any, name: str, location: str) -> list[str] | None:
    if labels is None:
        return None
    if not isinstance(labels, list) or not all(type(x) is int or (is_text(x) and x.strip()) for x in labels):
        raise InputError(
            f"{location}: {name!r} is not a list of labels; expected strings, none empty, or whole numbers"
        )
    return [str(label).strip() for label in labels]


# ----------------------------------------------------------------------------------------------------------------------
# Words and their tokens


class Aligned(NamedTuple):
    """A sentence as the model reads it."""

    token_ids: list[int]
    segment_ids: list[int]
    first: list[int]  # position of each word's first token; words that were cut off are missing at the end
    truncated: bool


def align(tokenizer: Tokenizer, sentences: list[Sentence], max_length: int) -> list[Aligned]:
    """Token ids with the special tokens, cut to `max_length` tokens, and where among them each word starts.

    The ids are those of the words written as a text, with blanks between. Some words have no token of their own
    (control characters, which BERT's tokenizer removes). Such a word shares the token of the next word or, at the end,
    the last token, so that every word that was not cut off has a token to label.
    """
    tokenizer.backend.enable_truncation(max_length)  # on the right, so that each word's first token is there or not
    # In byte-level BPE the blank belongs to the word, and some tokenizers put it there; those without blanks drop it.
    blank = "" if getattr(tokenizer.backend.pre_tokenizer, "add_prefix_space", False) else " "
    texts = [[blank + word if i else word for i, word in enumerate(sentence.words)] for sentence in sentences]
    aligned = []
    for sentence, encoding in zip(sentences, tokenizer.run(texts, is_pretokenized=True)):
        starts: dict[int, int] = {}
        for position, word in enumerate(encoding.word_ids):  # None for special tokens
            if word is not None:
                starts.setdefault(word, position)
        truncated = bool(encoding.overflowing)
        if truncated:
            tokenizer.refuse_left("sentences")
        count = max(starts, default=-1) + 1 if truncated else len(sentence.words)
        first, position = [], len(encoding.ids) - 1
        for word in reversed(range(count)):
            position = starts.get(word, position)
            first.append(position)
        aligned.append(Aligned(encoding.ids, tokenizer.segment_ids(encoding), first[::-1], truncated))
    return aligned


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


def has_entities(labels: Iterable[str]) -> bool:
    """Whether some label names a part of an entity, such as "B-PER"."""
    return any(re.match("[BIMESLU]-", label) for label in labels)


def entity_metrics(gold: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """Metrics of tagged sentences: labels by sentence and word, as many words in both.

    With labels of entities ("B-PER", "I-PER", "O"; BIO, IO, BIOES and BILOU): micro-averaged "f1", "precision" and
    "recall" of whole entities, whose boundaries and type must all be right. Entities begin and end as in conlleval, so
    an "I-" may begin one too. Where no label on either side has such a prefix (parts of speech): "macro_f1" over words.
    In both cases "accuracy" over words. What is undefined, such as the precision of no predictions, is 0.
    """
    from seqeval.metrics import sequence_labeling
    from sklearn import metrics

    words = list(chain.from_iterable(gold)), list(chain.from_iterable(predicted))
    accuracy = float(metrics.accuracy_score(*words))
    if not has_entities(chain(*words)):
        return {"macro_f1": float(metrics.f1_score(*words, average="macro", zero_division=0.0)), "accuracy": accuracy}
    # seqeval's lenient mode knows BILOU's last and unit words by their names in BIOES.
    names = {"L-": "E-", "U-": "S-"}
    gold, predicted = (
        [[names.get(label[:2], label[:2]) + label[2:] for label in sentence] for sentence in side]
        for side in (gold, predicted)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about labels without a prefix among the others
        precision, recall, f1, _ = sequence_labeling.precision_recall_fscore_support(
            gold, predicted, average="micro", zero_division=0
        )
    return {"f1": float(f1), "precision": float(precision), "recall": float(recall), "accuracy": accuracy}


# ----------------------------------------------------------------------------------------------------------------------
# The task


@dataclass
class TaggedWords:
    """The details of `Examples` of sentences: what judging needs."""

    names: tuple[str, ...]  # the labels in id order
    table: datasets.Dataset  # of the sentences, memory-mapped: first, labels


@dataclass(frozen=True)
class Tagging(Task):
    """A label for each word of the user's own sentences."""

    head: ClassVar[str] = "token"
    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES + CONLL_SUFFIXES
    expected: ClassVar[str] = ".conll (or .txt, .jsonl, .parquet)"

    @property
    def title(self) -> str:
        return "--tagging"

    def read(self, path: Path) -> Iterator[Sentence]:
        return read_tagged(path, self.text, self.label)

    def load(
        self, source: Source, split: str, tokenizer: Tokenizer, max_length: int, labels: tuple[str, ...] | None = None
    ) -> tuple[dict[str, Examples], tuple[str, ...]]:
        """See `Task.load`; "O" is the first label. Targets: (ΣT,) int64, the label at each word's first token, else
        -100. Details: `TaggedWords`."""
        import pyarrow.compute as pc

        check_room(tokenizer, max_length)
        ((location, identity, sentences),) = source.rows(split).values()
        key = f"tagged {CACHE_VERSION} {identity} {max_length} {tokenizer.identity}"
        digest = hashlib.sha256(key.encode()).hexdigest()[:32]
        table = _tokenize(self._with_labels(sentences, location), tokenizer, max_length, digest)
        present = pc.unique(pc.list_flatten(table.data.column("labels"))).to_pylist()
        unknown = [label for label in present if labels is not None and label not in labels]
        if unknown:
            sentences = source.rows(split)[""].rows
            line = next(sentence.line for sentence in sentences if unknown[0] in sentence.labels)
            raise InputError(
                f"{location}, line {line}: the label {unknown[0]!r} is none of the model's, {', '.join(labels)}"
            )
        if labels is None:
            labels = tuple(sorted(present, key=lambda name: (name != "O", *label_order(name))))
            if len(labels) < 2:
                raise InputError(f"{location}: all words have the label {labels[0]!r}; tagging needs two or more")
        examples = Examples.from_table(
            table,
            targets=_targets(table, labels),
            truncated=int(table.data.column("truncated").to_numpy().sum()),
            details=TaggedWords(labels, table),
        )
        return {"": examples}, labels

    def _with_labels(self, sentences: Iterable[Sentence], location: str) -> Iterator[Sentence]:
        for sentence in sentences:
            if sentence.labels is None:
                raise InputError(
                    f"{location}, line {sentence.line}: no labels; expected the tag last in a CoNLL line, or a column "
                    f"{self.label!r} (name another with --label-column)"
                )
            yield sentence

    def targets(self, examples: Examples, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(examples.targets[examples.rows(indices)])

    def count_targets(self, examples: Examples, indices: np.ndarray) -> int:
        return int((examples.targets[examples.rows(indices)] != IGNORED).sum())

    def judge(self, examples: Examples, logits: list[np.ndarray]) -> tuple[Metrics, float]:
        """Metrics of `entity_metrics`; the score is the F1 of entities where labels name any, else the accuracy.

        Words that were cut off count as "O", or as the first label where there is no "O".
        """
        details: TaggedWords = examples.details
        names = details.names
        default = "O" if "O" in names else names[0]
        gold, predicted = [], []
        for (first, labels), row in zip(read_columns(details.table, "first", "labels"), logits):
            gold.append(labels)
            best = best_labels(row, first, names)
            predicted.append(best + [default] * (len(labels) - len(best)))
        metrics = entity_metrics(gold, predicted)
        return metrics, metrics.get("f1", 0.0) if has_entities(names) else metrics["accuracy"]

    def prepare(self, records: list[Record], reader: Reader) -> Prepared:
        """{"words"}, or {"text"} of words between blanks, gets {"words", "labels", "tokens", "kept"}.

        The label of a word that was cut off is None.
        """
        sentences = []
        for location, record in records:
            words = record.get("words") if isinstance(record, dict) else None
            if words is None and isinstance(record, dict) and is_text(record.get("text")):
                words = record["text"].split()
            if not words or not isinstance(words, list):
                raise InputError(
                    f'{location}: expected an object with "words", a list of words, or with "text" of some'
                )
            sentences.append(Sentence(_checked_words(words, "words", location), None, 0))
        check_room(reader.tokenizer, reader.max_length)
        aligned = align(reader.tokenizer, sentences, reader.max_length)
        reader.truncated += sum(result.truncated for result in aligned)

        def finish(outputs: list[tuple[Tensor, list[int]]]) -> list[dict[str, Any]]:
            answers = []
            for sentence, result, (logits, kept) in zip(sentences, aligned, outputs):
                labels: list[str | None] = [*best_labels(logits.numpy(), result.first, reader.config.labels)]
                labels += [None] * (len(sentence.words) - len(labels))
                counts = {"tokens": len(result.token_ids), "kept": kept}
                answers.append({"words": sentence.words, "labels": labels, **counts})
            return answers

        return Prepared([Encoded(result.token_ids, result.segment_ids) for result in aligned], finish)


def best_labels(logits: np.ndarray, first: list[int], names: tuple[str, ...]) -> list[str]:
    """The label of each word that was not cut off. logits: (n, C); first: the position of each word's first token."""
    return [names[i] for i in logits[first].argmax(1)]


def _tokenize(sentences: Iterable[Sentence], tokenizer: Tokenizer, max_length: int, key: str) -> datasets.Dataset:
    import datasets

    numbers = datasets.List(datasets.Value("int32"))
    features = {
        "token_ids": numbers,
        "segment_ids": datasets.List(datasets.Value("int8")),
        "first": numbers,
        "labels": datasets.List(datasets.Value("string")),
        "truncated": datasets.Value("bool"),
    }

    def generate() -> Iterator[dict]:
        for chunk in chunked(sentences, 1024):
            for sentence, aligned in zip(chunk, align(tokenizer, chunk, max_length)):
                yield aligned._asdict() | {"labels": sentence.labels}

    return cached_table(generate, features, key)


def _targets(table: datasets.Dataset, labels: tuple[str, ...]) -> np.ndarray:
    """The target of each token: (ΣT,) int64. Of words that share a token the first one counts."""
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths = pc.list_value_length(table.data.column("token_ids")).to_numpy().astype(np.int64)
    first, counts = list_buffer(table, "first")  # position of each word that was not cut off; their number by sentence
    column = table.data.column("labels")
    words = pc.list_value_length(column).to_numpy().astype(np.int64)
    ids = pc.index_in(pc.list_flatten(column), pa.array(labels)).to_numpy().astype(np.int64)
    # Words that were cut off stand at the end of their sentence.
    index = np.arange(len(ids)) - np.repeat(words.cumsum() - words, words)
    ids = ids[index < np.repeat(counts, words)]
    tokens = np.repeat(lengths.cumsum() - lengths, counts) + first
    targets = np.full(lengths.sum(), IGNORED)
    targets[tokens[::-1]] = ids[::-1]  # the last assignment to a token stays
    return targets
