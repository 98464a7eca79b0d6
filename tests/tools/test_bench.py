"""Speed: what is counted is exact, what is timed belongs together, and the conditions say what was measured."""

import numpy as np
import pytest
import torch
from small_models import pruning_model, random_sequences, small_model

from data import Examples, sorted_batches
from model import Hard, Uncounted, pack
from support.checkpoint import load_model, save_model
from support.errors import InputError
from support.process import Process
from tools.bench import BenchOptions, bench_checkpoint, measure_speed
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
    assert speed.done_reduction == pytest.approx((layer(n, n) + last_layer(n)) / (layer(n, 1) + last_layer(1)))


def test_the_last_layers_count_is_not_timed():
    """The timed passes ask for no scores of the last layer, and one pruner serves them all."""
    model, asked = pruning_model(prune_mode="absolute_threshold"), []
    note = lambda _, inputs, output: asked.append((inputs[1], output.steps[-1].scores is not None))  # noqa: E731
    model.register_forward_hook(note)
    measure_speed(model, sorted_batches(examples(random_sequences(6, longest=40)), 3), Process(), repeats=2)
    pruned = [(pruner, scored) for pruner, scored in asked if isinstance(pruner, (Hard, Uncounted))]
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
        assert result["speeds"][0]["done_reduction"] == reductions[-1]  # every token's last state is read
    assert reductions[0] > 2 and reductions[1] == 1
