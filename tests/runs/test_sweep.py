"""The grid: its cells, that each is what its own commands train, and that a second call trains nothing twice."""

import json
import os
import shlex
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from stages import stage

from ltp import main
from runs.sweep import Cell, SweepRequest, cell_stages, grid_cells, read_results, run_sweep, speedups, stage_command
from support.checkpoint import load_config, load_model
from support.errors import InputError, Interrupted
from support.process import Process
from support.settings import Settings, flag, soft_target


def test_a_grid_has_every_point_once():
    cells = grid_cells(["ltp", "topk"], {"target_flops": [0.8, 0.5, 0.3], "temperature": [1e-3, 1e-4]}, lowest_topk=0.6)
    assert [cell.name for cell in cells] == [
        *(f"ltp-target-flops-{t}-temperature-{τ}" for t in (0.8, 0.5, 0.3) for τ in (0.001, 0.0001)),
        "topk-target-flops-0.8",
        "topk-target-flops-0.6",  # for 0.5 and for 0.3
    ]
    assert grid_cells(["manual"], {"regularization": [0.1, 0.2]}, None) == [Cell("manual", ())]


@pytest.fixture(scope="module")
def dense(demo, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "dense"
    stage(source, "finetune", demo / "model", folder, epochs=2, batch_size=32)
    return folder


def test_cells_have_the_settings_of_their_commands(source, dense, tmp_path):
    point = (("target_flops", 0.5), ("temperature", 3e-3), ("learning_rate", 1e-4))
    request = SweepRequest(dense, source, ["ltp"], {}, tmp_path, epochs=2.0, batch_size=8)
    config = replace(load_config(dense), score_norm="length")
    soft, hard = cell_stages(Cell("ltp", point), request, config)
    assert soft.settings == Settings(
        **soft_target(128, "length")
        | {"temperature": 3e-3, "target_flops": 0.5, "learning_rate": 1e-4, "epochs": 2.0, "batch_size": 8}
        | {"load_best": False}
    )
    assert hard.settings == Settings(target_flops=0.5, learning_rate=1e-4, epochs=5.0, batch_size=8)
    assert hard.restore == soft.output == tmp_path / Cell("ltp", point).name / "soft" and not soft.resume
    soft.output.mkdir(parents=True)  # of a sweep that was stopped
    assert cell_stages(Cell("ltp", point), request, config)[0].resume
    words = shlex.split(stage_command(soft, config, Process(precision="bf16")))
    assert words[:3] == ["python", "ltp.py", "soft"] and words[words.index("--temperature") + 1] == "0.003"
    usual = {"--lr-threshold", "--temperature-end", "--mask-attention", flag("mask_attention")}  # the target's own
    assert usual.isdisjoint(words)
    assert words[words.index("--precision") + 1] == "bf16" and words[-2:] == ["--output", str(soft.output)]
    assert soft.options.read_dropped is None and "--ignore-dropped" not in words
    soft, hard = cell_stages(Cell("ltp", point), replace(request, read_dropped=False), config)
    assert soft.options.read_dropped is False and hard.options.read_dropped is None
    assert "--ignore-dropped" in stage_command(soft, config, Process())


def test_a_sweep_measures_each_model_once(source, dense, tmp_path):
    measured, lines = [], []

    def measure(folder: Path) -> dict:
        measured.append(folder)
        return {"speeds": [{"batch_size": 1, "speedup": 1.5}, {"batch_size": 32, "speedup": 2.0}]}

    grid = {"learning_rate": [1e-3], "seed": [1, 2]}
    request = SweepRequest(dense, source, ["manual"], grid, tmp_path, adapt_epochs=0.1, batch_size=16)
    rows = run_sweep(request, measure=measure, show=lines.append)
    names = [f"manual-lr-0.001-seed-{seed}" for seed in (1, 2)]
    assert [row["name"] for row in rows] == ["dense", *names]
    assert measured == [tmp_path / name / "manual" for name in names]
    assert all(row["speedup"] == {"1": 1.5, "32": 2.0} for row in rows[1:]) and "speedup" not in rows[0]
    assert read_results(tmp_path / "results.jsonl") == json.loads(json.dumps(rows))
    difference = rows[1]["difference"]  # of the mean of both seeds from the dense model
    accuracies = [row["metrics"]["accuracy"] for row in rows]
    assert difference["mean"] == pytest.approx(sum(accuracies[1:]) / 2 - accuracies[0])
    assert difference["low"] <= difference["mean"] <= difference["high"] and "difference" not in rows[0]
    assert rows[2]["difference"] == difference and difference["metric"] == "accuracy" and difference["seeds"] == 2
    assert list(rows[1])[:6] == ["name", "method", "folder", "learning_rate", "seed", "distilled"]
    run_sweep(request, measure=measure)
    assert len(measured) == 2
    (tmp_path / names[0] / "manual" / "speed.json").unlink()
    run_sweep(request, measure=measure)
    assert len(measured) == 3
    (tmp_path / names[0] / "manual" / "speed.json").unlink()
    first, second = run_sweep(request)[1:]  # without `measure` there are no new speeds, and the old ones stay
    assert "speedup" not in first and second["speedup"] == {"1": 1.5, "32": 2.0}


def test_a_stopped_sweep_goes_on_with_the_same_command(source, dense, tmp_path):
    request = SweepRequest(dense, source, ["manual"], {}, tmp_path, adapt_epochs=0.3, batch_size=16)

    def stop(step, **state):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped after step 2 of 3; the same command goes on") as caught:
        run_sweep(request, progress=stop)
    assert caught.value.number == signal.SIGTERM
    assert [row["name"] for row in run_sweep(request)] == ["dense", "manual"]


def run(*words):
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


def refused(*words) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 2, result.output
    return result.stderr.strip()


def test_a_sweep_trains_its_cells_as_their_commands_do_and_none_twice(demo, dense, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "about food : it was bright ."}\n' * 20)
    command = ["sweep", "--restore", dense, "--data", demo / "data", "--distill", dense, "--distill-data", texts]
    command += ["--epochs", 1, "--adapt-epochs", 1]
    command += ["--target-flops", 0.7, "--batch-size", 16, "--lr", 1e-3, "--output", tmp_path / "out"]
    first = run(*command, "--method", "ltp", "--no-speed")
    rows = read_results(tmp_path / "out" / "results.jsonl")
    assert [row["method"] for row in rows] == ["dense", "ltp"]
    assert rows[0]["relative_flops"] == 1 and rows[1]["relative_flops"] == pytest.approx(0.7, abs=0.06)
    assert all(row["relative_bops"] == row["relative_flops"] for row in rows) and "BOPs" not in first.stdout
    assert rows[1]["soft"]["soft_relative_flops"] > 0 and rows[1]["distilled"]
    png = (tmp_path / "out" / "frontier.png").read_bytes()
    assert png.startswith(b"\x89PNG") and "ltp-target-flops-0.7" in first.stdout

    # The commands that the results name, run by hand, leave the same weights.
    expected = load_model(rows[1]["folder"]).model.state_dict()
    assert len(rows[1]["commands"]) == 2
    for text in rows[1]["commands"]:
        words = shlex.split(text)[2:]
        words[words.index("--output") + 1] = str(tmp_path / words[0])
        words[words.index("--restore") + 1] = str(dense if words[0] == "soft" else tmp_path / "soft")
        run(*words)
    for name, tensor in load_model(tmp_path / "hard").model.state_dict().items():
        assert tensor.equal(expected[name]), name

    # A larger grid keeps what is there; speeds come at the end.
    weights = tmp_path / "out" / "ltp-target-flops-0.7-lr-0.001-distilled" / "hard" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    again = run(*command)
    assert weights.stat().st_mtime_ns == before
    rows = read_results(tmp_path / "out" / "results.jsonl")
    assert [row["method"] for row in rows] == ["dense", "ltp", "manual", "topk"]
    assert all(set(row["speedup"]) == {"1", "32"} for row in rows[1:]) and "top-k does not prune" in again.stderr

    # Other settings under the same names are no silent skip; --seed makes other cells.
    run(*command, "--seed", 42, "--adapt-epochs", 0.2, "--method", "manual", "--no-speed")
    wrong = refused(*command, "--adapt-epochs", 2)
    assert "was started with epochs = 1.0, not 2.0; use the same" in wrong
    for option, value, name, there in (
        ("--max-length", 20, "max_seq_length", None),
        ("--precision", "bf16", "precision", "fp32"),
        ("--restore", tmp_path / "hard", "folder", dense),
    ):
        message = f"begun with {name} = {there}, not {value}; choose"
        assert message in refused(*command, "--no-speed", option, value)

    # A smaller grid takes nothing away.
    run(*command, "--method", "manual", "--no-speed")
    assert len(read_results(tmp_path / "out" / "results.jsonl")) == len(rows) + 1  # and that of --seed 42


def test_a_target_and_a_lambda_are_one_too_many(dense, demo, tmp_path):
    words = ["sweep", "--restore", dense, "--data", demo / "data", "--lambda", 0.1, "--target-flops", 0.5]
    assert "--target-flops or --lambda" in refused(*words, "--output", tmp_path)


def test_damaged_results_are_one_line(tmp_path):
    results = tmp_path / "results.jsonl"
    for text, message in (
        (json.dumps({"name": "x"}), "line 1: not a record"),
        ("{", "not the results of `sweep`"),
        ("3", "not the results of `sweep`"),
    ):
        results.write_text(text + "\n")
        with pytest.raises(InputError, match=message):
            read_results(results)


def test_a_damaged_speed_is_one_line(tmp_path):
    for text in ("", "{}", "[]", '{"speeds": [{"batch_size": 1}]}'):
        (tmp_path / "speed.json").write_text(text)
        with pytest.raises(InputError, match="speed.json: damaged .*; remove it to measure again"):
            speedups({"folder": str(tmp_path)}, measure=None, show=None)
