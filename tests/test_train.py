"""The loop: what it learns, what it leaves, and that neither parts nor processes change it."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import train
from conftest import random_sequences, small_model

from data import Examples, InputError, Settings, Source, Tokenizer, custom_task, find_task
from model import (
    keep_by_threshold,
    load_model,
    macs,
    save_model,
    sum_by_sequence,
    threshold_ladder,
    topk_counts,
    topk_rates,
)
from train import (
    Budget,
    Predictor,
    Process,
    PruningOptions,
    backward,
    check_output,
    clear_output,
    default_output,
    distillation_loss,
    evaluate,
    evaluate_checkpoint,
    known_labels,
    make_optimizer,
    measure_speed,
    predict_examples,
    rate_factor,
    rate_for_budget,
    run_stage,
    scale_thresholds,
    sorted_batches,
    starting_thresholds,
    task_loss,
)


def examples(count: int, classes: int = 3, seed: int = 0, longest: int = 40) -> Examples:
    import datasets

    sequences = random_sequences(count, seed, longest)
    table = datasets.Dataset.from_dict({"token_ids": sequences, "segment_ids": [[0] * len(s) for s in sequences]})
    labels = np.array([s[-1] % classes for s in sequences])
    return Examples(table, np.array([len(s) for s in sequences]), labels, 0)


def test_rate_rises_and_falls_linearly():
    factors = [rate_factor(step, 10, 0.2) for step in range(10)]
    assert factors[:3] == pytest.approx([0.5, 1.0, 8 / 9]) and factors[-1] == pytest.approx(1 / 9)
    assert all(a > b for a, b in zip(factors[1:], factors[2:])) and rate_factor(0, 1, 0.0) == 1.0
    assert [rate_factor(step, 10, 0.2, fall=False) for step in range(10)] == [0.5] + [1.0] * 9


def test_thresholds_have_a_group_of_their_own():
    model = small_model()
    model.thresholds.requires_grad_(True)
    groups = make_optimizer(
        model, Settings(learning_rate=1.0, weight_decay=0.5, threshold_learning_rate=2.0)
    ).param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1.0, 0.5), (1.0, 0.0), (2.0, 0.0)]
    assert groups[2]["params"][0] is model.thresholds
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    model.thresholds.requires_grad_(False)
    assert len(make_optimizer(model, Settings()).param_groups) == 2


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("pruning", ["none", "soft", "hard", "topk"])
def test_parts_of_a_batch_add_up_to_the_whole(pruning):
    model = small_model()
    model.thresholds.data = threshold_ladder(0.01, 5)
    model.thresholds.requires_grad_(pruning == "soft")
    data, indices = examples(13), np.arange(13)
    whole, _ = backward(model, data, indices, pruning, Settings(accumulate=1), Process())
    one = gradients(model)
    parts, _ = backward(model, data, indices, pruning, Settings(accumulate=4), Process())
    other = gradients(model)
    assert parts == pytest.approx(whole, abs=1e-6) and one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=1e-5)


def test_the_soft_loss_is_the_task_loss_and_lambda_times_the_mean_masks():
    model = small_model()
    model.thresholds.requires_grad_(True)
    data, indices = examples(6), np.arange(6)
    output = model(*data.batch(indices), pruning="soft", temperature=1e-3)
    task = task_loss(output.logits, torch.from_numpy(data.labels)) / 6
    (task + 0.3 * output.soft_mask_sum / data.lengths.sum()).backward()
    expected = gradients(model)
    loss, _ = backward(model, data, indices, "soft", Settings(regularization=0.3, temperature=1e-3), Process())
    assert loss == pytest.approx(task.item(), rel=1e-6)  # what is told leaves λ's part out
    found = gradients(model)
    for name in ("thresholds", "layers.0.intermediate.weight", "head.output.bias"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)
    assert 0 < output.soft_mask_sum.item() < 5 * data.lengths.sum()


def test_evaluation_counts_every_example_once_whatever_the_batch_size():
    model = small_model(prune_mode="absolute_threshold")
    model.thresholds.data = threshold_ladder(0.01, 5)
    data = examples(41)
    one = evaluate(model, {"": data}, "accuracy", Process(), batch_size=1)
    many = evaluate(model, {"": data}, "accuracy", Process(), batch_size=16)
    assert one.metrics == many.metrics and one.kept == many.kept and one.relative_flops == many.relative_flops < 1
    assert one.examples == 41 and one.loss == pytest.approx(many.loss, rel=1e-5)
    logits, kept = predict_examples(model, data, Process(), 7)
    with torch.inference_mode():
        for i in (0, 20, 40):
            output = model(*data.batch([i]))
            assert (
                logits[i] == pytest.approx(output.logits[0].numpy(), abs=1e-5)
                and kept[:, i].tolist() == output.kept[:, 0].tolist()
            )
    dense = evaluate(model, {"": data}, "accuracy", Process(), pruning="none")
    assert dense.relative_flops == 1 and dense.kept == [1.0] * 5 and dense.gflops == one.dense_gflops


def test_two_evaluation_sets_give_metrics_each_and_one_score():
    model = small_model()
    result = evaluate(model, {"": examples(9), "_mismatched": examples(8, seed=4)}, "accuracy", Process())
    assert set(result.metrics) == {"accuracy", "accuracy_mismatched"} and result.score == result.metrics["accuracy"]
    assert result.examples == 17


def test_speed_is_measured_for_both():
    model = small_model(prune_mode="topk")
    data = examples(11)
    speed = measure_speed(model, sorted_batches(data, 4), Process(), repeats=2)
    assert speed.batch_size == 4 and speed.speedup == pytest.approx(
        speed.examples_per_second / speed.dense_examples_per_second
    )
    assert speed.flops_reduction == pytest.approx(1 / evaluate(model, {"": data}, "accuracy", Process()).relative_flops)
    assert speed.flops_to_time == pytest.approx(speed.speedup / speed.flops_reduction) and speed.done_reduction > 1


# ---- whole stages on the demo's data ----


def stage(
    demo: Path,
    name: str,
    restore: Path,
    output: Path,
    options=PruningOptions(),
    show=lambda line: None,
    distill=None,
    **settings,
):
    source = Source(custom_task(None, None, None, False), demo / "data")
    settings = Settings(**{"learning_rate": 1e-3, "epochs": 1.0, "batch_size": 16, "load_best": False} | settings)
    torch.manual_seed(settings.seed)
    return run_stage(name, restore, source, settings, options, output, show=show, distill=distill)


@pytest.fixture(scope="module")
def finetuned(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finetune"
    stage(demo, "finetune", demo / "model", folder)
    return folder


def test_soft_moves_thresholds_and_hard_freezes_them(demo, finetuned, tmp_path):
    options = PruningOptions(final_token_threshold=0.01)
    _, soft = stage(
        demo, "soft", finetuned, tmp_path / "soft", options, threshold_learning_rate=1e-3, regularization=0.5
    )
    learned = load_model(tmp_path / "soft").model
    assert learned.pruning == "hard" and (learned.thresholds - threshold_ladder(0.01, 4)).abs().min() > 1e-4
    assert soft.best["thresholds"] == learned.thresholds.tolist() and soft.best["relative_flops"] < 1
    _, hard = stage(demo, "hard", tmp_path / "soft", tmp_path / "hard")
    adapted = load_model(tmp_path / "hard").model
    assert torch.equal(adapted.thresholds, learned.thresholds)
    assert not torch.equal(adapted.head.dense.weight, learned.head.dense.weight)
    # Soft again goes on from what was learned.
    lines = []
    stage(demo, "soft", tmp_path / "soft", tmp_path / "again", threshold_learning_rate=0.0, show=lines.append)
    assert torch.equal(load_model(tmp_path / "again").model.thresholds, learned.thresholds)
    assert any("continue" in line for line in lines)
    shorter = PruningOptions(max_seq_length=100)  # scores are divided by it
    stage(demo, "soft", tmp_path / "soft", tmp_path / "anew", shorter, threshold_learning_rate=0.0, show=lines.append)
    assert torch.equal(load_model(tmp_path / "anew").model.thresholds, threshold_ladder(0.01, 4))


def test_the_last_checkpoint_is_kept_where_the_best_is_not_asked_for(demo, finetuned, tmp_path, monkeypatch):
    real = train.evaluate
    for load_best, kept in ((False, [True, True]), (True, [True, False])):
        shares = iter((0.5, 0.9))  # the first evaluation is within the target, what follows beyond it
        measured = lambda *given: replace(real(*given), relative_flops=next(shares, 0.9))  # noqa: E731
        monkeypatch.setattr(train, "evaluate", measured)
        folder = tmp_path / f"{load_best}"
        stage(demo, "soft", finetuned, folder, target_flops=0.6, load_best=load_best, epochs=0.2, save_steps=1)
        records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [record["saved"] for record in records if record["event"] == "evaluation"][:2] == kept


def test_baselines(demo, finetuned, tmp_path):
    _, topk = stage(demo, "topk", finetuned, tmp_path / "topk", PruningOptions(token_keep_rate=0.25))
    assert topk.best["kept"][:3] == [1, 1, 1] and topk.best["kept"][3] == pytest.approx(0.25, abs=0.02)
    assert load_model(tmp_path / "topk").model.pruning == "topk"
    stage(
        demo, "manual", finetuned, tmp_path / "manual", PruningOptions(final_token_threshold=0.02, score_norm="length")
    )
    manual = load_model(tmp_path / "manual").model
    assert torch.equal(manual.thresholds, threshold_ladder(0.02, 4)) and manual.config.score_norm == "length"


# ---- budgets and distillation ----


def test_soft_flops_are_the_formula_on_soft_counts_and_move_every_threshold():
    model = small_model(prune_mode="absolute_threshold")
    model.thresholds.data = threshold_ladder(0.01, 5)
    model.thresholds.requires_grad_()
    batch = examples(6).batch(range(6))
    output = model(*batch, pruning="soft", temperature=1e-3)
    macs(model.config, batch.lengths, output.kept).sum().backward()
    assert (model.thresholds.grad < 0).all()  # a higher threshold anywhere means fewer FLOPs
    # With a very small temperature the soft counts are those of the hard decision, were nothing ever dropped.
    with torch.no_grad():
        sharp = model(*batch, pruning="soft", temperature=1e-9, trace=True)
    alive = torch.ones(len(batch.token_ids), dtype=torch.bool)
    for l, layer in enumerate(sharp.trace):
        alive &= keep_by_threshold(layer.importance, model.thresholds[l], batch.positions == 0)
        assert sharp.kept[l].tolist() == sum_by_sequence(alive, batch.lengths).tolist()


def test_a_mask_floor_drops_what_the_soft_mask_has_nearly_dropped():
    model = small_model(prune_mode="absolute_threshold")
    model.thresholds.data = threshold_ladder(0.01, 5)
    batch = examples(6).batch(range(6))
    with torch.no_grad():
        # A floor below every mask changes nothing; at a very small temperature any floor gives the hard model.
        plain, low = (model(*batch, pruning="soft", temperature=1e-3, mask_floor=floor) for floor in (0.0, 1e-30))
        torch.testing.assert_close(low.logits, plain.logits)
        sharp = model(*batch, pruning="soft", temperature=1e-9, mask_floor=0.01)
        hard = model(*batch, pruning="hard")
    assert torch.equal(sharp.kept.long(), hard.kept) and int(hard.kept[-1].sum()) < len(batch.token_ids)
    torch.testing.assert_close(sharp.logits, hard.logits, atol=1e-5, rtol=1e-5)


def test_a_budget_lets_lambda_rise_while_too_much_is_kept_and_fall_below():
    budget = Budget(0.5)
    assert budget.regularization(0.5) == 0.0
    assert [budget.regularization(0.8) for _ in range(3)] == pytest.approx([3.09, 3.18, 3.27])
    assert budget.regularization(0.4) < 0 < budget.regularization(0.5)


def test_the_start_of_the_thresholds_depends_on_the_budget(demo, finetuned, tmp_path):
    assert torch.equal(starting_thresholds(6, 0.33), starting_thresholds(6, 0.5))
    assert [len(starting_thresholds(L, 0.5)) for L in (1, 2, 3, 12)] == [1, 2, 3, 12]
    for target, shape in ((None, [1, 2, 3, 4]), (0.6, [1, 16, 81, 256]), (0.4, [1, 0, 10, 10])):  # of four layers
        folder = tmp_path / f"at {target}"
        stage(demo, "soft", finetuned, folder, target_flops=target, threshold_learning_rate=0.0, epochs=0.1)
        start = load_model(folder).model.thresholds
        torch.testing.assert_close(start / start[0], torch.tensor(shape).float())


def test_thresholds_are_scaled_to_a_budget():
    model = small_model(prune_mode="absolute_threshold")
    model.thresholds.data = threshold_ladder(1e-4, 5)
    data = examples(64)
    for target in (0.7, 0.4):
        factor = scale_thresholds(model, data, target, Process())
        torch.testing.assert_close(model.thresholds / model.thresholds[0], torch.arange(1.0, 6))
        found = evaluate(model, {"": data}, "accuracy", Process()).relative_flops
        assert target - 0.03 < found <= target and factor > 1
    before = model.thresholds.clone()
    assert scale_thresholds(model, data, 0.01, Process()) is None and model.thresholds.equal(before)


def test_topk_rates_for_a_budget():
    config, lengths, ones = small_model().config, torch.tensor([40, 17, 23]), torch.ones(3, dtype=torch.long)
    rate = rate_for_budget(config, lengths, ones, 0.85)
    kept = torch.stack([topk_counts(lengths, share) for share in topk_rates(rate, 5)])
    dense = macs(config, lengths, lengths.expand(5, -1)).sum()
    assert 0.82 < float(macs(config, lengths, kept).sum() / dense) <= 0.85
    with pytest.raises(InputError, match="top-k does not prune the first layers, and cannot go below 0.740"):
        rate_for_budget(config, lengths, ones, 0.2)
    # Tokens that are never pruned make a lower rate necessary, and some budgets impossible.
    assert rate_for_budget(config, lengths, 12 * ones, 0.85) < rate
    with pytest.raises(InputError, match="cannot go below 0.8"):
        rate_for_budget(config, lengths, 12 * ones, 0.8)


def test_distillation_loss_by_hand():
    logits, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    p = 1 / (1 + math.exp(-1))  # at temperature 2
    expected = 4 * (0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p)))
    assert float(distillation_loss(logits, teacher)) == pytest.approx(expected)
    assert float(distillation_loss(teacher, teacher)) == 0
    assert float(distillation_loss(torch.tensor([[3.0], [1.0]]), torch.tensor([[1.0], [1.0]]))) == 4


@pytest.mark.parametrize("name, target", [("soft", 0.5), ("manual", 0.5), ("topk", 0.95)])
def test_a_stage_meets_its_budget(demo, finetuned, tmp_path, name, target):
    options = PruningOptions(final_token_threshold=None if name == "topk" else 0.005)
    _, result = stage(demo, name, finetuned, tmp_path, options, target_flops=target)
    assert result.best["relative_flops"] == pytest.approx(target, abs=0.05)  # on 41 texts of the evaluation set


def test_with_the_teacher_alone_the_labels_do_not_matter(demo, finetuned, tmp_path):
    weights = {}
    for labels in ("right", "wrong"):
        folder = tmp_path / labels / "data"
        folder.mkdir(parents=True)
        for split in ("train", "dev"):
            text = (demo / "data" / f"{split}.jsonl").read_text()
            if labels == "wrong":
                swap = {'"positive"': '"negative"', '"negative"': '"positive"'}
                text = re.sub("|".join(swap), lambda found: swap[found[0]], text)
            (folder / f"{split}.jsonl").write_text(text)
        run = tmp_path / labels / "run"
        stage(folder.parent, "manual", finetuned, run, distill=finetuned, distill_weight=1.0, epochs=0.5)
        weights[labels] = load_model(run).model.head.output.weight
    assert torch.equal(weights["right"], weights["wrong"])


def test_a_teacher_is_asked_once(demo, finetuned, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source, asked = Source(custom_task(None, None, None, False), demo / "data"), []
    monkeypatch.setattr(train, "predict_examples", lambda *args: asked.append(args) or predict_examples(*args))

    def ask(folder, max_length=128, process=Process()):
        labels = ("negative", "positive")
        return train.ask_teacher(folder, source, labels, Tokenizer(folder), max_length, process, 16)

    first, second = ask(finetuned), ask(finetuned)
    assert len(asked) == 1 and len(first) == len(second) and all(map(np.array_equal, first, second))
    # Not of another precision, and not of other weights, wherever they stand.
    ask(finetuned, process=Process(precision="bf16"))
    model = load_model(shutil.copytree(finetuned, tmp_path / "other")).model
    ask(tmp_path / "other")
    assert len(asked) == 2
    model.head.output.bias.data += 1
    save_model(tmp_path / "other", model)
    third = ask(tmp_path / "other")
    assert len(asked) == 3 and np.allclose(third, np.add(first, 1), atol=1e-6)


def test_evaluation_says_where_thresholds_that_the_folder_lacks_come_from(demo, finetuned, tmp_path):
    source, told = Source(custom_task(None, None, None, False), demo / "data"), {}
    for mode in (None, "absolute_threshold"):
        shutil.copytree(finetuned, tmp_path / str(mode))
        config = tmp_path / str(mode) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"prune_mode": mode}))
        told[mode] = []
        evaluate_checkpoint(config.parent, source, Process(), show=told[mode].append)
    assert told[None] == [] and "using final_token_threshold · l / L, 0.01 · l / L" in told["absolute_threshold"][0]


def test_hard_needs_thresholds(demo, finetuned, tmp_path):
    with pytest.raises(InputError, match="no learned thresholds; run `soft` first"):
        stage(demo, "hard", finetuned, tmp_path / "x")


def test_the_same_seed_gives_the_same_weights(demo, tmp_path):
    for name in ("a", "b"):
        stage(demo, "finetune", demo / "model", tmp_path / name)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_log_and_folder(demo, finetuned):
    records = [json.loads(line) for line in (finetuned / "log.jsonl").read_text().splitlines()]
    assert [r["event"] for r in records] == ["start", "evaluation", "end"] and records[0]["settings"][
        "learning_rate"
    ] == 1e-3
    evaluation = records[1]
    for key in (
        "train_loss",
        "loss",
        "score",
        "relative_flops",
        "kept",
        "thresholds",
        "seconds",
        "step",
        "epoch",
        "saved",
    ):
        assert key in evaluation
    assert {"README.md", "config.json", "model.safetensors", "vocab.json", "merges.txt", "log.jsonl"} == {
        p.name for p in finetuned.iterdir()
    }
    assert load_model(finetuned).model.config.labels == ("negative", "positive")


def test_best_or_last_checkpoint(demo, tmp_path, monkeypatch):
    """Scores forced to rise, then fall: best keeps the middle one."""
    import train as module

    real, scores = module.evaluate, []

    def scripted(*args, **kwargs):
        result = real(*args, **kwargs)
        result.score = scores.pop(0)
        return result

    monkeypatch.setattr(module, "evaluate", scripted)
    for load_best, step in ((True, 4), (False, 6)):
        scores[:] = [0.5, 0.9, 0.7]
        output, result = stage(
            demo, "finetune", demo / "model", tmp_path / str(load_best), save_steps=2, epochs=0.6, load_best=load_best
        )
        assert result.steps == 6 and result.best["step"] == step
        saved = [r["step"] for r in map(json.loads, (output / "log.jsonl").read_text().splitlines()) if r.get("saved")]
        assert saved == ([2, 4] if load_best else [2, 4, 6])


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(demo, tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match=r"step \d: the loss is not finite any more; lower the learning rate. No checkpoint"
    ):
        stage(demo, "finetune", demo / "model", tmp_path / "a", learning_rate=1e30, save_steps=1, warmup=0.0)
    import train as module

    real, steps = module.backward, []
    monkeypatch.setattr(
        module,
        "backward",
        lambda *args: steps.append(real(*args)) or ((math.nan, 1.0) if len(steps) == 4 else steps[-1]),
    )
    with pytest.raises(
        InputError, match="step 4: the loss is not finite any more; lower the learning rate. The last good checkpoint"
    ):
        stage(demo, "finetune", demo / "model", tmp_path / "b", save_steps=2)
    assert load_model(tmp_path / "b").model.config.labels == ("negative", "positive")


def test_an_output_that_holds_a_run_is_refused_and_overwritten_on_demand(finetuned, tmp_path):
    with pytest.raises(InputError, match="already holds a run; choose another, or pass --resume"):
        check_output(finetuned, overwrite=False, resume=False)
    check_output(finetuned, overwrite=True, resume=False)
    (tmp_path / "config.json").write_text("{}")
    for resume in (False, True):
        with pytest.raises(InputError, match="holds config.json and is no run to resume"):
            check_output(tmp_path, overwrite=False, resume=resume)
    (tmp_path / "mine.txt").write_text("keep me")
    (tmp_path / "hard").mkdir()
    clear_output(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hard", "mine.txt"]


def test_default_folders_are_the_authors():
    config, settings, task = small_model().config, Settings(temperature=2e-4, regularization=0.15), find_task("SST-2")
    folder = default_output("soft", Path("x"), task, config, settings)
    assert str(folder) == "checkpoints/base/SST2/absolute_threshold/rate_0.01/temperature_0.0002/lambda_0.15/lr_2e-05"
    assert str(default_output("hard", folder, task, config, settings)) == f"{folder}/hard/lr_2e-05"
    assert str(default_output("manual", Path("x"), task, config, settings)) == "x/manual/lr_2e-05"
    assert str(default_output("topk", Path("x"), task, config, settings)) == "x/topk/lr_2e-05"
    cached = Path("/cache/models--a--b/snapshots/1234")  # the hub's cache is not ours to write to
    assert str(default_output("topk", cached, task, config, settings)) == "checkpoints/base/SST2/topk/lr_2e-05"


def test_labels_of_your_own_data_are_the_checkpoints():
    config = replace(small_model().config, labels=("CONTRADICTION", "NEUTRAL", "ENTAILMENT"))
    assert known_labels(custom_task(None, None, None, False), config) == config.labels
    assert known_labels(find_task("MRPC"), config) == ("not_equivalent", "equivalent")


def test_a_head_with_the_tasks_labels_in_another_order_is_permuted(tmp_path):
    model = small_model(labels=("CONTRADICTION", "NEUTRAL", "ENTAILMENT"))
    save_model(tmp_path, model)
    task = find_task("MNLI")
    again, _, notes = load_model(tmp_path, task.labels)
    assert torch.equal(again.head.output.weight, model.head.output.weight[[2, 1, 0]]) and not notes
    assert torch.equal(again.head.output.bias, model.head.output.bias[[2, 1, 0]])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 0}, "--batch-size 0"),
        ({"learning_rate": math.nan}, "--lr nan"),
        ({"epochs": 0}, "--epochs 0"),
        ({"temperature": 0.0}, "--temperature 0"),
        ({"warmup": 2.0}, "--warmup 2.0"),
        ({"save_steps": 0}, "--save-steps 0"),
        ({"target_flops": 0.0}, "--target-flops 0.0"),
        ({"target_flops": 1.5}, "--target-flops 1.5"),
        ({"mask_floor": 0.7}, "--mask-floor 0.7"),
        ({"distill_weight": 1.1}, "--distill-weight 1.1"),
        ({"temperature_end": -1.0}, "--temperature-end -1.0"),
    ],
)
def test_settings_out_of_range(demo, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        stage(demo, "finetune", demo / "model", tmp_path, **change)
    assert not any(tmp_path.iterdir())


def test_pruning_options_out_of_range(demo, finetuned, tmp_path):
    for name, options, message in (
        ("manual", PruningOptions(final_token_threshold=1.5), "threshold 1.5"),
        ("topk", PruningOptions(token_keep_rate=1.1), "rate 1.1"),
        ("finetune", PruningOptions(max_seq_length=500), "positions for 128 tokens"),
    ):
        with pytest.raises(InputError, match=message):
            stage(demo, name, finetuned, tmp_path, options)


def test_regression_stage(demo, tmp_path):
    (tmp_path / "train.tsv").write_text(
        "text\tlabel\n" + "".join(f"the road {'a ' * i}\t{i / 10}\n" for i in range(20))
    )
    (tmp_path / "dev.tsv").write_text((tmp_path / "train.tsv").read_text())
    source = Source(custom_task(None, None, None, True), tmp_path)
    settings = Settings(learning_rate=1e-3, epochs=3, batch_size=5)
    _, result = run_stage("finetune", demo / "model", source, settings, output=tmp_path / "out")
    assert set(result.best["metrics"]) == {"pearson", "spearman"}
    assert len(load_model(tmp_path / "out").model.config.labels) == 1
    answer = Predictor(tmp_path / "out", Process(), 4, None, False).answer([("x", {"text": "the road a a"})])[0]
    assert answer["label"] == answer["logits"][0]


def test_token_ids_need_no_tokenizer(tmp_path):
    model = small_model(prune_mode="topk", token_keep_rate=0.3)
    save_model(tmp_path, model)
    predictor = Predictor(tmp_path, Process(), 3, None, False)
    records = [("line", {"token_ids": s}) for s in random_sequences(10)]
    answers = predictor.answer(records)
    alone = [Predictor(tmp_path, Process(), 1, None, False).answer([record])[0] for record in records]
    for one, other in zip(answers, alone):
        assert one["kept"] == other["kept"] and one["logits"] == pytest.approx(other["logits"], abs=1e-5)
    with pytest.raises(InputError, match="no tokenizer"):
        predictor.answer([("line", {"text": "a"})])


def test_bf16_autocast_trains_thresholds_too(demo, finetuned, tmp_path):
    """Under mixed precision the thresholds still get a gradient, and stay in float32."""
    model = small_model()
    model.thresholds.requires_grad_(True)
    backward(model, examples(8), np.arange(8), "soft", Settings(), Process(precision="bf16"))
    assert model.thresholds.dtype == torch.float32 and (model.thresholds.grad != 0).all()
