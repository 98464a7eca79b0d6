"""Stages from end to end: what they learn, what they leave, what they refuse, and the evaluation of a checkpoint."""

import json
import math
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sentences import write_questions
from small_models import SMALL, small_model
from stages import read_records, stage

from model import threshold_ladder
from runs.stage import EvaluationOptions, StageRequest, default_output, evaluate_checkpoint, run_stage
from support.checkpoint import load_config, load_model, save_model
from support.errors import InputError
from support.process import Process
from support.settings import PruningOptions, Settings
from tasks import find_task, own_task
from tasks.base import Source

LADDER = threshold_ladder(0.01, 4)


def thresholds(folder: Path) -> torch.Tensor:
    return load_model(folder).model.thresholds.data


# ---- the stages ----


def test_soft_moves_thresholds_and_hard_freezes_them(source, finetuned, tmp_path):
    options, lines = PruningOptions(final_token_threshold=0.01), []
    fast = {"threshold_learning_rate": 1e-3, "regularization": 0.5}
    soft = stage(source, "soft", finetuned, tmp_path / "soft", options, lines.append, **fast)
    learned = load_model(tmp_path / "soft").model
    assert learned.config.prune_mode == "absolute_threshold" and (learned.thresholds - LADDER).abs().min() > 1e-4
    assert soft.best["thresholds"] == learned.thresholds.tolist() and soft.best["relative_flops"] < 1
    # The first layer's threshold is θ_final / L, not 0.
    assert "note: the thresholds start from 0.0025 in the first layer to 0.01 in the last" in lines
    stage(source, "hard", tmp_path / "soft", tmp_path / "hard")
    adapted = load_model(tmp_path / "hard").model
    assert torch.equal(adapted.thresholds, learned.thresholds)
    assert not torch.equal(adapted.head.dense.weight, learned.head.dense.weight)


def test_soft_goes_on_with_learned_thresholds_on_the_same_scale(source, finetuned, tmp_path):
    stage(source, "soft", finetuned, tmp_path / "soft", threshold_learning_rate=1e-3, epochs=0.3)
    learned = thresholds(tmp_path / "soft")
    assert not torch.equal(learned, LADDER)
    for number, (options, expected, word) in enumerate(
        (
            (PruningOptions(), learned, "continue"),
            (PruningOptions(score_norm="max_length", max_seq_length=128), learned, "continue"),
            (PruningOptions(max_seq_length=100), LADDER, "start from"),  # scores are divided by it
            (PruningOptions(score_norm="length"), LADDER, "start from"),
            (PruningOptions(final_token_threshold=0.02), 2 * LADDER, "start from"),
        )
    ):
        folder, lines = tmp_path / str(number), []
        still = {"threshold_learning_rate": 0.0, "epochs": 0.1}
        stage(source, "soft", tmp_path / "soft", folder, options, lines.append, **still)
        torch.testing.assert_close(thresholds(folder), expected, atol=0, rtol=0)
        assert any(f"thresholds {word}" in line for line in lines)


def test_the_baselines(source, finetuned, tmp_path):
    topk = stage(source, "topk", finetuned, tmp_path / "topk", PruningOptions(token_keep_rate=0.25))
    assert topk.best["kept"][:3] == [1, 1, 1] and topk.best["kept"][3] == pytest.approx(0.25, abs=0.02)
    assert load_config(tmp_path / "topk").prune_mode == "topk" and topk.best["thresholds"] is None
    rates = [1.0, 0.5, 0.5, 0.1]
    result = stage(source, "topk", finetuned, tmp_path / "rates", PruningOptions(keep_rates=rates))
    assert result.best["kept"] == pytest.approx(rates, abs=0.03)
    # A rate of the last layer brings the schedule back.
    again = stage(source, "topk", tmp_path / "rates", tmp_path / "again", PruningOptions(token_keep_rate=0.25))
    assert again.best["kept"][:3] == [1, 1, 1] and load_config(tmp_path / "again").keep_rates is None
    options = PruningOptions(final_token_threshold=0.02, score_norm="length")
    stage(source, "manual", finetuned, tmp_path / "manual", options)
    manual = load_model(tmp_path / "manual").model
    assert torch.equal(manual.thresholds, 2 * LADDER) and manual.config.score_norm == "length"


