"""GLUE's tasks and your own texts: sources, labels, metrics, and records to predict."""

import os
from pathlib import Path

import numpy as np
import pytest

from model import Config
from support.errors import InputError
from support.settings import TASK_NAMES
from tasks import find_task, own_task, task_for_head
from tasks.base import Reader, Source
from tasks.classification import evaluate_predictions
from tasks.readers import read_rows

DATA = Path(os.environ.get("LTP_DATA", Path(__file__).parents[3] / "shared" / "data"))


def own(text=None, pair=None, label=None, regression=False):
    return own_task(text, pair, label, regression, False)


def load(source, split, tokenizer, max_length=32, labels=None):
    return source.task.load(source, split, tokenizer, max_length, labels)


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.tsv").write_text(text, encoding="utf-8")


# ---- tasks and metrics ----


def test_task_names_in_every_spelling():
    assert find_task("SST2") is find_task("sst-2") is find_task("SST-2") and find_task("stsb").name == "STS-B"
    assert find_task("COLA").name == "CoLA" and find_task("squad_2").name == "SQuAD2"
    with pytest.raises(InputError, match="--task SST3: unknown; the tasks are CoLA"):
        find_task("SST3")


def test_every_task_of_the_command_line_exists():
    assert [find_task(name).name for name in TASK_NAMES] == list(TASK_NAMES)


