"""How sure a metric on held-out rows is: the bootstrap over rows, and over seeds where there are several.

B samples, S seeds, N rows, L labels. A row's count in a sample is how often it was drawn.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from toolkit.evaluation.outcomes import RowOutcomes

Metric = Literal["accuracy", "f1", "loss"]

CONFIDENCE = 0.95
MAX_COUNTS = 4_000_000
"""Counts in memory at a time: 32 MB."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its percentile interval."""

    value: float
    low: float
    high: float


def interval(value: float, samples_B: np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    """The percentile interval: the middle ``confidence`` of the bootstrap samples.

    Args:
        value: the estimate on all rows.
        samples_B: [B] float64, the estimate on each sample.
        confidence: share of the samples inside.

    Source: B. Efron, R. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    tail = (1 - confidence) / 2
    low, high = np.quantile(samples_B, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def metric_value(outcomes: RowOutcomes, metric: Metric) -> float:
    """``metric`` on all rows: what :func:`toolkit.evaluation.outcomes.metrics` gives."""
    return float(_statistic(outcomes, metric)(np.ones((1, len(outcomes))))[0])


def resampled_metric(
    models: Sequence[RowOutcomes], metric: Metric, *, num_samples: int, seed: int | Sequence[int]
) -> np.ndarray:
    """``metric`` of several models on the same samples of their common rows.

    Each sample draws N of the N rows with replacement. The models get the same rows in each sample, so differences
    between them are paired.

    Args:
        models: M models' outcomes on the same N rows, N at least 1.
        metric: ``accuracy``, ``f1`` (macro, over the labels that occur in the sample) or ``loss``.
        num_samples: B.
        seed: of the draws; the same seed, the same samples.

    Returns:
        [M, B] float64.

    Raises:
        ValueError: no rows, or models with different numbers of rows.
    """
    num_rows = {len(outcomes) for outcomes in models}
    if len(num_rows) != 1 or 0 in num_rows:
        raise ValueError(f"models with {sorted(num_rows)} rows: the same rows for all, at least one")
    statistics = [_statistic(outcomes, metric) for outcomes in models]
    values_MB = np.empty((len(models), num_samples))
    begin = 0
    for counts_BN in _counts(num_rows.pop(), num_samples, np.random.default_rng(seed)):
        end = begin + len(counts_BN)
        for m, statistic in enumerate(statistics):
            values_MB[m, begin:end] = statistic(counts_BN)
        begin = end
    return values_MB


def resampled_seeds(num_seeds: int, num_samples: int, seed: int | Sequence[int]) -> np.ndarray:
    """Weights of the seeds in each sample: S of the S seeds drawn with replacement, each draw weighing 1/S.

    Returns:
        [S, B] float64; every column sums to 1.
    """
    generator = np.random.default_rng(seed)
    counts_BS = np.concatenate(list(_counts(num_seeds, num_samples, generator)))
    return counts_BS.T / num_seeds


def _counts(num_items: int, num_samples: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Blocks [b, N] float64 of how often each of N items is drawn in N draws, B rows in all."""
    block = max(1, MAX_COUNTS // num_items)
    for begin in range(0, num_samples, block):
        size = min(block, num_samples - begin)
        drawn = generator.integers(num_items, size=(size, num_items))
        drawn += np.arange(size)[:, None] * num_items
        counts = np.bincount(drawn.ravel(), minlength=size * num_items)
        yield counts.reshape(size, num_items).astype(np.float64)


def _statistic(outcomes: RowOutcomes, metric: Metric) -> Callable[[np.ndarray], np.ndarray]:
    """The metric as a function of counts [b, N] → [b]."""
    if metric == "loss":
        return lambda counts_BN: _ratio(counts_BN, outcomes.loss * outcomes.weight, outcomes.weight)
    if outcomes.expected is None or outcomes.predicted is None:
        raise ValueError(f"{metric} of a language model; loss is its metric")
    if metric == "accuracy":
        correct = (outcomes.expected == outcomes.predicted).astype(np.float64)
        return lambda counts_BN: _ratio(counts_BN, correct, np.ones_like(correct))
    expected, predicted = outcomes.expected, outcomes.predicted
    return lambda counts_BN: _macro_f1(counts_BN, expected, predicted)


def _ratio(counts_BN: np.ndarray, numerator_N: np.ndarray, denominator_N: np.ndarray) -> np.ndarray:
    """A sample that happens to draw only rows without weight has the metric of all rows."""
    denominator_B = counts_BN @ denominator_N
    total = denominator_N.sum()
    fallback = numerator_N.sum() / total if total > 0 else 0.0
    safe_B = np.where(denominator_B > 0, denominator_B, 1.0)
    return np.where(denominator_B > 0, counts_BN @ numerator_N / safe_B, fallback)


def _macro_f1(counts_BN: np.ndarray, expected_N: np.ndarray, predicted_N: np.ndarray) -> np.ndarray:
    """Mean over the labels that occur of 2 TP / (2 TP + FP + FN)."""
    labels, codes = np.unique(np.concatenate([expected_N, predicted_N]), return_inverse=True)
    is_expected_NL = np.eye(len(labels))[codes[: len(expected_N)]]
    is_predicted_NL = np.eye(len(labels))[codes[len(expected_N) :]]
    hits_BL = counts_BN @ (is_expected_NL * is_predicted_NL)
    num_expected_BL = counts_BN @ is_expected_NL
    both_BL = num_expected_BL + counts_BN @ is_predicted_NL
    occurs_BL = num_expected_BL > 0
    f1_BL = np.where(occurs_BL, 2 * hits_BL / np.where(both_BL > 0, both_BL, 1.0), 0.0)
    return f1_BL.sum(axis=1) / occurs_BL.sum(axis=1)
