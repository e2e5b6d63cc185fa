"""Merge every k epochs."""

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.rounds.schedule.performance import troubled
from toolkit.rounds.schedule.progress import ScoreWindows
from toolkit.rounds.schedule.registry import MergeDecision, Observation, Schedule, Trigger, schedule


class FixedFrequency:
    """Merge after every epoch that is a multiple of the frequency.

    Args:
        frequency: epochs from merge to merge.
        performance_trigger: merge in between also when a participant falls, falls behind or stands still
            (:func:`toolkit.rounds.schedule.performance.troubled`).
        convergence_threshold: of standing still, improvement of the score per evaluation.
        window: evaluations that the trigger looks at.
    """

    def __init__(
        self,
        frequency: int,
        *,
        performance_trigger: bool = False,
        convergence_threshold: float = 1e-4,
        window: int = 3,
    ) -> None:
        if frequency < 1:
            raise ValueError(f"a merge every {frequency} epochs; 1 at least")
        self.frequency = frequency
        self._performance_trigger = performance_trigger
        self._windows = ScoreWindows(window, convergence_threshold)

    def observe(self, observations: Sequence[Observation]) -> None:
        self._windows.observe(observations)

    def decide(self, epoch: int, active: Sequence[str]) -> MergeDecision:
        trigger: Trigger = "none"
        confidence, reason = 1.0, f"epoch {epoch} is no multiple of {self.frequency}"
        progress = self._windows.progress(active)
        found = troubled(progress, self._windows.window) if self._performance_trigger else []
        if not active:
            reason = "no participant is active"
        elif epoch % self.frequency == 0:
            every = "epoch" if self.frequency == 1 else f"{self.frequency} epochs"
            trigger, reason = "frequency", f"a merge every {every}"
        elif found:
            trigger, confidence = "performance", len(found) / len(self._windows.training(active))
            reason = "; ".join(trouble.reason for trouble in found)
        return MergeDecision(
            should_merge=trigger != "none",
            confidence=confidence,
            reason=reason,
            metrics={
                "epochs_since_merge": float(epoch - self._windows.last_merge_epoch),
                "effective_frequency": float(self.frequency),
                "num_with_full_window": float(len(progress)),
                "num_troubled": float(len(found)),
            },
            recommended_frequency=self.frequency,
            trigger=trigger,
        )

    def record_merge(self, epoch: int, accepted: Mapping[str, bool]) -> None:
        self._windows.last_merge_epoch = epoch

    def state(self) -> dict[str, Any]:
        return {"windows": self._windows.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._windows.load_state(state["windows"])


@schedule("fixed")
def fixed(config: Any) -> Schedule:
    return FixedFrequency(
        config.merge_frequency,
        performance_trigger=config.performance_merge_trigger,
        convergence_threshold=config.convergence_threshold,
        window=config.adaptive_window,
    )
