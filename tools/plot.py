"""Plots of runs, from the files that the commands write.

A `Run` holds what was read from one path: the folder of a run or of a sweep, an `eval --json` file, or answers of
`predict`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runs.folder import read_log
from runs.sweep import read_results
from support.errors import InputError
from support.files import short_names

# ----------------------------------------------------------------------------------------------------------------------
# Runs, read from what the commands write


class Run(NamedTuple):
    name: str
    evaluations: list[dict[str, Any]]  # of a run folder, in order; of an `eval --json` file, the one
    best: dict[str, Any] | None  # the evaluation of the checkpoint
    start: list[float] | None = None  # (L,) thresholds before the first step
    lengths: np.ndarray | None = None  # (N,) tokens of each text of a `predict` file ...
    kept: np.ndarray | None = None  # ... and (N, L) tokens that leave each layer
    cells: list[dict[str, Any]] | None = None  # of a sweep, the record of each model
    task: str | None = None  # of `evaluations`


EVALUATION_KEYS = {"metrics", "score", "relative_flops", "kept"}


def read_run(path: Path, name: str) -> Run:
    """Reads the folder of a run or of a sweep, or its results, an `eval --json` file, or the answers of `predict`.

    Raises: InputError naming the file.
    """
    if (path / "results.jsonl").is_file():
        path = path / "results.jsonl"
    elif path.is_dir():
        path = path / "log.jsonl"
        if not path.is_file():
            raise InputError(f"{path.parent}: holds no log.jsonl; expected the folder of a training run")
    try:
        return read_training(path, name) if path.name == "log.jsonl" else read_file(path, name)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file or folder") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        raise InputError(
            f"{path}: not what `plot` reads, a run's or a sweep's folder or a file of `eval --json` or `predict` "
            f"({type(error).__name__}: {reason})"
        ) from None


def read_training(path: Path, name: str) -> Run:
    """Reads the log of a training run."""
    records = [record for _, record in read_log(path)]
    evaluations = [record for record in records if record["event"] == "evaluation"]
    if not evaluations or not all(EVALUATION_KEYS <= set(record) for record in evaluations):
        raise InputError(f"{path}: holds no evaluation yet; train on, or leave it out")
    best = [record for record in evaluations if record.get("saved", True)][-1]
    return Run(name, evaluations, best, start=records[0].get("thresholds"), task=records[0].get("task"))


def read_file(path: Path, name: str) -> Run:
    """Reads a sweep's results, an evaluation, or answers: the keys of the first object tell which."""
    text = path.read_text(encoding="utf-8")
    first = json.loads(text.split("\n", 1)[0] if text.startswith('{"') else text)
    if "method" in first:
        return Run(name, [], None, cells=read_results(path))
    if EVALUATION_KEYS <= set(first):
        return Run(name, [first], first, task=first.get("task"))
    answers = [json.loads(line) for line in text.split("\n") if line.strip()]
    if not all({"kept", "tokens"} <= set(record) for record in answers):
        raise InputError(f"{path}: neither the result of `eval --json` nor answers of `predict` with their tokens")
    tokens, kept = (np.array([record[key] for record in answers], dtype=np.int64) for key in ("tokens", "kept"))
    return Run(name, [], None, lengths=tokens, kept=kept)


def read_runs(paths: list[Path]) -> list[Run]:
    """The runs, each named by the end of its path, as short as keeps the names different. Raises: InputError."""
    names = short_names([Path(re.sub(r"\.jsonl?$", "", str(path))) for path in paths])
    # matplotlib leaves names that begin with "_" out of a legend, and reads a formula between two "$".
    names = [re.sub("^_", " _", name).replace("$", r"\$") for name in names]
    return [read_run(path, name) for path, name in zip(paths, names)]


# ----------------------------------------------------------------------------------------------------------------------
# Figures

# Okabe and Ito's colours, which colour-blind readers tell apart, without their yellow, too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def new_figure(rows: int = 1, columns: int = 1, width: float = 6.4, height: float = 4.2) -> tuple[Any, list[Any]]:
    """A figure and its panels; width and height of one panel, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    panels = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, panels


def line_style(index: int) -> dict[str, Any]:
    """Colour and marker of the `index`-th line. Beyond the colours, they repeat with other markers."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]}