@pytest.mark.parametrize("name, target", [("soft", 0.5), ("manual", 0.5), ("topk", 0.95)])
def test_a_stage_meets_its_budget(source, finetuned, tmp_path, name, target):
    options, lines = PruningOptions(final_token_threshold=None if name == "topk" else 0.005), []
    result = stage(source, name, finetuned, tmp_path, options, lines.append, target_flops=target)
    assert result.best["relative_flops"] == pytest.approx(target, abs=0.05)  # on 41 texts of the evaluation set
    assert any("meet" in line for line in lines if line.startswith("note: "))
    missed = abs(result.best["relative_flops"] - target) > 0.03
    assert any(line.startswith(f"note: the target was {target} of") for line in lines) == missed


def test_the_start_of_the_thresholds_depends_on_the_budget(source, finetuned, tmp_path):
    for target, shape in ((None, [1, 2, 3, 4]), (0.6, [1, 16, 81, 256]), (0.4, [1, 0, 10, 10])):  # of four layers
        folder = tmp_path / f"at {target}"
        stage(source, "soft", finetuned, folder, target_flops=target, threshold_learning_rate=0.0, epochs=0.1)
        start = thresholds(folder)
        torch.testing.assert_close(start / start[0], torch.tensor(shape).float())


def test_targets_out_of_reach_are_refused(source, finetuned, tmp_path):
    for name, message in (("topk", "cannot go below 0.9"), ("manual", "no multiple of the thresholds prunes so much")):
        with pytest.raises(InputError, match=f"--target-flops 0.01: .*{message}"):
            stage(source, name, finetuned, tmp_path / name, target_flops=0.01)
        assert not (tmp_path / name).exists()


def test_the_last_checkpoint_is_kept_where_the_best_is_not_wanted(source, finetuned, tmp_path):
    for load_best in (True, False):
        folder = tmp_path / str(load_best)
        result = stage(source, "finetune", finetuned, folder, save_steps=2, load_best=load_best, learning_rate=3e-3)
        records = [record for record in read_records(folder) if record["event"] == "evaluation"]
        best = max(records, key=lambda record: record["score"]) if load_best else records[-1]
        assert result.steps == 10 and result.best["step"] == best["step"]
        assert [r["saved"] for r in records][-1] == (not load_best or best is records[-1])
        again = evaluate_checkpoint(folder, source, Process())[0]
        assert again.loss == pytest.approx(result.best["loss"], rel=1e-4)


def test_the_same_seed_gives_the_same_weights(demo, source, tmp_path):
    for name in ("a", "b"):
        stage(source, "finetune", demo / "model", tmp_path / name, epochs=0.3)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_result_has_times_and_the_logs_record(source, finetuned, tmp_path):
    result = stage(source, "manual", finetuned, tmp_path, epochs=0.5)
    assert result.steps == 5 and 0 < result.seconds_per_step and 0 < result.mean_seconds_per_step
    assert result.best == read_records(tmp_path)[-1]["best"]
    resumed = StageRequest(
        "manual",
        finetuned,
        source,
        Settings(learning_rate=1e-3, epochs=0.5, batch_size=16, load_best=False),
        output=tmp_path,
        resume=True,
    )
    _, again = run_stage(resumed)
    assert again.best == result.best and math.isnan(again.seconds_per_step) and math.isnan(again.mean_seconds_per_step)


