"""A grid of pruned models of one task, trained one after the other: which accuracy for which share of the FLOPs?"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data import STAGES, InputError, Settings, Source, Tokenizer, flag, soft_target
from model import load_config, write_file
from train import (
    Process,
    PruningOptions,
    bench_checkpoint,
    check_pruning,
    evaluate_checkpoint,
    known_labels,
    length_limit,
    protected_tokens,
    load_sets,
    run_stage,
    topk_flops,
    usual_precision,
)

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
SPEED_BATCHES = (1, 32)


@dataclass(frozen=True)
class Cell:
    """One point of the grid: a method and the settings that it varies."""

    method: str
    point: tuple[tuple[str, Any], ...]
    distilled: bool = False

    @property
    def name(self) -> str:
        """Of its folder.

        >>> Cell("ltp", (("target_flops", 0.5), ("learning_rate", 5e-05))).name
        'ltp-target-flops-0.5-lr-5e-05'
        """
        words = [self.method, *(f"{flag(name)[2:]}-{value}" for name, value in self.point)]
        return "-".join(words + ["distilled"] * self.distilled)


def grid_cells(
    methods: list[str], grid: dict[str, list[Any]], lowest_topk: float | None, distilled: bool = False
) -> list[Cell]:
    """All points, without those that would be the same run. Budgets below what top-k can reach become its lowest."""
    cells: dict[Cell, None] = {}  # an ordered set
    for method in methods:
        axes = [name for name in AXES if grid.get(name) and method in AXES[name]]
        for values in itertools.product(*(grid[name] for name in axes)):
            point = dict(zip(axes, values))
            if method == "topk" and "target_flops" in point:
                point["target_flops"] = max(point["target_flops"], lowest_topk)
            cells[Cell(method, tuple(point.items()), distilled)] = None
    return list(cells)


def usual_settings(stage: str, target_flops: float | None, max_length: int) -> dict[str, Any]:
    """What a stage's command sets by itself."""
    return STAGES[stage] | (soft_target(max_length) if stage == "soft" and target_flops else {})


def cell_stages(cell: Cell, common: dict[str, Any], max_length: int) -> Iterator[tuple[str, Settings, PruningOptions]]:
    """The stages of a cell with the settings that their commands would have; `common` as for `run_sweep`."""
    for stage in METHODS[cell.method]:
        point = {name: value for name, value in cell.point if stage == "soft" or "manual" in AXES[name]}
        epochs = common.get("epochs" if stage == "soft" else "adapt_epochs")
        given = {"epochs": epochs, "batch_size": common.get("batch_size")} | point
        usual = usual_settings(stage, point.get("target_flops"), max_length)
        settings = Settings(**(usual | {name: value for name, value in given.items() if value is not None}))
        yield stage, settings, PruningOptions(max_seq_length=common.get("max_seq_length"))


def cell_command(
    stage: str,
    settings: Settings,
    options: PruningOptions,
    max_length: int,
    source: Source,
    restore: Path,
    distill: Path | None,
    process: Process,
) -> str:
    """The command that makes a stage of a cell on its own, but for --output."""
    task, own = source.task, source.task.name == "custom"
    words = [] if own else ["--task", task.name]
    paths = {"data": source.path, "dev-data": source.dev_path, "restore": restore, "distill": distill}
    paths |= {"text-column": task.text, "pair-column": task.pair, "label-column": task.label} if own else {}
    paths |= {"max-length": options.max_seq_length}
    words += [word for name, value in paths.items() if value for word in (f"--{name}", str(value))]
    words += ["--regression"] * (own and task.regression) + ["--tagging"] * (own and task.head == "token")
    usual = asdict(Settings()) | usual_settings(stage, settings.target_flops, max_length)
    for name, value in asdict(settings).items():
        if value != usual[name]:
            words += [flag(name), str(value)]
    words += ["--precision", process.precision] * (process.precision != usual_precision(process.device))
    return shlex.join(["python", "ltp.py", stage, *words])


