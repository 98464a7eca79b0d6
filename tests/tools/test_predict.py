"""Answers: the same whatever the batch, in the records' order, and those of `eval`."""

import json
import re
import threading

import pytest
from sentences import made_sentences
from small_models import random_sequences, small_model
from test_ltp import refused

from runs.stage import StageRequest, evaluate_checkpoint, run_stage
from support.checkpoint import save_model
from support.errors import InputError
from support.process import Process
from support.settings import Settings
from tasks import own_task
from tasks.base import Source
from tasks.squad import read_squad
from tools.predict import Predictor, predict_file


def predictor(folder, **options) -> Predictor:
    return Predictor(folder, Process(), **options)


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- texts ----


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 64}, {"max_tokens": 90}])
def test_answers_are_in_input_order_whatever_the_batch(hard, demo, tmp_path, options):
    rows = read_lines(demo / "data" / "dev.jsonl")
    rows[3] = {"text": ""}
    rows[4] = {"text": "one", "text_pair": "two"}
    rows[5] = {"token_ids": [0, 7, 9, 2], "id": "five"}
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert predict_file(predictor(hard, **options), source, tmp_path / "out.jsonl") == len(rows) == 41
    answers = read_lines(tmp_path / "out.jsonl")
    for row, answer in zip(rows, answers):
        (alone,) = predictor(hard).answer([("alone", row)])
        assert answer["logits"] == pytest.approx(alone.pop("logits"), abs=1e-5)
        assert answer == alone | {"logits": answer["logits"]}
        assert len(answer["kept"]) == 4 and answer["tokens"] == answer["kept"][0] >= answer["kept"][3] >= 1
    assert answers[5]["id"] == "five" and answers[5]["tokens"] == 4 and "id" not in answers[4]
    assert any(answer["kept"][3] < answer["tokens"] for answer in answers)


def test_dense_answers_keep_every_token(hard):
    texts = [("line", {"text": "the road was not excellent"})]
    (dense,) = predictor(hard, dense=True).answer(texts)
    (pruned,) = predictor(hard).answer(texts)
    assert dense["kept"] == 4 * [dense["tokens"]] and pruned["kept"] != dense["kept"]


def test_a_cut_text_is_counted(hard):
    reader = predictor(hard)
    (answer,) = reader.answer([("line", {"text": "the road " * 200})])
    assert answer["tokens"] == reader.reader.max_length == 128 and reader.reader.truncated == 1
    shorter = predictor(hard, max_length=9)
    records = [{"text": "the road " * 9}, {"text": "a"}, {"token_ids": [5] * 10}]
    answers = shorter.answer([("line", record) for record in records])
    assert [a["tokens"] for a in answers][::2] == [9, 9] and shorter.reader.truncated == 2
    with pytest.raises(InputError, match="--max-length 500: .* has positions for 128 tokens"):
        predictor(hard, max_length=500)


def test_token_ids_need_no_tokenizer(tmp_path):
    save_model(tmp_path / "m", small_model(prune_mode="topk", token_keep_rate=0.3))
    records = [("line", {"token_ids": ids}) for ids in random_sequences(10)]
    answers = predictor(tmp_path / "m", batch_size=3).answer(records)
    for answer, record in zip(answers, records):
        (alone,) = predictor(tmp_path / "m").answer([record])
        assert answer["kept"] == alone["kept"] and answer["logits"] == pytest.approx(alone["logits"], abs=1e-5)
    with pytest.raises(InputError, match="no tokenizer"):
        predictor(tmp_path / "m").answer([("line", {"text": "a"})])


def test_a_score_is_the_answer_of_a_regression(demo, tmp_path):
    lines = "".join(f"the road {'a ' * i}\t{i / 10}\n" for i in range(20))
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("text\tlabel\n" + lines)
    source = Source(own_task(None, None, None, regression=True), tmp_path)
    settings = Settings(learning_rate=1e-3, epochs=1, batch_size=5)
    request = StageRequest("finetune", demo / "model", source, settings, output=tmp_path / "out")
    folder, _ = run_stage(request, Process())
    (answer,) = predictor(folder).answer([("line", {"text": "the road a a"})])
    assert answer["label"] == answer["logits"][0]


