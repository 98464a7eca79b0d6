"""The paired bootstrap: an interval that holds the truth as often as it says, and that pairing makes narrow."""

import numpy as np
import pytest

from runs.bootstrap import paired_difference


def accuracy(targets: np.ndarray):
    return lambda answers, rows: float((answers == targets[rows]).mean())


def answers(targets: np.ndarray, right: float, generator: np.random.Generator) -> np.ndarray:
    """Answers to two classes, of which a share `right` is right on average."""
    return np.where(generator.random(len(targets)) < right, targets, 1 - targets)


def test_the_difference_is_that_of_the_means():
    targets = np.array([0, 1, 1, 0])
    first, second = [targets, 1 - targets], [np.array([0, 1, 0, 1]), np.array([1, 0, 0, 0])]
    result = paired_difference(accuracy(targets), first, second, samples=200)
    assert result.mean == pytest.approx((1 + 0) / 2 - (0.5 + 0.25) / 2)
    assert result.low < result.mean < result.high
    assert paired_difference(accuracy(targets), first, second, samples=200) == result
    assert paired_difference(accuracy(targets), first, first, samples=50) == (0, 0, 0)


def test_the_interval_holds_the_true_difference_in_95_of_100_cases():
    generator, held, widths = np.random.default_rng(0), 0, []
    for _ in range(300):
        targets = generator.integers(0, 2, 200)
        first, second = [answers(targets, 0.8, generator)], [answers(targets, 0.7, generator)]
        result = paired_difference(accuracy(targets), first, second, samples=200)
        held += result.low <= 0.1 <= result.high
        widths.append(result.high - result.low)
    assert 0.91 <= held / 300 <= 0.98
    # 2 · 1.96 standard errors of a difference of two independent shares
    assert np.mean(widths) == pytest.approx(3.92 * np.sqrt((0.8 * 0.2 + 0.7 * 0.3) / 200), rel=0.05)


def test_examples_that_are_hard_for_both_add_no_doubt():
    generator = np.random.default_rng(1)
    targets = generator.integers(0, 2, 400)
    first = answers(targets, 0.75, generator)
    second = first.copy()
    second[:8] = 1 - second[:8]
    result = paired_difference(accuracy(targets), [first], [second], samples=400)
    assert result.high - result.low < 0.04  # independent ones would have 0.12


def test_seeds_that_differ_widen_the_interval():
    generator = np.random.default_rng(2)
    targets = generator.integers(0, 2, 2000)
    rates = (0.7, 0.8, 0.9)
    first = [answers(targets, right, generator) for right in rates]
    second = [answers(targets, 0.8, generator) for _ in rates]
    spread = paired_difference(accuracy(targets), first, second, samples=400)
    alike = paired_difference(accuracy(targets), second, second[::-1], samples=400)
    assert spread.high - spread.low > 3 * (alike.high - alike.low)
