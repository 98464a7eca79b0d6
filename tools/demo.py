"""The demo: made-up reviews, a tokenizer and a model of their own, and every stage run as its command would.

The module imports little, so that the data can be made without torch.
"""

from __future__ import annotations

import html
import io
import json
import random
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.errors import InputError
from support.settings import MAX_SEQ_LENGTH, STAGES, PruningOptions, Settings, flag, soft_target

if TYPE_CHECKING:
    from support.process import Process

# ----------------------------------------------------------------------------------------------------------------------
# Data: reviews in which a few words matter, and the first words say which

# Each aspect with its words of praise and of blame.
ASPECTS = {
    "food": ("delicious tasty fresh".split(), "bland greasy stale".split()),
    "service": ("friendly polite attentive".split(), "rude slow careless".split()),
    "rooms": ("spacious cosy bright".split(), "cramped dusty damp".split()),
}
PEOPLE = "we they people friends children".split()
VERBS = "came went walked stood looked waited drove sat".split()
PREPOSITIONS = "near behind under over before after".split()
PLACES = "river street market station bridge window corner tower".split()
FILLER = ["it", "was", "the", *PEOPLE, *VERBS, *PREPOSITIONS, *PLACES]


def demo_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Synthetic reviews. The label is the verdict on the aspect that the review begins with ("about food").

    Verdicts on other aspects, 0 to 10, look the same: which word matters depends on the first words.
    """
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        aspect, *others = generator.sample(list(ASPECTS), len(ASPECTS))
        positive = generator.random() < 0.5
        verdicts = [(aspect, positive)]
        for _ in range(generator.choice((0, 0, 1, 1, 2, 3, 6, 10))):
            verdicts.append((generator.choice(others), generator.random() < 0.5))
        sentences = [f"it was {generator.choice(ASPECTS[name][0 if good else 1])} ." for name, good in verdicts]
        for _ in range(generator.choice((1, 1, 2, 3, 4, 6, 9))):
            people, verb, preposition, place = map(generator.choice, (PEOPLE, VERBS, PREPOSITIONS, PLACES))
            sentences.append(f"{people} {verb} {preposition} the {place} .")
        generator.shuffle(sentences)
        text = " ".join([f"about {aspect} :", *sentences])
        rows.append({"text": text, "label": "positive" if positive else "negative"})
    return rows


def write_demo(folder: Path, seed: int, train: int = 4000, dev: int = 1000) -> None:
    """Writes train.jsonl and dev.jsonl, and a tokenizer trained on them (vocab.json, merges.txt)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    for name, count, offset in (("train", train, 0), ("dev", dev, 1)):
        lines = [json.dumps(row) + "\n" for row in demo_rows(count, 2 * seed + offset)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=DEMO_CONFIG["vocab_size"],
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator((row["text"] for row in demo_rows(train, 2 * seed)), trainer)
    backend.model.save(str(folder))


# ----------------------------------------------------------------------------------------------------------------------
# Model and stages

DEMO_CONFIG = dict(
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=256,
    max_position_embeddings=MAX_SEQ_LENGTH + 2,
    vocab_size=600,
    type_vocab_size=1,
    layer_norm_eps=1e-5,
    initializer_range=0.08,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    labels=("negative", "positive"),
)
BUDGET = {"learning_rate": 5e-4, "target_flops": 0.2}
# Each stage, the one whose checkpoint it starts from, and its settings. From the same dense model, soft and hard
# together train for as many epochs as either baseline. Top-k keeps as many tokens in each layer as hard.
PLAN: tuple[tuple[str, str, dict[str, float]], ...] = (
    ("finetune", "untrained", {"learning_rate": 1e-3, "epochs": 4.0}),
    ("soft", "finetune", BUDGET | {"epochs": 0.5}),
    ("hard", "soft", BUDGET | {"epochs": 1.5}),
    ("topk", "finetune", {"learning_rate": 5e-4, "epochs": 2.0}),
    ("manual", "finetune", BUDGET | {"epochs": 2.0}),
)
BATCH_SIZE = 16
SPEED_BATCH = 128  # speed is measured at this batch size


def run_demo(
    folder: Path, seed: int, overwrite: bool, process: Process, show: Callable, progress: Callable
) -> list[tuple[str, dict[str, Any]]]:
    """Makes data, tokenizer and an untrained model, and runs every stage on them as the commands would.

    Returns each stage's name and evaluation, with the measured "speedup". Raises: InputError.
    """
    from runs.stage import StageRequest, run_stage
    from tasks import own_task
    from tasks.base import Source

    if process.world > 1:
        raise InputError("the demo runs in one process; start it without torchrun")
    check_folder(folder, overwrite)
    data = folder / "data"
    make_start(folder / "untrained", data, seed)
    source = Source(own_task(None, None, None, regression=False), data)
    results: dict[str, dict[str, Any]] = {}
    for stage, restore, changes in PLAN:
        changes = {"batch_size": BATCH_SIZE, **changes, "seed": seed}
        defaults = soft_target(MAX_SEQ_LENGTH) if stage == "soft" else {}
        settings = Settings(**(STAGES[stage] | defaults | changes))
        options = [word for name, value in changes.items() for word in (flag(name), str(value))]
        pruning = PruningOptions()
        if stage == "topk":
            pruning.keep_rates = [round(share, 3) for share in results["hard"]["kept"]]
            options += ["--keep-rates", ",".join(map(str, pruning.keep_rates))]
        start, output = folder / restore, folder / stage
        paths = ["--data", str(data), "--restore", str(start), "--output", str(output)]
        show(f"\n$ {shlex.join(['python', 'ltp.py', stage, *paths, *options])}")
        request = StageRequest(stage, start, source, settings, pruning, output, overwrite)
        _, result = run_stage(request, process, show=show, progress=progress)
        results[stage] = dict(result.best)
    rows = list(results.items())
    add_speed(rows, folder, source, process=process)
    return rows


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raises InputError for a folder that is not empty, unless it holds a demo that may be replaced."""
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        if not overwrite:
            raise InputError(f"--output {folder}: is not empty; choose another or pass --overwrite")
        if not (folder / "untrained" / "config.json").is_file():
            raise InputError(f"--output {folder}: holds something else than a demo; choose another")


def make_start(folder: Path, data: Path, seed: int) -> None:
    """Writes the data, and an untrained model with its tokenizer to `folder`."""
    from model import Config, Model, initialize
    from support.checkpoint import save_model

    write_demo(data, seed)
    model = Model(Config(**DEMO_CONFIG))
    initialize(model, model.config.initializer_range)
    save_model(folder, model)
    for name in ("vocab.json", "merges.txt"):
        (data / name).replace(folder / name)


def add_speed(rows: list[tuple[str, dict[str, Any]]], folder: Path, source: Any, process: Process) -> None:
    """Measures each stage's checkpoint on the evaluation set, beside itself without pruning."""
    from data import sorted_batches
    from support.checkpoint import load_model
    from support.devices import for_inference
    from tasks.tokenizer import Tokenizer
    from tools.bench import measure_speed

    for stage, record in rows:
        model = for_inference(load_model(folder / stage).model, process)
        config = model.config
        examples = source.load("dev", Tokenizer(folder / stage), config.max_seq_length, labels=config.labels)[0][""]
        speed = measure_speed(model, sorted_batches(examples, SPEED_BATCH), process)
        record["speedup"] = {str(SPEED_BATCH): speed.speedup}


# ----------------------------------------------------------------------------------------------------------------------
# Results

COLUMNS = ("stage", "accuracy", "relative FLOPs", f"speed at {SPEED_BATCH}", "kept after each layer")


def result_rows(rows: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, ...]]:
    """The cells of the final table, a row a stage. The ± is one standard error."""
    from tools.plot import standard_error

    return [
        (
            stage,
            f"{record['score']:.3f} ± {standard_error('accuracy', record['score'], record['examples']):.3f}",
            f"{record['relative_flops']:.3f}",
            f"{record['speedup'][str(SPEED_BATCH)]:.2f}x",
            " ".join(f"{share:.2f}" for share in record["kept"]),
        )
        for stage, record in rows
    ]


