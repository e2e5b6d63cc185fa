"""How alike two languages are, from URIEL.

With x_a the vector of language a over a set of features, and cos(a, b) = x_a . x_b / (|x_a| |x_b|):

    features                                          similarity   distance
    syntax_knn, phonology_knn, inventory_knn          cos          2/pi arccos(cos)
    featural (the three together)                     cos          2/pi arccos(cos)
    syntax_average, phonology_average,                cos          2/pi arccos(cos)
      inventory_average
    genetic (families and subfamilies shared)         cos          2/pi arccos(cos)
    geographic                                        1 - d        d = arccos(p_a . p_b) / pi

``*_knn``: 0 or 1 for every feature; what no source knows is predicted from the nearest neighbours. ``*_average``: the
mean of the sources, with holes. Two languages are then compared on the features that both have; where they share
fewer than half of the set, that is an error, and a hole is never taken for a zero. For ``genetic``, x_a holds a one for
each family and subfamily: cos = shared / sqrt(number of a * number of b); an isolate (Basque) has no relatives, so its
similarity to every other language is exactly 0. For ``geographic``, p_a is a language's place on the unit sphere, and d
the great circle between two places as a fraction of half the earth's circumference.

Source: P. Littell et al., URIEL and lang2vec (EACL 2017); the angular distance and the comparison of what both know
follow A. Khan et al., URIEL+ (COLING 2025).
"""

import functools
from collections.abc import Sequence

import numpy as np

from toolkit.config.names import did_you_mean
from toolkit.errors import InputError
from toolkit.languages import uriel
from toolkit.languages.codes import iso639_3

PREFIXES = {"syntax": "S_", "phonology": "P_", "inventory": "INV_", "featural": ""}
FEATURES = (
    "syntax_knn",
    "syntax_average",
    "phonology_knn",
    "phonology_average",
    "inventory_knn",
    "inventory_average",
    "featural",
    "genetic",
    "geographic",
)
LEAST_SHARED = 0.5
"""Share of a set of features that both languages must have."""
NUM_NAMED = 8
"""Missing features that an error names."""

FAMILIES_OF = {"nob": "nor", "nno": "nor", "twi": "aka"}
"""Languages whose families the data holds under the macrolanguage only."""
ISOLATES = frozenset(["bsk", "eus", "hai", "kut", "sad", "tiw", "was", "yuc", "zun"])
"""Languages without relatives. Every other one for which the data has no family is one that it does not know about."""


def similarity(locale_a: str, locale_b: str, features: str = "syntax_knn") -> float:
    """How alike two languages are: 1 for the same language, 0 for nothing in common.

    Args:
        locale_a, locale_b: locales or codes of ISO 639.
        features: one of :data:`FEATURES`; the formulas stand at the top of the module.

    Raises:
        InputError: an unknown language or set of features, or the data lacks what the set needs.
    """
    _check_name(features)
    return _similarity(iso639_3(locale_a), iso639_3(locale_b), features)


def distance(locale_a: str, locale_b: str, kind: str = "syntax_knn") -> float:
    """How far apart two languages are: 0 for the same language, at most 1.

    Args:
        locale_a, locale_b: locales or codes of ISO 639.
        kind: one of :data:`FEATURES`; the formulas stand at the top of the module.

    Raises:
        InputError: as :func:`similarity`.
    """
    alike = similarity(locale_a, locale_b, kind)
    return 1 - alike if kind == "geographic" else 2 / np.pi * float(np.arccos(alike))


def similarity_matrix(locales: Sequence[str], features: str = "syntax_knn") -> np.ndarray:
    """:func:`similarity` of each pair of ``locales``.

    Returns:
        [locales, locales] float64, symmetric, ones on the diagonal.

    Raises:
        InputError: as :func:`similarity`.
    """
    _check_name(features)
    codes = [iso639_3(locale) for locale in locales]
    return np.array([[_similarity(a, b, features) for b in codes] for a in codes]).reshape(len(codes), -1)


def _check_name(features: str) -> None:
    if features not in FEATURES:
        raise InputError(
            f"unknown set of language features '{features}'{did_you_mean(features, FEATURES)}",
            hint=f"one of {', '.join(FEATURES)}",
        )


def _similarity(a: str, b: str, features: str) -> float:
    """The similarity of two languages by their codes in the data."""
    if a == b:
        return 1.0
    a, b = min(a, b), max(a, b)  # one order of operations: the matrix is symmetric to the last bit
    if features == "genetic":
        alike = _genetic(a, b)
    elif features == "geographic":
        alike = _geographic(a, b)
    else:
        alike = _typological(a, b, features)
    return min(max(float(alike), 0.0), 1.0)


def _typological(a: str, b: str, features: str) -> float:
    data, columns = uriel.load(), _columns(features)
    table = data.average if features.endswith("_average") else data.predicted
    x_a, x_b = (table[data.number[code]][columns].astype(np.float64) for code in (a, b))
    both = ~(np.isnan(x_a) | np.isnan(x_b))
    x_a, x_b = x_a[both], x_b[both]
    norms = np.linalg.norm(x_a) * np.linalg.norm(x_b)
    if both.sum() < LEAST_SHARED * len(columns) or norms == 0:
        raise InputError(_what_is_missing(a, b, features), hint=_instead(features))
    return x_a @ x_b / norms


@functools.cache
def _columns(features: str) -> np.ndarray:
    prefix = PREFIXES[features.partition("_")[0]]
    return np.array([i for i, name in enumerate(uriel.load().features) if name.startswith(prefix)])


def _what_is_missing(a: str, b: str, features: str) -> str:
    data, columns = uriel.load(), _columns(features)
    lines = [f"{features}: too little is known about {a} and {b} to compare them"]
    for code in (a, b):
        missing = [data.features[i] for i in columns if np.isnan(data.average[data.number[code], i])]
        names = ", ".join(missing[:NUM_NAMED]) + (", ..." if len(missing) > NUM_NAMED else "")
        if missing:
            lines.append(f"{code} lacks {len(missing)} of {len(columns)} features: {names}")
    return "\n  ".join(lines)


def _instead(features: str) -> str:
    return f"{features.replace('_average', '_knn')} has predictions in the place of what is not known"


def _genetic(a: str, b: str) -> float:
    families_a, families_b = _families(a), _families(b)
    if not families_a or not families_b:
        return 0.0
    return len(families_a & families_b) / np.sqrt(len(families_a) * len(families_b))


def _families(code: str) -> frozenset[int]:
    data = uriel.load()
    families = data.families[data.number[FAMILIES_OF.get(code, code)]]
    if not families and code not in ISOLATES:
        raise InputError(
            f"genetic: the data (URIEL) holds no family of {code}, and it is no known isolate",
            hint="syntax_knn or another set of features, or a related language's code in its place",
        )
    return families


def _geographic(a: str, b: str) -> float:
    data = uriel.load()
    (latitude_a, longitude_a), (latitude_b, longitude_b) = (data.positions[data.number[c]] for c in (a, b))
    # Haversine: exact for neighbours, where the arccosine of a dot product loses half of the digits.
    half_chord_squared = (
        np.sin((latitude_b - latitude_a) / 2) ** 2
        + np.cos(latitude_a) * np.cos(latitude_b) * np.sin((longitude_b - longitude_a) / 2) ** 2
    )
    return 1 - 2 * np.arcsin(np.sqrt(min(half_chord_squared, 1.0))) / np.pi
