"""What a model did on each held-out row, and the metrics that follow from it."""

import math
from dataclasses import dataclass

import numpy as np

from toolkit.evaluation.classification import accuracy_and_f1


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOutcomes:
    """Outcomes in the order of the rows, N of them; the same on every process.

    Attributes:
        loss: float64 [N], nats; of a language model the mean over the row's trained tokens, 0 where it has none.
        weight: float64 [N], a row's part in the mean loss: its trained tokens, or 1 for a classifier.
        expected, predicted: int64 [N], class numbers; None for a language model.
    """

    loss: np.ndarray
    weight: np.ndarray
    expected: np.ndarray | None = None
    predicted: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def correct(self) -> np.ndarray | None:
        """bool [N]; None for a language model."""
        return None if self.expected is None else self.expected == self.predicted


def metrics(outcomes: RowOutcomes) -> dict[str, float]:
    """The metrics of all rows together.

    Returns:
        For a language model ``loss``: Σ loss·weight / Σ weight, the mean negative log likelihood in nats over all
        trained tokens, ``perplexity`` and ``num_tokens``. For a classifier ``loss`` (mean over rows), ``accuracy`` and
        ``f1`` (macro mean over the labels that occur).
    """
    total = float(outcomes.weight.sum())
    loss = float((outcomes.loss * outcomes.weight).sum()) / max(total, 1.0)
    if outcomes.expected is None or outcomes.predicted is None:
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "num_tokens": total}
    return {"loss": loss, **accuracy_and_f1(outcomes.expected, outcomes.predicted)}
