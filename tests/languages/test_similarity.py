"""How alike languages are: against figures of the lang2vec wheel, formulas by hand, and properties."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.data.samples.locales import LOCALES
from toolkit.errors import InputError
from toolkit.languages import FEATURES, distance, similarity, similarity_matrix, uriel
from toolkit.languages.measures import ISOLATES

WHOLE = [features for features in FEATURES if not features.endswith("_average")]
locales = st.sampled_from(sorted(LOCALES))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    # Read from feature_predictions.npz of the wheel with numpy alone.
    [
        ("sq", "en", 0.796),
        ("sq", "fr", 0.819),
        ("sq", "de", 0.810),
        ("sq", "es", 0.854),
        ("sq", "it", 0.864),
        ("sq", "pt", 0.900),
        ("en", "de", 0.903),
        ("es", "it", 0.963),
        ("en", "swh", 0.474),
    ],
)
def test_syntax_as_in_the_wheel(a: str, b: str, expected: float) -> None:
    assert similarity(a, b) == pytest.approx(expected, abs=5e-4) == similarity(a, b, "syntax_knn")


@pytest.mark.parametrize("prefix", ["syntax", "phonology", "inventory", "featural"])
def test_cosine_by_hand(prefix: str) -> None:
    data = uriel.load()
    start = {"syntax": "S_", "phonology": "P_", "inventory": "INV_", "featural": ""}[prefix]
    columns = [i for i, name in enumerate(data.features) if name.startswith(start)]
    assert len(columns) == {"syntax": 103, "phonology": 28, "inventory": 158, "featural": 289}[prefix]
    x, y = (data.predicted[data.number[code]][columns] for code in ("sqi", "eng"))
    expected = (x & y).sum() / math.sqrt(x.sum() * y.sum())
    features = prefix if prefix == "featural" else f"{prefix}_knn"
    assert similarity("sq-AL", "en-US", features) == pytest.approx(expected, rel=1e-12)
    assert distance("sq-AL", "en-US", features) == pytest.approx(2 / math.pi * math.acos(expected), rel=1e-12)


def test_genetic_by_hand() -> None:
    # URIEL's families: Albanian 1, English 9, French 12, German 6; English and German share the first three and their
    # own branch apart; Basque none; all of them Indo-European but Basque.
    assert similarity("sq", "en", "genetic") == pytest.approx(1 / math.sqrt(1 * 9), rel=1e-12)
    assert similarity("sq", "fr", "genetic") == pytest.approx(1 / math.sqrt(1 * 12), rel=1e-12)
    assert similarity("en", "de", "genetic") == pytest.approx(4 / math.sqrt(9 * 6), rel=1e-12)
    assert similarity("eu", "es", "genetic") == 0.0
    assert distance("eu", "es", "genetic") == 1.0
    assert similarity("eu-ES", "eu", "genetic") == 1.0
    # Held under Norwegian.
    assert similarity("nb-NO", "no", "genetic") == pytest.approx(1, rel=1e-12)
    assert similarity("nb-NO", "da-DK", "genetic") > similarity("nb-NO", "de-DE", "genetic")


def test_a_family_that_is_not_known_is_no_isolate() -> None:
    with pytest.raises(InputError, match="no family of vol"):
        similarity("vo", "en", "genetic")
    assert {code for code in ISOLATES if uriel.load().families[uriel.load().number[code]]} == set()


def test_geographic_is_the_great_circle() -> None:
    # England, France and China at URIEL's places: 53.0 N 0.9 W, 48.0 N 2.1 E, 35.0 N 110.0 E; the spherical law of
    # cosines in place of the haversine.
    places = {"en": (52.98, -0.93), "fr": (47.98, 2.05), "zh": (34.98, 110.03)}
    for a, b, kilometres in (("en", "fr", 595), ("en", "zh", 8190), ("fr", "zh", 8360)):
        (phi, lam), (psi, mu) = (map(math.radians, places[name]) for name in (a, b))
        angle = math.acos(math.sin(phi) * math.sin(psi) + math.cos(phi) * math.cos(psi) * math.cos(lam - mu))
        assert distance(a, b, "geographic") == pytest.approx(angle / math.pi, abs=1e-5)
        assert distance(a, b, "geographic") * math.pi * 6371 == pytest.approx(kilometres, rel=0.02)
        assert similarity(a, b, "geographic") == pytest.approx(1 - angle / math.pi, abs=1e-5)


def test_holes_are_an_error_that_names_them_and_never_zeros() -> None:
    # Afrikaans: 66 of 103 features of syntax are not known.
    with pytest.raises(InputError, match="syntax_average") as caught:
        similarity("af-ZA", "en-US", "syntax_average")
    assert "afr lacks 66 of 103 features: S_" in str(caught.value)
    assert "eng lacks" not in str(caught.value)
    assert "syntax_knn" in str(caught.value.hint)
    for locale, missing in (("fil-PH", 103), ("jv-ID", 86), ("ml-IN", 52)):
        with pytest.raises(InputError, match=f"lacks {missing} of 103"):
            similarity(locale, "en-US", "syntax_average")


def test_averages_compare_what_both_languages_have() -> None:
    data = uriel.load()
    columns = [i for i, name in enumerate(data.features) if name.startswith("S_")]
    x, y = (data.average[data.number[code]][columns] for code in ("fra", "deu"))
    both = [i for i in range(len(columns)) if not math.isnan(x[i]) and not math.isnan(y[i])]
    assert len(both) < len(columns)
    dot, xx, yy = (sum(p[i] * q[i] for i in both) for p, q in ((x, y), (x, x), (y, y)))
    assert similarity("fr", "de", "syntax_average") == pytest.approx(dot / math.sqrt(xx * yy), rel=1e-12)
    # With the holes as zeros it is another number.
    zeros = (
        np.nan_to_num(x)
        @ np.nan_to_num(y)
        / np.linalg.norm(np.nan_to_num(x))
        / np.linalg.norm(np.nan_to_num(y))
    )
    assert abs(similarity("fr", "de", "syntax_average") - zeros) > 1e-3


@pytest.mark.parametrize("features", WHOLE)
def test_every_sample_locale_can_be_compared(features: str) -> None:
    matrix = similarity_matrix(sorted(LOCALES), features)
    assert matrix.shape == (len(LOCALES), len(LOCALES))
    assert matrix.dtype == np.float64
    assert (matrix == matrix.T).all()
    assert (matrix.diagonal() == 1).all()
    assert matrix.min() >= 0
    assert matrix.max() <= 1
    # A set of features that says the same of all languages would be of no use, and would show here.
    assert len(np.unique(matrix)) > 50


def test_the_sets_of_features_differ() -> None:
    assert len({similarity("en-US", "de-DE", features) for features in FEATURES}) == len(FEATURES)


@settings(deadline=None, max_examples=60)
@given(a=locales, b=locales, features=st.sampled_from(WHOLE))
def test_symmetric_bounded_and_one_for_itself(a: str, b: str, features: str) -> None:
    assert similarity(a, b, features) == similarity(b, a, features)
    assert 0 <= similarity(a, b, features) <= 1
    assert 0 <= distance(a, b, features) <= 1
    assert similarity(a, a, features) == 1.0
    assert distance(a, a, features) == 0.0


@settings(deadline=None, max_examples=60)
@given(three=st.tuples(locales, locales, locales), kind=st.sampled_from(WHOLE))
def test_distances_obey_the_triangle_inequality(three: tuple[str, str, str], kind: str) -> None:
    for a, b, c in itertools.permutations(three):
        assert distance(a, c, kind) <= distance(a, b, kind) + distance(b, c, kind) + 1e-7


def test_script_and_region_do_not_matter() -> None:
    assert similarity("zh-CN", "zh-TW") == 1.0
    assert similarity("sr-Latn", "en-GB") == similarity("sr-RS", "en-US")


def test_an_unknown_set_of_features_names_the_nearest_one() -> None:
    with pytest.raises(InputError, match="did you mean 'syntax_knn'"):
        similarity("en", "fr", "syntax_kn")
    with pytest.raises(InputError, match="geographic"):
        distance("en", "en", "geografic")
    with pytest.raises(InputError, match="nonsense"):
        similarity_matrix([], "nonsense")


def test_an_unknown_language_is_an_error_in_the_matrix_too() -> None:
    with pytest.raises(InputError, match="xq"):
        similarity_matrix(["en-US", "xq-AL"])
