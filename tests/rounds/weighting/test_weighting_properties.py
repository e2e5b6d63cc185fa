"""What holds for the weights of every weighting, whatever merges."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.data.samples.locales import LOCALES
from toolkit.rounds.weighting import WeightingInputs, WeightingOptions, weights_for

sources = st.lists(st.sampled_from(sorted(LOCALES)), min_size=1, max_size=9, unique=True)
numbers = st.floats(1e-300, 1.7e308) | st.just(1.7e308)
options = st.builds(
    WeightingOptions,
    similarity_features=st.sampled_from(
        ["syntax_knn", "phonology_knn", "inventory_knn", "featural", "geographic"]
    ),
    similarity_measure=st.sampled_from(["cosine", "shifted"]),
    similarity_top_k=st.none() | st.integers(1, 10),
    similarity_sinkhorn=st.integers(0, 30),
)


def check(weights: dict[str, float], expected_order: list[str]) -> None:
    assert list(weights) == expected_order
    assert all(weight >= 0 and math.isfinite(weight) for weight in weights.values())
    assert math.isclose(math.fsum(weights.values()), 1, rel_tol=0, abs_tol=1e-12)


@settings(deadline=None, max_examples=150)
@given(names=sources, target=st.sampled_from(sorted(LOCALES)), given_options=options)
def test_similarity(names: list[str], target: str, given_options: WeightingOptions) -> None:
    inputs = WeightingInputs(
        sources=tuple(names), target=target, num_examples={}, accuracy=None, options=given_options
    )
    weights = weights_for("similarity", inputs)
    check(weights, names)
    assert weights == weights_for("similarity", inputs)
    top_k = given_options.similarity_top_k
    num_kept = sum(weight > 0 for weight in weights.values())
    assert num_kept == min(len(names), top_k or len(names))
    if not given_options.similarity_sinkhorn:
        # The order of the sources is no opinion about them, but where two are equal at the edge of the top k.
        backwards = WeightingInputs(
            sources=tuple(reversed(names)),
            target=target,
            num_examples={},
            accuracy=None,
            options=given_options,
        )
        assert sorted(weights.values()) == sorted(weights_for("similarity", backwards).values())
        if target in names:
            assert weights[target] == max(weights.values())


@settings(deadline=None, max_examples=100)
@given(data=st.data(), names=sources)
def test_numbers_of_any_size(data: st.DataObject, names: list[str]) -> None:
    given_numbers = {name: data.draw(numbers) for name in names}
    inputs = WeightingInputs(
        sources=tuple(names),
        target=names[0],
        num_examples={},
        accuracy={name: {names[0]: number} for name, number in given_numbers.items()},
        options=WeightingOptions(manual_weights=given_numbers),
    )
    for name in ("manual", "performance"):
        weights = weights_for(name, inputs)
        check(weights, names)
        assert max(weights, key=lambda n: weights[n]) == max(names, key=lambda n: given_numbers[n]) or len(
            set(weights.values())
        ) < len(names)
