"""Several processes on this machine, started as users start them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent


def launch(processes: int, *args, code: int = 0) -> subprocess.CompletedProcess:
    """Runs ltp.py with torchrun (or alone) on one thread a process."""
    start = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        if processes > 1
        else [sys.executable]
    )
    result = subprocess.run(
        [*start, str(ROOT / "ltp.py"), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture(scope="module")
def finetuned(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    launch(
        1,
        "finetune",
        "--data",
        demo / "data",
        "--restore",
        demo / "model",
        "--lr",
        "1e-3",
        "--epochs",
        1,
        "--output",
        folder / "f",
    )
    return folder / "f"


@pytest.mark.parametrize(
    "stage", ["soft", "manual", *(pytest.param(s, marks=pytest.mark.slow) for s in ("finetune", "topk"))]
)
def test_two_processes_train_like_one(demo, finetuned, tmp_path, stage):
    for processes in (1, 2):
        launch(
            processes,
            stage,
            "--data",
            demo / "data",
            "--restore",
            finetuned,
            *(("--distill", finetuned) if stage != "finetune" else ()),
            "--lr",
            "5e-5",
            "--bs",
            15,
            "--epochs",
            2,
            "--accumulate",
            2,
            "--no-load",
            "--output",
            tmp_path / str(processes),
        )
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "12")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0, msg=lambda m: f"{name}: {m}")
    logs = [[json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in "12"]
    for a, b in zip(*(log[1:-1] for log in logs)):  # between start and end
        assert a["metrics"] == b["metrics"] and a["kept"] == pytest.approx(b["kept"], abs=2e-3)
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)


def test_two_processes_sweep(demo, finetuned, tmp_path):
    """A stage reads the folder of the one before it, which the other process writes."""
    data, out = ("--data", demo / "data", "--restore", finetuned), tmp_path / "sweep"
    short = ("--epochs", 0.2, "--adapt-epochs", 2, "--lr", "1e-3", "--no-speed")
    launch(2, "sweep", *data, *short, "--method", "ltp", "--target-flops", 0.5, "--output", out)
    row = json.loads((out / "results.jsonl").read_text().splitlines()[1])
    *_, last = (json.loads(line) for line in (Path(row["folder"]) / "log.jsonl").read_text().splitlines())
    assert row["metrics"] == last["best"]["metrics"]


def test_three_processes_evaluate_like_one(demo, finetuned, tmp_path):
    for processes in (1, 3):
        launch(
            processes, "eval", "--data", demo / "data", "--restore", finetuned, "--json", tmp_path / f"{processes}.json"
        )
    answered = launch(3, "predict", "--restore", finetuned, "a road was excellent .").stdout
    assert answered.count("logits") == 1
    one, three = (json.loads((tmp_path / f"{n}.json").read_text()) for n in "13")
    for key in ("metrics", "score", "examples", "relative_flops", "kept"):
        assert one[key] == three[key]


def test_one_process_of_two_inspects_and_measures(finetuned, tmp_path):
    shown = launch(2, "inspect", "--restore", finetuned, "a road was excellent .").stdout
    assert shown.count("no token is dropped") == 1
    file = tmp_path / "speed.json"
    options = ("--lengths", "5,9", "--examples", 6, "--repeats", 1, "--bs", 2, "--json", file)
    assert launch(2, "bench", "--restore", finetuned, *options).stdout.count("FLOPs into time") == 1
    assert [speed["batch_size"] for speed in json.loads(file.read_text())["speeds"]] == [2]


def test_the_error_of_one_process_ends_all(finetuned, tmp_path):
    """The second of two processes answers the second line, and fails while the first waits for its answers."""
    (tmp_path / "in.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    (tmp_path / "out.jsonl").write_text("old")
    files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    message = launch(2, "predict", "--restore", finetuned, *files, code=1).stderr
    assert "line 2: text and text_pair must be strings" in message and "RuntimeError" not in message
    assert (tmp_path / "out.jsonl").read_text() == "old" and len(list(tmp_path.iterdir())) == 2
