"""The table that a sceptic asks for: LTP beside all that costs as much, with equal epochs, at the last epoch.

python benchmarks/frontier.py train --task MRPC --data GLUE --restore MODEL --lr 1e-4 --seed 42 --output frontier
python benchmarks/frontier.py speed --task MRPC --data GLUE --restore MODEL frontier/MRPC-42.jsonl
python benchmarks/frontier.py compare --task MRPC --data GLUE --restore MODEL frontier/MRPC-??.jsonl
python benchmarks/frontier.py draw --output frontier.png frontier/*-??.jsonl

Each seed fine-tunes a dense model first. It is where every method starts, and the teacher of all. The records of a task
and a seed are the lines of OUTPUT/TASK-SEED.jsonl, with the answers to the evaluation examples. The same command again
trains what the file does not hold yet. `speed` times the models of one seed, if `train --keep-models` wrote them.
`compare` takes means over the seeds that hold a cell, intervals of differences over those that hold both (from `dense`
and `ltp`, or from others with --against), and the first file's speeds. `draw` draws them.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import Examples, sorted_batches  # noqa: E402
from model import Alive, Decision, Dense, Model, Pruner, Sequences, TopK, UnscoredLastLayer, pack, threshold_ladder  # noqa: E402
from runs.bootstrap import paired_difference  # noqa: E402
from runs.budget import starting_thresholds  # noqa: E402
from runs.checks import length_limit  # noqa: E402
from runs.sweep import usual_settings  # noqa: E402
from support.checkpoint import load_config, load_model, save_model  # noqa: E402
from support.devices import for_inference, for_training  # noqa: E402
from support.files import write_json  # noqa: E402
from support.process import Process, start_process  # noqa: E402
from support.settings import Settings  # noqa: E402
from tasks import find_task, own_task  # noqa: E402
from tasks.base import Source, Task  # noqa: E402
from tasks.classification import evaluate_predictions  # noqa: E402
from tasks.evaluation import evaluate, predict_logits  # noqa: E402
from tasks.tokenizer import Tokenizer  # noqa: E402
from tools.bench import Contender, measure_rows  # noqa: E402
from tools.plot import draw_dense, draw_legend, line_style, new_figure, save_figure  # noqa: E402
from train import Trainer, scale_thresholds  # noqa: E402

BUDGETS = (0.5, 0.25)
SHALLOW = ("1+2+6",)  # layers that a shallower model of six consists of


class RandomDrop(TopK):
    """Keeps as many tokens as `TopK` with the same rates, but any of them."""

    def decide(self, l: int, scores: Tensor | None, alive: Alive, seqs: Sequences) -> Decision:
        return super().decide(l, None if scores is None else torch.rand_like(scores), alive, seqs)


# ----------------------------------------------------------------------------------------------------------------------
# One seed of one task


@dataclass
class Bench:
    """What all methods of a seed share."""

    task: Task
    labels: tuple[str, ...]
    train_set: Examples
    dev_sets: dict[str, Examples]
    settings: Settings  # of the dense model
    epochs: float  # of every method, all its stages together
    dense: Path  # the fine-tuned model's folder
    process: Process
    more_set: Examples | None = None  # the training set with texts without labels, for methods that end in -more

    def student(self, **changes: Any) -> Model:
        """The dense model, to be pruned. changes: of its configuration."""
        return load_model(self.dense, self.labels or ("score",), **changes).model.to(self.process.device)

    def of(self, method: str) -> Bench:
        """The bench of a method: with the texts without labels, if its name ends in -more."""
        if method.endswith("-more") and self.more_set is None:
            raise click.UsageError(f"--method {method}: goes with --distill-data")
        return replace(self, train_set=self.more_set) if method.endswith("-more") else self

    def train(self, model: Model, stage: str, pruner: Pruner | None = None, **changes: Any) -> Model:
        """Trains a stage to its last step. pruner: in place of the stage's own. changes: of the settings."""
        torch.manual_seed(self.settings.seed)
        trainer = Trainer(
            for_training(model, self.process),
            stage,
            self.task,
            train_set=self.train_set,
            settings=replace(self.settings, **changes),
            process=self.process,
        )
        trainer.frozen_pruner = pruner or trainer.frozen_pruner
        for indices in trainer.batches():
            trainer.step(indices)
            if trainer.completed == trainer.steps or trainer.completed % trainer.steps_per_epoch == 0:
                trainer.meet_target()
        return model

    def judge(self, model: Model, pruner: Pruner | None = None) -> dict[str, Any]:
        """What the model does on the evaluation examples, with its answer to each."""
        torch.manual_seed(self.settings.seed)
        evaluation, logits = evaluate(model, self.task, self.dev_sets, self.process, pruner=pruner)
        answers = np.stack(logits[""])
        answers = answers[:, 0].astype(float).round(4) if self.task.regression else answers.argmax(1)
        return asdict(evaluation) | {"thresholds": model.thresholds.tolist(), "answers": answers.tolist()}


