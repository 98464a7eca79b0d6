"""Extractive question answering: questions, windows of tokens, answers out of logits, SQuAD's metrics.

A question is asked of a context and answered by a piece of it, or, in SQuAD 2.0, by nothing. Contexts longer than the
model reads are cut into windows that overlap. The model gives each token of a window two logits: the answer starts
here, the answer ends here. The window's first token stands for "no answer".
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import string
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data import Examples, InputError, Source, Tokenizer, read_jsonl, cached_table, chunked, is_text, read_columns

if TYPE_CHECKING:
    import numpy as np

# ----------------------------------------------------------------------------------------------------------------------
# Questions


class Question(NamedTuple):
    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]  # each annotator's text and its first character in the context; () for none


def read_squad(path: Path) -> Iterator[Question]:
    """Yields the questions of a file: SQuAD's own .json (1.1 or 2.0), or .jsonl or .parquet with one question a row.

    Rows have the hub's columns: id, question, context, answers {"text": [...], "answer_start": [...]}. Answers may be
    missing, unless is_impossible is false. Whether a question has an answer is read from its answers; plausible answers are
    not looked at.
    Raises: InputError naming file and place for a file that is missing, empty, damaged, not UTF-8 or of another layout,
    a question or context without text, an id that occurs twice, an answer that is missing or not where it is said to be.
    """
    readers = {".json": _read_articles, ".jsonl": _read_lines, ".parquet": _read_table}
    suffix = path.suffix.lower()
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if suffix not in readers:
        raise InputError(f"{path}: unknown kind of file; expected SQuAD's .json, or .jsonl or .parquet")
    ids = set()
    try:
        for place, record in readers[suffix](path):
            question = _question(place, record)
            if question.id in ids:
                raise InputError(f"{place}: the id {question.id!r} occurs twice; every question needs its own")
            ids.add(question.id)
            yield question
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason}); convert the file first") from None
    except OSError as error:
        raise InputError(f"{path}: not readable ({error})") from None
    if not ids:
        raise InputError(f"{path}: holds no questions")


def hub_squad(name: str, split: str) -> Iterator[Question]:
    """Yields the "train" or "validation" questions of "squad" or "squad_v2" from the hub. Raises: InputError."""
    import datasets

    try:
        table = datasets.load_dataset(f"rajpurkar/{name}", split=split)
    except Exception as error:  # offline, a proxy, a full disk: the library's errors have no common class
        raise InputError(
            f"{name} could not be loaded from the hub ({type(error).__name__}); "
            "with no network, pass a folder with SQuAD's JSON files with --data PATH"
        ) from None
    for number, record in enumerate(table, 1):
        yield _question(f"{name}'s {split}, row {number}", record)


def _read_articles(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        hint = "; a file with one question a line is named .jsonl" * str(error).startswith("Extra data")
        raise InputError(f"{path}: not JSON ({error}){hint}") from None
    for article_place, article in _each(str(path), content, "data", "article"):
        for paragraph_place, paragraph in _each(article_place, article, "paragraphs", "paragraph"):
            for place, question in _each(paragraph_place, paragraph, "qas", "question"):
                yield place, question | {"context": paragraph.get("context")}


def _read_lines(path: Path) -> Iterator[tuple[str, dict]]:
    for line, record in read_jsonl(path, []):
        yield f"{path}, line {line}", record


def _read_table(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, line {number}", record
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def _question(place: str, record: dict) -> Question:
    """A question of a record in either layout, checked."""
    name, question, context = (_get(place, record, key, str) for key in ("id", "question", "context"))
    place = f"{place} ({name})"
    if not question.strip() or not context.strip():
        raise InputError(f"{place}: the {'context' if question.strip() else 'question'} is empty")
    answers = [] if record.get("answers") is None else record["answers"]
    if isinstance(answers, dict):  # the hub's layout: one list a column
        texts, starts = _get(place, answers, "text", list), _get(place, answers, "answer_start", list)
        if len(texts) != len(starts):
            raise InputError(f"{place}: {len(texts)} answers with {len(starts)} answer_start; expected one for each")
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts)]
    found = []
    for answer_place, answer in _each(place, {"answers": answers}, "answers", "answer"):
        text, start = _get(answer_place, answer, "text", str), _get(answer_place, answer, "answer_start", int)
        # Blanks around an answer are no part of it, and annotators differ in whether answer_start counts them.
        text, given = text.strip(), start
        while 0 <= start < len(context) and context[start].isspace():
            start += 1
        if not text or start < 0 or not context.startswith(text, start):
            raise InputError(
                f"{answer_place}: {text!r} does not stand at character {given} of the context but "
                f"{context[max(given, 0) :][: len(text) + 10]!r}; correct answer_start, or leave the answer out"
            )
        found.append((text, start))
    if not found and record.get("is_impossible") is False:
        raise InputError(f"{place}: 'answers' is missing or empty, though is_impossible is false; correct one of them")
    return Question(name, question.strip(), context, tuple(found))


def _each(place: str, record: Any, key: str, name: str) -> Iterator[tuple[str, dict]]:
    """The objects of a record's list, each with its place."""
    for number, item in enumerate(_get(place, record, key, list), 1):
        if not isinstance(item, dict):
            raise InputError(f"{place}, {name} {number}: expected a JSON object")
        yield f"{place}, {name} {number}", item


