"""The demo's data, and the demo itself in a size for tests."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_ltp import refused, run

import tools.demo
from support.errors import InputError
from support.process import Process
from tools.demo import ASPECTS, DEMO_CONFIG, FILLER, demo_rows, run_demo, write_demo

ROOT = Path(__file__).parents[2]


def test_the_data_are_made_without_torch():
    script = "import sys, tools.demo; tools.demo.demo_rows(3, 0); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_labels_follow_the_first_line():
    rows = demo_rows(500, seed=3)
    assert rows == demo_rows(500, seed=3) != demo_rows(500, seed=4)
    verdicts = {word: (name, good) for name, words in ASPECTS.items() for good in (0, 1) for word in words[1 - good]}
    seen = set()
    for row in rows:
        line, _, letter = row["text"].partition(" : ")
        about, aspect = line.split()
        told = [verdicts[word] for word in letter.split() if word in verdicts]
        assert [good for name, good in told if name == aspect] == [row["label"] == "positive"]
        assert about == "about" and all(word in verdicts or word in FILLER or word == "." for word in letter.split())
        seen.add((aspect, row["label"]))
    assert len(seen) == 2 * len(ASPECTS) and max(row["text"].count("it was") for row in rows) == 11


def test_the_tokenizer_fits_the_model(tmp_path):
    write_demo(tmp_path, seed=1, train=96, dev=20)
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 96
    assert max(json.loads((tmp_path / "vocab.json").read_text()).values()) < DEMO_CONFIG["vocab_size"]


def test_demo_runs_every_stage(tmp_path, monkeypatch):
    """The command, in a size for tests."""
    evaluations = []
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(tools.demo, "write_demo", lambda folder, seed: write_demo(folder, seed, train=96, dev=20))
    monkeypatch.setattr(tools.demo, "run_demo", lambda *a, **k: evaluations.extend(run_demo(*a, **k)) or evaluations)
    folder = tmp_path / "demo"
    result = run("demo", "--output", folder, "--seed", 1)
    names = ["finetune", "soft", "hard", "topk", "manual"]
    assert [stage for stage, _ in evaluations] == names
    assert all(0 < record["relative_flops"] <= 1 and record["speedup"]["128"] > 0 for _, record in evaluations)
    commands = [line for line in result.stderr.splitlines() if line.startswith("$")]
    assert [command.split()[3] for command in commands] == names and commands[1] == (
        f"$ python ltp.py soft --data {folder / 'data'} --restore {folder / 'finetune'} --output {folder / 'soft'} "
        "--batch-size 16 --lr 0.0005 --target-flops 0.2 --epochs 0.5 --seed 1"
    )
    kept = ",".join(str(round(share, 3)) for share in dict(evaluations)["hard"]["kept"])
    assert commands[3].endswith(f" --epochs 2.0 --seed 1 --keep-rates {kept}")
    for words in (
        *names,
        "speed at 128",
        " ± 0.",
        "One example",
        f"{folder / 'index.html'}",
        "python ltp.py finetune --task MRPC",
    ):
        assert words in result.stdout, words
    text = (folder / "index.html").read_text()
    assert text.count("<svg") == 2 and not re.search("(src|href)=.(http|file|/)", text)
    assert all(f"<td>{name}</td>" in text for name in names) and "<iframe srcdoc=" in text
    assert refused("demo", "--output", folder).endswith("is not empty; choose another or pass --overwrite")
    assert "holds something else than a demo" in refused("demo", "--output", tmp_path, "--overwrite")
    with pytest.raises(InputError, match="start it without torchrun"):
        run_demo(tmp_path / "new", 1, False, Process(world=2), print, print)
