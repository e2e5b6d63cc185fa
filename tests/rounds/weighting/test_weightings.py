"""Each weighting by hand, each option of similarity, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest

from toolkit.config.recipes import IterativeConfig
from toolkit.errors import ConfigError, InputError
from toolkit.languages import FEATURES, similarity
from toolkit.rounds.weighting import (
    WeightingInputs,
    WeightingOptions,
    combined,
    notes_on,
    weighting,
    weightings,
    weights_for,
)
from toolkit.rounds.weighting import registry as registry_module
from toolkit.rounds.weighting.similar import sinkhorn, top_k

SOURCES = ("en-US", "fr-FR", "sw-KE", "it-IT")


def inputs(target: str = "sq-AL", sources: tuple[str, ...] = SOURCES, **options) -> WeightingInputs:
    return WeightingInputs(
        sources=sources,
        target=target,
        num_examples={"en-US": 300, "fr-FR": 100, "sw-KE": 0, "it-IT": 100},
        accuracy={
            # Rows: what a source's model can do; columns: on whom it was measured.
            "en-US": {"sq-AL": 0.6, "en-US": 0.9},
            "fr-FR": {"sq-AL": 0.3, "en-US": 0.5},
            "sw-KE": {"sq-AL": 0.0, "en-US": 0.4},
            "it-IT": {"sq-AL": 0.6, "en-US": 0.2},
        },
        options=WeightingOptions(**options),
    )


def test_the_weightings_there_are() -> None:
    assert set(weightings()) >= {"similarity", "performance", "average", "manual", "num_examples"}
    assert all(
        entry.summary.endswith(".") for name, entry in weightings().items() if not name.startswith("test_")
    )


def test_average() -> None:
    assert weights_for("average", inputs()) == dict.fromkeys(SOURCES, 0.25)


def test_num_examples() -> None:
    assert weights_for("num_examples", inputs()) == {"en-US": 0.6, "fr-FR": 0.2, "sw-KE": 0.0, "it-IT": 0.2}


def test_num_examples_of_nobody_or_of_an_unknown_number() -> None:
    with pytest.raises(InputError, match="zero for every source"):
        weights_for("num_examples", inputs(sources=("sw-KE",)))
    with pytest.raises(InputError, match="de-DE is unknown"):
        weights_for("num_examples", inputs(sources=("en-US", "de-DE")))


def test_performance_takes_the_column_of_the_target() -> None:
    found = weights_for("performance", inputs())
    assert found == pytest.approx({"en-US": 0.4, "fr-FR": 0.2, "sw-KE": 0.0, "it-IT": 0.4}, rel=1e-15)
    found = weights_for("performance", inputs("en-US"))
    assert found == pytest.approx({"en-US": 0.45, "fr-FR": 0.25, "sw-KE": 0.2, "it-IT": 0.1}, rel=1e-15)


def test_performance_before_any_source_reaches_anything() -> None:
    assert weights_for("performance", inputs(sources=("sw-KE",))) == {"sw-KE": 1.0}
    nothing_yet = {source: {"sq-AL": 0.0} for source in SOURCES}
    early = WeightingInputs(
        sources=SOURCES, target="sq-AL", num_examples={}, accuracy=nothing_yet, options=WeightingOptions()
    )
    assert weights_for("performance", early) == dict.fromkeys(SOURCES, 0.25)


def test_performance_without_measurements() -> None:
    with pytest.raises(InputError, match="it-IT not measured on held-out rows of de-DE"):
        weights_for("performance", inputs("de-DE"))
    nothing = WeightingInputs(
        sources=SOURCES, target="sq-AL", num_examples={}, accuracy=None, options=WeightingOptions()
    )
    with pytest.raises(InputError, match="nothing was measured"):
        weights_for("performance", nothing)


def test_performance_is_the_only_one_that_needs_measurements() -> None:
    assert [name for name, entry in weightings().items() if entry.needs_accuracy] == ["performance"]


# --- manual


def test_manual_weights_are_divided_by_their_sum_with_a_note() -> None:
    given = inputs(manual_weights={"en-US": 4, "fr-FR": 3, "sw-KE": 0, "it-IT": 1})
    assert weights_for("manual", given) == {"en-US": 0.5, "fr-FR": 0.375, "sw-KE": 0.0, "it-IT": 0.125}
    (note,) = notes_on("manual", given)
    assert "sum to 8" in note


def test_manual_weights_of_sum_one_need_no_note() -> None:
    # 0.4 + 0.3 + 0.2 + 0.1 is not exactly 1 in binary.
    given = inputs(manual_weights={"en-US": 0.4, "fr-FR": 0.3, "sw-KE": 0.2, "it-IT": 0.1})
    assert notes_on("manual", given) == []
    assert weights_for("manual", given)["en-US"] == pytest.approx(0.4, abs=1e-15)
    thirds = dict.fromkeys(("en-US", "fr-FR", "it-IT"), 0.3333333333)
    assert notes_on("manual", inputs(sources=tuple(thirds), manual_weights=thirds)) == []
    thirds = dict.fromkeys(("en-US", "fr-FR", "it-IT"), 0.33)
    assert "sum to 0.99" in notes_on("manual", inputs(sources=tuple(thirds), manual_weights=thirds))[0]


def test_only_manual_weights_are_noted() -> None:
    for name in ("average", "similarity", "num_examples", "performance"):
        assert notes_on(name, inputs()) == []


def test_manual_weights_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        weights_for("manual", inputs(manual_weights={"en-US": 1, "fr-FF": 1, "it-IT": 1}))
    assert caught.value.problems == [
        "manual_weights: 'fr-FF' takes no part; did you mean 'fr-FR'?",
        "manual_weights: no weight for 'fr-FR'",
        "manual_weights: no weight for 'sw-KE'",
    ]


def test_manual_weights_of_a_locale_that_does_not_merge_now() -> None:
    weights = {"en-US": 0.5, "fr-FR": 0.25, "de-DE": 0.25}
    given = inputs(
        sources=("en-US", "fr-FR"), manual_weights=weights, locales=["en-US", "fr-FR", "de-DE"]
    )  # de-DE has failed
    assert weights_for("manual", given) == pytest.approx({"en-US": 2 / 3, "fr-FR": 1 / 3}, rel=1e-15)
    assert "sum to 0.75" in notes_on("manual", given)[0]


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_manual_weights_that_are_no_weights(bad: float) -> None:
    with pytest.raises(InputError, match="fr-FR"):
        weights_for("manual", inputs(sources=("en-US", "fr-FR"), manual_weights={"en-US": 1, "fr-FR": bad}))


# --- similarity


def by_hand(target: str, sources=SOURCES, features: str = "syntax_knn") -> dict[str, float]:
    raw = {source: similarity(target, source, features) for source in sources}
    return {source: value / sum(raw.values()) for source, value in raw.items()}


@pytest.mark.parametrize("features", [f for f in FEATURES if not f.endswith("_average")])
def test_similarity_features(features: str) -> None:
    found = weights_for("similarity", inputs(similarity_features=features))
    assert found == pytest.approx(by_hand("sq-AL", features=features), rel=1e-14)
    if features != "syntax_knn":
        assert found != weights_for("similarity", inputs())


def test_similarity_counts_the_target_where_it_merges() -> None:
    found = weights_for("similarity", inputs("it-IT"))
    assert found == pytest.approx(by_hand("it-IT"), rel=1e-14)
    assert max(found, key=lambda name: found[name]) == "it-IT"


def test_similarity_shifted() -> None:
    found = weights_for("similarity", inputs(similarity_measure="shifted"))
    raw = {source: (similarity("sq-AL", source) + 1) / 2 for source in SOURCES}
    assert found == pytest.approx({s: v / sum(raw.values()) for s, v in raw.items()}, rel=1e-14)
    assert found["sw-KE"] > weights_for("similarity", inputs())["sw-KE"]


def test_top_k_is_of_the_target_and_not_of_the_sources() -> None:
    # English is most similar to itself and Swahili to nobody; to Albanian, Italian and French are nearest.
    found = weights_for("similarity", inputs(similarity_top_k=2))
    assert {source for source, weight in found.items() if weight > 0} == {"fr-FR", "it-IT"}
    assert found == pytest.approx({"en-US": 0, "sw-KE": 0, **by_hand("sq-AL", ("fr-FR", "it-IT"))}, rel=1e-14)
    # The target itself is the nearest of all.
    assert weights_for("similarity", inputs("sw-KE", similarity_top_k=1)) == {
        "en-US": 0.0,
        "fr-FR": 0.0,
        "sw-KE": 1.0,
        "it-IT": 0.0,
    }
    assert weights_for("similarity", inputs(similarity_top_k=9)) == weights_for("similarity", inputs())


def test_top_k_of_equals_takes_the_first() -> None:
    found = weights_for("similarity", inputs("de-DE", ("zh-TW", "zh-CN", "zh-HK"), similarity_top_k=2))
    assert found == {"zh-TW": 0.5, "zh-CN": 0.5, "zh-HK": 0.0}
    # But the target itself before its equals.
    found = weights_for("similarity", inputs("pt-PT", ("pt-BR", "pt-PT"), similarity_top_k=1))
    assert found == {"pt-BR": 0.0, "pt-PT": 1.0}


def test_top_k_by_rows() -> None:
    alike = np.array([[1, 0.9, 0.5], [0.9, 1, 1], [0.5, 1, 1], [0.7, 0.1, 0.7]])
    assert top_k(alike, 2).tolist() == [[1, 0.9, 0], [0, 1, 1], [0, 1, 1], [0.7, 0, 0.7]]
    assert top_k(alike, 1).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.7, 0, 0]]
    with pytest.raises(InputError, match="similarity_top_k is 0"):
        top_k(alike, 0)


def test_sinkhorn_balances() -> None:
    alike = np.random.default_rng(0).uniform(0.1, 1, (5, 4))
    balanced = sinkhorn(alike, 200)
    np.testing.assert_allclose(balanced.sum(axis=1), 1, rtol=1e-14)
    np.testing.assert_allclose(balanced.sum(axis=0), 5 / 4, rtol=1e-12)
    # It only scales rows and columns: ratios across stay.
    cross = alike[0, 0] * alike[1, 1] / (alike[0, 1] * alike[1, 0])
    assert balanced[0, 0] * balanced[1, 1] / (balanced[0, 1] * balanced[1, 0]) == pytest.approx(
        cross, rel=1e-10
    )
    once = alike / alike.sum(axis=0)
    np.testing.assert_allclose(sinkhorn(alike, 1), once / once.sum(axis=1, keepdims=True), rtol=1e-14)


def test_sinkhorn_iterations_count() -> None:
    plain = weights_for("similarity", inputs())
    one, many, more = (weights_for("similarity", inputs(similarity_sinkhorn=n)) for n in (1, 100, 101))
    assert one != plain
    assert one != many
    assert many == pytest.approx(more, rel=1e-9)
    # Swahili is far from all: what it does not lose to others, balancing gives back to it.
    assert many["sw-KE"] > plain["sw-KE"]


def test_sinkhorn_after_top_k_keeps_the_zeros() -> None:
    found = weights_for("similarity", inputs(similarity_top_k=2, similarity_sinkhorn=20))
    assert {source for source, weight in found.items() if weight > 0} == {"fr-FR", "it-IT"}


def test_an_isolate_without_relatives_among_the_sources() -> None:
    with pytest.raises(InputError, match="nothing in common") as caught:
        weights_for("similarity", inputs("eu-ES", ("en-US", "fr-FR"), similarity_features="genetic"))
    assert "syntax_knn" in str(caught.value.hint)
    merged = inputs("eu-ES", ("en-US", "fr-FR"), similarity_features="genetic", similarity_measure="shifted")
    assert weights_for("similarity", merged) == {"en-US": 0.5, "fr-FR": 0.5}


def test_similarity_refuses_unknown_languages_and_measures() -> None:
    with pytest.raises(InputError, match="no language 'xq'"):
        weights_for("similarity", inputs("xq-AL"))
    with pytest.raises(InputError, match="measure 'cosin'"):
        weights_for("similarity", inputs(similarity_measure="cosin"))


def test_the_options_of_the_recipe_are_read() -> None:
    manual = dict(zip(SOURCES, (1.0, 2.0, 3.0, 2.0), strict=True))
    for options in (
        {"similarity_features": "genetic"},
        {"similarity_measure": "shifted"},
        {"similarity_top_k": 1},
        {"similarity_sinkhorn": 3},
    ):
        given = inputs(**options)
        recipe = replace(given, options=IterativeConfig(locales=list(SOURCES), **options))
        assert weights_for("similarity", recipe) == weights_for("similarity", given)
        assert weights_for("similarity", recipe) != weights_for("similarity", inputs())
    config = IterativeConfig(locales=list(SOURCES), weight_calculation="manual", manual_weights=manual)
    recipe = replace(inputs(), options=config)
    assert list(weights_for("manual", recipe).values()) == [0.125, 0.25, 0.375, 0.25]


# --- several targets


def test_combined_is_the_mean_over_the_targets() -> None:
    given = inputs()
    found = combined(
        "similarity",
        SOURCES,
        ["sq-AL", "sw-KE"],
        num_examples={},
        accuracy=None,
        options=WeightingOptions(similarity_top_k=1),
    )
    assert found == {"en-US": 0.0, "fr-FR": 0.0, "sw-KE": 0.5, "it-IT": 0.5}
    both = combined(
        "performance",
        SOURCES,
        ["sq-AL", "en-US"],
        num_examples={},
        accuracy=given.accuracy,
        options=given.options,
    )
    assert both["en-US"] == pytest.approx((0.4 + 0.45) / 2, rel=1e-15)
    with pytest.raises(InputError, match="at least one target"):
        combined("average", SOURCES, [], num_examples={}, options=WeightingOptions())


# --- the registry


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "_WEIGHTINGS", weightings())


@pytest.mark.usefixtures("own_registry")
def test_a_weighting_of_ones_own_in_one_line() -> None:
    @weighting("test_longest_name")
    def longest(inputs: WeightingInputs) -> dict[str, float]:
        """Longer names weigh more."""
        return {source: len(source) for source in inputs.sources}

    assert weights_for("test_longest_name", inputs(sources=("en", "en-US"))) == {"en": 2 / 7, "en-US": 5 / 7}
    assert weightings()["test_longest_name"].summary == "Longer names weigh more."
    with pytest.raises(ValueError, match="registered twice"):
        weighting("test_longest_name")(longest)


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"en-US": 1.0}, "not for the sources"),
        ({"en-US": 1.0, "fr-FR": 1.0, "xx": 1.0}, "not for the sources"),
        ({"en-US": 1.0, "fr-FR": -1.0}, "fr-FR for sq-AL is -1.0"),
        ({"en-US": 1.0, "fr-FR": math.nan}, "fr-FR for sq-AL is nan"),
        ({"en-US": 0.0, "fr-FR": 0.0}, "zero for every source"),
    ],
)
def test_what_a_weighting_gives_is_checked(given: dict[str, float], message: str) -> None:
    weighting("test_given")(lambda inputs: given)
    with pytest.raises(InputError, match=message):
        weights_for("test_given", inputs(sources=("en-US", "fr-FR")))


def test_unknown_names_and_no_sources() -> None:
    with pytest.raises(InputError, match="did you mean 'similarity'") as caught:
        weights_for("similarty", inputs())
    assert "num_examples" in str(caught.value.hint)
    with pytest.raises(InputError, match="nothing merges"):
        weights_for("average", inputs(sources=()))
    with pytest.raises(InputError, match="named twice"):
        weights_for("average", inputs(sources=("en-US", "en-US")))
