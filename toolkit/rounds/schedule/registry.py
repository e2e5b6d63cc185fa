"""What a schedule is, and the registry of schedules.

After every epoch the loop tells the schedule what was measured (``observe``), asks it whether to merge now
(``decide``), and tells it of every merge that was made (``record_merge``). ``decide`` changes nothing: asked twice, it
answers the same. A new schedule is registered in one line::

    @schedule("never")
    def never(config):
        return Never()
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from toolkit.config.names import did_you_mean
from toolkit.errors import InputError

Trigger = Literal["frequency", "adaptive", "performance", "convergence", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What one participant reached in an epoch.

    Args:
        participant: its name.
        epoch: epochs that it has finished, from 1.
        train_loss: mean of the epoch.
        metrics: on its held-out rows.
        score: the metric that decides, higher is better; None where nothing was evaluated in this epoch.
    """

    participant: str
    epoch: int
    train_loss: float
    metrics: Mapping[str, float]
    score: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeDecision:
    """Whether to merge now, and why.

    Args:
        should_merge: the answer.
        confidence: 1 where a rule of epochs decided; else the share of the participants that train whose evaluations
            speak for the answer.
        reason: one sentence for a person.
        metrics: the numbers that it was decided on.
        recommended_frequency: epochs from merge to merge that the schedule holds right now.
        trigger: what decided; ``none`` where nothing asked for a merge.
    """

    should_merge: bool
    confidence: float
    reason: str
    metrics: dict[str, float]
    recommended_frequency: int
    trigger: Trigger


class Schedule(Protocol):
    """Decides after every epoch whether to merge. Its state is JSON; with the state restored, it decides the same."""

    def observe(self, observations: Sequence[Observation]) -> None:
        """Take in what the participants that train reached in the epoch that is over."""
        ...

    def decide(self, epoch: int, active: Sequence[str]) -> MergeDecision:
        """Whether to merge after ``epoch`` epochs, with ``active`` the participants that would: those that train, and
        those that have stopped early and keep what they have."""
        ...

    def record_merge(self, epoch: int, accepted: Mapping[str, bool]) -> None:
        """A merge was made after ``epoch`` epochs; ``accepted``: who took it over."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything that decisions depend on, as JSON values."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        ...


ScheduleBuilder = Callable[[Any], Schedule]

_SCHEDULES: dict[str, ScheduleBuilder] = {}


def schedule(name: str) -> Callable[[ScheduleBuilder], ScheduleBuilder]:
    """Register the decorated function, configuration → schedule, as the schedule ``name``."""

    def register(builder: ScheduleBuilder) -> ScheduleBuilder:
        if name in _SCHEDULES:
            raise ValueError(f"the schedule {name!r} is registered twice")
        _SCHEDULES[name] = builder
        return builder

    return register


def schedules() -> dict[str, ScheduleBuilder]:
    """The builders of all schedules by name."""
    return dict(_SCHEDULES)


def build_schedule(config: Any) -> Schedule:
    """The schedule that a configuration asks for: ``schedule`` by its name, else ``adaptive`` with
    ``adaptive_merge_frequency``, else ``fixed``.

    Raises:
        InputError: no schedule has that name.
    """
    name = config.schedule or ("adaptive" if config.adaptive_merge_frequency else "fixed")
    if name not in _SCHEDULES:
        raise InputError(
            f"unknown schedule '{name}'{did_you_mean(name, _SCHEDULES)}",
            hint=f"one of {', '.join(sorted(_SCHEDULES))}",
        )
    return _SCHEDULES[name](config)
