"""Extractive question answering, SQuAD 1.1 and 2.0.

A question on a context is answered by a span of the context, or, in SQuAD 2.0, by nothing.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data import CACHE_VERSION, Examples, cached_table, list_buffer
from support.errors import InputError
from support.files import open_text
from support.settings import QUESTION_LENGTH
from tasks.answers import Candidates, best_thresholds, choose_text, find_answers, squad_metrics
from tasks.base import Metrics, Prepared, Reader, Record, Source, Task
from tasks.readers import check_file, file_kind, hub_records, is_text, read_jsonl, read_parquet, read_records
from tasks.tokenizer import Encoded, Tokenizer
from tasks.windows import NOWHERE, Question, Window, make_windows

if TYPE_CHECKING:
    import datasets

# ----------------------------------------------------------------------------------------------------------------------
# Reading

QUESTION_SUFFIXES = (".json", ".jsonl", ".parquet")


def read_squad(path: Path) -> Iterator[Question]:
    """Yields the questions of a file: SQuAD's own .json (1.1 or 2.0), or .jsonl or .parquet with one question a row.

    Rows have the hub's columns: id, question, context, answers {"text": [...], "answer_start": [...]}. An id may be a
    number. Answers may be missing. A question has an answer where its list of answers is not empty; plausible answers
    are ignored. What keeps a question from being learned, such as a wrong answer_start, is in its `problem`.
    Raises: InputError naming file and location for a file that is missing, empty, damaged, not UTF-8 or of another
    layout, a question or context without text, an id that occurs twice.
    """
    check_file(path, QUESTION_SUFFIXES)
    reader = _read_articles if file_kind(path) == ".json" else _read_table
    ids = set()
    for location, record in reader(path):
        question = _question(location, record)
        if question.id in ids:
            raise InputError(f"{location}: the id {question.id!r} occurs twice; every question needs its own")
        ids.add(question.id)
        yield question
    if not ids:
        raise InputError(f"{path}: holds no questions")


def hub_squad(name: str, split: str) -> Iterator[Question]:
    """Yields the "train" or "validation" questions of "squad" or "squad_v2" from the hub. Raises: InputError."""
    for number, record in hub_records(name, "with SQuAD's JSON files", f"rajpurkar/{name}", split=split):
        yield _question(f"{name}'s {split}, row {number}", record)


def _read_articles(path: Path) -> Iterator[tuple[str, dict]]:
    """(location, question with its context) of SQuAD's own layout: articles of paragraphs of questions."""
    try:
        with open_text(path) as file:
            content = json.load(file)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason}); convert the file first") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not readable ({error})") from None
    except (ValueError, RecursionError) as error:
        hint = "; a file with one question a line is named .jsonl" * str(error).startswith("Extra data")
        raise InputError(f"{path}: not JSON ({error}){hint}") from None
    for article_location, article in _each(str(path), content, "data", "article"):
        for paragraph_location, paragraph in _each(article_location, article, "paragraphs", "paragraph"):
            for location, question in _each(paragraph_location, paragraph, "qas", "question"):
                yield location, question | {"context": paragraph.get("context")}


def _read_table(path: Path) -> Iterator[tuple[str, dict]]:
    """(location, record) of a file with a question a row."""
    reader = read_jsonl if file_kind(path) == ".jsonl" else read_parquet
    for line, record in read_records(path, reader):
        yield f"{path}, line {line}", record


def _question(location: str, record: dict) -> Question:
    """The question of a record in either layout, checked."""
    if isinstance(record, dict) and type(record.get("id")) is int:
        record = record | {"id": str(record["id"])}
    name = _get(location, record, "id", str)
    location = f"{location} ({name})"
    question, context = _texts(location, record)
    answers = [] if record.get("answers") is None else record["answers"]
    if isinstance(answers, dict):  # the hub's layout: one list a column
        texts = _get(location, answers, "text", list)
        starts = answers.get("answer_start") if isinstance(answers.get("answer_start"), list) else []
        answers = [{"text": text, "answer_start": start} for text, start in zip_longest(texts, starts[: len(texts)])]
    checked, problem = [], ""
    for answer_location, answer in _each(location, {"answers": answers}, "answers", "answer"):
        text, start = _get(answer_location, answer, "text", str).strip(), answer.get("answer_start")
        first = _find(text, start, context)
        if first is None:
            problem = problem or f"{answer_location}: {_misplaced(text, start, context)}"
        checked.append((text, NOWHERE if first is None else first))
    if not checked and record.get("is_impossible") is False:
        problem = f"{location}: 'answers' is missing or empty, though is_impossible is false; correct one of them"
    return Question(name, question, context, tuple(checked), problem)


def _texts(location: str, record: Any) -> tuple[str, str]:
    """The question, without blanks around it, and the context. Raises: InputError where one is missing or empty."""
    question, context = (_get(location, record, key, str) for key in ("question", "context"))
    if not question.strip() or not context.strip():
        raise InputError(f"{location}: the {'context' if question.strip() else 'question'} is empty")
    return question.strip(), context


