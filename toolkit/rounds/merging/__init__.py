"""Merging while training: participants' states become one, checked, in time, and recorded."""

from toolkit.rounds.merging.contribution import Contribution, MergeOutcome
from toolkit.rounds.merging.coordinator import MergeCoordinator

__all__ = ["Contribution", "MergeCoordinator", "MergeOutcome"]
