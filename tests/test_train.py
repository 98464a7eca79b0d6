"""Training: optimizer, schedule, losses, the step, evaluation, budgets."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import MODES, small_model
from training import CLASSES, HEADS, examples, head_model, mode_model, task_of

import train
from model import Soft, keep_by_threshold, macs, threshold_ladder
from support.process import Process
from support.settings import STAGES, Settings, soft_target
from tasks import find_task
from tasks.base import task_loss
from tasks.evaluation import evaluate
from train import (
    Budget,
    Trainer,
    distillation_loss,
    is_better,
    make_optimizer,
    mask_sum,
    rate_factor,
    scale_thresholds,
)


def gradients(trainer: Trainer, indices: np.ndarray) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a batch, and the gradients that it leaves."""
    loss = float(trainer.backward(indices)[0])
    result = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return loss, result


def test_the_header_names_the_defaults():
    said = train.__doc__.split("The defaults (support/settings.py):")[1].split("Read from top")[0]
    usual, target = Settings(), soft_target(128)
    assert usual.threshold_learning_rate == usual.learning_rate
    assert [float(number) for number in re.findall(r"[0-9.]*[0-9](?:e-[0-9]+)?", said)] == [
        *(usual.batch_size, usual.learning_rate),
        *(STAGES["soft"]["epochs"], usual.regularization, usual.temperature, STAGES["hard"]["epochs"]),
        *(target["threshold_learning_rate"], target["temperature"], target["temperature_end"]),
    ]


# ---- optimizer and schedule ----


def test_the_rate_rises_and_falls_linearly():
    factors = [rate_factor(step, 10, 0.2) for step in range(10)]
    assert factors[:3] == pytest.approx([0.5, 1.0, 8 / 9]) and factors[-1] == pytest.approx(1 / 9)
    assert all(a > b for a, b in zip(factors[1:], factors[2:])) and rate_factor(0, 1, 0.0) == 1.0
    assert [rate_factor(step, 10, 0.2, fall=False) for step in range(10)] == [0.5] + [1.0] * 9


def test_thresholds_have_a_group_of_their_own():
    model = small_model()
    model.thresholds.requires_grad_(True)
    settings = Settings(learning_rate=1.0, weight_decay=0.5, threshold_learning_rate=2.0)
    groups = make_optimizer(model, settings).param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1.0, 0.5), (1.0, 0.0), (2.0, 0.0)]
    assert groups[2]["params"][0] is model.thresholds
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    model.thresholds.requires_grad_(False)
    assert len(make_optimizer(model, Settings()).param_groups) == 2


@pytest.mark.parametrize("target", [None, 0.5])
def test_rates_and_temperature_follow_their_schedules(target):
    settings = Settings(
        epochs=4,
        batch_size=8,
        target_flops=target,
        temperature=1e-3,
        temperature_end=1e-4,
        warmup=0.0,
        learning_rate=1e-4,
    )
    trainer = Trainer(mode_model("soft"), "soft", CLASSES, examples(16), settings)
    rates, temperatures = [], []
    for indices in trainer.batches():
        temperatures.append(trainer.temperature())
        trainer.step(indices)
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
    fall = [(8 - step) / 8 for step in range(8)]
    assert [r[0] for r in rates] == pytest.approx([1e-4 * f for f in fall])
    thresholds = [2e-5] * 8 if target else [2e-5 * f for f in fall]  # with a target λ keeps changing to the end
    assert [r[2] for r in rates] == pytest.approx(thresholds)
    assert temperatures == pytest.approx([10 ** (-3 - step / 8) for step in range(8)])
    trainer.settings = replace(settings, temperature_end=1e-2)  # it never rises
    assert trainer.temperature() == 1e-3


# ---- losses and gradients ----