def _find(text: str, start: Any, context: str) -> int | None:
    """The first character of an answer's text in the context; None where it does not stand at `start`.

    Annotators differ in whether answer_start counts the blanks before an answer.
    """
    if type(start) is not int:
        return None
    while 0 <= start < len(context) and context[start].isspace():
        start += 1
    return start if text and start >= 0 and context.startswith(text, start) else None


def _misplaced(text: str, start: Any, context: str) -> str:
    if type(start) is not int:
        return "'answer_start' is missing or not a whole number"
    return (
        f"{text!r} does not stand at character {start} of the context but "
        f"{context[max(start, 0) :][: len(text) + 10]!r}; correct answer_start, or leave the answer out"
    )


def _each(location: str, record: Any, key: str, name: str) -> Iterator[tuple[str, dict]]:
    """The objects of a record's list, each with its location."""
    for number, item in enumerate(_get(location, record, key, list), 1):
        if not isinstance(item, dict):
            raise InputError(f"{location}, {name} {number}: expected a JSON object")
        yield f"{location}, {name} {number}", item


def _get(location: str, record: Any, key: str, kind: type) -> Any:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or (kind is str and not is_text(value)):
        names = {str: "a string of valid characters", list: "a list"}
        raise InputError(f"{location}: {key!r} is missing or not {names[kind]}")
    return value


# ----------------------------------------------------------------------------------------------------------------------
# The tasks