def _get(place: str, record: Any, key: str, kind: type) -> Any:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or (kind is str and not is_text(value)):
        names = {str: "a string of valid characters", int: "a whole number", list: "a list"}
        raise InputError(f"{place}: {key!r} is missing or not {names[kind]}")
    return value


# ----------------------------------------------------------------------------------------------------------------------
# Windows


class Window(NamedTuple):
    """A question with as much of its context as fits: first token, question, separators, context, last separator."""

    question: int  # index of the question
    token_ids: list[int]
    segment_ids: list[int]  # 0 up to the separators after the question, 1 for the context and the last separator
    offsets: list[tuple[int, int]]  # characters of the context that each token covers; (0, 0) for all other tokens
    start: int  # first and last token of the first annotator's answer;
    end: int  # both 0 where the window does not hold it whole, or where there is none


def make_windows(
    tokenizer: Tokenizer, questions: list[Question], max_length: int, stride: int | None = None
) -> list[Window]:
    """The windows of all questions, in order: at most `max_length` tokens, of which `stride` (default: a third) are also
    in the next one.

    A question so long that no more than `stride` tokens of context fit beside it is cut to at most half of the room.
    Raises: InputError if max_length leaves no room for such windows.
    """
    tokenizer.backend.no_truncation()  # Tokenizer.encode sets its own, each time
    stride = max_length // 3 if stride is None else stride
    before, between, after = _special_tokens(tokenizer)
    room = max_length - len(before) - len(between) - len(after)
    if room < stride + 2:
        raise InputError(
            f"--max-length {max_length}: leaves no room for a question and windows that share {stride} tokens; "
            f"expected at least {max_length - room + stride + 2}"
        )
    # A paragraph is the context of several questions: each text is encoded once.
    encoded = _encode(tokenizer, (text for question in questions for text in (question.question, question.context)))
    windows = []
    for number, question in enumerate(questions):
        asked = encoded[question.question][0]
        if len(asked) > room - stride - 1:
            asked = asked[: min(room // 2, room - stride - 1)]
        token_ids, offsets = encoded[question.context]
        head = [*before, *asked, *between]
        size = room - len(asked)  # tokens of context in a window
        first, last = _answer_tokens(question, offsets)
        # A window starts where the one before has `stride` tokens left; the last one is the first to reach the end.
        for begin in range(0, max(len(token_ids) - stride, 1), size - stride):
            part = slice(begin, begin + size)
            tokens = [*head, *token_ids[part], *after]
            whole = begin <= first <= last < begin + size
            shift = len(head) - begin
            windows.append(
                Window(
                    number,
                    tokens,
                    [0] * len(head) + [1] * (len(tokens) - len(head)),
                    [(0, 0)] * len(head) + offsets[part] + [(0, 0)] * len(after),
                    first + shift if whole else 0,
                    last + shift if whole else 0,
                )
            )
    return windows


def _special_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int], list[int]]:
    """The ids that the tokenizer puts before the first text of a pair, between the two, and after the second."""
    pair = tokenizer.backend.encode("a", "a")
    texts = pair.sequence_ids  # 0 for the first text, 1 for the second, None for special tokens
    first, second, end = texts.index(0), texts.index(1), len(texts) - texts[::-1].index(1)
    between = [i for i, text in zip(pair.ids[first:second], texts[first:second]) if text is None]
    return pair.ids[:first], between, pair.ids[end:]


