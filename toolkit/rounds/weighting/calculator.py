"""Weights in two lines of Python."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from toolkit.rounds.weighting.registry import WeightingInputs, WeightingOptions, combined, weights_for


class IterativeWeightCalculator:
    """Weights of the participants of an iterative run, outside of one.

    Args:
        active_model_states: the participants that would merge; the keys count, the values are not looked at.
        target_locales: the locales that the merged model is for; None for the participants themselves.
        strategy: name of a weighting; None for ``manual`` where there are custom weights, else ``similarity``.
        custom_weights: a weight for each participant, divided by their sum.
        num_examples: training rows of each participant, for ``num_examples``.
        accuracy: accuracy[participant][target], for ``performance``.
        options: of the weighting.

    Example:
        ``IterativeWeightCalculator(states, ["sq-AL"], custom_weights={"en-US": 0.4, "fr-FR": 0.6}).calculate()``
    """

    def __init__(
        self,
        active_model_states: Mapping[str, Any],
        target_locales: Sequence[str] | None = None,
        *,
        strategy: str | None = None,
        custom_weights: Mapping[str, float] | None = None,
        num_examples: Mapping[str, int] | None = None,
        accuracy: Mapping[str, Mapping[str, float]] | None = None,
        options: Any = None,
    ) -> None:
        self.sources = tuple(active_model_states)
        self.target_locales = tuple(self.sources if target_locales is None else target_locales)
        self.strategy = strategy or ("manual" if custom_weights is not None else "similarity")
        self._num_examples = num_examples or {}
        self._accuracy = accuracy
        self._options = WeightingOptions() if options is None else options
        if custom_weights is not None:
            # Not the recipe's configuration: its manual_weights are another run's.
            known = self._options if isinstance(self._options, WeightingOptions) else WeightingOptions()
            self._options = replace(known, manual_weights=dict(custom_weights))

    def calculate(self) -> dict[str, float]:
        """One weight for each participant toward all targets, of sum 1.

        Raises:
            InputError: the strategy cannot weigh these participants.
        """
        return combined(
            self.strategy,
            self.sources,
            self.target_locales,
            num_examples=self._num_examples,
            accuracy=self._accuracy,
            options=self._options,
        )

    def calculate_for(self, target: str) -> dict[str, float]:
        """One weight for each participant toward one target, of sum 1.

        Raises:
            InputError: as :meth:`calculate`.
        """
        inputs = WeightingInputs(
            sources=self.sources,
            target=target,
            num_examples=self._num_examples,
            accuracy=self._accuracy,
            options=self._options,
        )
        return weights_for(self.strategy, inputs)
