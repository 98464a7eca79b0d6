"""The command line: the whole pipeline, the authors' spellings, help, and one clear line for bad input."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_models import random_sequences, small_model

from ltp import main
from support.checkpoint import load_model, save_model
from support.files import write_file
from support.settings import soft_target

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def run(*args, code: int = 0):
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def refused(*args) -> str:
    """Runs a command that must fail: exit code 2, one line, no traceback; returns the line."""
    result = run(*args, code=2)
    assert "Traceback" not in result.output and isinstance(result.exception, SystemExit)
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("Error: ")
    return line


@pytest.fixture(scope="module")
def runs(demo, tmp_path_factory):
    """The pipeline with the authors' spellings: finetune, soft, hard."""
    folder = tmp_path_factory.mktemp("cli")
    common = ("--data", demo / "data", "--bs", 16)
    run(
        "finetune", *common, "--restore", demo / "model", "--lr", "1e-3", "--epochs", 1, "--output", folder / "finetune"
    )
    run(
        "soft",
        *common,
        "--restore",
        folder / "finetune",
        "--lr",
        "2e-4",
        "--temperature",
        "1e-3",
        "--lambda",
        0.15,
        "--weight_decay",
        0,
        "--epoch",
        1,
        "--save_step",
        5,
        "--no_load",
        "--lr_threshold",
        "1e-3",
        "--output",
        folder / "soft",
    )
    run("hard", *common, "--restore", folder / "soft", "--lr", "1e-4", "--epoch", 1)
    return folder


def test_the_authors_pipeline(runs, demo):
    hard = runs / "soft" / "hard" / "lr_0.0001"
    assert load_model(hard).model.config.prune_mode == "absolute_threshold"
    start = json.loads((runs / "soft" / "log.jsonl").read_text().splitlines()[0])
    assert start["settings"]["regularization"] == 0.15 and start["settings"]["load_best"] is False
    for stage in ("topk", "manual"):
        run(stage, "--data", demo / "data", "--restore", runs / "finetune", "--lr", "1e-4", "--epoch", 0.5)
    assert load_model(runs / "finetune/topk/lr_0.0001").model.config.prune_mode == "topk"
    assert load_model(runs / "finetune/manual/lr_0.0001").model.config.prune_mode == "absolute_threshold"


def test_a_target_brings_its_defaults_and_what_is_given_stands(runs, demo, tmp_path):
    options = ("--data", demo / "data", "--bs", 16, "--epochs", 0.2, "--target-flops", 0.6, "--temperature", "3e-3")
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "bright"}\n')
    teacher = ("--distill", runs / "finetune", "--distill-data", texts)
    told = run("soft", *options, *teacher, "--restore", runs / "finetune", "--output", tmp_path / "soft").output
    following = next(line for line in told.splitlines() if line.startswith("Next: "))
    assert f"--distill {runs / 'finetune'} --distill-data {texts} --restore {tmp_path / 'soft'}" in following
    assert "--target-flops 0.6" in following
    start = json.loads((tmp_path / "soft" / "log.jsonl").read_text().splitlines()[0])
    expected = soft_target(128) | {"temperature": 3e-3}
    assert {name: start["settings"][name] for name in expected} == expected and expected["mask_attention"] is True
    assert start["settings"]["target_flops"] == 0.6 and start["distill"] == str(runs / "finetune")
    # Scores that are divided by the text's own length do not know the maximum.
    norm = (
        "--score-norm",
        "length",
        "--max-length",
        64,
        "--restore",
        runs / "finetune",
        "--output",
        tmp_path / "length",
    )
    run("soft", *options[:-2], "--mask-output", *norm)
    start = json.loads((tmp_path / "length" / "log.jsonl").read_text().splitlines()[0])
    expected = soft_target(64, "length") | {"mask_attention": False}
    assert {name: start["settings"][name] for name in expected} == expected != soft_target(64)
    assert "finds λ by itself" in refused("soft", *options, "--lambda", 0.1, "--restore", runs / "finetune")
    plain = ("--data", demo / "data", "--target-flops", 0.6, "--threshold", 0.01, "--restore", runs / "finetune")
    for stage in ("soft", "manual"):
        assert "pass it or --threshold" in refused(stage, *plain)
    rate = ("--token-keep-rate", 0.5, "--restore", runs / "finetune")
    assert "pass it or --token-keep-rate" in refused("topk", *options[:-2], *rate)
    assert "--distill nowhere: no such" in refused("soft", *options, "--distill", "nowhere", "--restore", runs / "soft")


