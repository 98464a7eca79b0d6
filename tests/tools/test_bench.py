"""Speed: what is counted is exact, what is timed belongs together, and the conditions say what was measured."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import pruning_model, random_sequences, small_model

from data import Examples, sorted_batches
from model import Hard, UnscoredLastLayer, pack
from support.checkpoint import load_model, save_model
from support.errors import InputError
from support.onnx_file import open_file
from support.process import Process
from tools import bench
from tools.bench import BenchOptions, bench_checkpoint, measure_speed
from tools.export import export_checkpoint
from train import relative_flops


def examples(sequences: list[list[int]]) -> Examples:
    token_ids = np.concatenate(sequences).astype(np.int32)
    lengths = np.array([len(ids) for ids in sequences])
    return Examples(token_ids, np.zeros(len(token_ids), dtype=np.int8), lengths, np.empty(0))


@pytest.mark.parametrize("mode", ["absolute_threshold", "topk"])
def test_speed_is_measured_for_both(mode):
    model, sequences = pruning_model(prune_mode=mode), random_sequences(11, longest=40)
    speed = measure_speed(model, sorted_batches(examples(sequences), 4), Process(), repeats=3)
    with torch.inference_mode():
        kept = model(pack(sequences)).kept
    lengths = torch.tensor([len(ids) for ids in sequences])
    assert speed.flops_reduction == pytest.approx(1 / relative_flops(model.config, lengths, kept))
    assert speed.flops_reduction > 1.02
    assert speed.batch_size == 4 and speed.speedup == pytest.approx(
        speed.examples_per_second / speed.dense_examples_per_second
    )
    assert speed.tokens_per_second == pytest.approx(speed.examples_per_second * float(lengths.double().mean()))
    assert speed.flops_to_time == pytest.approx(speed.speedup / speed.flops_reduction)
    assert 0 < speed.latency <= speed.latency_p95 and 0 < speed.dense_latency <= speed.dense_latency_p95


def test_the_computed_work_leaves_out_what_the_last_layer_saves():
    """One sequence, all of whose tokens but the first go in the first of two layers."""
    model = small_model(prune_mode="absolute_threshold", num_hidden_layers=2)
    model.thresholds.data.fill_(1.0)
    n, D, F = 20, 30, 47
    speed = measure_speed(model, [pack([[5] * n])], Process(), repeats=1)

    def layer(entering: int, leaving: int) -> int:
        return 4 * D * D * entering + 2 * D * entering**2 + 2 * D * F * leaving

    def last_layer(entering: int) -> int:  # key and value of all; query, output and feed-forward of the first token
        return 2 * D * D * entering + 2 * D * entering + 2 * D * D + 2 * D * F

    assert speed.flops_reduction == pytest.approx((2 * layer(n, n)) / (layer(n, 1) + layer(1, 1)))
    assert speed.computed_reduction == pytest.approx((layer(n, n) + last_layer(n)) / (layer(n, 1) + last_layer(1)))


def test_the_last_layers_count_is_not_timed():
    """The timed passes ask for no scores of the last layer, and one pruner serves them all."""
    model, asked = pruning_model(prune_mode="absolute_threshold"), []
    note = lambda _, inputs, output: asked.append((inputs[1], output.steps[-1].scores is not None))  # noqa: E731
    model.register_forward_hook(note)
    measure_speed(model, sorted_batches(examples(random_sequences(6, longest=40)), 3), Process(), repeats=2)
    pruned = [(pruner, scored) for pruner, scored in asked if isinstance(pruner, (Hard, UnscoredLastLayer))]
    assert [scored for _, scored in pruned] == [True, True] + [False] * 4
    assert len({id(pruner) for pruner, _ in pruned[2:]}) == 1 and len(asked) == 2 * len(pruned)


def test_bench_of_a_task(hard, source):
    options = BenchOptions(batch_sizes=(1, 8), examples=20, repeats=2, max_length=30)
    result = bench_checkpoint(hard, source, options, Process())
    conditions = result["conditions"]
    assert [speed["batch_size"] for speed in result["speeds"]] == [1, 8]
    assert result["speeds"][0]["flops_reduction"] == result["speeds"][1]["flops_reduction"] > 1
    assert conditions["examples"] == 20 and conditions["data"] == "custom" and conditions["pruning"] == "hard"
    assert conditions["length_quantiles"]["95%"] <= 30 and conditions["peak_memory_bytes"] > 2**20
    assert conditions["checkpoint"] == str(hard) and conditions["repeats"] == 2


def test_bench_of_random_tokens(hard):
    result = bench_checkpoint(hard, None, BenchOptions((4,), examples=6, repeats=1, lengths=[5, 9]), Process())
    quantiles = result["conditions"]["length_quantiles"]
    assert result["conditions"]["data"] == "random tokens" and {quantiles["5%"], quantiles["95%"]} <= {5, 9}
    assert result["conditions"]["mean_length"] * 6 in range(30, 55, 4)
    with pytest.raises(InputError, match="--lengths 5000: .* has positions for 128 tokens"):
        bench_checkpoint(hard, None, BenchOptions(lengths=[5000]), Process())


def test_bench_of_questions_prunes_what_is_not_protected(questions, tmp_path):
    reductions = []
    for threshold in (1.0, 0.0):
        changes = {"prune_mode": "absolute_threshold", "protect_question": True}
        model = load_model(questions.folder, **changes).model
        model.thresholds.data.fill_(threshold)
        save_model(tmp_path, model)
        result = bench_checkpoint(tmp_path, None, BenchOptions((4,), examples=8, repeats=1, lengths=[60]), Process())
        reductions.append(result["speeds"][0]["flops_reduction"])
        assert result["speeds"][0]["computed_reduction"] == reductions[-1]  # every token's last state is read
    assert reductions[0] > 2 and reductions[1] == 1


# ---- exported files ----


@pytest.fixture(scope="module")
def files(hard, tmp_path_factory) -> dict[str, Path]:
    """The model as exported files: pruned, without pruning, and pruned in int8."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("exported")
    kinds = {"pruned": {}, "dense": {"dense": True}, "int8": {"int8": True}}
    for name, choices in kinds.items():
        export_checkpoint(hard, folder / f"{name}.onnx", **choices)
    return {name: folder / f"{name}.onnx" for name in kinds}


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(bench, "PAUSE", 0)