def test_regression(demo, tmp_path):
    rows = "".join(f"the road {'a ' * i}\t{i / 10}\n" for i in range(20))
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text(f"text\tlabel\n{rows}")
    source = Source(own_task(None, None, None, regression=True), tmp_path)
    result = stage(source, "finetune", demo / "model", tmp_path / "out", epochs=3, batch_size=5)
    assert set(result.best["metrics"]) == {"pearson", "spearman"}
    assert len(load_config(tmp_path / "out").labels) == 1
    evaluation = evaluate_checkpoint(tmp_path / "out", source, Process())[0]
    assert evaluation.metrics == pytest.approx(result.best["metrics"], abs=1e-4)
    classes = Source(own_task(None, None, None, regression=False), tmp_path)
    with pytest.raises(InputError, match="gives a score, and your own data would have classes; pass --regression"):
        evaluate_checkpoint(tmp_path / "out", classes, Process())
    with pytest.raises(InputError, match="gives a score, and your own data would have classes; pass --regression"):
        stage(classes, "soft", tmp_path / "out", tmp_path / "soft")


# ---- heads that answer for each token ----


@pytest.mark.parametrize("name", ["soft", "hard", "manual", "topk"])
def test_every_stage_runs_and_eval_repeats_its_result(trained, name, tmp_path):
    source, dense = trained
    common = {"accumulate": 2, "load_best": True, "target_flops": 0.6 if name != "topk" else 0.95}
    restore = dense
    if name == "hard":
        restore = tmp_path / "soft"
        stage(source, "soft", dense, restore, **common | {"load_best": False})
    options = PruningOptions(final_token_threshold=0.02 if name in ("soft", "manual") else None)
    result = stage(source, name, restore, tmp_path / name, options, distill=dense, **common)
    assert result.best["relative_flops"] < 0.98
    again = evaluate_checkpoint(tmp_path / name, source, Process(), EvaluationOptions(batch_size=5))[0]
    assert again.metrics == pytest.approx(result.best["metrics"], abs=1e-4)
    assert again.loss == pytest.approx(result.best["loss"], abs=1e-4)
    assert again.kept == pytest.approx(result.best["kept"])
    small = evaluate_checkpoint(tmp_path / name, source, Process(), EvaluationOptions(max_tokens=70))[0]
    assert small.metrics == pytest.approx(again.metrics, abs=1e-4)
    assert small.relative_flops == pytest.approx(again.relative_flops)


def test_finetuning_learns(trained):
    """Both tasks can be read off the words, so even a tiny model is soon better than saying nothing."""
    log = read_records(trained.folder)[1:-1]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]


def test_protected_questions_keep_to_a_budget(questions, tmp_path):
    source, dense = questions
    options = PruningOptions(protect_question=True)
    result = stage(source, "topk", dense, tmp_path, options, target_flops=0.97, load_best=True)
    assert load_config(tmp_path).protect_question and abs(result.best["relative_flops"] - 0.97) < 0.02


def other_length(folder: Path, target: Path, **changes) -> Path:
    """A copy of a model folder with other keys in its config.json; None removes a key."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_question_answering_does_not_inherit_the_length_of_another_task(demo, finetuned, questions, tmp_path):
    """A GLUE checkpoint says max_seq_length 128; SQuAD's windows are longer."""
    source = questions.source
    classifier = other_length(finetuned, tmp_path / "classifier", max_position_embeddings=130, max_seq_length=60)
    fresh = other_length(demo / "model", tmp_path / "fresh", max_seq_length=None)
    for restore, options, length, noted in (
        (classifier, PruningOptions(), 128, True),  # the task's 384, where there are positions
        (classifier, PruningOptions(max_seq_length=70), 70, False),
        (fresh, PruningOptions(), 128, False),
        (questions.folder, PruningOptions(), 60, False),  # a trained question head says so
    ):
        output, lines = tmp_path / f"{restore.name}-{options.max_seq_length}", []
        stage(source, "finetune", restore, output, options, lines.append, epochs=0.2)
        assert load_config(output).max_seq_length == length
        notes = [line for line in lines if "max_seq_length 60" in line]
        assert bool(notes) == noted and all("windows of 128 tokens" in line for line in notes)


