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

Offsets = list[tuple[int, int]]  # first character and the one after the last, for each token


class Question(NamedTuple):
    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]  # each annotator's text and its first character in the context; () for none


class Window(NamedTuple):
    """A question with as much of its context as fits: first token, question, separators, context, last separator."""

    question: int  # index of the question
    token_ids: list[int]
    segment_ids: list[int]  # 0 up to the separators after the question, 1 for the context and the last separator
    offsets: Offsets  # characters of the context that each token covers; (0, 0) for all other tokens
    start: int  # first and last token of the first annotator's answer;
    end: int  # both 0 where the window does not hold the whole answer, or where there is none
    truncated: bool = False  # whether the question was cut


def make_windows(
    tokenizer: Tokenizer, questions: list[Question], max_length: int, stride: int | None = None
) -> list[Window]:
    """The windows of all questions, in order, of at most `max_length` tokens.

    Neighbouring windows share `stride` tokens of the context; None: a third of `max_length`. A question so long that no
    more than `stride` tokens of context fit beside it is cut to at most half of the room.
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
    for index, question in enumerate(questions):
        question_ids = encoded[question.question][0]
        truncated = len(question_ids) > room - stride - 1
        if truncated:
            question_ids = question_ids[: min(room // 2, room - stride - 1)]
        context_ids, offsets = encoded[question.context]
        head = [*before, *question_ids, *between]
        size = room - len(question_ids)  # tokens of context in a window
        first, last = _answer_tokens(question, offsets)
        # A window begins where the one before has `stride` tokens left. The last window is the first to reach the end.
        for begin in range(0, max(len(context_ids) - stride, 1), size - stride):
            part = slice(begin, begin + size)
            token_ids = [*head, *context_ids[part], *after]
            complete = begin <= first <= last < begin + size
            shift = len(head) - begin
            windows.append(
                Window(
                    question=index,
                    token_ids=token_ids,
                    segment_ids=[0] * len(head) + [1] * (len(token_ids) - len(head)),
                    offsets=[(0, 0)] * len(head) + offsets[part] + [(0, 0)] * len(after),
                    start=first + shift if complete else 0,
                    end=last + shift if complete else 0,
                    truncated=truncated,
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


def _encode(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, tuple[list[int], Offsets]]:
    """{text: (token ids, the characters that each token covers)}, uncut and without special tokens."""
    encoded = {}
    for chunk in chunked(dict.fromkeys(texts), 1024):
        for text, encoding in zip(chunk, tokenizer.backend.encode_batch(chunk, add_special_tokens=False)):
            encoded[text] = encoding.ids, [_without_blanks(text, *offsets) for offsets in encoding.offsets]
    return encoded


def _without_blanks(text: str, start: int, end: int) -> tuple[int, int]:
    """Some tokenizers count the space before a word as part of it; answers begin and end with visible characters."""
    start = end - len(text[start:end].lstrip())
    return start, start + len(text[start:end].rstrip())


def _answer_tokens(question: Question, offsets: Offsets) -> tuple[int, int]:
    """First and last token of the first annotator's answer in the whole context; (-1, -1) if there is none."""
    if not question.answers:
        return -1, -1
    text, start = question.answers[0]
    first = bisect_right(offsets, start, key=lambda characters: characters[1])  # the first to end after its start
    last = bisect_left(offsets, start + len(text), key=lambda characters: characters[0]) - 1
    return (first, last) if first <= last else (-1, -1)  # a tokenizer may leave out characters
