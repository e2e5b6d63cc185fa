"""Metrics of classifiers."""

import numpy as np


def accuracy_and_f1(expected: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Accuracy and macro F1.

    Args:
        expected, predicted: int64 [N], class numbers of N rows.

    Returns:
        ``accuracy``, and ``f1``: mean over the labels that occur in the data of 2·TP / (2·TP + FP + FN). Both 0 where
        there are no rows.
    """
    if len(expected) == 0:
        return {"accuracy": 0.0, "f1": 0.0}
    num_labels = int(max(expected.max(), predicted.max())) + 1
    hits = np.bincount(expected[expected == predicted], minlength=num_labels)
    num_expected = np.bincount(expected, minlength=num_labels)
    num_predicted = np.bincount(predicted, minlength=num_labels)
    occurs = num_expected > 0
    f1 = 2 * hits[occurs] / (num_expected + num_predicted)[occurs]
    return {"accuracy": float(hits.sum() / len(expected)), "f1": float(f1.mean())}