def test_cut_questions_are_counted_and_shown(demo, questions, tmp_path):
    for name, words in (("train", 0), ("dev", 40)):
        write_questions(tmp_path / f"{name}-v2.0.json", 8, 3, words)
    source, lines = Source(questions.source.task, tmp_path), []
    stage(source, "finetune", questions.folder, tmp_path / "out", show=lines.append, epochs=0.5)
    counts = [line for line in lines if "tokens each on average" in line]
    assert counts[0].endswith(" tokens each on average")
    assert counts[1].endswith("; 8 questions were cut: too long for windows of 60 tokens")
    shown = []
    evaluate_checkpoint(tmp_path / "out", source, Process(), show=shown.append)
    assert shown == ["8 questions were cut: too long for windows of 60 tokens"]


def test_cut_texts_are_counted_and_shown(source, finetuned, tmp_path):
    lines, shown = [], []
    stage(source, "manual", finetuned, tmp_path, PruningOptions(max_seq_length=20), lines.append, epochs=0.1)
    cut = [line for line in lines if re.search(r"examples, .*; \d+ texts longer than 20 tokens were cut$", line)]
    assert len(cut) == 2
    evaluate_checkpoint(finetuned, source, Process(), EvaluationOptions(max_length=20), shown.append)
    assert shown == [cut[1].split("; ")[1]]


# ---- what is refused ----


