"""Plots: what is read from files, what is drawn, and one clear line for what cannot be."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from runs.stage import evaluate_checkpoint
from support.errors import InputError
from support.process import Process
from tools.plot import (
    COLOURS,
    PLOTS,
    Run,
    natural_kind,
    plot_bops,
    plot_curves,
    plot_frontier,
    plot_kept,
    plot_lengths,
    plot_tradeoff,
    read_runs,
    save_figure,
)

ROOT = Path(__file__).parents[2]


def texts_of(svg: Path) -> set[str]:
    tree = ElementTree.parse(svg)
    return {"".join(node.itertext()).strip() for node in tree.iter("{http://www.w3.org/2000/svg}text")}


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(runs, source, tmp_path_factory) -> Path:
    """What `eval --json` writes."""
    file = tmp_path_factory.mktemp("plain") / "plain.json"
    evaluation, _, _ = evaluate_checkpoint(runs / "dense", source, Process())
    file.write_text(json.dumps({"task": "custom"} | asdict(evaluation), indent=2))
    return file


CURVES = {"training loss", "score: accuracy", "relative FLOPs", "thresholds"}


@pytest.mark.parametrize(
    "names, kind, words",
    [
        (["soft"], "curves", CURVES | {"layer", "4", "step"}),
        (["soft", "plain"], "tradeoff", {"soft", "plain", "relative FLOPs (1: the dense model)"}),
        (["answers"], "lengths", {"tokens of the text", "none dropped", "answers"}),
        (["answers", "soft"], "kept", {"answers (median, 5 to 95%)", "soft", "input", "4"}),
    ],
)
def test_files_are_drawn(runs, plain, tmp_path, names, kind, words):
    paths = {"soft": runs / "soft", "plain": plain, "answers": runs / "answers.jsonl"}
    for name in ("one.svg", "two.svg"):
        records = read_runs([paths[name] for name in names])
        assert natural_kind(records) == kind
        save_figure(PLOTS[kind](records), tmp_path / name, "svg")
    assert words <= texts_of(tmp_path / "one.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_curves_of_several_runs_have_a_legend_and_thresholds_by_layer(runs, tmp_path):
    save_figure(plot_curves(read_runs([runs / "soft", runs / "dense"])), tmp_path / "p.svg", "svg")
    assert CURVES | {"soft", "dense", "layer"} <= texts_of(tmp_path / "p.svg")


@pytest.mark.parametrize("name", ["_run", "a$b_$c"])
def test_any_name_is_shown_as_it_is(plain, tmp_path, name):
    shutil.copy(plain, tmp_path / f"{name}.json")
    save_figure(plot_tradeoff(read_runs([tmp_path / f"{name}.json"])), tmp_path / "p.svg", "svg")
    assert name in texts_of(tmp_path / "p.svg")


def test_png_has_the_size_of_a_picture(runs, tmp_path):
    save_figure(plot_curves(read_runs([runs / "soft"])), tmp_path / "p", "png")
    header = (tmp_path / "p").read_bytes()[:24]
    assert header.startswith(b"\x89PNG") and int.from_bytes(header[16:20], "big") > 1000


def test_answers_may_hold_any_character(tmp_path):
    answer = {"words": ["a\u2028b\x85"], "tokens": 4, "kept": [3, 2]}
    (tmp_path / "answers.jsonl").write_text(2 * (json.dumps(answer, ensure_ascii=False) + "\n"), encoding="utf-8")
    assert read_runs([tmp_path / "answers.jsonl"])[0].lengths.tolist() == [4, 4]


# ---- what is drawn ----


def test_curves_show_the_logs_numbers(runs):
    soft, dense = read_runs([runs / "soft", runs / "dense"])
    start, *log, _ = read_log(runs / "soft")
    panels = plot_curves([soft]).axes
    for panel, key in zip(panels, ("train_loss", "score", "relative_flops")):
        assert list(panel.lines[0].get_xdata()) == [1, 2, 3]
        assert list(panel.lines[0].get_ydata()) == [record[key] for record in log]
    assert start["thresholds"] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert list(panels[3].lines[0].get_xdata()) == [0, 1, 2, 3]
    assert [line.get_ydata()[0] for line in panels[3].lines] == start["thresholds"]
    assert [line.get_ydata()[-1] for line in panels[3].lines] == log[-1]["thresholds"]
    low, high = panels[1].get_ylim()
    best = max(record["score"] for record in log)
    assert low < 0.9 * best and best < high  # a small difference does not look large
    both = plot_curves([soft, dense]).axes[3].lines
    assert len(both) == 1 and list(both[0].get_ydata()) == log[-1]["thresholds"]


def test_tokens_kept_are_those_of_logs_and_answers(runs):
    soft, answers = read_runs([runs / "soft", runs / "answers.jsonl"])
    band, line = plot_kept([answers, soft]).axes[0].lines
    records = [json.loads(line) for line in (runs / "answers.jsonl").read_text().splitlines()]
    shares = [[k / record["tokens"] for k in record["kept"]] for record in records]
    assert list(band.get_ydata()[1:]) == pytest.approx(np.median(shares, 0))
    assert list(line.get_ydata()) == [1.0, *read_log(runs / "soft")[-2]["kept"]]


@pytest.mark.parametrize(
    "change, name",
    [({-1: 2}, "the last layer"), ({2: 2, 3: 1}, "layer 3"), ({0: 1, 1: 1, 2: 1, 3: 1}, "layer 1")],
)
def test_lengths_show_the_last_layer_that_keeps_more_than_one_token(runs, change, name):
    (answers,) = read_runs([runs / "answers.jsonl"])
    kept = answers.kept.copy()
    for l, count in change.items():
        kept[:, l] = count
    panel = plot_lengths([answers._replace(kept=kept)]).axes[0]
    assert panel.collections[0].get_array().sum() == len(kept)
    assert panel.get_ylabel() == f"tokens leaving {name}"


def test_a_trade_off_has_a_point_for_each_run(runs):
    soft, dense = read_runs([runs / "soft", runs / "dense"])
    panel, best = plot_tradeoff([soft, dense]).axes[0], read_log(runs / "soft")[-2]
    points = [(c.lines[0].get_xdata()[0], c.lines[0].get_ydata()[0]) for c in panel.containers]
    assert points[0] == (best["relative_flops"], best["metrics"]["accuracy"]) and points[1][0] == 1.0
    assert [c.lines[0].get_color() for c in panel.containers] == list(COLOURS[:2])
    low, high = plot_tradeoff([evaluation(0.5, None, 0.799), evaluation(1.0, None, 0.8)]).axes[0].get_ylim()
    assert low < 0.72 and high > 0.84
    with pytest.raises(InputError, match="not on MRPC and your own data"):
        plot_tradeoff([soft._replace(task="MRPC"), dense])


def evaluation(flops: float, bops: float | None, accuracy: float, task: str = "MRPC") -> Run:
    record = {"metrics": {"accuracy": accuracy}, "score": accuracy, "relative_flops": flops, "examples": 100}
    record |= {"kept": [flops]} | ({} if bops is None else {"relative_bops": bops})
    return Run("run", [record], record, task=task)


def test_bit_operations_have_a_line_for_float_and_for_int8(tmp_path):
    runs = [evaluation(0.5, None, 0.79), evaluation(1.0, 1.0, 0.8), evaluation(1.0, 0.08, 0.78)]
    runs += [evaluation(0.5, 0.04, 0.77), evaluation(1.0, 1.0, 0.9, task="custom")]
    assert natural_kind(runs) == "bops" and natural_kind(runs[:2]) == "tradeoff"
    panels = plot_bops(runs).axes
    drawn = {line.get_label(): line for line in panels[0].lines}
    points = {label: list(zip(*drawn[label].get_data())) for label in ("float32", "int8")}
    assert points == {"float32": [(0.5, 0.79), (1.0, 0.8)], "int8": [(0.04, 0.77), (0.08, 0.78)]}
    assert list(drawn["dense"].get_ydata()) == [0.8, 0.8] and panels[0].get_xscale() == "log"
    assert sorted(text.get_text() for text in panels[0].texts) == ["0.50", "0.50", "dense", "dense"]
    assert panels[0].get_ylim()[0] < 0.73  # a small difference does not look large
    assert [panel.get_title() for panel in panels] == ["MRPC", "your own data"] and len(panels[1].lines) == 2
    save_figure(plot_bops(runs), tmp_path / "p.svg", "svg")
    assert {"float32", "int8", "dense ± 1 SE", "0.05"} <= texts_of(tmp_path / "p.svg")


def test_bit_operations_need_no_dense_model():
    (panel,) = plot_bops([evaluation(0.5, 0.04, 0.77)]).axes
    assert [line.get_label() for line in panel.lines] == ["int8"]


def test_bit_operations_of_models_with_different_metrics_are_of_their_scores():
    runs = [evaluation(1.0, 1.0, 0.8, task="custom"), evaluation(0.5, 0.04, 0.77, task="custom")]
    runs[0].best["metrics"] = {"f1": 0.9}
    runs[0].best["score"] = 0.6
    (panel,) = plot_bops(runs).axes
    assert panel.get_ylabel() == "score" and panel.lines[0].get_ydata()[0] == 0.6


def test_the_readmes_figure_is_drawn_from_its_records():
    records = read_runs(sorted((ROOT / "benchmarks" / "results" / "bops").glob("*.json")))
    assert natural_kind(records) == "bops"
    for panel in plot_bops(records).axes:
        lines = {line.get_label(): line.get_xdata() for line in panel.lines}
        assert len(lines["float32"]) == len(lines["int8"]) == 3 and max(lines["int8"]) < 0.1


def cell(method: str, share: float, accuracy: float, **settings) -> dict:
    record = {"method": method, "relative_flops": share, "distilled": True, "target_flops": share}
    return record | {"metrics": {"accuracy": accuracy}, "examples": 100} | settings


def test_what_lies_far_below_does_not_stretch_the_frontier():
    cells = [cell("dense", 1.0, 0.8), cell("manual", 0.5, 0.78), cell("ltp", 0.5, 0.79), cell("manual", 0.25, 0.1)]
    panel = plot_frontier([Run("task", [], None, cells=cells)]).axes[0]
    drawn = {line.get_label(): list(line.get_ydata()) for line in panel.lines}
    assert list(drawn) == ["dense", "LTP", "manual thresholds"]
    assert drawn["manual thresholds"] == pytest.approx([0.6, 0.78]) and drawn["LTP"] == [0.79]
    assert [text.get_text() for text in panel.texts] == ["0.10 ↓"] and 0.55 < panel.get_ylim()[0] < 0.6
    band = panel.patches[0].get_extents().transformed(panel.transData.inverted())
    assert (band.y0, band.y1) == pytest.approx((0.76, 0.84))  # one standard error of 100 examples


def test_bars_are_the_intervals_of_the_differences_from_the_dense_model():
    cells = [cell("dense", 1.0, 0.8), cell("ltp", 0.5, 0.79), cell("manual", 0.5, 0.78), cell("topk", 0.6, 0.1)]
    cells[1]["difference"] = {"low": -0.03, "high": 0.01}
    cells[3]["difference"] = {"low": -0.8, "high": -0.6}  # all of it far below
    cells += [cell("manual", 0.7, 0.78, seed=seed) for seed in (1, 2)]  # of two calls, each with its own interval
    cells[4]["difference"] = cells[5]["difference"] = {"low": -0.01, "high": 0.01, "seeds": 1}
    panel = plot_frontier([Run("task", [], None, cells=cells)]).axes[0]
    (bar,) = [c for c in panel.collections if len(c.get_segments())]
    assert bar.get_segments()[0].tolist() == [[0.5, pytest.approx(0.77)], [0.5, pytest.approx(0.81)]]


def test_seeds_are_averaged_and_other_settings_make_lines_of_their_own():
    cells = [cell("dense", 1.0, 0.8)]
    cells += [cell("ltp", 0.5, accuracy, seed=seed, temperature=1e-3) for seed, accuracy in ((1, 0.7), (2, 0.72))]
    cells += [cell("ltp", 0.5, 0.74, seed=1, temperature=5e-4), cell("topk", 0.9, 0.78, distilled=False)]
    panel = plot_frontier([Run("task", [], None, cells=cells)]).axes[0]
    drawn = {line.get_label(): list(line.get_ydata()) for line in panel.lines}
    assert drawn["LTP, τ 0.001"] == pytest.approx([0.71]) and drawn["LTP, τ 0.0005"] == [0.74]
    assert drawn["top-k, not distilled"] == [0.78]
    assert [0.7, 0.72] in [list(line.get_ydata()) for line in panel.lines]  # the single runs, small


def test_a_sweeps_folder_is_read_by_its_results(tmp_path):
    rows = [cell("ltp", 0.5, 0.7, name="a", score=0.7), cell("dense", 1.0, 0.8, name="dense", score=0.8)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in (tmp_path, tmp_path / "results.jsonl"):
        (run,) = read_runs([path])
        assert [row["name"] for row in run.cells] == ["dense", "a"] and natural_kind([run]) == "frontier"


def test_runs_are_named_by_what_differs(runs, tmp_path):
    for name in ("a/hard", "b/hard"):
        shutil.copytree(runs / "soft", tmp_path / name)
    assert [run.name for run in read_runs([tmp_path / "a/hard", tmp_path / "b/hard"])] == ["a/hard", "b/hard"]
    assert read_runs([tmp_path / "a/hard"])[0].name == "hard"


@pytest.mark.parametrize("plot", [plot_curves, plot_kept, plot_tradeoff])
def test_legends_of_many_long_names_stay_inside_the_figure(runs, plot):
    (soft,) = read_runs([runs / "soft"])
    figure = plot([soft._replace(name=f"learned-token-pruning-of-a-large-model-seed-{i}/hard") for i in range(12)])
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0
    assert all(box.y1 < panel.get_window_extent().y0 and panel.bbox.height > 200 for panel in figure.axes)


# ---- what is refused ----


@pytest.mark.parametrize("content", ["{", "[]", '{"kept": [1]}', "", '{"a": 1}\n{"b": 2}', "3"])
def test_files_of_another_kind_are_named(tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(InputError, match="other.json: "):
        read_runs([tmp_path / "other.json"])


def test_missing_files_and_unfinished_runs_are_named(runs, tmp_path):
    with pytest.raises(InputError, match="absent: no such file or folder"):
        read_runs([tmp_path / "absent"])
    with pytest.raises(InputError, match="holds no log.jsonl"):
        read_runs([tmp_path])
    (tmp_path / "log.jsonl").write_text('{"event": "start"}\n')
    with pytest.raises(InputError, match="no evaluation yet"):
        read_runs([tmp_path])


def test_a_kind_that_does_not_fit_is_refused(runs):
    soft, answers = read_runs([runs / "soft", runs / "answers.jsonl"])
    for kind, run in (
        ("lengths", soft),
        ("frontier", soft),
        ("curves", answers),
        ("tradeoff", answers),
        ("bops", answers),
    ):
        with pytest.raises(InputError, match=f"^{run.name}: this kind of plot shows .*; pass another --kind"):
            PLOTS[kind]([run])