def write_page(folder: Path, rows: list[tuple[str, dict[str, Any]]], examples: list[dict[str, Any]]) -> None:
    """Writes index.html: the table, the figures and the examples of `hard`, without any other file."""
    from support.files import write_text
    from tools.inspect import page

    cells = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in (COLUMNS, *result_rows(rows))
    )
    stages = [stage for stage, _ in rows if stage != "soft"]
    inspected = html.escape(page(examples, {"name": str(folder / "hard"), "pruning": "hard"}))
    write_text(
        folder / "index.html",
        f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>Learned Token Pruning: the demo</title>
<style>body {{ font: 16px sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }}
td {{ padding: .2em 1.2em .2em 0 }} svg {{ max-width: 100%; height: auto }}
iframe {{ width: 100%; height: 700px; border: 1px solid #ccc }}</style>
<h1>The demo</h1><table>{cells}</table>
<h2>Accuracy against FLOPs</h2>{figure(folder, "tradeoff", stages)}
<h2>Training</h2>{figure(folder, "curves", [*stages, "soft"])}
<h2>What is left of a review</h2><iframe srcdoc="{inspected}" title="examples"></iframe></html>
""",
    )


def figure(folder: Path, kind: str, stages: list[str]) -> str:
    """A figure of tools/plot.py as SVG."""
    from tools.plot import PLOTS, read_runs, save_figure

    image = io.BytesIO()
    save_figure(PLOTS[kind](read_runs([folder / stage for stage in stages])), image, "svg")
    svg = image.getvalue().decode()
    return svg[svg.index("<svg") :]
