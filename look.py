"""Pictures: which tokens survive (terminal and page), and plots of runs. Nothing here is needed to train or to predict.

An *example* is a dict, ready for JSON, of one text and what every layer does with it: see `examine`.
A *run* is what a folder, an `eval --json` file, a `predict` file or a sweep's results tell: see `read_run`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data import InputError, pack
from model import Config, layer_macs
from sweep import read_results
from train import Predictor, read_log

# ----------------------------------------------------------------------------------------------------------------------
# Examples


@torch.inference_mode()
def examine(predictor: Predictor, records: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    """What every layer does with each text, and the answers of the pruned and of the dense model.

    records: as `Predictor.answer` takes them. Returns for each text of n tokens: text, as it was given; tokens (n strings);
    dense and pruned answers {"label", of a classifier with "probabilities" by label; or the "score" of a regression};
    relative_flops; layers, each with its threshold (None where none decides), scores (n numbers, None where the token had
    gone before), alive (places of the tokens that leave it) and relative_flops.
    Raises: InputError for records that are no texts, or that take several windows.
    """
    model, device = predictor.model, predictor.process.device
    thresholds = model.thresholds.tolist() if model.pruning == "hard" else [None] * len(model.layers)
    examples = []
    for where, record in records:
        encoded, finish = predictor.prepare([(where, record)])
        if len(encoded) > 1:
            raise InputError(
                f"{where}: makes {len(encoded)} windows of {predictor.max_length} tokens, and one can be shown; shorten the "
                "context, or pass a larger --max-length"
            )
        ids, segments = encoded[0]
        batch = pack([ids], [segments]).to(device)
        with predictor.process.autocast():
            pruned, dense = model(*batch, trace=True), model(*batch, pruning="none")
        used, whole = (layer_macs(model.config, batch.lengths, out.kept)[:, 0].tolist() for out in (pruned, dense))
        layers = []
        for l, step in enumerate(pruned.trace):
            scores: list[float | None] = [None] * len(ids)
            for place, score in zip(step.tokens.tolist(), step.importance.tolist()):
                scores[place] = score
            alive = step.tokens[step.keep].tolist()
            share = used[l] / whole[l]
            layers.append({"threshold": thresholds[l], "scores": scores, "alive": alive, "relative_flops": share})
        answers = {"dense": answer(dense, model.config, finish), "pruned": answer(pruned, model.config, finish)}
        texts = [record[name] for name in ("text", "text_pair", "question", "context") if name in record]
        tokens = predictor.open_tokenizer().tokens(ids)
        example = {"text": " / ".join(texts) or " ".join(tokens), "tokens": tokens, **answers}
        examples.append(example | {"relative_flops": sum(used) / sum(whole), "layers": layers})
    return examples


def answer(output: Any, config: Config, finish: Callable) -> dict[str, Any]:
    """The answer for the one text of an Output; finish: see `Prepared`."""
    logits = output.logits.float().cpu()
    logits = logits[0] if config.head == "sequence" else logits
    (found,) = finish([(logits, output.kept[:, 0].tolist())])
    if config.head == "span":
        return {"label": f"“{found['answer']}”" if found["answer"] else "no answer"}
    if config.head == "token":
        tagged = [f"{word} {label}" for word, label in zip(found["words"], found["labels"]) if label not in ("O", None)]
        return {"label": ", ".join(tagged) or "no tags"}
    if len(config.labels) == 1:
        return {"label": config.labels[0], "score": found["label"]}
    return {"label": found["label"], "probabilities": dict(zip(config.labels, logits.softmax(0).tolist()))}


def describe_answer(given: dict[str, Any]) -> str:
    """
    >>> describe_answer({"label": "good", "probabilities": {"bad": 0.25, "good": 0.75}})
    'good (0.75)'
    """
    if "score" in given:
        return f"{given['score']:.3f}"
    sure = f" ({given['probabilities'][given['label']]:.2f})" if "probabilities" in given else ""
    return given["label"] + sure


def relative_importance(scores: list[float | None]) -> list[float]:
    """Scores of a layer as colour: 0 to 1, relative to the highest but the first token's, 0 for tokens that had gone.

    Attention is spread very unevenly; the square root keeps the middle apart from the bottom.
    """
    highest = max((score for score in scores[1:] if score is not None), default=scores[0]) or 1.0
    return [min(1.0, math.sqrt((score or 0.0) / highest)) for score in scores]


def print_example(example: dict[str, Any], console: Any) -> None:
    """Prints a text once a layer: survivors the stronger coloured the more attention they receive, the others dimmed.

    Where the console has no colours, a dropped token is a dot.
    """
    from rich.table import Table
    from rich.text import Text

    tokens = example["tokens"]
    wraps = sum(map(len, tokens)) + len(tokens) + 24 > console.width
    table = Table(show_edge=False, pad_edge=False, leading=int(wraps))
    for name in ("layer", "tokens", "FLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("text", ratio=1)
    table.add_row("", str(len(tokens)), "", Text(" ".join(tokens)))
    for number, layer in enumerate(example["layers"], 1):
        alive, shades = set(layer["alive"]), relative_importance(layer["scores"])
        text = Text(" ").join(
            Text(token, style=colour_style(shades[i]))
            if i in alive
            else Text(token, style="dim strike")
            if console.color_system
            else Text("·")
            for i, token in enumerate(tokens)
        )
        table.add_row(str(number), str(len(alive)), f"{layer['relative_flops']:.2f}", text)
    console.print()
    console.print(table)
    line = Text("\n")
    dense = Text.assemble(("dense ", "dim"), describe_answer(example["dense"]))
    if example["relative_flops"] < 1:
        line.append("pruned ", "dim").append(describe_answer(example["pruned"])).append("   ").append(dense)
        line.append(f"   relative FLOPs {example['relative_flops']:.3f}", "dim")
    else:
        line.append(dense).append("   no token is dropped", "dim")
    console.print(line, soft_wrap=True)


def colour_style(share: float) -> str:
    """Black on a blue that grows stronger with `share` (0 to 1): readable on light and on dark terminals."""
    pale, strong = (226, 236, 244), (66, 165, 227)
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(pale, strong))
    return f"#000000 on #{red:02x}{green:02x}{blue:02x}"


def page(examples: list[dict[str, Any]], model: dict[str, Any]) -> str:
    """One self-contained HTML page of the examples; model: {"name", "pruning"} for its heading.

    Whatever the texts hold, the page only ever sees it as data: JSON without a "<", set as text.
    """
    data = json.dumps({"model": model, "examples": rounded(examples)}, allow_nan=False).replace("<", "\\u003c")
    template = Path(__file__).with_name("look_template.html").read_text(encoding="utf-8")
    return template.replace("{{DATA}}", data)


def rounded(value: Any) -> Any:
    """Numbers to 6 significant digits, anywhere inside: a page of half the size."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


