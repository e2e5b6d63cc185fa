"""How much faster: ratios of rates with intervals.

A trial is a list of steps with tokens and seconds; its rate is all tokens over all seconds. What varies from one trial
to the next is what an interval has to cover: steps of ragged rows differ for other reasons. B samples, S steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

NUM_SAMPLES = 4000
CONFIDENCE, HIGH_CONFIDENCE = 0.95, 0.99
FEW = 8
"""Below so many trials a bootstrap, which cannot reach beyond them, is too narrow; Student's interval is taken."""
STUDENT = {
    CONFIDENCE: (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179),
    HIGH_CONFIDENCE: (63.657, 9.925, 5.841, 4.604, 4.032, 3.707, 3.499, 3.355, 3.250, 3.169, 3.106, 3.055),
}
"""Student's 97.5 and 99.5 % quantiles for 1 to 12 degrees of freedom, of two-sided intervals."""


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

    The interval is of the mean of the logarithms over pairs: Student's for few pairs, from 8 on a bootstrap over pairs.
    For a single pair it is a bootstrap over the steps of both trials, which says nothing of the next trial.

    Args:
        arm, reference: trials of the same repeats, in the same order.
        seed: of the bootstrap.

    Raises:
        ValueError: no pair, or different numbers of trials.

    Source: B. Efron, R. Tibshirani, An Introduction to the Bootstrap (1993), chapters 12 and 13.
    """
    if not arm or len(arm) != len(reference):
        raise ValueError(f"{len(arm)} and {len(reference)} trials do not make pairs")
    if len(arm) == 1:
        return _of_single_trials(arm[0], reference[0], seed, CONFIDENCE)
    logs_R = _log_rates(arm) - _log_rates(reference)
    value, error = float(logs_R.mean()), _standard_error(logs_R)
    if len(logs_R) < FEW:
        return _student(value, error, len(logs_R) - 1, CONFIDENCE)
    generator = np.random.default_rng(seed)
    means_B = _drawn_means(logs_R, generator)
    return _percentiles(value, means_B, len(logs_R), CONFIDENCE)


def unpaired_ratio(
    new: Sequence[Trial], old: Sequence[Trial], seed: int = 0, *, confidence: float = CONFIDENCE
) -> Ratio:
    """Geometric mean of the rates in ``new`` over that in ``old``, trials of two benchmarks that did not alternate.

    Intervals as in :func:`paired_ratio`, of the given confidence (0.95 or 0.99); Student's takes both benchmarks to
    scatter alike.

    Raises:
        ValueError: one of them has no trial.
    """
    if not new or not old:
        raise ValueError("no trials to compare")
    num_trials = min(len(new), len(old))
    if max(len(new), len(old)) == 1:
        return _of_single_trials(new[0], old[0], seed, confidence)
    logs = [_log_rates(new), _log_rates(old)]
    value = float(logs[0].mean() - logs[1].mean())
    if num_trials < FEW:
        degrees = len(new) + len(old) - 2
        variance = sum(float(((side - side.mean()) ** 2).sum()) for side in logs) / degrees
        error = (variance * (1 / len(new) + 1 / len(old))) ** 0.5
        return _student(value, error, degrees, confidence)
    generator = np.random.default_rng(seed)
    means_B = _drawn_means(logs[0], generator) - _drawn_means(logs[1], generator)
    return _percentiles(value, means_B, num_trials, confidence)


def step_by_step(new: Sequence[Trial], old: Sequence[Trial]) -> tuple[list[Trial], list[Trial]]:
    """Trials whose steps are the same batches, as one step each: how much longer than usual its typical step took.

    Where every trial has the same tokens step by step, each step's seconds are divided by the median of that step over
    the old trials, and a trial is the median of that over its steps: what disturbs a few steps does not count. Other
    trials come back as they are.
    """
    tokens = {tuple(count for count, _ in trial) for trial in (*new, *old)}
    if len(tokens) != 1:
        return list(new), list(old)
    usual_S = np.median([[seconds for _, seconds in trial] for trial in old], axis=0)

    def typical(trial: Trial) -> Trial:
        return [(1.0, float(np.median(np.array([seconds for _, seconds in trial]) / usual_S)))]

    return [typical(trial) for trial in new], [typical(trial) for trial in old]


def _log_rates(trials: Sequence[Trial]) -> np.ndarray:
    return np.log([rate(trial) for trial in trials])


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5)


def _student(log_value: float, error: float, degrees_of_freedom: int, confidence: float) -> Ratio:
    quantiles = STUDENT[confidence]
    reach = quantiles[min(degrees_of_freedom, len(quantiles)) - 1] * error
    return Ratio(float(np.exp(log_value)), float(np.exp(log_value - reach)), float(np.exp(log_value + reach)))


def _drawn_means(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """[B] means of as many values, drawn with replacement."""
    return values[generator.integers(len(values), size=(NUM_SAMPLES, len(values)))].mean(axis=1)


def _percentiles(log_value: float, samples_B: np.ndarray, num_trials: int | None, confidence: float) -> Ratio:
    """The percentile interval, expanded as Student's is wider than the normal one.

    Source: T. Hesterberg, What Teachers Should Know About the Bootstrap (2015), arXiv:1411.5279, section 5.1; Student's
    quantile by Abramowitz and Stegun 26.7.5.
    """
    normal = NormalDist()
    tail = (1 - confidence) / 2
    if num_trials is not None:
        z, df = -normal.inv_cdf(tail), num_trials - 1
        t = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
        tail = normal.cdf(-t * (num_trials / df) ** 0.5)
    low, high = np.quantile(samples_B, [tail, 1 - tail])
    return Ratio(float(np.exp(log_value)), float(np.exp(low)), float(np.exp(high)))


def _of_single_trials(arm: Trial, reference: Trial, seed: int, confidence: float) -> Ratio:
    generator = np.random.default_rng(seed)
    samples_B = np.log(_drawn_rates(arm, generator)) - np.log(_drawn_rates(reference, generator))
    return _percentiles(float(np.log(rate(arm) / rate(reference))), samples_B, None, confidence)


def _drawn_rates(trial: Trial, generator: np.random.Generator) -> np.ndarray:
    """[B] rates of the trial with its steps drawn with replacement."""
    steps_S2 = np.asarray(trial, dtype=np.float64)
    drawn_BS = generator.integers(len(steps_S2), size=(NUM_SAMPLES, len(steps_S2)))
    sums_B2 = steps_S2[drawn_BS].sum(axis=1)
    return sums_B2[:, 0] / sums_B2[:, 1]
