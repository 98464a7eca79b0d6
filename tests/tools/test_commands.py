"""The commands on questions, on tags, and on what they draw and write: from the command line to the file."""

import json
import re
import shutil
from pathlib import Path

import onnx
import pytest
from safetensors.torch import load_file
from test_distributed import launch
from test_ltp import refused, run
from torch.testing import assert_close

from support.checkpoint import load_model, save_model


def pruned(folder: Path, target: Path) -> Path:
    """A copy of a model with thresholds at which tokens go."""
    shutil.copytree(folder, target)
    model = load_model(folder, prune_mode="absolute_threshold").model
    model.thresholds.data.fill_(0.012)
    save_model(target, model)
    return target


# ---- questions and tags ----


def test_eval_writes_the_answers_and_the_n_best(questions, tmp_path):
    files = ("--predictions", tmp_path / "texts.json", "--nbest", tmp_path / "nbest.json")
    options = ("--task", "SQuAD2", "--data", questions.source.path, "--restore", questions.folder)
    assert "no answer accuracy" in run("eval", *options, *files, "--max-tokens", 200).stdout
    texts, nbest = (json.loads((tmp_path / name).read_text()) for name in ("texts.json", "nbest.json"))
    assert list(texts) == list(nbest) == [f"1-{number}" for number in range(30)]
    for name, best in nbest.items():
        assert texts[name] == ("" if best["no_answer_score"] > 0 else best["answers"][0]["text"])
        assert set(best["answers"][0]) == {"text", "start", "end", "score", "probability"}
    run("eval", *options, "--nbest", tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == nbest and len(list(tmp_path.iterdir())) == 3


def test_inspect_shows_the_answers_of_predict(trained, tmp_path):
    folder = pruned(trained.folder, tmp_path / "hard")
    pair = ("Who wrote it?", "--pair", "Ada Berg wrote it in 1912.")
    text = pair if trained.source.task.head == "span" else ("Ada Berg wrote",)
    answer = json.loads(run("predict", "--restore", folder, *text).stdout)
    page = tmp_path / "p.html"
    assert f"{page}: open it" in run("inspect", "--restore", folder, *text, "--html", page).stdout
    run("inspect", "--restore", folder, *text, "--html", page)  # a page may be replaced
    data = re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1]
    (example,) = json.loads(data)["examples"]
    if "answer" in answer:
        label = f"“{answer['answer']}”"
    else:
        tagged = (f"{w} {t}" for w, t in zip(answer["words"], answer["labels"]) if t != "O")
        label = ", ".join(tagged) or "no tags"
    assert example["pruned"]["label"] == label
    kept = [len(layer["alive"]) for layer in example["layers"]]
    assert kept == answer["kept"] and kept[-1] < answer["tokens"]
    assert "relative FLOPs" in run("inspect", "--restore", folder, *text).stdout
    assert "no token is dropped" in run("inspect", "--restore", trained.folder, *text).stdout


def test_texts_that_a_model_cannot_take_are_refused(questions, tags, hard):
    for command in ("predict", "inspect"):
        asked = (command, "--restore", questions.folder)
        assert "asks for --pair" in refused(*asked, "Who?")
        assert "--pair: is empty" in refused(*asked, "Who?", "--pair", " ")
        assert "omit --pair" in refused(command, "--restore", tags.folder, "a text", "--pair", "b")
        assert "TEXT: is empty" in refused(command, "--restore", tags.folder, " ")
    assert "windows of 60 tokens" in refused(*asked, "Who?", "--pair", "Ada wrote it. " * 60)
    assert "one --pair for each TEXT" in run("inspect", "--restore", hard, "a", "b", "--pair", "c", code=2).stderr


def test_options_of_questions_are_refused_elsewhere(tags, demo, tmp_path):
    data = ("--tagging", "--data", tags.source.path)
    assert "--no-answer-threshold" in refused("predict", "--restore", tags.folder, "text", "--no-answer-threshold", 0)
    assert "--predictions" in refused("eval", *data, "--restore", tags.folder, "--predictions", tmp_path / "p.json")
    base = ("--restore", demo / "model", "--output", tmp_path / "y")
    assert "run `finetune` on it first" in refused("soft", *data, *base)
    protect = ("--protect-question", "--restore", tags.folder, "--output", tmp_path / "y")
    assert "--protect-question" in refused("topk", *data, *protect)
    assert "omit --pair-column and --regression" in refused("eval", *data, "--regression", "--restore", tags.folder)
    assert "--task knows its data" in refused("finetune", "--task", "RTE", "--label-column", "x", *base)
    assert not list(tmp_path.iterdir())


