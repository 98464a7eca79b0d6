"""Questions on contexts, and the windows of tokens in which a model reads them.

A context that is longer than the model can read is cut into windows that overlap. Every window begins with the
question.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from data import chunked
from support.errors import InputError
from tasks.tokenizer import Tokenizer

NOWHERE = -1
Offsets = list[tuple[int, int]]  # first character and the one after the last, for each token


class Question(NamedTuple):
    id: str
    question: str
    context: str
    # Each annotator's text and its first character in the context, NOWHERE where it does not stand there; () for none.
    answers: tuple[tuple[str, int], ...]
    problem: str = ""  # what keeps it from being learned


class Window(NamedTuple):
    """A question with as much of its context as fits: first token, question, separators, context, last separator."""

    question: int  # index of the question
    token_ids: list[int]
    segment_ids: list[int]
    question_length: int  # tokens up to the context: the first one, the question, separators
    offsets: Offsets  # characters of the context that each token covers; (0, 0) for all other tokens
    start: int  # first and last token of the first annotator's answer;
    end: int  # both 0 where the window does not hold the whole answer, or where there is none
    truncated: bool = False  # whether the question was cut


class Sizes(NamedTuple):
    """How many tokens there are for a question and its context."""

    room: int  # of a window, beside the special tokens
    stride: int  # of the context, which neighbouring windows share
    limit: int  # a question with more of them is cut; below 1: a window has no room for any question
    cut: int  # to at most this many


def window_sizes(tokenizer: Tokenizer, max_length: int, stride: int | None = None) -> Sizes:
    """The sizes of windows of at most `max_length` tokens. stride: None for a third of `max_length`."""
    room = max_length - tokenizer.backend.num_special_tokens_to_add(is_pair=True)
    stride = max_length // 3 if stride is None else stride
    limit = room - stride - 1
    return Sizes(room, stride, limit, min(room // 2, limit))


def make_windows(
    tokenizer: Tokenizer, questions: list[Question], max_length: int, stride: int | None = None
) -> list[Window]:
    """The windows of all questions, in order, of at most `max_length` tokens.

    Neighbouring windows share `stride` tokens of the context; None: a third of `max_length`. A question so long that no
    more than `stride` tokens of context fit beside it is cut to at most half of the room.
    Raises: InputError if max_length leaves no room for such windows.
    """
    backend = tokenizer.backend
    backend.no_truncation()  # Tokenizer.encode sets its own, each time
    room, stride, limit, cut = window_sizes(tokenizer, max_length, stride)
    if limit < 1:
        raise InputError(
            f"--max-length {max_length}: leaves no room for a question and windows that share {stride} tokens; "
            f"expected at least {max_length - room + stride + 2}"
        )
    texts = _cut([question.question for question in questions], tokenizer, limit, cut)
    covered = _offsets(tokenizer, (question.context for question in questions))
    backend.enable_truncation(max_length, stride=stride, strategy="only_second")
    encodings = tokenizer.run([(text, question.context) for text, question in zip(texts, questions)])
    backend.no_truncation()
    windows = []
    for index, (question, text, encoding) in enumerate(zip(questions, texts, encodings)):
        if encoding.overflowing or text != question.question:
            tokenizer.refuse_left("questions and contexts")
        offsets = covered[question.context]
        first, last = _answer_tokens(question, offsets)
        size = room - encoding.sequence_ids.count(0)  # tokens of context in a window
        # Each window begins where the one before has `stride` tokens left.
        for number, window in enumerate([encoding, *encoding.overflowing]):
            begin = number * (size - stride)
            complete = begin <= first <= last < begin + size
            owners = window.sequence_ids  # 0 for the question, 1 for the context, None for special tokens
            head = owners.index(1) if 1 in owners else len(owners)
            part = iter(offsets[begin : begin + size])
            windows.append(
                Window(
                    question=index,
                    token_ids=window.ids,
                    segment_ids=tokenizer.segment_ids(window),
                    question_length=head,
                    offsets=[next(part) if owner == 1 else (0, 0) for owner in owners],
                    start=first + head - begin if complete else 0,
                    end=last + head - begin if complete else 0,
                    truncated=text != question.question,
                )
            )
    return windows


def _cut(texts: list[str], tokenizer: Tokenizer, limit: int, size: int) -> list[str]:
    """The texts, or, where one has more than `limit` tokens, its beginning of at most `size` tokens."""
    cut = []
    for text, encoding in zip(texts, tokenizer.run(texts, add_special_tokens=False)):
        if len(encoding) > limit:
            ends = [0, *(end for _, end in encoding.offsets[:size])]
            while len(encoding) > size:  # what is cut may have other tokens at its end
                text = text[: ends.pop()]
                (encoding,) = tokenizer.run([text], add_special_tokens=False)
        cut.append(text)
    return cut


def _offsets(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, Offsets]:
    """{text: the characters that each token covers}. A paragraph is the context of several questions."""
    covered = {}
    for chunk in chunked(dict.fromkeys(texts), 1024):
        for text, encoding in zip(chunk, tokenizer.run(chunk, add_special_tokens=False)):
            covered[text] = [_without_blanks(text, *offsets) for offsets in encoding.offsets]
    return covered


def _without_blanks(text: str, start: int, end: int) -> tuple[int, int]:
    """Some tokenizers count the space before a word as part of it; answers begin and end with visible characters."""
    start = end - len(text[start:end].lstrip())
    return start, start + len(text[start:end].rstrip())


def _answer_tokens(question: Question, offsets: Offsets) -> tuple[int, int]:
    """First and last token of the first annotator's answer in the whole context; (-1, -1) if there is none."""
    text, start = question.answers[0] if question.answers else ("", NOWHERE)
    if start == NOWHERE:
        return -1, -1
    first = bisect_right(offsets, start, key=lambda characters: characters[1])  # the first to end after its start
    last = bisect_left(offsets, start + len(text), key=lambda characters: characters[0]) - 1
    return (first, last) if first <= last else (-1, -1)  # a tokenizer may leave out characters