def draw_legend(figure: Any, panels: list[Any]) -> None:
    """One legend of all panels, below them: as many columns as fit, and a higher figure for further rows."""
    shown = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels())}
    widths = [0.75 + 0.09 * len(label) for label in shown]  # inches: the sample and its gaps, and the characters
    columns = len(shown) if sum(widths) < figure.get_figwidth() else max(1, int(figure.get_figwidth() / max(widths)))
    figure.set_figheight(figure.get_figheight() + 0.2 * (math.ceil(len(shown) / columns) - 1))
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=columns, frameon=False)


def reach_down(panel: Any, top: float) -> None:
    """Makes an empty panel reach a tenth below a value: a small difference must not look large."""
    panel.update_datalim([(0, top - abs(top) / 10)], updatex=False)


def save_figure(figure: Any, path: Path, format: str) -> None:
    """Writes a "png", or an "svg" with text as text. The same figure gives the same bytes."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "ltp"}):
        figure.savefig(path, format=format, dpi=160, metadata={"Date": None} if format == "svg" else {"Software": None})


def check_runs(runs: list[Run], fits: Callable[[Run], Any], content: str) -> None:
    """Raises InputError naming the first run that lacks what the plot shows."""
    for run in runs:
        if not fits(run):
            raise InputError(f"{run.name}: this kind of plot shows {content}; pass another --kind")


def standard_error(metric: str, value: float, examples: int | None) -> float | None:
    """The standard error of an accuracy on `examples` examples; None for other metrics."""
    return math.sqrt(value * (1 - value) / examples) if metric == "accuracy" and examples else None


def score_name(record: dict[str, Any]) -> str:
    """Which metrics the score of an evaluation is.

    >>> score_name({"score": 0.5, "metrics": {"accuracy": 0.5, "f1": 0.6}})
    'accuracy'
    >>> score_name({"score": 0.5, "metrics": {"pearson": 0.4, "spearman": 0.6}})
    'mean of pearson and spearman'
    """
    same = [name for name, value in record["metrics"].items() if math.isclose(value, record["score"])]
    return same[0] if same else "mean of " + " and ".join(record["metrics"])


# ----------------------------------------------------------------------------------------------------------------------
# Kinds of plots


def plot_curves(runs: list[Run]) -> Any:
    """Loss, score, relative FLOPs and thresholds of training runs over the steps.

    The thresholds of several runs are the last ones, over the layers.
    """
    check_runs(runs, lambda run: run.evaluations and "step" in run.evaluations[0], "run folders")
    figure, panels = new_figure(2, 2, width=5.2, height=3.4)
    score = "score: " + score_name(runs[0].evaluations[-1])
    curves = (("train_loss", "training loss"), ("score", score), ("relative_flops", "relative FLOPs"))
    reach_down(panels[1], max(record["score"] for run in runs for record in run.evaluations))
    for panel, (key, title) in zip(panels, curves):
        for i, run in enumerate(runs):
            steps = [record["step"] for record in run.evaluations]
            values = [record[key] for record in run.evaluations]
            panel.plot(steps, values, label=run.name, markersize=4, **line_style(i))
        panel.set(title=title, xlabel="step", xlim=(0, None))
    panels[2].set_ylim(0, 1.05)
    learned = {i: run for i, run in enumerate(runs) if run.evaluations[-1].get("thresholds")}
    if len(runs) == 1 and learned:
        draw_threshold_curves(figure, panels[3], runs[0])
    else:
        for i, run in learned.items():
            values = run.best["thresholds"]
            panels[3].plot(range(1, len(values) + 1), values, markersize=4, **line_style(i))
        panels[3].set(title="thresholds" if learned else "no thresholds in these runs", xlabel="layer")
    for panel in panels:
        panel.locator_params(axis="x", nbins=7, integer=True)
    if len(runs) > 1:
        draw_legend(figure, panels)
    return figure


def draw_threshold_curves(figure: Any, panel: Any, run: Run) -> None:
    """The thresholds of one run over the steps, a line a layer, from step 0 where the log has them."""
    from matplotlib import cm, colormaps, colors

    steps = [record["step"] for record in run.evaluations]
    values = [record["thresholds"] for record in run.evaluations]
    if run.start:
        steps, values = [0, *steps], [run.start, *values]
    layers = len(values[0])
    shades = colormaps["viridis"](np.linspace(0, 0.9, layers))  # violet to green, without the pale end
    for shade, column in zip(shades, zip(*values)):
        panel.plot(steps, column, color=shade, marker="o", markersize=3)
    panel.set(title="thresholds", xlabel="step", xlim=(0, None))
    key = cm.ScalarMappable(colors.BoundaryNorm(np.arange(0.5, layers + 1), layers), colors.ListedColormap(shades))
    bar = figure.colorbar(key, ax=panel, label="layer", ticks=range(1, layers + 1, 1 + layers // 16))
    bar.ax.tick_params(which="both", length=0)


def plot_kept(runs: list[Run]) -> Any:
    """Share of the tokens that leaves each layer. Of `predict` files: the median text, the middle 90% as a band."""
    check_runs(runs, lambda run: run.best or run.kept is not None, "runs, results of `eval --json` and answers")
    figure, (panel,) = new_figure()
    depth = 0
    for i, run in enumerate(runs):
        if run.kept is not None:
            shares = np.concatenate([np.ones((1, len(run.kept))), (run.kept / run.lengths[:, None]).T])  # (L + 1, N)
            low, middle, high = np.quantile(shares, (0.05, 0.5, 0.95), axis=1)
            panel.fill_between(range(len(middle)), low, high, color=line_style(i)["color"], alpha=0.18, linewidth=0)
            label = f"{run.name} (median, 5 to 95%)"
        else:
            middle, label = [1.0, *run.best["kept"]], run.name
        panel.plot(range(len(middle)), middle, label=label, markersize=5, **line_style(i))
        depth = max(depth, len(middle) - 1)
    panel.set(xlabel="after layer", ylabel="share of the tokens left", ylim=(0, 1.05))
    ticks = range(0, depth + 1, 1 + depth // 16)
    panel.set_xticks(ticks, ["input", *map(str, ticks[1:])])
    draw_legend(figure, [panel])
    return figure


def plot_lengths(runs: list[Run]) -> Any:
    """Heat map of a `predict` file's texts: tokens that leave the last layer against tokens of the text.

    Shown is the last layer after which some text has more than one token.
    """
    check_runs(runs, lambda run: run.kept is not None, "answers of `predict`")
    columns = min(3, len(runs))
    figure, panels = new_figure(math.ceil(len(runs) / columns), columns, width=5.0, height=4.2)
    from matplotlib.colors import LogNorm

    longest = int(max(run.lengths.max() for run in runs))
    layer = max([l for run in runs for l in range(run.kept.shape[1]) if run.kept[:, l].max() > 1], default=0)
    layer = min(layer, *(run.kept.shape[1] - 1 for run in runs))
    most = int(max(run.kept[:, layer].max() for run in runs))
    edges = [np.arange(0.5, top + math.ceil(top / 40) + 0.5, math.ceil(top / 40)) for top in (longest, most)]
    counts = [np.histogram2d(run.lengths, run.kept[:, layer], edges)[0] for run in runs]
    highest = max(2, max(count.max() for count in counts))
    norm = LogNorm(0.4, highest)  # from below 1, so that a single text shows on white
    for panel, run, count in zip(panels, runs, counts):
        mesh = panel.pcolormesh(*edges, np.ma.masked_equal(count.T, 0), norm=norm, cmap="Blues")
        end = [0, edges[1][-1]]
        panel.plot(end, end, color="#666666", linestyle="--", linewidth=1, label="none dropped")
        panel.legend(loc="lower right", frameon=False, fontsize="small")
        panel.set(title=run.name, xlim=(0, edges[0][-1]), ylim=(0, edges[1][-1]))
        name = "the last layer" if layer + 1 == run.kept.shape[1] else f"layer {layer + 1}"
        panel.set(xlabel="tokens of the text", ylabel=f"tokens leaving {name}")
        panel.yaxis.get_major_locator().set_params(integer=True)
    for panel in panels[len(runs) :]:
        panel.set_visible(False)
    bar = figure.colorbar(mesh, ax=panels, label="texts", format="{x:g}")
    bar.ax.set_ylim(1, highest)
    return figure


def draw_dense(panel: Any, record: dict[str, Any], metric: str) -> float:
    """A line across for the dense model, and a band for an accuracy's standard error. Returns the metric's value."""
    value = record["metrics"][metric]
    panel.axhline(value, color="#888888", linestyle="--", linewidth=1, label="dense", zorder=0)
    reach_down(panel, value)
    error = standard_error(metric, value, record.get("examples"))
    if error:
        panel.axhspan(value - error, value + error, color="#888888", alpha=0.12, linewidth=0, label="dense ± 1 SE")
    return value


def plot_tradeoff(runs: list[Run]) -> Any:
    """The first metric that all runs have against relative FLOPs; an accuracy with its standard error."""
    check_runs(runs, lambda run: run.best, "run folders and results of `eval --json`")
    tasks = dict.fromkeys(run.task for run in runs if run.task)
    if len(tasks) > 1:
        names = " and ".join("your own data" if task == "custom" else task for task in tasks)
        raise InputError(f"this kind of plot compares models on one task, not on {names}; plot each apart")
    metric = shared_metric([run.best for run in runs])
    figure, (panel,) = new_figure()
    values = [run.best["metrics"].get(metric, run.best["score"]) for run in runs]
    reach_down(panel, max(values))
    for i, (run, value) in enumerate(zip(runs, values)):
        share = run.best["relative_flops"]
        error = standard_error(metric, value, run.best.get("examples"))
        style = {"linestyle": "", "markersize": 8, "elinewidth": 1} | line_style(i)
        panel.errorbar(share, value, error, label=run.name, **style)
        if share == 1:
            panel.axhline(value, color="#888888", linestyle="--", linewidth=1, zorder=0)
    note = ", bars: one standard error" if metric == "accuracy" else ""
    panel.set(xlabel="relative FLOPs (1: the dense model)", ylabel=f"{metric}{note}", xlim=(0, 1.05))
    draw_legend(figure, [panel])
    return figure


def shared_metric(records: list[dict[str, Any]]) -> str:
    """The first metric that all evaluations have, or else "score"."""
    shared = [name for name in records[0]["metrics"] if all(name in record["metrics"] for record in records)]
    return shared[0] if shared else "score"


def relative_bops(record: dict[str, Any]) -> float:
    """Bit operations of an evaluation as a share of the dense float32 model's. Old records (float) lack them."""
    return record.get("relative_bops", record["relative_flops"])


