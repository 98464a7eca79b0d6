"""A grid of pruned models of one task, trained one after the other: accuracy at several shares of the FLOPs."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import Config
from runs.bootstrap import paired_difference
from runs.budget import lowest_rate, protected_tokens, topk_flops
from runs.checks import check_pruning, known_labels, length_limit
from runs.stage import EvaluationOptions, Progress, Show, StageRequest, evaluate_checkpoint, run_stage
from support.checkpoint import folder_digest, load_config
from support.errors import InputError, Interrupted
from support.files import write_json, write_text
from support.process import Process, usual_precision
from support.settings import STAGES, PruningOptions, Settings, flag, soft_target
from tasks.base import Source
from tasks.classification import evaluate_predictions
from tasks.tokenizer import Tokenizer

# How each method is trained, from the fine-tuned dense model.
METHODS = {"ltp": ("soft", "hard"), "manual": ("manual",), "topk": ("topk",)}
# The settings that make a grid, and the methods for which each means something.
AXES = {
    "target_flops": ("ltp", "manual", "topk"),
    "regularization": ("ltp",),
    "temperature": ("ltp",),
    "threshold_learning_rate": ("ltp",),
    "learning_rate": ("ltp", "manual", "topk"),
    "seed": ("ltp", "manual", "topk"),
}
RESULTS = "results.jsonl"

Measure = Callable[[Path], dict[str, Any]]


@dataclass
class SweepRequest:
    """What the user asks of a sweep."""

    restore: Path  # the fine-tuned dense model
    source: Source
    methods: list[str]  # keys of METHODS
    grid: dict[str, list[Any]]  # keys of AXES -> values
    output: Path
    distill: Path | None = None  # the teacher's model folder
    distill_data: Path | None = None  # texts without labels for the teacher to answer
    epochs: float | None = None  # of soft training; None: the stage's usual number, as for all below
    adapt_epochs: float | None = None  # of the other stages
    batch_size: int | None = None
    max_seq_length: int | None = None
    read_dropped: bool | None = None  # of ltp


@dataclass(frozen=True)
class Cell:
    """One point of the grid: a method and the settings that it varies."""

    method: str
    point: tuple[tuple[str, Any], ...]
    distilled: bool = False

    @property
    def name(self) -> str:
        """The name of its folder.

        >>> Cell("ltp", (("target_flops", 0.5), ("learning_rate", 5e-05))).name
        'ltp-target-flops-0.5-lr-5e-05'
        """
        words = [self.method, *(f"{flag(name)[2:]}-{value}" for name, value in self.point)]
        return "-".join(words + ["distilled"] * self.distilled)


def run_sweep(
    request: SweepRequest,
    process: Process = Process(),
    measure: Measure | None = None,
    show: Show = lambda line: None,
    progress: Progress = lambda **state: None,
) -> list[dict[str, Any]]:
    """Trains every cell of the grid that the output folder does not hold yet, and goes on with an interrupted one.

    measure: gives the content of `bench --json` for a model folder. Each model is measured once, when all are trained.
    None: no speed is measured.
    Returns one record a model, with those that earlier grids left in output/results.jsonl, where they are written.
    Raises: InputError; Interrupted after a signal.
    """
    results = request.output / RESULTS
    rows = {row["name"]: row for row in (read_results(results) if results.is_file() else ())}  # of earlier grids
    conditions = sweep_conditions(request, process)
    check_same_sweep(results, rows.get("dense", {}), conditions)
    config = load_config(request.restore)
    config = replace(config, max_seq_length=request.max_seq_length or config.max_seq_length)
    lowest = lowest_topk_budget(request, config, show)
    options = EvaluationOptions(max_length=request.max_seq_length)
    dense_options = replace(options, dense=True)
    dense, sets, logits = evaluate_checkpoint(request.restore, request.source, process, options=dense_options)
    answers = {"dense": logits[""]}
    rows["dense"] = {"name": "dense", "method": "dense"} | conditions | asdict(dense)
    cells = grid_cells(request.methods, request.grid, lowest, distilled=request.distill is not None)
    for number, cell in enumerate(cells, 1):
        show(f"\n{number} of {len(cells)}: {cell.name}")
        stages = cell_stages(cell, request, config)
        row = {"name": cell.name, "method": cell.method, "folder": str(stages[-1].output), **dict(cell.point)}
        row |= {"distilled": cell.distilled} | train_cell(stages, config, process, show=show, progress=progress)
        # Evaluated again, so that all rows are computed alike, also those of cells that an earlier call trained.
        evaluation, _, logits = evaluate_checkpoint(stages[-1].output, request.source, process, options=options)
        rows[cell.name], answers[cell.name] = row | asdict(evaluation), logits[""]
        write_results(results, rows, process)
    if process.main and request.source.task.head == "sequence":
        add_differences(rows, cells, answers, request.source.task.metric, sets[""].targets)
    if measure and process.world > 1:
        show("note: speed is measured in one process; the same command without torchrun measures it")
    for row in (rows[cell.name] for cell in cells):
        if speed_file(row).is_file() or measure and process.world == 1:
            row["speedup"] = speedups(row, measure, show)
    write_results(results, rows, process)
    return list(rows.values())


# ----------------------------------------------------------------------------------------------------------------------
# The grid


def grid_cells(
    methods: list[str], grid: dict[str, list[Any]], lowest_topk: float | None, distilled: bool = False
) -> list[Cell]:
    """All points, each run once. A budget below what top-k can reach becomes its lowest."""
    cells: dict[Cell, None] = {}  # an ordered set
    for method in methods:
        axes = [name for name in AXES if grid.get(name) and method in AXES[name]]
        for values in itertools.product(*(grid[name] for name in axes)):
            point = dict(zip(axes, values))
            if method == "topk" and "target_flops" in point:
                point["target_flops"] = max(point["target_flops"], lowest_topk)
            cells[Cell(method, tuple(point.items()), distilled)] = None
    return list(cells)


def lowest_topk_budget(request: SweepRequest, config: Config, show: Show) -> float | None:
    """The lowest budget that top-k reaches, rounded up to thousandths; None where no cell needs it.

    Raises: InputError for a model on which top-k cannot prune.
    """
    if "topk" not in request.methods:
        return None
    check_pruning(config, {"prune_mode": "topk"})
    if not request.grid.get("target_flops"):
        return None
    folder, source = request.restore, request.source
    limit = length_limit(config, folder, request.max_seq_length)
    examples = source.load("train", Tokenizer(folder), limit, labels=known_labels(source.task, config))[0][""]
    lengths, protected = torch.from_numpy(examples.lengths), protected_tokens(config, examples)
    lowest = topk_flops(config, lengths, protected, lowest_rate(config))
    lowest = min(1.0, (int(lowest * 1000) + 1) / 1000)
    if min(request.grid["target_flops"]) < lowest:
        show(f"note: top-k does not prune the first layers and cannot go below {lowest}: it gets that budget instead")
    return lowest


def add_differences(
    rows: dict[str, dict[str, Any]],
    cells: list[Cell],
    answers: dict[str, list[np.ndarray]],
    metric: str,
    targets: np.ndarray,
) -> None:
    """Adds to each cell's record how far the first metric is from the dense model's, with a 95% interval.

    Cells of this grid that differ in their seed alone share one difference, of their mean.
    answers: logits by the cell's name. metric: the task's kind of metrics.
    """
    groups: dict[Cell, list[str]] = {}
    for cell in cells:
        point = tuple((name, value) for name, value in cell.point if name != "seed")
        groups.setdefault(replace(cell, point=point), []).append(cell.name)
    first = next(iter(rows["dense"]["metrics"]))

    def score(logits: np.ndarray, examples: np.ndarray) -> float:
        return evaluate_predictions(metric, logits, targets[examples])[0][first]

    dense = np.stack(answers["dense"])
    for names in groups.values():
        pruned = [np.stack(answers[name]) for name in names]
        difference = paired_difference(score, pruned, [dense] * len(pruned))
        for name in names:
            rows[name]["difference"] = {"metric": first, "seeds": len(names)} | difference._asdict()


# ----------------------------------------------------------------------------------------------------------------------
# A cell


def usual_settings(stage: str, target_flops: float | None, config: Config) -> dict[str, Any]:
    """The settings that a stage's command uses by itself, where they differ from those of `Settings`."""
    soft = soft_target(config.max_seq_length, config.score_norm) if stage == "soft" and target_flops else {}
    return STAGES[stage] | soft


