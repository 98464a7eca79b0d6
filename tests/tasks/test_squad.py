"""SQuAD's files, the examples that are made of them, and records of questions to predict."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from questions import CONTEXTS, ask, assert_labels_answer_everything, text_of, trained

from model import Config
from support.errors import InputError
from tasks import find_task
from tasks.answers import squad_metrics
from tasks.base import Reader, Source
from tasks.squad import hub_squad, read_squad
from tasks.windows import Question, make_windows

DATA = Path(os.environ.get("LTP_DATA", Path(__file__).parents[3] / "shared" / "data"))

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

    expected = [
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
        for question in expected
    ]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    del records[2]["answers"]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    for suffix in ("json", "jsonl", "parquet"):
        assert list(read_squad(tmp_path / f"a.{suffix}")) == expected, suffix


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
        ("x.json", b"[]", "'data' is missing or not a list"),
        ("x.json", b'{"data": []}', "holds no questions"),
        ("x.json", b'{"data": [5]}', "article 1: expected a JSON object"),
        (
            "x.json",
            b'{"data": [{"paragraphs": [{"qas": {}}]}]}',
            "article 1, paragraph 1: 'qas' is missing or not a list",
        ),
        ("x.json", json.dumps(articles(id=5.5)).encode(), "paragraph 1, question 1: 'id' is missing or not a string"),
        ("x.json", json.dumps(articles(id=True)).encode(), "paragraph 1, question 1: 'id' is missing or not a string"),
        ("x.json", json.dumps(articles(id="c")).encode(), "question 3: the id 'c' occurs twice"),
        ("x.json", json.dumps(articles(question=" ")).encode(), r"question 1 \(a\): the question is empty"),
        ("x.json", json.dumps(articles(answers=["me"])).encode(), r"\(a\), answer 1: expected a JSON object"),
        ("x.jsonl", b"", "holds no questions"),
        ("x.jsonl", b"\xff\n", "not UTF-8"),
        ("x.jsonl", row() + b"\n{", "line 2: not JSON"),
        ("x.jsonl", row() + b"\n[1]", "line 2: expected a JSON object"),
        ("x.jsonl", row() + b"\n" + row(), "line 2: the id 'a' occurs twice"),
        ("x.jsonl", row(context=None), "line 1 .*'context' is missing or not a string"),
        ("x.jsonl", row(context="\n"), "line 1 .*the context is empty"),
        ("x.jsonl", row(question="\ud800"), "line 1 .*'question' is missing or not a string of valid characters"),
        ("x.jsonl", row(answers="me"), "line 1 .*'answers' is missing or not a list"),
        ("x.parquet", b"PAR1 not really", "not a readable Parquet file"),
        ("x.csv", b"", "unknown kind of file"),
    ],
)
def test_bad_files_are_named_with_the_location(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}.*{message}"):
        list(read_squad(tmp_path / name))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"answers": None, "is_impossible": False}, "'answers' is missing or empty, though is_impossible"),
        ({"answers": {"text": ["me"]}}, "'answer_start' is missing or not a whole number"),
        ({"answers": {"text": ["me"], "answer_start": []}}, "'answer_start' is missing or not a whole number"),
        ({"answers": {"text": ["me"], "answer_start": ["7"]}}, "'answer_start' is missing or not a whole number"),
        ({"answers": {"text": ["me"], "answer_start": [-3]}}, "does not stand at character -3"),
        ({"answers": {"text": [" "], "answer_start": [2]}}, "'' does not stand at character 2"),
        (
            {"answers": {"text": ["me", "was me"], "answer_start": [7, 4]}},
            r"line 1 \(a\), answer 2: 'was me' does not stand at character 4 of the context but 'as me.'",
        ),
    ],
)
def test_what_keeps_a_question_from_being_learned_stops_training_alone(tmp_path, byte_pairs, changes, message):
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_bytes(row(**changes) + b"\n" + row(id="b"))
    source = Source(find_task("SQuAD2"), tmp_path)
    with pytest.raises(InputError, match=message):
        source.load("train", byte_pairs, 60)
    examples = source.load("dev", byte_pairs, 60)[0][""]
    assert len(examples.details.questions) == 2
    perfect = {q.id: q.answers[0][0] if q.answers else "" for q in examples.details.questions}
    assert squad_metrics(examples.details.questions, perfect)["exact"] == 100


def test_ids_may_be_numbers(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(articles(id=5)))
    assert next(iter(read_squad(tmp_path / "x.json"))).id == "5"


def test_files_that_cannot_hold_questions_are_passed_over(tmp_path):
    for name in ("train.tsv", "train-v2.0.json", "dev.csv", "dev.jsonl"):
        (tmp_path / name).touch()
    files = Source(find_task("SQuAD2"), tmp_path).files()
    assert [path.name for path in files] == ["train-v2.0.json", "dev.jsonl"]


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


# ---- examples ----


@pytest.fixture(scope="module")
def byte_pairs(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("byte_pairs"), "bytes", CONTEXTS)


def write_questions(path: Path, questions: list[Question]) -> None:
    paragraphs = [
        {
            "context": question.context,
            "qas": [
                {
                    "id": question.id,
                    "question": question.question,
                    "answers": [{"text": text, "answer_start": start} for text, start in question.answers],
                }
            ],
        }
        for question in questions
    ]
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))


MADE = [
    ask(CONTEXTS[0] + " " + CONTEXTS[1], "Giant Mountains", id="long"),
    ask(CONTEXTS[0], id="none", question="Who sings?"),
    ask(CONTEXTS[1], "café au lait", id="cut", question="Which of the drinks? " * 40),
    ask(CONTEXTS[1], "3.50", id="last", question="How much?"),
]


@pytest.fixture
def made(tmp_path) -> Source:
    write_questions(tmp_path / "dev-v2.0.json", MADE)
    return Source(find_task("SQuAD2"), tmp_path)


def test_examples_are_the_windows(made, byte_pairs):
    sets, labels = made.load("dev", byte_pairs, 60)
    examples, windows = sets[""], make_windows(byte_pairs, MADE, 60)
    assert labels == ("start", "end") and len(examples) == len(windows) > len(MADE)
    indices = np.array([3, 0])
    batch = examples.batch(indices)
    assert batch.token_ids.tolist() == windows[3].token_ids + windows[0].token_ids
    assert batch.segment_ids.tolist() == windows[3].segment_ids + windows[0].segment_ids
    assert examples.targets.tolist() == [[w.start, w.end] for w in windows]
    task = made.task
    assert task.targets(examples, indices).tolist() == [
        windows[i].start if k == 0 else windows[i].end for i in (3, 0) for k in (0, 1)
    ]
    assert task.count_targets(examples, indices) == 4


def test_cut_questions_are_counted_once_each(made, byte_pairs):
    sets, _ = made.load("dev", byte_pairs, 60)
    cut = [w for w in make_windows(byte_pairs, MADE, 60) if w.truncated]
    assert {MADE[w.question].id for w in cut} == {"cut"} and len(cut) > 1
    assert sets[""].truncated == 1
    assert made.load("dev", byte_pairs, 2000)[0][""].truncated == 0


def label_logits(windows) -> list[np.ndarray]:
    """Logits of a model that knows where each answer is."""
    logits = [np.zeros((len(window.token_ids), 2), dtype=np.float32) for window in windows]
    for window, values in zip(windows, logits):
        values[window.start, 0] = values[window.end, 1] = 9.0
    return logits


def test_judging_the_right_answers_and_silence(made, byte_pairs):
    examples = made.load("dev", byte_pairs, 60)[0][""]
    windows = make_windows(byte_pairs, MADE, 60)
    metrics, score = made.task.judge(examples, label_logits(windows))
    assert score == metrics["exact"] == metrics["best_f1"] == metrics["no_answer_accuracy"] == 100
    silence = label_logits([window._replace(start=0, end=0) for window in windows])
    metrics, score = made.task.judge(examples, silence)
    assert metrics["no_answer_accuracy"] == 100 and metrics["has_answer_f1"] == 0 and score == 25


def test_texts_and_n_best_of_an_evaluation(made, byte_pairs):
    details = made.load("dev", byte_pairs, 60)[0][""].details
    candidates = details.find_answers(label_logits(make_windows(byte_pairs, MADE, 60)))
    assert details.texts(candidates) == {"long": "Giant Mountains", "none": "", "cut": "café au lait", "last": "3.50"}
    nbest = json.loads(json.dumps(details.nbest(candidates)))  # can be written
    assert list(nbest) == [question.id for question in MADE]
    assert nbest["last"]["answers"][0]["text"] == "3.50" and nbest["last"]["no_answer_score"] == -18
    assert nbest["none"]["no_answer_score"] > 0


def test_squad_1_reads_its_own_file_and_only_questions_with_answers(tmp_path, byte_pairs):
    write_questions(tmp_path / "dev-v1.1.json", [MADE[0], MADE[1]])
    write_questions(tmp_path / "dev-v2.0.json", MADE[1:])

    def ids(name):
        examples = Source(find_task(name), tmp_path).load("dev", byte_pairs, 60)[0][""]
        return [question.id for question in examples.details.questions]

    assert ids("SQuAD") == ["long"] and ids("SQuAD2") == ["none", "cut", "last"]
    (tmp_path / "dev-v1.1.json").unlink()
    assert ids("SQuAD") == ["cut", "last"]
    for name in ("train", "dev"):
        write_questions(tmp_path / f"{name}-v2.0.json", [MADE[1]])
    assert ids("SQuAD2") == ["none"]  # silence can be judged, and not learned
    with pytest.raises(InputError, match="train-v2.0.json: no question has an answer"):
        Source(find_task("SQuAD2"), tmp_path).load("train", byte_pairs, 60)


def test_choices_are_the_tokens_of_each_sequence():
    # Two sequences of 2 and 3 tokens. Start and end are two choices among the tokens of a sequence.
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.5], [1.0, 4.0], [0.0, 5.0], [0.3, 3.0]])
    choices = find_task("SQuAD").choices(logits, torch.tensor([2, 3]))
    expected = [[0.0, 2.0], [1.0, 0.5], [1.0, 0.0, 0.3], [4.0, 5.0, 3.0]]
    assert choices.shape == (4, 3) and all(
        choices[i, : len(row)].tolist() == pytest.approx(row) for i, row in enumerate(expected)
    )
    assert choices.log_softmax(1).exp()[:2, 2].tolist() == [0, 0]  # padding is never chosen
    targets = torch.tensor([[1, 0], [0, 2]]).flatten()
    loss = torch.nn.functional.cross_entropy(choices, targets, reduction="sum")
    by_hand = sum(float(torch.tensor(row).logsumexp(0)) - row[i] for row, i in zip(expected, (1, 0, 0, 2)))
    assert float(loss) == pytest.approx(by_hand, abs=1e-5)


# ---- records to predict ----


def reader_of(tokenizer, folder: Path, max_length: int, **fields) -> Reader:
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    config = Config(tokenizer.backend.get_vocab_size(), 8, 2, 2, 16, 1000, head="span", labels=("start", "end"))
    return Reader(folder, config, max_length, **fields)


def test_records_are_answered_over_their_windows(byte_pairs, tmp_path):
    reader = reader_of(byte_pairs, tmp_path, 60, no_answer_threshold=0.0)
    records = [(f"line {i}", {"question": f" {q.question} ", "context": q.context}) for i, q in enumerate(MADE)]
    encoded, finish = find_task("SQuAD").prepare(records, reader)
    windows = make_windows(byte_pairs, MADE, 60)
    assert [e.token_ids for e in encoded] == [w.token_ids for w in windows] and reader.truncated == 1
    logits = [torch.from_numpy(values) for values in label_logits(windows)]
    kept = [[len(w.token_ids) - 1, i] for i, w in enumerate(windows)]
    answers = finish(list(zip(logits, kept)))
    assert [answer["answer"] for answer in answers] == ["Giant Mountains", "", "café au lait", "3.50"]
    for i, (question, answer) in enumerate(zip(MADE, answers)):
        own = [j for j, window in enumerate(windows) if window.question == i]
        assert answer["windows"] == len(own) and answer["tokens"] == sum(len(windows[j].token_ids) for j in own)
        assert answer["kept"] == [sum(kept[j][0] for j in own), sum(own)]
        assert ("start" in answer) == bool(answer["answer"])
        if answer["answer"]:
            assert question.context[answer["start"] : answer["end"]] == answer["answer"] and answer["score"] == 18
    assert answers[0]["windows"] > 1 and json.dumps(answers)


@pytest.mark.parametrize(
    "record",
    [
        {"text": "where"},
        {"question": "Who?"},
        {"question": " ", "context": "a"},
        {"question": 1, "context": "a"},
        ["a"],
    ],
)
def test_records_without_a_question_on_a_context_are_refused(record, byte_pairs, tmp_path):
    with pytest.raises(InputError, match="line 3: .*(question|context)"):
        find_task("SQuAD").prepare([("line 3", record)], reader_of(byte_pairs, tmp_path, 60))


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