# ----------------------------------------------------------------------------------------------------------------------
# Runs, read from what the commands write


class Run(NamedTuple):
    name: str
    evaluations: list[dict[str, Any]]  # a run folder's, in order; of an `eval --json` file the one
    best: dict[str, Any] | None  # the evaluation of the checkpoint
    start: list[float] | None = None  # (L,) thresholds before the first step
    lengths: np.ndarray | None = None  # (N,) tokens of each text of a `predict` file ...
    kept: np.ndarray | None = None  # ... and (N, L) those leaving each layer
    cells: list[dict[str, Any]] | None = None  # of a sweep, the record of each model
    task: str | None = None  # of `evaluations`


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
    needed = {"metrics", "score", "relative_flops", "kept"}
    try:
        if path.name == "log.jsonl":
            records = [record for _, record in read_log(path)]
            evaluations = [record for record in records if record["event"] == "evaluation"]
            if not evaluations or not all(needed <= set(record) for record in evaluations):
                raise InputError(f"{path}: holds no evaluation yet; train on, or leave it out")
            best = [record for record in evaluations if record.get("saved", True)][-1]
            return Run(name, evaluations, best, records[0].get("thresholds"), task=records[0].get("task"))
        text = path.read_text(encoding="utf-8")
        first = json.loads(text.split("\n", 1)[0] if text.startswith('{"') else text)
        if "method" in first:
            return Run(name, [], None, cells=read_results(path))
        if needed <= set(first):
            return Run(name, [first], first, task=first.get("task"))
        answers = [json.loads(line) for line in text.split("\n") if line.strip()]
        if not all({"kept", "tokens"} <= set(record) for record in answers):
            raise InputError(f"{path}: neither the result of `eval --json` nor answers of `predict` with their tokens")
        tokens, kept = (np.array([record[key] for record in answers], dtype=np.int64) for key in ("tokens", "kept"))
        return Run(name, [], None, lengths=tokens, kept=kept)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file or folder") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        raise InputError(
            f"{path}: not what `plot` reads, a run's or a sweep's folder or a file of `eval --json` or `predict` "
            f"({type(error).__name__}: {reason})"
        ) from None


