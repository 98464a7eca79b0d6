"""Windows of questions on contexts: tokens, overlaps, labels."""

import math
from itertools import groupby

import numpy as np
import pytest
from questions import ANSWERS, CONTEXTS, ask, find_answers, text_of, trained

from support.errors import InputError
from tasks.windows import make_windows


def test_a_window_by_hand(tmp_path):
    text = "to be or not to be"
    tokenizer = trained(tmp_path, "wordpiece", [text] * 2)
    question = ask(text, "or not", "be", question="to be")
    (window,) = make_windows(tokenizer, [question], 16, 3)
    to, be, either, no = (tokenizer.backend.token_to_id(word) for word in ("to", "be", "or", "not"))
    assert window.token_ids == [4, to, be, 5, to, be, either, no, to, be, 5]
    assert window.segment_ids == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert window.offsets == [(0, 0)] * 4 + [(0, 2), (3, 5), (6, 8), (9, 12), (13, 15), (16, 18), (0, 0)]
    assert (window.question, window.start, window.end) == (0, 6, 7)
    windows = make_windows(tokenizer, [question], 9, 2)  # four tokens of context, two of them shared
    assert [w.token_ids for w in windows] == [
        [4, to, be, 5, to, be, either, no, 5],
        [4, to, be, 5, either, no, to, be, 5],
    ]
    assert [(w.start, w.end) for w in windows] == [(6, 7), (4, 5)]
    windows = make_windows(tokenizer, [question], 8, 1)  # "or" and "not" come apart
    assert [w.token_ids[4:-1] for w in windows] == [[to, be, either], [either, no, to], [to, be]]
    assert [(w.start, w.end) for w in windows] == [(0, 0), (4, 5), (0, 0)]


def test_windows_are_those_of_the_library(tokenizer):
    questions = [ask(context, question=text) for context in CONTEXTS for text in ("What?", "José 東京?")]
    for max_length, stride in ((64, 5), (40, 0), (200, 90)):
        windows = make_windows(tokenizer, questions, max_length, stride)
        assert [key for key, _ in groupby(w.question for w in windows)] == list(range(len(questions)))
        backend = tokenizer.backend
        backend.enable_truncation(max_length, stride=stride, strategy="only_second")
        for number, question in enumerate(questions):
            encoding = backend.encode(question.question, question.context)
            theirs = [encoding, *encoding.overflowing]
            ours = [w for w in windows if w.question == number]
            assert [w.token_ids for w in ours] == [e.ids for e in theirs]
            for window, encoding in zip(ours, theirs):
                assert [o != (0, 0) for o in window.offsets] == [s == 1 for s in encoding.sequence_ids]
                assert len(window.segment_ids) == len(window.offsets) == len(window.token_ids) <= max_length
                start = encoding.sequence_ids.index(1)
                assert window.question_length == start
                told = tokenizer.reads_segments  # RoBERTa's models are not told the texts apart
                assert window.segment_ids == [0] * start + [int(told)] * (len(window.token_ids) - start)


def test_every_token_of_the_context_is_in_a_window(tokenizer):
    context = " ".join(CONTEXTS)
    question = ask(context, ANSWERS[0])
    whole = make_windows(tokenizer, [question], 10_000, 0)
    assert len(whole) == 1
    for max_length, stride in ((40, 0), (40, 7), (64, 30)):
        windows = make_windows(tokenizer, [question], max_length, stride)
        assert len(windows) > 2
        parts = [[x for x in zip(w.token_ids, w.offsets) if x[1] != (0, 0)] for w in windows]
        for one, following in zip(parts, parts[1:]):
            assert one[len(one) - stride :] == following[:stride]
        joined = parts[0] + [x for part in parts[1:] for x in part[stride:]]
        assert joined == [x for x in zip(whole[0].token_ids, whole[0].offsets) if x[1] != (0, 0)]
        assert all(len(w.token_ids) == max_length for w in windows[:-1])


def test_labels_are_the_answers_in_any_script(tokenizer):
    questions = [ask(context, answer) for context, answer in zip(CONTEXTS, ANSWERS)]
    for max_length, stride in ((300, 20), (60, 40)):
        windows = make_windows(tokenizer, questions, max_length, stride)
        for number, question in enumerate(questions):
            held = [w for w in windows if w.question == number and w.start]
            assert held and all(text_of(w, question) == ANSWERS[number] for w in held), ANSWERS[number]
            for window in windows:
                if window.question == number and not window.start:
                    assert window.end == 0
                    start = question.answers[0][1]  # some character of the answer is not in the window
                    covered = {c for a, b in window.offsets for c in range(a, b)}
                    assert not covered >= {start, start + len(ANSWERS[number]) - 1}


def test_offsets_hold_no_blanks_around(tokenizer):
    for number, context in enumerate(CONTEXTS):
        for start, end in make_windows(tokenizer, [ask(context)], 500, 0)[0].offsets:
            assert context[start:end] == context[start:end].strip() and start <= end, number


def test_long_questions_are_cut(tokenizer):
    question = ask(CONTEXTS[0], "North Sea", question="Which of the seas? " * 40)
    windows = make_windows(tokenizer, [question], 60, 10)
    room = 60 - tokenizer.backend.num_special_tokens_to_add(True)
    sizes = [sum(o != (0, 0) for o in w.offsets) for w in windows]
    assert all(size == room - room // 2 for size in sizes[:-1])  # half of it for the question
    assert text_of(windows[-1], question) == "North Sea"
    short = make_windows(tokenizer, [ask(CONTEXTS[0])], 60, 10)
    again = make_windows(tokenizer, [question, ask(CONTEXTS[0])], 60, 10)
    assert [w[1:] for w in again[len(windows) :]] == [w[1:] for w in short]


def test_no_room_for_windows(tokenizer):
    special = tokenizer.backend.num_special_tokens_to_add(True)
    with pytest.raises(InputError, match=f"--max-length {special + 11}: .* expected at least {special + 12}"):
        make_windows(tokenizer, [ask(CONTEXTS[0])], special + 11, 10)
    windows = make_windows(tokenizer, [ask(CONTEXTS[0], "m", question="What " * 50)], special + 12, 10)
    assert any(w.start for w in windows) and all(len(w.token_ids) <= special + 12 for w in windows)
    assert make_windows(tokenizer, [], 100, 10) == []


def test_windows_leave_the_tokenizer_as_it_was(tokenizer):
    alone = tokenizer.encode([CONTEXTS[1]], None, 12)
    make_windows(tokenizer, [ask(CONTEXTS[0])], 60, 10)
    assert tokenizer.backend.truncation is None
    assert tokenizer.encode([CONTEXTS[1]], None, 12) == alone
    windows = make_windows(tokenizer, [ask(CONTEXTS[0])], 60, 10)  # and are not cut by what others set
    tokenizer.encode([CONTEXTS[1]], None, 12)
    assert make_windows(tokenizer, [ask(CONTEXTS[0])], 60, 10) == windows


def test_a_context_without_tokens(tmp_path):
    tokenizer = trained(tmp_path, "wordpiece", CONTEXTS)
    question = ask("\u200b\x01", "\u200b")  # characters that BERT's normalizer removes
    windows = make_windows(tokenizer, [question], 60, 10)
    assert len(windows) == 1 and (windows[0].start, windows[0].end) == (0, 0)
    assert find_answers([question], windows, [np.ones((len(windows[0].token_ids), 2))]) == [([], math.inf)]
