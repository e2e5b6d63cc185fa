"""Diagonal Fisher information of trainable parameters over a data set, one gradient an example."""

from toolkit.merging.fisher.estimate import estimate_fisher
from toolkit.merging.fisher.from_folder import fisher_of
from toolkit.merging.fisher.likelihood import MAX_EXACT_CLASSES, Kind, Task
from toolkit.merging.fisher.storage import Fisher

__all__ = ["MAX_EXACT_CLASSES", "Fisher", "Kind", "Task", "estimate_fisher", "fisher_of"]