def test_exported_files_are_timed_beside_the_checkpoint(hard, source, files, no_pause):
    options = BenchOptions((1, 8), examples=20, repeats=2, beside=tuple(files.values()))
    result = bench_checkpoint(hard, source, options, Process())
    rows, conditions = result["rows"], result["conditions"]
    names = ["dense", "pruned", "pruned.onnx", "dense.onnx", "int8.onnx"]
    assert [(row["batch_size"], row["model"]) for row in rows] == [(size, name) for size in (1, 8) for name in names]
    dense, pruned, exported, exported_dense, int8 = rows[:5]
    assert exported["relative_flops"] == pruned["relative_flops"] < 1 == exported_dense["relative_flops"]
    assert exported["computed_reduction"] == pruned["computed_reduction"] > 1 == exported_dense["computed_reduction"]
    assert all(row["relative_bops"] == row["relative_flops"] for row in (dense, pruned, exported, exported_dense))
    assert int8["relative_bops"] < 0.5 * int8["relative_flops"]
    assert int8["relative_flops"] == pytest.approx(pruned["relative_flops"], abs=0.1)
    for row in rows:
        first = rows[0] if row["batch_size"] == 1 else rows[5]
        assert row["speedup"] == pytest.approx(row["examples_per_second"] / first["examples_per_second"])
        assert 0 < row["latency"] <= row["latency_p95"]
    sizes = [row["file_bytes"] for row in rows[1:5]]
    assert sizes[0] == (hard / "model.safetensors").stat().st_size
    assert sizes[1:] == [file.stat().st_size for file in files.values()]
    assert [speed["batch_size"] for speed in result["speeds"]] == [1, 8]
    assert result["speeds"][0]["relative_bops"] == pruned["relative_bops"] and conditions["onnxruntime"]


def test_an_exported_file_is_measured_alone_and_is_the_reference(source, files, no_pause):
    options = BenchOptions((4,), examples=8, repeats=1, beside=(files["int8"],))
    result = bench_checkpoint(open_file(files["pruned"]), source, options, Process())
    assert result["speeds"] == [] and [row["model"] for row in result["rows"]] == ["pruned.onnx", "int8.onnx"]
    assert result["rows"][0]["speedup"] == 1 and result["rows"][0]["relative_flops"] < 1
    assert result["conditions"]["checkpoint"] == str(files["pruned"].resolve())
    assert result["conditions"]["pruning"] == "hard"


def test_files_of_one_name_are_told_apart(hard, files, tmp_path, no_pause):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.onnx").symlink_to(files["dense"])
    beside = (tmp_path / "a" / "m.onnx", tmp_path / "b" / "m.onnx")
    options = BenchOptions((2,), examples=4, repeats=1, lengths=[9], beside=beside)
    rows = bench_checkpoint(hard, None, options, Process())["rows"]
    assert [row["model"] for row in rows] == ["dense", "pruned", "a/m.onnx", "b/m.onnx"]


def test_files_that_answer_other_texts_are_refused(hard, source, questions, files, tmp_path):
    def refusal(folder: Path, source, path: Path) -> str:
        with pytest.raises(InputError) as error:
            bench_checkpoint(folder, source, BenchOptions((2,), lengths=[9], beside=(path,)), Process())
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        return str(error.value)

    wrong = refusal(questions.folder, None, files["dense"])
    assert f"has head = sequence, and {questions.folder} has span" in wrong
    shutil.copytree(hard, tmp_path / "other")
    model = load_model(hard, ("negative", "positive")).model
    model.config = replace(model.config, labels=("bad", "good"))
    save_model(tmp_path / "other", model)
    assert "has labels = ('negative', 'positive')" in refusal(tmp_path / "other", None, files["dense"])
    shutil.copytree(hard, tmp_path / "cased")
    (tmp_path / "cased" / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    assert "its tokenizer is not that of" in refusal(tmp_path / "cased", source, files["dense"])
    (tmp_path / "text.onnx").write_text("no graph")
    assert "not a graph" in refusal(hard, None, tmp_path / "text.onnx")


def test_exported_files_are_timed_on_the_cpu(hard, files):
    options = BenchOptions((2,), lengths=[9], beside=(files["dense"],))
    with pytest.raises(InputError, match="pass --device cpu"):
        bench_checkpoint(hard, None, options, Process(device=torch.device("meta")))