def read_runs(paths: list[Path]) -> list[Run]:
    """The runs, each named by as much of the end of its path as tells it from the others. Raises: InputError."""
    parts = [Path(re.sub(r"\.jsonl?$", "", os.path.abspath(path))).parts for path in paths]
    names = [os.path.join(*place) for place in parts]
    for count in range(1, max(map(len, parts))):
        short = [os.path.join(*place[-count:]) for place in parts]
        if len(set(short)) == len(set(names)):
            names = short
            break
    return [read_run(path, name) for path, name in zip(paths, names)]


# ----------------------------------------------------------------------------------------------------------------------
# Plots

# Okabe and Ito's colours, which colour-blind readers tell apart; without their yellow, which white swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def new_figure(rows: int = 1, columns: int = 1, width: float = 6.4, height: float = 4.2) -> tuple[Any, list[Any]]:
    """A figure (sizes in inches, of one panel) and its panels. Raises: InputError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InputError("plot needs matplotlib, which is not installed: pip install matplotlib") from None

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    panels = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, panels


def look_of(index: int) -> dict[str, Any]:
    """Colour and marker of the `index`-th line; beyond the colours, markers go on."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]}


def plot_curves(runs: list[Run]) -> Any:
    """Loss, score, relative FLOPs and thresholds of training runs: over the steps, or, of several runs, the last
    thresholds over the layers."""
    runs = needing(runs, lambda run: run.evaluations and "step" in run.evaluations[0], "run folders")
    figure, panels = new_figure(2, 2, 5.2, 3.4)
    from matplotlib import colormaps

    score = "score: " + score_name(runs[0].evaluations[-1])
    for panel, (key, title) in zip(
        panels, (("train_loss", "training loss"), ("score", score), ("relative_flops", "relative FLOPs"))
    ):
        for i, run in enumerate(runs):
            steps = [record["step"] for record in run.evaluations]
            panel.plot(steps, [record[key] for record in run.evaluations], label=run.name, markersize=4, **look_of(i))
        panel.set(title=title, xlabel="step")
        panel.set_xlim(left=0)
    panels[2].set_ylim(0, 1.05)
    low, high = panels[1].get_ylim()
    wide = max(high - low, 0.05)  # or a difference that means nothing would look large
    panels[1].set_ylim((low + high - wide) / 2, (low + high + wide) / 2)
    learned = [(i, run) for i, run in enumerate(runs) if run.evaluations[-1].get("thresholds")]
    last = panels[3]
    if len(runs) == 1 and learned:
        steps = [record["step"] for record in runs[0].evaluations]
        values = [record["thresholds"] for record in runs[0].evaluations]
        if runs[0].start:
            steps, values = [0, *steps], [runs[0].start, *values]
        for l, column in enumerate(zip(*values), 1):
            shade = colormaps["viridis"](0.9 * (l - 1) / max(1, len(values[0]) - 1))  # violet to green, none too pale
            last.plot(steps, column, color=shade, label=f"layer {l}", marker=look_of(l)["marker"], markersize=4)
        last.set(title="thresholds", xlabel="step")
        last.set_xlim(left=0)
        last.legend(fontsize="small", ncols=2 if len(values[0]) > 8 else 1, loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        for i, run in learned:
            values = run.best["thresholds"]
            last.plot(range(1, len(values) + 1), values, markersize=4, **look_of(i))
        last.set(title="thresholds" if learned else "no thresholds in these runs", xlabel="layer")
        last.xaxis.get_major_locator().set_params(integer=True)
    if len(runs) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(runs)), frameon=False)
    return figure


def plot_kept(runs: list[Run]) -> Any:
    """Share of the tokens that leaves each layer; for `predict` files the median text, and the middle 90% as a band."""
    runs = needing(runs, lambda run: run.best or run.kept is not None, "runs, results of `eval --json` and answers")
    figure, (panel,) = new_figure()
    depth = 0
    for i, run in enumerate(runs):
        if run.kept is not None:
            shares = np.concatenate([np.ones((1, len(run.kept))), (run.kept / run.lengths[:, None]).T])  # (L + 1, N)
            low, middle, high = np.quantile(shares, (0.05, 0.5, 0.95), axis=1)
            panel.fill_between(range(len(middle)), low, high, color=look_of(i)["color"], alpha=0.18, linewidth=0)
            label = f"{run.name} (median, 5 to 95%)"
        else:
            middle, label = [1.0, *run.best["kept"]], run.name
        panel.plot(range(len(middle)), middle, label=label, markersize=5, **look_of(i))
        depth = max(depth, len(middle) - 1)
    panel.set(
        xlabel="after layer", ylabel="share of the tokens left", ylim=(0, 1.05), title="Tokens kept in each layer"
    )
    panel.set_xticks(range(depth + 1), ["input", *map(str, range(1, depth + 1))])
    panel.legend(frameon=False)
    return figure