def test_the_next_command_has_the_same_data(tags, tmp_path):
    data = ("--data", tags.source.path, "--tagging", "--text-column", "words")
    short = ("--epochs", 0.1, "--output", tmp_path / "y")
    shown = run("finetune", *data, "--restore", tags.folder, *short).stdout
    place = f"--data {tags.source.path} --text-column words --tagging"
    assert shown.splitlines()[-1] == (
        f"Next: python ltp.py soft {place} --target-flops 0.5 --distill {tmp_path / 'y'} --restore {tmp_path / 'y'}"
    )


@pytest.mark.parametrize("kind", ["questions", pytest.param("tags", marks=pytest.mark.slow)])
def test_two_processes_train_and_answer_like_one(kind, request, demo, tmp_path):
    source = request.getfixturevalue(kind).source
    words = ["--data", source.path, *(["--tagging"] if kind == "tags" else ["--task", "SQuAD2"])]
    for processes in (1, 2):
        options = ["--restore", demo / "model", "--max-length", 60, "--bs", 15, "--epochs", 1, "--lr", "5e-5"]
        launch(processes, "finetune", *words, *options, "--output", tmp_path / str(processes))
        record = tmp_path / f"{processes}.json"
        launch(processes, "eval", *words, "--restore", tmp_path / "1", "--json", record)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "12")
    for name in one:
        # A weight that hardly matters has a gradient of little but rounding, and Adam makes a step of it.
        assert_close(one[name], two[name], atol=3e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "12")
    for key in ("metrics", "score", "loss", "relative_flops", "kept"):
        assert one[key] == pytest.approx(two[key], abs=1e-4), key


# ---- pictures, cards and graphs ----


def test_plot_draws_and_refuses(runs, tmp_path):
    for name, arguments in {
        "curves": [runs / "soft"],
        "tradeoff": [runs / "dense", runs / "soft"],
        "lengths": [runs / "answers.jsonl"],
    }.items():
        run("plot", "--output", tmp_path / f"{name}.svg", *arguments)
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
    run("plot", "--output", tmp_path / "kept.PNG", "--kind", "kept", runs / "soft")
    assert (tmp_path / "kept.PNG").read_bytes().startswith(b"\x89PNG")
    assert "ends in .png or .svg" in run("plot", "--output", tmp_path / "p.pdf", runs / "soft", code=2).stderr
    out = ("--output", tmp_path / "p.svg")
    assert "no such file or folder" in refused("plot", *out, tmp_path / "absent")
    assert "pass another --kind" in refused("plot", *out, "--kind", "lengths", runs / "soft")


def test_bench_adds_to_the_card(runs, tmp_path):
    folder = tmp_path / "soft"
    shutil.copytree(runs / "soft", folder)
    bench = ("bench", "--restore", folder, "--lengths", 9, "--examples", 4, "--repeats", 1)
    run(*bench, "--bs", 2)
    assert "Measured speed" not in (folder / "README.md").read_text()
    run(*bench, "--bs", 2, "--card")
    assert (folder / "README.md").read_text().count("## Measured speed") == 1
    (folder / "README.md").write_text("mine")
    assert "has no README.md that training wrote" in refused(*bench, "--card")
    assert (folder / "README.md").read_text() == "mine"


@pytest.mark.parametrize("options, drops", [((), True), (("--dense",), False)])
def test_export_writes_a_graph_with_or_without_pruning(hard, tmp_path, options, drops):
    reading = shutil.copytree(hard, tmp_path / "reading")
    save_model(reading, load_model(hard, read_dropped=True).model)
    result = run("export", "--restore", reading, "--output", tmp_path / "m.onnx", *options)
    assert "m.onnx: inputs input_ids" in result.stdout
    assert drops == ("token_type_ids" in result.stdout)  # the map of dropped tokens, which asks for it, is gone
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [output.name for output in graph.output] == ["logits", "kept"]
    # The mask of the inputs and the first grid take one each, and so does each layer that drops.
    assert drops == (sum(node.op_type == "NonZero" for node in graph.node) > 2)
    assert not any(node.metadata_props for node in graph.node)
    assert "ends in .onnx" in run("export", "--restore", hard, "--output", tmp_path / "m", code=2).stderr