# ----------------------------------------------------------------------------------------------------------------------
# The methods. Each makes a model of the dense one, and the pruner that it needs if that is not the model's own


METHODS = {  # their titles in the figure. Those in -read and -more that prune read the states of dropped tokens
    "ltp": "LTP",
    "ltp-read": "LTP, --read-dropped",
    "ltp-more": "LTP, --read-dropped, --distill-data",
    "ltp-length": "LTP, --score-norm length",
    "frozen": "LTP, thresholds not learned",
    "frozen-read": "LTP, --read-dropped, thresholds not learned",
    "restarted": "LTP's start, not learned, two stages of hard",
    "restarted-read": "LTP's start, --read-dropped, two stages of hard",
    "fixed": "LTP's start, not learned",
    "fixed-read": "LTP's start, --read-dropped",
    "fixed-more": "LTP's start, --read-dropped, --distill-data",
    "manual": "manual, l / L",
    "topk": "top-k with LTP's shares",
    "topk-read": "top-k with LTP's shares, --read-dropped",
    "topk-more": "top-k with LTP's shares, --read-dropped, --distill-data",
    "random": "random with LTP's shares",
    "shallow": "fewer layers",
    "shallow-more": "fewer layers, --distill-data",
    "shallow-ltp": "fewer layers, with LTP",
    "shallow-ltp-more": "fewer layers, with LTP, --read-dropped, --distill-data",
    "longer": "dense, trained as long",
    "longer-more": "dense, trained as long, --distill-data",
}
TRAINED = ("ltp", "ltp-read", "fixed", "manual", "topk", "random", "shallow", "longer")
SHOWN = ("ltp", "ltp-read", "fixed", "manual", "topk", "random", "shallow")


def pruned(
    bench: Bench, method: str, target: float, soft_epochs: float, rates: Callable[[float], list[float]]
) -> tuple[Model, Pruner | None]:
    """Trains a method of the dense model's size, to a budget. Returns the model, and its pruner if not its own.

    soft_epochs: of LTP. rates: gives the share of the tokens that LTP keeps in each layer, at a budget.
    """
    kind, _, change = method.partition("-")
    changes: dict[str, Any] = {"length": {"score_norm": "length"}, "": {}}.get(change, {"read_dropped": True})
    if kind in ("topk", "random"):
        model = bench.student(keep_rates=rates(target), **changes)
        pruner = RandomDrop(model.config.layer_keep_rates) if kind == "random" else None
        return bench.train(model, "topk", pruner, epochs=bench.epochs), pruner
    model = bench.student(**changes)
    if kind == "manual":
        set_thresholds(bench, model, threshold_ladder(0.01, len(model.layers)), target)
        return bench.train(model, "manual", target_flops=target, epochs=bench.epochs), None
    return learned(bench, model, target, soft_epochs, kind), None


def learned(bench: Bench, model: Model, target: float, soft_epochs: float, kind: str = "ltp") -> Model:
    """LTP, from a dense model, or what lacks a part of it.

    kind: `ltp`; `frozen` learns the weights alone in `soft`; `restarted` has `hard` in place of `soft`, and so both
    cycles of the learning rate; `fixed` has one stage, `hard`. In all but `ltp` the thresholds keep their ratios.
    """
    set_thresholds(bench, model, starting_thresholds(len(model.layers), target), target)
    if kind == "fixed":
        return bench.train(model, "hard", target_flops=target, epochs=bench.epochs)
    if kind == "restarted":
        bench.train(model, "hard", target_flops=target, epochs=soft_epochs)
    else:
        soft = usual_settings("soft", target, model.config) | {"target_flops": target, "epochs": soft_epochs}
        bench.train(model, "soft", **(soft | {"threshold_learning_rate": 0.0} if kind == "frozen" else soft))
    return bench.train(model, "hard", target_flops=target, epochs=bench.epochs - soft_epochs)


