"""The registry of weightings, and what each gets.

A weighting is a function of :class:`WeightingInputs` that gives every source a number of zero or more; the weights are
those numbers divided by their sum. A new one is registered in one line::

    @weighting("longest_name")
    def longest_name(inputs):
        return {source: len(source) for source in inputs.sources}
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from toolkit.config.names import did_you_mean
from toolkit.errors import InputError

SUM_TOLERANCE = 1e-9
"""How far from 1 a sum of weights may be that is meant to be 1: rounding of decimal fractions, no more."""


class WeightingFields(Protocol):
    """The options that weightings read: the recipe's configuration has them, and :class:`WeightingOptions`."""

    @property
    def similarity_features(self) -> str: ...
    @property
    def similarity_measure(self) -> str: ...
    @property
    def similarity_top_k(self) -> int | None: ...
    @property
    def similarity_sinkhorn(self) -> int: ...
    @property
    def manual_weights(self) -> Mapping[str, float]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightingOptions:
    """The options of all weightings, for use without a recipe.

    Args:
        similarity_features: one of ``toolkit.languages.FEATURES``.
        similarity_measure: ``cosine``, or ``shifted``: (cosine + 1) / 2.
        similarity_top_k: sources that keep a weight, those most similar to the target; None for all.
        similarity_sinkhorn: rounds of balancing; 0 for none.
        manual_weights: of ``manual``.
        locales: every participant there is, merging now or not; None for the sources.
    """

    similarity_features: str = "syntax_knn"
    similarity_measure: str = "cosine"
    similarity_top_k: int | None = None
    similarity_sinkhorn: int = 0
    manual_weights: Mapping[str, float] = field(default_factory=dict)
    locales: Sequence[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightingInputs:
    """What a weighting may look at.

    Args:
        sources: the participants that merge, in order.
        target: the locale that the merged model is for; one of the sources or not.
        num_examples: training rows of each source.
        accuracy: accuracy[source][target], the source's model measured on the target's held-out rows, zero or more and
            higher for a better one (of a language model exp(-loss), the mean probability of a token); None where
            nothing was measured.
        options: the recipe's configuration, or :class:`WeightingOptions`.
    """

    sources: tuple[str, ...]
    target: str
    num_examples: Mapping[str, int]
    accuracy: Mapping[str, Mapping[str, float]] | None
    options: Any


WeightingFunction = Callable[[WeightingInputs], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Weighting:
    """One weighting.

    Args:
        name: what it is called on the command line.
        function: gives each source a number of zero or more.
        summary: one sentence on it.
        sum_is_one: its numbers are weights that somebody wrote down: a sum other than 1 is worth a note.
        needs_accuracy: it looks at the measured accuracies.
    """

    name: str
    function: WeightingFunction
    summary: str
    sum_is_one: bool
    needs_accuracy: bool


_WEIGHTINGS: dict[str, Weighting] = {}


def weighting(
    name: str, *, sum_is_one: bool = False, needs_accuracy: bool = False
) -> Callable[[WeightingFunction], WeightingFunction]:
    """Register the decorated function as the weighting ``name``; its docstring begins with one sentence."""

    def register(function: WeightingFunction) -> WeightingFunction:
        if name in _WEIGHTINGS:
            raise ValueError(f"the weighting {name!r} is registered twice")
        summary = (function.__doc__ or "").strip().partition("\n")[0]
        _WEIGHTINGS[name] = Weighting(name, function, summary, sum_is_one, needs_accuracy)
        return function

    return register


def weightings() -> dict[str, Weighting]:
    """All weightings by name."""
    return dict(_WEIGHTINGS)


def weights_for(name: str, inputs: WeightingInputs) -> dict[str, float]:
    """The weights of the sources for one target: w_k = n_k / sum over j of n_j, n what the weighting gives.

    Args:
        name: of the weighting.
        inputs: what it looks at.

    Returns:
        Every source with its weight, in the order of the sources: zero or more, of sum 1 (float64).

    Raises:
        InputError: no such weighting, or it cannot weigh these sources.
    """
    numbers = _numbers(name, inputs)
    # By a power of two, which rounds nothing: the sum of very large or very small numbers has no float64.
    _, exponent = math.frexp(max(numbers.values()))
    scaled = {source: math.ldexp(number, -exponent) for source, number in numbers.items()}
    total = math.fsum(scaled.values())
    return {source: number / total for source, number in scaled.items()}


def notes_on(name: str, inputs: WeightingInputs) -> list[str]:
    """What a reader of the weights should be told, e.g. that manual weights do not sum to 1."""
    total = math.fsum(_numbers(name, inputs).values())
    if not _WEIGHTINGS[name].sum_is_one or abs(total - 1) <= SUM_TOLERANCE:
        return []
    merging = ", ".join(inputs.sources)
    return [f"the {name} weights of {merging} sum to {total:g}, so each was divided by that"]


def combined(
    name: str,
    sources: Sequence[str],
    targets: Sequence[str],
    *,
    num_examples: Mapping[str, int],
    accuracy: Mapping[str, Mapping[str, float]] | None = None,
    options: Any,
) -> dict[str, float]:
    """The weights for several targets at once: the mean of those for each.

    Args:
        name: of the weighting.
        sources, num_examples, accuracy, options: as in :class:`WeightingInputs`.
        targets: one or more locales.

    Returns:
        Every source with its weight, as :func:`weights_for`.

    Raises:
        InputError: as :func:`weights_for`; no target is given.
    """
    if not targets:
        raise InputError("a merge needs at least one target language")
    rows = [
        weights_for(
            name,
            WeightingInputs(
                sources=tuple(sources),
                target=target,
                num_examples=num_examples,
                accuracy=accuracy,
                options=options,
            ),
        )
        for target in targets
    ]
    return {source: math.fsum(row[source] for row in rows) / len(rows) for source in sources}


def _numbers(name: str, inputs: WeightingInputs) -> dict[str, float]:
    """What the weighting gives for the sources, checked."""
    if name not in _WEIGHTINGS:
        raise InputError(
            f"unknown weighting '{name}'{did_you_mean(name, _WEIGHTINGS)}",
            hint=f"one of {', '.join(sorted(_WEIGHTINGS))}",
        )
    if not inputs.sources:
        raise InputError(f"{name} weights for {inputs.target}: nothing merges")
    if len(set(inputs.sources)) < len(inputs.sources):
        raise InputError(f"{name} weights for {inputs.target}: a source is named twice: {inputs.sources}")
    given = _WEIGHTINGS[name].function(inputs)
    if set(given) != set(inputs.sources):
        raise InputError(
            f"{name} weights for {inputs.target} are given for {sorted(given)}, not for the sources"
            f" {sorted(inputs.sources)}"
        )
    numbers = {source: float(given[source]) for source in inputs.sources}
    for source, number in numbers.items():
        if not math.isfinite(number) or number < 0:
            raise InputError(f"{name} weight of {source} for {inputs.target} is {number}, not zero or more")
    if max(numbers.values()) == 0:
        raise InputError(
            f"{name} weights for {inputs.target} are zero for every source: {', '.join(inputs.sources)}"
        )
    return numbers
