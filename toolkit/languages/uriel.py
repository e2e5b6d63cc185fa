"""The typological data: a slice of URIEL as lang2vec 1.1.2 has it, made by scripts/make_uriel_slice.py.

``data/uriel.npz`` holds L languages (those of which URIEL knows at least one feature, and those of ISO 639-1), in order
of their codes:

    languages            [L] ISO 639-3
    features             [289] names: S_ syntax, P_ phonology, INV_ inventory of sounds
    predicted            [L, 37] bits: every feature, unknown ones predicted by nearest neighbours (lang2vec's *_knn)
    average_codes        [L, 289] numbers into average_levels: mean of the sources, -1 where none knows the feature
    num_families         [L] how many families and subfamilies the language belongs to
    families             their numbers, language after language
    position_hundredths  [L, 2] latitude and longitude in hundredths of a degree

The data has a licence of its own (CC-BY-SA-4.0): data/LICENSE, data/ATTRIBUTION.md.
"""

import functools
from dataclasses import dataclass
from importlib import resources

import numpy as np


@dataclass(frozen=True)
class Uriel:
    """The data file, decoded.

    Args:
        number: row of each language.
        features: names of the 289 features.
        predicted: [L, 289] bool.
        average: [L, 289] float64; NaN where no source knows the feature.
        families: the families and subfamilies of each language.
        positions: [L, 2] float64, latitude and longitude in radians.
    """

    number: dict[str, int]
    features: tuple[str, ...]
    predicted: np.ndarray
    average: np.ndarray
    families: list[frozenset[int]]
    positions: np.ndarray


@functools.cache
def load() -> Uriel:
    """Read the data file, once a process."""
    file = resources.files("toolkit.languages") / "data" / "uriel.npz"
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        features = tuple(name.decode() for name in arrays["features"])
        average = arrays["average_levels"][arrays["average_codes"]]
        ends = np.cumsum(arrays["num_families"])
        families = np.split(arrays["families"], ends[:-1])
        return Uriel(
            number={code.decode(): i for i, code in enumerate(arrays["languages"])},
            features=features,
            predicted=np.unpackbits(arrays["predicted"], axis=1, count=len(features)).astype(bool),
            average=np.where(average < 0, np.nan, average),
            families=[frozenset(numbers.tolist()) for numbers in families],
            positions=np.radians(arrays["position_hundredths"] / 100),
        )