def _encode(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, tuple[list[int], list[tuple[int, int]]]]:
    """{text: (token ids, the characters that each token covers)}, whole and without special tokens."""
    encoded = {}
    for chunk in chunked(dict.fromkeys(texts), 1024):
        for text, encoding in zip(chunk, tokenizer.backend.encode_batch(chunk, add_special_tokens=False)):
            encoded[text] = encoding.ids, [_without_blanks(text, *offsets) for offsets in encoding.offsets]
    return encoded


def _without_blanks(text: str, start: int, end: int) -> tuple[int, int]:
    """Some tokenizers count the space before a word as the word's; answers begin and end with something to see."""
    start = end - len(text[start:end].lstrip())
    return start, start + len(text[start:end].rstrip())


def _answer_tokens(question: Question, offsets: list[tuple[int, int]]) -> tuple[int, int]:
    """First and last token of the first annotator's answer in the whole context; (-1, -1) if there is none."""
    if not question.answers:
        return -1, -1
    text, start = question.answers[0]
    first = bisect_right(offsets, start, key=lambda characters: characters[1])  # the first to end after its start
    last = bisect_left(offsets, start + len(text), key=lambda characters: characters[0]) - 1
    return (first, last) if first <= last else (-1, -1)  # a tokenizer may leave out characters


# ----------------------------------------------------------------------------------------------------------------------
# Answers


class Answer(NamedTuple):
    text: str
    start: int  # characters of the context,
    end: int  # exclusive
    score: float  # start logit + end logit
    probability: float  # softmax of the scores of the n best answers and of "no answer"


def find_answers(
    questions: list[Question],
    windows: Iterable[Window],
    logits: list[np.ndarray],
    n_best: int = 20,
    max_answer_tokens: int = 30,
) -> list[tuple[list[Answer], float]]:
    """For each question the `n_best` pieces of its context with the highest scores, best first, and how much better
    "no answer" scores than the best of them.

    logits[i] (tokens of windows[i], 2): start and end. A piece that is in several windows has its highest score; pieces
    with equal scores stand in the order of the context. "No answer" has the lowest score of the windows' first tokens:
    each window must do without an answer. Where no piece can be an answer, the list is empty and the number infinite.
    """
    import numpy as np

    scores: list[dict[tuple[int, int], float]] = [{} for _ in questions]
    no_answer = [math.inf] * len(questions)
    for window, values in zip(windows, logits):
        values = values.astype(np.float64)
        no_answer[window.question] = min(no_answer[window.question], float(values[0].sum()))
        found = scores[window.question]
        for characters, score in _best_pieces(window, values, n_best, max_answer_tokens).items():
            found[characters] = max(score, found.get(characters, score))
    results = []
    for question, found, null in zip(questions, scores, no_answer):
        best = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:n_best]
        if not best:
            results.append(([], math.inf))
            continue
        values = np.array([null, *(score for _, score in best)])
        weights = np.exp(values - values.max())
        answers = [
            Answer(question.context[start:end], start, end, score, float(probability))
            for ((start, end), score), probability in zip(best, weights[1:] / weights.sum())
        ]
        results.append((answers, null - best[0][1]))
    return results


