"""Diagonal Fisher information of trainable parameters over a data set, one gradient an example."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.merging.fisher.estimate import estimate_fisher
    from toolkit.merging.fisher.from_folder import fisher_of
    from toolkit.merging.fisher.likelihood import MAX_EXACT_CLASSES, Kind, Task
    from toolkit.merging.fisher.storage import Fisher

__all__ = ["MAX_EXACT_CLASSES", "Fisher", "Kind", "Task", "estimate_fisher", "fisher_of"]

_MODULES = {
    "estimate_fisher": "estimate",
    "fisher_of": "from_folder",
    "MAX_EXACT_CLASSES": "likelihood",
    "Kind": "likelihood",
    "Task": "likelihood",
    "Fisher": "storage",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `meldkit fisher --help` answers without torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
