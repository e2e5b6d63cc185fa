"""When a participant stops."""

import json
import math

import pytest

from toolkit.rounds.schedule import EarlyStopping


def epochs_until_stop(scores: list[float | None], patience: int, threshold: float = 0.0) -> int | None:
    stopping = EarlyStopping(patience, threshold)
    for epoch, score in enumerate(scores, start=1):
        if stopping.observe(score):
            return epoch
    return None


@pytest.mark.parametrize(("patience", "expected"), [(0, None), (1, 3), (2, 6), (3, 7), (4, None)])
def test_patience(patience: int, expected: int | None) -> None:
    scores = [0.1, 0.2, 0.2, 0.3, 0.25, 0.3, 0.1, 0.4]
    assert epochs_until_stop(scores, patience) == expected


def test_improvements_must_pass_the_threshold() -> None:
    scores: list[float | None] = [0.1, 0.11, 0.12, 0.13, 0.14]
    assert epochs_until_stop(scores, 2) is None
    # Measured from the best score that counted, so small steps add up.
    assert epochs_until_stop(scores, 2, 0.01501) is None
    assert epochs_until_stop(scores, 1, 0.015) == 2
    assert epochs_until_stop(scores, 3, 0.5) == 4


def test_epochs_without_evaluation_do_not_count() -> None:
    assert epochs_until_stop([0.1, None, 0.1, None, None, 0.1], 2) == 6


def test_scores_that_are_not_finite_are_no_improvement() -> None:
    assert epochs_until_stop([math.nan, math.inf, 0.1], 2) == 2
    stopping = EarlyStopping(5)
    stopping.observe(0.5)
    stopping.observe(math.inf)
    assert stopping.best == 0.5


def test_the_state_goes_on() -> None:
    scores = [0.1, 0.5, 0.4, 0.5, 0.3, 0.6, 0.5, 0.5, 0.5]
    whole, part = EarlyStopping(3), EarlyStopping(3)
    for score in scores[:4]:
        assert whole.observe(score) == part.observe(score)
    resumed = EarlyStopping(3)
    resumed.load_state(json.loads(json.dumps(part.state())))
    assert [whole.observe(s) for s in scores[4:]] == [resumed.observe(s) for s in scores[4:]]
    assert resumed.state() == whole.state()