def set_thresholds(bench: Bench, model: Model, thresholds: Tensor, target: float) -> None:
    """Gives the model thresholds, scaled to the target."""
    model.thresholds.data.copy_(thresholds)
    scale_thresholds(model, bench.train_set, target, process=bench.process)


def shallow(bench: Bench, names: str, **changes: Any) -> Model:
    """A model of some of the dense model's layers, by their numbers from 1. It is not trained yet.

    changes: of its configuration.
    """
    whole = bench.student(**changes)
    layers = [whole.layers[int(name) - 1] for name in names.split("+")]
    model = Model(replace(whole.config, num_hidden_layers=len(layers)))
    model.embeddings, model.head, model.layers = whole.embeddings, whole.head, torch.nn.ModuleList(layers)
    return model.to(bench.process.device)


def cells(
    bench: Bench, methods: list[str], budgets: list[float], soft_epochs: list[float], layers: list[str], rates: Callable
) -> Iterator[tuple[dict[str, Any], Callable[[], tuple[Model, Pruner | None]]]]:
    """What names each cell, and the function that trains it. Train a cell before the next one is asked for."""
    benches = {name: bench.of(name) for name in METHODS if name in methods}
    of_all_layers = [name for name in benches if not name.startswith(("shallow", "longer"))]
    for target, method in itertools.product(budgets, of_all_layers):
        for count in soft_epochs if method == "ltp" else soft_epochs[:1]:
            name = {"method": method, "target": target} | ({"soft_epochs": count} if method == "ltp" else {})
            yield name, lambda: pruned(benches[method], method, target, count, rates)
    for method, own in benches.items():
        if method in ("shallow", "shallow-more"):
            for names in layers:
                name, model = {"method": method, "layers": names}, shallow(bench, names)
                yield name, lambda: (own.train(model, "finetune", epochs=bench.epochs), None)
        if method in ("shallow-ltp", "shallow-ltp-more"):
            for names, target, count in itertools.product(layers, budgets, soft_epochs):
                model = shallow(bench, names, read_dropped=method == "shallow-ltp-more")
                of_rest = target * len(bench.student().layers) / len(model.layers)
                if of_rest < 1:
                    name = {"method": method, "layers": names, "target": target, "soft_epochs": count}
                    yield name, lambda: (learned(own, model, of_rest, count), None)
        if method in ("longer", "longer-more"):
            yield {"method": method}, lambda: (own.train(bench.student(), "finetune", epochs=bench.epochs), None)


# ----------------------------------------------------------------------------------------------------------------------
# Examples, records, the command


def split(examples: Examples) -> tuple[Examples, Examples]:
    """Nine tenths of the examples, and the tenth to choose on."""
    order = np.random.default_rng(0).permutation(len(examples))
    middle = len(examples) // 10
    parts = (np.sort(order[middle:]), np.sort(order[:middle]))
    return tuple(replace(examples.select(part), targets=examples.targets[part]) for part in parts)


def load_sets(
    source: Source, restore: Path, held_out: bool
) -> tuple[tuple[str, ...], Examples, dict[str, Examples], int]:
    """The labels, the training set, the evaluation sets, and the tokens that texts are cut to."""
    tokenizer = Tokenizer(restore)
    limit = min(source.task.max_length, length_limit(load_config(restore), restore, None))
    train_sets, labels = source.load("train", tokenizer, limit, labels=source.task.labels)
    if held_out:
        train_set, dev_set = split(train_sets[""])
        return labels, train_set, {"": dev_set}, limit
    return labels, train_sets[""], source.load("dev", tokenizer, limit, labels=labels)[0], limit


