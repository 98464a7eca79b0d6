"""Evaluation: counts, metrics and FLOPs of a set, whatever the batches."""

from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from small_models import SMALL, small_model
from training import CLASSES, examples, mode_model

from model import Dense
from support.onnx_file import Answers
from support.process import Process
from tasks.evaluation import evaluate, predict_logits


def test_evaluation_counts_every_example_once_whatever_the_batch_size():
    model, data = mode_model("hard"), examples(41)
    one, _ = evaluate(model, CLASSES, {"": data}, Process(), batch_size=1)
    many, logits = evaluate(model, CLASSES, {"": data}, Process(), batch_size=16)
    small, _ = evaluate(model, CLASSES, {"": data}, Process(), max_tokens=70)
    for other in (many, small):
        assert (
            one.metrics == other.metrics and one.kept == other.kept and one.relative_flops == other.relative_flops < 1
        )
        assert other.examples == 41 and one.loss == pytest.approx(other.loss, rel=1e-5)
    rows, kept = predict_logits(model, data, Process(), 7)
    with torch.inference_mode():
        for i in (0, 20, 40):
            output = model(data.batch([i]))
            assert rows[i] == pytest.approx(output.logits[0].numpy(), abs=1e-5)
            assert logits[""][i] == pytest.approx(rows[i], abs=1e-5)
            assert kept[:, i].tolist() == output.kept[:, 0].tolist()
    dense, _ = evaluate(model, CLASSES, {"": data}, Process(), pruner=Dense())
    assert dense.relative_flops == 1 and dense.kept == [1.0] * 5 and dense.gflops == one.dense_gflops


def test_two_evaluation_sets_give_metrics_each_and_one_score():
    sets = {"": examples(9), "_mismatched": examples(8, seed=4)}
    result, logits = evaluate(small_model(), CLASSES, sets, Process())
    assert set(result.metrics) == {"accuracy", "macro_f1", "accuracy_mismatched", "macro_f1_mismatched"}
    assert result.score == result.metrics["accuracy"] and result.examples == 17
    assert [len(logits[suffix]) for suffix in sets] == [9, 8]
    losses = [evaluate(small_model(), CLASSES, {"": examples}, Process())[0].loss for examples in sets.values()]
    assert result.loss == pytest.approx((9 * losses[0] + 8 * losses[1]) / 17, rel=1e-5)


def test_bit_operations_of_very_many_tokens_are_counted():
    class Huge(nn.Module):
        config, linear_bits = replace(SMALL, hidden_size=2**21), 32

        def forward(self, batch, pruner):
            return Answers(torch.zeros(len(batch.lengths), 3), batch.lengths.expand(5, -1))

    result, _ = evaluate(Huge(), CLASSES, {"": examples(41)}, Process(), pruner=Dense())
    assert result.relative_flops == result.relative_bops == 1
