"""The trigger that merges between the scheduled epochs: a participant falls, falls behind or stands still."""

from collections.abc import Mapping
from dataclasses import dataclass

from toolkit.rounds.schedule.progress import Progress

FALL_SHARE = 0.02
"""Falling and falling behind count from this share of the participants' mean score."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """What is wrong with one participant, in words."""

    participant: str
    reason: str


def troubled(progress: Mapping[str, Progress], window: int) -> list[Trouble]:
    """The participants that a merge might help.

    With m the absolute mean of the last scores, W the window and "since the last merge" at least one evaluation of it:

    - it falls: its last score is more than FALL_SHARE · m below the best one of its window;
    - it falls behind: its distance to the mean of all has grown by more than FALL_SHARE · m over the window;
    - it stands still: W evaluations since the last merge gained less than the convergence threshold.

    Args:
        progress: of the active participants that have a full window.
        window: W.
    """
    if not progress:
        return []
    mean_first = sum(p.first for p in progress.values()) / len(progress)
    mean_last = sum(p.last for p in progress.values()) / len(progress)
    limit = FALL_SHARE * abs(mean_last)
    found = []
    for name, p in progress.items():
        if p.num_since_merge == 0:
            continue
        behind = (mean_last - p.last) - (mean_first - p.first)
        if p.drop > limit:
            found.append(Trouble(name, f"{name} fell from {p.best:.4g} to {p.last:.4g}"))
        elif behind > limit and p.last < mean_last:
            found.append(Trouble(name, f"{name} fell behind the others by {behind:.4g}"))
        elif p.num_since_merge >= window and p.has_converged:
            found.append(Trouble(name, f"{name} stands still at {p.last:.4g} since {window} evaluations"))
    return found
