"""How much faster: ratios of rates with bootstrap intervals.

A trial is a list of steps with tokens and seconds; its rate is all tokens over all seconds. B samples, S steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

NUM_SAMPLES = 4000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of rates, and its interval."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """``faster``, ``slower``, or ``no difference`` where the interval spans 1."""
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "no difference"


Trial = Sequence[tuple[float, float]]
"""(tokens, seconds) of each step."""


def rate(trial: Trial) -> float:
    """Tokens a second over all steps."""
    tokens, seconds = np.asarray(trial, dtype=np.float64).sum(axis=0)
    return float(tokens / seconds)


def paired_ratio(arm: Sequence[Trial], reference: Sequence[Trial], seed: int = 0) -> Ratio:
    """Geometric mean over pairs of the arm's rate over the reference's.

    The interval comes from a bootstrap in two stages: pairs are drawn with replacement, then steps within each trial.

    Args:
        arm, reference: trials of the same repeats, in the same order.
        seed: of the bootstrap.

    Raises:
        ValueError: no pair, or different numbers of trials.

    Source: A. Davison, D. Hinkley, Bootstrap Methods and their Application (1997), section 3.8.
    """
    if not arm or len(arm) != len(reference):
        raise ValueError(f"{len(arm)} and {len(reference)} trials do not make pairs")
    generator = np.random.default_rng(seed)
    logs = [
        np.log(_rates(a, generator)) - np.log(_rates(r, generator))
        for a, r in zip(arm, reference, strict=True)
    ]
    value = np.mean([np.log(rate(a)) - np.log(rate(r)) for a, r in zip(arm, reference, strict=True)])
    return _ratio(float(value), _mean_of_drawn(np.array(logs), generator), len(arm))


def unpaired_ratio(new: Sequence[Trial], old: Sequence[Trial], seed: int = 0) -> Ratio:
    """Geometric mean of the rates in ``new`` over that in ``old``, trials of two benchmarks that did not alternate.

    Raises:
        ValueError: one of them has no trial.
    """
    if not new or not old:
        raise ValueError("no trials to compare")
    generator = np.random.default_rng(seed)
    logs = [np.array([np.log(_rates(trial, generator)) for trial in trials]) for trials in (new, old)]
    values = [np.mean([np.log(rate(trial)) for trial in trials]) for trials in (new, old)]
    samples_B = _mean_of_drawn(logs[0], generator) - _mean_of_drawn(logs[1], generator)
    return _ratio(float(values[0] - values[1]), samples_B, min(len(new), len(old)))


def _rates(trial: Trial, generator: np.random.Generator) -> np.ndarray:
    """[B] rates of the trial with its steps drawn with replacement."""
    steps_S2 = np.asarray(trial, dtype=np.float64)
    drawn_BS = generator.integers(len(steps_S2), size=(NUM_SAMPLES, len(steps_S2)))
    sums_B2 = steps_S2[drawn_BS].sum(axis=1)
    return sums_B2[:, 0] / sums_B2[:, 1]


def _mean_of_drawn(logs_TB: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """[B] means over trials drawn with replacement."""
    num_trials, num_samples = logs_TB.shape
    drawn_TB = generator.integers(num_trials, size=(num_trials, num_samples))
    return np.take_along_axis(logs_TB, drawn_TB, axis=0).mean(axis=0)


def _ratio(log_value: float, log_samples_B: np.ndarray, num_trials: int) -> Ratio:
    tail = _tail(num_trials)
    low, high = np.quantile(log_samples_B, [tail, 1 - tail])
    return Ratio(float(np.exp(log_value)), float(np.exp(low)), float(np.exp(high)))


def _tail(num_trials: int) -> float:
    """Share of the samples that is cut at each end.

    Percentile intervals of few trials are too narrow; theirs are expanded as Student's interval is wider than the
    normal one: T. Hesterberg, What Teachers Should Know About the Bootstrap (2015), arXiv:1411.5279, section 5.1.
    Student's quantile by Abramowitz and Stegun 26.7.5.
    """
    normal = NormalDist()
    z = normal.inv_cdf((1 + CONFIDENCE) / 2)
    if num_trials == 1:
        return (1 - CONFIDENCE) / 2  # nothing is known between trials; the interval is that of the steps
    df = num_trials - 1
    t = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    return normal.cdf(-t * (num_trials / df) ** 0.5)
