"""Ratios of rates: their intervals cover what is so, and a verdict needs more than noise."""

import numpy as np
import pytest

from toolkit.benchmarks.ratio import paired_ratio, rate, step_by_step, unpaired_ratio

NUM_STEPS = 12


def trials(seconds, *, seed, count=3, noise=0.05, drift=0.03):
    """Trials of steps with 100 tokens; each trial has a speed of its own, and each step its noise."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        own = seconds * np.exp(drift * generator.standard_normal())
        made.append([(100.0, own * np.exp(noise * generator.standard_normal())) for _ in range(NUM_STEPS)])
    return made


def test_the_rate_is_all_tokens_over_all_seconds():
    assert rate([(10, 1.0), (30, 1.0)]) == 20.0


def test_the_ratio_is_the_geometric_mean_of_the_pairs():
    arm, reference = [[(8, 1.0)], [(2, 1.0)]], [[(2, 1.0)], [(2, 1.0)]]
    assert paired_ratio(arm, reference).value == pytest.approx(2.0)


def test_what_is_alike_is_no_difference_and_what_is_twice_as_fast_is_faster():
    alike = [paired_ratio(trials(1.0, seed=2 * s), trials(1.0, seed=2 * s + 1)).verdict for s in range(40)]
    assert alike.count("no difference") >= 36  # a 95 % interval, with three pairs
    assert paired_ratio(trials(0.5, seed=1), trials(1.0, seed=2)).verdict == "faster"
    assert paired_ratio(trials(1.0, seed=1), trials(0.5, seed=2)).verdict == "slower"


@pytest.mark.parametrize(("confidence", "at_least"), [(0.95, 182), (0.99, 193)])
@pytest.mark.parametrize("count", [2, 3, 5, 9])
def test_intervals_cover_the_truth_as_often_as_they_say(count, confidence, at_least):
    """Also with few trials, where a plain percentile interval of three covers it in about 15 of 20.

    Of 200, 190 and 198 are expected, with standard deviations of 3 and 1.4.
    """
    covered = 0
    for seed in range(200):
        new = trials(0.8, seed=1000 + seed, drift=0.05, count=count)
        old = trials(1.0, seed=5000 + seed, drift=0.05, count=count)
        found = unpaired_ratio(new, old, confidence=confidence)
        covered += found.low <= 1 / 0.8 <= found.high
    assert covered >= at_least


def test_pairs_take_out_what_both_share():
    """A machine that is half as fast in the second repeat changes both arms of the pair."""
    fast, slow = trials(1.0, seed=3, count=1), trials(2.0, seed=4, count=1)
    other_fast, other_slow = trials(0.9, seed=5, count=1), trials(1.8, seed=6, count=1)
    paired = paired_ratio([*other_fast, *other_slow], [*fast, *slow])
    unpaired = unpaired_ratio([*other_fast, *other_slow], [*fast, *slow])
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 3


def test_the_same_seed_gives_the_same_interval():
    made = trials(1.0, seed=1, count=9), trials(1.1, seed=2, count=9)
    assert paired_ratio(*made) == paired_ratio(*made)
    assert paired_ratio(*made) != paired_ratio(*made, seed=1)


def test_steps_that_were_disturbed_do_not_count_where_steps_are_the_same():
    new, old = trials(1.1, seed=1, drift=0.0), trials(1.0, seed=2, drift=0.0)
    plain = unpaired_ratio(*step_by_step(new, old))
    for trial in new[:2]:
        trial[3:6] = [(100.0, 9.0)] * 3
    assert unpaired_ratio(*step_by_step(new, old)).value == pytest.approx(plain.value, rel=0.05)
    assert unpaired_ratio(new, old).value < 0.7 * plain.value
    other = [[(50.0, 1.0), *new[0][1:]], *new[1:]]
    assert step_by_step(other, old) == (other, old)


def test_no_pairs_are_an_error():
    with pytest.raises(ValueError, match="pairs"):
        paired_ratio(trials(1.0, seed=1), [])
    with pytest.raises(ValueError, match="no trials"):
        unpaired_ratio([], trials(1.0, seed=1))