def read_records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def prepare(source: Source, folder: Path, options: dict[str, Any], process: Process) -> Bench:
    """Reads the examples, and fine-tunes the dense model into the folder where an earlier call did not."""
    restore = options["restore"]
    labels, train_set, dev_sets, limit = load_sets(source, restore, options["held_out"])
    settings = Settings(learning_rate=options["learning_rate"], seed=options["seed"], epochs=options["dense_epochs"])
    bench = Bench(source.task, labels, train_set, dev_sets, settings, options["epochs"], folder, process)
    if not (folder / "model.safetensors").is_file():
        torch.manual_seed(settings.seed)
        model = load_model(restore, labels or ("score",), new_head=True, max_seq_length=limit).model
        save_model(folder, bench.train(model, "finetune"))
        for file, content in Tokenizer(restore).files.items():
            (folder / file).write_bytes(content)

    def answers(examples: Examples) -> Tensor:
        logits, _ = predict_logits(bench.student(), examples, process, batch_size=32, pruner=Dense())
        return torch.from_numpy(np.stack(logits))

    train_set.teacher = answers(train_set)
    if options["distill_data"]:
        more = source.task.load_unlabelled(options["distill_data"], Tokenizer(restore), limit)
        more.teacher = answers(more)
        bench.more_set = train_set.extended(more)
    return bench


@click.group()
def main() -> None:
    """Trains LTP and what it is compared with, and compares."""


def data_options(command: Any) -> Any:
    """What `train`, `speed` and `compare` read."""
    held_out = "Evaluate on a tenth of the training data, which is not trained on."
    existing = click.Path(exists=True, path_type=Path)
    for option in (
        click.option("--held-out", is_flag=True, help=held_out),
        click.option("--restore", type=existing, required=True, help="The pretrained encoder."),
        click.option("--data", type=existing, required=True),
        click.option("--task", help="One of GLUE's tasks; without it, the user's own data."),
    ):
        command = option(command)
    return command


def find_source(task: str | None, data: Path) -> Source:
    return Source(find_task(task) if task else own_task(None, None, None, regression=False), data)


@main.command()
@data_options
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--lr", "learning_rate", default=1e-4, show_default=True)
@click.option("--dense-epochs", default=3.0, show_default=True, help="Of the dense model, where all methods start.")
@click.option("--epochs", default=4.0, show_default=True, help="Of every method, after those.")
@click.option(
    "--soft-epochs",
    type=click.FloatRange(0, min_open=True),
    default=[2.0],
    multiple=True,
    show_default=True,
    help="Those of LTP in `soft`.",
)
@click.option("--method", "methods", multiple=True, type=click.Choice(METHODS), default=TRAINED, show_default=True)
@click.option("--distill-data", type=click.Path(exists=True, path_type=Path), help="Texts without labels, for -more.")
@click.option("--target-flops", "budgets", multiple=True, default=list(BUDGETS), show_default=True)
@click.option("--layers", default=SHALLOW, multiple=True, show_default=True, help="Those of a shallower model.")
@click.option("--keep-models", is_flag=True, help="Write each model, to measure its speed.")
@click.option("--seed", default=42, show_default=True)
@click.option("--threads", default=1, show_default=True)
def train(**options: Any) -> None:
    """Trains the methods of one task and seed, one after the other."""
    source = find_source(options["task"], options["data"])
    process = start_process(precision="fp32", threads=options["threads"], seed=options["seed"])
    title = f"{options['task'] or options['data'].name}-{options['seed']}" + "-held-out" * options["held_out"]
    path = options["output"] / f"{title}.jsonl"
    done = [record["name"] for record in read_records(path)]
    for record in read_records(path):
        if (record["epochs"], record["lr"]) != (options["epochs"], options["learning_rate"]):
            raise click.UsageError(f"{path}: holds runs with another --epochs or --lr; choose another --output")
    bench = prepare(source, options["output"] / "models" / title / "dense", options, process)

    def add(name: dict[str, Any], model: Model, pruner: Pruner | None) -> None:
        layers = len(model.layers) / load_config(options["restore"]).num_hidden_layers  # of a shallower model
        record = name | {"epochs": bench.epochs, "lr": bench.settings.learning_rate} | bench.judge(model, pruner)
        record |= {key: layers * record[key] for key in ("relative_flops", "relative_bops")}
        record |= {"device": process.device.type, "threads": torch.get_num_threads(), "torch": torch.__version__}
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
        shown = " ".join(f"{value:.4f}" for value in record["metrics"].values())
        click.echo(f"{title} {name['name']}: {shown} at {record['relative_flops']:.3f}")

    def rates(target: float) -> list[float]:
        """The share of the tokens that LTP keeps in each layer, in the last of its records at this target."""
        records = [r for r in read_records(path) if r["method"] == "ltp" and r["target"] == target]
        if not records:
            raise click.UsageError(f"topk and random keep what ltp keeps: train it at --target-flops {target} first")
        return records[-1]["kept"]

    if "dense" not in done:
        add({"name": "dense", "method": "dense"}, bench.student(), Dense())
    choices = (options[name] for name in ("methods", "budgets", "soft_epochs", "layers"))
    for cell, make in cells(bench, *choices, rates):
        name = "-".join(str(value) for value in cell.values())
        if name not in done:
            model, pruner = make()
            add({"name": name} | cell, model, pruner)
            if options["keep_models"]:
                save_model(bench.dense.parent / name, model)


