"""Examples on flat buffers, and how they become batches."""

import datasets
import numpy as np
import pytest
import torch

from data import (
    Examples,
    cached_table,
    chunked,
    epoch_batches,
    list_buffer,
    read_columns,
    sorted_batches,
    token_batches,
)
from model import pack
from support.errors import InputError

TOKENS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
SEGMENTS = [[0, 0, 1], [0], [0, 1], [0, 1, 1, 1]]


@pytest.fixture
def table() -> datasets.Dataset:
    numbers = datasets.List(datasets.Value("int32"))
    features = {"token_ids": numbers, "segment_ids": datasets.List(datasets.Value("int8")), "line": numbers.feature}
    columns = {"token_ids": TOKENS, "segment_ids": SEGMENTS, "line": [1, 2, 3, 5]}
    parts = [
        datasets.Dataset.from_dict({k: v[a:b] for k, v in columns.items()}, datasets.Features(features))
        for a, b in ((0, 1), (1, 4))
    ]
    return datasets.concatenate_datasets(parts)  # in two chunks, as long tables are


@pytest.fixture
def examples(table) -> Examples:
    return Examples.from_table(table, targets=np.array([3, 1, 2, 4]), truncated=1)


def test_a_table_becomes_flat_buffers(examples):
    assert examples.token_ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13, 14] and examples.token_ids.dtype == np.int32
    assert examples.lengths.tolist() == [3, 1, 2, 4] and examples.starts.tolist() == [0, 3, 4, 6]
    assert len(examples) == 4 and examples.truncated == 1


def test_rows_by_hand(examples):
    assert examples.rows(np.array([2, 0])).tolist() == [4, 5, 0, 1, 2]
    assert examples.rows(np.array([3, 3])).tolist() == [6, 7, 8, 9, 6, 7, 8, 9]


@pytest.mark.parametrize("indices", [[0], [2, 0], [3, 1, 0, 2], [1, 1]])
def test_a_batch_is_what_pack_makes_of_lists(examples, indices):
    batch = examples.batch(np.array(indices))
    expected = pack([TOKENS[i] for i in indices], [SEGMENTS[i] for i in indices])
    for ours, theirs in zip(batch, expected):
        assert torch.equal(ours, theirs) and ours.dtype == torch.int64


def test_a_selection_runs_like_its_examples(examples):
    part = examples.select(np.array([3, 1]))
    assert len(part) == 2
    for ours, theirs in zip(part.batch(np.array([1, 0])), examples.batch(np.array([1, 3]))):
        assert torch.equal(ours, theirs)


def test_columns_row_by_row(table):
    assert list(read_columns(table, "line", "token_ids")) == [(n, ids) for n, ids in zip([1, 2, 3, 5], TOKENS)]
    flat, lengths = list_buffer(table, "segment_ids")
    assert flat.tolist() == sum(SEGMENTS, []) and lengths.tolist() == [3, 1, 2, 4]


def test_a_table_is_made_once_and_errors_come_through(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    calls = []

    def generate():
        calls.append(1)
        yield {"x": 1}

    def refuse():
        yield {"x": 1}
        raise InputError("line 2: no")

    features = {"x": datasets.Value("int32")}
    assert [cached_table(generate, features, "a" * 32)["x"][0] for _ in range(2)] == [1, 1] and len(calls) == 1
    cached_table(generate, features, "b" * 32)
    assert len(calls) == 2
    with pytest.raises(InputError, match="^line 2: no$"):
        cached_table(refuse, features, "c" * 32)


# ---- batches ----


def test_token_batches_by_hand():
    lengths = np.array([4, 1, 2, 9, 3])
    order = np.array([1, 2, 4, 0, 3])  # 1 2 3 4 9 tokens

    def cut(*limits):
        return [batch.tolist() for batch in token_batches(order, lengths, *limits)]

    assert cut(2) == [[1, 2], [4, 0], [3]]
    assert cut(3, 5) == [[1, 2], [4], [0], [3]]  # 3 and 4 tokens are more than 5 together; 9 stand alone
    assert cut(5, 100) == [[1, 2, 4, 0, 3]]


def test_sorted_batches_hold_every_example_by_length(examples):
    batches = sorted_batches(examples, 3)
    assert [batch.lengths.tolist() for batch in batches] == [[1, 2, 3], [4]]
    assert batches[0].token_ids.tolist() == [8, 9, 10, 5, 6, 7]


def test_each_example_once_an_epoch_and_similar_lengths_together():
    lengths = np.random.default_rng(0).integers(1, 100, 1003)
    batches = epoch_batches(lengths, 16, seed=7, epoch=0)
    assert sorted(np.concatenate(batches)) == list(range(1003)) and len(batches) == 63
    spread = np.mean([np.ptp(lengths[b]) for b in batches])
    assert spread < np.ptp(lengths) / 5
    again = epoch_batches(lengths, 16, seed=7, epoch=0)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again))
    for seed, epoch in ((7, 1), (8, 0)):
        assert not np.array_equal(np.concatenate(batches), np.concatenate(epoch_batches(lengths, 16, seed, epoch)))


def test_chunked():
    assert list(chunked(range(5), 2)) == [[0, 1], [2, 3], [4]] and list(chunked([], 2)) == []