def cell_stages(cell: Cell, request: SweepRequest, config: Config) -> list[StageRequest]:
    """The stages of a cell, with the settings that their commands would have.

    config: of the dense model, with the sweep's max_seq_length.
    """
    requests, restore = [], request.restore
    for stage in METHODS[cell.method]:
        # `hard` learns no thresholds: it takes the settings that `manual` takes too.
        point = {name: value for name, value in cell.point if stage == "soft" or "manual" in AXES[name]}
        epochs = request.epochs if stage == "soft" else request.adapt_epochs
        chosen = {"epochs": epochs, "batch_size": request.batch_size} | point
        usual = usual_settings(stage, point.get("target_flops"), config)
        settings = Settings(**(usual | {name: value for name, value in chosen.items() if value is not None}))
        folder = request.output / cell.name / stage
        requests.append(
            StageRequest(
                stage=stage,
                restore=restore,
                source=request.source,
                settings=settings,
                options=PruningOptions(
                    max_seq_length=request.max_seq_length,
                    read_dropped=request.read_dropped if stage == "soft" else None,
                ),
                output=folder,
                resume=folder.exists(),
                distill=request.distill,
                distill_data=request.distill_data,
            )
        )
        restore = folder
    return requests


def train_cell(
    stages: list[StageRequest], config: Config, process: Process, show: Show, progress: Progress
) -> dict[str, Any]:
    """Trains the stages of a cell. Returns the last one's best record, with the commands of all."""
    commands, best = [], {}
    for stage in stages:
        commands.append(stage_command(stage, config, process))
        show(f"$ {commands[-1]}")
        torch.manual_seed(stage.settings.seed + process.rank)  # a cell does not depend on those before it
        try:
            _, result = run_stage(stage, process, show=show, progress=progress)
        except Interrupted as error:
            raise Interrupted(f"{error}; the same command goes on", error.number) from None
        best[stage.stage] = result.best
    row = {"commands": commands} | best[stages[-1].stage]
    if "soft" in best:
        names = ("score", "relative_flops", "soft_relative_flops", "threshold_scale")
        row["soft"] = {name: best["soft"].get(name) for name in names}
    return row


