"""Exported files in the place of a checkpoint, in int8, and served without torch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from test_ltp import refused, run

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


def expected_answers(hard: Path, rows: list[dict]) -> list[dict]:
    return Predictor(hard, Process()).answer([("", row) for row in rows])


def assert_same(answers: list[dict], expected: list[dict]) -> None:
    assert len(answers) == len(expected)
    for one, other in zip(answers, expected):
        assert one.pop("logits") == pytest.approx(other.pop("logits"), abs=1e-5)
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
    result = serve(tmp_path / "m.onnx", "a text")
    assert result.returncode == 2 and "tags words or answers questions" in result.stderr


def test_int8_is_smaller_and_near(hard, exported, demo, tmp_path):
    path, expected = exported.with_name("int8.onnx"), expected_answers(hard, texts(40))
    result = serve(path, lines="".join(json.dumps(row) + "\n" for row in texts(40)))
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    products = {node.op_type for node in onnx.load(path).graph.node}
    assert "MatMulInteger" in products or "DynamicQuantizeMatMul" in products
    assert path.stat().st_size < 0.9 * exported.stat().st_size
    errors = [abs(a - b) for one, other in zip(answers, expected) for a, b in zip(one["logits"], other["logits"])]
    assert 0 < max(errors) < 0.1
    result = run("eval", "--restore", path, "--data", demo / "data", "--json", tmp_path / "score.json")
    (score,) = [json.loads((tmp_path / "score.json").read_text())]
    assert "rel. BOPs" in result.stdout and score["relative_bops"] < 0.5 * score["relative_flops"]


def test_what_a_file_cannot_do_is_refused(exported, demo, tmp_path):
    data = ("--data", demo / "data")
    for arguments, message in (
        (("hard", "--restore", exported, *data, "--output", tmp_path / "o"), "an exported model cannot change"),
        (("eval", "--restore", exported, *data, "--dense"), "an exported model prunes in its one way"),
        (("inspect", "--restore", exported, "a film"), "an exported model prunes in its one way"),
        (("export", "--restore", exported, "--output", tmp_path / "m.onnx"), "is exported already"),
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
    assert "is not a card that training wrote" in refused("bench", "--restore", exported, "--lengths", 9, "--card")