def test_hard_needs_thresholds_and_their_length(source, finetuned, tmp_path):
    with pytest.raises(InputError, match="no learned thresholds; run `soft` first"):
        stage(source, "hard", finetuned, tmp_path / "x")
    with pytest.raises(
        InputError, match="--max-length 60: the thresholds of .* were learned with 128, and `hard` keeps it"
    ):
        stage(source, "hard", finetuned, tmp_path / "x", PruningOptions(max_seq_length=60))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 0}, "--batch-size 0"),
        ({"learning_rate": math.nan}, "--lr nan"),
        ({"target_flops": 1.5}, "--target-flops 1.5"),
        ({"temperature_end": -1.0}, "--temperature-end -1.0"),
    ],
)
def test_settings_out_of_range(demo, source, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        stage(source, "finetune", demo / "model", tmp_path, **change)
    assert not any(tmp_path.iterdir())


def test_pruning_options_out_of_range(source, finetuned, tmp_path):
    for name, options, message in (
        ("manual", PruningOptions(final_token_threshold=1.5), "threshold 1.5"),
        ("topk", PruningOptions(token_keep_rate=1.1), "rate 1.1"),
        ("finetune", PruningOptions(max_seq_length=500), "positions for 128 tokens"),
        ("soft", PruningOptions(protect_question=True), "--protect-question is for questions on texts"),
    ):
        with pytest.raises(InputError, match=message):
            stage(source, name, finetuned, tmp_path, options)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("read, option", [(True, "--read-dropped"), (False, "--ignore-dropped")])
def test_only_classifiers_read_dropped_tokens(read, option, tags, tmp_path):
    source, dense = tags
    with pytest.raises(InputError, match=f"{option} is for classifiers"):
        stage(source, "soft", dense, tmp_path, PruningOptions(read_dropped=read))


def test_a_classifier_learns_to_read_dropped_tokens(source, finetuned, tmp_path):
    stage(source, "manual", finetuned, tmp_path / "manual", PruningOptions(read_dropped=True), target_flops=0.5)
    manual, dense = (load_model(folder).model for folder in (tmp_path / "manual", finetuned))
    assert manual.config.read_dropped and manual.head.dropped.abs().max() > 0 and not hasattr(dense.head, "dropped")
    assert "head also reads the states of dropped tokens" in (tmp_path / "manual" / "README.md").read_text()
    stage(source, "hard", tmp_path / "manual", tmp_path / "hard", epochs=0.1)  # it goes on as it was
    assert load_config(tmp_path / "hard").read_dropped


@pytest.mark.parametrize("target, read, reads", [(0.5, None, True), (0.5, False, False), (None, None, False)])
def test_towards_a_budget_soft_training_reads_dropped_tokens(target, read, reads, source, finetuned, tmp_path):
    stage(source, "soft", finetuned, tmp_path, PruningOptions(read_dropped=read), target_flops=target, epochs=0.1)
    assert load_config(tmp_path).read_dropped is reads


def test_a_run_that_ignores_dropped_tokens_is_not_resumed_as_one_that_reads_them(source, finetuned, tmp_path):
    target = {"target_flops": 0.5, "epochs": 0.1}
    stage(source, "soft", finetuned, tmp_path, PruningOptions(read_dropped=False), **target)
    assert read_records(tmp_path)[0]["read_dropped"] is None  # as runs of a version without the default have it
    settings = Settings(learning_rate=1e-3, batch_size=16, load_best=False, **target)
    with pytest.raises(InputError, match="was started with read_dropped = None, not True; use the same options"):
        run_stage(StageRequest("soft", finetuned, source, settings, output=tmp_path, resume=True))


def test_a_checkpoint_that_reads_dropped_tokens_can_be_taken_without_its_map(source, finetuned, tmp_path):
    reading, not_reading = tmp_path / "reading", tmp_path / "not reading"
    stage(source, "soft", finetuned, reading, PruningOptions(read_dropped=True), epochs=0.1)
    stage(source, "manual", reading, not_reading, PruningOptions(read_dropped=False), epochs=0.1)
    assert not load_config(not_reading).read_dropped and not hasattr(load_model(not_reading).model.head, "dropped")


def test_a_tagger_made_of_such_a_classifier_does_not(tags, finetuned, source, tmp_path):
    stage(source, "manual", finetuned, tmp_path / "reading", PruningOptions(read_dropped=True), epochs=0.1)
    stage(tags.source, "finetune", tmp_path / "reading", tmp_path / "tags", epochs=0.1)
    assert not load_config(tmp_path / "tags").read_dropped


def test_towards_a_budget_a_head_for_each_token_stays_as_it_is(tags, tmp_path):
    source, dense = tags
    stage(source, "soft", dense, tmp_path, target_flops=0.7, epochs=0.1)
    assert not load_config(tmp_path).read_dropped


def test_a_checkpoint_of_another_kind_is_refused(source, finetuned, trained, tmp_path):
    with pytest.raises(InputError, match="another kind of task than your own data"):
        evaluate_checkpoint(trained.folder, source, Process())
    with pytest.raises(InputError, match="has no head for .*; run `finetune` on it first"):
        stage(trained.source, "soft", finetuned, tmp_path)


def test_unknown_tags_are_refused(tags, tmp_path):
    source, dense = tags
    (tmp_path / "dev.conll").write_text((source.path / "dev.conll").read_text().replace("PER", "WHO"))
    with pytest.raises(InputError, match="dev.conll, line [0-9]+: the label '[BI]-WHO' is none of the model's, O, B-"):
        evaluate_checkpoint(dense, replace(source, path=tmp_path), Process())


def test_the_output_is_neither_the_start_nor_the_teacher(source, finetuned, tmp_path):
    teacher = shutil.copytree(finetuned, tmp_path / "teacher")
    before = {path: path.read_bytes() for path in (*finetuned.iterdir(), *teacher.iterdir())}
    for output, distill in ((finetuned, None), (teacher, teacher)):
        request = StageRequest("manual", finetuned, source, Settings(), output=output, overwrite=True, distill=distill)
        with pytest.raises(InputError, match="is the checkpoint to start from, or the teacher"):
            run_stage(request)
    assert before == {path: path.read_bytes() for path in before}


def test_missing_tensorboard_is_told_before_anything_is_touched(demo, source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    request = StageRequest("finetune", demo / "model", source, Settings(), output=tmp_path / "o", tensorboard=Path("b"))
    with pytest.raises(InputError, match="pip install tensorboard"):
        run_stage(request)
    assert not (tmp_path / "o").exists()


# ---- folders ----


def test_default_folders_are_the_authors():
    settings, task = Settings(temperature=2e-4, regularization=0.15), find_task("SST-2")
    folder = default_output("soft", Path("x"), task, SMALL, settings)
    assert str(folder) == "checkpoints/base/SST2/absolute_threshold/rate_0.01/temperature_0.0002/lambda_0.15/lr_2e-05"
    half, base = replace(settings, target_flops=0.5), "checkpoints/base/SST2/absolute_threshold/temperature_0.0002"
    # They have no budgets, and read no dropped tokens: each of these gets a folder of its own.
    assert str(default_output("soft", Path("x"), task, SMALL, half)) == f"{base}/flops_0.5/lr_2e-05"
    reads = replace(SMALL, read_dropped=True)
    assert str(default_output("soft", Path("x"), task, reads, half)) == f"{base}/read_dropped/flops_0.5/lr_2e-05"
    assert default_output("soft", Path("x"), task, reads, settings) == folder.parent / "read_dropped/lr_2e-05"
    assert str(default_output("manual", Path("x"), task, SMALL, half)) == "x/manual/flops_0.5/lr_2e-05"
    assert str(default_output("hard", folder, task, SMALL, settings)) == f"{folder}/hard/lr_2e-05"
    assert str(default_output("manual", Path("x"), task, SMALL, settings)) == "x/manual/lr_2e-05"
    assert str(default_output("topk", Path("x"), task, SMALL, settings)) == "x/topk/lr_2e-05"
    assert (
        str(default_output("finetune", Path("x"), task, SMALL, settings)) == "checkpoints/base/SST2/finetune/lr_2e-05"
    )
    cached = Path("/cache/models--a--b/snapshots/1234")  # the hub's cache is not ours to write to
    assert str(default_output("topk", cached, task, SMALL, settings)) == "checkpoints/base/SST2/topk/lr_2e-05"


def test_a_stage_without_output_writes_there(demo, source, finetuned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = StageRequest("finetune", demo / "model", source, Settings(epochs=0.1))
    folder, _ = run_stage(request)
    assert folder == Path("checkpoints/base/custom/finetune/lr_2e-05") and (folder / "model.safetensors").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_path_that_utf8_cannot_hold_is_logged(source, finetuned, tmp_path):
    data = shutil.copytree(source.path, tmp_path / os.fsdecode(b"caf\xe9"))
    stage(replace(source, path=data), "finetune", finetuned, tmp_path / "run", epochs=0.1)
    assert read_records(tmp_path / "run")[0]["data"] == str(data)
    assert "| data | caf?, " in (tmp_path / "run" / "README.md").read_text()


# ---- evaluation ----


def test_evaluation_says_where_thresholds_that_the_folder_lacks_come_from(source, finetuned, tmp_path):
    shown = {}
    for mode in (None, "absolute_threshold"):
        folder = shutil.copytree(finetuned, tmp_path / str(mode))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"prune_mode": mode}))
        shown[mode] = []
        evaluate_checkpoint(folder, source, Process(), show=shown[mode].append)
    assert shown[None] == [] and "using final_token_threshold · l / L, 0.01 · l / L" in shown["absolute_threshold"][0]


