import math

import numpy as np
import pytest

from toolkit.evaluation.outcomes import RowOutcomes, metrics


def test_loss_is_weighted_by_tokens():
    outcomes = RowOutcomes(loss=np.array([1.0, 0.0, 4.0]), weight=np.array([3.0, 0.0, 1.0]))
    assert metrics(outcomes) == {"loss": 7 / 4, "perplexity": math.exp(7 / 4), "num_tokens": 4.0}
    assert outcomes.correct is None
    assert len(outcomes) == 3


def test_a_classifier_counts_rows():
    outcomes = RowOutcomes(
        loss=np.array([1.0, 2.0]),
        weight=np.ones(2),
        expected=np.array([0, 1]),
        predicted=np.array([0, 0]),
    )
    assert outcomes.correct.tolist() == [True, False]
    assert metrics(outcomes) == {"loss": 1.5, "accuracy": 0.5, "f1": pytest.approx((2 / 3 + 0) / 2)}


def test_infinite_loss_and_no_rows():
    assert metrics(RowOutcomes(loss=np.array([800.0]), weight=np.ones(1)))["perplexity"] == math.exp(700)
    nothing = np.zeros(0)
    assert metrics(RowOutcomes(loss=nothing, weight=nothing))["loss"] == 0.0
    assert math.isnan(metrics(RowOutcomes(loss=np.array([math.nan]), weight=np.ones(1)))["loss"])