def test_the_distillation_loss_by_hand():
    logits, teacher, targets = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([0])
    p = 1 / (1 + math.exp(-1))  # at temperature 2
    expected = 4 * (0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p)))
    assert float(distillation_loss(logits, teacher, targets)) == pytest.approx(expected)
    assert float(distillation_loss(teacher, teacher, targets)) == 0
    # A choice that does not count has no part in it.
    two, other = torch.cat([logits, logits]), torch.cat([teacher, logits + 1])
    assert float(distillation_loss(two, other, torch.tensor([0, -100]))) == pytest.approx(expected)
    scores = torch.tensor([[3.0], [1.0]]), torch.tensor([[1.0], [1.0]]), torch.tensor([0.0, 0.0])
    assert float(distillation_loss(*scores)) == 4


def test_the_span_loss_by_hand():
    # Two sequences of 2 and 3 tokens; start and end are two choices among the tokens of a sequence.
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 3.0]])
    targets = torch.tensor([[1, 0], [0, 2]])
    rows = [([0, 2], 1), ([1, 0], 0), ([1, 0, 0], 0), ([1, 0, 3], 2)]
    expected = sum(float(torch.tensor(row, dtype=torch.float).logsumexp(0)) - row[i] for row, i in rows)
    choices = find_task("SQuAD").choices(logits, torch.tensor([2, 3]))
    assert choices.shape == (4, 3)
    assert float(task_loss(choices, targets.flatten())) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("mode", ["finetune", *MODES[1:]])
def test_parts_of_a_batch_add_up_to_the_whole(mode, head):
    data, results = examples(13, head=head), []
    for parts in (1, 4):
        settings = Settings(accumulate=parts, batch_size=13, mask_attention=mode == "soft_attention")
        model, stage = mode_model(mode, head=head, labels=HEADS[head]), mode.removesuffix("_attention")
        results.append(gradients(Trainer(model, stage, task_of(head), data, settings), np.arange(13)))
    (whole, one), (parts, other) = results
    assert parts == pytest.approx(whole, abs=1e-5) and one.keys() == other.keys()
    assert ("thresholds" in one) == mode.startswith("soft")
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("masks_attention", [False, True])
def test_the_soft_loss_is_the_task_loss_and_lambda_times_the_mean_masks(masks_attention):
    model, data = mode_model("soft"), examples(6)
    settings = Settings(regularization=0.3, temperature=1e-3, mask_attention=masks_attention)
    trainer = Trainer(model, "soft", CLASSES, data, settings)
    batch = data.batch(np.arange(6))
    output = model(batch, Soft(model.thresholds, 1e-3, masks_attention))
    loss = task_loss(output.logits, torch.from_numpy(data.targets)) / 6
    (loss + 0.3 * mask_sum(output) / int(data.lengths.sum())).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    shown, result = gradients(trainer, np.arange(6))
    assert shown == pytest.approx(loss.item(), rel=1e-6)  # without λ's part
    for name in ("thresholds", "layers.0.intermediate.weight", "head.output.bias"):
        torch.testing.assert_close(result[name], expected[name], atol=1e-6, rtol=1e-5)
    assert 0 < mask_sum(output).item() < 5 * data.lengths.sum()


@pytest.mark.parametrize("head", HEADS)
def test_the_teacher_has_its_share_of_the_loss(head):
    data, task, losses = examples(5, head=head), task_of(head), {}
    rows = 5 if head == "sequence" else int(data.lengths.sum())
    data.teacher = torch.randn(rows, len(HEADS[head]), generator=torch.Generator().manual_seed(1))
    for weight in (0.0, 0.25, 1.0):
        trainer = Trainer(head_model(head), "finetune", task, data, Settings(distill_weight=weight))
        losses[weight] = gradients(trainer, np.arange(5))[0]
    assert losses[0.25] == pytest.approx(0.75 * losses[0.0] + 0.25 * losses[1.0], rel=1e-5)
    batch = data.batch(np.arange(5))
    targets = task.targets(data, np.arange(5))
    student, teacher = (task.choices(x, batch.lengths) for x in (head_model(head)(batch).logits, data.teacher))
    expected = distillation_loss(student, teacher, targets) / task.count_targets(data, np.arange(5))
    assert losses[1.0] == pytest.approx(expected.item(), rel=1e-4) and losses[1.0] != pytest.approx(
        losses[0.0], rel=0.1
    )


