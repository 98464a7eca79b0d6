"""Damaged folders and files, made by chance from a seed: every one is refused in a line, or changes nothing.

Run more of them with LTP_FUZZ=1000, others with LTP_FUZZ_SEED=7.
"""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import small_model

from ltp import main
from model import save_model

COUNT, SEED = int(os.environ.get("LTP_FUZZ", 240)), int(os.environ.get("LTP_FUZZ_SEED", 0))
JUNK = [None, "", "x", -1, 0, 1.5, 10**30, [], {}, [1], {"0": 1}, True, float("nan"), "7", -(10**400)]
# Keys of config.json that no result depends on, whatever they hold.
IDLE = {
    "initializer_range",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "architectures",
    "label2id",
    "max_seq_length",
    "token_keep_rate",
    "type_vocab_size",
    "problem_type",
    "pad_token_id",
}


@pytest.fixture(scope="module")
def whole(demo, tmp_path_factory) -> Path:
    """A folder with everything a user has: a hard-pruning model, a data file, and questions to predict."""
    folder = tmp_path_factory.mktemp("whole")
    model = small_model(
        vocab_size=600, labels=("negative", "positive"), prune_mode="absolute_threshold", score_norm="length"
    )
    save_model(folder / "model", model)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(demo / "model" / name, folder / "model" / name)
    lines = (demo / "data" / "dev.jsonl").read_text().splitlines()[:12]
    (folder / "dev.jsonl").write_text("\n".join(lines) + "\n")
    rows = [json.loads(line) for line in lines]
    (folder / "dev.tsv").write_text("text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in rows))
    (folder / "questions.jsonl").write_text("".join(json.dumps({"text": r["text"]}) + "\n" for r in rows[:4]))
    return folder


def damage_bytes(generator: random.Random, path: Path, reach: int | None = None) -> str:
    """Cuts, empties, garbles or overwrites a piece of a file, within its first `reach` bytes."""
    content = bytearray(path.read_bytes())
    end = min(len(content), reach or len(content))
    kind = generator.choice(["cut", "empty", "flip", "zeros", "noise", "insert"])
    place = generator.randrange(end)
    if kind == "cut":
        content = content[:place]
    elif kind == "empty":
        content = bytearray()
    elif kind == "flip":
        content[place] ^= 1 << generator.randrange(8)
    elif kind == "zeros":
        content[place : place + 9] = bytes(min(9, end - place))
    elif kind == "noise":
        content[place : place + 5] = generator.randbytes(min(5, end - place))
    else:
        content[place:place] = generator.randbytes(3)
    path.write_bytes(content)
    return f"{kind} at {place}"


def damage_config(generator: random.Random, path: Path) -> tuple[str, bool]:
    """Deletes a key of config.json or gives it a value of a wrong kind; tells whether that may change results."""
    config = json.loads(path.read_text())
    key = generator.choice(sorted(config))
    if generator.random() < 0.3:
        del config[key]
        what, may_change = f"without {key}", True  # a default takes its place
    else:
        value = generator.choice(JUNK)
        config[key] = value
        what = f"{key} = {str(value)[:20]}"
        # Numbers may be meant, and null is the dense model; nothing else may pass for something it is not.
        may_change = key in IDLE or type(value) in (int, float) or key == "prune_mode" and value is None
    path.write_text(json.dumps(config))
    return what, may_change


def predictions(folder: Path, output: Path):
    arguments = ["predict", "--restore", folder / "model", "--input", folder / "questions.jsonl", "--output", output]
    return CliRunner().invoke(main, [str(a) for a in arguments])


def digest(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def test_damaged_inputs(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert predictions(whole, tmp_path / "expected.jsonl").exit_code == 0
    expected = (tmp_path / "expected.jsonl").read_text()
    generator = random.Random(SEED)
    refused = 0
    for number in range(COUNT):
        folder = tmp_path / f"{number}"
        shutil.copytree(whole, folder)
        target = generator.choice(
            [
                "weights",
                "weights",
                "config",
                "config",
                "config",
                "config.json",
                "tokenizer",
                "data",
                "data",
                "questions",
            ]
        )
        may_change = True
        if target == "weights":  # the header: a changed weight is a weight
            path = folder / "model" / "model.safetensors"
            what = damage_bytes(generator, path, 8 + int.from_bytes(path.read_bytes()[:8], "little"))
            may_change = False
        elif target == "config":
            what, may_change = damage_config(generator, folder / "model" / "config.json")
        elif target == "config.json":
            what = damage_bytes(generator, folder / "model" / "config.json")
        elif target == "tokenizer":
            what = damage_bytes(generator, folder / "model" / generator.choice(["vocab.json", "merges.txt"]))
        elif target == "data":
            what = damage_bytes(generator, folder / generator.choice(["dev.jsonl", "dev.tsv"]))
        else:
            what = damage_bytes(generator, folder / "questions.jsonl")
        name = f"number {number}: {target}, {what}"
        before, old = digest(folder), folder.parent / f"{number}.jsonl"
        old.write_text("old")
        if target == "data":
            changed = (
                next(p for p in ("dev.jsonl", "dev.tsv") if before[p] != digest(whole)[p])
                if before != digest(whole)
                else "dev.tsv"
            )
            arguments = ["eval", "--restore", folder / "model", "--data", folder / changed, "--json", old]
            result = CliRunner().invoke(main, [str(a) for a in arguments])
        else:
            result = predictions(folder, old)
        if result.exit_code:
            refused += 1
            assert result.exit_code == 2 and isinstance(result.exception, SystemExit), f"{name}: {result.exception!r}"
            assert result.stderr.strip().splitlines()[-1].startswith("Error: "), f"{name}: {result.output}"
            assert old.read_text() == "old", name
        elif not may_change:
            assert old.read_text() == expected, f"{name}: accepted, with another result"
        assert digest(folder) == before, f"{name}: files changed"
        shutil.rmtree(folder)
    assert refused > COUNT / 3
