"""Questions, windows, answers and metrics of extractive question answering."""

import json
import math
import os
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from data import InputError, Tokenizer
from squad import (
    Answer,
    Question,
    Window,
    best_thresholds,
    choose_text,
    find_answers,
    hub_squad,
    make_windows,
    read_squad,
    squad_metrics,
)

DATA = Path(os.environ.get("LTP_DATA", Path(__file__).parents[2] / "shared" / "data"))

CONTEXTS = [
    "The river Elbe rises at 1,386 m in the Giant Mountains and runs through Dresden and Hamburg to the North Sea.",
    "José naïvely drank café au lait in Ångström's e\u0301tude; it cost 3.50 € — a “bargain” (so he said).",
    "東京は日本の首都です。人口は約1400万人。 Ask 서울 or مرحبا too.",
    "First 😀 then 👩‍👩‍👧 and\t tabs,\n\n  blanks\u00a0of\u3000all kinds \u200b end.",
]
ANSWERS = ["the Giant Mountains", "Ångström's", "日本の首都", "👩‍👩‍👧"]


def ask(context: str, *answers: str, id: str = "q", question: str = "What is it?") -> Question:
    return Question(id, question, context, tuple((text, context.index(text)) for text in answers))


def trained(folder: Path, kind: str, texts: list[str], size: int = 400) -> Tokenizer:
    """A tokenizer of RoBERTa's, BERT's or XLM-RoBERTa's kind."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

    special = ["<s>", "<pad>", "</s>", "<unk>", "[CLS]", "[SEP]"]
    if kind == "wordpiece":
        backend = Backend(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.train_from_iterator(
            texts,
            trainers.WordPieceTrainer(vocab_size=size, min_frequency=2, special_tokens=special, show_progress=False),
        )
        backend.post_processor = processors.BertProcessing(("[SEP]", 5), ("[CLS]", 4))
    else:
        backend = Backend(models.BPE(unk_token="<unk>"))
        spaces = pre_tokenizers.ByteLevel(add_prefix_space=False) if "bytes" in kind else pre_tokenizers.Metaspace()
        backend.pre_tokenizer = spaces
        alphabet = pre_tokenizers.ByteLevel.alphabet() if "bytes" in kind else []
        trainer = trainers.BpeTrainer(
            vocab_size=size, min_frequency=2, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
        backend.post_processor = processors.RobertaProcessing(
            ("</s>", 2), ("<s>", 0), trim_offsets=kind == "bytes", add_prefix_space=False
        )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


KINDS = ["bytes", "wordpiece", "metaspace", "bytes-untrimmed"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    return trained(tmp_path_factory.mktemp("tokenizer"), request.param, CONTEXTS)


# ---- reading ----


def articles(**changes) -> dict:
    question = {
        "id": "a",
        "question": " Where does it rise? ",
        "answers": [{"text": "Giant Mountains", "answer_start": 39}, {"text": "Giant Mountains ", "answer_start": 38}],
        "is_impossible": False,
    }
    none = {
        "id": "b",
        "question": "Who?",
        "answers": [],
        "is_impossible": True,
        "plausible_answers": [{"text": "Elbe", "answer_start": 10}],
    }
    paragraph = {"context": CONTEXTS[0], "qas": [question | changes, none, {"id": "c", "question": "When?"}]}
    return {"version": "v2.0", "data": [{"title": "Elbe", "paragraphs": [paragraph]}]}


def test_all_layouts_read_alike(tmp_path):
    import pyarrow
    from pyarrow import parquet

    wanted = [
        Question("a", "Where does it rise?", CONTEXTS[0], (("Giant Mountains", 39),) * 2),
        Question("b", "Who?", CONTEXTS[0], ()),
        Question("c", "When?", CONTEXTS[0], ()),
    ]
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(articles()), encoding="utf-8")
    records = [
        {
            "id": question.id,
            "title": "Elbe",
            "question": question.question,
            "context": question.context,
            "answers": {
                "text": [text for text, _ in question.answers],
                "answer_start": [start for _, start in question.answers],
            },
        }
        for question in wanted
    ]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    del records[2]["answers"]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    for suffix in ("json", "jsonl", "parquet"):
        assert list(read_squad(tmp_path / f"a.{suffix}")) == wanted, suffix


def row(**changes) -> bytes:
    record = {"id": "a", "question": "Who?", "context": "It was me.", "answers": {"text": ["me"], "answer_start": [7]}}
    return json.dumps(record | changes).encode()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.json", b"", "not JSON"),
        ("x.json", b'{"data": [}', "not JSON"),
        ("x.json", b"[" * 100_000, "not JSON"),
        ("x.json", row() + b"\n" + row(id="b"), "not JSON.*one question a line is named .jsonl"),
        ("x.json", b'"\xff"', "not UTF-8"),
        ("x.jsonl", row(answers=None, is_impossible=False), "'answers' is missing or empty, though is_impossible"),
        ("x.json", b"[]", "'data' is missing or not a list"),
        ("x.json", b'{"data": []}', "holds no questions"),
        ("x.json", b'{"data": [5]}', "article 1: expected a JSON object"),
        (
            "x.json",
            b'{"data": [{"paragraphs": [{"qas": {}}]}]}',
            "article 1, paragraph 1: 'qas' is missing or not a list",
        ),
        ("x.json", json.dumps(articles(id=5)).encode(), "paragraph 1, question 1: 'id' is missing or not a string"),
        ("x.json", json.dumps(articles(id="c")).encode(), "question 3: the id 'c' occurs twice"),
        ("x.json", json.dumps(articles(question=" ")).encode(), r"question 1 \(a\): the question is empty"),
        ("x.json", json.dumps(articles(answers=["me"])).encode(), r"\(a\), answer 1: expected a JSON object"),
        (
            "x.json",
            json.dumps(articles(answers=[{"text": "Giant Mountains", "answer_start": 40}])).encode(),
            r"question 1 \(a\), answer 1: 'Giant Mountains' does not stand at character 40 .* but 'iant Mountains",
        ),
        ("x.jsonl", b"", "holds no questions"),
        ("x.jsonl", b"\xff\n", "not UTF-8"),
        ("x.jsonl", row() + b"\n{", "line 2: not JSON"),
        ("x.jsonl", row() + b"\n[1]", "line 2: expected a JSON object"),
        ("x.jsonl", row() + b"\n" + row(), "line 2: the id 'a' occurs twice"),
        ("x.jsonl", row(context=None), "line 1: 'context' is missing or not a string"),
        ("x.jsonl", row(context="\n"), "line 1 .*the context is empty"),
        ("x.jsonl", row(question="\ud800"), "line 1: 'question' is missing or not a string of valid characters"),
        ("x.jsonl", row(answers="me"), "line 1 .*'answers' is missing or not a list"),
        ("x.jsonl", row(answers={"text": ["me"]}), "line 1 .*'answer_start' is missing or not a list"),
        ("x.jsonl", row(answers={"text": ["me"], "answer_start": []}), "1 answers with 0 answer_start"),
        ("x.jsonl", row(answers={"text": ["me"], "answer_start": ["7"]}), "'answer_start' is missing or not a whole"),
        ("x.jsonl", row(answers={"text": ["me"], "answer_start": [-3]}), "does not stand at character -3"),
        ("x.jsonl", row(answers={"text": [" "], "answer_start": [2]}), "'' does not stand at character 2"),
        ("x.parquet", b"PAR1 not really", "not a readable Parquet file"),
        ("x.csv", b"", "unknown kind of file"),
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}.*{message}"):
        list(read_squad(tmp_path / name))


def test_missing_files_and_no_network(monkeypatch):
    with pytest.raises(InputError, match="nowhere.json: no such file"):
        list(read_squad(Path("nowhere.json")))

    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(
        InputError, match=r"squad_v2 could not be loaded.*pass a folder with SQuAD's JSON .* --data PATH"
    ):
        list(hub_squad("squad_v2", "validation"))
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: [json.loads(row())])
    assert list(hub_squad("squad", "train")) == [Question("a", "Who?", "It was me.", (("me", 7),))]


# ---- windows ----


def text_of(window: Window, question: Question) -> str:
    return question.context[window.offsets[window.start][0] : window.offsets[window.end][1]]


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
    questions = [ask(context, question=asked) for context in CONTEXTS for asked in ("What?", "José 東京?")]
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
                assert window.segment_ids == [0] * start + [1] * (len(window.token_ids) - start)


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
    assert any(w.start for w in windows) and all(len(w.token_ids) == special + 12 for w in windows)
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


# ---- answers ----


def window_of(question: int, *words: tuple[int, int]) -> Window:
    """Two tokens of a question and its separator, then one token for each word."""
    count = len(words) + 4
    return Window(question, list(range(count)), [0] * count, [(0, 0)] * 3 + [*words, (0, 0)], 0, 0)


def logits_of(count: int, starts: dict[int, float], ends: dict[int, float]) -> np.ndarray:
    logits = np.full((count, 2), -10.0, dtype=np.float32)
    for column, values in enumerate((starts, ends)):
        for position, value in values.items():
            logits[position, column] = value
    return logits


SHORT = ask("one two three four")
ONE, TWO, THREE, FOUR = (0, 3), (4, 7), (8, 13), (14, 18)


def test_answers_by_hand():
    windows = [window_of(0, ONE, TWO, THREE, FOUR)]  # positions 3 to 6
    # The question's tokens and the separator have the highest logits, and must not be answers.
    logits = [logits_of(8, {0: 14, 1: 50, 4: 3, 5: 2}, {0: 15, 2: 50, 7: 50, 4: 1, 3: 40, 6: 2})]
    ((answers, null),) = find_answers([SHORT], windows, logits, n_best=4)
    assert [a[:4] for a in answers] == [  # "one" ends before "two" starts, so 3 + 40 is no piece
        ("one", 0, 3, 30.0),  # -10 + 40
        ("two three four", 4, 18, 5.0),
        ("two", 4, 7, 4.0),
        ("three four", 8, 18, 4.0),
    ]
    assert null == 29 - 30
    weights = np.exp([30 - 30, 5 - 30, 4 - 30, 4 - 30])
    assert [a.probability for a in answers] == pytest.approx(weights / (weights.sum() + math.exp(29 - 30)))


def test_answers_are_no_longer_than_asked():
    windows = [window_of(0, ONE, TWO, THREE, FOUR)]
    logits = [logits_of(8, {3: 5}, {6: 5, 4: 1})]
    for longest, text, score in ((4, "one two three four", 10), (3, "one two", 6), (1, "one", -5)):
        ((answers, _),) = find_answers([SHORT], windows, logits, max_answer_tokens=longest)
        assert answers[0][0] == text and answers[0].score == score
        assert len(answers) == sum(range(5)) - sum(range(5 - longest)) and all(math.isfinite(a.score) for a in answers)


def test_ties_stand_in_the_order_of_the_context():
    windows = [window_of(0, ONE, TWO, THREE), window_of(0, THREE, FOUR)]
    logits = [np.zeros((7, 2)), np.zeros((6, 2))]
    ((answers, null),) = find_answers([SHORT], windows, logits)
    pieces = [(a, b) for a in (0, 4, 8) for b in (3, 7, 13) if a < b] + [(8, 18), (14, 18)]
    assert [(a.start, a.end) for a in answers] == pieces and null == 0
    ((answers, _),) = find_answers([SHORT], windows[::-1], logits[::-1], n_best=3)
    assert [(a.start, a.end) for a in answers] == pieces[:3]


def test_the_best_over_windows_and_the_lowest_no_answer():
    questions = [SHORT, ask("no windows"), ask("one two")]
    windows = [window_of(0, ONE, TWO, THREE), window_of(2, ONE, TWO), window_of(0, TWO, THREE, FOUR)]
    logits = [
        logits_of(7, {0: 4, 4: 1}, {0: 3, 5: 1}),
        logits_of(6, {0: 9, 3: 1}, {0: 1, 3: 1}),
        logits_of(7, {0: -2, 3: 6, 5: 2}, {0: 1, 4: 1, 5: 7}),
    ]
    (answers, null), nothing, (others, other_null) = find_answers(questions, windows, logits, n_best=2)
    assert [(a.text, a.score) for a in answers] == [("two three four", 13.0), ("four", 9.0)]
    assert null == -2 + 1 - 13 and nothing == ([], math.inf)
    assert (others[0].text, others[0].score, other_null) == ("one", 2.0, 8.0)
    for order in ((0, 2), (2, 0)):  # "two three" is in both windows: 1 + 1 and 6 + 1
        ((answers, _),) = find_answers([SHORT], [windows[i] for i in order], [logits[i] for i in order], n_best=20)
        assert [a.score for a in answers if a.text == "two three"] == [7.0]


def test_pieces_of_a_character_are_one_answer():
    windows = [window_of(0, (0, 1), (0, 1), (0, 1), (2, 3))]  # a character of three tokens
    ((answers, _),) = find_answers([ask("é x")], windows, [np.zeros((8, 2))], n_best=3)
    assert [a.text for a in answers] == ["é", "é x", "x"]


def test_answers_are_those_of_trying_every_piece():
    generator = np.random.default_rng(0)
    question = ask("x" * 60)
    for pieces in (1, 2, 4):  # tokens a character
        for longest, n_best in ((1, 3), (7, 20), (100, 500)):
            start = np.sort(np.arange(40) // pieces)
            words = [(int(a), int(a + b)) for a, b in zip(start, generator.integers(0, 2, 40))]  # some cover nothing
            window = window_of(0, *words)
            logits = generator.integers(-9, 10, (44, 2)).astype(np.float32)
            tried: dict[tuple[int, int], float] = {}
            for i in range(3, 43):
                for j in range(i, min(43, i + longest)):
                    if all(a < b for a, b in (window.offsets[i], window.offsets[j])):
                        piece = window.offsets[i][0], window.offsets[j][1]
                        tried[piece] = max(tried.get(piece, -math.inf), float(logits[i, 0] + logits[j, 1]))
            wanted = sorted(tried.items(), key=lambda item: (-item[1], item[0]))[:n_best]
            ((answers, _),) = find_answers([question], [window], [logits], n_best, longest)
            assert [((a.start, a.end), a.score) for a in answers] == wanted


def test_choose_text():
    answers = [Answer("yes", 0, 3, 5.0, 0.9)]
    assert choose_text(answers, 3.0, None) == choose_text(answers, 3.0, 3.0) == "yes"
    assert choose_text(answers, 3.1, 3.0) == choose_text([], -5.0, None) == ""


@pytest.mark.parametrize("max_length, stride", [(300, 20), (60, 40)])
def test_logits_of_the_labels_answer_everything(tokenizer, max_length, stride):
    questions = [ask(c, a, id=a) for c, a in zip(CONTEXTS, ANSWERS)] + [ask(CONTEXTS[0], id="none")]
    assert_labels_answer_everything(tokenizer, questions, max_length, stride)


def assert_labels_answer_everything(tokenizer, questions, max_length, stride):
    windows = make_windows(tokenizer, questions, max_length, stride)
    logits = [np.zeros((len(w.token_ids), 2), dtype=np.float32) for w in windows]
    for window, values in zip(windows, logits):
        values[window.start, 0] = values[window.end, 1] = 9.0
    found = find_answers(questions, windows, logits, max_answer_tokens=100)
    texts = {q.id: choose_text(answers, null, 0.0) for q, (answers, null) in zip(questions, found)}
    metrics = squad_metrics(questions, texts)
    assert metrics["exact"] == 100 and metrics["f1"] == 100, metrics
    best = best_thresholds(
        questions,
        {q.id: choose_text(answers, null, None) for q, (answers, null) in zip(questions, found)},
        {q.id: null for q, (_, null) in zip(questions, found)},
    )
    assert best["best_exact"] == best["best_f1"] == 100


# ---- metrics ----


@pytest.mark.parametrize(
    "answers, text, exact, f1",
    [
        (["The Elbe"], "elbe!", 1, 1),  # case, article, punctuation
        (["Elbe"], "", 0, 0),
        (["an apple a day"], "Apple the  day.", 1, 1),
        (["theatre"], "atre", 0, 0),  # articles are whole words
        (["U.S."], "US", 1, 1),
        (["well-known"], "well known", 0, 0),  # punctuation does not part words
        (["the Giant Mountains"], "Mountains", 0, 2 * 1 * (1 / 2) / (3 / 2)),
        (["new york new york"], "new new new", 0, 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),  # two of "new" are shared
        (["Dresden", "Dresden and Hamburg"], "Hamburg and", 0, 2 * 1 * (2 / 3) / (5 / 3)),  # the best annotator
        (["Dresden", "Hamburg"], "Hamburg", 1, 1),
        ([], "", 1, 1),
        ([], "Hamburg", 0, 0),
        ([], "the", 1, 1),  # nothing is left of it
        (["the"], "the", 1, 1),
        (["the", "Elbe"], "", 0, 0),  # an annotator's answer of which nothing is left does not count
    ],
)
def test_metrics_by_hand(answers, text, exact, f1):
    question = Question("q", "?", "context", tuple((answer, 0) for answer in answers))
    metrics = squad_metrics([question], {"q": text})
    assert metrics["exact"] == pytest.approx(100 * exact) and metrics["f1"] == pytest.approx(100 * f1)


def kinds(*answers: str) -> list[Question]:
    return [Question(f"q{i}", "?", "c", ((answer, 0),) if answer else ()) for i, answer in enumerate(answers)]


def test_metrics_of_both_kinds_of_questions():
    texts = {"q0": "red", "q1": "green", "q2": "", "q3": "blue"}
    assert squad_metrics(kinds("red", "green apple", "", ""), texts) == pytest.approx(
        {
            "exact": 50,
            "f1": 100 * (1 + 2 / 3 + 1) / 4,
            "has_answer_exact": 50,
            "has_answer_f1": 100 * (1 + 2 / 3) / 2,
            "no_answer_accuracy": 50,
        }
    )
    assert set(squad_metrics(kinds("red", "green"), texts)) == {"exact", "f1"}
    assert squad_metrics(kinds("", ""), {"q0": "", "q1": "x"}) == {"exact": 50, "f1": 50, "no_answer_accuracy": 50}


def test_best_thresholds_by_hand():
    questions = kinds("red", "green apple", "", "blue", "")
    texts = {"q0": "red", "q1": "apple", "q2": "x", "q3": "blue", "q4": "y"}
    nulls = {"q0": -3.0, "q1": -1.0, "q2": 1.0, "q3": 2.0, "q4": 2.0}
    # right of 5, by the last question answered: none 2, q0 3, q1 3 (F1 3 + 2/3), q2 2 (2 + 2/3), q3 and q4 2 (2 + 2/3)
    assert best_thresholds(questions, texts, nulls) == pytest.approx(
        {"best_exact": 60, "best_exact_threshold": -3, "best_f1": 100 * (3 + 2 / 3) / 5, "best_f1_threshold": -1}
    )
    for threshold, exact in ((-4.0, 40), (-3.0, 60), (-1.0, 60), (1.0, 40), (2.0, 40)):
        chosen = {i: choose_text([Answer(texts[i], 0, 1, 0.0, 1.0)], nulls[i], threshold) for i in texts}
        assert squad_metrics(questions, chosen)["exact"] == exact
    best = best_thresholds(kinds("", ""), {"q0": "x", "q1": "y"}, {"q0": -1.0, "q1": 0.5})
    assert best["best_exact"] == 100 and best["best_exact_threshold"] < -1  # best to answer nothing


# ---- real data ----


@pytest.mark.skipif(not (DATA / "squad").is_dir(), reason="the SQuAD files are not beside this checkout")
def test_real_squad_files(tmp_path):
    questions = list(read_squad(DATA / "squad/dev-v2.0.json"))
    assert len(questions) > 500 and 0 < sum(not q.answers for q in questions) < len(questions)
    texts = {q.id: q.answers[0][0] if q.answers else "" for q in questions}
    assert squad_metrics(questions, texts)["exact"] == 100
    contexts = list(dict.fromkeys(q.context for q in questions))
    for kind in ("bytes", "wordpiece"):
        tokenizer = trained(tmp_path / kind, kind, contexts, size=5000)
        windows = make_windows(tokenizer, questions, 384, 128)
        held = [w for w in windows if w.start]
        assert {w.question for w in held} == {i for i, q in enumerate(questions) if q.answers}
        # A token may reach beyond the answer, such as "1990s" where the answer is "1990".
        unlike = {w.question for w in held if text_of(w, questions[w.question]) != questions[w.question].answers[0][0]}
        assert len(unlike) < 0.01 * len(questions)
        clear = [question for i, question in enumerate(questions) if i not in unlike]
        assert_labels_answer_everything(tokenizer, clear, 384, 128)