# ---- files ----


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"words": "a"}', 'expected an object with "text"'),
        ("[1]", "expected a JSON object"),
        ("{", "not JSON"),
        ('{"text": 3}', "must be strings"),
        ('{"token_ids": [700]}', "whole numbers from 0 to 599"),
        ('{"token_ids": []}', "token_ids must be a list"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named_and_the_old_output_stays(hard, tmp_path, line, message):
    (tmp_path / "in.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    (tmp_path / "out.jsonl").write_text("old")
    error = refused("predict", "--restore", hard, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert re.search(f"in.jsonl, line 2: .*{message}", error)
    assert (tmp_path / "out.jsonl").read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_files_without_lines_or_of_another_encoding_are_refused(hard, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(InputError, match="empty.jsonl: holds no lines"):
        predict_file(predictor(hard), tmp_path / "empty.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="latin.jsonl.*: not UTF-8"):
        predict_file(predictor(hard), tmp_path / "latin.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="is the input; choose another file"):
        predict_file(predictor(hard), tmp_path / "empty.jsonl", tmp_path / "empty.jsonl")
    with pytest.raises(InputError, match="is a folder; name a file"):
        predict_file(predictor(hard), tmp_path / "empty.jsonl", tmp_path)
    assert not (tmp_path / "out.jsonl").exists()


def test_without_an_output_file_answers_go_to_standard_output(hard, tmp_path, capsys):
    rows = [{"text": "é"}, {"text": "fine"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert predict_file(predictor(hard), tmp_path / "in.jsonl", None) == 2
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answers == predictor(hard).answer([("line", row) for row in rows])


class Pair:
    """The gathers of two processes that run as threads."""

    def __init__(self):
        self.barrier, self.values = threading.Barrier(2), [None, None]

    def gather(self, rank, value):
        self.values[rank] = value
        self.barrier.wait(60)
        values = list(self.values)
        self.barrier.wait(60)
        return values


def test_two_processes_answer_like_one(hard, demo, tmp_path, monkeypatch):
    pair = Pair()
    monkeypatch.setattr(Process, "gather", lambda process, value: pair.gather(process.rank, value))
    source, outputs = demo / "data" / "dev.jsonl", [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    both = [Predictor(hard, Process(rank, 2), batch_size=1) for rank in (0, 1)]
    threads = [threading.Thread(target=predict_file, args=(both[rank], source, outputs[rank])) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    predict_file(predictor(hard, batch_size=1), source, tmp_path / "one.jsonl")
    assert read_lines(outputs[0]) == read_lines(tmp_path / "one.jsonl")
    assert not outputs[1].exists()  # the main process writes alone


# ---- questions and tags ----


def test_answers_to_questions_are_those_of_eval(questions):
    _, sets, logits = evaluate_checkpoint(questions.folder, questions.source, Process())
    details = sets[""].details
    texts = list(details.texts(details.find_answers(logits[""])).values())
    asked = list(read_squad(questions.source.path / "dev-v2.0.json"))
    reader = predictor(questions.folder, batch_size=4, no_answer_threshold=0.0)
    # Blanks around a question do not count.
    answers = reader.answer([("line", {"question": f" {q.question} ", "context": q.context}) for q in asked])
    assert [answer["answer"] for answer in answers] == texts
    for question, answer in zip(asked, answers):
        assert not answer["answer"] or question.context[answer["start"] : answer["end"]] == answer["answer"]
        assert len(answer["kept"]) == 4


def test_a_long_context_is_answered_from_several_windows(questions):
    reader = predictor(questions.folder)
    (several,) = reader.answer([("line", {"id": 7, "question": "Who?", "context": "Ada wrote it. " * 60})])
    (single,) = reader.answer([("line", {"question": "Who?", "context": "Ada."})])
    assert several["id"] == 7 and several["windows"] > 1 and single["windows"] == 1 and "id" not in single
    assert several["kept"] == 4 * [several["tokens"]] and several["tokens"] > reader.reader.max_length
    with pytest.raises(InputError, match="line: .question. is missing"):
        reader.answer([("line", {"text": "where"})])


def test_tags_are_those_of_eval(tags):
    sentences = made_sentences(30, 1)
    answers = predictor(tags.folder, batch_size=4).answer([("line", {"words": s.words}) for s in sentences])
    evaluation, _, _ = evaluate_checkpoint(tags.folder, tags.source, Process())
    right = [a == b for s, answer in zip(sentences, answers) for a, b in zip(s.labels, answer["labels"])]
    assert evaluation.metrics["accuracy"] == pytest.approx(sum(right) / len(right))
    (of_text,) = predictor(tags.folder).answer([("line", {"text": " ".join(sentences[0].words)})])
    assert of_text == answers[0]
    (cut,) = predictor(tags.folder, max_length=10).answer([("line", {"words": sentences[0].words})])
    read = sum(label is not None for label in cut["labels"])  # words that were cut off have no label
    assert cut["tokens"] == 10 and cut["labels"] == answers[0]["labels"][:read] + [None] * (len(cut["words"]) - read)
    with pytest.raises(InputError, match='line: expected an object with "words"'):
        predictor(tags.folder).answer([("line", {"words": []})])
