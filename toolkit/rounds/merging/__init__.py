"""Merging while training: participants' states become one, checked, in time, and recorded."""

from toolkit.rounds.merging.contribution import Contribution, MergeOutcome
from toolkit.rounds.merging.coordinator import MergeCoordinator
from toolkit.rounds.merging.fisher import participant_fisher
from toolkit.rounds.merging.merged_models import MergedModels
from toolkit.rounds.merging.optimizer import merge_optimizer_states

__all__ = [
    "Contribution",
    "MergeCoordinator",
    "MergeOutcome",
    "MergedModels",
    "merge_optimizer_states",
    "participant_fisher",
]
