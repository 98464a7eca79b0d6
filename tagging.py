"""Token classification: tagged sentences, their words among the tokens, and metrics.

Only the standard library is imported at the top, as in data.py.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data import (
    Examples,
    InputError,
    Source,
    Tokenizer,
    read_jsonl,
    read_columns,
    read_parquet,
    cached_table,
    check_room,
    chunked,
    is_text,
    label_order,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# ----------------------------------------------------------------------------------------------------------------------
# Readers: one sentence after the other, so that a file of any size is read in flat memory


class Sentence(NamedTuple):
    words: list[str]
    labels: list[str] | None  # one a word; None: the file has none
    line: int  # where it ends in the file, from 1


def read_tagged(path: Path, words: str = "words", labels: str = "labels") -> Iterator[Sentence]:
    """Yields the sentences of a file, whose kind is told by its name's ending.

    .jsonl, .json  an object a line: {"words": ["in", "Malden"], "labels": ["O", "B-LOC"]}
    .parquet       the same columns
    any other      CoNLL: a word a line, the tag last, columns parted by tabs or else blanks, blank lines between
                   sentences. "-DOCSTART-" lines count as blank, "# key = value" lines are comments.

    words, labels: the names of the columns in JSONL and Parquet, where labels may be whole numbers (read as "0", "1").
    Labels are None where there is no such column, or words alone: enough to predict, not to train.
    Raises: InputError naming file and line for a file that is missing, empty, damaged, not UTF-8 or without words, and
    for labels that are missing in part or not as many as the words.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".json"):
        records = read_jsonl(path, [words])
    elif suffix == ".parquet":
        records = read_parquet(path, [words, labels] if _has_column(path, labels) else [words])
    else:
        records, words, labels = _read_conll(path), "words", "labels"
    line, tagged = 0, None
    try:
        for line, record in records:
            where = f"{path}, line {line}"
            sentence = Sentence(
                _checked_words(record[words], words, where), _checked_labels(record.get(labels), labels, where), line
            )
            if sentence.labels is not None and len(sentence.labels) != len(sentence.words):
                raise InputError(
                    f"{where}: {len(sentence.words)} words, {len(sentence.labels)} labels; expected one a word"
                )
            if tagged not in (None, sentence.labels is not None):
                raise InputError(
                    f"{where}: {'no labels' if tagged else 'labels'}, unlike the sentences before; give all or none"
                )
            tagged = sentence.labels is not None
            yield sentence
    except UnicodeDecodeError as error:
        after = f", after line {line}" if line else ""
        raise InputError(f"{path}{after}: not UTF-8 ({error.reason}); convert the file first") from None
    except OSError as error:
        raise InputError(f"{path}, after line {line}: not readable ({error})") from None
    if tagged is None:
        raise InputError(f"{path}: holds no sentences")


def _checked_words(words: Any, name: str, where: str) -> list[str]:
    if not isinstance(words, list) or not words or not all(is_text(word) and word for word in words):
        raise InputError(f"{where}: {name!r} is not a list of words; expected strings, at least one and none empty")
    return words


def _checked_labels(labels: Any, name: str, where: str) -> list[str] | None:
    if labels is None:
        return None
    if not isinstance(labels, list) or not all(type(x) is int or (is_text(x) and x.strip()) for x in labels):
        raise InputError(f"{where}: {name!r} is not a list of labels; expected strings, none empty, or whole numbers")
    return [str(label).strip() for label in labels]


def _has_column(path: Path, name: str) -> bool:
    from pyarrow import ArrowException, parquet

    try:
        return name in parquet.read_schema(path).names
    except ArrowException:
        return False  # the reader says what is wrong with the file


def _read_conll(path: Path) -> Iterator[tuple[int, dict]]:
    rows: list[list[str]] = []  # the columns of the sentence's lines
    columns, since = 0, 0  # how many the file has, and the line that says so
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(chain(file, [""]), 1):  # a blank line more ends the last sentence
            line = line.rstrip(" \t\n")
            if line.startswith("# ") and " = " in line:
                continue
            if not line or line.startswith("-DOCSTART-"):
                if rows:
                    tags = {"labels": [row[-1] for row in rows]} if columns > 1 else {}
                    yield number - 1, {"words": [row[0] for row in rows]} | tags
                rows = []
                continue
            # Between tabs a word may hold blanks. Other white space, such as a no-break space, parts no columns.
            cells = [cell.strip(" ") for cell in line.split("\t")] if "\t" in line else re.split(" +", line.lstrip(" "))
            if not columns:
                columns, since = len(cells), number
            if len(cells) != columns:
                raise InputError(
                    f"{path}, line {number}: {len(cells)} columns, expected {columns} as in line {since}; "
                    "give the word first and its tag last, or words alone throughout"
                )
            if not cells[0]:
                raise InputError(f"{path}, line {number}: no word before the tag; expected the word first")
            rows.append(cells)


# ----------------------------------------------------------------------------------------------------------------------
# Words and their tokens


class Aligned(NamedTuple):
    token_ids: list[int]
    segment_ids: list[int]  # all 0
    first: list[int]  # position of each word's first token; words that were cut off are missing at the end
    truncated: bool


