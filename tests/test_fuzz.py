"""Damaged folders and files, made by chance from a seed: each is refused in one line, or changes nothing.

LTP_FUZZ=1000 runs more of them, LTP_FUZZ_SEED=7 runs others.
"""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_models import small_model

from ltp import main
from support.checkpoint import save_model

COUNT, SEED = int(os.environ.get("LTP_FUZZ", 400)), int(os.environ.get("LTP_FUZZ_SEED", 0))
JUNK = [None, "", "x", -1, 0, 1.5, 10**30, [], {}, [1], {"0": 1}, True, float("nan"), "7", -(10**400)]
# Keys of config.json whose values change no prediction.
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
    """A folder with all that a user has: a model that prunes below thresholds, data files, and texts to predict."""
    folder = tmp_path_factory.mktemp("whole")
    model = small_model(
        vocab_size=600, labels=("negative", "positive"), prune_mode="absolute_threshold", score_norm="length"
    )
    save_model(folder / "model", model)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(demo / "model" / name, folder / "model" / name)
    settings = {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": False, "truncation_side": "right"}
    settings |= {"model_input_names": ["input_ids", "attention_mask"], "extra_special_tokens": ["<mask>"]}
    settings |= {"split_special_tokens": False, "trim_offsets": True, "cls_token": "<s>"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    tokens = {"sep_token": {"content": "</s>", "lstrip": False, "rstrip": False, "normalized": False}}
    (folder / "model" / "special_tokens_map.json").write_text(json.dumps(tokens))
    (folder / "model" / "added_tokens.json").write_text('{"<mask>": 4}')
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
        # Numbers may be meant, and null may be the dense model, or classes without names; nothing else may pass for
        # something that it is not.
        may_change = key in IDLE or type(value) in (int, float) or value is None and key in ("prune_mode", "id2label")
    path.write_text(json.dumps(config))
    return what, may_change


def predictions(folder: Path, output: Path):
    arguments = ["predict", "--restore", folder / "model", "--input", folder / "questions.jsonl", "--output", output]
    return CliRunner().invoke(main, [str(a) for a in arguments])


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def damage(generator: random.Random, folder: Path) -> tuple[str, str, bool]:
    """Damages one file of a copy of `whole`. Returns what was hit, how, and whether predictions may change."""
    model = folder / "model"
    kinds = ["weights"] * 2 + ["config"] * 3 + ["config.json", "tokenizer", "settings"] + ["data"] * 2 + ["questions"]
    kind = generator.choice(kinds)
    if kind == "weights":  # the header: a changed weight is a weight
        path = model / "model.safetensors"
        return kind, damage_bytes(generator, path, 8 + int.from_bytes(path.read_bytes()[:8], "little")), False
    if kind == "config":
        return kind, *damage_config(generator, model / "config.json")
    if kind == "settings":
        name = generator.choice(["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
        return kind, f"{name} {damage_config(generator, model / name)[0]}", True
    files = {
        "config.json": [model / "config.json"],
        "tokenizer": [
            model / name for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
        ],
        "data": [folder / "dev.jsonl", folder / "dev.tsv"],
        "questions": [folder / "questions.jsonl"],
    }
    return kind, damage_bytes(generator, generator.choice(files[kind])), True


def evaluation(folder: Path, data: Path, output: Path):
    return CliRunner().invoke(
        main, [str(a) for a in ("eval", "--restore", folder / "model", "--data", data, "--json", output)]
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def expected(whole, tmp_path_factory) -> str:
    """The predictions of the folder before any damage."""
    output = tmp_path_factory.mktemp("expected") / "answers.jsonl"
    assert predictions(whole, output).exit_code == 0
    return output.read_text()


@pytest.fixture(scope="module")
def outcomes() -> list[bool]:
    """Whether each damaged folder was refused."""
    return []


@pytest.mark.parametrize("number", range(COUNT))
def test_damaged_input(number, whole, expected, outcomes, tmp_path):
    generator = random.Random(f"{SEED} {number}")
    folder, output = tmp_path / "folder", tmp_path / "output"
    shutil.copytree(whole, folder)
    kind, what, may_change = damage(generator, folder)
    before, intact = digests(folder), digests(whole)
    output.write_text("old")
    if kind == "data":
        damaged = next((name for name in ("dev.jsonl", "dev.tsv") if before[name] != intact[name]), "dev.tsv")
        result = evaluation(folder, folder / damaged, output)
    else:
        result = predictions(folder, output)
    outcomes.append(result.exit_code != 0)
    name = f"{kind}, {what}"
    if result.exit_code:
        assert result.exit_code == 2 and isinstance(result.exception, SystemExit), f"{name}: {result.exception!r}"
        assert result.stderr.strip().splitlines()[-1].startswith("Error: "), f"{name}: {result.output}"
        assert output.read_text() == "old", name
    elif not may_change:
        assert output.read_text() == expected, f"{name}: accepted, with another result"
    assert digests(folder) == before, f"{name}: files changed"


def test_damage_is_refused_often(outcomes):
    """The damage must reach what is checked."""
    if len(outcomes) < 60:
        pytest.skip("needs the tests of 60 damaged folders before it")
    assert sum(outcomes) > len(outcomes) / 3
