"""Weights that follow from what is known before training: average, manual, num_examples."""

from collections.abc import Mapping

from toolkit.config.names import did_you_mean
from toolkit.errors import ConfigError, InputError
from toolkit.rounds.weighting.registry import WeightingInputs, weighting


@weighting("average")
def average(inputs: WeightingInputs) -> Mapping[str, float]:
    """The same weight for every source."""
    return dict.fromkeys(inputs.sources, 1.0)


@weighting("num_examples")
def num_examples(inputs: WeightingInputs) -> Mapping[str, float]:
    """Each source by its number of training rows.

    Source: B. McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data (AISTATS 2017).
    """
    missing = [source for source in inputs.sources if source not in inputs.num_examples]
    if missing:
        raise InputError(
            f"num_examples weights: the number of training rows of {', '.join(missing)} is unknown"
        )
    return {source: inputs.num_examples[source] for source in inputs.sources}


@weighting("manual", sum_is_one=True)
def manual(inputs: WeightingInputs) -> Mapping[str, float]:
    """The weights of ``manual_weights``, divided by their sum over the sources that merge."""
    given: Mapping[str, float] = inputs.options.manual_weights
    participants = [*inputs.sources, *(getattr(inputs.options, "locales", None) or ())]
    problems = [
        f"manual_weights: '{name}' takes no part{did_you_mean(name, participants)}"
        for name in given
        if name not in participants
    ]
    problems += [f"manual_weights: no weight for '{s}'" for s in inputs.sources if s not in given]
    if problems:
        raise ConfigError(problems)
    return {source: given[source] for source in inputs.sources}
