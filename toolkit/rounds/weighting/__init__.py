"""Where the weights of a merge come from: similarity, performance, num_examples, average, manual."""

from toolkit.rounds.weighting import measured, similar, stated  # noqa: F401 - importing a module registers its weightings
from toolkit.rounds.weighting.calculator import IterativeWeightCalculator
from toolkit.rounds.weighting.registry import (
    Weighting,
    WeightingInputs,
    WeightingOptions,
    combined,
    notes_on,
    weighting,
    weightings,
    weights_for,
)

__all__ = [
    "IterativeWeightCalculator",
    "Weighting",
    "WeightingInputs",
    "WeightingOptions",
    "combined",
    "notes_on",
    "weighting",
    "weightings",
    "weights_for",
]