def _best_pieces(
    window: Window, logits: np.ndarray, n_best: int, max_answer_tokens: int
) -> dict[tuple[int, int], float]:
    """{characters: score} of the n best pieces of a window."""
    import numpy as np

    offsets = np.array(window.offsets)
    covers = offsets[:, 0] < offsets[:, 1]  # false for the question and the special tokens
    start, end = np.where(covers, logits.T, -np.inf)
    # Row i, column k: the tokens i to i + k.
    ends = np.concatenate([end, np.full(max_answer_tokens - 1, -np.inf)])
    scores = (start[:, None] + np.lib.stride_tricks.sliding_window_view(ends, max_answer_tokens)).ravel()
    # A character may be several tokens, at most its four bytes: up to 4 * 4 pieces are the same text and count as one.
    enough = min(16 * n_best, len(scores))
    likely = np.flatnonzero(scores >= np.partition(scores, -enough)[-enough])
    best: dict[tuple[int, int], float] = {}
    for index in likely[np.argsort(-scores[likely], kind="stable")]:
        if len(best) == n_best or scores[index] == -np.inf:
            break
        first, more = divmod(int(index), max_answer_tokens)
        best.setdefault((window.offsets[first][0], window.offsets[first + more][1]), float(scores[index]))
    return best


def choose_text(answers: list[Answer], null_minus_best: float, threshold: float | None) -> str:
    """The best answer's text, or "" where "no answer" is better by more than the threshold (None: never)."""
    if not answers or (threshold is not None and null_minus_best > threshold):
        return ""
    return answers[0].text


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


def squad_metrics(questions: list[Question], texts: dict[str, str]) -> dict[str, float]:
    """SQuAD's exact match and F1 in percent, of the answers by the questions' ids; "" stands for no answer.

    Texts are compared in lower case, without punctuation and articles. F1 is that of the words found and wanted; the
    annotator who agrees most counts; a question without answers wants none. Where there are such questions, the two
    kinds are also reported apart: has_answer_exact, has_answer_f1 and no_answer_accuracy.
    """

    def means(prefix: str, chosen: list[Question]) -> dict[str, float]:
        scores = [_compare(question, texts[question.id]) for question in chosen]
        return {prefix + name: 100 * sum(s) / len(s) for name, s in zip(("exact", "f1"), zip(*scores))}

    metrics = means("", questions)
    with_answer = [question for question in questions if question.answers]
    without = [question for question in questions if not question.answers]
    if without:
        metrics |= means("has_answer_", with_answer)
        metrics["no_answer_accuracy"] = means("", without)["exact"]
    return metrics


def best_thresholds(
    questions: list[Question], texts: dict[str, str], null_minus_best: dict[str, float]
) -> dict[str, float]:
    """The thresholds for `choose_text` that would have been best for these very questions, and what they would give.

    texts: each question's best answer, never "" for want of confidence; null_minus_best: by id, as from `find_answers`.
    Returns best_exact, best_exact_threshold, best_f1, best_f1_threshold; of equally good thresholds the lowest.
    """
    import numpy as np

    nulls = np.array([null_minus_best[question.id] for question in questions])
    silent = np.array([_compare(question, "") for question in questions])
    gains = np.array([_compare(question, texts[question.id]) for question in questions]) - silent
    order = np.argsort(nulls)
    # Below the lowest value no question is answered; at a value, all up to it.
    thresholds = np.array([nulls.min() - 1, *np.unique(nulls)])
    answered = np.searchsorted(nulls[order], thresholds, side="right")
    totals = silent.sum(0) + np.concatenate([np.zeros((1, 2)), gains[order].cumsum(0)])[answered]
    best = {}
    for name, values in zip(("best_exact", "best_f1"), totals.T):
        best[name] = float(100 * values.max() / len(questions))
        best[f"{name}_threshold"] = float(thresholds[values.argmax()])
    return best


def _compare(question: Question, text: str) -> tuple[float, float]:
    """Exact match and F1, 0 to 1, with the annotator who agrees most."""
    found = _normalize(text)
    wanted = [answer for answer in (_normalize(answer) for answer, _ in question.answers) if answer] or [""]
    exact = float(found in wanted)
    return exact, max(_f1(found.split(), answer.split()) for answer in wanted)


def _normalize(text: str) -> str:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _f1(found: list[str], wanted: list[str]) -> float:
    """The harmonic mean of precision and recall; a word counts as often as it is in both."""
    if not found or not wanted:
        return float(found == wanted)
    return 2 * (Counter(found) & Counter(wanted)).total() / (len(found) + len(wanted))


# ----------------------------------------------------------------------------------------------------------------------
# Tokenized examples


