"""Examples in memory, and how they become packed batches.

The tokens of all examples lie in one flat buffer, example after example. A batch is made by slices of it.
The functions that use `datasets` and pyarrow import them: `predict` does without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from model import Batch
from support.errors import InputError

if TYPE_CHECKING:
    import datasets

CACHE_VERSION = 3  # part of every cache key: raise it when the tokenization or its columns change
IGNORED = -100  # the target of a choice that the loss leaves out
POOL = 16  # batches of an epoch that are sorted by length together


@dataclass
class Examples:
    """N tokenized examples with ΣT tokens together. What the targets and details mean is the task's business."""

    token_ids: np.ndarray  # (ΣT,) int32
    segment_ids: np.ndarray  # (ΣT,) int8
    lengths: np.ndarray  # (N,) int64
    targets: np.ndarray  # what the loss compares with: (N,) classes or scores, (N, 2) spans, (ΣT,) a label a token
    truncated: int = 0  # examples that were cut to the maximum length
    left_out: int = 0  # torn lines of the file, or questions without an answer
    details: Any = None  # what else the task needs to judge answers
    question_lengths: np.ndarray | None = None  # (N,) int64, see `model.Batch`; None: there are no questions
    teacher: Tensor | None = None  # (N, C) or (ΣT, C) float32, logits of the model to learn from
    unlabelled: int = 0  # so many at the end have the teacher's answers as their targets

    def __post_init__(self) -> None:
        self.starts = self.lengths.cumsum() - self.lengths  # (N,) each example's first token

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def from_table(cls, table: datasets.Dataset, **fields: Any) -> Examples:
        """Copies the columns token_ids and segment_ids of a table. fields: the other fields."""
        token_ids, lengths = list_buffer(table, "token_ids")
        return cls(token_ids, list_buffer(table, "segment_ids")[0], lengths, **fields)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Where the tokens of some examples lie in the buffers, in the order of `indices`: (T,)."""
        lengths = self.lengths[indices]
        return np.arange(lengths.sum()) + np.repeat(self.starts[indices] - (lengths.cumsum() - lengths), lengths)

    def batch(self, indices: np.ndarray) -> Batch:
        """Packs some examples, on the CPU."""
        indices = np.asarray(indices)
        rows, lengths = self.rows(indices), self.lengths[indices]
        positions = rows - np.repeat(self.starts[indices], lengths)
        token_ids, segment_ids = (torch.from_numpy(x[rows]).long() for x in (self.token_ids, self.segment_ids))
        questions = np.zeros_like(lengths) if self.question_lengths is None else self.question_lengths[indices]
        return Batch(token_ids, segment_ids, *map(torch.from_numpy, (positions, lengths, questions)))

    def extended(self, more: Examples) -> Examples:
        """These examples, then M more without labels, of which the teacher says what they are: its class, or score.

        Of heads that answer once for an example. Both have the logits of the teacher.
        """
        logits = more.teacher.numpy()
        answers = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(1)
        return Examples(
            np.concatenate([self.token_ids, more.token_ids]),
            np.concatenate([self.segment_ids, more.segment_ids]),
            np.concatenate([self.lengths, more.lengths]),
            targets=np.concatenate([self.targets, answers.astype(self.targets.dtype)]),
            truncated=self.truncated + more.truncated,
            left_out=self.left_out,
            teacher=torch.cat([self.teacher, more.teacher]),
            unlabelled=len(more),
        )

    def select(self, indices: np.ndarray) -> Examples:
        """Some of the examples, to run and not to judge."""
        rows = self.rows(indices)
        questions = None if self.question_lengths is None else self.question_lengths[indices]
        return Examples(
            self.token_ids[rows],
            self.segment_ids[rows],
            self.lengths[indices],
            targets=np.empty(0),
            question_lengths=questions,
        )


# ----------------------------------------------------------------------------------------------------------------------
# Batches


def token_batches(
    order: np.ndarray, lengths: np.ndarray, batch_size: int, max_tokens: int | None = None
) -> Iterator[np.ndarray]:
    """Cuts `order` into batches of at most `batch_size` examples and `max_tokens` tokens; a longer one stands alone."""
    start = 0
    while start < len(order):
        stop = start + batch_size
        if max_tokens:
            stop = start + max(1, int((lengths[order[start:stop]].cumsum() <= max_tokens).sum()))
        yield order[start:stop]
        start = stop


def sorted_batches(examples: Examples, batch_size: int) -> list[Batch]:
    """All examples in batches of similar length."""
    order = np.argsort(examples.lengths, kind="stable")
    return [examples.batch(indices) for indices in token_batches(order, examples.lengths, batch_size)]


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of an epoch as arrays of indices: each example once, similar lengths together.

    The order is shuffled and cut into pools of `POOL` batches. Each pool is sorted by length and cut into
    batches, and all batches are shuffled. The result depends on (seed, epoch) alone.
    """
    generator = np.random.default_rng((seed, epoch))
    order = generator.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), POOL * batch_size):
        pool = order[start : start + POOL * batch_size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


# ----------------------------------------------------------------------------------------------------------------------
# Tables of tokenized examples, kept in the cache of `datasets`


def cached_table(generate: Callable[[], Iterator[dict]], features: dict[str, Any], key: str) -> datasets.Dataset:
    """The records that `generate` yields, as a table. The cache of `datasets` gives it where it has one of this key.

    Raises: InputError as `generate` does, and for a cache that cannot be written, or is damaged.
    """
    import datasets
    from pyarrow import ArrowException

    datasets.disable_progress_bars()
    try:
        return datasets.Dataset.from_generator(generate, features=datasets.Features(features), fingerprint=key)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # the library wraps what its generator raises
            if isinstance(cause, InputError):
                raise cause from None
            generated = isinstance(error, datasets.exceptions.DatasetGenerationError)
            if isinstance(cause, (OSError, ArrowException)) or not generated:
                reason = (str(cause).splitlines() or [type(cause).__name__])[0]
                raise InputError(
                    f"{datasets.config.HF_DATASETS_CACHE}: the cache of tokenized data cannot be used ({reason}); make "
                    f"room there, remove generator/default-fingerprint={key}, or name another folder with "
                    "HF_DATASETS_CACHE"
                ) from None
            cause = cause.__cause__ or cause.__context__
        raise


def list_buffer(table: datasets.Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists as one flat buffer, and the length of each row's list (N,) int64."""
    import pyarrow.compute as pc

    column = table.data.column(name)
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(parts), pc.list_value_length(column).to_numpy().astype(np.int64)


def read_columns(table: datasets.Dataset, *names: str) -> Iterator[tuple]:
    """The values of columns, row by row, a chunk at a time: 200 times faster than the table's own iterator."""
    for part in table.data.to_batches():
        yield from zip(*(part.column(name).to_pylist() for name in names))


def chunked(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items; the last one may be shorter."""
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
