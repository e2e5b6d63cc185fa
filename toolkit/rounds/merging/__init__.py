"""Merging while training: participants' states become one, checked, in time, and recorded."""

from toolkit.rounds.merging.contribution import Contribution, MergeOutcome
from toolkit.rounds.merging.coordinator import MergeCoordinator
from toolkit.rounds.merging.fisher import participant_fisher
from toolkit.rounds.merging.merged_models import MergedModels
from toolkit.rounds.merging.optimizer import slots_of_state, state_of_slots

__all__ = [
    "Contribution",
    "MergeCoordinator",
    "MergeOutcome",
    "MergedModels",
    "participant_fisher",
    "slots_of_state",
    "state_of_slots",
]