def test_metrics_by_hand():
    logits = np.array([[0, 1], [0, 1], [1, 0], [0, 1]])  # predicted 1 1 0 1
    labels = np.array([1, 0, 0, 1])  # 2 true positives, 1 false positive, 1 true negative
    metrics, score = evaluate_predictions("accuracy_f1", logits, labels)
    assert metrics == {"accuracy": 0.75, "f1": pytest.approx(0.8)} and score == pytest.approx(0.775)
    metrics, score = evaluate_predictions("matthews", logits, labels)
    assert score == pytest.approx((2 * 1 - 1 * 0) / np.sqrt(3 * 2 * 2 * 1)) and metrics["accuracy"] == 0.75
    assert evaluate_predictions("accuracy", logits, labels)[1] == 0.75
    metrics, score = evaluate_predictions("accuracy_macro_f1", logits, labels)
    assert score == 0.75 and metrics["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    metrics, score = evaluate_predictions("correlation", np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 2.0, 3.0]))
    assert metrics["spearman"] == pytest.approx(1) and metrics["pearson"] == pytest.approx(
        3 / np.sqrt(28 / 3), abs=1e-6
    )
    assert score == pytest.approx((metrics["pearson"] + 1) / 2)
    assert evaluate_predictions("correlation", np.ones((3, 1)), np.array([1.0, 2.0, 3.0]))[1] == 0.0


# ---- sources ----


def test_missing_files():
    with pytest.raises(InputError, match="--data nowhere: no such file or folder"):
        Source(find_task("mrpc"), Path("nowhere")).rows("train")


def test_glue_layouts(tmp_path, byte_level):
    write(tmp_path / "CoLA", dev="gj04\t1\t\tThe sailors rode.\ngj04\t0\t*\tThe rode.\n")
    write(tmp_path / "STS-B", dev="index\tsentence1\tsentence2\tscore\n0\ta\tb\t2.500\n1\tc\td\t0\n")
    write(tmp_path / "QNLI", dev="index\tquestion\tsentence\tlabel\n0\tq\ts\tnot_entailment\n1\tq\ts\tentailment\n")
    header = "index\tsentence1\tsentence2\tlabel1\tgold_label\n"
    write(
        tmp_path / "MNLI",
        dev_matched=header + "0\ta\tb\tneutral\tneutral\n",
        dev_mismatched=header + "0\ta\tb\tx\tcontradiction\n1\ta\tb\tx\tentailment\n",
    )

    def labels(task, split="dev"):
        sets, _ = load(Source(find_task(task), tmp_path), split, byte_level)
        return {suffix: examples.targets.tolist() for suffix, examples in sets.items()}

    assert labels("CoLA") == {"": [1, 0]} and labels("STSB") == {"": [2.5, 0]} and labels("QNLI") == {"": [1, 0]}
    assert labels("MNLI") == {"": [1], "_mismatched": [2, 0]}
    with pytest.raises(InputError, match=r"holds no train.tsv"):
        labels("CoLA", "train")


def test_texts_without_labels_are_read_as_glues_files_are(tmp_path, byte_level):
    write(tmp_path, more="index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n1\tc\n2\td\te\t0\n")
    more = find_task("RTE").load_unlabelled(tmp_path / "more.tsv", byte_level, 32)
    assert len(more) == 2 and more.left_out == 1
    write(tmp_path, test="index\tsentence\n0\ta\n")  # CoLA's train.tsv has no header line
    with pytest.raises(InputError, match="line 1: 2 columns; expected a line without names, and a text in column 4"):
        find_task("CoLA").load_unlabelled(tmp_path / "test.tsv", byte_level, 32)


@pytest.mark.skipif(not DATA.is_dir(), reason="the GLUE files are not beside this checkout")
def test_real_glue_files(byte_level):
    counts = {"MRPC": (408, 2), "RTE": (277, 2), "STS-B": (1500, 0), "SST-2": (872, 2)}
    for name, (dev, classes) in counts.items():
        sets, labels = load(Source(find_task(name), DATA / "glue"), "dev", byte_level, 128)
        assert len(sets[""]) == dev and len(labels) == classes, name
    assert sum(1 for _ in read_rows(DATA / "glue/MRPC/train.tsv", ("#1 String", "#2 String", "Quality"))) == 3667


def test_no_network_says_how_to_pass_data(byte_level, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(
        InputError, match=".ConnectionError: no route.; .* pass a folder in GLUE's TSV layout with --data PATH"
    ):
        load(Source(find_task("RTE")), "dev", byte_level)


def test_rows_of_the_hub(byte_level, monkeypatch):
    table = [{"sentence1": "a", "sentence2": "b", "label": 1}, {"sentence1": "c", "sentence2": "d", "label": 0}]
    monkeypatch.setattr("datasets.load_dataset", lambda *names, split: table)
    sets, labels = load(Source(find_task("RTE")), "dev", byte_level)
    assert labels == ("entailment", "not_entailment") and sets[""].targets.tolist() == [1, 0]


# ---- examples ----


def test_examples_are_the_tokens_of_the_texts(tmp_path, byte_level):
    write(tmp_path, train="one\ttwo\tlabel\na film\tsuperb\tx\nthe road\tboring music\ty\n")
    examples = load(Source(own("one", "two"), tmp_path), "train", byte_level)[0][""]
    encoded = byte_level.encode(["a film", "the road"], ["superb", "boring music"], 32)
    assert len(examples) == 2 and examples.lengths.tolist() == [len(e.token_ids) for e in encoded]
    batch = examples.batch(np.array([1, 0]))
    assert batch.token_ids.tolist() == encoded[1].token_ids + encoded[0].token_ids
    assert batch.segment_ids.tolist() == encoded[1].segment_ids + encoded[0].segment_ids


def test_targets_and_choices(tmp_path, byte_level):
    import torch

    task = own()
    write(tmp_path, train="text\tlabel\na\tx\nb\ty\nc\tx\n")
    examples = load(Source(task, tmp_path), "train", byte_level)[0][""]
    assert task.targets(examples, np.array([1, 2])).tolist() == [1, 0]
    assert task.count_targets(examples, np.array([1, 2])) == 2
    logits = torch.tensor([[0.5, 1.0], [2.0, 0.0]])
    assert torch.equal(task.choices(logits, torch.tensor([3, 4])), logits)
    metrics, score = task.judge(examples, [np.array(row) for row in ([1.0, 0.0], [0.0, 1.0], [0.0, 1.0])])
    assert metrics["accuracy"] == score == pytest.approx(2 / 3)


def test_own_files_labels_of_any_type(tmp_path, byte_level):
    source = Source(own("body", None, "kind"), tmp_path)
    write(tmp_path, train="body\tkind\na\t10\nb\t9\nc\t10\n", dev="body\tkind\na\t9\n")
    sets, labels = load(source, "train", byte_level)
    assert labels == ("9", "10") and sets[""].targets.tolist() == [1, 0, 1]  # numbers sort as numbers
    assert load(source, "dev", byte_level, labels=labels)[0][""].targets.tolist() == [0]
    write(tmp_path, dev="body\tkind\na\t9\nb\t0\n")
    with pytest.raises(InputError, match="line 3: the label '0' is none of 9, 10"):
        load(source, "dev", byte_level, labels=labels)


def test_labels_given_by_name_may_stand_as_numbers_in_files(tmp_path, byte_level):
    write(tmp_path, dev="text\tlabel\na\t1\nb\tbad\n")
    sets, _ = load(Source(own(), tmp_path), "dev", byte_level, labels=("bad", "good"))
    assert sets[""].targets.tolist() == [1, 0]


def test_scores_must_be_numbers_and_classes_more_than_one(tmp_path, byte_level):
    write(tmp_path, train="text\tlabel\na\t1.5\nb\tgood\n")
    with pytest.raises(InputError, match="line 3: the score 'good' is not a number"):
        load(Source(own(regression=True), tmp_path), "train", byte_level)
    write(tmp_path, train="text\tlabel\na\tx\nb\tx\n")
    with pytest.raises(InputError, match="all examples have the label 'x'"):
        load(Source(own(), tmp_path), "train", byte_level)


def test_a_changed_file_is_read_anew(tmp_path, byte_level):
    source = Source(own(), tmp_path)
    write(tmp_path, train="text\tlabel\na\tx\nb\ty\n")
    assert len(load(source, "train", byte_level)[0][""]) == 2
    write(tmp_path, train="text\tlabel\na\tx\nb\ty\nc\ty\n")
    assert len(load(source, "train", byte_level)[0][""]) == 3


def test_a_cached_table_of_another_version_of_the_code_is_not_read(tmp_path, byte_level, monkeypatch):
    """Once tokenized, a set is read from the cache; the key names the version of the code."""
    source = Source(own(), tmp_path)
    write(tmp_path, train="text\tlabel\na\tx\nb\ty\n")
    load(source, "train", byte_level)
    calls = []
    encode = byte_level.encode
    monkeypatch.setattr(byte_level, "encode", lambda *arguments: calls.append(1) or encode(*arguments))
    load(source, "train", byte_level)
    assert not calls
    monkeypatch.setattr("tasks.classification.CACHE_VERSION", -1)
    load(source, "train", byte_level)
    assert calls


def test_long_texts_are_cut_and_counted(tmp_path, byte_level):
    write(tmp_path, train="text\tlabel\n" + "the road " * 50 + "\tx\nshort\ty\n")
    examples = load(Source(own(), tmp_path), "train", byte_level, 20)[0][""]
    assert examples.truncated == 1 and examples.lengths.max() == 20


# ---- records to predict ----


def reader_of(tokenizer, folder, max_length=20, labels=("bad", "good")) -> Reader:
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    return Reader(folder, Config(tokenizer.backend.get_vocab_size(), 8, 2, 2, 16, 40, labels=labels), max_length)


def test_records_of_every_kind_are_answered_in_their_order(byte_level, tmp_path):
    import torch

    reader = reader_of(byte_level, tmp_path)
    records = [
        {"text": "a film"},
        {"token_ids": [0, 9, 2]},
        {"text": "the road " * 20},
        {"text": "a", "text_pair": "b"},
    ]
    encoded, finish = own().prepare([(f"line {i}", record) for i, record in enumerate(records)], reader)
    texts = byte_level.encode(["a film", "the road " * 20], None, 20)
    (pair,) = byte_level.encode(["a"], ["b"], 20)
    assert [e[:2] for e in encoded] == [texts[0][:2], ([0, 9, 2], [0, 0, 0]), texts[1][:2], pair[:2]]
    assert reader.truncated == 1
    answers = finish([(torch.tensor([0.5, float(i)]), [i, 1]) for i in range(4)])
    assert [answer["label"] for answer in answers] == ["bad", "good", "good", "good"]
    assert answers[1] == {"label": "good", "logits": [0.5, 1.0], "tokens": 3, "kept": [1, 1]}


def test_a_single_output_is_the_score(byte_level, tmp_path):
    import torch

    _, finish = own().prepare([("line 1", {"text": "a"})], reader_of(byte_level, tmp_path, labels=("score",)))
    assert finish([(torch.tensor([2.5]), [3, 3])])[0]["label"] == 2.5


def test_token_ids_need_no_tokenizer_and_are_cut(tmp_path):
    reader = Reader(tmp_path, Config(50, 8, 2, 2, 16, 40), 3)
    encoded, _ = own().prepare([("line 1", {"token_ids": [0, 9, 8, 7, 2]})], reader)
    assert encoded == [([0, 9, 8], [0, 0, 0], False, 0)] and reader.truncated == 1


@pytest.mark.parametrize(
    "record, message",
    [
        ("a", 'expected an object with "text", or with "token_ids"'),
        ({}, 'expected an object with "text", or with "token_ids"'),
        ({"text": "a", "token_ids": [1]}, 'expected an object with "text", or with "token_ids"'),
        ({"text": 5}, "text and text_pair must be strings of valid characters"),
        ({"text": "a", "text_pair": None}, "text and text_pair must be strings of valid characters"),
        ({"token_ids": []}, "token_ids must be a list of one or more whole numbers from 0 to 49"),
        ({"token_ids": [50]}, "token_ids must be a list of one or more whole numbers from 0 to 49"),
        ({"token_ids": [True]}, "token_ids must be a list of one or more whole numbers from 0 to 49"),
    ],
)
def test_bad_records_are_named(record, message, tmp_path):
    with pytest.raises(InputError, match=f"line 7: {message}"):
        own().prepare([("line 7", record)], Reader(tmp_path, Config(50, 8, 2, 2, 16, 40), 20))


@pytest.mark.parametrize("head", ["sequence", "token", "span"])
def test_every_head_has_a_task(head):
    assert task_for_head(head).head == head
