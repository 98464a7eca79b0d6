"""The benchmark behind the tables: what it trains, what it keeps of earlier calls, and the differences it prints."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import frontier  # noqa: E402

CELLS = ["dense", "ltp-0.5-0.5", "topk-0.5", "random-0.5", "restarted-0.5", "frozen-0.5", "shallow-1+2"]


def run(*words: object) -> list[str]:
    """The lines that a command prints."""
    result = CliRunner().invoke(frontier.main, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory):
    """The options for the demo's data, and the files of seeds 3 and 4. The models of seed 3 are kept."""
    folder = tmp_path_factory.mktemp("frontier")
    data = ["--data", demo / "data", "--restore", demo / "model"]
    short = ["--lr", 1e-3, "--target-flops", 0.5, "--dense-epochs", 1, "--epochs", 1, "--soft-epochs", 0.5]
    train = ["train", *data, *short, "--output", folder]
    for method in ("ltp", "topk", "random", "restarted", "frozen", "shallow"):
        run(*train, "--seed", 3, "--keep-models", "--layers", "1+2", "--method", method)
    run(*train, "--seed", 4, "--method", "ltp", "--method", "longer")
    more = ["--layers", "1+2+3", "--method", "shallow-ltp-more", "--distill-data", demo / "data" / "train.jsonl"]
    run(*train, "--seed", 4, *more)
    assert run(*train, "--seed", 3, "--method", "ltp", "--method", "random") == []  # nothing is trained twice
    return data, [folder / f"data-{seed}.jsonl" for seed in (3, 4)]


def records_of(path: Path) -> dict[str, dict]:
    return {record["name"]: record for record in frontier.read_records(path)}


def test_the_methods_cost_what_they_are_compared_at(trained):
    records = records_of(trained[1][0])
    assert list(records) == CELLS
    assert records["dense"]["relative_flops"] == 1 and records["shallow-1+2"]["relative_flops"] == 0.5
    assert records["ltp-0.5-0.5"]["relative_flops"] == pytest.approx(0.5, abs=0.03)
    assert records["random-0.5"]["kept"] == records["topk-0.5"]["kept"]
    assert records["topk-0.5"]["kept"] == pytest.approx(records["ltp-0.5-0.5"]["kept"], abs=0.05)
    fewer = records_of(trained[1][1])["shallow-ltp-more-1+2+3-0.5-0.5"]
    assert fewer["relative_flops"] == pytest.approx(0.5, abs=0.03) and len(fewer["kept"]) == 3


def test_only_ltp_changes_the_ratios_of_the_thresholds(trained):
    records = records_of(trained[1][0])
    ratios = {name: [t / record["thresholds"][0] for t in record["thresholds"]] for name, record in records.items()}
    assert ratios["restarted-0.5"] == pytest.approx(ratios["frozen-0.5"], rel=1e-4)
    assert ratios["ltp-0.5-0.5"] != pytest.approx(ratios["frozen-0.5"], rel=1e-4)
    restarted, frozen = records["restarted-0.5"], records["frozen-0.5"]
    assert restarted["relative_flops"] != frozen["relative_flops"]  # soft masks gave weights that choose other tokens


def test_speeds_of_models_that_are_gone_stay(trained):
    data, (file, _) = trained
    frontier.speed_file(file).write_text(json.dumps({"topk-0.25": {"32": 3.0}, "topk-0.5": {"32": 9.0}}))
    run("speed", *data, file, "--examples", 8, "--repeats", 1)
    speeds = frontier.read_speeds(file)
    assert sorted(speeds) == sorted([*CELLS, "topk-0.25"])
    assert speeds["topk-0.25"] == {"32": 3.0} and speeds["topk-0.5"].keys() == {"32", "1"}
    assert speeds["topk-0.5"]["32"] != 9.0


def test_differences_are_over_the_seeds_that_have_both(demo, tmp_path):
    labels = [json.loads(line)["label"] for line in (demo / "data" / "dev.jsonl").read_text().splitlines()]
    right = [sorted(set(labels)).index(label) for label in labels]
    assert len(right) == 41

    def record(method: str, wrong: int, **cell: object) -> str:
        answers = [1 - answer if i < wrong else answer for i, answer in enumerate(right)]
        metrics = {"accuracy": 1 - wrong / 41, "macro_f1": 0.5}
        cost = {"relative_flops": cell.get("target", 1.0), "epochs": 4.0}
        return (
            json.dumps({"name": method, "method": method, "answers": answers, "metrics": metrics} | cost | cell) + "\n"
        )

    files = [tmp_path / f"data-{seed}.jsonl" for seed in (3, 4)]
    ltp = {"target": 0.5, "soft_epochs": 2.0}
    files[0].write_text(record("dense", 1) + record("ltp", 11, **ltp) + record("topk", 6, target=0.5))
    files[1].write_text(record("dense", 0) + record("ltp", 20, **ltp) + record("longer", 2))
    data = ["--data", demo / "data", "--restore", demo / "model"]
    table = [
        line.strip("|").split("|")
        for line in run("compare", *data, "--against", "ltp", "--against", "longer", *files)[4:]
    ]
    rows = {name.strip(): [cell.strip() for cell in cells] for name, *cells in table}
    assert [rows[name][0] for name in ("dense", "ltp", "topk", "longer")] == ["3, 4", "3, 4", "3", "4"]
    assert rows["ltp"][1].startswith("62.2 / ")  # 30 and 21 of 41
    ltp_less_ltp, ltp_less_longer = rows["ltp"][4:]
    topk_less_ltp, topk_less_longer = rows["topk"][4:]
    assert ltp_less_ltp == topk_less_longer == ""  # itself; no seed has both
    assert topk_less_ltp.startswith("+12.2 [")  # 35 less 30 of 41, of seed 3
    assert ltp_less_longer.startswith("-43.9 [")  # 21 less 39 of 41, of seed 4
    low, high = map(float, topk_less_ltp[7:-1].split(", "))
    assert 0 <= low < 12.2 < high


def test_the_figure_is_drawn(trained, tmp_path):
    run("draw", "--output", tmp_path / "frontier.png", *trained[1])
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_are_printed_as_ranges():
    assert frontier.ranges([46, 42, 45, 44]) == "42, 44-46" and frontier.ranges([43, 44]) == "43, 44"
