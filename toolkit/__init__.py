"""Train apart, merge together."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.iterative import (
        IterativeMergeConfig,
        IterativeOrchestratorConfig,
        IterativeTrainingConfig,
        IterativeTrainingOrchestrator,
        TrainingStateManager,
        create_default_config,
    )
    from toolkit.merging.registry import merge_method
    from toolkit.rounds.merging import MergeCoordinator
    from toolkit.rounds.monitor import EnhancedMonitor
    from toolkit.rounds.schedule import AdaptiveMergeScheduler, MergeDecision, schedule
    from toolkit.rounds.weighting import IterativeWeightCalculator, weighting

__all__ = [
    "AdaptiveMergeScheduler",
    "EnhancedMonitor",
    "IterativeMergeConfig",
    "IterativeOrchestratorConfig",
    "IterativeTrainingConfig",
    "IterativeTrainingOrchestrator",
    "IterativeWeightCalculator",
    "MergeCoordinator",
    "MergeDecision",
    "TrainingStateManager",
    "create_default_config",
    "merge_method",
    "schedule",
    "weighting",
]

_MODULES = {
    "AdaptiveMergeScheduler": "rounds.schedule",
    "EnhancedMonitor": "rounds.monitor",
    "IterativeMergeConfig": "iterative",
    "IterativeOrchestratorConfig": "iterative",
    "IterativeTrainingConfig": "iterative",
    "IterativeTrainingOrchestrator": "iterative",
    "IterativeWeightCalculator": "rounds.weighting",
    "MergeCoordinator": "rounds.merging",
    "MergeDecision": "rounds.schedule",
    "TrainingStateManager": "iterative",
    "create_default_config": "iterative",
    "merge_method": "merging.registry",
    "schedule": "rounds.schedule",
    "weighting": "rounds.weighting",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import toolkit` must not bring torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
