"""The grid: its cells, that each is what its own commands train, and that a second call trains nothing twice."""

import json
import shlex

import pytest
from click.testing import CliRunner

from data import InputError
from ltp import main
from model import load_model
from sweep import Cell, grid_cells, read_results


def test_a_grid_has_every_point_once():
    cells = grid_cells(["ltp", "topk"], {"target_flops": [0.8, 0.5, 0.3], "temperature": [1e-3, 1e-4]}, lowest_topk=0.6)
    assert [cell.name for cell in cells] == [
        *(f"ltp-target-flops-{t}-temperature-{τ}" for t in (0.8, 0.5, 0.3) for τ in (0.001, 0.0001)),
        "topk-target-flops-0.8",
        "topk-target-flops-0.6",  # for 0.5 and for 0.3
    ]
    assert grid_cells(["manual"], {"regularization": [0.1, 0.2]}, None) == [Cell("manual", ())]


@pytest.fixture(scope="module")
def dense(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "dense"
    run(
        "finetune",
        "--restore",
        demo / "model",
        "--data",
        demo / "data",
        "--epochs",
        2,
        "--lr",
        1e-3,
        "--output",
        folder,
    )
    return folder


def run(*words):
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


def test_a_sweep_trains_its_cells_as_their_commands_do_and_none_twice(demo, dense, tmp_path):
    pytest.importorskip("matplotlib")
    command = [
        "sweep",
        "--restore",
        dense,
        "--data",
        demo / "data",
        "--distill",
        dense,
        "--epochs",
        1,
        "--adapt-epochs",
        1,
    ]
    command += ["--target-flops", 0.7, "--batch-size", 16, "--lr", 1e-3, "--output", tmp_path / "out"]
    first = run(*command, "--method", "ltp", "--no-speed")
    rows = read_results(tmp_path / "out" / "results.jsonl")
    assert [row["method"] for row in rows] == ["dense", "ltp"]
    assert rows[0]["relative_flops"] == 1 and rows[1]["relative_flops"] == pytest.approx(0.7, abs=0.06)
    assert rows[1]["soft"]["soft_relative_flops"] > 0 and rows[1]["distilled"]
    png = (tmp_path / "out" / "frontier.png").read_bytes()
    assert png.startswith(b"\x89PNG") and "ltp-target-flops-0.7" in first.stdout

    # The commands that the results tell, run by hand, leave the same weights.
    wanted = load_model(rows[1]["folder"]).model.state_dict()
    assert len(rows[1]["commands"]) == 2
    for text in rows[1]["commands"]:
        words = shlex.split(text)[2:]
        words[words.index("--output") + 1] = str(tmp_path / words[0])
        words[words.index("--restore") + 1] = str(dense if words[0] == "soft" else tmp_path / "soft")
        run(*words)
    for name, tensor in load_model(tmp_path / "hard").model.state_dict().items():
        assert tensor.equal(wanted[name]), name

    # A larger grid keeps what is there; speeds come at the end.
    before = (
        (tmp_path / "out" / "ltp-target-flops-0.7-lr-0.001-distilled" / "hard" / "model.safetensors").stat().st_mtime_ns
    )
    again = run(*command)
    assert (
        tmp_path / "out" / "ltp-target-flops-0.7-lr-0.001-distilled" / "hard" / "model.safetensors"
    ).stat().st_mtime_ns == before
    rows = read_results(tmp_path / "out" / "results.jsonl")
    assert [row["method"] for row in rows] == ["dense", "ltp", "manual", "topk"]
    assert all(set(row["speedup"]) == {"1", "32"} for row in rows[1:]) and "top-k does not prune" in again.stderr

    # Other settings under the same names are no silent skip.
    changed = CliRunner().invoke(main, [str(word) for word in [*command, "--seed", 42, "--adapt-epochs", 2]])
    assert changed.exit_code == 0  # --seed makes other cells
    wrong = CliRunner().invoke(main, [str(word) for word in [*command, "--adapt-epochs", 2]])
    assert wrong.exit_code == 2 and "was started with epochs = 1.0, not 2.0; use the same" in wrong.stderr
    shorter = CliRunner().invoke(main, [str(word) for word in [*command, "--max-length", 20, "--no-speed"]])
    assert shorter.exit_code == 2 and shorter.stderr.strip().endswith("use the same options")

    for option, value, name, found in (
        ("--precision", "bf16", "precision", "fp32"),
        ("--restore", tmp_path / "hard", "folder", dense),
    ):
        other = CliRunner().invoke(main, [str(word) for word in [*command, "--no-speed", option, value]])
        assert other.exit_code == 2 and f"begun with {name} = {found}, not {value}; choose" in other.stderr

    # A smaller grid takes nothing away.
    run(*command, "--method", "manual", "--no-speed")
    assert len(read_results(tmp_path / "out" / "results.jsonl")) == len(rows) + 3  # and those of --seed 42

    # What it left can be drawn again, beside others, with one legend.
    run("plot", tmp_path / "out", tmp_path / "out" / "results.jsonl", "--output", tmp_path / "both.svg")
    drawn = (tmp_path / "both.svg").read_text()
    assert drawn.count("LTP") == 1 and drawn.count("relative FLOPs (1: the dense model)") == 2
    command = ["plot", str(tmp_path / "out"), "--output", str(tmp_path / "no.png"), "--kind", "kept"]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 2 and "this kind of plot shows runs" in refused.stderr


def test_a_target_and_a_lambda_are_one_too_many(dense, demo, tmp_path):
    words = ["sweep", "--restore", dense, "--data", demo / "data", "--lambda", 0.1, "--target-flops", 0.5]
    result = CliRunner().invoke(main, [str(word) for word in [*words, "--output", tmp_path]])
    assert result.exit_code == 2 and "--target-flops or --lambda" in result.stderr


def test_damaged_results_are_one_line(tmp_path):
    (tmp_path / "results.jsonl").write_text(json.dumps({"name": "x"}) + "\n")
    with pytest.raises(InputError, match="line 1: not a record"):
        read_results(tmp_path / "results.jsonl")
