"""Merge at a frequency that follows the results."""

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.rounds.schedule.performance import troubled
from toolkit.rounds.schedule.progress import Progress, ScoreWindows
from toolkit.rounds.schedule.registry import MergeDecision, Observation, Schedule, Trigger, schedule

MAJORITY = 0.5
"""Share of the participants with a full window from which on they move the frequency."""


class AdaptiveMergeScheduler:
    """Merge when the effective frequency, which moves between a minimum and a maximum, says so.

    It begins at ``base_merge_frequency`` epochs. After every epoch with evaluations it moves by one epoch at most, and
    stays there until it moves again:

    - down, toward more merges, where at least half of the participants with a full window are on a plateau: by
      themselves they hardly learn any more;
    - up, toward fewer merges, where at least half are rising as in the beginning: they do well alone. Once between two
      merges only, or the next merge would run away from the epochs.

    A merge that less than half of the participants took over moves it up by one too. :class:`Progress` has the formulas
    and thresholds of plateau and rising. A merge is due

    - when the effective frequency has passed since the last one (``frequency``, or ``adaptive`` where it has moved);
    - before that, when every participant that trains has converged, on a whole window of evaluations since the last
      merge (``convergence``);
    - before that, with ``performance_trigger``, when a participant falls, falls behind or stands still
      (``performance``);

    and never within ``min_merge_frequency`` epochs of the last one.

    Args:
        base_merge_frequency: epochs from merge to merge in the beginning.
        convergence_threshold: a participant has converged when its score improves by less per evaluation.
        min_merge_frequency, max_merge_frequency: bounds of the effective frequency, in epochs.
        window: evaluations that trends are told from.
        performance_trigger: merge also when a participant is in trouble.
    """

    def __init__(
        self,
        base_merge_frequency: int = 3,
        convergence_threshold: float = 1e-4,
        min_merge_frequency: int = 1,
        max_merge_frequency: int = 10,
        *,
        window: int = 3,
        performance_trigger: bool = False,
    ) -> None:
        if not 1 <= min_merge_frequency <= max_merge_frequency:
            raise ValueError(
                f"no frequency lies between {min_merge_frequency} and {max_merge_frequency} epochs"
            )
        self.min_merge_frequency = min_merge_frequency
        self.max_merge_frequency = max_merge_frequency
        self.base_merge_frequency = self._bounded(base_merge_frequency)
        self.effective_frequency = self.base_merge_frequency
        self._windows = ScoreWindows(window, convergence_threshold)
        self._performance_trigger = performance_trigger
        self._last_move = "the beginning"
        self._has_risen = False
        """Whether the participants' rise has moved the frequency since the last merge."""

    def observe(self, observations: Sequence[Observation]) -> None:
        if not self._windows.observe(observations):
            return
        progress = self._windows.progress([observation.participant for observation in observations])
        if not progress:
            return
        on_plateau, rising = _share(progress, "is_on_plateau"), _share(progress, "is_rising")
        if on_plateau >= MAJORITY:
            self._move(-1, f"{on_plateau:.0%} of the participants are on a plateau")
        elif rising >= MAJORITY and not self._has_risen:
            self._has_risen = True
            self._move(1, f"{rising:.0%} of the participants are rising")

    def evaluate_merge_necessity(self, current_epoch: int, active_locales: Sequence[str]) -> MergeDecision:
        """:meth:`decide` under the name that the documentation of iterative training gives it."""
        return self.decide(current_epoch, active_locales)

    def decide(self, epoch: int, active: Sequence[str]) -> MergeDecision:
        progress = self._windows.progress(active)
        trigger, confidence, reason = self._answer(epoch, active, progress)
        return MergeDecision(
            should_merge=trigger != "none",
            confidence=confidence,
            reason=reason,
            metrics=self._metrics(epoch, progress),
            recommended_frequency=self.effective_frequency,
            trigger=trigger,
        )

    def record_merge(self, epoch: int, accepted: Mapping[str, bool]) -> None:
        self._windows.last_merge_epoch = epoch
        self._has_risen = False
        if accepted and sum(accepted.values()) < MAJORITY * len(accepted):
            self._move(
                1, f"{sum(accepted.values())} of {len(accepted)} participants took the last merge over"
            )

    def state(self) -> dict[str, Any]:
        return {
            "windows": self._windows.state(),
            "effective_frequency": self.effective_frequency,
            "last_move": self._last_move,
            "has_risen": self._has_risen,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._windows.load_state(state["windows"])
        self.effective_frequency = int(state["effective_frequency"])
        self._last_move = str(state["last_move"])
        self._has_risen = bool(state["has_risen"])

    def _answer(
        self, epoch: int, active: Sequence[str], progress: Mapping[str, Progress]
    ) -> tuple[Trigger, float, str]:
        since, every = epoch - self._windows.last_merge_epoch, self.effective_frequency
        if not active:
            return "none", 1.0, "no participant is active"
        if since >= every and every == self.base_merge_frequency:
            return "frequency", 1.0, f"{since} epochs since the last merge; every {every}"
        training = self._windows.training(active)
        if since >= every:
            reason = f"{since} epochs since the last merge; every {every} since {self._last_move}"
            return "adaptive", len(progress) / max(len(training), 1), reason
        if since < self.min_merge_frequency:
            return "none", 1.0, f"{since} epochs since the last merge; at least {self.min_merge_frequency}"
        converged = [n for n, p in progress.items() if p.has_converged and self._is_fresh(p)]
        if training and len(converged) == len(training):
            return "convergence", 1.0, f"all gained less than {self._windows.threshold:g} per evaluation"
        found = troubled(progress, self._windows.window) if self._performance_trigger else []
        if found:
            return "performance", len(found) / len(training), "; ".join(trouble.reason for trouble in found)
        against = 1 - len(converged) / max(len(training), 1)
        return "none", against, f"{since} epochs since the last merge; every {every}"

    def _is_fresh(self, progress: Progress) -> bool:
        return progress.num_since_merge >= self._windows.window

    def _metrics(self, epoch: int, progress: Mapping[str, Progress]) -> dict[str, float]:
        metrics = {
            "epochs_since_merge": float(epoch - self._windows.last_merge_epoch),
            "effective_frequency": float(self.effective_frequency),
            "num_with_full_window": float(len(progress)),
        }
        if progress:
            metrics |= {
                "mean_trend": sum(p.trend for p in progress.values()) / len(progress),
                "mean_gain": sum(p.gain for p in progress.values()) / len(progress),
                "share_converged": _share(progress, "has_converged"),
                "share_on_plateau": _share(progress, "is_on_plateau"),
                "share_rising": _share(progress, "is_rising"),
                "num_troubled": float(len(troubled(progress, self._windows.window))),
            }
        return metrics

    def _move(self, epochs: int, reason: str) -> None:
        moved = self._bounded(self.effective_frequency + epochs)
        if moved != self.effective_frequency:
            self.effective_frequency, self._last_move = moved, reason

    def _bounded(self, frequency: int) -> int:
        return min(max(frequency, self.min_merge_frequency), self.max_merge_frequency)


def _share(progress: Mapping[str, Progress], judgement: str) -> float:
    return sum(getattr(p, judgement) for p in progress.values()) / len(progress)


@schedule("adaptive")
def adaptive(config: Any) -> Schedule:
    return AdaptiveMergeScheduler(
        config.merge_frequency,
        config.convergence_threshold,
        config.min_merge_frequency,
        config.max_merge_frequency,
        window=config.adaptive_window,
        performance_trigger=config.performance_merge_trigger,
    )
