"""When a participant has trained enough."""

import math
from collections.abc import Mapping
from typing import Any


class EarlyStopping:
    """Stop after ``patience`` evaluations in a row without an improvement.

    Args:
        patience: number of evaluations; 0 never stops.
        threshold: a score counts as an improvement when it is above the best one by more than this.
    """

    def __init__(self, patience: int, threshold: float = 0.0) -> None:
        self.patience = patience
        self.threshold = threshold
        self.best: float | None = None
        self.num_without_improvement = 0

    def observe(self, score: float | None) -> bool:
        """Take in the score of an evaluation, higher is better; whether to stop now.

        None (nothing was evaluated) changes nothing; a score that is not finite is no improvement.
        """
        if score is not None:
            if math.isfinite(score) and (self.best is None or score > self.best + self.threshold):
                self.best, self.num_without_improvement = score, 0
            else:
                self.num_without_improvement += 1
        return 0 < self.patience <= self.num_without_improvement

    def state(self) -> dict[str, Any]:
        """What stopping depends on, as JSON values."""
        return {"best": self.best, "num_without_improvement": self.num_without_improvement}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.best = state["best"]
        self.num_without_improvement = int(state["num_without_improvement"])