def run_sweep(
    restore: Path,
    source: Source,
    methods: list[str],
    grid: dict[str, list[Any]],
    common: dict[str, Any],
    distill: Path | None,
    output: Path,
    process: Process = Process(),
    speed: bool = True,
    show: Callable[[str], Any] = lambda line: None,
    progress: Callable[..., Any] = lambda **state: None,
) -> list[dict[str, Any]]:
    """Trains every cell of the grid that `output` does not hold yet, and goes on with an interrupted one.

    restore: the fine-tuned dense model. grid: setting -> its values. common: settings of all cells ("epochs" of soft
    training, "adapt_epochs" of the others, "batch_size", "max_seq_length"). speed: measure each model beside dense, once
    all are trained.
    Returns one record a model, with those that earlier grids left in output/results.jsonl, where they are written.
    Raises: InputError; Interrupted after a signal.
    """
    results = output / "results.jsonl"
    rows = {row["name"]: row for row in (read_results(results) if results.is_file() else ())}  # of earlier grids
    begun = {"folder": str(restore), "task": source.task.name, "data": source.path and str(source.path)}
    begun |= {"dev_data": source.dev_path and str(source.dev_path), "precision": process.precision}
    for name, value in begun.items():
        found = rows.get("dense", {}).get(name, value)
        if found != value:
            raise InputError(
                f"{results}: the sweep there was begun with {name} = {found}, not {value}; choose another --output"
            )
    config, max_length = load_config(restore), common.get("max_seq_length")
    if "topk" in methods:
        check_pruning(config, {"prune_mode": "topk"})
    lowest = None
    if "topk" in methods and grid.get("target_flops"):
        limit = length_limit(config, restore, max_length)
        sets, _ = load_sets(source, "train", Tokenizer(restore), limit, known_labels(source.task, config))
        sizes = torch.from_numpy(sets[""].lengths), protected_tokens(config, sets[""])
        lowest = topk_flops(config, *sizes, -float(config.num_hidden_layers))
        lowest = min(1.0, (int(lowest * 1000) + 1) / 1000)
        if min(grid["target_flops"]) < lowest:
            show(
                f"note: top-k does not prune the first layers and cannot go below {lowest}: it gets that budget instead"
            )
    dense = evaluate_checkpoint(restore, source, process, max_length=max_length, dense=True)
    rows["dense"] = {"name": "dense", "method": "dense"} | begun | asdict(dense)

    def write() -> None:
        if process.main:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())
            write_file(results, lambda path: path.write_text(text, encoding="utf-8"))

    cells = grid_cells(methods, grid, lowest, distill is not None)
    for number, cell in enumerate(cells, 1):
        show(f"\n{number} of {len(cells)}: {cell.name}")
        previous, commands, views = restore, [], {}
        scale = max_length or config.max_seq_length
        for stage, settings, options in cell_stages(cell, common, scale):
            folder = output / cell.name / stage
            command = cell_command(stage, settings, options, scale, source, previous, distill, process)
            commands.append(f"{command} --output {shlex.quote(str(folder))}")
            show(f"$ {commands[-1]}")
            torch.manual_seed(settings.seed + process.rank)  # a cell does not depend on those before it
            _, result = run_stage(
                stage,
                previous,
                source,
                settings,
                options,
                folder,
                resume=True,
                process=process,
                show=show,
                progress=progress,
                distill=distill,
            )
            previous = folder
            views[stage] = result.best
        row = {"name": cell.name, "method": cell.method, "folder": str(previous), **dict(cell.point)}
        row |= {"distilled": cell.distilled, "commands": commands} | result.best
        # Once more, so that all rows come from one process in one precision, whoever trained them.
        row |= asdict(evaluate_checkpoint(previous, source, process, max_length=max_length))
        if "soft" in views:
            wanted = ("score", "relative_flops", "soft_relative_flops", "threshold_scale")
            row["soft"] = {name: views["soft"].get(name) for name in wanted}
        rows[cell.name] = row
        write()
    if speed and process.world > 1:
        show("note: speed is measured in one process; the same command without torchrun does")
    elif speed:
        for row in (rows[cell.name] for cell in cells):
            file = Path(row["folder"]) / "speed.json"
            if not file.is_file():
                show(f"measuring the speed of {row['name']} ...")
                found = bench_checkpoint(Path(row["folder"]), source, None, 256, list(SPEED_BATCHES), 3, process)
                write_file(file, lambda path: path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8"))
            measured = json.loads(file.read_text(encoding="utf-8"))["speeds"]
            row["speedup"] = {str(s["batch_size"]): s["speedup"] for s in measured}
    write()
    return list(rows.values())


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