def test_eval_prints_and_writes(runs, demo, tmp_path):
    result = run("eval", "--data", demo / "data", "--restore", runs / "soft", "--json", tmp_path / "r.json")
    record = json.loads((tmp_path / "r.json").read_text())
    assert set(record) >= {
        "task",
        "metrics",
        "score",
        "examples",
        "gflops",
        "dense_gflops",
        "relative_flops",
        "relative_bops",
        "kept",
        "seconds",
        "examples_per_second",
    }
    assert record["examples"] == 41 and 0 < record["relative_flops"] < 1 and len(record["kept"]) == 4
    assert f"{record['relative_flops']:.3f}" in result.output and "kept after each layer" in result.output
    run(
        "eval",
        "--data",
        demo / "data" / "dev.jsonl",
        "--restore",
        runs / "soft",
        "--dense",
        "--json",
        tmp_path / "r.json",
    )
    dense = json.loads((tmp_path / "r.json").read_text())
    assert dense["relative_flops"] == 1.0 and dense["examples"] == 41
    logged = json.loads((runs / "soft" / "log.jsonl").read_text().splitlines()[-2])
    assert logged["metrics"] == record["metrics"] and logged["relative_flops"] == pytest.approx(
        record["relative_flops"]
    )


def test_bench_measures_and_writes(runs, demo, tmp_path):
    result = run(
        "bench",
        "--restore",
        runs / "soft",
        "--data",
        demo / "data",
        "--examples",
        20,
        "--repeats",
        2,
        "--bs",
        1,
        "--bs",
        8,
        "--json",
        tmp_path / "b.json",
    )
    record = json.loads((tmp_path / "b.json").read_text())
    assert [s["batch_size"] for s in record["speeds"]] == [1, 8] and record["conditions"]["examples"] == 20
    assert "FLOPs into time" in result.output and record["conditions"]["peak_memory_bytes"] > 2**20
    run("bench", "--restore", runs / "soft", "--lengths", "5,9", "--examples", 6, "--repeats", 1)
    assert "positions for 128 tokens" in refused("bench", "--restore", runs / "soft", "--lengths", "5000")
    run("bench", "--restore", runs / "soft", code=2)
    run("bench", "--restore", runs / "soft", "--lengths", "a", code=2)


def test_predict_is_in_input_order_whatever_the_batch_size(runs, demo, tmp_path):
    rows = [json.loads(line) for line in (demo / "data" / "dev.jsonl").read_text().splitlines()]
    rows[3] = {"text": ""}
    rows[4] = {"text": "one", "text_pair": "two"}
    rows[5] = {"token_ids": [0, 7, 9, 2]}
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    answers = {}
    for size in (1, 64):
        run(
            "predict",
            "--restore",
            runs / "soft",
            "--input",
            source,
            "--output",
            tmp_path / f"{size}.jsonl",
            "--batch-size",
            size,
        )
        answers[size] = [json.loads(line) for line in (tmp_path / f"{size}.jsonl").read_text().splitlines()]
    assert len(answers[1]) == len(answers[64]) == 41
    for one, many in zip(answers[1], answers[64]):
        assert (
            one["label"] == many["label"]
            and one["tokens"] == many["tokens"] >= one["kept"][0]
            and one["kept"] == many["kept"]
            and len(one["kept"]) == 4
        )
        assert one["logits"] == pytest.approx(many["logits"], abs=1e-5)
    single = json.loads(run("predict", "--restore", runs / "soft", rows[0]["text"]).stdout)
    assert single["logits"] == pytest.approx(answers[1][0]["logits"], abs=1e-5)
    for output in ((), ("--output", "-")):
        assert run("predict", "--restore", runs / "soft", "--input", source, *output).stdout.count("\n") == 41