def align(tokenizer: Tokenizer, sentences: list[Sentence], max_length: int) -> list[Aligned]:
    """Token ids with the special tokens, cut to `max_length` tokens, and where among them each word starts.

    The ids are those of the words written as a text, with blanks between. A word without a token of its own (control
    characters, which BERT's tokenizer removes) has the place of the next word, or, with none after it, of the last
    token, so that every word that was not cut off has a label to learn and an answer.
    """
    tokenizer.backend.enable_truncation(max_length)
    # The blank belongs to the word in byte-level BPE, and tokenizers that know no blanks drop it.
    texts = [[f" {word}" if i else word for i, word in enumerate(sentence.words)] for sentence in sentences]
    aligned = []
    for sentence, encoding in zip(sentences, tokenizer.backend.encode_batch(texts, is_pretokenized=True)):
        starts: dict[int, int] = {}
        for position, word in enumerate(encoding.word_ids):  # None for special tokens
            if word is not None:
                starts.setdefault(word, position)
        truncated = bool(encoding.overflowing)
        count = max(starts, default=-1) + 1 if truncated else len(sentence.words)
        first, place = [], len(encoding.ids) - 1
        for word in reversed(range(count)):
            place = starts.get(word, place)
            first.append(place)
        aligned.append(Aligned(encoding.ids, [0] * len(encoding.ids), first[::-1], truncated))
    return aligned


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


def has_entities(labels: Iterable[str]) -> bool:
    """Whether labels name entities, "B-PER" and the like, and not each word for itself."""
    return any(re.match("[BIMESLU]-", label) for label in labels)


def entity_metrics(gold: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """Metrics of tagged sentences: labels by sentence and word, as many words in both.

    With labels of entities ("B-PER", "I-PER", "O"; BIO, IO, BIOES and BILOU): micro-averaged "f1", "precision" and
    "recall" of whole entities, where boundaries and type must all be right. Entities are found as by conlleval, so an
    "I-" may begin one too. Where no label on either side has such a prefix (parts of speech): "macro_f1" over words. In
    both cases "accuracy" over words. What is undefined, such as the precision of no predictions, is 0.
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
# Tokenized examples

IGNORED = -100  # the label of tokens that the loss leaves out: all but the first of each word


@dataclass
class TaggedExamples(Examples):
    """Sentences with a label for each word. `labels` (N,) of the base class: how many tokens have one."""

    names: tuple[str, ...] = ()

    def targets(self, indices: np.ndarray) -> Tensor:
        """The label of each token of a batch, at the first token of each word: (T,)."""
        import torch

        ids = {name: i for i, name in enumerate(self.names)}
        rows = self.table[list(map(int, indices))]
        targets = []
        for n, first, labels in zip(self.lengths[indices], rows["first"], rows["labels"]):
            row = torch.full((n,), IGNORED)
            for place, label in reversed(list(zip(first, labels))):  # of words in one place the first counts
                row[place] = ids[label]
            targets.append(row)
        return torch.cat(targets)

    def count_targets(self, indices: np.ndarray) -> int:
        return int(self.labels[indices].sum())

    def judge(self, metric: str, logits: list[np.ndarray]) -> tuple[dict[str, float], float]:
        """Metrics of `entity_metrics`; the score is the F1 of entities where labels name any, else the accuracy.

        Words that were cut off count as "O", or as the first label where there is no "O".
        """
        gold, predicted = [], []
        unread = "O" if "O" in self.names else self.names[0]
        for (first, labels), row in zip(read_columns(self.table, "first", "labels"), logits):
            gold.append(labels)
            found = best_labels(row, first, self.names)
            predicted.append(found + [unread] * (len(labels) - len(found)))
        metrics = entity_metrics(gold, predicted)
        return metrics, metrics.get("f1", 0.0) if has_entities(self.names) else metrics["accuracy"]


def best_labels(logits: np.ndarray, first: list[int], names: tuple[str, ...]) -> list[str]:
    """The label of each word of a sentence that was not cut off, logits (n, C)."""
    return [names[i] for i in logits[first].argmax(1)]


def load_sentences(
    source: Source, split: str, tokenizer: Tokenizer, max_length: int, labels: tuple[str, ...] | None = None
) -> tuple[dict[str, TaggedExamples], tuple[str, ...]]:
    """Reads and tokenizes a split, as `data.load_examples`: {"": examples} and the labels, "O" first.

    Raises: InputError.
    """
    import datasets
    import numpy as np
    import pyarrow.compute as pc

    task = source.task
    check_room(tokenizer, max_length)

    def read() -> tuple[str, str, Iterator[Sentence]]:
        (found,) = source.rows(split, lambda path: read_tagged(path, task.text, task.label)).values()
        return found

    place, identity, sentences = read()
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
                if sentence.labels is None:
                    raise InputError(
                        f"{place}, line {sentence.line}: no labels; expected the tag last in a CoNLL line, or a column "
                        f"{task.label!r} (name another with --label-column)"
                    )
                yield aligned._asdict() | {"labels": sentence.labels}

    key = hashlib.sha256(f"tagged {identity} {max_length} {tokenizer.identity}".encode()).hexdigest()[:32]
    table = cached_table(generate, features, key)
    found = pc.unique(pc.list_flatten(table.data.column("labels").combine_chunks())).to_pylist()
    unknown = [label for label in found if labels is not None and label not in labels]
    if unknown:
        line = next(sentence.line for sentence in read()[2] if unknown[0] in sentence.labels)
        raise InputError(f"{place}, line {line}: the label {unknown[0]!r} is none of the model's, {', '.join(labels)}")
    if labels is None:
        labels = tuple(sorted(found, key=lambda name: (name != "O", *label_order(name))))
        if len(labels) < 2:
            raise InputError(f"{place}: all words have the label {labels[0]!r}; tagging needs two or more")
    lengths = pc.list_value_length(table.data.column("token_ids")).to_numpy().astype(np.int64)
    words = np.array([len(set(first)) for first in table.data.column("first").to_pylist()])
    truncated = int(pc.sum(table.data.column("truncated")).as_py())
    return {"": TaggedExamples(table, lengths, words, truncated, names=labels)}, labels
