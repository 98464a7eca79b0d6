"""What goes together and what does not: each refusal names the folder or the option."""

from dataclasses import replace
from pathlib import Path

import pytest
from small_models import SMALL

from runs.checks import check_pruning, check_task, describe_cut, known_labels, length_limit
from support.errors import InputError
from tasks import find_task, own_task

OWN = own_task(None, None, None, regression=False)
SCORES = own_task(None, None, None, regression=True)
FOLDER = Path("model")


def test_labels_of_your_own_data_are_the_checkpoints():
    config = replace(SMALL, labels=("CONTRADICTION", "NEUTRAL", "ENTAILMENT"))
    assert known_labels(OWN, config) == config.labels
    assert known_labels(OWN, replace(SMALL, labels=("LABEL_0", "LABEL_1"))) is None  # placeholders
    assert known_labels(find_task("MRPC"), config) == ("not_equivalent", "equivalent")


def test_the_length_is_the_users_or_the_checkpoints():
    assert length_limit(SMALL, FOLDER, None) == 128 and length_limit(SMALL, FOLDER, 20) == 20
    assert length_limit(replace(SMALL, max_position_embeddings=52), FOLDER, None) == 50
    with pytest.raises(InputError, match="--max-length 139: model has positions for 138 tokens"):
        length_limit(SMALL, FOLDER, 139)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"final_token_threshold": 1.5}, "--final-token-threshold 1.5"),
        ({"final_token_threshold": -0.1}, "--final-token-threshold -0.1"),
        ({"keep_rates": [1.0, 0.5]}, "--keep-rates: 2 rates, but the model has 5 layers"),
        ({"keep_rates": [1.0] * 5, "token_keep_rate": 0.5}, "pass one of them"),
        ({"token_keep_rate": 1.1}, "--token-keep-rate 1.1: expected -1e6 to 1"),
        ({"token_keep_rate": -2e6}, "--token-keep-rate -2000000.0"),  # a config.json with it would be refused
        ({"token_keep_rate": float("-inf")}, "--token-keep-rate -inf"),
        ({"token_keep_rate": float("nan")}, "--token-keep-rate nan"),
    ],
)
def test_pruning_out_of_range(changes, message):
    with pytest.raises(InputError, match=message):
        check_pruning(SMALL, changes)


def test_pruning_at_the_ends_of_its_range():
    check_pruning(SMALL, {"final_token_threshold": 0, "token_keep_rate": 1, "prune_mode": "topk"})
    check_pruning(SMALL, {"final_token_threshold": 1, "token_keep_rate": -3.0})
    with pytest.raises(InputError, match="never prunes the first layers, and this model has only 3"):
        check_pruning(replace(SMALL, num_hidden_layers=3), {"prune_mode": "topk"})
    few = replace(SMALL, num_hidden_layers=3, keep_rates=[1.0, 0.5, 0.2])
    check_pruning(few, {"prune_mode": "topk"})
    with pytest.raises(InputError, match="never prunes the first layers"):  # the schedule is back
        check_pruning(few, {"prune_mode": "topk", "token_keep_rate": 0.5, "keep_rates": None})


def test_a_task_must_be_the_checkpoints():
    assert check_task(FOLDER, SMALL, OWN) == ("a", "b", "c")
    one = replace(SMALL, labels=("score",))
    assert check_task(FOLDER, one, SCORES) == ()
    for config, task, message in (
        (
            SMALL,
            find_task("MRPC"),
            "model: has 3 outputs, but MRPC needs 2; evaluate the checkpoint of a run on this task",
        ),
        (SMALL, SCORES, "has 3 outputs, but your own data needs 1"),
        (SMALL, find_task("SQuAD"), "classifies texts, which is another kind of task than SQuAD"),
        (
            replace(SMALL, head="token"),
            OWN,
            r"tags words \(--tagging\), which is another kind of task than your own data",
        ),
        (replace(SMALL, head="span"), OWN, "finds answers in a text"),
    ):
        with pytest.raises(InputError, match=message):
            check_task(FOLDER, config, task)


def test_what_was_cut_is_counted():
    assert describe_cut(OWN, 0, 128) == ""
    assert describe_cut(OWN, 1, 128) == "1 text longer than 128 tokens was cut"
    assert describe_cut(OWN, 2000, 128) == "2,000 texts longer than 128 tokens were cut"
    assert describe_cut(find_task("SQuAD"), 2, 60) == "2 questions were cut: too long for windows of 60 tokens"
