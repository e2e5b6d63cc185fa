"""Metrics of classifiers."""

import torch


def accuracy_and_f1(confusion: torch.Tensor) -> dict[str, float]:
    """Accuracy and macro F1.

    Args:
        confusion: [labels, labels], any float dtype; row: the true label, column: the predicted one, value: rows.

    Returns:
        ``accuracy``, and ``f1``: mean over the labels that occur in the data of 2·TP / (2·TP + FP + FN).
    """
    correct = confusion.diagonal()
    true_count, predicted_count = confusion.sum(dim=1), confusion.sum(dim=0)
    occurs = true_count > 0
    f1 = 2 * correct[occurs] / (true_count + predicted_count)[occurs]
    return {
        "accuracy": (correct.sum() / confusion.sum().clamp(min=1)).item(),
        "f1": f1.mean().item() if occurs.any() else 0.0,
    }