def test_evaluation_gives_sets_and_logits_and_may_be_dense(questions, tmp_path):
    source, dense = questions
    folder = shutil.copytree(dense, tmp_path / "pruned")
    model = load_model(folder, prune_mode="absolute_threshold").model
    model.thresholds.data.fill_(0.012)
    save_model(folder, model)
    pruned, sets, logits = evaluate_checkpoint(folder, source, Process())
    whole, _, whole_logits = evaluate_checkpoint(folder, source, Process(), EvaluationOptions(dense=True))
    assert pruned.relative_flops < 1 == whole.relative_flops
    assert len(sets[""]) == len(logits[""]) and [len(row) for row in logits[""]] == sets[""].lengths.tolist()
    windows = sets[""].details
    texts = windows.texts(windows.find_answers(whole_logits[""]))
    assert len(texts) == 30 and set(texts) == {question.id for question in windows.questions}


def test_a_head_with_the_tasks_labels_in_another_order_is_permuted(tmp_path):
    model = small_model(labels=("CONTRADICTION", "NEUTRAL", "ENTAILMENT"))
    save_model(tmp_path, model)
    again, _, notes = load_model(tmp_path, find_task("MNLI").labels)
    assert torch.equal(again.head.output.weight, model.head.output.weight[[2, 1, 0]]) and not notes
    assert torch.equal(again.head.output.bias, model.head.output.bias[[2, 1, 0]])