def stage_command(request: StageRequest, config: Config, process: Process) -> str:
    """The command that runs a stage on its own. config: as for `cell_stages`."""
    source, settings, task = request.source, request.settings, request.source.task
    own = task.name == "custom"
    paths = {"data": source.path, "dev-data": source.dev_path, "restore": request.restore}
    paths |= {"distill": request.distill, "distill-data": request.distill_data}
    paths |= {"text-column": task.text, "pair-column": task.pair, "label-column": task.label} if own else {}
    paths |= {"max-length": request.options.max_seq_length}
    words = [] if own else ["--task", task.name]
    words += [word for name, value in paths.items() if value for word in (f"--{name}", str(value))]
    words += ["--regression"] * (own and task.regression) + ["--tagging"] * (own and task.head == "token")
    usual = asdict(Settings()) | usual_settings(request.stage, settings.target_flops, config)
    for name, value in asdict(settings).items():
        if value != usual[name]:
            words += [flag(name), str(value)]
    words += {None: [], True: ["--read-dropped"], False: ["--ignore-dropped"]}[request.options.read_dropped]
    words += ["--precision", process.precision] * (process.precision != usual_precision(process.device))
    return shlex.join(["python", "ltp.py", request.stage, *words, "--output", str(request.output)])


def speed_file(row: dict[str, Any]) -> Path:
    return Path(row["folder"]) / "speed.json"


def speedups(row: dict[str, Any], measure: Measure | None, show: Show) -> dict[str, float]:
    """The speed-up of a row's model by batch size, read from speed.json beside the model, or measured now.

    measure: may be None where there is a speed.json. Raises: InputError for a damaged file.
    """
    file = speed_file(row)
    if not file.is_file():
        show(f"measuring the speed of {row['name']} ...")
        write_json(file, measure(Path(row["folder"])))
    try:
        speeds = json.loads(file.read_text(encoding="utf-8"))["speeds"]
        return {str(speed["batch_size"]): speed["speedup"] for speed in speeds}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: damaged ({error}); remove it to measure again") from None


# ----------------------------------------------------------------------------------------------------------------------
# The results


def sweep_conditions(request: SweepRequest, process: Process) -> dict[str, Any]:
    """What all cells of an output folder have in common."""
    source = request.source
    return {
        "folder": str(request.restore),
        "task": source.task.name,
        "data": source.path and str(source.path),
        "dev_data": source.dev_path and str(source.dev_path),
        "precision": process.precision,
        "read_dropped": request.read_dropped,
        "max_seq_length": request.max_seq_length,
        "content": {"folder": folder_digest(request.restore), "data": source.digest()},
    }


def check_same_sweep(results: Path, begun: dict[str, Any], conditions: dict[str, Any]) -> None:
    """Raises InputError if the sweep there was begun under other conditions. begun: the dense model's record, or {}.

    Files may have moved, or be spelled otherwise: where the record has digests of their content, those are compared.
    """
    digests = begun.get("content", {})
    changed = [name for name in digests if digests[name] != conditions["content"][name]]
    names = (
        "task",
        "precision",
        "read_dropped",
        "max_seq_length",
        *(() if digests else ("folder", "data", "dev_data")),
    )
    changed += [name for name in names if begun.get(name, conditions[name]) != conditions[name]]
    if changed:
        earlier, value = begun.get(changed[0]), conditions[changed[0]]
        difference = "of other content" if earlier == value else f"not {value}"
        raise InputError(
            f"{results}: the sweep there was begun with {changed[0]} = {earlier}, {difference}; choose another --output"
        )


def write_results(path: Path, rows: dict[str, dict[str, Any]], process: Process) -> None:
    """Writes a line a record, on the main process."""
    if process.main:
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows.values()))


def read_results(path: Path) -> list[dict[str, Any]]:
    """The records of a results.jsonl, the dense model's first. Raises: InputError naming file and line."""
    rows = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
            rows.append(json.loads(line))
            known = {"name", "method", "score", "metrics", "relative_flops"} <= set(rows[-1])
            if not known or rows[-1]["method"] not in ("dense", *METHODS):
                raise InputError(f"{path}, line {number}: not a record of `sweep`")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not the results of `sweep` ({error})") from None
    return sorted(rows, key=lambda row: row["method"] != "dense")