def test_golden_style_folder_without_tokenizer(tmp_path):
    save_model(tmp_path / "m", small_model(prune_mode="topk"))
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"token_ids": s}) for s in random_sequences(5)))
    run("predict", "--restore", tmp_path / "m", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "holds no lines" in refused(
        "predict", "--restore", tmp_path / "m", "--input", tmp_path / "empty.jsonl", "--output", tmp_path / "out.jsonl"
    )
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 5


def test_bad_input_is_one_line(runs, demo, tmp_path):
    data, model = ("--data", demo / "data"), ("--restore", demo / "model")
    assert "--distill-weight goes with --distill" in refused("soft", *data, *model, "--distill-weight", 0.9)
    assert "--max-length is for texts" in refused("bench", *model, "--lengths", 9, "--max-length", 5)
    assert "--text-column is for texts" in refused("bench", *model, "--lengths", 9, "--text-column", "body")
    assert "expected at most 1e6" in refused("finetune", *data, *model, "--epochs", "1e308")
    assert "no such model folder" in refused("finetune", *data, "--restore", tmp_path / "nowhere/deeper/x")
    (tmp_path / "empty").mkdir()
    assert "config.json: not found" in refused("eval", *data, "--restore", tmp_path / "empty")
    assert "--task XYZ: unknown" in refused("finetune", "--task", "XYZ", *model)
    assert "pass --task NAME for GLUE, or --data PATH" in refused("finetune", *model)
    assert "no such file or folder" in refused("finetune", *model, "--data", tmp_path / "absent")
    assert "holds no train.tsv" in refused("finetune", *model, "--data", tmp_path / "empty")
    assert "run `soft` first" in refused("hard", *data, "--restore", runs / "finetune")
    assert "already holds a run" in refused("soft", *data, "--restore", runs / "finetune", "--output", runs / "soft")
    assert "--dev-data" in refused("finetune", *model, "--data", demo / "data" / "dev.jsonl")
    assert "leaves no room for text" in refused("eval", *data, "--restore", runs / "soft", "--max-length", 2)
    before = (runs / "soft" / "model.safetensors").read_bytes()
    refused(
        "soft", "--data", tmp_path / "empty", "--restore", runs / "finetune", "--output", runs / "soft", "--overwrite"
    )
    assert "is the checkpoint to start from" in refused(
        "soft", *data, "--restore", runs / "soft", "--output", runs / "soft", "--overwrite"
    )
    taught = ("--distill", runs / "soft", "--output", runs / "soft", "--overwrite")
    assert "or the teacher; choose another" in refused("soft", *data, "--restore", runs / "finetune", *taught)
    assert (runs / "soft" / "model.safetensors").read_bytes() == before
    assert "`hard` keeps it" in refused("hard", *data, "--restore", runs / "soft", "--max-length", 20)
    assert "expected at most 2147483648" in refused("finetune", *data, *model, "--seed", 10**20)
    assert "no column 'words'" in refused(
        "finetune", *data, *model, "--text-column", "words", "--output", tmp_path / "o"
    )
    assert "classification head" in refused("eval", *data, "--restore", headless(demo, tmp_path))
    assert "has 2 outputs, but MNLI needs 3" in refused(
        "eval", "--task", "MNLI", "--data", tmp_path, "--restore", runs / "soft"
    )
    assert "device" in refused("eval", *data, "--restore", runs / "soft", "--device", "toaster")
    assert not (tmp_path / "o").exists()


def headless(demo, tmp_path) -> Path:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "headless"
    folder.mkdir()
    for name in ("config.json", "vocab.json", "merges.txt"):
        (folder / name).write_bytes((demo / "model" / name).read_bytes())
    tensors = {
        k: v for k, v in load_file(demo / "model" / "model.safetensors").items() if not k.startswith("classifier")
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_no_output_replaces_the_data(runs, demo, tmp_path):
    shutil.copytree(demo / "data", tmp_path / "data")
    shutil.copy(demo / "data" / "dev.jsonl", tmp_path / "other.jsonl")
    (tmp_path / "glue" / "RTE").mkdir(parents=True)
    shutil.copy(demo / "data" / "dev.jsonl", tmp_path / "glue" / "RTE" / "validation.jsonl")
    for options, file in (
        (("--data", tmp_path / "data"), "data/train.jsonl"),
        (("--data", tmp_path / "data"), "data/dev.jsonl"),
        (("--data", tmp_path / "data", "--dev-data", tmp_path / "other.jsonl"), "other.jsonl"),
        (("--task", "RTE", "--data", tmp_path / "glue"), "glue/RTE/validation.jsonl"),
    ):
        for command in ("eval", "bench"):
            words = (*options, "--restore", runs / "soft", "--json", tmp_path / file)
            assert "is one of the data; choose another file" in refused(command, *words)
        assert "text" in (tmp_path / file).read_text()
    words = ("--task", "SQuAD", "--data", tmp_path, "--restore", runs / "soft", "--nbest", "x", "--predictions", "x")
    assert "--nbest x: is that of --predictions, too" in refused("eval", *words)
    (tmp_path / "notes").write_text("mine")
    assert "exists and is no page" in refused("inspect", "--restore", runs / "soft", "--html", tmp_path / "notes", "a")
    assert (tmp_path / "notes").read_text() == "mine"


def test_output_goes_through_links_and_into_pipes(runs, demo, tmp_path):
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").write_text("old")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("link", "pipe"):
        run("eval", "--data", demo / "data", "--restore", runs / "soft", "--json", tmp_path / name)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "pipe").is_fifo()
    told = (tmp_path / "file").read_text(), os.read(reader, 2**16).decode()
    os.close(reader)
    assert len({json.loads(text)["score"] for text in told}) == 1 and len(list(tmp_path.iterdir())) == 3
    # Replacing the file that the shell sends the output to would lose what is there; others below /dev are files.
    log = tmp_path / "log"
    for name in ("/dev/stdout", log):
        command = f"{sys.executable} ltp.py eval --data {demo / 'data'} --restore {runs / 'soft'} --json {name}"
        result = subprocess.run(
            f"echo old > {log}; {command} >> {log}", shell=True, cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 2 and f"{name}: is the file that this program's output goes to" in result.stderr
        assert log.read_text().startswith("old\n")
    if Path("/dev/shm").is_dir():
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            for text in ("one", "two"):
                write_file(Path(folder, "file"), lambda path, text=text: path.write_text(text))
            assert Path(folder, "file").read_text() == "two"


def test_a_cut_prediction_is_counted(runs):
    result = run("predict", "--restore", runs / "soft", "the road " * 200)
    assert "1 text longer than 128 tokens was cut" in result.stderr
