import numpy as np
import pytest

from toolkit.evaluation.classification import accuracy_and_f1


def test_against_counts_by_hand():
    # label 0: 3 rows, 2 right; label 1: 2 rows, 1 right; label 2: none; predictions of 2: one
    metrics = accuracy_and_f1(np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 2]))
    assert metrics["accuracy"] == pytest.approx(3 / 5)
    f1_0, f1_1 = 2 * 2 / (2 * 2 + 0 + 1), 2 * 1 / (2 * 1 + 1 + 1)
    assert metrics["f1"] == pytest.approx((f1_0 + f1_1) / 2)


def test_no_rows():
    nothing = np.array([], dtype=np.int64)
    assert accuracy_and_f1(nothing, nothing) == {"accuracy": 0.0, "f1": 0.0}
