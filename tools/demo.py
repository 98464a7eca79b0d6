"""The demo: made-up reviews, a tokenizer and a model of their own, and every stage run as its command would.

The module imports little, so that the data can be made without torch.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.errors import InputError
from support.settings import STAGES, Settings, flag

if TYPE_CHECKING:
    from support.process import Process

# ----------------------------------------------------------------------------------------------------------------------
# Data: reviews in which a few words matter

FILLER = """the a this that my our last next film meal hotel book train garden phone evening morning table window colour
price road music story actor waiter room page ticket seat driver screen street river market letter cup chair lamp was
were had came went stood looked felt seemed sat over under near behind before after during with without and then when
while because although however mostly partly again once twice two three seven hundred people friends
children family""".split()
PRAISE = "excellent wonderful delightful superb charming".split()
BLAME = "dreadful boring awful tedious clumsy".split()


def demo_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Synthetic reviews: filler words and a few verdicts, some of them negated by "not".

    The label is "positive" where positive verdicts outnumber negative ones; ties do not occur. Only the verdicts and
    their negations matter, so most tokens can go.
    """
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        words = generator.choices(FILLER, k=generator.randint(8, 40))
        balance = 0
        for _ in range(generator.choice((1, 1, 1, 3))):
            positive, negated = generator.random() < 0.5, generator.random() < 0.2
            verdict = [generator.choice(PRAISE if positive else BLAME)]
            position = generator.randrange(len(words))
            while words[position - 1 : position] == ["not"]:  # do not part an earlier "not" from its verdict
                position = generator.randrange(len(words))
            words[position:position] = ["not", *verdict] if negated else verdict
            balance += 1 if positive != negated else -1
        rows.append({"text": " ".join(words) + ".", "label": "positive" if balance > 0 else "negative"})
    return rows


def write_demo(folder: Path, seed: int, train: int = 4000, dev: int = 500) -> None:
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
    hidden_size=96,
    num_hidden_layers=6,
    num_attention_heads=4,
    intermediate_size=384,
    max_position_embeddings=130,
    vocab_size=600,
    type_vocab_size=1,
    layer_norm_eps=1e-5,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    labels=("negative", "positive"),
)
# Each stage, the one whose checkpoint it starts from, and its settings.
PLAN: tuple[tuple[str, str, dict[str, float]], ...] = (
    ("finetune", "untrained", {"learning_rate": 1e-3, "epochs": 6.0}),
    (
        "soft",
        "finetune",
        {"learning_rate": 5e-4, "epochs": 2.0, "regularization": 0.05, "threshold_learning_rate": 1e-4},
    ),
    ("hard", "soft", {"learning_rate": 3e-4, "epochs": 1.0}),
    ("topk", "finetune", {"learning_rate": 3e-4, "epochs": 1.0}),
    ("manual", "finetune", {"learning_rate": 3e-4, "epochs": 1.0}),
)
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
    rows = []
    for stage, restore, changes in PLAN:
        settings = Settings(**(STAGES[stage] | changes | {"seed": seed}))
        start, output = folder / restore, folder / stage
        options = " ".join(f"{flag(name)} {getattr(settings, name)}" for name in changes)
        show(f"\n$ python ltp.py {stage} --data {data} --restore {start} {options} --output {output}")
        request = StageRequest(
            stage=stage, restore=start, source=source, settings=settings, output=output, overwrite=overwrite
        )
        _, result = run_stage(request, process, show=show, progress=progress)
        rows.append((stage, dict(result.best)))
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