@dataclass
class SpanExamples(Examples):
    """Windows of contexts with their questions. `labels` (N, 2): tokens where the answer starts and ends."""

    questions: list[Question] = field(default_factory=list)

    def count_targets(self, indices: np.ndarray) -> int:
        """The loss of a window is the mean of two choices, where the answer starts and where it ends."""
        return 2 * len(indices)

    def find(self, logits: list[np.ndarray]) -> list[tuple[list[Answer], float]]:
        """`find_answers` of all questions."""
        windows = (
            Window(question, [], [], list(zip(flat[::2], flat[1::2])), 0, 0)
            for question, flat in read_columns(self.table, "question", "offsets")
        )
        return find_answers(self.questions, windows, logits)

    def texts(self, found: list[tuple[list[Answer], float]]) -> dict[str, str]:
        """The answer to each question by its id. Where some question has none, "" is given if that is likelier than the
        best piece."""
        threshold = None if all(question.answers for question in self.questions) else 0.0
        return {q.id: choose_text(best, score, threshold) for q, (best, score) in zip(self.questions, found)}

    def nbest(self, found: list[tuple[list[Answer], float]]) -> dict[str, dict]:
        """The best answers to each question by its id, and how much better "no answer" scores (None: there are none)."""
        return {
            q.id: {"no_answer_score": score if best else None, "answers": [answer._asdict() for answer in best]}
            for q, (best, score) in zip(self.questions, found)
        }

    def judge(self, metric: str, logits: list[np.ndarray]) -> tuple[dict[str, float], float]:
        """Exact match and F1 in percent, F1 also as the score; where some question has no answer, also at the threshold
        for "no answer" that would have been the best."""
        found = self.find(logits)
        metrics = squad_metrics(self.questions, self.texts(found))
        if not all(question.answers for question in self.questions):
            texts = {q.id: choose_text(best, score, None) for q, (best, score) in zip(self.questions, found)}
            scores = {q.id: score for q, (_, score) in zip(self.questions, found)}
            metrics |= best_thresholds(self.questions, texts, scores)
        return metrics, metrics["f1"]


def load_questions(
    source: Source, split: str, tokenizer: Tokenizer, max_length: int, labels: tuple[str, ...] | None = None
) -> tuple[dict[str, SpanExamples], tuple[str, ...]]:
    """Reads a split and cuts its contexts into windows: {"": examples} and the labels of `model.Config`, as
    `data.load_examples`. SQuAD 1.1 leaves out questions without answers. Raises: InputError."""
    import datasets
    import numpy as np
    import pyarrow.compute as pc

    ((place, identity, questions),) = source.rows(
        split, read_squad, lambda part: hub_squad(source.task.hub, part)
    ).values()
    questions = list(questions)
    if source.task.name == "SQuAD":  # whose questions all have answers
        questions = [question for question in questions if question.answers]
    if not any(question.answers for question in questions):
        raise InputError(f"{place}: no question has an answer; there is nothing to learn from or to judge by")
    numbers = datasets.List(datasets.Value("int32"))
    features = {
        "token_ids": numbers,
        "segment_ids": datasets.List(datasets.Value("int8")),
        "offsets": numbers,  # first and last character of each token, flat
        "question": datasets.Value("int32"),
        "start": datasets.Value("int32"),
        "end": datasets.Value("int32"),
    }

    def generate() -> Iterator[dict]:
        for start in range(0, len(questions), 256):
            for window in make_windows(tokenizer, questions[start : start + 256], max_length):
                flat = [character for pair in window.offsets for character in pair]
                yield window._asdict() | {"offsets": flat, "question": start + window.question}

    key = hashlib.sha256(
        f"windows {source.task.name} {identity} {max_length} {tokenizer.identity}".encode()
    ).hexdigest()[:32]
    table = cached_table(generate, features, key)
    lengths = pc.list_value_length(table.data.column("token_ids")).to_numpy().astype(np.int64)
    spans = np.stack([table.data.column(name).to_numpy().astype(np.int64) for name in ("start", "end")], 1)
    return {"": SpanExamples(table, lengths, spans, 0, questions=questions)}, source.task.labels
