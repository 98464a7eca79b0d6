"""README.md and docs/: their links lead somewhere, their commands exist, and the workflow runs with small models."""

import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from ltp import main
from model import Config, Model
from support.checkpoint import save_model
from tools.demo import demo_rows

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
page_of = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def commands(text: str) -> list[list[str]]:
    """The arguments of each call of python and torchrun in a page's bash blocks, as bash reads them."""
    show = r'{ printf "%s\n" "$@" ""; }'
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.S))
    blocks = re.sub(r" [<>] \S+", "", blocks)
    script = f"M=MODEL\npython() {show}\ntorchrun() {show}\nruff() {{ :; }}\n{blocks}"
    output = subprocess.run([shutil.which("bash"), "-euc", script], env={"PATH": ""}, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    return [call.split("\n") for call in output.stdout.strip().split("\n\n")] if output.stdout else []


def anchor(heading: str) -> str:
    """The name by which GitHub links to a heading."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


@page_of
def test_links_lead_somewhere(page):
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|md|txt))`", page.read_text()):
        assert (ROOT / name).is_file(), name
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not re.match("https?:", link):
            name, _, part = link.partition("#")
            target = (page.parent / name) if name else page
            assert target.exists(), link
            assert not part or part in map(anchor, re.findall(r"^#+ (.*)", target.read_text(), flags=re.M)), link


@page_of
def test_commands_and_their_options_exist(page):
    for arguments in commands(page.read_text()):
        script = next((name for name in arguments if name.endswith(".py")), None)
        assert script is None or (ROOT / script).is_file(), script
        if script == "ltp.py":
            name, *options = arguments[arguments.index(script) + 1 :]
            assert name in main.commands, name
            command = main.commands[name]
            context = click.Context(command, parent=click.Context(main, **main.context_settings))
            command.make_parser(context).parse_args(options)  # raises for an option that is not there


def test_no_sentence_is_written_twice():
    sentences = Counter()
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for paragraph in re.split(r"\n\n|\n- ", text):
            flat = " ".join(paragraph.split())
            sentences.update(s for s in re.split(r"(?<=[.!?:]) ", flat) if len(s.split()) >= 9)
    assert [sentence for sentence, count in sentences.items() if count > 1] == []


@pytest.fixture
def shop(demo, tmp_path, monkeypatch) -> Path:
    """The current folder, with the files that the pages' commands read."""
    monkeypatch.chdir(tmp_path)
    sizes = dict(vocab_size=600, hidden_size=16, num_hidden_layers=6, num_attention_heads=2, intermediate_size=32)
    save_model(Path("roberta-base"), Model(Config(**sizes, max_position_embeddings=130, type_vocab_size=1)))
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(demo / "model" / name, "roberta-base")
    rows = {split: demo_rows(count, seed) for split, count, seed in (("train", 96, 0), ("dev", 24, 1))}
    Path("glue").mkdir()
    for split, split_rows in rows.items():
        lines = [f"{int(row['label'] == 'positive')}\t1\t2\t{row['text']}\ta table" for row in split_rows]
        Path(f"glue/{split}.tsv").write_text("\n".join(["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *lines]) + "\n")
        columns = ["body,stars", *(f"{row['text']},{row['label']}" for row in split_rows)]
        Path("reviews.csv" if split == "train" else "reviews-dev.csv").write_text("\n".join(columns) + "\n")
    lines = [json.dumps({"text": row["text"], "pair": "a table"}) for row in rows["dev"]]
    Path("texts.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def small(name: str, options: list[str]) -> list[str]:
    """The same command, with the shop's data, half an epoch, and the page's name of the checkpoint as its output."""
    if "MRPC" in options and "--data" not in options:
        options = [*options, "--data", "glue"]
    if name in ("finetune", "soft", "hard", "topk", "manual", "sweep"):
        options = [*options, "--epochs", "0.5", *(["--adapt-epochs", "0.5"] if name == "sweep" else ["--overwrite"])]
        if "--output" not in options:
            stage = {"finetune": ""}.get(name, f"_{name}") if "MRPC" in options else "_own"
            options += ["--output", f"CKPT{stage}"]
    return options


@pytest.mark.parametrize("page", ["README.md", pytest.param("docs/workflow.md", marks=pytest.mark.slow)])
def test_the_workflow_runs(page, shop, questions):
    """The page's training commands and what follows them, one after the other, with a tiny model."""
    text = (ROOT / page).read_text()
    text = (
        text[text.index("# The workflow") :].replace("CKPT_SQuAD", str(questions.folder)).replace("CKPT_MRPC", "CKPT")
    )
    text = text.replace("demo/finetune", "CKPT").replace("demo/data/dev.jsonl", "texts.jsonl")
    text = re.sub("demo/(soft|hard|topk|manual)", r"CKPT_\1", text)
    for arguments in commands(text):
        if arguments[0] == "ltp.py":
            name, *options = arguments[1:]
            outcome = CliRunner().invoke(main, [name, *small(name, options)], catch_exceptions=False)
            assert outcome.exit_code == 0, (arguments, outcome.output)