def floor(source: Source, train_set: Examples, dev_set: Examples, restore: Path) -> np.ndarray:
    """Answers without training: the most frequent class, or the cosine of the two texts' mean states."""
    if not source.task.regression:
        return np.full(len(dev_set), np.bincount(train_set.targets).argmax())
    size = load_config(restore).hidden_size
    encoder = load_model(restore, tuple(map(str, range(size))), new_head=True, head="token").model
    encoder.head.output.weight.data, encoder.head.output.bias.data = torch.eye(size), torch.zeros(size)  # the states
    cosines = []
    for i in range(len(dev_set)):
        batch = dev_set.batch(np.array([i]))
        first, second = (batch.token_ids[batch.segment_ids == segment] for segment in (0, 1))
        texts = pack([first.tolist(), [int(first[0]), *second.tolist()]])  # [CLS] text [SEP], twice
        with torch.inference_mode():
            means = [states.mean(0) for states in encoder(texts, Dense()).logits.split(texts.lengths.tolist())]
        cosines.append(float(torch.cosine_similarity(*means, dim=0)))
    return np.array(cosines)


def speed_file(records: Path) -> Path:
    return records.with_name(f"{records.stem}-speed.json")


def read_speeds(records: Path) -> dict[str, dict[str, float]]:
    return json.loads(speed_file(records).read_text()) if speed_file(records).is_file() else {}


@main.command()
@data_options
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@click.option("--examples", default=128, show_default=True)
@click.option("--repeats", default=5, show_default=True)
def speed(task: str | None, data: Path, restore: Path, held_out: bool, file: Path, examples: int, repeats: int) -> None:
    """Times the kept models of one seed in turn, and writes how much faster than the dense one they are.

    The figures of models that are no longer kept stay.
    """
    process = start_process(precision="fp32", threads=None, seed=0)
    dev_set = load_sets(find_source(task, data), restore, held_out)[2][""]
    dev_set = dev_set.select(np.sort(np.random.default_rng(0).permutation(len(dev_set))[:examples]))
    contenders = []
    for folder in sorted((file.parent / "models" / file.stem).iterdir(), key=lambda path: path.name != "dense"):
        model = for_inference(load_model(folder).model, process)
        contenders.append(Contender(folder.name, model, UnscoredLastLayer(model), model.pruner()))
    speeds: dict[str, dict[str, float]] = {contender.name: {} for contender in contenders}
    for batch_size in (32, 1):
        batches = sorted_batches(dev_set, batch_size)
        for row in measure_rows(contenders, batches, process, repeats):
            speeds[row.model][str(batch_size)] = round(row.speedup, 3)
            click.echo(f"{row.model} {batch_size}: {row.speedup:.2f}")
    write_json(speed_file(file), read_speeds(file) | speeds)


def seed_of(records: Path) -> int:
    return int(re.findall(r"\d+", records.stem)[-1])