def test_gradients_that_are_only_rounding_are_zero():
    trainer = Trainer(head_model("span"), "finetune", task_of("span"), examples(6, head="span"), Settings())
    _, result = gradients(trainer, np.arange(6))
    query, key, value = result["layers.1.attention.query_key_value.bias"].chunk(3)
    assert not key.any() and not result["head.output.bias"].any() and query.all() and value.all()


def test_bf16_autocast_trains_thresholds_too():
    """Under mixed precision the thresholds still get a gradient, and stay in float32."""
    trainer = Trainer(mode_model("soft"), "soft", CLASSES, examples(8), Settings(), Process(precision="bf16"))
    _, result = gradients(trainer, np.arange(8))
    assert trainer.model.thresholds.dtype == torch.float32 and (result["thresholds"] != 0).all()


def test_thresholds_do_not_fall_below_zero():
    model = mode_model("soft")
    model.thresholds.data = torch.full((5,), 1e-5)
    settings = Settings(threshold_learning_rate=1e-2, regularization=0.0, warmup=0.0, batch_size=8, learning_rate=0.0)
    trainer = Trainer(model, "soft", CLASSES, examples(8), settings)
    for indices in trainer.batches():
        trainer.step(indices)
    assert (model.thresholds >= 0).all() and (model.thresholds == 0).any()


# ---- budgets ----


def test_soft_flops_are_the_formula_on_soft_counts_and_move_every_threshold():
    model = mode_model("soft")
    model.thresholds.requires_grad_()
    batch = examples(6).batch(np.arange(6))
    output = model(batch, Soft(model.thresholds, 1e-3))
    macs(model.config, batch.lengths, output.kept).sum().backward()
    assert (model.thresholds.grad < 0).all()  # a higher threshold anywhere means fewer FLOPs
    # With a very small temperature the soft counts are those of the hard decision, were nothing ever dropped.
    with torch.no_grad():
        sharp = model(batch, Soft(model.thresholds, 1e-9))
    alive = torch.ones(len(batch.token_ids), dtype=torch.bool)
    for l, step in enumerate(sharp.steps):
        alive &= keep_by_threshold(step.scores, model.thresholds[l], batch.positions == 0)
        assert sharp.kept[l].tolist() == [int(part.sum()) for part in alive.split(batch.lengths.tolist())]
    assert int(alive.sum()) < len(alive)


def test_a_budget_lets_lambda_rise_while_too_much_is_kept_and_fall_below():
    budget = Budget(0.5)
    assert budget.update(0.5) == 0.0
    assert [budget.update(0.8) for _ in range(3)] == pytest.approx([3.09, 3.18, 3.27])
    assert budget.update(0.4) < 0 < budget.update(0.5)


def test_thresholds_are_scaled_to_a_budget():
    model, data = mode_model("hard"), examples(64)
    model.thresholds.data = threshold_ladder(1e-4, 5)
    for target in (0.7, 0.4):
        factor = scale_thresholds(model, data, target, Process())
        torch.testing.assert_close(model.thresholds / model.thresholds[0], torch.arange(1.0, 6))
        share = evaluate(model, CLASSES, {"": data}, Process())[0].relative_flops
        assert target - 0.03 < share <= target and factor > 1
    before = model.thresholds.clone()
    assert scale_thresholds(model, data, 0.01, Process()) is None and model.thresholds.equal(before)


def test_the_best_checkpoint_is_within_the_budget_first():
    def record(flops: float, score: float) -> dict[str, float]:
        return {"relative_flops": flops, "score": score}

    settings = Settings(target_flops=0.6)
    assert is_better(record(0.6, 0.5), record(0.9, 0.9), settings)
    assert not is_better(record(0.9, 0.9), record(0.62, 0.5), settings)  # 0.62 is within the margin
    assert is_better(record(0.6, 0.8), record(0.5, 0.7), settings)
    assert is_better(record(0.9, 0.8), record(0.8, 0.7), settings)  # both beyond it
    assert is_better(record(0.9, 0.1), record(0.6, 0.9), Settings(target_flops=0.6, load_best=False))
    assert not is_better(record(0.1, 0.7), record(0.9, 0.7), Settings())
