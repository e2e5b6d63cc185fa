"""When to merge: at a fixed frequency, at one that follows the results, or when a participant falls behind."""

from toolkit.rounds.schedule import adaptive, fixed  # noqa: F401 - importing a module registers its schedule
from toolkit.rounds.schedule.adaptive import AdaptiveMergeScheduler
from toolkit.rounds.schedule.early_stopping import EarlyStopping
from toolkit.rounds.schedule.fixed import FixedFrequency
from toolkit.rounds.schedule.registry import (
    MergeDecision,
    Observation,
    Schedule,
    build_schedule,
    schedule,
    schedules,
)

__all__ = [
    "AdaptiveMergeScheduler",
    "EarlyStopping",
    "FixedFrequency",
    "MergeDecision",
    "Observation",
    "Schedule",
    "build_schedule",
    "schedule",
    "schedules",
]