def ranges(numbers: list[int]) -> str:
    """Numbers in order, with runs of three and more as their ends: 3, 5-7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def budget(records: list[dict[str, Any]]) -> float:
    """The target of a cell, or what it costs: a shallower model the share of its layers, a dense one 1."""
    return records[0].get("target", round(float(np.mean([record["relative_flops"] for record in records])), 2))


@main.command()
@data_options
@click.option(
    "--against", multiple=True, type=click.Choice(["dense", *METHODS]), default=["dense", "ltp"], show_default=True
)
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def compare(
    task: str | None, data: Path, restore: Path, held_out: bool, files: tuple[Path, ...], against: tuple[str, ...]
) -> None:
    """Prints each cell's mean over seeds, and how far it is from other methods at its budget."""
    source = find_source(task, data)
    _, train_set, dev_sets, _ = load_sets(source, restore, held_out)
    targets = dev_sets[""].targets
    speeds = read_speeds(files[0])
    seeds = {seed_of(file): {record["name"]: record for record in read_records(file)} for file in files}
    cells = {name: [seed[name] for seed in seeds.values() if name in seed] for seed in seeds.values() for name in seed}
    rivals = {  # by method and budget; of LTP, with half of its epochs in `soft`
        (records[0]["method"], budget(records)): name
        for name, records in cells.items()
        if records[0].get("soft_epochs") in (None, records[0]["epochs"] / 2)
    }

    def evaluate_answers(answers: np.ndarray, rows: Any = slice(None)) -> tuple[dict[str, float], float]:
        logits = answers[:, None] if source.task.regression else np.eye(int(train_set.targets.max()) + 1)[answers]
        return evaluate_predictions(source.task.metric, logits, targets[rows])

    def score(answers: np.ndarray, rows: np.ndarray) -> float:
        return 100 * evaluate_answers(answers, rows)[1]

    def difference(name: str, method: str) -> str:
        """From the method at the same budget, or the dense one; over the seeds that hold both."""
        rival = rivals.get((method, budget(cells[name])), rivals.get((method, 1.0)))
        shared = [seed for seed in seeds.values() if name in seed and rival in seed]
        if rival == name or not shared:
            return ""
        both = ([np.array(seed[cell]["answers"]) for seed in shared] for cell in (name, rival))
        mean, low, high = paired_difference(score, *both, samples=500)
        return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"

    def show(*row: str) -> None:
        click.echo(f"| {' | '.join(row)} |")

    click.echo(f"{source.task.title}, {len(targets):,} examples\n")
    metrics = evaluate_answers(floor(source, train_set, dev_sets[""], restore))[0]
    show("", "seeds", ", ".join(metrics), "relative FLOPs", "faster", *(f"less {method}" for method in against))
    show(*["---"] * (5 + len(against)))
    show("floor", "", " / ".join(f"{100 * value:.1f}" for value in metrics.values()), *[""] * (2 + len(against)))
    for name, records in cells.items():
        numbers = ranges([number for number, seed in seeds.items() if name in seed])
        scores = " / ".join(f"{100 * np.mean([record['metrics'][key] for record in records]):.1f}" for key in metrics)
        flops = np.mean([record["relative_flops"] for record in records])
        faster = ", ".join(f"{value:.2f}x" for value in speeds.get(name, {}).values())
        show(name, numbers, scores, f"{flops:.3f}", faster, *(difference(name, method) for method in against))


@main.command()
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--method", "methods", multiple=True, type=click.Choice(METHODS), default=SHOWN, show_default=True)
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def draw(output: Path, files: tuple[Path, ...], methods: tuple[str, ...]) -> None:
    """Draws the first metric against relative FLOPs, a panel a task: means over seeds, and small marks for each."""
    tasks: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        tasks.setdefault(file.stem.rsplit("-", 1)[0], []).extend(read_records(file))
    rows = 1 if len(tasks) < 4 else 2
    figure, panels = new_figure(rows, math.ceil(len(tasks) / rows), width=4.2, height=3.4)
    for panel, (task, records) in zip(panels, tasks.items()):
        metric = next(iter(records[0]["metrics"]))
        dense = [record for record in records if record["method"] == "dense"]
        mean = float(np.mean([record["metrics"][metric] for record in dense]))
        bottom = draw_dense(panel, dense[0] | {"metrics": {metric: mean}}, metric) * 0.75
        for i, method in enumerate(methods):
            points: dict[str, list[tuple[float, float]]] = {}  # of each cell, all seeds
            for record in records:
                if record["method"] == method:
                    point = record["relative_flops"], record["metrics"][metric]
                    points.setdefault(record["name"], []).append(point)
            if points:
                style, means = line_style(i), sorted(tuple(np.mean(seeds, 0)) for seeds in points.values())
                panel.plot(*zip(*means), label=METHODS[method], **style)
                panel.plot(*zip(*itertools.chain(*points.values())), linestyle="", markersize=2.5, alpha=0.6, **style)
        panel.set_ylim(bottom=max(bottom, panel.get_ylim()[0]))  # the lines of what is far below lead out
        panel.set(title=task, xlabel="relative FLOPs (1: the dense model)", ylabel=metric, xlim=(0, 1.05))
    draw_legend(figure, panels)
    save_figure(figure, output, "png")


if __name__ == "__main__":
    main()