def plot_lengths(runs: list[Run]) -> Any:
    """How many tokens leave the last layer against how many entered the first: a heat map of a `predict` file's texts.

    Where the last layers leave every text its first token alone, the one before them is shown.
    """
    runs = needing(runs, lambda run: run.kept is not None, "answers of `predict`")
    columns = min(3, len(runs))
    figure, panels = new_figure(math.ceil(len(runs) / columns), columns, 5.0, 4.2)
    from matplotlib.colors import LogNorm

    longest = int(max(run.lengths.max() for run in runs))
    layer = max([l for run in runs for l in range(run.kept.shape[1]) if run.kept[:, l].max() > 1], default=0)
    layer = min(layer, *(run.kept.shape[1] - 1 for run in runs))
    most = int(max(run.kept[:, layer].max() for run in runs))
    edges = [np.arange(0.5, top + math.ceil(top / 40) + 0.5, math.ceil(top / 40)) for top in (longest, most)]
    counts = [np.histogram2d(run.lengths, run.kept[:, layer], edges)[0] for run in runs]
    highest = max(2, max(count.max() for count in counts))
    norm = LogNorm(0.4, highest)  # from below 1: a single text is to be seen on white
    for panel, run, count in zip(panels, runs, counts):
        mesh = panel.pcolormesh(*edges, np.ma.masked_equal(count.T, 0), norm=norm, cmap="Blues")
        panel.plot(
            [0, edges[1][-1]], [0, edges[1][-1]], color="#666666", linestyle="--", linewidth=1, label="none dropped"
        )
        panel.legend(loc="lower right", frameon=False, fontsize="small")
        panel.set(title=run.name, xlim=(0, edges[0][-1]), ylim=(0, edges[1][-1]))
        last = layer + 1 == run.kept.shape[1]
        where = "the last layer" if last else f"layer {layer + 1}"
        panel.set(xlabel="tokens of the text", ylabel=f"tokens leaving {where}")
        panel.yaxis.get_major_locator().set_params(integer=True)
    for panel in panels[len(runs) :]:
        panel.set_visible(False)
    bar = figure.colorbar(mesh, ax=panels, label="texts", format="{x:g}")
    bar.ax.set_ylim(1, highest)
    return figure


def plot_tradeoff(runs: list[Run]) -> Any:
    """The task's first metric that all runs have, against relative FLOPs; an accuracy with its standard error."""
    runs = needing(runs, lambda run: run.best, "run folders and results of `eval --json`")
    tasks = dict.fromkeys(run.task for run in runs if run.task)
    if len(tasks) > 1:
        names = " and ".join("your own data" if task == "custom" else task for task in tasks)
        raise InputError(f"this kind of plot compares models on one task, not on {names}; plot each apart")
    shared = [name for name in runs[0].best["metrics"] if all(name in run.best["metrics"] for run in runs)]
    metric = shared[0] if shared else "score"
    figure, (panel,) = new_figure()
    for i, run in enumerate(runs):
        value = run.best["metrics"].get(metric, run.best["score"])
        error = standard_error(metric, value, run.best.get("examples"))
        panel.errorbar(
            run.best["relative_flops"],
            value,
            error,
            label=run.name,
            linestyle="",
            markersize=8,
            elinewidth=1,
            **look_of(i),
        )
        if run.best["relative_flops"] == 1:
            panel.axhline(value, color="#888888", linestyle="--", linewidth=1, zorder=0)
    note = ", bars: one standard error" if metric == "accuracy" else ""
    panel.set(xlabel="relative FLOPs (1: the dense model)", ylabel=f"{metric}{note}", xlim=(0, 1.05))
    figure.legend(loc="outside lower center", ncols=min(4, len(runs)), frameon=False)
    return figure


def standard_error(metric: str, value: float, examples: int | None) -> float | None:
    """Of an accuracy on so many examples; None of other metrics."""
    return math.sqrt(value * (1 - value) / examples) if metric == "accuracy" and examples else None


def score_name(record: dict[str, Any]) -> str:
    """Which metrics an evaluation's score is.

    >>> score_name({"score": 0.5, "metrics": {"accuracy": 0.5, "f1": 0.6}})
    'accuracy'
    >>> score_name({"score": 0.5, "metrics": {"pearson": 0.4, "spearman": 0.6}})
    'mean of pearson and spearman'
    """
    same = [name for name, value in record["metrics"].items() if math.isclose(value, record["score"])]
    return same[0] if same else "mean of " + " and ".join(record["metrics"])


