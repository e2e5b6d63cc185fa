"""Weights in Python, without a run."""

import pytest

from toolkit.errors import ConfigError, InputError
from toolkit.rounds.weighting import IterativeWeightCalculator, WeightingOptions

STATES = {"en-US": {"weight": 1}, "fr-FR": {"weight": 2}, "de-DE": {"weight": 3}}


def test_similarity_is_the_default() -> None:
    calculator = IterativeWeightCalculator(active_model_states=STATES, target_locales=["en-US", "fr-FR"])
    weights = calculator.calculate()
    assert list(weights) == list(STATES)
    assert sum(weights.values()) == pytest.approx(1, abs=1e-15)
    for_one, for_other = calculator.calculate_for("en-US"), calculator.calculate_for("fr-FR")
    assert for_one != for_other
    assert weights == pytest.approx({n: (for_one[n] + for_other[n]) / 2 for n in STATES}, rel=1e-15)


def test_custom_weights_are_used() -> None:
    calculator = IterativeWeightCalculator(
        STATES, ["en-US"], custom_weights={"en-US": 0.4, "fr-FR": 0.3, "de-DE": 0.3}
    )
    assert calculator.strategy == "manual"
    assert calculator.calculate() == pytest.approx({"en-US": 0.4, "fr-FR": 0.3, "de-DE": 0.3}, rel=1e-15)
    with pytest.raises(ConfigError, match="no weight for 'de-DE'"):
        IterativeWeightCalculator(STATES, custom_weights={"en-US": 1, "fr-FR": 1}).calculate()


def test_the_targets_are_the_participants_where_none_are_named() -> None:
    calculator = IterativeWeightCalculator(STATES, options=WeightingOptions(similarity_top_k=1))
    assert calculator.calculate() == pytest.approx(dict.fromkeys(STATES, 1 / 3), rel=1e-15)


def test_every_strategy_gets_what_it_needs() -> None:
    assert IterativeWeightCalculator(
        STATES, ["sq-AL"], strategy="num_examples", num_examples={"en-US": 1, "fr-FR": 2, "de-DE": 1}
    ).calculate() == {"en-US": 0.25, "fr-FR": 0.5, "de-DE": 0.25}
    accuracy = {"en-US": {"sq-AL": 0.2}, "fr-FR": {"sq-AL": 0.2}, "de-DE": {"sq-AL": 0.4}}
    assert IterativeWeightCalculator(
        STATES, ["sq-AL"], strategy="performance", accuracy=accuracy
    ).calculate() == {"en-US": 0.25, "fr-FR": 0.25, "de-DE": 0.5}
    with pytest.raises(InputError, match="unknown weighting"):
        IterativeWeightCalculator(STATES, ["sq-AL"], strategy="nonsense").calculate()


def test_options_are_those_of_the_weighting() -> None:
    narrow = IterativeWeightCalculator(STATES, ["sq-AL"], options=WeightingOptions(similarity_top_k=1))
    assert sorted(narrow.calculate().values()) == [0, 0, 1]
