"""Exported files in the place of a checkpoint, in int8, and served without torch."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from test_ltp import refused, run

from support.checkpoint import load_model, save_model
from support.process import Process
from tools.predict import Predictor

ROOT = Path(__file__).parents[2]
TORCHLESS = """
import runpy, sys
sys.modules |= {"torch": None, "safetensors": None, "model": None}  # importing them fails
sys.path[:] = [path for path in sys.path if path not in ("", ROOT)]
sys.argv[:] = ["serve.py", *sys.argv[1:]]
runpy.run_path(SERVE, run_name="__main__")
"""


@pytest.fixture(scope="module")
def exported(hard, tmp_path_factory) -> Path:
    """A file that stands alone: its checkpoint is gone."""
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(hard, folder / "checkpoint")
    run("export", "--restore", folder / "checkpoint", "--output", folder / "m.onnx")
    run("export", "--restore", folder / "checkpoint", "--output", folder / "int8.onnx", "--int8")
    shutil.rmtree(folder / "checkpoint")
    return folder / "m.onnx"


def texts(count: int) -> list[dict]:
    words = "a dull film with a gripping end and two songs , again not so bad".split()
    rows = [{"text": " ".join((words * 9)[i % 7 : i % 7 + 1 + 3 * i % 90])} for i in range(count)]
    return [row | ({"text_pair": "so it goes", "id": i} if i % 3 == 0 else {}) for i, row in enumerate(rows)]


def serve(path: Path, *arguments: str, lines: str = "") -> subprocess.CompletedProcess:
    code = TORCHLESS.replace("SERVE", repr(str(ROOT / "serving" / "serve.py"))).replace("ROOT", repr(str(ROOT)))
    command = [sys.executable, "-c", code, str(path), *arguments]
    return subprocess.run(command, input=lines, capture_output=True, text=True, env=os.environ, cwd=path.parent)


def serving_module() -> Any:
    """serve.py as a program of one's own imports it."""
    spec = importlib.util.spec_from_file_location("serve", ROOT / "serving" / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expected_answers(hard: Path, rows: list[dict]) -> list[dict]:
    return Predictor(hard, Process()).answer([("", row) for row in rows])


def assert_same(answers: list[dict], expected: list[dict]) -> None:
    assert len(answers) == len(expected)
    for one, other in zip(answers, expected):
        assert one.keys() == other.keys()
        for key in {"logits", "score", "no_answer_score"} & one.keys():
            assert one.pop(key) == pytest.approx(other.pop(key), abs=1e-5)
        assert one == other


def test_serving_without_torch_answers_as_predict_does(hard, exported):
    rows = texts(200)
    result = serve(exported, lines="".join(json.dumps(row) + "\n" for row in rows))
    assert result.returncode == 0, result.stderr
    expected = expected_answers(hard, rows)
    assert len({row["tokens"] for row in expected}) > 20 and any(row["kept"][-1] < row["tokens"] for row in expected)
    assert_same([json.loads(line) for line in result.stdout.splitlines()], expected)
    result = serve(exported, "a film", "a song")
    assert_same([json.loads(result.stdout)], expected_answers(hard, [{"text": "a film", "text_pair": "a song"}]))


@pytest.fixture(scope="module")
def pruned(questions, tags, tmp_path_factory) -> dict[str, Path]:
    """Folders of a tagger and of a model for questions in which tokens go; an exported file is beside each."""
    folders = {}
    for kind, trained in (("questions", questions), ("tags", tags)):
        folders[kind] = tmp_path_factory.mktemp("pruned") / kind
        shutil.copytree(trained.folder, folders[kind])
        model = load_model(trained.folder, prune_mode="absolute_threshold").model
        model.thresholds.data = torch.tensor([0.0, 0.006, 0.01, 0.014])
        save_model(folders[kind], model)
        run("export", "--restore", folders[kind], "--output", folders[kind].with_suffix(".onnx"))
    return folders


def question_rows() -> list[dict]:
    """Questions on contexts of one window and of several, with blanks and letters of several tokens, and long ones."""
    pieces = "Anna lives in Malden .  Boris\n lives 中文 in Norwick. été 😀 Clara lives in Pernau\t.".split(" ")
    contexts = [" ".join((pieces * 20)[i : i + 1 + 11 * i]) for i in range(20)]
    names = ("Anna", " Boris ", "Clara " * 30, "who? " * 60)
    rows = [{"question": f"where does {names[i % 4]} live?", "context": text} for i, text in enumerate(contexts)]
    return [row | {"id": i} if i % 3 == 0 else row for i, row in enumerate(rows)] + [rows[1] | {"context": "\x07"}]


def tag_rows() -> list[dict]:
    """Words, some without a token of their own, and more of them than the model reads."""
    pieces = "Anna Berg is at the Harlow Press in Malden , \u200b été 😀 中文 \x07".split(" ")
    words = [{"words": (pieces * 9)[i % 5 : i % 5 + 1 + 5 * i], "id": str(i)} for i in range(16)]
    return words + [{"text": "  Anna\tlives in\n Malden "}]


def test_tags_without_torch_are_those_of_predict(pruned):
    rows = tag_rows()
    result = serve(pruned["tags"].with_suffix(".onnx"), lines="".join(json.dumps(row) + "\n\n" for row in rows))
    assert result.returncode == 0, result.stderr
    expected = expected_answers(pruned["tags"], rows)
    assert any(None in row["labels"] for row in expected) and any(row["kept"][-1] < row["tokens"] for row in expected)
    assert_same([json.loads(line) for line in result.stdout.splitlines()], expected)
    result = serve(pruned["tags"].with_suffix(".onnx"), "Anna lives in Malden")
    assert_same([json.loads(result.stdout)], expected_answers(pruned["tags"], [{"text": "Anna lives in Malden"}]))


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_questions_without_torch_are_answered_as_predict_does(pruned, threshold):
    rows, options = question_rows(), () if threshold is None else ("--no-answer-threshold", str(threshold))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    result = serve(pruned["questions"].with_suffix(".onnx"), *options, lines=lines)
    assert result.returncode == 0, result.stderr
    predictor = Predictor(pruned["questions"], Process(), no_answer_threshold=threshold)
    expected = predictor.answer([("", row) for row in rows])
    assert {row["windows"] for row in expected} > {1, 2} and predictor.reader.truncated > 0
    assert any(row["kept"][-1] < row["tokens"] for row in expected)
    assert_same([json.loads(line) for line in result.stdout.splitlines()], expected)


def test_a_question_on_the_command_line_goes_with_its_context(pruned):
    row = {"question": "where does Anna live?", "context": "Anna lives in Malden."}
    result = serve(pruned["questions"].with_suffix(".onnx"), "--threads", "1", *row.values())
    assert_same([json.loads(result.stdout)], expected_answers(pruned["questions"], [row]))
    for texts, message in ((["a"], 'expected "question" and "context"'), (["a", "b", "c"], "3 texts, but")):
        result = serve(pruned["questions"].with_suffix(".onnx"), *texts)
        assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "kind, line, message",
    [
        ("tags", "{", "not JSON"),
        ("tags", "[1]", "expected a JSON object"),
        ("tags", '{"words": []}', 'expected "words"'),
        ("tags", '{"words": ["a", ""]}', 'expected "words"'),
        ("tags", '{"text": " "}', 'expected "words"'),
        ("questions", '{"question": "a"}', 'expected "question" and "context"'),
        ("questions", '{"question": " ", "context": "a"}', 'expected "question" and "context"'),
        ("questions", '{"question": "\\ud800", "context": "a"}', 'expected "question" and "context"'),
        ("questions", "[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named(pruned, kind, line, message):
    fine = {"tags": '{"text": "a"}', "questions": '{"question": "a", "context": "b"}'}[kind]
    result = serve(pruned[kind].with_suffix(".onnx"), lines=f"{fine}\n{line}\n{fine}\n")
    assert result.returncode == 2 and len(result.stdout.splitlines()) == 1
    assert result.stderr.startswith("Error: line 2: ") and message in result.stderr and result.stderr.count("\n") == 1


def change_settings(path: Path, output: Path, **values: Any) -> Path:
    """Writes an exported file with other settings. None: the file does not have it."""
    program = onnx.load(path)
    (entry,) = [entry for entry in program.metadata_props if entry.key == "settings"]
    settings = json.loads(entry.value) | values
    entry.value = json.dumps({name: value for name, value in settings.items() if value is not None})
    onnx.save(program, output)
    return output


def test_a_file_of_an_older_version_is_to_be_written_again(pruned, tmp_path):
    path = change_settings(pruned["tags"].with_suffix(".onnx"), tmp_path / "old.onnx", vocab_size=None)
    result = serve(path, "a")
    assert result.returncode == 2 and "write it again with `ltp.py export`" in result.stderr


@pytest.mark.parametrize("kind, texts", [("tags", ["a " * 90]), ("questions", ["a", "b " * 90])])
def test_no_words_and_contexts_are_cut_on_the_left(pruned, tmp_path, kind, texts):
    path = change_settings(pruned[kind].with_suffix(".onnx"), tmp_path / "left.onnx", cut_side="left")
    assert serve(path, *(text[:20] for text in texts)).returncode == 0
    result = serve(path, *texts)
    assert result.returncode == 2 and "truncation_side = left" in result.stderr


def test_a_token_without_an_embedding_is_named(hard, tmp_path):
    shutil.copytree(hard, tmp_path / "model")
    more = {f"<new{i}>": 600 + i for i in range(400)}  # more than the model has free embeddings for
    (tmp_path / "model" / "added_tokens.json").write_text(json.dumps(more))
    run("export", "--restore", tmp_path / "model", "--output", tmp_path / "m.onnx")
    assert serve(tmp_path / "m.onnx", "a film").returncode == 0
    told = re.search(
        "Error: (the tokenizer gives '<new399>' the id [0-9]+)", serve(tmp_path / "m.onnx", "a <new399>").stderr
    )
    message = refused("predict", "--restore", tmp_path / "m.onnx", "a <new399>")
    assert f"{tmp_path / 'm.onnx'}: {told[1]}" in message


def test_a_classifier_answers_a_list_of_texts(hard, exported, pruned):
    Classifier = serving_module().Classifier
    answers = Classifier(exported)(["a film", "a song"], [None, "so it goes"])
    assert_same(answers, expected_answers(hard, [{"text": "a film"}, {"text": "a song", "text_pair": "so it goes"}]))
    with pytest.raises(ValueError, match="shorter"):
        Classifier(exported)(["a film", "a song"], ["so it goes"])
    with pytest.raises(ValueError, match="tags words or answers questions"):
        Classifier(pruned["tags"].with_suffix(".onnx"))


def test_serving_says_what_is_wrong_in_a_line(exported, hard, tmp_path):
    (tmp_path / "text.onnx").write_text("no graph")
    bare = onnx.load(exported)
    del bare.metadata_props[:]
    onnx.save(bare, tmp_path / "bare.onnx")
    for path, arguments, message in (
        (exported, (), "line 1: expected"),
        (tmp_path / "text.onnx", ("a",), "not a graph"),
        (tmp_path / "bare.onnx", ("a",), "holds no tokenizer"),
    ):
        result = serve(path, *arguments, lines="{}\n")
        assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_serving_ends_quietly_when_nobody_reads_on(exported, tmp_path):
    (tmp_path / "in.jsonl").write_text(5000 * '{"text": "a film"}\n')
    script = 'set -o pipefail; "$0" "$1" "$2" < "$3" | head -1'
    words = (sys.executable, ROOT / "serving" / "serve.py", exported, tmp_path / "in.jsonl")
    result = subprocess.run(["bash", "-c", script, *map(str, words)], capture_output=True, text=True)
    assert result.returncode == 1 and len(result.stdout.splitlines()) == 1 and result.stderr == ""


def test_commands_take_a_file_for_a_checkpoint(hard, exported, demo, tmp_path):
    scores = []
    for model in (hard, exported):
        run("eval", "--restore", model, "--data", demo / "data", "--json", tmp_path / "score.json")
        (score,) = [json.loads((tmp_path / "score.json").read_text())]
        scores.append({key: score[key] for key in ("metrics", "relative_flops", "kept", "loss")})
    assert scores[0]["metrics"] == scores[1]["metrics"] and scores[0]["kept"] == scores[1]["kept"]
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], abs=1e-6)
    rows = texts(12)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("predict", "--restore", exported, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert_same(answers, expected_answers(hard, rows))


@pytest.mark.parametrize("kind", ["questions", "tags"])
def test_tags_and_questions_are_those_of_the_checkpoint(kind, request, tmp_path):
    trained = request.getfixturevalue(kind)
    data = ("--task", "SQuAD2") if kind == "questions" else ("--tagging",)
    run("export", "--restore", trained.folder, "--output", tmp_path / "m.onnx")
    scores = []
    for model in (trained.folder, tmp_path / "m.onnx"):
        run("eval", *data, "--data", trained.source.path, "--restore", model, "--json", tmp_path / "score.json")
        scores.append(json.loads((tmp_path / "score.json").read_text()))
    for key in ("score", "loss", "kept", "relative_flops"):
        assert scores[0][key] == pytest.approx(scores[1][key], abs=1e-5)


def test_int8_is_near(hard, exported, demo, tmp_path):
    path, expected = exported.with_name("int8.onnx"), expected_answers(hard, texts(40))
    result = serve(path, lines="".join(json.dumps(row) + "\n" for row in texts(40)))
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    graph = onnx.load(path).graph
    products = {node.op_type for node in graph.node}
    assert "MatMulInteger" in products and "Gemm" not in products
    matrices = [
        part.name for part in graph.initializer if len(part.dims) == 2 and part.data_type == onnx.TensorProto.FLOAT
    ]
    assert all("embeddings" in name for name in matrices)
    errors = [abs(a - b) for one, other in zip(answers, expected) for a, b in zip(one["logits"], other["logits"])]
    assert 0 < max(errors) < 0.1
    pairs = [row.get("text_pair") for row in texts(40)]
    together = serving_module().Classifier(path)([row["text"] for row in texts(40)], pairs)
    assert [row["logits"] for row in together] == [pytest.approx(row["logits"], abs=1e-5) for row in answers]
    result = run("eval", "--restore", path, "--data", demo / "data", "--json", tmp_path / "score.json")
    (score,) = [json.loads((tmp_path / "score.json").read_text())]
    assert "rel. BOPs" in result.stdout and score["relative_bops"] < 0.5 * score["relative_flops"]


def test_export_tells_what_int8_costs(hard, demo, tmp_path):
    output, data = tmp_path / "i.onnx", ("--data", demo / "data")
    lines = run("export", "--restore", hard, "--output", output, "--int8", *data).stdout.splitlines()
    accuracies = [
        re.fullmatch(rf"{name}: accuracy (\S+), macro_f1 \S+", line)[1]
        for name, line in zip(("checkpoint", "i.onnx"), lines[1:])
    ]
    output.unlink()
    assert "which is another kind of task" in refused(
        "export", "--restore", hard, "--output", output, "--task", "SQuAD"
    )
    assert not output.exists()
    run("export", "--restore", hard, "--output", output, "--int8")
    kept, same = re.fullmatch(
        r"(\S+)% of \d+ texts keep as many tokens in every layer; (\S+)% get the same answer", lines[3]
    ).groups()
    assert 50 < float(kept) <= 100 and 90 < float(same) <= 100
    for path, accuracy in zip((hard, output), accuracies):
        run("eval", "--restore", path, *data, "--json", tmp_path / "score.json")
        assert f"{json.loads((tmp_path / 'score.json').read_text())['metrics']['accuracy']:.4f}" == accuracy


def test_what_a_file_cannot_do_is_refused(exported, demo, tmp_path):
    data = ("--data", demo / "data")
    for arguments, message in (
        (("hard", "--restore", exported, *data, "--output", tmp_path / "o"), "an exported model cannot change"),
        (("eval", "--restore", exported, *data, "--dense"), "an exported model prunes in its one way"),
        (("inspect", "--restore", exported, "a film"), "an exported model prunes in its one way"),
        (("export", "--restore", exported, "--output", tmp_path / "m.onnx"), "is exported already"),
        (("eval", "--restore", exported, *data, "--tagging"), f"{exported}: classifies texts"),
        (("eval", "--restore", exported, *data, "--regression"), f"{exported}: has 2 outputs"),
        (("eval", "--restore", exported, *data, "--precision", "bf16"), "computes as it was exported"),
        (("bench", "--restore", exported, *data, "--precision", "bf16"), "computes as it was exported"),
        (("predict", "--restore", exported, "a", "--max-length", 999), f"{exported} has positions for 128 tokens"),
    ):
        assert message in refused(*arguments)
    (tmp_path / "text.onnx").write_text("no graph")
    assert "not a graph" in refused("eval", "--restore", tmp_path / "text.onnx", *data)


def test_bench_times_files_alone_and_beside_a_checkpoint(hard, exported, demo, tmp_path):
    int8, few = exported.with_name("int8.onnx"), ("--examples", 4, "--repeats", 1, "--bs", 2)
    for restore, names in ((exported, ["m.onnx", "int8.onnx"]), (hard, ["dense", "pruned", "int8.onnx"])):
        words = ("--restore", restore, "--beside", int8, "--data", demo / "data", "--json", tmp_path / "speed.json")
        result = run("bench", *words, *few)
        assert [row["model"] for row in json.loads((tmp_path / "speed.json").read_text())["rows"]] == names
        assert "rel. BOPs" in result.stdout and all(name in result.stdout for name in names)
    absent = run("bench", "--restore", hard, "--lengths", 9, "--beside", tmp_path / "absent.onnx", code=2)
    assert "does not exist" in absent.stderr
    assert f"{exported} has no README.md" in refused("bench", "--restore", exported, "--lengths", 9, "--card")