METHOD_NAMES = {"ltp": "LTP", "manual": "manual thresholds", "topk": "top-k"}


def plot_frontier(runs: list[Run]) -> Any:
    """Results of `sweep`, a panel each: the task's first metric against relative FLOPs, a line for each way of training
    through its means over seeds, small marks for single runs, and the dense model's value across, of an accuracy with
    its standard error as a band. What lies far below stands at the bottom with its value."""
    runs = needing(runs, lambda run: run.cells and run.cells[0]["method"] == "dense", "results of `sweep`")
    figure, panels = new_figure(1, len(runs), 6.4 if len(runs) == 1 else 4.4)
    looks: dict[str, dict[str, Any]] = {}  # by label, the same in all panels
    for panel, run in zip(panels, runs):
        dense, *pruned = run.cells
        metric = next(iter(dense["metrics"]))
        top = dense["metrics"][metric]
        panel.axhline(top, color="#888888", linestyle="--", linewidth=1, label="dense", zorder=0)
        error = standard_error(metric, top, dense.get("examples"))
        if error:
            panel.axhspan(top - error, top + error, color="#888888", alpha=0.12, linewidth=0, label="dense ± 1 SE")
        floor = top - abs(top) / 4
        pruned.sort(key=lambda row: [*METHOD_NAMES].index(row["method"]))
        mixed = len({row["distilled"] for row in pruned}) > 1
        # A line for each way of training, a point on it for each budget (or λ), over seeds.
        lines: dict[str, dict[Any, list[tuple[float, float]]]] = {}
        for row in pruned:
            label = METHOD_NAMES[row["method"]] + (", not distilled" if mixed and not row["distilled"] else "")
            for axis, sign in (
                ("temperature", "τ"),
                ("threshold_learning_rate", "rate of θ"),
                ("learning_rate", "rate"),
            ):
                varies = len({other.get(axis) for other in pruned if other["method"] == row["method"]}) > 1
                label += f", {sign} {row[axis]:g}" if varies and axis in row else ""
            points = lines.setdefault(label, {}).setdefault((row.get("target_flops"), row.get("regularization")), [])
            points.append((row["relative_flops"], row["metrics"][metric]))
        for label, groups in lines.items():
            look = looks.setdefault(label, look_of(len(looks)))
            means = sorted(tuple(np.mean(points, 0)) for points in groups.values())
            panel.plot(*zip(*((x, max(y, floor)) for x, y in means)), label=label, markersize=7, **look)
            for x, y in means:
                if y < floor:
                    panel.annotate(f"{y:.2f} ↓", (x, floor), (9, -3), textcoords="offset points", size="small")
            single = [point for points in groups.values() if len(points) > 1 for point in points]
            if single:
                panel.plot(*zip(*single), linestyle="", markersize=3, alpha=0.6, **look)
        panel.set(xlabel="relative FLOPs (1: the dense model)", ylabel=metric, xlim=(0, 1.05))
        panel.set_ylim(min(panel.get_ylim()[0], top - abs(top) / 10))  # or a small difference would look large
        panel.set_title(run.name if len(runs) > 1 else "")
    shown = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels())}
    wide = len(runs) > 1 or len(shown) < 5
    figure.legend(
        shown.values(), shown, loc="outside lower center", ncols=min(6, len(shown)) if wide else 2, frameon=False
    )
    return figure


PLOTS: dict[str, Callable[[list[Run]], Any]] = {
    "curves": plot_curves,
    "kept": plot_kept,
    "lengths": plot_lengths,
    "tradeoff": plot_tradeoff,
    "frontier": plot_frontier,
}


def needing(runs: list[Run], fits: Callable[[Run], Any], what: str) -> list[Run]:
    """The runs themselves. Raises: InputError naming the first that lacks what the plot shows."""
    for run in runs:
        if not fits(run):
            raise InputError(f"{run.name}: this kind of plot shows {what}; pass another --kind")
    return runs


def natural_kind(runs: list[Run]) -> str:
    """What a reader wants to see first: curves of one run, a trade-off of several, lengths of texts, a sweep's frontier."""
    if any(run.cells for run in runs):
        return "frontier"
    if any(run.kept is not None for run in runs):
        return "lengths" if all(run.kept is not None for run in runs) else "kept"
    return "curves" if len(runs) == 1 and "step" in runs[0].evaluations[0] else "tradeoff"


def save_figure(figure: Any, path: Path, format: str) -> None:
    """Writes "png" or "svg", in an SVG with text as text; the same figure gives the same bytes."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "ltp"}):
        figure.savefig(path, format=format, dpi=160, metadata={"Date": None} if format == "svg" else {"Software": None})