def plot_bops(runs: list[Run]) -> Any:
    """A metric of each task against relative bit operations on a logarithmic axis, a panel a task.

    Float models have a line, and models whose products are rounded to int8 another. Each point tells its FLOPs.
    """
    check_runs(runs, lambda run: run.best, "run folders and results of `eval --json`")
    tasks: dict[str | None, list[dict[str, Any]]] = {}
    for run in runs:
        tasks.setdefault(run.task, []).append(run.best)
    figure, panels = new_figure(1, len(tasks), 6.4 if len(tasks) == 1 else 4.0)
    for panel, (task, records) in zip(panels, tasks.items()):
        draw_bops(panel, records)
        panel.set_title("your own data" if task == "custom" else task or "")
    draw_legend(figure, panels)
    return figure


def draw_bops(panel: Any, records: list[dict[str, Any]]) -> None:
    """The evaluations of one task."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    records = [record | {"metrics": record["metrics"] | {"score": record["score"]}} for record in records]
    metric = shared_metric(records)
    dense = [record for record in records if relative_bops(record) == 1]
    if dense:
        draw_dense(panel, dense[0], metric)
    records = sorted(records, key=relative_bops)
    for i, (label, rounded) in enumerate((("float32", False), ("int8", True))):
        line = [record for record in records if (relative_bops(record) != record["relative_flops"]) == rounded]
        points = [(relative_bops(record), record["metrics"][metric]) for record in line]
        if points:
            panel.plot(*zip(*points), label=label, markersize=7, **line_style(i))
        for point, record in zip(points, line):
            share = record["relative_flops"]
            # Above the last point of a line, and below the others, from where it mostly rises to the right.
            text, place = ("dense", (6, 4)) if share == 1 else (f"{share:.2f}", (4, -13))
            panel.annotate(text, point, place, textcoords="offset points", size="small")
    panel.set(xscale="log", xlabel="relative bit operations\n(numbers: relative FLOPs)", ylabel=metric)
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_locator(LogLocator(subs=()))
    panel.margins(x=0.22, y=0.12)


# ----------------------------------------------------------------------------------------------------------------------
# The frontier of a sweep

METHOD_NAMES = {"ltp": "LTP", "manual": "manual thresholds", "topk": "top-k"}
# A line of the frontier stands for one way of training. The settings that may differ between lines, and their signs.
LINE_SETTINGS = {"temperature": "τ", "threshold_learning_rate": "rate of θ", "learning_rate": "rate"}
Points = list[tuple[float, float, float, float]]  # see `frontier_lines`


def plot_frontier(runs: list[Run]) -> Any:
    """Results of `sweep`, a panel each: the task's first metric against relative FLOPs.

    Each way of training has a line through its means over seeds, and small marks for single runs. The dense model's
    value runs across; an accuracy has its standard error as a band. Bars are 95% intervals of the differences from it.
    """
    check_runs(runs, lambda run: run.cells and run.cells[0]["method"] == "dense", "results of `sweep`")
    figure, panels = new_figure(1, len(runs), 6.4 if len(runs) == 1 else 4.0)
    styles: dict[str, dict[str, Any]] = {}  # by label, the same in all panels
    for panel, run in zip(panels, runs):
        draw_frontier(panel, run.cells, styles)
        panel.set_title(run.name if len(runs) > 1 else "")
    draw_legend(figure, panels)
    return figure


def draw_frontier(panel: Any, cells: list[dict[str, Any]], styles: dict[str, dict[str, Any]]) -> None:
    """One sweep. A point far below the dense model stands at the bottom with its value."""
    metric = next(iter(cells[0]["metrics"]))
    top = draw_dense(panel, cells[0], metric)
    floor = top - abs(top) / 4
    for label, groups in frontier_lines(cells[1:], metric).items():
        style = styles.setdefault(label, line_style(len(styles)))
        means = sorted(tuple(np.mean(points, 0)) for points in groups)
        for x, _, low, high in means:
            if top + high > floor:  # never for nan
                panel.vlines(x, max(top + low, floor), top + high, color=style["color"], linewidth=1, alpha=0.5)
        panel.plot(*zip(*((x, max(y, floor)) for x, y, *_ in means)), label=label, markersize=7, **style)
        for x, y, *_ in means:
            if y < floor:
                panel.annotate(f"{y:.2f} ↓", (x, floor), (9, -3), textcoords="offset points", size="small")
        single = [point[:2] for points in groups if len(points) > 1 for point in points]
        if single:
            panel.plot(*zip(*single), linestyle="", markersize=3, alpha=0.6, **style)
    panel.set(xlabel="relative FLOPs (1: the dense model)", ylabel=metric, xlim=(0, 1.05))


def frontier_lines(cells: list[dict[str, Any]], metric: str) -> dict[str, list[Points]]:
    """A line for each way of training, by its label: of each of its budgets (or λ), the points of all seeds.

    A point is (relative FLOPs, metric, low, high), the last two of the budget's difference from the dense model. They
    are nan where that difference is not of all these seeds: they were trained by several calls.
    """
    cells = sorted(cells, key=lambda cell: [*METHOD_NAMES].index(cell["method"]))
    mixed = len({cell["distilled"] for cell in cells}) > 1
    lines: dict[str, dict[Any, list[tuple[float, ...]]]] = {}
    for cell in cells:
        label = METHOD_NAMES[cell["method"]] + (", not distilled" if mixed and not cell["distilled"] else "")
        for name, sign in LINE_SETTINGS.items():
            values = {other.get(name) for other in cells if other["method"] == cell["method"]}
            label += f", {sign} {cell[name]:g}" if len(values) > 1 and name in cell else ""
        budget = cell.get("target_flops"), cell.get("regularization")
        points = lines.setdefault(label, {}).setdefault(budget, [])
        difference = cell.get("difference", {})
        interval = (difference.get(end, math.nan) for end in ("low", "high"))
        points.append((cell["relative_flops"], cell["metrics"][metric], *interval, difference.get("seeds", 1)))
    return {label: [of_same_seeds(points) for points in groups.values()] for label, groups in lines.items()}


def of_same_seeds(points: list[tuple[float, ...]]) -> Points:
    """The points of a budget, without their last number: how many seeds the interval is of.

    The interval becomes nan where the budget has more or fewer seeds.
    """
    whole = all(seeds == len(points) for *_, seeds in points)
    return [(x, y, *((low, high) if whole else (math.nan, math.nan))) for x, y, low, high, _ in points]


# ----------------------------------------------------------------------------------------------------------------------

PLOTS: dict[str, Callable[[list[Run]], Any]] = {
    "curves": plot_curves,
    "kept": plot_kept,
    "lengths": plot_lengths,
    "tradeoff": plot_tradeoff,
    "bops": plot_bops,
    "frontier": plot_frontier,
}


def natural_kind(runs: list[Run]) -> str:
    """The default of --kind: curves of one run, tradeoff of several, bops if one is in int8, lengths of texts, frontier
    of a sweep."""
    if any(run.cells for run in runs):
        return "frontier"
    if any(run.kept is not None for run in runs):
        return "lengths" if all(run.kept is not None for run in runs) else "kept"
    if any(relative_bops(run.best) != run.best["relative_flops"] for run in runs):
        return "bops"
    return "curves" if len(runs) == 1 and "step" in runs[0].evaluations[0] else "tradeoff"