@dataclass
class Windows:
    """The details of `Examples` whose examples are windows: what judging needs."""

    questions: list[Question]
    table: datasets.Dataset  # of the windows, memory-mapped: question, offsets

    @property
    def answerable(self) -> bool:
        """Whether every question has an answer."""
        return all(question.answers for question in self.questions)

    def find_answers(self, logits: list[np.ndarray]) -> list[Candidates]:
        """The candidates for each question. logits: (n, 2) of each window."""
        flat, counts = list_buffer(self.table, "offsets")
        offsets = np.split(flat.reshape(-1, 2), (counts // 2).cumsum()[:-1])
        return find_answers(self.questions, self.table.data.column("question").to_pylist(), offsets, logits)

    def texts(self, candidates: list[Candidates]) -> dict[str, str]:
        """{question id: answer}. Where some question has no answer, "" if "no answer" scores better than any span."""
        threshold = None if self.answerable else 0.0
        return {q.id: choose_text(best, threshold) for q, best in zip(self.questions, candidates)}

    def nbest(self, candidates: list[Candidates]) -> dict[str, dict]:
        """{question id: the best answers, and how much better "no answer" scores (None: there are none)}."""
        return {
            question.id: {
                "no_answer_score": best.no_answer_score if best.answers else None,
                "answers": [answer._asdict() for answer in best.answers],
            }
            for question, best in zip(self.questions, candidates)
        }


@dataclass(frozen=True)
class QuestionAnswering(Task):
    """A span of the context for each question, or none. The examples are windows, see windows.py."""

    head: ClassVar[str] = "span"
    suffixes: ClassVar[tuple[str, ...]] = QUESTION_SUFFIXES
    expected: ClassVar[str] = ".json"

    def file_names(self, name: str) -> list[str]:
        versions = ("v2.0", "v1.1") if self.name == "SQuAD2" else ("v1.1", "v2.0")
        return super().file_names(name) + [f"{name}-{version}" for version in versions]

    def read(self, path: Path) -> Iterator[Question]:
        return read_squad(path)

    def read_hub(self, split: str) -> Iterator[Question]:
        return hub_squad(self.hub, split)

    def load(
        self, source: Source, split: str, tokenizer: Tokenizer, max_length: int, labels: tuple[str, ...] | None = None
    ) -> tuple[dict[str, Examples], tuple[str, ...]]:
        """See `Task.load`. Targets: (N, 2) int64, tokens where the answer starts and ends. Details: `Windows`.

        SQuAD 1.1 leaves out questions without answers.
        """
        ((location, identity, rows),) = source.rows(split).values()
        questions = list(rows)
        if split == "train" and (problem := next((q.problem for q in questions if q.problem), "")):
            raise InputError(problem)
        count = len(questions)
        if self.name == "SQuAD":
            questions = [question for question in questions if question.answers]
        if not (any(question.answers for question in questions) or questions and split != "train"):
            raise InputError(f"{location}: no question has an answer; there is nothing to learn from or to judge by")
        key = f"windows {CACHE_VERSION} {self.name} {identity} {max_length} {tokenizer.identity}"
        table = _window_table(questions, tokenizer, max_length, hashlib.sha256(key.encode()).hexdigest()[:32])
        spans = np.stack([table.data.column(name).to_numpy().astype(np.int64) for name in ("start", "end")], 1)
        truncated = table.data.column("question").filter(table.data.column("truncated"))
        examples = Examples.from_table(
            table,
            targets=spans,
            truncated=len(truncated.unique()),
            left_out=count - len(questions),
            details=Windows(questions, table),
            question_lengths=table.data.column("question_length").to_numpy().astype(np.int64),
        )
        return {"": examples}, self.labels

    def choices(self, logits: Tensor, lengths: Tensor) -> Tensor:
        """(T, 2) -> (2 B, n_max): each sequence chooses the token where the answer starts, and that where it ends."""
        # Padding gets a logit so low that it has no probability; with infinities a divergence is not a number.
        grid = pad_sequence(list(logits.float().split(lengths.tolist())), batch_first=True, padding_value=-1e9)
        return grid.transpose(1, 2).flatten(0, 1)

    def targets(self, examples: Examples, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(examples.targets[indices]).flatten()

    def count_targets(self, examples: Examples, indices: np.ndarray) -> int:
        return 2 * len(indices)

    def judge(self, examples: Examples, logits: list[np.ndarray]) -> tuple[Metrics, float]:
        """Exact match and F1 in percent; F1 is the score.

        Where some question has no answer: also the best threshold for "no answer", and the metrics that it gives.
        """
        windows: Windows = examples.details
        candidates = windows.find_answers(logits)
        metrics = squad_metrics(windows.questions, windows.texts(candidates))
        if not windows.answerable:
            texts = {q.id: choose_text(best, None) for q, best in zip(windows.questions, candidates)}
            scores = {q.id: best.no_answer_score for q, best in zip(windows.questions, candidates)}
            metrics |= best_thresholds(windows.questions, texts, scores)
        return metrics, metrics["f1"]

    def prepare(self, records: list[Record], reader: Reader) -> Prepared:
        """{"question", "context"} gets {"answer", "start", "end", "score", "no_answer_score", "windows", "tokens",
        "kept"}, without a span where the answer is "". Tokens and kept are summed over the windows."""
        questions = []
        for i, (location, record) in enumerate(records):
            if not isinstance(record, dict):
                raise InputError(f'{location}: expected an object with "question" and "context"')
            questions.append(Question(str(i), *_texts(location, record), ()))
        windows = make_windows(reader.tokenizer, questions, reader.max_length)
        reader.truncated += len({window.question for window in windows if window.truncated})

        def finish(outputs: list[tuple[Tensor, list[int]]]) -> list[dict[str, Any]]:
            return _answer_records(questions, windows, outputs, reader.no_answer_threshold)

        encoded = [Encoded(w.token_ids, w.segment_ids, question_length=w.question_length) for w in windows]
        return Prepared(encoded, finish)


def _answer_records(
    questions: list[Question],
    windows: list[Window],
    outputs: list[tuple[Tensor, list[int]]],
    no_answer_threshold: float | None,
) -> list[dict[str, Any]]:
    """The answer to each question, from the logits and kept tokens of each window."""
    owners, offsets = [window.question for window in windows], [window.offsets for window in windows]
    candidates = find_answers(questions, owners, offsets, [logits.numpy() for logits, _ in outputs])
    counts: list[dict[str, Any]] = [{"windows": 0, "tokens": 0, "kept": 0} for _ in questions]
    for window, (_, kept) in zip(windows, outputs):
        count = counts[window.question]
        count["windows"] += 1
        count["tokens"] += len(window.token_ids)
        count["kept"] = count["kept"] + np.array(kept)
    answers = []
    for best, count in zip(candidates, counts):
        text = choose_text(best, no_answer_threshold)
        first = best.answers[0] if text else None
        span = {"start": first.start, "end": first.end, "score": first.score} if first else {}
        null = {"no_answer_score": best.no_answer_score if best.answers else None}
        answers.append({"answer": text, **span, **null, **count, "kept": count["kept"].tolist()})
    return answers


def _window_table(questions: list[Question], tokenizer: Tokenizer, max_length: int, key: str) -> datasets.Dataset:
    import datasets

    numbers = datasets.List(datasets.Value("int32"))
    features = {
        "token_ids": numbers,
        "segment_ids": datasets.List(datasets.Value("int8")),
        "offsets": numbers,  # first character and the one after the last of each token, flat
        "question": datasets.Value("int32"),
        "question_length": datasets.Value("int32"),
        "start": datasets.Value("int32"),
        "end": datasets.Value("int32"),
        "truncated": datasets.Value("bool"),
    }

    def generate() -> Iterator[dict]:
        for start in range(0, len(questions), 256):
            for window in make_windows(tokenizer, questions[start : start + 256], max_length):
                flat = [character for pair in window.offsets for character in pair]
                yield window._asdict() | {"offsets": flat, "question": start + window.question}

    return cached_table(generate, features, key)


SQUAD = tuple(
    QuestionAnswering(
        name, ("start", "end"), "squad", "question", "context", "answers", hub=hub, max_length=QUESTION_LENGTH
    )
    for name, hub in (("SQuAD", "squad"), ("SQuAD2", "squad_v2"))
)
