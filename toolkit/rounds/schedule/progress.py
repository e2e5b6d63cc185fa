"""What a participant's last evaluations say about it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from toolkit.rounds.schedule.registry import Observation

PLATEAU_SHARE = 0.1
"""A participant is on a plateau when it gains less than this share of what it gained in its first window."""
RISING_SHARE = 0.5
"""It is rising while it gains at least this share of that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One participant over its last W evaluations s_1 ... s_W, W the window.

    Args:
        trend: slope of the least-squares line through the scores, per evaluation.
        gain: (max(s_2 ... s_W) - s_1) / (W - 1), improvement per evaluation; negative where all are worse than s_1.
        first_gain: the gain of the participant's first full window; None while that is the window.
        drop: max(s_1 ... s_W) - s_W: how far the last score is below the best one.
        first, best, last: s_1, the maximum, s_W.
        num_since_merge: evaluations since the last merge, at most W.
        threshold: gains below it count as none.
    """

    trend: float
    gain: float
    first_gain: float | None
    drop: float
    first: float
    best: float
    last: float
    num_since_merge: int
    threshold: float

    @property
    def has_converged(self) -> bool:
        """gain < threshold."""
        return self.gain < self.threshold

    @property
    def is_on_plateau(self) -> bool:
        """gain < max(threshold, PLATEAU_SHARE first_gain)."""
        return self.gain < max(self.threshold, PLATEAU_SHARE * (self.first_gain or 0.0))

    @property
    def is_rising(self) -> bool:
        """gain ≥ max(threshold, RISING_SHARE first_gain), and the trend points upward; never in the first window."""
        if self.first_gain is None:
            return False
        return self.trend > 0 and self.gain >= max(self.threshold, RISING_SHARE * self.first_gain)


class ScoreWindows:
    """The last evaluations of every participant.

    Args:
        window: W, the number of evaluations, at least 2.
        threshold: improvement per evaluation below which a participant has converged.
    """

    def __init__(self, window: int, threshold: float) -> None:
        if window < 2:
            raise ValueError(f"a window of {window} evaluations shows no trend; 2 at least")
        self.window = window
        self.threshold = threshold
        self._scores: dict[str, list[tuple[int, float]]] = {}
        self._first_gains: dict[str, float] = {}
        self._training: list[str] = []
        """Who was observed last: one that has stopped keeps its scores, and they say nothing any more."""
        self.last_merge_epoch = 0

    def observe(self, observations: Sequence[Observation]) -> bool:
        """Take in scores; whether there was one. Missing and non-finite ones are passed over."""
        self._training = [observation.participant for observation in observations]
        seen = False
        for observation in observations:
            if observation.score is None or not math.isfinite(observation.score):
                continue
            seen = True
            scores = self._scores.setdefault(observation.participant, [])
            if len(scores) == self.window:
                self._first_gains.setdefault(observation.participant, _gain([s for _, s in scores]))
            scores.append((observation.epoch, float(observation.score)))
            del scores[: -self.window]
        return seen

    def training(self, participants: Sequence[str]) -> list[str]:
        """Those of ``participants`` that still train."""
        return [participant for participant in participants if participant in self._training]

    def progress(self, participants: Sequence[str]) -> dict[str, Progress]:
        """The progress of those of ``participants`` that still train and have a full window."""
        found = {}
        for participant in self.training(participants):
            window = self._scores.get(participant, [])
            if len(window) < self.window:
                continue
            scores = [score for _, score in window]
            found[participant] = Progress(
                trend=_slope(scores),
                gain=_gain(scores),
                first_gain=self._first_gains.get(participant),
                drop=max(scores) - scores[-1],
                first=scores[0],
                best=max(scores),
                last=scores[-1],
                num_since_merge=sum(epoch > self.last_merge_epoch for epoch, _ in window),
                threshold=self.threshold,
            )
        return found

    def state(self) -> dict[str, Any]:
        return {
            "scores": {name: [list(pair) for pair in scores] for name, scores in self._scores.items()},
            "first_gains": dict(self._first_gains),
            "training": list(self._training),
            "last_merge_epoch": self.last_merge_epoch,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._scores = {
            name: [(int(epoch), float(score)) for epoch, score in scores]
            for name, scores in state["scores"].items()
        }
        self._first_gains = {name: float(gain) for name, gain in state["first_gains"].items()}
        self._training = list(state["training"])
        self.last_merge_epoch = int(state["last_merge_epoch"])


def _gain(scores: Sequence[float]) -> float:
    return (max(scores[1:]) - scores[0]) / (len(scores) - 1)


def _slope(scores: Sequence[float]) -> float:
    steps = np.arange(len(scores)) - (len(scores) - 1) / 2
    return float(steps @ (np.asarray(scores) - np.mean(scores)) / (steps @ steps))
