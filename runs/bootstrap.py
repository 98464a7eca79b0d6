"""How sure the difference of two scores is: a paired bootstrap over examples and seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Score = Callable[[np.ndarray, np.ndarray], float]  # of answers (n, ...) to the examples of some rows (n,)


class Difference(NamedTuple):
    """A difference of mean scores, and the ends of its 95% interval."""

    mean: float
    low: float
    high: float


def paired_difference(
    score: Score,
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    samples: int = 1000,
) -> Difference:
    """How much higher one method's mean score over S seeds is than another's, with its 95% interval.

    first, second: S times answers (N, ...) to the same N examples, the seeds in the same order. Each sample draws N
    examples and S seeds with replacement, the same ones for both methods, so that an example which is hard for both
    adds no doubt (Koehn, "Statistical significance tests for machine translation evaluation", EMNLP 2004). Few seeds
    show too little of the doubt that training adds: S of them (S - 1) / S of its variance, and one nothing of it.
    """
    generator, N, S = np.random.default_rng(0), len(first[0]), len(first)

    def difference(rows: np.ndarray, seeds: np.ndarray) -> float:
        return float(np.mean([score(first[s][rows], rows) - score(second[s][rows], rows) for s in seeds]))

    drawn = [
        difference(generator.integers(0, N, N), generator.integers(0, S, S) if S > 1 else np.zeros(1, np.int64))
        for _ in range(samples)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Difference(difference(np.arange(N), np.arange(S)), float(low), float(high))
